//! Complete frames out of one that is not, for a receiver that does not meet its needs: [`Rewrite`].
//!
//! One pass: payload is summed while it is copied into the receiver's buffers, and the headers, whose checksum needs that
//! sum, are written last, to the place in front that was skipped. Nothing but the headers is looked at, and those are our
//! own copy, so a guest that changes its frame meanwhile gets other payload through, with a checksum over just that.
//!
//! What the segments are is what Linux makes of such a frame (net/ipv4/tcp_offload.c `tcp_gso_segment`, udp_offload.c
//! `__udp_gso_segment`, af_inet.c `inet_gso_segment`), because that is what drivers are written for:
//! - TCP: sequence numbers go on, FIN and PSH only in the last segment, CWR only in the first (RFC 3168, 6.1.2);
//! - IPv4: the identification counts up, the header checksum is made anew; IPv6: the payload length;
//! - UDP: each segment is a datagram of its own;
//! - the transport checksum is the pseudo-header's, as the driver left it in the field, corrected for the segment's
//!   length: so it is right through IPv6 routing headers, whose last address it has.
//!
//! A receiver that completes checksums itself but lacks segmentation gets segments with that corrected field and is spared
//! nothing but the sum, which is the dear part.

use super::layout::{FIN, Layout, LayoutError, PSH, Protocol, TCP_FLAGS, TCP_SEQUENCE, UDP_LENGTH};
use crate::frame::{Batch, Needs};
use crate::limits::{GSO_HEADER_BYTES, VNET_HEADER_BYTES};
use crate::mem::{Cursor, Source};
use crate::verdict::DropReason;
use crate::wire::checksum::Sum;
use crate::wire::ip::{V4_CHECKSUM, V4_IDENTIFICATION, V4_TOTAL_LENGTH, V6_BYTES, V6_PAYLOAD_LENGTH, Version};
use crate::wire::virtio_net::{NEEDS_CSUM, VnetHeader};

/// TCP's flag (RFC 3168, 6.1.2) that only the first of several segments has.
const CWR: u8 = 1 << 7;

/// One frame on its way to a receiver as one or more complete ones.
#[derive(Debug)]
pub struct Rewrite<'b, 'm> {
    /// What has not been written yet: of the payload if the frame is segmented, else of the frame.
    source: Source<'b, 'm>,
    left: usize,
    work: Work,
}

/// What is to be done. One at a time lives on a shard's stack, where its size costs nothing and a box would allocate.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)]
enum Work {
    /// Sum from `start` on, and write the checksum `offset` bytes further.
    Checksum {
        start: usize,
        offset: usize,
    },
    Segments(Segments),
}

impl<'b, 'm> Rewrite<'b, 'm> {
    /// What has to be done with frame `index` of `batch`, which needs something, for a receiver that can do `accepts`.
    ///
    /// # Errors
    /// [`DropReason::GsoInvalid`]: the headers did not fit the frame's head, and are not any more what was admitted.
    pub fn of(batch: &'b Batch<'m>, index: usize, accepts: Needs) -> Result<Self, DropReason> {
        let (frame, header) = (&batch.frames()[index], batch.head(index).header());
        let (mut source, len) = (batch.source(index), frame.len as usize);
        if !frame.needs.is_gso() {
            let (start, offset) = (usize::from(header.csum_start), usize::from(header.csum_offset));
            return Ok(Self { source, left: len, work: Work::Checksum { start, offset } });
        }
        let deep = !frame.needs.within(Needs::ENGINE).is_none();
        let most = if deep { GSO_HEADER_BYTES } else { usize::from(frame.head_len) };
        let segments = Segments::of(source, most, len, &header, Needs::CSUM.met_by(accepts))?;
        source.skip(segments.layout.payload);
        Ok(Self { source, left: len - segments.layout.payload, work: Work::Segments(segments) })
    }

