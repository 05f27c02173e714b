//! Which queue pair of a multiqueue guest a frame goes to: [`Steering`].
//!
//! A flow stays on the queue that it last came from: the guest's driver and scheduler have put the socket's CPU there, and
//! the answer belongs on the same one (virtio 1.3, 5.1.6.5.5, "automatic receive steering"). A flow that the guest has not
//! sent of yet goes to the queue that its hash says, or, if another shard is just delivering there, to the next one that
//! is free, and then stays there: so shards that deliver to one guest settle on different queues and do not wait for each
//! other, and no flow changes queues under way unless its guest has it so.
//!
//! A table of 4096 places by flow hash, one word each, without locks: two flows that share a place share a queue, which is
//! no worse than sharing a hash. Writes are rare, since most frames find what they would write.
//!
//! Anybody can send to a guest what makes entries. So the hash has a key that nobody knows, and entries age: one that only
//! others' frames have used for some seconds of silence, one of a flow that the guest sends in some minutes. A flow that was
//! silent for as long has nothing under way that could be overtaken.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::limits::QUEUE_PAIRS;
use crate::sys::cpu;
use crate::wire::flow::{FlowKey, flow_hash};

/// Places of the table. A guest with more flows than this at a time has them spread anyway.
const PLACES: usize = 4096;

/// How long a flow stays where it is that only others have sent of, in ticks. Linux's TAP has 3 s (TUN_FLOW_EXPIRE).
const AGE: u32 = 8;

/// The same for one that the guest has sent of.
const AGE_SENT: u32 = 512;

/// Queues of flows by hash.
pub(super) struct Steering {
    key: FlowKey,
    /// [`Entry`] as a number.
    places: Box<[AtomicU32]>,
    /// How many queues the guest used when a frame was last steered.
    ready: AtomicUsize,
    /// A tick has so many cycles, as a power of two: half a second to one.
    tick: u32,
}

const _: () = assert!(QUEUE_PAIRS < Entry::QUEUE as usize);

/// Where a flow is, if anywhere. As a number: one more than the queue; whether the guest has sent of the flow; when it was
/// last seen to be used, which takes a month to come round.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry(u32);

impl Entry {
    const NONE: Self = Self(0);
    const QUEUE: u32 = 0xff;
    const SENT: u32 = 0x100;
    const TICKS: u32 = 9;

    fn new(queue: usize, sent: u32, now: u32) -> Self {
        let queue = (queue % QUEUE_PAIRS) as u32 + 1;
        Self(now << Self::TICKS | sent | queue)
    }

    /// How long it has not been used, in ticks.
    #[inline]
    fn age(self, now: u32) -> u32 {
        now.wrapping_sub(self.0 >> Self::TICKS) & (u32::MAX >> Self::TICKS)
    }

    /// Its queue, unless it is too old.
    #[inline]
    fn queue(self, now: u32) -> Option<usize> {
        let age = if self.0 & Self::SENT == 0 { AGE } else { AGE_SENT };
        let queue = (self.0 & Self::QUEUE).checked_sub(1)?;
        (self.age(now) < age).then_some(queue as usize)
    }
}

impl Steering {
    /// A table for a port with `pairs` queue pairs; one that has one needs none.
    pub fn new(pairs: u16) -> Self {
        let places = if pairs > 1 { PLACES } else { 0 };
        // A RandomState is keyed with random numbers from the kernel.
        let random = RandomState::new();
        Self {
            key: FlowKey::new([0, 1, 2, 3].map(|number| random.hash_one(number))),
            places: (0..places).map(|_| AtomicU32::new(Entry::NONE.0)).collect(),
            ready: AtomicUsize::new(0),
            tick: cpu::cycles_per_second().ilog2(),
        }
    }

    /// Whether there is anything to steer.
    #[inline]
    pub fn is_needed(&self) -> bool {
        !self.places.is_empty()
    }

    /// The time, for entries that age.
    #[inline]
    pub fn now(&self) -> u32 {
        (cpu::cycles() >> self.tick) as u32
    }

    /// The hash of the flow of a frame that begins with `head`.
    #[inline]
    pub fn hash(&self, head: &[u8]) -> u32 {
        flow_hash(&self.key, head)
    }

    /// Takes note that the guest uses its first `ready` queues. A change of that starts all over: flows have to spread over
    /// queues that are new, and those of queues that are gone need others.
    #[inline]
    pub fn set_ready(&self, ready: usize) {
        if self.ready.load(Ordering::Relaxed) != ready {
            self.ready.store(ready, Ordering::Relaxed);
            self.places.iter().for_each(|place| place.store(Entry::NONE.0, Ordering::Relaxed));
        }
    }

