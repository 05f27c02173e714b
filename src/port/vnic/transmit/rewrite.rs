//! Frames that need what the guest cannot do: what [`Rewrite`] makes of one, all of it or nothing ([`Rewrites`]).
//!
//! One frame may become more frames than buffers can be gathered at once. So what is written is held: its chains are
//! completed when the last of its frames has found room, and all given back when one does not. A guest that cannot hold a
//! frame's segments gets none of them, and what is counted is what happened to the frame.

use arrayvec::ArrayVec;

use super::{Buffers, Form};
use crate::frame::Batch;
use crate::limits::{BATCH_FRAMES, FRAME_MAX_BYTES, GSO_SIZE_MIN};
use crate::mem::Cursor;
use crate::offload::Rewrite;
use crate::port::Outcome;
use crate::ring::{Chain, DeviceRing, RingFault};
use crate::verdict::DropReason;

/// Chains that the frames out of one may take: one for each of the smallest segments, and half as many again, because
/// buffers that are smaller than a segment are rare and small segments are too.
const HELD_CHAINS: usize = FRAME_MAX_BYTES / GSO_SIZE_MIN as usize * 3 / 2;

type Held = ArrayVec<(Chain, u32), HELD_CHAINS>;

/// What is made for one guest out of one batch.
pub(super) struct Rewrites {
    form: Form,
    /// The shortest frame that found no room, and why. No longer one is tried after it: whether there is room shows only by
    /// walking what the guest has posted, and a hostile one posts chains that take long to walk and hold nothing.
    refused: Option<(u32, DropReason)>,
}

impl Rewrites {
    /// Nothing yet, for a guest that takes frames like this.
    pub(super) fn new(form: Form) -> Self {
        Self { form, refused: None }
    }

    /// Gives frame `index` of `batch` to the guest as frames that it can take.
    #[inline(never)]
    pub(super) fn deliver<R: DeviceRing>(
        &mut self,
        ring: &mut R,
        buffers: &mut Buffers<'_>,
        batch: &Batch<'_>,
        index: u8,
        outcome: &mut Outcome,
    ) -> Result<(), RingFault> {
        let len = batch.frames()[usize::from(index)].len;
        if let Some((_, reason)) = self.refused.filter(|(shortest, _)| len >= *shortest) {
            outcome.refuse(index, reason);
            return Ok(());
        }
        let mut rewrite = match Rewrite::of(batch, usize::from(index), self.form.accepts) {
            Ok(rewrite) => rewrite,
            Err(reason) => {
                outcome.refuse(index, reason);
                return Ok(());
            }
        };
        let mut held = Held::new_const();
        let written = write_all(ring, buffers, self.form, &mut rewrite, &mut held).inspect_err(|_| {
            give_back(ring, buffers, &held);
        })?;
        match written {
            Ok(()) => {
                held.iter().for_each(|(chain, written)| ring.complete(chain, *written));
                outcome.deliver(index);
                outcome.rewritten(rewrite.is_segmentation());
            }
            Err(reason) => {
                give_back(ring, buffers, &held);
                self.refused = Some((len, reason));
                outcome.refuse(index, reason);
            }
        }
        Ok(())
    }
}

/// Writes all frames of `rewrite` and holds their chains; in vain if one finds no room.
fn write_all<R: DeviceRing>(
    ring: &mut R,
    buffers: &mut Buffers<'_>,
    form: Form,
    rewrite: &mut Rewrite<'_, '_>,
    held: &mut Held,
) -> Result<Result<(), DropReason>, RingFault> {
    // Each takes a chain at least: a ring that is shorter is not worth the copies.
    if rewrite.count() > usize::from(ring.size()) {
        return Ok(Err(DropReason::RingFull));
    }
    let most = form.most();
    while let Some(len) = rewrite.next_len() {
        let bytes = form.header + len;
        if buffers.left() < most && buffers.run(bytes, most).is_none() {
            buffers.refill(ring, BATCH_FRAMES)?;
        }
        let Some(count) = buffers.run(bytes, most) else {
            let full = buffers.left() < most;
            return Ok(Err(if full { DropReason::RingFull } else { DropReason::BufferTooSmall }));
        };
        if held.remaining_capacity() < count {
            return Ok(Err(DropReason::RingFull));
        }
        let run = &buffers.chains.list()[buffers.next..buffers.next + count];
        rewrite.write(form.header, count as u16, Cursor::new(buffers.chains.pieces_of(run)));
        buffers.used(count, bytes, |chain, written| held.push((*chain, written)));
    }
    Ok(Ok(()))
}

/// Gives the ring back all chains at hand and all that are held, as if none had been taken.
fn give_back<R: DeviceRing>(ring: &mut R, buffers: &mut Buffers<'_>, held: &Held) {
    ring.give_back(buffers.rest());
    buffers.chains.clear();
    buffers.next = 0;
    let chains: ArrayVec<Chain, HELD_CHAINS> = held.iter().map(|(chain, _)| *chain).collect();
    ring.give_back(&chains);
}