    /// How many frames are left to write.
    pub fn count(&self) -> usize {
        match &self.work {
            Work::Checksum { .. } => usize::from(self.left > 0),
            Work::Segments(segments) => self.left.div_ceil(segments.size.max(1)).max(usize::from(segments.first)),
        }
    }

    /// Bytes of the frame that are left to write.
    pub fn bytes_left(&self) -> usize {
        self.left
    }

    /// Whether it becomes several frames.
    #[inline]
    pub fn is_segmentation(&self) -> bool {
        matches!(self.work, Work::Segments(_))
    }

    /// Bytes of the next frame, without virtio-net header; `None` if all have been written.
    #[inline]
    pub fn next_len(&self) -> Option<usize> {
        match &self.work {
            Work::Checksum { .. } => Some(self.left).filter(|&left| left > 0),
            Work::Segments(segments) => {
                segments.next_payload(self.left).map(|payload| segments.layout.payload + payload)
            }
        }
    }

    /// Writes the next frame to `to`, behind a virtio-net header of `header` bytes which says that it takes `chains` chains.
    /// The caller has made sure of the room.
    pub fn write(&mut self, header: usize, chains: u16, mut to: Cursor<'_, '_>) {
        let vnet = match &self.work {
            Work::Segments(segments) if segments.partial => segments.partial_header(),
            _ => VnetHeader::PLAIN,
        };
        let vnet = VnetHeader { num_buffers: chains, ..vnet }.to_bytes();
        to.write(&vnet[..header.min(VNET_HEADER_BYTES)]);
        match &mut self.work {
            Work::Checksum { start, offset } => {
                let (mut field, mut sum) = (to, Sum::new());
                self.source.copy(*start, &mut to);
                self.source.copy_summed(self.left - *start, &mut to, &mut sum);
                field.skip(*start + *offset);
                field.write(&sum.complement_not_zero().to_be_bytes());
                self.left = 0;
            }
            Work::Segments(segments) => {
                let payload = segments.next_payload(self.left).unwrap_or(0);
                self.left -= payload;
                segments.write(&mut self.source, payload, self.left == 0, to);
            }
        }
    }
}

/// The headers of a frame to be segmented, and how far it has come.
#[derive(Debug)]
struct Segments {
    /// As the sender wrote them; each segment's are made in here.
    headers: [u8; GSO_HEADER_BYTES],
    layout: Layout,
    /// Payload bytes of each segment but the last.
    size: usize,
    /// The receiver completes the checksum.
    partial: bool,
    /// The sum of the pseudo-header without the length.
    pseudo: Sum,
    flags: u8,
    sequence: u32,
    identification: u16,
    /// No segment has been written yet.
    first: bool,
}

impl Segments {
    /// The segments of the frame of `len` bytes that `source` has, whose headers are within its first `most` bytes.
    fn of(
        mut source: Source<'_, '_>,
        most: usize,
        len: usize,
        header: &VnetHeader,
        partial: bool,
    ) -> Result<Self, LayoutError> {
        let mut headers = [0; GSO_HEADER_BYTES];
        let copied = source.read(&mut headers[..most.min(GSO_HEADER_BYTES)]);
        let layout = Layout::of(&headers[..copied], header)?;
        // The MTU was compared with segments behind headers of this length.
        if layout.payload != usize::from(header.hdr_len) {
            return Err(LayoutError::Mismatch);
        }
        let transport = layout.transport;
        let mut pseudo = Sum::new();
        pseudo.add_number(number(&headers, transport + layout.protocol.checksum()));
        // Ones' complement: adding the complement takes away.
        pseudo.add_number(!((len - transport) as u16));
        let is_tcp = layout.protocol == Protocol::Tcp;
        let (high, low) = (transport + TCP_SEQUENCE, transport + TCP_SEQUENCE + 2);
        Ok(Self {
            layout,
            size: usize::from(header.gso_size),
            partial,
            pseudo,
            flags: if is_tcp { headers[transport + TCP_FLAGS] } else { 0 },
            sequence: u32::from(number(&headers, high)) << 16 | u32::from(number(&headers, low)),
            identification: number(&headers, layout.network + V4_IDENTIFICATION),
            first: true,
            headers,
        })
    }

