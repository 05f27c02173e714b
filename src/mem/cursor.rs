//! Places in scattered memory: [`Cursor`] writes over a list of pieces, [`Source`] reads a frame's bytes.
//!
//! Both are `Copy`, so that a place can be kept and gone back to: a segment's headers are written last, when the sum over
//! its payload is known, to the place that was skipped. Whoever writes has made sure of the room; what does not fit is
//! cut off, never written anywhere else.
//!
//! Summing while copying goes through a small buffer of our own, because the bytes of a guest's memory must be read once:
//! summing them in place and copying them then would sum one thing and deliver another. The buffer stays in the L1 cache,
//! so its second copy costs about as much as the bookkeeping around it.

use super::Span;
use crate::wire::checksum::Sum;

/// Bytes that are copied and summed in one step: most of a full-size segment, a fraction of the L1 cache.
const STEP_BYTES: usize = 1024;

/// Where the next byte goes, in a list of pieces.
#[derive(Debug, Clone, Copy)]
pub struct Cursor<'p, 'm> {
    room: Span<'m>,
    rest: &'p [Span<'m>],
}

impl<'p, 'm> Cursor<'p, 'm> {
    /// The first byte of `pieces`.
    #[inline]
    pub fn new(pieces: &'p [Span<'m>]) -> Self {
        Self { room: Span::EMPTY, rest: pieces }
    }

    /// The piece that the next byte goes to; `None` at the end of the last.
    #[inline]
    fn room(&mut self) -> Option<Span<'m>> {
        while self.room.is_empty() {
            let (first, rest) = self.rest.split_first()?;
            (self.room, self.rest) = (*first, rest);
        }
        Some(self.room)
    }

    /// Goes on by `len` bytes without writing.
    #[inline]
    pub fn skip(&mut self, mut len: usize) {
        while len > 0
            && let Some(room) = self.room()
        {
            let (skipped, rest) = room.split_at(len);
            len -= skipped.len();
            self.room = rest;
        }
    }

    /// Writes `bytes`.
    #[inline]
    pub fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty()
            && let Some(room) = self.room()
        {
            let written = room.write(bytes);
            self.room = room.split_at(written).1;
            bytes = &bytes[written..];
        }
    }

    /// Copies all of `from`.
    #[inline]
    pub fn copy(&mut self, mut from: Span<'_>) {
        while !from.is_empty()
            && let Some(room) = self.room()
        {
            let copied = from.copy_to(room);
            self.room = room.split_at(copied).1;
            from = from.split_at(copied).1;
        }
    }

    /// Copies all of `from` and adds to `sum` what was copied.
    #[inline]
    pub fn copy_summed(&mut self, mut from: Span<'_>, sum: &mut Sum) {
        let mut step = [0; STEP_BYTES];
        while !from.is_empty() {
            let read = from.read(&mut step);
            from = from.split_at(read).1;
            sum.add(&step[..read]);
            self.write(&step[..read]);
        }
    }
}

/// The bytes of a frame from some place on: first some in our own memory, then pieces of its sender's.
#[derive(Debug, Clone, Copy)]
pub struct Source<'p, 'm> {
    own: &'p [u8],
    piece: Span<'m>,
    rest: &'p [Span<'m>],
}

