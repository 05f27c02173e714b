//! Whose memory a shard is in: its [`Stamp`], which the watchdog reads, and the watchdog's [`Alarm`].
//!
//! A shard writes a word before each visit and before each delivery: what it does, for which port, and a number that is
//! another one each time. Plain stores to a line of its own: nobody waits for them, and nothing is written per frame. Who
//! looks twice and finds the same word knows that the shard has been in the same place all along.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread::Thread;

use crate::ident::PortIndex;

/// What a shard does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing that a peer could hold up.
    Own = 0,
    /// It sleeps, or is about to: a look at it is not needed before it has said that it is awake.
    Asleep = 1,
    /// It takes frames off a ring of the port, gives buffers back, or asks for kicks.
    Receive = 2,
    /// It reads what frames of the port carry.
    Reading = 3,
    /// It writes into a ring of the port and interrupts its guest.
    Writing = 4,
}

/// A place that a shard was seen in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Seen(u64);

impl Seen {
    /// What the shard does, and for which port.
    pub fn at(self) -> (Phase, PortIndex) {
        let phases = [Phase::Own, Phase::Asleep, Phase::Receive, Phase::Reading, Phase::Writing];
        (phases.get((self.0 & 0xff) as usize).copied().unwrap_or(Phase::Own), PortIndex((self.0 >> 8) as u16))
    }

    /// Whether it is in a port's memory.
    pub fn is_abroad(self) -> bool {
        !matches!(self.at().0, Phase::Own | Phase::Asleep)
    }
}

/// Where one shard's thread is.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct Stamp {
    place: AtomicU64,
    /// Another thread has taken its queues over.
    evicted: AtomicBool,
    /// The thread's number in the kernel.
    thread: AtomicI32,
}

impl Stamp {
    /// The shard goes on to this. For its own thread.
    #[inline]
    pub fn set(&self, phase: Phase, port: PortIndex) {
        let number = (self.place.load(Ordering::Relaxed) >> 24).wrapping_add(1);
        self.place.store(number << 24 | u64::from(port.0) << 8 | phase as u64, Ordering::Relaxed);
    }

    /// The shard is back in its own memory. For its own thread.
    #[inline]
    pub fn clear(&self) {
        self.set(Phase::Own, PortIndex(0));
    }

    /// The shard falls asleep. For its own thread.
    pub fn asleep(&self) {
        self.set(Phase::Asleep, PortIndex(0));
    }

    /// Where it is.
    pub fn seen(&self) -> Seen {
        Seen(self.place.load(Ordering::SeqCst))
    }

    /// Whether another thread has taken its queues over: it visits nobody any more.
    #[inline]
    pub fn is_evicted(&self) -> bool {
        self.evicted.load(Ordering::Relaxed)
    }

    /// Another thread takes its queues over.
    pub fn evict(&self) {
        self.evicted.store(true, Ordering::Relaxed);
    }

    /// Notes which thread it is that stamps.
    pub fn enroll(&self) {
        self.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
    }

    /// The number of its thread, once that runs.
    pub fn thread(&self) -> Option<i32> {
        Some(self.thread.load(Ordering::Relaxed)).filter(|&thread| thread != 0)
    }
}

/// What has the watchdog look while shards are awake, and lets it park while all sleep.
///
/// As in `sys::doorbell`: the watchdog says that it stops looking and then looks once more whether all sleep; a shard says that
/// it is awake and then looks whether anybody looks. Both are sequentially consistent, so one sees the other.
#[derive(Default)]
pub(super) struct Alarm {
    looking: AtomicBool,
    watchdog: OnceLock<Thread>,
}

impl Alarm {
    /// A shard woke up: has the watchdog look from now on. For the shard's own thread.
    pub fn awake(&self, stamp: &Stamp) {
        let number = (stamp.place.load(Ordering::Relaxed) >> 24).wrapping_add(1);
        stamp.place.store(number << 24 | Phase::Own as u64, Ordering::SeqCst);
        if !self.looking.load(Ordering::SeqCst) {
            self.call();
        }
    }

    /// Has the watchdog look.
    pub fn call(&self) {
        if let Some(watchdog) = self.watchdog.get() {
            watchdog.unpark();
        }
    }

    /// The calling thread is the watchdog.
    pub fn serve(&self) {
        let _ = self.watchdog.set(std::thread::current());
    }

    /// The watchdog looks from now on, or does not.
    pub fn look(&self, looks: bool) {
        self.looking.store(looks, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_says_what_and_where_and_is_another_one_each_time() {
        let stamp = Stamp::default();
        stamp.set(Phase::Writing, PortIndex(4095));
        let first = stamp.seen();
        assert_eq!((first.at(), first.is_abroad()), ((Phase::Writing, PortIndex(4095)), true));
        stamp.set(Phase::Writing, PortIndex(4095));
        assert_ne!(stamp.seen(), first);
        stamp.clear();
        assert!(!stamp.seen().is_abroad());
    }
}
