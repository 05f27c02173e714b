//! Frames on their way through the switch: [`Frame`], and the [`Batch`] of up to 64 of them that came from one queue.
//!
//! A frame is its *head*, the first bytes with all the headers that a decision looks at, copied once into memory of the
//! shard ([`Heads`]), and its *tail*, the rest, which stays where the sender put it until it is copied into the
//! receiver's buffers. A guest can rewrite a frame while we read it; whatever is decided is decided on the head, and
//! those very bytes are what the receiver gets.
//!
//! A head begins with the virtio-net header that the receiver will see, so that a frame of minimum size is delivered with
//! one copy of constant size. What a receiver has to be able to do to understand that header are the frame's [`Needs`],
//! none for nearly all frames; the frames that have some were checked by `offload` when they came in. Two passes over a batch,
//! first all copies, then all decisions, keep the CPU's store forwarding out of the way: an address that was just stored in
//! 16-byte pieces cannot be loaded across them at once.

mod copying;
mod portion;

use arrayvec::ArrayVec;

use self::copying::TAILS_BYTES;
pub use self::portion::Flooding;
use self::portion::Portion;
use crate::ident::{MacAddr, PortIndex};
use crate::limits::{
    BATCH_FRAMES, BATCH_SEGMENTS, FRAME_MAX_BYTES, FRAME_MIN_BYTES, HEAD_BYTES, LONG_HEAD_BYTES, VNET_HEADER_BYTES,
};
use crate::mem::{Source, Span};
use crate::verdict::{DropReason, Verdict};
use crate::wire::ethernet::{Ethernet, HEADER_BYTES, TAG_BYTES};
use crate::wire::virtio_net::VnetHeader;

/// Bytes of a head that are copied of nearly every frame: the virtio-net header and the first bytes of the frame.
pub const HEAD_COPY_BYTES: usize = VNET_HEADER_BYTES + HEAD_BYTES;

/// Bytes of a head whose frame is to be segmented.
const LONG_HEAD_COPY_BYTES: usize = VNET_HEADER_BYTES + LONG_HEAD_BYTES;

/// One head: the receiver's virtio-net header (12-byte form), then the frame's first bytes. Two cache lines.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct Head {
    /// Header and frame bytes; those beyond the frame's own head length are left from earlier frames and never leave.
    pub bytes: [u8; LONG_HEAD_COPY_BYTES],
}

impl Head {
    const EMPTY: Self = Self { bytes: [0; LONG_HEAD_COPY_BYTES] };

    /// Header and frame bytes of a head of the usual length.
    #[inline]
    pub fn usual(&self) -> &[u8; HEAD_COPY_BYTES] {
        self.bytes.first_chunk().unwrap_or(&[0; HEAD_COPY_BYTES])
    }

    /// The virtio-net header.
    #[inline]
    pub fn header(&self) -> VnetHeader {
        VnetHeader::from_bytes(self.bytes.first_chunk().unwrap_or(&[0; VNET_HEADER_BYTES]))
    }

    /// Replaces the virtio-net header.
    #[inline]
    pub fn set_header(&mut self, header: VnetHeader) {
        *self.bytes.first_chunk_mut().unwrap_or(&mut [0; VNET_HEADER_BYTES]) = header.to_bytes();
    }

    /// The frame's first bytes.
    #[inline]
    pub fn frame(&self) -> &[u8; HEAD_BYTES] {
        // The split is at a constant within the array, so the conversion always succeeds and compiles to nothing.
        self.bytes[VNET_HEADER_BYTES..].first_chunk().unwrap_or(&[0; HEAD_BYTES])
    }

    /// The bytes of `frame`, whose head this is, that are in it.
    pub fn bytes_of(&self, frame: &Frame<'_>) -> &[u8] {
        let bytes = &self.bytes[VNET_HEADER_BYTES..];
        bytes.get(..usize::from(frame.head_len)).unwrap_or(bytes)
    }

    /// The destination address (IEEE 802.3, 3.2.4).
    #[inline]
    pub fn destination(&self) -> MacAddr {
        let [a, b, c, d, e, f, ..] = *self.frame();
        MacAddr([a, b, c, d, e, f])
    }

