//! Generic receive offload: TCP segments that came one by one, as one large frame for a receiver that takes such: [`Merge`].
//!
//! What merges is what Linux would merge (net/ipv4/tcp_offload.c `tcp_gro_receive`, af_inet.c `inet_gro_receive`): segments of
//! one flow, in order and without a gap, whose headers differ in nothing but length, sequence number, checksums and, where
//! it means something, an IPv4 identification that counts up; all as long as the first but the last; PSH or FIN end it. So
//! the receiver, or whoever it forwards to, can segment the frame again and get what was sent: that is what the tests hold
//! it to, with [`super::Rewrite`] as the segmenter, which in turn is held against the kernel's. The one thing that is lost is
//! the identification of packets that must not be fragmented, to which RFC 6864, 4.1, gives no meaning; Linux wants even
//! those to count up or to be all the same.
//!
//! The checksum of a merged frame is left to the receiver, which then trusts it, so the checksum of each segment that has one is
//! verified: summed while the payload is copied, in the same pass. A segment that fails spoils the frame, and its
//! segments are delivered as they came; a link that damages frames is rare. What came from a sender that leaves checksums
//! to us has none to verify, and merging it costs only the comparison of headers.
//!
//! Nothing is held back for what may come: only segments of one batch are merged, so nobody waits for it.

#[cfg(any(test, fuzzing))]
pub(super) mod exercise;
#[cfg(test)]
mod tests;

use arrayvec::ArrayVec;

use super::layout::{FIN, Layout, PSH, TCP_CHECKSUM, TCP_FLAGS};
use super::segment::{Kind, Segment, looks_mergeable};
use crate::frame::{Batch, Needs};
use crate::limits::{BATCH_FRAMES, GSO_SIZE_MIN, LONG_HEAD_BYTES, VNET_HEADER_BYTES};
use crate::mem::Cursor;
use crate::wire::checksum::Sum;
use crate::wire::ip::{self, V4_CHECKSUM, V4_FRAGMENT, V4_TOTAL_LENGTH, V6_BYTES, V6_PAYLOAD_LENGTH, Version};
use crate::wire::virtio_net::{GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, VnetHeader};

/// Flows of one batch that are merged at a time. As many as one of Linux's eight buckets has.
const FLOWS: usize = 8;

/// Frames of a batch that are delivered together.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Group {
    /// One that stays as it is.
    Single(u8),
    /// Several that become one.
    Merge(Merge),
}

/// Sorts frames into those that merge and those that do not.
///
/// Frames of one flow come out in their order; flows may overtake each other.
#[derive(Debug)]
pub struct Merger {
    accepts: Needs,
    open: ArrayVec<Merge, FLOWS>,
}

impl Merger {
    /// For a receiver that can do `accepts`.
    pub fn new(accepts: Needs) -> Self {
        Self { accepts, open: ArrayVec::new_const() }
    }

    /// Whether any of `picks` may be worth merging: a look at three of them, so that who receives no TCP pays nearly nothing.
    #[inline]
    pub fn is_promising(batch: &Batch<'_>, picks: &[u8]) -> bool {
        let (Some(&first), Some(&middle), Some(&last)) = (picks.first(), picks.get(picks.len() / 2), picks.last())
        else {
            return false;
        };
        picks.len() > 1 && [first, middle, last].iter().any(|&pick| looks_mergeable(batch, pick))
    }

    /// Takes the next frame and hands out what is complete with it. `mergeable` is false of a frame that must stay by itself
    /// for another reason than this module's.
    pub fn take<E>(
        &mut self,
        batch: &Batch<'_>,
        index: u8,
        mergeable: bool,
        each: &mut impl FnMut(Group) -> Result<(), E>,
    ) -> Result<(), E> {
        let segment = match Segment::of(batch, index) {
            Kind::Tcp(segment) => segment,
            Kind::Other => return each(Group::Single(index)),
            Kind::Unclear => {
                self.finish(each)?;
                return each(Group::Single(index));
            }
        };
        let mergeable = mergeable && segment.is_plain;
        if let Some(at) = self.open.iter().position(|merge| merge.is_of(&segment)) {
            let merge = &mut self.open[at];
            if mergeable && merge.precedes(&segment) {
                if merge.add(&segment) {
                    return Ok(());
                }
                return each(self.open.remove(at).group());
            }
            each(self.open.remove(at).group())?;
        }
        if !mergeable || !segment.may_begin(self.accepts) {
            return each(Group::Single(index));
        }
        if self.open.is_full() {
            each(self.open.remove(0).group())?;
        }
        self.open.push(Merge::begin(&segment));
        Ok(())
    }

