//! Frames that wait for the host: [`Backlog`], between the shards and the thread that gives them to it ([`super::writer`]).
//!
//! Two lists of records: the shards fill one, the writer takes it whole and leaves its own, which is empty, in its place. So the lock
//! is held for copying a batch or for swapping two pointers, and never while the kernel has a frame. All memory is had and touched
//! beforehand. A list that is full refuses what comes until the writer has taken it: the backlog is bounded by two lists.
//!
//! Invariant: `ends` ascends, and the last one is within `bytes`.

use std::sync::MutexGuard;

use crate::limits::{TAP_BACKLOG_BYTES, TAP_BACKLOG_FRAMES};
use crate::port::batch_lock::BatchLock;

/// Frames that wait, of any shard.
pub(super) struct Backlog(BatchLock<Records>);

/// Frames one behind the other, each with its virtio-net header in front.
pub(super) struct Records {
    bytes: Box<[u8]>,
    ends: Vec<u32>,
}

impl Backlog {
    pub(super) fn new() -> Self {
        Self(BatchLock::new(Records::new()))
    }

    /// For a batch of so many `bytes`; `None` while somebody else is at it for too long.
    #[inline]
    pub(super) fn enter(&self, bytes: u64) -> Option<MutexGuard<'_, Records>> {
        self.0.enter(bytes)
    }

    /// Has the frames that wait change places with `taken`, which is empty; returns whether there are any.
    pub(super) fn take(&self, taken: &mut Records) -> bool {
        let mut waiting = self.0.lock();
        std::mem::swap(&mut *waiting, taken);
        !taken.ends.is_empty()
    }
}

impl Records {
    pub(super) fn new() -> Self {
        let mut records = Self { bytes: vec![0; TAP_BACKLOG_BYTES].into(), ends: vec![0; TAP_BACKLOG_FRAMES] };
        // What was never written may be no memory yet, and a shard must not wait for the kernel to find some.
        records.bytes.fill(u8::MAX);
        records.ends.fill(u32::MAX);
        records.clear();
        records
    }

    /// Room for a record of `len` bytes behind the last one, which [`Records::keep`] makes a record; `None` if there is none.
    #[inline]
    pub(super) fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        let start = self.end();
        if self.ends.len() == TAP_BACKLOG_FRAMES {
            return None;
        }
        self.bytes.get_mut(start..start.checked_add(len)?)
    }

    /// Makes the first `len` bytes of the room a record.
    #[inline]
    pub(super) fn keep(&mut self, len: usize) {
        let end = self.end() + len;
        if end <= self.bytes.len() && self.ends.len() < TAP_BACKLOG_FRAMES {
            self.ends.push(end as u32);
        }
    }

    /// How many records there are.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Forgets those behind the first `len`.
    pub(super) fn truncate(&mut self, len: usize) {
        self.ends.truncate(len);
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.ends.clear();
    }

    /// The records, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(&0).chain(&self.ends);
        starts.zip(&self.ends).map(|(&start, &end)| self.bytes.get(start as usize..end as usize).unwrap_or(&[]))
    }

    fn end(&self) -> usize {
        self.ends.last().map_or(0, |&end| end as usize)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn put(backlog: &Backlog, len: usize, byte: u8) -> bool {
        let mut records = backlog.enter(len as u64).unwrap();
        let Some(room) = records.room(len) else { return false };
        room.fill(byte);
        records.keep(len);
        true
    }

    #[test]
    fn records_come_out_as_they_went_in_and_there_is_room_again_once_they_were_taken() {
        let (backlog, mut taken) = (Backlog::new(), Records::new());
        assert!(!backlog.take(&mut taken));
        for byte in 0..10 {
            assert!(put(&backlog, 60 + usize::from(byte), byte));
        }
        assert!(backlog.take(&mut taken));
        let seen: Vec<_> = taken.iter().map(|record| (record.len(), record[0])).collect();
        assert_eq!(seen, (0..10).map(|byte| (60 + usize::from(byte), byte)).collect::<Vec<_>>());
        taken.clear();
        let large = TAP_BACKLOG_BYTES / 2;
        assert!(put(&backlog, large, 1) && put(&backlog, large, 2) && !put(&backlog, 1, 3), "it is full of bytes");
        assert!(backlog.take(&mut taken) && put(&backlog, 1, 4));
        taken.clear();
        assert!(backlog.take(&mut taken) && taken.len() == 1);
        taken.clear();
        let count = (0..).take_while(|_| put(&backlog, 1, 5)).count();
        assert_eq!(count, TAP_BACKLOG_FRAMES, "it is full of frames");
    }

    #[test]
    fn what_was_put_there_in_vain_is_forgotten() {
        let mut records = Records::new();
        for len in [100, 200, 300] {
            records.room(len).unwrap();
            records.keep(len);
        }
        records.truncate(1);
        assert_eq!((records.len(), records.iter().map(<[u8]>::len).sum::<usize>()), (1, 100));
    }
}