    /// The queue that the flow is on, if it is known and among the first `ready`. A frame goes there.
    #[inline]
    pub fn queue(&self, hash: u32, ready: usize, now: u32) -> Option<usize> {
        let place = self.place(hash)?;
        let entry = Entry(place.load(Ordering::Relaxed));
        let queue = entry.queue(now).filter(|&queue| queue < ready)?;
        if entry.0 & Entry::SENT == 0 && entry.age(now) > 0 {
            // Once a tick. Whoever changed the entry meanwhile knows better.
            let used = Entry::new(queue, 0, now);
            let _ = place.compare_exchange(entry.0, used.0, Ordering::Relaxed, Ordering::Relaxed);
        }
        Some(queue)
    }

    /// Notes that frames of the flow go to `queue` from now on.
    #[inline]
    pub fn note(&self, hash: u32, queue: usize, now: u32) {
        if let Some(place) = self.place(hash) {
            place.store(Entry::new(queue, 0, now).0, Ordering::Relaxed);
        }
    }

    /// Notes that the guest sends frames of the flow on `queue`.
    #[inline]
    pub fn note_sent(&self, hash: u32, queue: usize, now: u32) {
        let Some(place) = self.place(hash) else { return };
        let (entry, sent) = (Entry(place.load(Ordering::Relaxed)), Entry::new(queue, Entry::SENT, now));
        // Looked at first: a store would take the cache line from the other shards each time.
        let same = (entry.0 ^ sent.0) & (Entry::QUEUE | Entry::SENT) == 0;
        if !same || entry.age(now) > AGE_SENT / 8 {
            place.store(sent.0, Ordering::Relaxed);
        }
    }

    #[inline]
    fn place(&self, hash: u32) -> Option<&AtomicU32> {
        // The low bits choose among queues; the place is found by others.
        self.places.get((hash >> 12) as usize % PLACES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A flow's hash, whose place is its own.
    const FLOW: u32 = 7 << 12;

    #[test]
    fn a_flow_stays_on_its_queue_while_the_guest_uses_that() {
        let steering = Steering::new(4);
        assert_eq!(steering.queue(FLOW, 4, 0), None);
        steering.note(FLOW, 3, 0);
        assert_eq!(steering.queue(FLOW, 4, 0), Some(3));
        assert_eq!(steering.queue(FLOW, 3, 0), None, "the guest has switched the queue off");
        assert_eq!(steering.queue(8 << 12, 4, 0), None);
        steering.note_sent(FLOW, 0, 0);
        assert_eq!(steering.queue(FLOW | 0xfff, 4, 0), Some(0));
        steering.set_ready(4);
        assert_eq!(steering.queue(FLOW, 4, 0), None, "the guest uses other queues than before");
        steering.note(FLOW, 1, 0);
        steering.set_ready(4);
        assert_eq!(steering.queue(FLOW, 4, 0), Some(1));
    }

    #[test]
    fn a_flow_that_others_send_of_is_forgotten_after_some_seconds_of_silence() {
        for began in [0, 1000, u32::MAX >> Entry::TICKS, u32::MAX] {
            let steering = Steering::new(4);
            steering.note(FLOW, 3, began);
            let at = |ticks: u32| steering.queue(FLOW, 4, began.wrapping_add(ticks));
            // Frames keep it where it is, however long they go on.
            assert_eq!([AGE - 1, 2 * AGE - 2, 3 * AGE - 3].map(at), [Some(3); 3], "began at {began}");
            assert_eq!(at(4 * AGE - 3), None);
        }
    }

    #[test]
    fn a_flow_that_the_guest_sends_of_lives_for_minutes_and_nobody_else_moves_it() {
        let steering = Steering::new(4);
        steering.note(FLOW, 3, 0);
        steering.note_sent(FLOW, 1, 0);
        assert_eq!([0, AGE, AGE_SENT - 1].map(|now| steering.queue(FLOW, 4, now)), [Some(1); 3]);
        assert_eq!(steering.queue(FLOW, 4, AGE_SENT), None);
        // As long as it sends, whatever comes in.
        for now in (0..4 * AGE_SENT).step_by(100) {
            steering.note_sent(FLOW, 2, now);
            assert_eq!(steering.queue(FLOW, 4, now + 99), Some(2), "at {now}");
        }
    }

    #[test]
    fn every_port_has_a_key_of_its_own() {
        let frame: Vec<u8> = (0..64).collect();
        let hashes: std::collections::BTreeSet<_> = (0..8).map(|_| Steering::new(4).hash(&frame)).collect();
        assert!(hashes.len() > 6, "{hashes:?}");
    }

    #[test]
    fn a_port_with_one_pair_has_no_table() {
        let steering = Steering::new(1);
        assert!(!steering.is_needed());
        steering.note(1, 0, 0);
        steering.note_sent(1, 0, 0);
        assert_eq!(steering.queue(1, 1, 0), None);
    }
}
