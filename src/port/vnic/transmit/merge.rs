//! Frames that are merged before the guest gets them: what [`Merger`] makes of a batch's segments.
//!
//! Frames that stay by themselves are collected and written as any others; a merged one is written after what was collected
//! before it, so that frames of one flow stay in order. One that finds no room, or one of whose segments is damaged, is
//! written as the frames that it would have been made of: those may find room, and what is damaged is the guest's to drop.

use arrayvec::ArrayVec;

use super::Delivery;
use crate::limits::BATCH_FRAMES;
use crate::mem::Cursor;
use crate::offload::{Group, Merge, Merger};
use crate::ring::{DeviceRing, RingFault};

impl Delivery<'_, '_> {
    /// Writes the picked frames, merged where they can be.
    #[inline(never)]
    pub(super) fn fill_merged<R: DeviceRing>(&mut self, ring: &mut R, picks: &[u8]) -> Result<(), RingFault> {
        let batch = self.batch;
        let mut merger = Merger::new(self.form.accepts);
        let mut singles = ArrayVec::<u8, BATCH_FRAMES>::new_const();
        let longest = self.form.longest;
        let mut each = |group| match group {
            Group::Single(index) => {
                singles.push(index);
                Ok(())
            }
            Group::Merge(merge) => {
                self.fill(ring, &singles)?;
                singles.clear();
                self.fill_merge(ring, &merge)
            }
        };
        for &index in picks {
            let exceeds = batch.frames()[usize::from(index)].exceeds(batch.head(usize::from(index)), longest);
            merger.take(batch, index, !exceeds, &mut each)?;
        }
        merger.finish(&mut each)?;
        self.fill(ring, &singles)
    }

    /// Writes one merged frame.
    fn fill_merge<R: DeviceRing>(&mut self, ring: &mut R, merge: &Merge) -> Result<(), RingFault> {
        let header = self.form.header;
        self.has_chain(ring, merge.frames().len())?;
        let Ok(count) = self.room(ring, merge.frame_len())? else { return self.fill(ring, merge.frames()) };
        let buffers = &mut self.buffers;
        let run = &buffers.chains.list()[buffers.next..buffers.next + count];
        let len = header + merge.frame_len();
        if !merge.write(self.batch, header, count as u16, Cursor::new(buffers.chains.pieces_of(run))) {
            // What was written is in the guest's memory all the same.
            buffers.note_written(count, len);
            return self.fill(ring, merge.frames());
        }
        buffers.used(count, len, |chain, written| ring.complete(chain, written));
        self.dry = false;
        merge.frames().iter().for_each(|&index| self.outcome.deliver(index));
        self.outcome.merged += merge.frames().len() as u32;
        Ok(())
    }
}
