//! Where the headers of a frame to be segmented are: [`Layout`], found in a copy of the frame's first bytes.

use crate::verdict::DropReason;
use crate::wire::ethernet::{EtherType, Ethernet};
use crate::wire::ip::{self, IpError, Version};
use crate::wire::virtio_net::{self, VnetHeader};

/// TCP's header (RFC 9293, 3.1): where the sequence number, the data offset, flags and checksum are, and its length.
pub(super) const TCP_SEQUENCE: usize = 4;
pub(super) const TCP_DATA_OFFSET: usize = 12;
pub(super) const TCP_FLAGS: usize = 13;
pub(super) const TCP_CHECKSUM: usize = 16;
pub(super) const TCP_BYTES: usize = 20;

/// TCP's flags (RFC 9293, 3.1) that only the last of several segments has.
pub(super) const FIN: u8 = 1;
/// See [`FIN`].
pub(super) const PSH: u8 = 1 << 3;

/// UDP's header (RFC 768).
pub(super) const UDP_LENGTH: usize = 4;
pub(super) const UDP_CHECKSUM: usize = 6;
pub(super) const UDP_BYTES: usize = 8;

/// What is segmented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// Where the checksum is in its header.
    pub(super) const fn checksum(self) -> usize {
        match self {
            Self::Tcp => TCP_CHECKSUM,
            Self::Udp => UDP_CHECKSUM,
        }
    }
}

/// Where the headers of a frame are, each from the frame's first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) version: Version,
    /// IP's header.
    pub(super) network: usize,
    pub(super) protocol: Protocol,
    /// TCP's or UDP's header.
    pub(super) transport: usize,
    /// The first byte of payload.
    pub(super) payload: usize,
}

/// Why there is no layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LayoutError {
    /// The bytes end before the payload begins.
    Truncated,
    /// The frame is not what its virtio-net header says.
    Mismatch,
    /// It is longer than an IP packet can be.
    TooLong,
}

impl From<IpError> for LayoutError {
    fn from(error: IpError) -> Self {
        match error {
            IpError::Truncated => Self::Truncated,
            IpError::Malformed | IpError::Fragment => Self::Mismatch,
        }
    }
}

impl From<LayoutError> for DropReason {
    fn from(_: LayoutError) -> Self {
        Self::GsoInvalid
    }
}

impl Layout {
    /// Finds the headers of a frame that begins with `bytes` and whose virtio-net header is `header`: through VLAN tags,
    /// IPv4 options and IPv6 extension headers, and just where `header` says that the checksum begins.
    pub(super) fn of(bytes: &[u8], header: &VnetHeader) -> Result<Self, LayoutError> {
        let ethernet = Ethernet::parse(bytes).map_err(|_| LayoutError::Truncated)?;
        let network = ethernet.header_len();
        let version = match (ethernet.ether_type(), header.kind()) {
            (EtherType::IPV4, virtio_net::GSO_TCPV4 | virtio_net::GSO_UDP_L4) => Version::V4,
            (EtherType::IPV6, virtio_net::GSO_TCPV6 | virtio_net::GSO_UDP_L4) => Version::V6,
            _ => return Err(LayoutError::Mismatch),
        };
        let found = ip::transport(bytes, network, version)?;
        let protocol = match (found.protocol, header.kind()) {
            (ip::TCP, virtio_net::GSO_TCPV4 | virtio_net::GSO_TCPV6) => Protocol::Tcp,
            (ip::UDP, virtio_net::GSO_UDP_L4) => Protocol::Udp,
            _ => return Err(LayoutError::Mismatch),
        };
        if found.at != usize::from(header.csum_start) || protocol.checksum() != usize::from(header.csum_offset) {
            return Err(LayoutError::Mismatch);
        }
        let transport_len = match protocol {
            Protocol::Udp => UDP_BYTES,
            Protocol::Tcp => {
                let offset = bytes.get(found.at + TCP_DATA_OFFSET).ok_or(LayoutError::Truncated)?;
                usize::from(offset >> 4) * 4
            }
        };
        if protocol == Protocol::Tcp && transport_len < TCP_BYTES {
            return Err(LayoutError::Mismatch);
        }
        let payload = found.at + transport_len;
        if payload > bytes.len() {
            return Err(LayoutError::Truncated);
        }
        Ok(Self { version, network, protocol, transport: found.at, payload })
    }
}
