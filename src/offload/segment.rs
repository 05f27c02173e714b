//! TCP segments as receive offload looks at them: [`Segment`], read from a frame of a batch.
//!
//! A segment's headers often end behind the frame's head: with timestamps they have 66 bytes over IPv4 and 86 over IPv6. So
//! they are copied once more, beyond the head from the sender's memory, and everything that is decided about the segment is
//! decided on that copy. IPv4 with options and IPv6 with extension headers are not looked into: who sends those sends few.

use super::layout::{FIN, Layout, PSH, Protocol, TCP_BYTES, TCP_CHECKSUM, TCP_DATA_OFFSET, TCP_FLAGS, TCP_SEQUENCE};
use crate::frame::{Batch, Needs};
use crate::limits::{GSO_SIZE_MIN, LONG_HEAD_BYTES};
use crate::wire::checksum::Sum;
use crate::wire::ethernet::{EtherType, Ethernet};
use crate::wire::ip::{self, V4_BYTES, V4_FRAGMENT, V4_IDENTIFICATION, V4_PROTOCOL, V4_TOTAL_LENGTH};
use crate::wire::ip::{V6_BYTES, V6_NEXT_HEADER, V6_PAYLOAD_LENGTH, Version};

/// TCP's flags (RFC 9293, 3.1), beside those of `layout`.
const ACK: u8 = 1 << 4;
/// Congestion experienced, said back; it may stay set for many segments (RFC 3168, 6.1.3).
const ECE: u8 = 1 << 6;

/// IPv4: "don't fragment" (RFC 791, 3.1).
const DONT_FRAGMENT: u16 = 1 << 14;

/// What a frame is to receive offload.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)]
pub(super) enum Kind {
    /// Something else than TCP.
    Other,
    /// TCP, but of which flow is not known.
    Unclear,
    /// A segment of a known flow.
    Tcp(Segment),
}

/// A TCP segment.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) index: u8,
    /// All headers; what is behind them is not defined.
    pub(super) headers: [u8; LONG_HEAD_BYTES],
    pub(super) layout: Layout,
    /// Bytes of its payload.
    pub(super) payload: usize,
    /// The sum of its TCP header, if its checksum is complete.
    pub(super) sum: Option<Sum>,
    /// The next segment may follow in the same frame, or this one may follow.
    pub(super) is_plain: bool,
}

impl Segment {
    /// Looks at frame `index` of `batch`.
    pub(super) fn of(batch: &Batch<'_>, index: u8) -> Kind {
        let frame = &batch.frames()[usize::from(index)];
        let head = batch.head(usize::from(index)).bytes_of(frame);
        let Some((network, version)) = packet(head) else { return Kind::Other };
        let transport = match transport(head, network, version) {
            Ok(Some(transport)) => transport,
            Ok(None) => return Kind::Other,
            Err(()) => return Kind::Unclear,
        };
        let mut source = batch.source(usize::from(index));
        let mut headers = [0; LONG_HEAD_BYTES];
        // No more than is needed: the frame's next cache line is not here yet.
        let at_hand = transport + TCP_DATA_OFFSET + 1;
        let mut have = source.read(&mut headers[..at_hand]);
        let payload = transport + usize::from(headers[transport + TCP_DATA_OFFSET] >> 4) * 4;
        if have == at_hand && payload > have && payload <= LONG_HEAD_BYTES {
            have += source.read(&mut headers[have..payload]);
        }
        if have < payload || payload < transport + TCP_BYTES {
            return Kind::Unclear;
        }
        let layout = Layout { version, network, protocol: Protocol::Tcp, transport, payload };
        let len = frame.len as usize;
        let sum = frame.needs.is_none().then(|| {
            let mut sum = Sum::new();
            sum.add(&headers[transport..payload]);
            sum
        });
        let mut segment = Self { index, headers, layout, payload: len - payload, sum, is_plain: false };
        segment.is_plain = segment.payload > 0 && segment.is_bare() && segment.fills(len) && {
            let header = batch.head(usize::from(index)).header();
            let is_its = usize::from(header.csum_start) == transport && usize::from(header.csum_offset) == TCP_CHECKSUM;
            sum.is_some() || frame.needs == Needs::CSUM && is_its
        };
        Kind::Tcp(segment)
    }

