//! Tails in memory of the shard's own: [`Batch::copy_tails`].
//!
//! A tail stays in its sender's memory until it is copied into the receiver's, as a rule. Whoever is held up in that copy cannot
//! tell in whose memory it was. Where that matters, because one of the two is known to have held a shard up, what is read from
//! the one and written to the other is taken apart: first all tails are copied here, then receivers get the copies.
//!
//! The room for them is made with the shard, because to make it later would wait for whoever has memory of the process mapped,
//! and nobody knows better than a hostile front end how to have that take long. Every kind of port gathers at most so many bytes
//! ([`crate::limits::BATCH_BYTES`]); what has no room nevertheless stays with its sender for the next visit.

use super::Batch;
use crate::limits::{BATCH_BYTES, FRAME_MAX_BYTES};
use crate::mem::Span;
use crate::verdict::{DropReason, Verdict};

/// Room for the tails of a batch: gathering ends with the frame that reaches [`BATCH_BYTES`].
pub(super) const TAILS_BYTES: usize = BATCH_BYTES + FRAME_MAX_BYTES;

impl Batch<'_> {
    /// Copies the tails of frames that are to be delivered into memory of the shard's own; receivers get the copies. Once in the
    /// life of a batch, after it has been decided on.
    pub fn copy_tails(&mut self) {
        for index in 0..self.frames.len() {
            let Some(frame) = self.frames.get(index) else { return };
            let len = frame.tail_len();
            if frame.tail.is_empty() || matches!(frame.verdict, Verdict::Drop(_)) {
                continue;
            }
            if len > self.room.len() {
                return self.cut_or_drop(index);
            }
            let (own, left) = std::mem::take(&mut self.room).split_at_mut(len);
            self.room = left;
            let own = Span::from_buffer(own);
            let mut rest = own;
            for piece in self.tail(index) {
                rest = rest.split_at(piece.copy_to(rest)).1;
            }
            // Of the room only what was written belongs to the frame: the rest is of earlier ones.
            let copy = own.split_at(len - rest.len()).0;
            let Some(frame) = self.frames.get_mut(index) else { return };
            (frame.tail, frame.more) = (copy, (0, 0));
        }
    }

    /// Has the frames from `index` on, for which there is no room, dealt with in the next visit; drops them where the queue cannot
    /// keep them.
    #[cold]
    fn cut_or_drop(&mut self, index: usize) {
        if self.is_divisible() && index > 0 {
            return self.cut(index);
        }
        for frame in self.frames.iter_mut().skip(index) {
            if !matches!(frame.verdict, Verdict::Drop(_)) {
                frame.verdict = Verdict::Drop(DropReason::ReceiverBusy);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Heads, heads};
    use super::*;
    use crate::ident::PortIndex;
    use crate::limits::BATCH_FRAMES;

    /// All bytes of frame `index`.
    fn bytes_of(batch: &Batch<'_>, index: usize) -> Vec<u8> {
        let mut bytes = vec![0; batch.frames()[index].len as usize];
        assert_eq!(batch.source(index).read(&mut bytes), bytes.len());
        bytes
    }

    fn decide(batch: &mut Batch<'_>) {
        batch.decisions().for_each(|(frame, _)| frame.verdict = Verdict::Deliver(PortIndex(1)));
    }

    #[test]
    fn copies_are_the_same_bytes_and_the_senders_no_more() {
        let mut heads = heads();
        // Twice, because the room is used again.
        for fill in 1..3u8 {
            let mut bytes: Vec<u8> = (0..4000).map(|at| (at % 251) as u8 ^ fill).collect();
            let before = bytes.clone();
            let memory = Span::from_buffer(&mut bytes);
            let piece = |at, len| memory.split_at(at).1.split_at(len).0;
            let mut batch = Batch::new(&mut heads, 0);
            batch.push(50, &[piece(0, 50)]);
            batch.push(300, &[piece(100, 300)]);
            batch.push(1000, &[piece(1000, 70), piece(1500, 30), piece(2000, 900)]);
            batch.push(64, &[piece(3000, 64)]);
            decide(&mut batch);
            batch.copy_tails();
            memory.write(&[0; 4000]);
            assert_eq!(bytes_of(&batch, 0), &before[..50]);
            assert_eq!(bytes_of(&batch, 1), &before[100..400]);
            assert_eq!(bytes_of(&batch, 2), [&before[1000..1070], &before[1500..1530], &before[2000..2900]].concat());
            assert_eq!(bytes_of(&batch, 3), &before[3000..3064]);
            assert_eq!(batch.single_tail(2).map(|tail| tail.len()), Some(936));
            assert_eq!((batch.len(), batch.bytes()), (4, 1414));
        }
    }

    #[test]
    fn a_batch_of_any_queue_has_room() {
        let mut heads = heads();
        let mut bytes = vec![7; FRAME_MAX_BYTES];
        let memory = Span::from_buffer(&mut bytes);
        let mut batch = Batch::new(&mut heads, 0);
        while batch.bytes() < BATCH_BYTES as u64 {
            batch.push(FRAME_MAX_BYTES, &[memory]);
        }
        decide(&mut batch);
        let frames = batch.len();
        batch.copy_tails();
        assert_eq!(batch.len(), frames);
        assert!(batch.frames().iter().all(|frame| frame.verdict == Verdict::Deliver(PortIndex(1))));
    }

    #[test]
    fn what_has_no_room_is_kept_or_dropped() {
        for divisible in [true, false] {
            let mut scratch = Heads { tails: vec![0; 500].into(), ..*heads() };
            let mut bytes = vec![7; 300];
            let memory = Span::from_buffer(&mut bytes);
            let mut batch = Batch::new(&mut scratch, 0);
            for _ in 0..BATCH_FRAMES {
                batch.push(300, &[memory]);
            }
            if divisible {
                batch.make_divisible(super::super::Flooding::default());
            }
            decide(&mut batch);
            batch.copy_tails();
            let kept = |frame: &&super::super::Frame<'_>| frame.verdict == Verdict::Deliver(PortIndex(1));
            assert_eq!(batch.frames().iter().filter(kept).count(), 2);
            assert_eq!(batch.dealt_with(), if divisible { 2 } else { BATCH_FRAMES });
        }
    }
}