    /// Hands out all that is left.
    pub fn finish<E>(&mut self, each: &mut impl FnMut(Group) -> Result<(), E>) -> Result<(), E> {
        self.open.drain(..).try_for_each(|merge| each(merge.group()))
    }
}

impl Segment {
    /// Whether others may follow it in one frame to a receiver that can do `accepts`.
    fn may_begin(&self, accepts: Needs) -> bool {
        let needs = if self.layout.version == Version::V4 { Needs::TSO4 } else { Needs::TSO6 };
        needs.met_by(accepts) && self.payload >= usize::from(GSO_SIZE_MIN) && self.flags() & (FIN | PSH) == 0
    }
}

/// Segments that become one frame.
#[derive(Debug)]
pub struct Merge {
    /// Those of the first segment.
    headers: [u8; LONG_HEAD_BYTES],
    layout: Layout,
    frames: ArrayVec<u8, BATCH_FRAMES>,
    /// Of each frame whose checksum is complete the sum of its TCP header.
    sums: ArrayVec<Option<Sum>, BATCH_FRAMES>,
    /// Bytes of payload of each segment but the last.
    size: usize,
    /// Bytes of payload of all.
    payload: usize,
    /// The sequence number and, where it means something, the identification that the next has to have.
    sequence: u32,
    identification: Option<u16>,
    /// PSH and FIN of the last.
    flags: u8,
}

impl Merge {
    fn begin(segment: &Segment) -> Self {
        let mut merge = Self {
            headers: segment.headers,
            layout: segment.layout,
            frames: ArrayVec::new_const(),
            sums: ArrayVec::new_const(),
            size: segment.payload,
            payload: 0,
            sequence: 0,
            identification: None,
            flags: 0,
        };
        merge.add(segment);
        merge
    }

    /// Adds `segment`, which comes next; returns whether others may follow.
    fn add(&mut self, segment: &Segment) -> bool {
        self.frames.push(segment.index);
        self.sums.push(segment.sum);
        self.payload += segment.payload;
        self.sequence = segment.sequence().wrapping_add(segment.payload as u32);
        self.identification = segment.identification().map(|id| id.wrapping_add(1));
        self.flags |= segment.flags() & (FIN | PSH);
        self.flags == 0 && segment.payload == self.size
    }

    fn group(self) -> Group {
        match self.frames[..] {
            [index] => Group::Single(index),
            _ => Group::Merge(self),
        }
    }

    /// Whether `segment` is of the same flow: the same stations, VLAN, addresses and ports.
    fn is_of(&self, segment: &Segment) -> bool {
        let Layout { version, network, transport, .. } = self.layout;
        let addresses = network + addresses(version).start;
        let same = |from: usize, to: usize| self.headers[from..to] == segment.headers[from..to];
        segment.layout.network == network
            && segment.layout.version == version
            && same(0, network)
            && same(addresses, transport + 4)
    }

    /// Whether `segment` of the same flow continues this: all that is to be the same is, and it fits.
    fn precedes(&self, segment: &Segment) -> bool {
        let Layout { version, network, transport, payload, .. } = self.layout;
        let same = |from: usize, to: usize| self.headers[from..to] == segment.headers[from..to];
        let same_network = match version {
            // Version and service; fragmentation, time to live and protocol.
            Version::V4 => same(network, network + 2) && same(network + V4_FRAGMENT, network + V4_CHECKSUM),
            // Version, class and flow label; next header and hop limit.
            Version::V6 => same(network, network + V6_PAYLOAD_LENGTH) && same(network + 6, network + 8),
        };
        let flags = transport + TCP_FLAGS;
        let whole = payload - network + self.payload + segment.payload;
        // The length of TCP's header is compared below; but nothing is to be compared beyond either's.
        segment.layout.payload == payload
            && segment.sequence() == self.sequence
            && segment.payload <= self.size
            && whole <= usize::from(u16::MAX)
            && segment.identification() == self.identification
            && same_network
            // The acknowledged number and the length; the flags; the window; what is urgent, and options.
            && same(transport + 8, flags)
            && (self.headers[flags] ^ segment.headers[flags]) & !(FIN | PSH) == 0
            && same(flags + 1, transport + TCP_CHECKSUM)
            && same(transport + TCP_CHECKSUM + 2, payload)
    }

