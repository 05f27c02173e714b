//! What was read from the interface and not been dealt with yet: [`Reading`].
//!
//! One read is one frame, behind the last one in the buffer. A batch may be too much for one visit; what is left of it stays here
//! and is lent again before more is read.

use std::ops::Range;

use arrayvec::ArrayVec;

use crate::frame::{Batch, Flooding, Heads, Needs};
use crate::limits::{BATCH_BYTES, BATCH_FRAMES, FRAME_MAX_BYTES, VNET_HEADER_BYTES};
use crate::mem::Span;
use crate::offload;
use crate::verdict::DropReason;
use crate::wire::virtio_net::VnetHeader;

/// Bytes that one read asks for: a header, the longest frame, and one more, by which a longer frame shows (the kernel
/// cuts it to what was asked for: `tun_chr_read_iter`). Whole cache lines.
pub(super) const READ_BYTES: usize = (VNET_HEADER_BYTES + FRAME_MAX_BYTES + 1).next_multiple_of(CACHE_LINE_BYTES);
/// Room for the bytes of a batch, the last frame of which may be of any length.
const BUFFER_BYTES: usize = BATCH_BYTES + READ_BYTES;
const CACHE_LINE_BYTES: usize = 64;

/// Frames with their virtio-net headers, in the order they were read.
pub(super) struct Reading {
    buffer: Box<[u8]>,
    places: ArrayVec<Range<usize>, BATCH_FRAMES>,
    /// How many were dealt with.
    done: usize,
    /// How far the next one is.
    flooding: Flooding,
}

impl Reading {
    pub(super) fn new() -> Self {
        Self { buffer: vec![0; BUFFER_BYTES].into(), places: ArrayVec::new(), done: 0, flooding: Flooding::default() }
    }

    /// Whether frames are left.
    pub(super) fn is_pending(&self) -> bool {
        self.done < self.places.len()
    }

    /// Reads with `read`, which returns how many bytes it put where, until it has none or there are enough for a batch;
    /// unless frames are left. Returns how many were read.
    pub(super) fn fill(&mut self, mut read: impl FnMut(&mut [u8]) -> Option<usize>) -> usize {
        if self.is_pending() {
            return 0;
        }
        self.places.clear();
        self.done = 0;
        let mut at = 0;
        while let Some(room) = self.buffer.get_mut(at..at + READ_BYTES).filter(|_| !self.places.is_full()) {
            let Some(len) = read(room) else { break };
            self.places.push(at..at + len);
            // Frames begin at cache lines of their own, so that one guest's copy does not pull in the next frame.
            at += len.next_multiple_of(CACHE_LINE_BYTES);
        }
        self.places.len()
    }

    /// The frames that are left, whose headers may ask for `may`.
    pub(super) fn lend<'m>(&'m mut self, heads: &'m mut Heads, may: Needs) -> Batch<'m> {
        let mut batch = Batch::new(heads, 0);
        let (mut rest, mut at) = (&mut self.buffer[..], 0);
        for place in &self.places[self.done..] {
            let (_, from) = std::mem::take(&mut rest).split_at_mut(place.start - at);
            let (record, after) = from.split_at_mut(place.len());
            push(&mut batch, record, may);
            (rest, at) = (after, place.end);
        }
        batch.make_divisible(self.flooding);
        batch
    }

    /// Notes that so many of the frames that were lent were dealt with, and how far the next one is.
    pub(super) fn note(&mut self, dealt_with: usize, flooding: Flooding) {
        self.done += dealt_with;
        self.flooding = flooding;
    }
}

/// Adds what one read returned to `batch`: a virtio-net header, which may ask for `may`, and a frame.
pub(super) fn push<'m>(batch: &mut Batch<'m>, record: &'m mut [u8], may: Needs) {
    let Some((header, frame)) = record.split_first_chunk_mut::<VNET_HEADER_BYTES>() else {
        return batch.push_dropped(0, DropReason::HeaderTruncated);
    };
    if frame.len() > FRAME_MAX_BYTES {
        return batch.push_dropped(frame.len(), DropReason::FrameTooLong);
    }
    let (len, header) = (frame.len(), *header);
    let pieces = [Span::from_buffer(frame)];
    if VnetHeader::asks_nothing(&header) {
        batch.push(len, &pieces);
    } else {
        offload::admit(batch, len, &pieces, &header, may);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::heads;
    use crate::port::testing::bytes;

    #[test]
    fn what_was_not_dealt_with_is_lent_again_before_more_is_read() {
        let mut reading = Reading::new();
        let mut next = 0u8;
        let mut read = |room: &mut [u8]| {
            next += 1;
            room[..60].fill(next);
            room[..VNET_HEADER_BYTES].fill(0);
            (next <= 70).then_some(60)
        };
        let mut got = Vec::new();
        let mut heads = heads();
        for dealt_with in [0, 3, 60, 1, 6] {
            reading.fill(&mut read);
            let batch = reading.lend(&mut heads, Needs::NONE);
            got.extend((0..dealt_with).map(|index| bytes(&batch, index)[0]));
            drop(batch);
            reading.note(dealt_with, Flooding { next: dealt_with as u16, ..Flooding::default() });
        }
        assert_eq!(got, (1..=70).collect::<Vec<u8>>());
        assert!(!reading.is_pending());
        assert_eq!(reading.lend(&mut heads, Needs::NONE).flooding().next, 6);
    }
}
