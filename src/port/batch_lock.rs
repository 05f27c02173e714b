//! A lock that is held for a batch, and how long a shard waits for it: [`BatchLock`].
//!
//! A shard that finds another one in a receiver's ring waits for as long as a batch takes. If that is over, the holder is held up
//! in a peer's memory, or the host has given its CPU away. The first may last as long as the peer likes, and nobody waits for it any
//! more. The second ends when the scheduler comes round, and is the host's doing and no peer's: dropping a batch for it would
//! lose frames of innocent guests wherever shards have no CPUs to themselves. So it is waited for, while the kernel says that
//! the holder runs or could run, [`PREEMPTED_MICROS`] at most and for a twentieth of the time.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use crate::sys::{cpu, threads};

/// How long a shard waits for a ring that another thread is in, in microseconds, beside a nanosecond for each byte of that one's
/// batch. A batch of small frames takes 5 us, and copying is several times as fast as that. A debug build is slower.
pub(super) const WAIT_MICROS: u64 = if cfg!(debug_assertions) { 500 } else { 20 };

/// How long it waits for several in a row, in microseconds.
const LONGEST_WAIT_MICROS: u64 = 50 * WAIT_MICROS;

/// How long it waits for one that would go on if it had a CPU, in microseconds: some slices of the scheduler. Tests are patient.
const PREEMPTED_MICROS: u64 = if cfg!(test) { 20_000_000 } else { 10_000 };

/// How much longer than such a wait took the next one is away.
const REST: u64 = 20;

/// Something that shards and the control side have one at a time: a ring, or frames that wait for the host.
#[derive(Default)]
pub(super) struct BatchLock<T> {
    state: Mutex<T>,
    occupancy: Occupancy,
}

impl<T> BatchLock<T> {
    /// It, with nobody in it.
    pub fn new(state: T) -> Self {
        Self { state: Mutex::new(state), occupancy: Occupancy::default() }
    }

