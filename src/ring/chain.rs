//! What a walk over a ring finds: [`Chains`] of descriptors, as spans of guest memory, in one [`Direction`].

use arrayvec::ArrayVec;

use crate::limits::{BATCH_FRAMES, BATCH_SEGMENTS};
use crate::mem::Span;

/// Which way the device uses the buffers of a ring. Fixed per ring, so it is a type: the walk is compiled once for each.
pub trait Direction {
    /// Whether descriptors must carry VIRTQ_DESC_F_WRITE.
    const DEVICE_WRITES: bool;
    /// What such descriptors are called in messages.
    const NAME: &'static str;
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
}

impl Direction for Writable {
    const DEVICE_WRITES: bool = true;
    const NAME: &'static str = "writable";
}

/// One descriptor chain that the driver made available.
#[derive(Debug, Clone, Copy)]
pub struct Chain {
    /// What names it when it is given back: its first descriptor in a split ring, its buffer id in a packed one.
    pub head: u16,
    /// Sum of its buffers' lengths, in bytes. Up to `u32::MAX`; saturated beyond.
    pub bytes: u32,
    /// Whether it had more pieces than [`crate::limits::CHAIN_SEGMENTS`]; such a chain has no pieces here.
    pub overlong: bool,
    /// How many places of the ring it took up: 1 in a split ring, its descriptors in a packed one.
    pub slots: u16,
    pub(super) start: u16,
    pub(super) count: u16,
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

    /// Forgets all chains, to gather others.
    pub fn clear(&mut self) {
        self.list.clear();
        self.pieces.clear();
    }
}