impl<'p, 'm> Source<'p, 'm> {
    /// The bytes of `own`, of `first`, and of `rest`, in this order.
    #[inline]
    pub fn new(own: &'p [u8], first: Span<'m>, rest: &'p [Span<'m>]) -> Self {
        Self { own, piece: first, rest }
    }

    /// Takes the next bytes that lie together, at most `most` of them; `None` at the end.
    #[inline]
    fn take(&mut self, most: usize) -> Option<Taken<'p, 'm>> {
        if !self.own.is_empty() {
            let (taken, left) = self.own.split_at(most.min(self.own.len()));
            self.own = left;
            return Some(Taken::Own(taken));
        }
        while self.piece.is_empty() {
            let (first, rest) = self.rest.split_first()?;
            (self.piece, self.rest) = (*first, rest);
        }
        let (taken, left) = self.piece.split_at(most);
        self.piece = left;
        Some(Taken::Piece(taken))
    }

    /// Hands the next `len` bytes to `each`, piece by piece; fewer if there are fewer.
    #[inline]
    fn each(&mut self, mut len: usize, mut each: impl FnMut(Taken<'p, 'm>)) {
        while len > 0
            && let Some(taken) = self.take(len)
        {
            len -= taken.len();
            each(taken);
        }
    }

    /// Goes on by `len` bytes.
    pub fn skip(&mut self, len: usize) {
        self.each(len, |_| {});
    }

    /// Reads the next bytes, as many as there are and fit; returns how many.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        let mut at = 0;
        self.each(to.len(), |taken| match taken {
            Taken::Own(bytes) => {
                to[at..at + bytes.len()].copy_from_slice(bytes);
                at += bytes.len();
            }
            Taken::Piece(piece) => at += piece.read(&mut to[at..]),
        });
        at
    }

    /// Copies the next `len` bytes to `to`.
    #[inline]
    pub fn copy(&mut self, len: usize, to: &mut Cursor<'_, '_>) {
        self.each(len, |taken| match taken {
            Taken::Own(bytes) => to.write(bytes),
            Taken::Piece(piece) => to.copy(piece),
        });
    }

    /// Copies the next `len` bytes to `to` and adds to `sum` what was copied.
    #[inline]
    pub fn copy_summed(&mut self, len: usize, to: &mut Cursor<'_, '_>, sum: &mut Sum) {
        self.each(len, |taken| match taken {
            Taken::Own(bytes) => {
                sum.add(bytes);
                to.write(bytes);
            }
            Taken::Piece(piece) => to.copy_summed(piece, sum),
        });
    }
}

/// Bytes of a [`Source`] that lie together.
enum Taken<'p, 'm> {
    Own(&'p [u8]),
    Piece(Span<'m>),
}

impl Taken<'_, '_> {
    #[inline]
    fn len(&self) -> usize {
        match self {
            Self::Own(bytes) => bytes.len(),
            Self::Piece(piece) => piece.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces of these lengths over `bytes`.
    fn pieces<'m>(mut bytes: &'m mut [u8], lens: &[usize]) -> Vec<Span<'m>> {
        let mut pieces = Vec::new();
        for &len in lens {
            let (piece, rest) = bytes.split_at_mut(len);
            pieces.push(Span::from_buffer(piece));
            bytes = rest;
        }
        pieces
    }

    #[test]
    fn bytes_arrive_in_order_whatever_the_pieces_are() {
        let mut from: Vec<u8> = (0..=255).cycle().take(5000).collect();
        let expected = from.clone();
        let (own, theirs) = from.split_at_mut(70);
        let theirs = pieces(theirs, &[1, 0, 2999, 1930]);
        let mut to = vec![0; 5000];
        let room = pieces(&mut to, &[0, 13, 1, 2000, 2986]);
        let mut source = Source::new(own, theirs[0], &theirs[1..]);
        let (mut cursor, mut sum) = (Cursor::new(&room), Sum::new());
        source.copy(33, &mut cursor);
        source.copy_summed(4000, &mut cursor, &mut sum);
        source.copy(5000, &mut cursor);
        assert_eq!(to, expected);
        let mut naive = Sum::new();
        naive.add(&expected[33..4033]);
        assert_eq!(sum.folded(), naive.folded());
    }

    #[test]
    fn a_place_that_was_kept_is_written_later() {
        let mut to = vec![0; 10];
        let room = pieces(&mut to, &[3, 7]);
        let mut cursor = Cursor::new(&room);
        let mut kept = cursor;
        cursor.skip(4);
        cursor.write(&[5, 6]);
        kept.write(&[1, 2, 3, 4]);
        cursor.write(&[7; 20]);
        assert_eq!(to, [1, 2, 3, 4, 5, 6, 7, 7, 7, 7]);
    }

    #[test]
    fn reading_and_skipping_go_from_ours_to_theirs() {
        let mut theirs = [4, 5, 6, 7];
        let theirs = pieces(&mut theirs, &[1, 3]);
        let source = Source::new(&[1, 2, 3], theirs[0], &theirs[1..]);
        let (mut reader, mut out) = (source, [0; 9]);
        assert_eq!((reader.read(&mut out), out), (7, [1, 2, 3, 4, 5, 6, 7, 0, 0]));
        let mut reader = source;
        reader.skip(5);
        assert_eq!((reader.read(&mut out), &out[..2]), (2, &[6, 7][..]));
        reader.skip(1);
        assert_eq!(reader.read(&mut out), 0);
    }
}
