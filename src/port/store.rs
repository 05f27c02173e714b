//! Frames in one buffer of our own, lent as batches: [`FrameStore`].
//!
//! What the ports without a far end stand on: `loopback` and `faulty` append to a store, `replay` lays one over the bytes
//! of a file. A store fills up, is drained from front to back and starts over; nothing is allocated after it was made.
//!
//! Invariant: the places ascend, do not overlap, and lie within the buffer.

use std::ops::Range;

use crate::frame::{Batch, Heads};
use crate::limits::{BATCH_BYTES, BATCH_FRAMES, VNET_HEADER_BYTES};
use crate::mem::Span;

/// Frames one behind the other, of which those before `next` were lent already.
pub(super) struct FrameStore {
    bytes: Box<[u8]>,
    places: Vec<Range<u32>>,
    next: usize,
    most: usize,
}

impl FrameStore {
    /// An empty store for up to `frames` frames of together up to `bytes` bytes.
    pub(super) fn with_capacity(frames: usize, bytes: u32) -> Self {
        Self { bytes: vec![0; bytes as usize].into(), places: Vec::with_capacity(frames), next: 0, most: frames }
    }

    /// A full store: the frames that lie at `places` of `bytes`, which ascend, do not overlap and end within it.
    pub(super) fn over(bytes: Vec<u8>, places: Vec<Range<u32>>) -> Self {
        let most = places.len();
        Self { bytes: bytes.into(), places, next: 0, most }
    }

    /// Frames that were not lent yet.
    pub(super) fn pending(&self) -> usize {
        self.places.len() - self.next
    }

    /// Frames in it, lent or not.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Begins again with the first frame.
    pub(super) fn rewind(&mut self) {
        self.next = 0;
    }

    /// Forgets all frames.
    pub(super) fn clear(&mut self) {
        self.places.clear();
        self.next = 0;
    }

    /// Appends a copy of frame `index` of `batch` and returns it for changes; `None` if there is no room.
    pub(super) fn push(&mut self, batch: &Batch<'_>, index: usize) -> Option<&mut [u8]> {
        let frame = batch.frames().get(index)?;
        let start = self.places.last().map_or(0, |last| last.end);
        let end = start.checked_add(frame.len)?;
        if self.places.len() == self.most {
            return None;
        }
        let to = self.bytes.get_mut(start as usize..end as usize)?;
        let head_len = usize::from(frame.head_len);
        to[..head_len].copy_from_slice(&batch.head(index).bytes[VNET_HEADER_BYTES..][..head_len]);
        let mut at = head_len;
        for piece in batch.tail(index) {
            at += piece.read(&mut to[at..]);
        }
        self.places.push(start..end);
        self.bytes.get_mut(start as usize..end as usize)
    }

    /// Appends a copy of the last frame; `false` if there is none or no room.
    pub(super) fn repeat_last(&mut self) -> bool {
        let Some(last) = self.places.last().cloned() else { return false };
        let Some(end) = last.end.checked_add(last.end - last.start) else { return false };
        if self.places.len() == self.most || end as usize > self.bytes.len() {
            return false;
        }
        self.bytes.copy_within(last.start as usize..last.end as usize, last.end as usize);
        self.places.push(last.end..end);
        true
    }

    /// Shortens the last frame to `len` bytes, if it is longer.
    pub(super) fn cut_last(&mut self, len: u32) {
        if let Some(last) = self.places.last_mut() {
            last.end = last.end.min(last.start.saturating_add(len));
        }
    }

    /// Lends the next frames, at most `most` of them and no more than a batch takes; from now on they count as lent.
    pub(super) fn lend<'m>(&'m mut self, most: usize, heads: &'m mut Heads) -> Batch<'m> {
        let mut batch = Batch::new(heads, 0);
        let (mut rest, mut at, mut taken) = (&mut self.bytes[..], 0u32, 0);
        for place in self.places[self.next..].iter().take(most.min(BATCH_FRAMES)) {
            let len = (place.end - place.start) as usize;
            let (_, from) = std::mem::take(&mut rest).split_at_mut((place.start - at) as usize);
            let (frame, after) = from.split_at_mut(len);
            batch.push(len, &[Span::from_buffer(frame)]);
            (rest, at) = (after, place.end);
            taken += len;
            if taken >= BATCH_BYTES {
                break;
            }
        }
        self.next += batch.len();
        batch
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::frame::heads;

    /// The frames of the store's next batch.
    fn drain(store: &mut FrameStore, most: usize) -> Vec<Vec<u8>> {
        let mut heads = heads();
        let batch = store.lend(most, &mut heads);
        (0..batch.len()).map(|index| crate::port::testing::bytes(&batch, index)).collect()
    }

    #[test]
    fn frames_come_out_as_they_went_in_until_the_store_is_full() {
        let frames: Vec<Vec<u8>> = (0..5u8).map(|i| vec![i; 60 + usize::from(i) * 30]).collect();
        let mut store = FrameStore::with_capacity(4, 1000);
        crate::port::testing::with_batch(&frames, |batch| {
            let taken = (0..5).filter(|&i| store.push(batch, i).is_some()).count();
            assert_eq!(taken, 4, "a fifth frame is one too many");
        });
        assert_eq!(drain(&mut store, 3), frames[..3]);
        assert_eq!((store.pending(), store.len()), (1, 4));
        assert_eq!(drain(&mut store, 3), frames[3..4]);
        store.rewind();
        assert_eq!(store.pending(), 4);
        store.clear();
        crate::port::testing::with_batch(&[vec![1; 600], vec![2; 600]], |batch| {
            assert!(store.push(batch, 0).is_some() && store.push(batch, 1).is_none(), "1000 bytes hold one of them");
        });
        assert!(!store.repeat_last());
        store.cut_last(300);
        assert!(store.repeat_last());
        assert_eq!(drain(&mut store, 64), [vec![1; 300], vec![1; 300]]);
    }
}
