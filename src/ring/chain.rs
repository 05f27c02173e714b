//! What a walk over a ring finds: [`Chains`] of descriptors, as spans of guest memory, in one [`Direction`].

#![allow(unsafe_code)] // Places of arrays that are filled field by field.

use arrayvec::ArrayVec;

use super::descriptor::WRITE;
use crate::limits::{BATCH_FRAMES, BATCH_SEGMENTS, CHAIN_SEGMENTS};
use crate::mem::Span;

/// Which way the device uses the buffers of a ring. Fixed per ring, so it is a type: the walk is compiled once for each.
pub trait Direction {
    /// Whether descriptors must carry VIRTQ_DESC_F_WRITE.
    const DEVICE_WRITES: bool;
    /// What such descriptors are called in messages.
    const NAME: &'static str;
    /// The flags of a descriptor that is a chain of its own.
    const FLAGS: u16 = if Self::DEVICE_WRITES { WRITE } else { 0 };

    /// Asks the CPU to fetch the first bytes of a buffer for what will be done with it.
    fn prefetch(buffer: &Span<'_>);
}

/// The device reads: frames that the guest sends.
#[derive(Debug)]
pub struct Readable;

/// The device writes: buffers for frames that the guest receives.
#[derive(Debug)]
pub struct Writable;

impl Direction for Readable {
    const DEVICE_WRITES: bool = false;
    const NAME: &'static str = "readable";

    #[inline(always)]
    fn prefetch(buffer: &Span<'_>) {
        buffer.prefetch();
    }
}

impl Direction for Writable {
    const DEVICE_WRITES: bool = true;
    const NAME: &'static str = "writable";

    #[inline(always)]
    fn prefetch(buffer: &Span<'_>) {
        buffer.prefetch_write();
    }
}

/// One descriptor chain that the driver made available.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(8))]
pub struct Chain {
    /// What names it when it is given back: its first descriptor in a split ring, its buffer id in a packed one.
    pub head: u16,
    /// How many places of the ring it took up: 1 in a split ring, its descriptors in a packed one.
    pub slots: u16,
    pub(super) start: u16,
    pub(super) count: u16,
    /// Sum of its buffers' lengths, in bytes. Up to `u32::MAX`; saturated beyond.
    pub bytes: u32,
    /// Whether it had more pieces than [`crate::limits::CHAIN_SEGMENTS`]; such a chain has no pieces here.
    pub overlong: bool,
}

#[cfg(test)]
impl Chain {
    /// A chain that nobody walked, to complete or to give back as no port does.
    pub fn unwalked(head: u16) -> Self {
        Self { head, bytes: 0, overlong: false, slots: 1, start: 0, count: 0 }
    }
}

/// Up to a batch of chains and the pieces of memory that they are made of, in ring order.
#[derive(Debug, Default)]
pub struct Chains<'m> {
    pub(super) list: ArrayVec<Chain, BATCH_FRAMES>,
    pub(super) pieces: ArrayVec<Span<'m>, BATCH_SEGMENTS>,
}

impl<'m> Chains<'m> {
    /// No chains.
    #[inline]
    pub fn new() -> Self {
        Self { list: ArrayVec::new_const(), pieces: ArrayVec::new_const() }
    }

    /// The chains, in ring order.
    #[inline]
    pub fn list(&self) -> &[Chain] {
        &self.list
    }

    /// The pieces of `chain`, in order; none is empty.
    #[inline]
    pub fn pieces(&self, chain: &Chain) -> &[Span<'m>] {
        let start = usize::from(chain.start);
        self.pieces.get(start..start + usize::from(chain.count)).unwrap_or(&[])
    }

    /// The pieces of several chains that follow one another in the list, in order.
    #[inline]
    pub fn pieces_of(&self, run: &[Chain]) -> &[Span<'m>] {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return &[] };
        self.pieces.get(usize::from(first.start)..usize::from(last.start + last.count)).unwrap_or(&[])
    }

    /// The only piece of `chain`, if it has just one: the common case.
    #[inline]
    pub fn single(&self, chain: &Chain) -> Option<Span<'m>> {
        if chain.count == 1 { self.pieces.get(usize::from(chain.start)).copied() } else { None }
    }

    /// How many more chains can be taken, as long as only the last of them is a long one.
    #[inline]
    pub(super) fn room(&self) -> usize {
        if self.has_room(BATCH_FRAMES) { self.list.remaining_capacity() } else { 0 }
    }

    /// Whether there is room for the pieces of `singles` chains of one piece and then of a long one.
    #[inline]
    pub(super) fn has_room(&self, singles: usize) -> bool {
        self.pieces.remaining_capacity() >= CHAIN_SEGMENTS + singles
    }

    /// Adds chains of one piece that take one place of the ring each, as long as `next` has a head and a piece for one more, but
    /// not more than `most`, nor than there is [room](Chains::room) for. Returns how many.
    #[inline(always)]
    pub(super) fn push_singles(
        &mut self,
        most: usize,
        mut next: impl FnMut(usize) -> Option<(u16, Span<'m>)>,
    ) -> usize {
        let (at, start) = (self.list.len(), self.pieces.len());
        let most = most.min(BATCH_FRAMES - at).min(BATCH_SEGMENTS - start);
        let (list, pieces) = (self.list.as_mut_ptr(), self.pieces.as_mut_ptr());
        let mut count = 0;
        while count < most
            && let Some((head, piece)) = next(count)
        {
            let bytes = piece.len() as u32;
            let numbers = u64::from(head) | 1 << 16 | ((start + count) as u64) << 32 | 1 << 48;
            // SAFETY: both places are within their arrays, for `most` is no more than was left. The first four fields of a
            // chain are 16 bits each, in this order and aligned as one word (`repr(C, align(8))`), every value of which is
            // theirs; a big-endian machine would have them the other way round. Whole words are written because a chain
            // that is stored in smaller pieces than it is loaded in soon after cannot be forwarded from store to load, which
            // was a third of a batch, and because putting 16-bit fields together one by one costs as much as the walk.
            unsafe {
                pieces.add(start + count).write(piece);
                let chain = list.add(at + count);
                if cfg!(target_endian = "little") {
                    chain.cast::<u64>().write(numbers);
                } else {
                    chain.cast::<[u16; 4]>().write([head, 1, (start + count) as u16, 1]);
                }
                (&raw mut (*chain).bytes).write(bytes);
                (&raw mut (*chain).overlong).write(false);
            }
            count += 1;
        }
        // SAFETY: so many more were initialised just now, in both.
        unsafe {
            self.pieces.set_len(start + count);
            self.list.set_len(at + count);
        }
        count
    }

    /// Forgets all chains, to gather others.
    pub fn clear(&mut self) {
        self.list.clear();
        self.pieces.clear();
    }
}
