//! Frames that need what the guest cannot do: what [`Rewrite`] makes of one, as much of it as there is room for
//! ([`Rewrites`]).
//!
//! One frame may become more frames than the guest has buffers: a firmware's driver posts eight, and the host's stack sends 44
//! segments in one frame. So the first segments are delivered, in order, as far as buffers go, and the rest is dropped, as a
//! queue in front of the guest would have done; TCP then repeats the rest alone. A frame is delivered if its first segment was,
//! and what it lacks is counted ([`Outcome::cut`]). Its checksum alone is no such thing: one frame fits or does not.
//!
//! Each segment is complete in the guest's memory before its chain is completed. A fault on the way thus leaves what was written
//! before it to the guest.

use super::{Buffers, Form};
use crate::frame::Batch;
use crate::limits::BATCH_FRAMES;
use crate::mem::Cursor;
use crate::offload::Rewrite;
use crate::port::Outcome;
use crate::ring::{DeviceRing, RingFault};
use crate::verdict::DropReason;

/// What is made for one guest out of one batch.
pub(super) struct Rewrites {
    form: Form,
    /// The shortest segment that found no room, and why. No longer one is tried after it: whether there is room shows only by
    /// walking what the guest has posted, and a hostile one posts chains that take long to walk and hold nothing.
    refused: Option<(usize, DropReason)>,
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
        let at = usize::from(index);
        let longest = batch.frames()[at].wire_len(batch.head(at)) as usize;
        if let Some((_, reason)) = self.refused.filter(|(shortest, _)| longest >= *shortest) {
            outcome.refuse(index, reason);
            return Ok(());
        }
        let mut rewrite = match Rewrite::of(batch, at, self.form.accepts) {
            Ok(rewrite) => rewrite,
            Err(reason) => {
                outcome.refuse(index, reason);
                return Ok(());
            }
        };
        let all = rewrite.count();
        let written = write_leading(ring, buffers, self.form, &mut rewrite);
        let missing = rewrite.count();
        if missing < all {
            outcome.deliver(index);
            outcome.rewritten(rewrite.is_segmentation());
            outcome.cut(missing, rewrite.bytes_left());
        }
        if let Some((len, reason)) = written? {
            self.refused = Some((len, reason));
            if missing == all {
                outcome.refuse(index, reason);
            }
        }
        Ok(())
    }
}

/// Writes the frames of `rewrite` until one finds no room: returns the length of that, and why.
fn write_leading<R: DeviceRing>(
    ring: &mut R,
    buffers: &mut Buffers<'_>,
    form: Form,
    rewrite: &mut Rewrite<'_, '_>,
) -> Result<Option<(usize, DropReason)>, RingFault> {
    let most = form.most();
    while let Some(len) = rewrite.next_len() {
        let bytes = form.header + len;
        if buffers.left() < most && buffers.run(bytes, most).is_none() {
            buffers.refill(ring, BATCH_FRAMES)?;
        }
        let Some(count) = buffers.run(bytes, most) else {
            let full = buffers.left() < most;
            return Ok(Some((len, if full { DropReason::RingFull } else { DropReason::BufferTooSmall })));
        };
        let run = &buffers.chains.list()[buffers.next..buffers.next + count];
        rewrite.write(form.header, count as u16, Cursor::new(buffers.chains.pieces_of(run)));
        buffers.used(count, bytes, |chain, written| ring.complete(chain, written));
    }
    Ok(None)
}