    /// The source address (IEEE 802.3, 3.2.5).
    #[inline]
    pub fn source(&self) -> MacAddr {
        let [_, _, _, _, _, _, a, b, c, d, e, f, ..] = *self.frame();
        MacAddr([a, b, c, d, e, f])
    }

    /// Both addresses as they stand in the frame: equal bytes mean that the same decision holds.
    #[inline]
    pub fn addresses(&self) -> [u8; 12] {
        *self.frame().first_chunk().unwrap_or(&[0; 12])
    }

    /// The EtherType or the tag protocol identifier that follows the addresses.
    #[inline]
    pub fn ether_type(&self) -> u16 {
        let frame = self.frame();
        u16::from_be_bytes([frame[12], frame[13]])
    }
}

/// The heads of one batch: scratch memory of a shard, used again for every batch. Beside them there is room for its tails, which
/// is used for senders only that are on probation ([`Batch::copy_tails`]).
#[derive(Debug)]
pub struct Heads {
    heads: [Head; BATCH_FRAMES],
    tails: Box<[u8]>,
}

/// Fresh scratch memory for a shard's batches. All of it has been written to, so that no page of it is missing when it is used.
pub fn heads() -> Box<Heads> {
    Box::new(Heads { heads: [Head::EMPTY; BATCH_FRAMES], tails: vec![0xff; TAILS_BYTES].into() })
}

/// What a receiver must be able to do to take a frame as it is; as a property of a receiver, what it can do. A set.
///
/// None for a complete frame, which is what all receivers take. Else the frame's virtio-net header says what is missing,
/// and a receiver that lacks one of the needs gets what `offload` makes of the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs(u8);

impl Needs {
    /// None.
    pub const NONE: Self = Self(0);
    /// A checksum has to be completed, that of TCP or UDP.
    pub const CSUM: Self = Self(1);
    /// It is several TCP segments over IPv4.
    pub const TSO4: Self = Self(1 << 1);
    /// It is several TCP segments over IPv6.
    pub const TSO6: Self = Self(1 << 2);
    /// It is several TCP segments of which the first reduces the congestion window (CWR, RFC 3168).
    pub const ECN: Self = Self(1 << 3);
    /// It is several UDP datagrams over IPv4.
    pub const USO4: Self = Self(1 << 4);
    /// It is several UDP datagrams over IPv6.
    pub const USO6: Self = Self(1 << 5);
    /// It is unusual, and better completed by this switch than left to any receiver. No receiver has it.
    pub const ENGINE: Self = Self(1 << 6);
    /// It was made of several by this switch, which happens while it is delivered: no frame of a batch has it.
    pub const MERGED: Self = Self(1 << 7);
    /// All that a receiver can have.
    pub const ALL: Self = Self(0xbf);
    /// Those of a frame that is several.
    const GSO: Self = Self(Self::TSO4.0 | Self::TSO6.0 | Self::USO4.0 | Self::USO6.0);

    /// Both sets.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is in both sets.
    #[must_use]
    pub const fn within(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// `self` if `condition` holds, else none.
    #[must_use]
    pub const fn when(self, condition: bool) -> Self {
        if condition { self } else { Self::NONE }
    }

    /// Whether a receiver that can do `other` can do all of this.
    #[inline]
    pub const fn met_by(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    /// Whether there are none.
    #[inline]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Whether the frame is several, to be segmented.
    #[inline]
    pub const fn is_gso(self) -> bool {
        self.0 & Self::GSO.0 != 0
    }

    /// The set as a number, for an atomic.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The set of that number.
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }
}

/// One frame of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'m> {
    /// Bytes of the whole frame, from the destination address on, without FCS and without virtio-net header.
    pub len: u32,
    /// How many of them are in the head; the tail has the others.
    pub head_len: u8,
    /// What a receiver must be able to do to take it as it is.
    pub needs: Needs,
    /// What was decided.
    pub verdict: Verdict,
    tail: Span<'m>,
    more: (u16, u16),
}

