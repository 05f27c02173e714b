//! Counters that one shard writes and anybody reads.
//!
//! Each shard has a block of its own for every port, so an increment is a plain load, add and store without a bus lock;
//! readers sum over the shards. A reader sees each counter at some moment of its own, so sums over several counters are
//! exact only once traffic rests. 64-bit counters do not wrap: at 100 million frames a second it takes 5,800 years.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::verdict::DropReason;

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning shard may call this.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Replaces the value, where it is the last one that is told. Only the owning shard may call this.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Starts again at zero. Only while the owning shard does not count.
    pub fn clear(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// Frames dropped, by reason.
#[derive(Debug, Default)]
pub struct DropCounters([Counter; DropReason::COUNT]);

impl DropCounters {
    /// Counts `n` frames dropped for `reason`.
    #[inline]
    pub fn add(&self, reason: DropReason, n: u64) {
        self.0[reason.index()].add(n);
    }

    /// Frames dropped for `reason`.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason.index()].get()
    }
}

/// What one shard counts for one port. "rx" is what the switch received from the port, "tx" what it gave to it.
///
/// Two sums always hold at rest: `rx_frames = rx_delivered + rx_dropped` (each received frame reached at least one port
/// or was dropped for one reason), and every copy offered to the port is in `tx_frames` or in `tx_dropped`. A frame whose
/// first segments reached a port is delivered, and counts there as given; what it lacks is in `tx_segments_dropped`.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct PortCounters {
    /// Frames received from the port.
    pub rx_frames: Counter,
    /// Their bytes, without FCS.
    pub rx_bytes: Counter,
    /// Frames received from the port that reached at least one other port.
    pub rx_delivered: Counter,
    /// Frames received from the port that reached none, by reason.
    pub rx_dropped: DropCounters,
    /// Frames received from the port that were several, to be segmented.
    pub rx_gso: Counter,
    /// Bytes, without FCS, of the largest frame, from or to the port, that was longer on the wire than its MTU allows.
    pub mtu_exceeded_bytes: Counter,
    /// Frames given to the port.
    pub tx_frames: Counter,
    /// Their bytes, without FCS.
    pub tx_bytes: Counter,
    /// Frames given to the port that were several and stayed so.
    pub tx_gso: Counter,
    /// Frames given to the port as several, because it does not segment.
    pub tx_segmented: Counter,
    /// Segments of those that found no buffer, while earlier ones of their frame did.
    pub tx_segments_dropped: Counter,
    /// Frames given to the port with a checksum that was completed for it.
    pub tx_completed: Counter,
    /// Frames given to the port as parts of larger ones.
    pub tx_merged: Counter,
    /// Copies that were meant for the port and did not reach it, by reason.
    pub tx_dropped: DropCounters,
}

impl PortCounters {
    /// Starts again at zero, for another port with the same number. Only while no shard counts for it.
    pub fn clear(&self) {
        let rx = [&self.rx_frames, &self.rx_bytes, &self.rx_delivered, &self.rx_gso, &self.mtu_exceeded_bytes];
        let tx = [&self.tx_frames, &self.tx_bytes, &self.tx_gso];
        let made = [&self.tx_segmented, &self.tx_segments_dropped, &self.tx_completed, &self.tx_merged];
        for counter in rx.into_iter().chain(tx).chain(made) {
            counter.clear();
        }
        for counter in self.rx_dropped.0.iter().chain(&self.tx_dropped.0) {
            counter.clear();
        }
    }
}

/// What one shard counts for one receive queue, while several ports want to be served by that shard; nothing otherwise.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct QueueLoad {
    /// Cycles in visits of the queue.
    pub cycles: Counter,
    /// Visits that found frames.
    pub visits: Counter,
    /// Cycles from the visit before to each of those, added up: the longest that a frame can have waited.
    pub waited: Counter,
}

/// What one shard counts about itself. Cycles are those of [`crate::sys::cpu::cycles`].
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ShardCounters {
    /// Batches that had at least one frame.
    pub batches: Counter,
    /// Frames in them.
    pub frames: Counter,
    /// Cycles in turns that moved at least one frame.
    pub busy_cycles: Counter,
    /// Cycles in turns that found nothing.
    pub poll_cycles: Counter,
    /// Cycles asleep.
    pub sleep_cycles: Counter,
    /// How often the shard slept.
    pub sleeps: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_counted_by_reason() {
        let counters = PortCounters::default();
        counters.rx_dropped.add(DropReason::RingFull, 3);
        counters.rx_dropped.add(DropReason::RingFull, 2);
        assert_eq!(counters.rx_dropped.get(DropReason::RingFull), 5);
        assert_eq!(counters.rx_dropped.get(DropReason::LinkDown), 0);
    }
}
