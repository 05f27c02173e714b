//! Frames in one buffer of our own, lent as batches: [`FrameStore`].
//!
//! What the ports without a far end stand on: `loopback` and `faulty` append to a store, `replay` lays one over the bytes
//! of a file. A store fills up, is drained from front to back and starts over; nothing is allocated after it was made.
//!
//! A frame keeps the virtio-net header that it came with, so what its sender left undone is still known when it goes on; the
//! header is checked anew then, because a `faulty` port changes frames on purpose.
//!
//! Invariant: the places ascend, do not overlap, and lie within the buffer.

use std::ops::Range;

use crate::frame::{Batch, Flooding, Heads, Needs};
use crate::limits::{BATCH_BYTES, BATCH_FRAMES, VNET_HEADER_BYTES};
use crate::mem::Span;
use crate::offload;
use crate::wire::virtio_net::VnetHeader;

/// Frames one behind the other, of which those before `next` were lent already.
pub(super) struct FrameStore {
    bytes: Box<[u8]>,
    places: Vec<Place>,
    next: usize,
    most: usize,
    /// How far the next frame is.
    flooding: Flooding,
}

/// Where a frame lies and what its sender left to others.
#[derive(Debug, Clone)]
struct Place {
    bytes: Range<u32>,
    header: [u8; VNET_HEADER_BYTES],
}

impl FrameStore {
    /// An empty store for up to `frames` frames of together up to `bytes` bytes.
    pub(super) fn with_capacity(frames: usize, bytes: u32) -> Self {
        Self {
            bytes: vec![0; bytes as usize].into(),
            places: Vec::with_capacity(frames),
            next: 0,
            most: frames,
            flooding: Flooding::default(),
        }
    }

    /// A full store: the frames that lie at `places` of `bytes`, which ascend, do not overlap and end within it.
    pub(super) fn over(bytes: Vec<u8>, places: Vec<Range<u32>>) -> Self {
        let most = places.len();
        let header = VnetHeader::PLAIN.to_bytes();
        let places = places.into_iter().map(|bytes| Place { bytes, header }).collect();
        Self { bytes: bytes.into(), places, next: 0, most, flooding: Flooding::default() }
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
        let start = self.places.last().map_or(0, |last| last.bytes.end);
        let end = start.checked_add(frame.len)?;
        if self.places.len() == self.most {
            return None;
        }
        let to = self.bytes.get_mut(start as usize..end as usize)?;
        batch.source(index).read(to);
        self.places.push(Place { bytes: start..end, header: batch.head(index).header().to_bytes() });
        self.bytes.get_mut(start as usize..end as usize)
    }

    /// Appends a copy of the last frame; `false` if there is none or no room.
    pub(super) fn repeat_last(&mut self) -> bool {
        let Some(last) = self.places.last().cloned() else { return false };
        let Place { bytes: Range { start, end: next }, header } = last;
        let Some(end) = next.checked_add(next - start) else { return false };
        if self.places.len() == self.most || end as usize > self.bytes.len() {
            return false;
        }
        self.bytes.copy_within(start as usize..next as usize, next as usize);
        self.places.push(Place { bytes: next..end, header });
        true
    }

    /// Shortens the last frame to `len` bytes, if it is longer.
    pub(super) fn cut_last(&mut self, len: u32) {
        if let Some(last) = self.places.last_mut() {
            last.bytes.end = last.bytes.end.min(last.bytes.start.saturating_add(len));
        }
    }

    /// Lends the next frames, at most `most` of them and no more than a batch takes; from now on they count as lent.
    pub(super) fn lend<'m>(&'m mut self, most: usize, heads: &'m mut Heads) -> Batch<'m> {
        let mut batch = Batch::new(heads, 0);
        let (mut rest, mut at, mut taken) = (&mut self.bytes[..], 0u32, 0);
        for place in self.places[self.next..].iter().take(most.min(BATCH_FRAMES)) {
            let Range { start, end } = place.bytes;
            let len = (end - start) as usize;
            let (_, from) = std::mem::take(&mut rest).split_at_mut((start - at) as usize);
            let (frame, after) = from.split_at_mut(len);
            let pieces = [Span::from_buffer(frame)];
            if VnetHeader::asks_nothing(&place.header) {
                batch.push(len, &pieces);
            } else {
                offload::admit(&mut batch, len, &pieces, &place.header, Needs::ALL);
            }
            (rest, at) = (after, end);
            taken += len;
            if taken >= BATCH_BYTES {
                break;
            }
        }
        self.next += batch.len();
        batch.make_divisible(self.flooding);
        batch
    }

    /// Keeps those of the frames that were lent last that were not dealt with, to be lent again: of `lent` frames `dealt_with`
    /// were, and the next one is so far.
    pub(super) fn keep(&mut self, lent: usize, dealt_with: usize, flooding: Flooding) {
        self.next -= lent - dealt_with;
        self.flooding = flooding;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::frame::heads;
    use crate::verdict::{DropReason, Verdict};

    #[test]
    fn a_frame_that_needs_something_still_does_unless_it_was_changed() {
        let mut bytes = vec![0x52; 200];
        let header = VnetHeader { flags: 1, csum_start: 34, csum_offset: 16, ..VnetHeader::PLAIN };
        let (mut first, mut second) = (heads(), heads());
        let mut batch = Batch::new(&mut first, 0);
        offload::admit(&mut batch, 200, &[Span::from_buffer(&mut bytes)], &header.to_bytes(), Needs::CSUM);
        let mut store = FrameStore::with_capacity(4, 1000);
        assert!(store.push(&batch, 0).is_some() && store.repeat_last());
        store.cut_last(40);
        let again = store.lend(4, &mut second);
        assert_eq!((again.head(0).header(), again.frames()[0].needs), (header, Needs::CSUM));
        assert_eq!(again.frames()[1].verdict, Verdict::Drop(DropReason::ChecksumInvalid));
    }

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