    /// Payload bytes of the next segment when `left` are left. A frame without any is one segment.
    #[inline]
    fn next_payload(&self, left: usize) -> Option<usize> {
        (left > 0 || self.first).then_some(left.min(self.size))
    }

    /// The virtio-net header of each segment when the receiver completes the checksum.
    fn partial_header(&self) -> VnetHeader {
        VnetHeader {
            flags: NEEDS_CSUM,
            csum_start: self.layout.transport as u16,
            csum_offset: self.layout.protocol.checksum() as u16,
            ..VnetHeader::PLAIN
        }
    }

    /// Writes one segment.
    fn write(&mut self, source: &mut Source<'_, '_>, payload: usize, last: bool, mut to: Cursor<'_, '_>) {
        let (mut front, mut sum) = (to, Sum::new());
        to.skip(self.layout.payload);
        if self.partial {
            source.copy(payload, &mut to);
        } else {
            source.copy_summed(payload, &mut to, &mut sum);
        }
        self.make_network_header(payload);
        self.make_transport_header(payload, sum, last);
        front.write(&self.headers[..self.layout.payload]);
        self.sequence = self.sequence.wrapping_add(payload as u32);
        self.identification = self.identification.wrapping_add(1);
        self.first = false;
    }

    /// IP's header, for a segment with so much payload.
    fn make_network_header(&mut self, payload: usize) {
        let Layout { version, network, transport, .. } = self.layout;
        let len = self.layout.payload - network + payload;
        match version {
            Version::V4 => {
                self.put(network + V4_TOTAL_LENGTH, len as u16);
                self.put(network + V4_IDENTIFICATION, self.identification);
                self.put(network + V4_CHECKSUM, 0);
                let mut sum = Sum::new();
                sum.add(&self.headers[network..transport]);
                self.put(network + V4_CHECKSUM, sum.complement());
            }
            Version::V6 => self.put(network + V6_PAYLOAD_LENGTH, (len - V6_BYTES) as u16),
        }
    }

    /// TCP's or UDP's header, for a segment with so much payload, which has this sum.
    fn make_transport_header(&mut self, payload: usize, sum: Sum, last: bool) {
        let Layout { protocol, transport, .. } = self.layout;
        let len = (self.layout.payload - transport + payload) as u16;
        match protocol {
            Protocol::Tcp => {
                self.put(transport + TCP_SEQUENCE, (self.sequence >> 16) as u16);
                self.put(transport + TCP_SEQUENCE + 2, self.sequence as u16);
                let cleared = if last { 0 } else { FIN | PSH } | if self.first { 0 } else { CWR };
                self.headers[transport + TCP_FLAGS] = self.flags & !cleared;
            }
            Protocol::Udp => self.put(transport + UDP_LENGTH, len),
        }
        let mut pseudo = self.pseudo;
        pseudo.add_number(len);
        let field = transport + protocol.checksum();
        self.put(field, pseudo.folded());
        if !self.partial {
            let mut whole = Sum::new();
            whole.add(&self.headers[transport..self.layout.payload]);
            whole.add_number(sum.folded());
            // As Linux has it: TCP knows no other way to write a sum of zero.
            self.put(field, if protocol == Protocol::Tcp { whole.complement() } else { whole.complement_not_zero() });
        }
    }

    /// Writes a number into the headers, where the layout has found that it lies.
    #[inline]
    fn put(&mut self, at: usize, number: u16) {
        self.headers[at..at + 2].copy_from_slice(&number.to_be_bytes());
    }
}

/// The number at `at` of the headers; for UDP one of those that only TCP has may lie beyond what was copied, but not
/// beyond the array.
#[inline]
fn number(headers: &[u8; GSO_HEADER_BYTES], at: usize) -> u16 {
    headers.get(at..at + 2).map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
}
