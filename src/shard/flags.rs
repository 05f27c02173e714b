//! The two flags by which ringing a shard and its falling asleep agree: [`Flags`]; the essay is in `wake`.
//!
//! A file of its own so that tests/loom can run it through every interleaving with loom's atomics.

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// Whether somebody rang, and whether the shard sleeps.
#[derive(Debug, Default)]
pub(super) struct Flags {
    rung: AtomicBool,
    asleep: AtomicBool,
}

impl Flags {
    /// Notes a ring; returns whether the shard must be woken.
    pub(super) fn ring(&self) -> bool {
        self.rung.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::SeqCst)
    }

    /// Announces sleep; returns whether it may begin. If not, the announcement is taken back.
    pub(super) fn fall_asleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if self.rung.load(Ordering::SeqCst) {
            self.wake_up();
            return false;
        }
        true
    }

    /// The shard is awake again.
    pub(super) fn wake_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Takes the ring, if there was one. One relaxed load if not.
    #[inline]
    pub(super) fn take(&self) -> bool {
        self.rung.load(Ordering::Relaxed) && self.rung.swap(false, Ordering::SeqCst)
    }
}

/// `cargo test --release --manifest-path tests/loom/Cargo.toml`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Whoever rings while the shard falls asleep is either seen by the shard or told to wake it.
    #[test]
    fn no_ring_is_lost() {
        loom::model(|| {
            let flags = Arc::new(Flags::default());
            let ringer = {
                let flags = Arc::clone(&flags);
                thread::spawn(move || flags.ring())
            };
            let asleep = flags.fall_asleep();
            let told_to_wake = ringer.join().unwrap_or(false);
            assert!(!asleep || told_to_wake, "the shard sleeps and nobody wakes it");
        });
    }

    /// A ring that the shard takes between two others is not lost either, nor is the one after.
    #[test]
    fn a_ring_after_a_take_counts_anew() {
        loom::model(|| {
            let flags = Arc::new(Flags::default());
            let ringer = {
                let flags = Arc::clone(&flags);
                thread::spawn(move || [flags.ring(), flags.ring()])
            };
            let taken = flags.take();
            let asleep = flags.fall_asleep();
            let told = ringer.join().unwrap_or([false; 2]);
            let pending = flags.take();
            assert!(taken || pending, "two rings left no trace");
            assert!(!(asleep && pending) || told[0] || told[1], "the shard sleeps over a ring");
        });
    }
}