    /// The frames that it is made of, in order.
    pub fn frames(&self) -> &[u8] {
        &self.frames
    }

    /// Bytes of the frame, without virtio-net header.
    pub fn frame_len(&self) -> usize {
        self.layout.payload + self.payload
    }

    /// Writes the frame to `to`, behind a virtio-net header of `header` bytes which says that it takes `chains` chains. The
    /// caller has made sure of the room. `false`: one of the segments is damaged, and what was written is worth nothing.
    #[must_use]
    pub fn write(&self, batch: &Batch<'_>, header: usize, chains: u16, mut to: Cursor<'_, '_>) -> bool {
        let mut front = to;
        to.skip(header + self.layout.payload);
        let mut frames = self.frames.iter().zip(&self.sums);
        if !frames.all(|(&index, &sum)| self.copy(batch, usize::from(index), sum, &mut to)) {
            return false;
        }
        let Layout { version, transport, payload, .. } = self.layout;
        let vnet = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: if version == Version::V4 { GSO_TCPV4 } else { GSO_TCPV6 },
            hdr_len: payload as u16,
            gso_size: self.size as u16,
            csum_start: transport as u16,
            csum_offset: TCP_CHECKSUM as u16,
            num_buffers: chains,
        };
        front.write(&vnet.to_bytes()[..header.min(VNET_HEADER_BYTES)]);
        front.write(&self.made_headers()[..payload]);
        true
    }

    /// Copies the payload of frame `index`; `false` if it comes with a checksum that is wrong, going by it and the `sum` of its
    /// header.
    fn copy(&self, batch: &Batch<'_>, index: usize, sum: Option<Sum>, to: &mut Cursor<'_, '_>) -> bool {
        let Layout { transport, payload, .. } = self.layout;
        let (mut source, len) = (batch.source(index), batch.frames()[index].len as usize - payload);
        source.skip(payload);
        let Some(header) = sum else {
            source.copy(len, to);
            return true;
        };
        let mut sum = self.pseudo(payload - transport + len);
        sum.add_number(header.folded());
        source.copy_summed(len, to, &mut sum);
        sum.folded() == 0xffff
    }

    /// The sum of the pseudo-header (RFC 9293, 3.1; RFC 8200, 8.1) of `len` bytes of TCP.
    fn pseudo(&self, len: usize) -> Sum {
        let Layout { version, network, .. } = self.layout;
        let addresses = addresses(version);
        let mut sum = Sum::new();
        sum.add(&self.headers[network + addresses.start..network + addresses.end]);
        sum.add_number(ip::TCP.into());
        sum.add_number(len as u16);
        sum
    }

    /// The headers of the frame.
    fn made_headers(&self) -> [u8; LONG_HEAD_BYTES] {
        let Layout { version, network, transport, payload, .. } = self.layout;
        let mut headers = self.headers;
        let mut put = |at: usize, number: u16| headers[at..at + 2].copy_from_slice(&number.to_be_bytes());
        let len = payload - network + self.payload;
        match version {
            Version::V4 => {
                put(network + V4_TOTAL_LENGTH, len as u16);
                put(network + V4_CHECKSUM, 0);
            }
            Version::V6 => put(network + V6_PAYLOAD_LENGTH, (len - V6_BYTES) as u16),
        }
        put(transport + TCP_CHECKSUM, self.pseudo(payload - transport + self.payload).folded());
        headers[transport + TCP_FLAGS] |= self.flags;
        if version == Version::V4 {
            let mut sum = Sum::new();
            sum.add(&headers[network..transport]);
            headers[network + V4_CHECKSUM..][..2].copy_from_slice(&sum.complement().to_be_bytes());
        }
        headers
    }
}

/// Where both addresses are in IP's header.
const fn addresses(version: Version) -> std::ops::Range<usize> {
    match version {
        Version::V4 => 12..20,
        Version::V6 => 8..40,
    }
}
