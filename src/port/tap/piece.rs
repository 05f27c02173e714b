//! Memory that frames wait in: [`Piece`], and lists of them: [`Pieces`].
//!
//! A record is a piece and those that belong to it (`more`), as many as its bytes need. All lists are made of the pieces themselves, so
//! that moving one from a list to another takes no memory.

use std::io::IoSlice;

use arrayvec::ArrayVec;

use crate::limits::{FRAME_MAX_BYTES, TAP_PIECE_BYTES, VNET_HEADER_BYTES};
use crate::mem::Span;
use crate::sys::cpu;

/// Pieces of the longest record.
pub(super) const RECORD_PIECES: usize = (VNET_HEADER_BYTES + FRAME_MAX_BYTES).div_ceil(TAP_PIECE_BYTES);

/// The places of a record, in order.
pub(super) type Spans<'p> = ArrayVec<Span<'p>, RECORD_PIECES>;

/// Some memory, which may be the beginning of a record: a virtio-net header and a frame.
#[repr(align(64))]
pub(super) struct Piece {
    bytes: [u8; TAP_PIECE_BYTES],
    /// Bytes of the record.
    len: usize,
    /// When it was begun, by [`cpu::cycles`].
    begun: u64,
    /// The rest of the record, in order.
    pub(super) more: Pieces,
    next: Option<Box<Self>>,
}

/// A list that pieces or records are put in front of.
#[derive(Default)]
pub(super) struct Pieces {
    first: Option<Box<Piece>>,
    len: usize,
}

impl Piece {
    fn new() -> Box<Self> {
        // Written to, for what never was may be no memory yet, and a shard must not wait for the kernel to find some.
        Box::new(Self { bytes: [u8::MAX; TAP_PIECE_BYTES], len: 0, begun: 0, more: Pieces::default(), next: None })
    }

    /// Has it be the beginning of a record of `len` bytes, which is so old from now on.
    #[inline]
    pub(super) fn begin(&mut self, len: usize) {
        (self.len, self.begun) = (len, cpu::cycles());
    }

    /// Bytes of the record.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// How old the record is, in counts of [`cpu::cycles`].
    pub(super) fn age(&self, now: u64) -> u64 {
        now.wrapping_sub(self.begun)
    }

    /// Where the bytes of the record go, in order.
    #[inline]
    pub(super) fn spans(&mut self) -> Spans<'_> {
        let Self { bytes, more, len, .. } = self;
        let (mut spans, mut left, mut next) = (Spans::new(), *len, &mut more.first);
        let mut add = |bytes| {
            let (here, _) = Span::from_buffer(bytes).split_at(left);
            left -= here.len();
            let _ = spans.try_push(here);
        };
        add(&mut bytes[..]);
        while let Some(piece) = next {
            let Self { bytes, next: after, .. } = &mut **piece;
            add(&mut bytes[..]);
            next = after;
        }
        spans
    }

    /// The bytes of the record, in order.
    pub(super) fn slices(&self) -> ArrayVec<IoSlice<'_>, RECORD_PIECES> {
        let (mut slices, mut left, mut next) = (ArrayVec::new(), self.len, Some(self));
        while let Some(piece) = next {
            let here = left.min(piece.bytes.len());
            let _ = slices.try_push(IoSlice::new(&piece.bytes[..here]));
            left -= here;
            next = if slices.len() == 1 { self.more.first.as_deref() } else { piece.next.as_deref() };
        }
        slices
    }

    /// Gives all pieces of the record to `pieces`.
    pub(super) fn come_apart(mut self: Box<Self>, pieces: &mut Pieces) {
        pieces.push_all(std::mem::take(&mut self.more));
        pieces.push(self);
    }
}

impl Pieces {
    /// So many new ones.
    pub(super) fn made(count: usize) -> Self {
        let mut pieces = Self::default();
        (0..count).for_each(|_| pieces.push(Piece::new()));
        pieces
    }

    /// How many there are.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    #[inline]
    pub(super) fn push(&mut self, mut piece: Box<Piece>) {
        piece.next = self.first.take();
        self.first = Some(piece);
        self.len += 1;
    }

    #[inline]
    pub(super) fn pop(&mut self) -> Option<Box<Piece>> {
        let mut piece = self.first.take()?;
        self.first = piece.next.take();
        self.len -= 1;
        Some(piece)
    }

    /// Puts all of `others` in front, the first one first.
    #[inline]
    pub(super) fn push_all(&mut self, mut others: Self) {
        while let Some(piece) = others.pop() {
            self.push(piece);
        }
    }

    /// The same ones, the last one first.
    pub(super) fn reversed(self) -> Self {
        let mut reversed = Self::default();
        reversed.push_all(self);
        reversed
    }
}

impl Drop for Pieces {
    /// One after the other: by itself each one would drop the next, which thousands of them have no stack for.
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}