impl Frame<'_> {
    /// A frame of `len` bytes, of which none is there yet.
    #[inline]
    fn new(len: usize, verdict: Verdict) -> Self {
        Self { len: len as u32, head_len: 0, needs: Needs::NONE, verdict, tail: Span::EMPTY, more: (0, 0) }
    }

    /// Bytes of the tail.
    #[inline]
    pub fn tail_len(&self) -> usize {
        self.len as usize - usize::from(self.head_len)
    }

    /// Bytes of the longest frame that this one is on the wire: itself, or its longest segment, as `head` has it.
    #[inline]
    pub fn wire_len(&self, head: &Head) -> u32 {
        if !self.needs.is_gso() {
            return self.len;
        }
        let header = head.header();
        self.len.min(u32::from(header.hdr_len) + u32::from(header.gso_size))
    }

    /// Whether it is longer than an MTU allows that is `longest` for a frame without tags ([`longest_within`]), on the wire:
    /// where it may be several, and without its VLAN tags. The one rule, for what ports send and for what they are given.
    #[inline]
    pub fn exceeds(&self, head: &Head, longest: u32) -> bool {
        self.len > longest && self.exceeds_on_the_wire(head, longest)
    }

    #[cold]
    fn exceeds_on_the_wire(&self, head: &Head, longest: u32) -> bool {
        let tags = Ethernet::parse(head.bytes_of(self)).map_or(0, |view| view.tag_count());
        self.wire_len(head) > longest.saturating_add((TAG_BYTES * tags) as u32)
    }

    /// How many frames this one is on the wire: one, or as many as it has segments, as `head` has it.
    pub fn wire_frames(&self, head: &Head) -> u32 {
        if !self.needs.is_gso() {
            return 1;
        }
        let header = head.header();
        let payload = self.len.saturating_sub(header.hdr_len.into());
        payload.div_ceil(u32::from(header.gso_size).max(1)).max(1)
    }
}

/// Bytes of the longest frame without VLAN tags whose payload is within `mtu`; `None` is any.
#[inline]
pub fn longest_within(mtu: Option<u16>) -> u32 {
    mtu.map_or(u32::MAX, |mtu| u32::from(mtu) + HEADER_BYTES as u32)
}

/// Up to 64 frames that one queue received together.
#[derive(Debug)]
pub struct Batch<'m> {
    heads: &'m mut [Head; BATCH_FRAMES],
    /// Room for copies of tails.
    room: &'m mut [u8],
    frames: ArrayVec<Frame<'m>, BATCH_FRAMES>,
    segments: ArrayVec<Span<'m>, BATCH_SEGMENTS>,
    bytes: u64,
    /// One bit for each frame whose tail does not lie on the page that the end of its head is on.
    beyond: u64,
    gso: u32,
    portion: Portion,
    /// The port that it came from.
    pub port: PortIndex,
    /// Which of its port's queues the batch came from; receivers with several queues keep a flow on one by it.
    pub queue: u16,
}

impl<'m> Batch<'m> {
    /// An empty batch from queue number `queue` of its port, with `heads` as scratch memory.
    #[inline]
    pub fn new(heads: &'m mut Heads, queue: u16) -> Self {
        let (frames, segments) = (ArrayVec::new_const(), ArrayVec::new_const());
        let Heads { heads, tails: room } = heads;
        Self {
            heads,
            room,
            frames,
            segments,
            bytes: 0,
            beyond: 0,
            gso: 0,
            portion: Portion::default(),
            port: PortIndex(0),
            queue,
        }
    }

    /// How many frames are in it.
    #[inline]
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether there is no frame in it.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Bytes of all its frames together.
    #[inline]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many of its frames are several, to be segmented.
    #[inline]
    pub fn gso_frames(&self) -> u32 {
        self.gso
    }

    /// Counts the frame that was added last as one to be segmented.
    pub(crate) fn count_gso(&mut self) {
        self.gso += 1;
    }

    /// Whether another frame of up to `segments` pieces fits.
    #[inline]
    pub fn has_room(&self, segments: usize) -> bool {
        !self.frames.is_full() && self.segments.remaining_capacity() >= segments
    }

