//! Whose memory a shard is in: its [`Stamp`], which the watchdog reads, and the watchdog's [`Alarm`].
//!
//! A shard writes a word before each visit and before each delivery: what it does, for which port, out of which other port's
//! memory if it copies from there, and a number that is another one each time. Plain stores to a line of its own: nobody waits for them, and nothing is written per frame. Who
//! looks twice and finds the same word knows that the shard has been in the same place all along.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread::Thread;

use crate::ident::PortIndex;
use crate::limits::PORTS;

/// What a shard does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing that a peer could hold up.
    Own = 0,
    /// It sleeps, or is about to: a look at it is not needed before it has said that it is awake.
    Asleep = 1,
    /// It takes frames off a ring of the port, gives buffers back, or asks for kicks.
    Receive = 2,
    /// It reads what frames of the port carry, or copies it into memory of its own.
    Reading = 3,
    /// It writes into a ring of the port and interrupts its guest.
    Writing = 4,
}

/// A place that a shard was seen in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Seen(u64);

impl Seen {
    /// What the shard does, and for which port, the receiver where it writes.
    pub fn at(self) -> (Phase, PortIndex) {
        let phases = [Phase::Own, Phase::Asleep, Phase::Receive, Phase::Reading, Phase::Writing];
        (phases.get((self.0 & 0xff) as usize).copied().unwrap_or(Phase::Own), PortIndex((self.0 >> 8) as u16))
    }

    /// The sender, if it writes what lies in that one's memory still: then it may be in either's.
    pub fn sender(self) -> Option<PortIndex> {
        let sender = PortIndex((self.0 >> 24) as u16);
        Some(sender).filter(|&sender| matches!(self.at(), (Phase::Writing, port) if port != sender))
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
    /// The shard goes on to this, in nobody's memory but that port's. For its own thread.
    #[inline]
    pub fn set(&self, phase: Phase, port: PortIndex) {
        self.place.store(self.next(phase, port, port), Ordering::Relaxed);
    }

    /// The shard goes on to write frames that lie in memory of `sender` into a ring of `port`. For its own thread.
    #[inline]
    pub fn set_writing(&self, port: PortIndex, sender: PortIndex) {
        self.place.store(self.next(Phase::Writing, port, sender), Ordering::Relaxed);
    }

    /// The word for that: the phase in 8 bits, each port in 16, and a number that differs from the last one in 24. They are
    /// compared over some milliseconds.
    #[inline]
    fn next(&self, phase: Phase, port: PortIndex, sender: PortIndex) -> u64 {
        let number = (self.place.load(Ordering::Relaxed) >> 40).wrapping_add(1);
        number << 40 | u64::from(sender.0) << 24 | u64::from(port.0) << 8 | phase as u64
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

/// What has the watchdog look while shards are awake, and lets it park while all sleep; and what it tells them.
///
/// As in `sys::doorbell`: the watchdog says that it stops looking and then looks once more whether all sleep; a shard says that
/// it is awake and then looks whether anybody looks. Both are sequentially consistent, so one sees the other.
#[derive(Default)]
pub(super) struct Alarm {
    looking: AtomicBool,
    watchdog: OnceLock<Thread>,
    /// The ports that it is not sure of.
    pub probation: Probation,
    /// The ports that it is to forget.
    pub former: Former,
}

/// Numbers of ports that have ended and which are others' now. The control side puts them in and waits for nobody.
#[derive(Default)]
pub(super) struct Former {
    any: AtomicBool,
    ports: Ports,
}

/// A set of ports that one or the other of held a shard up. It is read once per batch, and empty but for a while after that.
#[derive(Default)]
pub(super) struct Probation {
    any: AtomicBool,
    ports: Ports,
}

/// One bit for each.
struct Ports([AtomicU64; PORTS / 64]);

impl Default for Ports {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; PORTS / 64])
    }
}