    /// Waits for it, however long that takes: not for a shard.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        // A panic under the lock cannot leave the state half changed in a way that matters: what a peer can write is checked anew
        // on every access, and our own lists are changed whole.
        self.hold(self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// It, if nobody has it just now.
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        match self.state.try_lock() {
            Ok(state) => Some(self.hold(state)),
            Err(TryLockError::Poisoned(poisoned)) => Some(self.hold(poisoned.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// It, for a batch of so many `bytes`, after a wait if another shard is busy with one. `None` if somebody is held up there by
    /// the peer whose memory it is, or for long by the host that gave the CPU away.
    #[inline]
    pub fn enter(&self, bytes: u64) -> Option<MutexGuard<'_, T>> {
        let state = self.try_lock().or_else(|| self.occupancy.wait(|| self.try_lock()))?;
        self.occupancy.bear(bytes);
        Some(state)
    }

    #[inline]
    fn hold<'a>(&self, state: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.occupancy.begin();
        state
    }
}

/// Who has the lock. What is written under it is on the line that the lock itself is on.
struct Occupancy {
    /// How often somebody has taken the lock: while it stays the same, the same one has it.
    holder: AtomicU32,
    /// The thread that has taken it last.
    thread: AtomicI32,
    /// Bytes of the batch that the present one is busy with, at most.
    burden: AtomicU64,
    /// The holder that a shard has waited for in vain: nobody waits for it again.
    given_up: AtomicU32,
    /// From when on, by [`cpu::cycles`], a holder that has no CPU is waited for again; 0 is at once.
    lenient_from: AtomicU64,
}

impl Default for Occupancy {
    fn default() -> Self {
        let (holder, thread, burden, lenient_from) = Default::default();
        Self { holder, thread, burden, given_up: AtomicU32::new(u32::MAX), lenient_from }
    }
}

impl Occupancy {
    /// The calling thread has the lock now.
    #[inline]
    pub fn begin(&self) {
        self.holder.store(self.holder.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        self.thread.store(threads::id(), Ordering::Relaxed);
        self.bear(0);
    }

    /// It has it for a batch of at most so many bytes.
    #[inline]
    pub fn bear(&self, bytes: u64) {
        self.burden.store(bytes, Ordering::Relaxed);
    }

    /// What `enter` gives, once it does; `None` if somebody is in the ring for too long.
    #[cold]
    pub fn wait<T>(&self, enter: impl Fn() -> Option<T>) -> Option<T> {
        let mut holder = self.holder.load(Ordering::Relaxed);
        if holder == self.given_up.load(Ordering::Relaxed) {
            return enter();
        }
        let began = cpu::cycles();
        let (mut since, mut lenient) = (began, false);
        loop {
            std::hint::spin_loop();
            let entered = enter();
            let (now, present) = (cpu::cycles(), self.holder.load(Ordering::Relaxed));
            let waited = now.wrapping_sub(began);
            if entered.is_some() {
                if lenient {
                    self.rest(now, waited);
                }
                return entered;
            }
            if present != holder {
                (holder, since) = (present, now);
            }
            let patience = micros(WAIT_MICROS) + micros(self.burden.load(Ordering::Relaxed)) / 1000;
            if now.wrapping_sub(since) <= patience && (lenient || waited <= micros(LONGEST_WAIT_MICROS)) {
                continue;
            }
            if waited > micros(PREEMPTED_MICROS) || !(lenient || self.is_lenient(now)) || self.is_held_up() {
                self.given_up.store(holder, Ordering::Relaxed);
                self.rest(now, waited);
                return None;
            }
            lenient = true;
            std::thread::yield_now();
            since = cpu::cycles();
        }
    }

    /// Whether who is in the ring waits in the kernel.
    fn is_held_up(&self) -> bool {
        threads::is_waiting(self.thread.load(Ordering::Relaxed))
    }

    fn is_lenient(&self, now: u64) -> bool {
        let from = self.lenient_from.load(Ordering::Relaxed);
        from == 0 || now.wrapping_sub(from) as i64 >= 0
    }

    /// Nobody without a CPU is waited for in a time that is much longer than this one has `waited`.
    fn rest(&self, now: u64, waited: u64) {
        self.lenient_from.store(now.wrapping_add(waited.saturating_mul(REST)).max(1), Ordering::Relaxed);
    }
}

/// So many microseconds in counts of [`cpu::cycles`].
pub(super) fn micros(count: u64) -> u64 {
    cpu::cycles_per_second() / 1_000_000 * count
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::cell::Cell;
    use std::sync::mpsc::channel;

    use super::*;

    /// How often a shard looks whether it can enter while another thread is in the ring, held up in the kernel: the first time that
    /// it comes, and the second.
    fn looks(occupancy: &Occupancy) -> [u32; 2] {
        std::thread::scope(|scope| {
            let ((tell, told), (end, ended)) = (channel(), channel::<()>());
            scope.spawn(move || {
                occupancy.begin();
                tell.send(threads::id()).unwrap();
                let _ = ended.recv();
            });
            let holder = told.recv().unwrap();
            while !threads::is_waiting(holder) {
                std::thread::yield_now();
            }
            let looks = [(); 2].map(|()| {
                let looks = Cell::new(0);
                assert_eq!(
                    occupancy.wait(|| {
                        looks.set(looks.get() + 1);
                        None::<()>
                    }),
                    None
                );
                looks.get()
            });
            drop(end);
            looks
        })
    }

    #[test]
    fn who_was_waited_for_in_vain_is_not_waited_for_again_and_who_comes_next_is() {
        let occupancy = Occupancy::default();
        let mut waited = 0;
        for _ in 0..20 {
            let [first, second] = looks(&occupancy);
            // Unless the host took the CPU away in the middle of it.
            waited += u32::from(first > 1);
            assert_eq!(second, 1);
        }
        assert!(waited > 1, "{waited} of 20");
    }
}