    /// Whether its headers say nothing that another segment's could not say as well: of TCP's flags ACK, and ECE, PSH and FIN,
    /// which have their rules; of IPv4's the checksum is right and nothing is fragmented.
    fn is_bare(&self) -> bool {
        let flags = self.flags();
        if flags & ACK == 0 || flags & !(ACK | ECE | PSH | FIN) != 0 {
            return false;
        }
        let Layout { version, network, transport, .. } = self.layout;
        match version {
            Version::V4 => {
                let mut sum = Sum::new();
                sum.add(&self.headers[network..transport]);
                sum.folded() == 0xffff && self.number(network + V4_FRAGMENT) & !DONT_FRAGMENT == 0
            }
            Version::V6 => true,
        }
    }

    /// Whether it fills a frame of `len` bytes, going by IP's length: no padding, and nothing missing.
    fn fills(&self, len: usize) -> bool {
        let network = self.layout.network;
        let (field, beyond) = match self.layout.version {
            Version::V4 => (V4_TOTAL_LENGTH, 0),
            Version::V6 => (V6_PAYLOAD_LENGTH, V6_BYTES),
        };
        usize::from(self.number(network + field)) + beyond == len - network
    }

    /// TCP's flags.
    pub(super) fn flags(&self) -> u8 {
        self.headers[self.layout.transport + TCP_FLAGS]
    }

    /// The sequence number of its first byte of payload.
    pub(super) fn sequence(&self) -> u32 {
        let at = self.layout.transport + TCP_SEQUENCE;
        u32::from(self.number(at)) << 16 | u32::from(self.number(at + 2))
    }

    /// IPv4's identification, if it means something: a packet that nobody may fragment can have any (RFC 6864, 4.1).
    pub(super) fn identification(&self) -> Option<u16> {
        let network = self.layout.network;
        let matters = self.layout.version == Version::V4 && self.number(network + V4_FRAGMENT) & DONT_FRAGMENT == 0;
        matters.then(|| self.number(network + V4_IDENTIFICATION))
    }

    /// The number at `at` of the headers.
    fn number(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.headers[at], self.headers[at + 1]])
    }
}

/// Where the IP header of a frame that begins with `head` is; `None` if it is another protocol's frame.
#[inline]
fn packet(head: &[u8]) -> Option<(usize, Version)> {
    let ethernet = Ethernet::parse(head).ok()?;
    let version = match ethernet.ether_type() {
        EtherType::IPV4 => Version::V4,
        EtherType::IPV6 => Version::V6,
        _ => return None,
    };
    Some((ethernet.header_len(), version))
}

/// Where the TCP header begins; `None` if the packet is something else, an error if that cannot be said from here.
#[inline]
fn transport(head: &[u8], network: usize, version: Version) -> Result<Option<usize>, ()> {
    let (bytes, protocol) = match version {
        Version::V4 => (V4_BYTES, V4_PROTOCOL),
        Version::V6 => (V6_BYTES, V6_NEXT_HEADER),
    };
    let header = head.get(network..network + bytes).ok_or(())?;
    // Of a fragment only the first has ports, and nobody knows which this is without keeping them.
    let whole =
        version == Version::V6 || u16::from_be_bytes([header[V4_FRAGMENT], header[V4_FRAGMENT + 1]]) & 0x3fff == 0;
    match (version, header[protocol]) {
        (Version::V4, ip::TCP) if header[0] == 0x45 && whole => Ok(Some(network + bytes)),
        (Version::V6, ip::TCP) if header[0] >> 4 == 6 => Ok(Some(network + bytes)),
        (_, ip::TCP) => Err(()),
        (Version::V6, other) if ip::is_extension(other) => Err(()),
        _ => Ok(None),
    }
}

/// Whether a look at frame `index` says that it could be a segment with enough payload: cheap, and right for nearly all.
#[inline]
pub(super) fn looks_mergeable(batch: &Batch<'_>, index: u8) -> bool {
    let frame = &batch.frames()[usize::from(index)];
    let head = batch.head(usize::from(index)).bytes_of(frame);
    let begins = || packet(head).and_then(|(network, version)| transport(head, network, version).ok().flatten());
    let least = TCP_BYTES + usize::from(GSO_SIZE_MIN);
    frame.needs.met_by(Needs::CSUM) && begins().is_some_and(|transport| frame.len as usize >= transport + least)
}