impl Probation {
    /// Whether there are such ports.
    #[inline]
    pub fn is_any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// Whether `port` is one.
    pub fn has(&self, port: PortIndex) -> bool {
        let word = self.ports.0.get(port.index() / 64);
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (port.index() % 64) & 1 == 1)
    }

    /// Has it be one from now on, or no more. For the watchdog.
    pub fn put(&self, port: PortIndex, on: bool) {
        let Some(word) = self.ports.0.get(port.index() / 64) else { return };
        let bit = 1 << (port.index() % 64);
        if on {
            word.fetch_or(bit, Ordering::Relaxed)
        } else {
            word.fetch_and(!bit, Ordering::Relaxed)
        };
        self.any.store(self.ports.0.iter().any(|word| word.load(Ordering::Relaxed) != 0), Ordering::Relaxed);
    }
}

impl Former {
    /// Whatever is known of the owner that this number had is to be forgotten.
    pub fn put(&self, port: PortIndex) {
        if let Some(word) = self.ports.0.get(port.index() / 64) {
            word.fetch_or(1 << (port.index() % 64), Ordering::SeqCst);
            self.any.store(true, Ordering::SeqCst);
        }
    }

    /// Takes all of them out.
    pub fn take(&self, mut each: impl FnMut(PortIndex)) {
        if !self.any.load(Ordering::SeqCst) || !self.any.swap(false, Ordering::SeqCst) {
            return;
        }
        for (first, word) in (0..).step_by(64).zip(&self.ports.0) {
            let mut word = word.swap(0, Ordering::SeqCst);
            while word != 0 {
                each(PortIndex(first + word.trailing_zeros() as u16));
                word &= word - 1;
            }
        }
    }
}

impl Alarm {
    /// A shard woke up: has the watchdog look from now on. For the shard's own thread.
    pub fn awake(&self, stamp: &Stamp) {
        stamp.place.store(stamp.next(Phase::Own, PortIndex(0), PortIndex(0)), Ordering::SeqCst);
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

    /// Whether the watchdog looks.
    #[cfg(test)]
    pub fn is_looking(&self) -> bool {
        self.looking.load(Ordering::SeqCst)
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

    #[test]
    fn whose_memory_frames_are_written_from_is_said_too() {
        let stamp = Stamp::default();
        let says = |sender| (stamp.seen().at(), stamp.seen().sender()) == ((Phase::Writing, PortIndex(4095)), sender);
        stamp.set_writing(PortIndex(4095), PortIndex(4094));
        let first = stamp.seen();
        assert!(says(Some(PortIndex(4094))));
        stamp.set_writing(PortIndex(4095), PortIndex(4094));
        assert_ne!(stamp.seen(), first);
        // One's own frames, and those that have been copied.
        stamp.set_writing(PortIndex(4095), PortIndex(4095));
        assert!(says(None));
        stamp.set(Phase::Writing, PortIndex(4095));
        assert!(says(None));
        stamp.set(Phase::Reading, PortIndex(1));
        assert_eq!((stamp.seen().at(), stamp.seen().sender()), ((Phase::Reading, PortIndex(1)), None));
    }

    #[test]
    fn former_ports_are_taken_once() {
        let former = Former::default();
        let take = || {
            let mut all = Vec::new();
            former.take(|port| all.push(port.0));
            all
        };
        assert!(take().is_empty());
        [4095, 64, 0, 63, 64].into_iter().for_each(|port| former.put(PortIndex(port)));
        assert_eq!(take(), [0, 63, 64, 4095]);
        assert!(take().is_empty());
    }

    #[test]
    fn ports_are_on_probation_one_by_one() {
        let probation = Probation::default();
        assert!(!probation.is_any());
        [0, 64, 4095].into_iter().for_each(|port| probation.put(PortIndex(port), true));
        let on: Vec<_> = (0..4096).filter(|&port| probation.has(PortIndex(port))).collect();
        assert_eq!(on, [0, 64, 4095]);
        [0, 64].into_iter().for_each(|port| probation.put(PortIndex(port), false));
        assert!(probation.is_any() && probation.has(PortIndex(4095)) && !probation.has(PortIndex(64)));
        probation.put(PortIndex(4095), false);
        assert!(!probation.is_any());
    }
}
