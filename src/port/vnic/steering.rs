//! Which queue pair of a multiqueue guest a frame goes to: [`Steering`].
//!
//! A flow stays on the queue that it last came from: the guest's driver and scheduler have put the socket's CPU there, and
//! the answer belongs on the same one (virtio 1.3, 5.1.6.5.5, "automatic receive steering"). A flow that the guest has not
//! sent of yet goes to the queue that its hash says, or, if another shard is just delivering there, to the next one that
//! is free, and then stays there: so shards that deliver to one guest settle on different queues and do not wait for each
//! other, and no flow changes queues under way unless its guest has it so.
//!
//! A table of 4096 places by flow hash, one byte each, without locks: two flows that share a place share a queue, which is
//! no worse than sharing a hash. Writes are rare, since most frames find what they would write.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use crate::limits::QUEUE_PAIRS;

/// Places of the table. A guest with more flows than this at a time has them spread anyway.
const PLACES: usize = 4096;

/// Queue numbers by flow hash; 0 where no flow is known, else one more than the queue.
pub(super) struct Steering {
    places: Box<[AtomicU8]>,
    /// How many queues the guest used when a frame was last steered.
    ready: AtomicUsize,
}

const _: () = assert!(QUEUE_PAIRS < u8::MAX as usize);

impl Steering {
    /// A table for a port with `pairs` queue pairs; one that has one needs none.
    pub fn new(pairs: u16) -> Self {
        let places = if pairs > 1 { PLACES } else { 0 };
        Self { places: (0..places).map(|_| AtomicU8::new(0)).collect(), ready: AtomicUsize::new(0) }
    }

    /// Whether there is anything to steer.
    #[inline]
    pub fn is_needed(&self) -> bool {
        !self.places.is_empty()
    }

    /// Takes note that the guest uses its first `ready` queues. A change of that starts all over: flows have to spread over
    /// queues that are new, and those of queues that are gone need others.
    #[inline]
    pub fn set_ready(&self, ready: usize) {
        if self.ready.load(Ordering::Relaxed) != ready {
            self.ready.store(ready, Ordering::Relaxed);
            self.places.iter().for_each(|place| place.store(0, Ordering::Relaxed));
        }
    }

    /// The queue that the flow is on, if it is known and among the first `ready`.
    #[inline]
    pub fn queue(&self, hash: u32, ready: usize) -> Option<usize> {
        let place = self.place(hash)?;
        usize::from(place.load(Ordering::Relaxed)).checked_sub(1).filter(|&queue| queue < ready)
    }

    /// Notes that the flow is on `queue` from now on.
    #[inline]
    pub fn note(&self, hash: u32, queue: usize) {
        let Some(place) = self.place(hash) else { return };
        let value = (queue % QUEUE_PAIRS) as u8 + 1;
        // Looked at first: a store would take the cache line from the other shards each time.
        if place.load(Ordering::Relaxed) != value {
            place.store(value, Ordering::Relaxed);
        }
    }

    #[inline]
    fn place(&self, hash: u32) -> Option<&AtomicU8> {
        // The low bits choose among queues; the place is found by others.
        self.places.get((hash >> 12) as usize % PLACES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_stays_on_its_queue_while_the_guest_uses_that() {
        let steering = Steering::new(4);
        assert_eq!(steering.queue(7 << 12, 4), None);
        steering.note(7 << 12, 3);
        assert_eq!(steering.queue(7 << 12, 4), Some(3));
        assert_eq!(steering.queue(7 << 12, 3), None, "the guest has switched the queue off");
        assert_eq!(steering.queue(8 << 12, 4), None);
        steering.note(7 << 12, 0);
        assert_eq!(steering.queue(7 << 12 | 0xfff, 4), Some(0));
        steering.set_ready(4);
        assert_eq!(steering.queue(7 << 12, 4), None, "the guest uses other queues than before");
        steering.note(7 << 12, 1);
        steering.set_ready(4);
        assert_eq!(steering.queue(7 << 12, 4), Some(1));
    }

    #[test]
    fn a_port_with_one_pair_has_no_table() {
        let steering = Steering::new(1);
        assert!(!steering.is_needed());
        steering.note(1, 0);
        assert_eq!(steering.queue(1, 1), None);
    }
}