    /// Adds the frame whose bytes lie in `pieces`, of which `len` bytes belong to it: copies its head, notes its tail.
    /// The caller has made sure of [`Batch::has_room`]. Frames that are too short are added as already dropped.
    #[inline]
    pub fn push(&mut self, len: usize, pieces: &[Span<'m>]) {
        self.add::<HEAD_BYTES>(len, pieces);
    }

    /// Adds the frame that lies in one piece behind a 12-byte virtio-net header, if it is longer than a head and its header
    /// asks for nothing: the common case, in one copy of constant size. `false` if it is not, and nothing was added.
    #[inline]
    pub fn push_plain(&mut self, piece: Span<'m>) -> bool {
        let Some(head) = self.heads.get_mut(self.frames.len()) else { return false };
        let bytes: Option<&mut [u8; HEAD_COPY_BYTES]> = head.bytes.first_chunk_mut();
        let Some(bytes) = bytes.filter(|_| piece.len() <= VNET_HEADER_BYTES + FRAME_MAX_BYTES) else { return false };
        if !piece.read_exact(bytes) {
            return false;
        }
        let Some(header) = bytes.first_chunk_mut() else { return false };
        if !VnetHeader::asks_nothing(header) {
            return false;
        }
        *header = VNET_HEADER_PLAIN;
        let len = piece.len() - VNET_HEADER_BYTES;
        self.bytes += len as u64;
        let tail = piece.split_at(HEAD_COPY_BYTES).1;
        if !tail.is_empty() && piece.distance(HEAD_COPY_BYTES) >= Span::PAGE_BYTES {
            self.note_beyond();
        }
        self.frames.push(Frame {
            len: len as u32,
            head_len: HEAD_BYTES as u8,
            needs: Needs::NONE,
            verdict: Verdict::Pending,
            tail,
            more: (0, 0),
        });
        true
    }

    /// Adds a frame that is to be segmented: [`Batch::push`] with a longer head, so that its headers are in it.
    pub fn push_long(&mut self, len: usize, pieces: &[Span<'m>]) {
        self.add::<LONG_HEAD_BYTES>(len, pieces);
    }

    /// Adds a frame and copies up to `HEAD` bytes of it.
    #[inline]
    fn add<const HEAD: usize>(&mut self, len: usize, pieces: &[Span<'m>]) {
        self.bytes += len as u64;
        let head = &mut self.heads[self.frames.len() % BATCH_FRAMES];
        // Receivers see only what this switch says of the frame: no offload, one buffer (virtio 1.3, 5.1.6.4).
        *head.bytes.first_chunk_mut().unwrap_or(&mut [0; VNET_HEADER_BYTES]) = VNET_HEADER_PLAIN;
        let mut frame = Frame::new(len, Verdict::Pending);
        if len < FRAME_MIN_BYTES {
            frame.verdict = Verdict::Drop(DropReason::FrameTooShort);
        }
        let (mut at, mut left, mut beyond) = (VNET_HEADER_BYTES, len, false);
        for piece in pieces {
            let piece = if piece.len() > left { piece.split_at(left).0 } else { *piece };
            left -= piece.len();
            let copied = read_head::<HEAD>(&mut head.bytes, at, &piece);
            at += copied;
            let rest = piece.split_at(copied).1;
            if rest.is_empty() {
                continue;
            }
            beyond |= copied == 0 || piece.distance(copied) >= Span::PAGE_BYTES;
            if frame.tail.is_empty() {
                frame.tail = rest;
                frame.more.0 = self.segments.len() as u16;
            } else if self.segments.try_push(rest).is_ok() {
                frame.more.1 += 1;
            }
        }
        frame.head_len = (at - VNET_HEADER_BYTES) as u8;
        if beyond {
            self.note_beyond();
        }
        self.frames.push(frame);
    }

    /// Adds a frame of `len` bytes that is dropped for `reason` before the switch sees it: it counts as received.
    #[inline]
    pub fn push_dropped(&mut self, len: usize, reason: DropReason) {
        self.bytes += len as u64;
        self.heads[self.frames.len() % BATCH_FRAMES] = Head::EMPTY;
        self.frames.push(Frame::new(len, Verdict::Drop(reason)));
    }

    /// The frame that was added last and its head, to say what it needs. `None` if there is none.
    pub fn last(&mut self) -> Option<(&mut Frame<'m>, &mut Head)> {
        let index = self.frames.len().checked_sub(1)?;
        Some((self.frames.get_mut(index)?, &mut self.heads[index % BATCH_FRAMES]))
    }

    /// The frames, in the order they came.
    #[inline]
    pub fn frames(&self) -> &[Frame<'m>] {
        &self.frames
    }

    /// The head of frame `index`.
    #[inline]
    pub fn head(&self, index: usize) -> &Head {
        &self.heads[index % BATCH_FRAMES]
    }

    /// Frame `index` and its head, for deciding on it.
    #[inline]
    pub fn decide(&mut self, index: usize) -> (&mut Frame<'m>, &Head) {
        (&mut self.frames[index], &self.heads[index % BATCH_FRAMES])
    }

    /// All frames and their heads in order, for deciding on them.
    #[inline]
    pub fn decisions(&mut self) -> impl Iterator<Item = (&mut Frame<'m>, &Head)> {
        self.frames.iter_mut().zip(self.heads.iter())
    }

    /// The pieces of frame `index`'s tail, in order; none if the head holds all of it.
    #[inline]
    pub fn tail(&self, index: usize) -> impl Iterator<Item = Span<'m>> + '_ {
        let frame = &self.frames[index];
        let (start, count) = (usize::from(frame.more.0), usize::from(frame.more.1));
        let more = self.segments.get(start..start + count).unwrap_or(&[]);
        std::iter::once(frame.tail).filter(|span| !span.is_empty()).chain(more.iter().copied())
    }

    /// Notes of the frame that is being added that its tail goes beyond the page that the end of its head is on.
    #[inline]
    fn note_beyond(&mut self) {
        self.beyond |= 1 << (self.frames.len() % BATCH_FRAMES);
    }

    /// Reads a byte of each page that the tails of frames lie in which are to be delivered, of those that go beyond the page that
    /// has been read for the end of their head. A sender can have the kernel hold a page fault in its memory, and should do that
    /// to who receives from it, before anything of others is locked. Frames that do not go over the end of a page cost nothing.
    #[inline]
    pub fn touch_tails(&self) {
        let mut left = self.beyond;
        while left != 0 {
            let index = left.trailing_zeros() as usize;
            left &= left - 1;
            if self.frames.get(index).is_some_and(|frame| !matches!(frame.verdict, Verdict::Drop(_))) {
                self.tail(index).for_each(|piece| piece.touch());
            }
        }
    }

    /// All bytes of frame `index`, for reading them in order.
    pub fn source(&self, index: usize) -> Source<'_, 'm> {
        let frame = &self.frames[index];
        let (start, count) = (usize::from(frame.more.0), usize::from(frame.more.1));
        Source::new(
            self.head(index).bytes_of(frame),
            frame.tail,
            self.segments.get(start..start + count).unwrap_or(&[]),
        )
    }

    /// Whether frame `index`'s tail is at most one piece, and that piece: the common case, without an iterator.
    #[inline]
    pub fn single_tail(&self, index: usize) -> Option<Span<'m>> {
        let frame = &self.frames[index];
        (frame.more.1 == 0).then_some(frame.tail)
    }
}

/// Copies what is missing of a head from `piece`; returns how many bytes it took.
#[inline]
fn read_head<const HEAD: usize>(head: &mut [u8; LONG_HEAD_COPY_BYTES], at: usize, piece: &Span<'_>) -> usize {
    if at == VNET_HEADER_BYTES
        && let Some(whole) = head[VNET_HEADER_BYTES..].first_chunk_mut::<HEAD>()
        && piece.read_exact(whole)
    {
        return HEAD;
    }
    piece.read(&mut head[at..VNET_HEADER_BYTES + HEAD])
}

/// The virtio-net header of a frame that needs nothing.
const VNET_HEADER_PLAIN: [u8; VNET_HEADER_BYTES] = VnetHeader::PLAIN.to_bytes();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_in_odd_pieces_has_one_head_and_its_whole_tail() {
        let bytes: Vec<u8> = (0..200u8).collect();
        for cut in [1, 13, 63, 64, 65, 150] {
            let (mut a, mut b) = (bytes[..cut].to_vec(), bytes[cut..].to_vec());
            let pieces = [Span::from_buffer(&mut a), Span::from_buffer(&mut b)];
            let mut heads = heads();
            let mut batch = Batch::new(&mut heads, 0);
            batch.push(190, &pieces);
            let mut got = batch.head(0).frame()[..usize::from(batch.frames()[0].head_len)].to_vec();
            assert_eq!(got.len(), HEAD_BYTES);
            for span in batch.tail(0) {
                let mut piece = vec![0; span.len()];
                span.read(&mut piece);
                got.extend(piece);
            }
            assert_eq!(got, &bytes[..190], "cut at {cut}");
        }
    }

    #[test]
    fn tails_on_pages_that_no_head_is_on_are_noticed() {
        let mut bytes = vec![0u8; 3 * Span::PAGE_BYTES];
        let to_page = bytes.as_ptr().addr().wrapping_neg() % Span::PAGE_BYTES;
        let page = Span::from_buffer(&mut bytes).split_at(to_page).1;
        let goes_beyond = |len, pieces: &[(usize, usize)], plain| {
            let mut heads = heads();
            let mut batch = Batch::new(&mut heads, 0);
            let pieces: Vec<_> = pieces.iter().map(|&(at, len)| page.split_at(at).1.split_at(len).0).collect();
            match plain {
                true => assert!(batch.push_plain(pieces[0])),
                false => batch.push(len, &pieces),
            }
            batch.touch_tails();
            batch.beyond == 1
        };
        let end = Span::PAGE_BYTES;
        for (piece, other) in
            [((0, 76), false), ((end - 76, 76), false), ((end - 500, 500), false), ((end - 500, 501), true)]
        {
            assert_eq!(goes_beyond(piece.1, &[piece], true), other, "{piece:?}");
            assert_eq!(goes_beyond(piece.1, &[piece], false), other, "{piece:?}");
        }
        assert!(!goes_beyond(64, &[(0, 20), (end, 44)], false), "all in the head");
        assert!(!goes_beyond(100, &[(0, 20), (end, 200)], false), "on the page that the end of the head is on");
        assert!(goes_beyond(164, &[(0, 64), (end, 100)], false));
        assert!(goes_beyond(164, &[(0, 64), (64, 100)], false), "another piece may be anywhere");
    }

    #[test]
    fn a_long_head_has_more_and_the_same_bytes_follow() {
        let mut bytes: Vec<u8> = (0..200u8).collect();
        let all = bytes.clone();
        for cut in [0, 20, 64, 115, 116, 117, 190] {
            let (first, second) = Span::from_buffer(&mut bytes).split_at(cut);
            let mut heads = heads();
            let mut batch = Batch::new(&mut heads, 0);
            batch.push_long(190, &[first, second]);
            let (mut got, source) = ([0; 200], batch.source(0));
            assert_eq!((batch.frames()[0].head_len, batch.frames()[0].tail_len()), (116, 74));
            assert_eq!((source.clone().read(&mut got), &got[..190]), (190, &all[..190]), "cut at {cut}");
        }
    }

    #[test]
    fn needs_are_sets() {
        let (both, receiver) = (Needs::CSUM.and(Needs::TSO6), Needs::CSUM.and(Needs::TSO4));
        assert!(Needs::NONE.met_by(Needs::NONE) && Needs::CSUM.met_by(receiver) && !both.met_by(receiver));
        assert!(!Needs::ENGINE.met_by(Needs::ALL) && both.met_by(Needs::ALL));
        assert!(both.is_gso() && !Needs::CSUM.and(Needs::ECN).is_gso());
        assert_eq!((both.within(receiver), Needs::ECN.when(false)), (Needs::CSUM, Needs::NONE));
        assert_eq!(Needs::from_bits(both.bits()), both);
    }

    #[test]
    fn short_frames_are_dropped_but_counted() {
        let mut bytes = [0u8; 13];
        let mut heads = heads();
        let mut batch = Batch::new(&mut heads, 0);
        batch.push(13, &[Span::from_buffer(&mut bytes)]);
        assert_eq!(batch.frames()[0].verdict, Verdict::Drop(DropReason::FrameTooShort));
        assert_eq!(batch.frames()[0].head_len, 13);
    }
}
