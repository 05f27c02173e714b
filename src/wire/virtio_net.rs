//! The virtio-net header (virtio 1.3, 5.1.6): [`VnetHeader`], what a driver and a device say about a frame's offloads.
//!
//! Little-endian, as every modern device has it and every legacy one on the machines we run on. The 10-byte form of
//! legacy devices is the same without its last field. What a guest writes here is a claim: `offload::admit` checks it.

use crate::limits::VNET_HEADER_BYTES;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM: the checksum at `csum_start + csum_offset` is that of the pseudo-header only.
pub const NEEDS_CSUM: u8 = 1;

/// VIRTIO_NET_HDR_GSO_NONE: one frame as it is.
pub const GSO_NONE: u8 = 0;
/// VIRTIO_NET_HDR_GSO_TCPV4: several TCP segments over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// VIRTIO_NET_HDR_GSO_TCPV6: several TCP segments over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// VIRTIO_NET_HDR_GSO_UDP_L4: several UDP datagrams, over either.
pub const GSO_UDP_L4: u8 = 5;
/// VIRTIO_NET_HDR_GSO_ECN, beside a TCP type: the header has CWR set, which only the first segment keeps.
pub const GSO_ECN: u8 = 0x80;

/// A virtio-net header as a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VnetHeader {
    /// [`NEEDS_CSUM`] and flags that only a device sets.
    pub flags: u8,
    /// One of the `GSO_` types, [`GSO_ECN`] beside it or not.
    pub gso_type: u8,
    /// Bytes of all headers of a frame that is to be segmented. A hint.
    pub hdr_len: u16,
    /// Payload bytes of each segment but the last.
    pub gso_size: u16,
    /// Where the checksum begins to count, from the frame's first byte.
    pub csum_start: u16,
    /// Where it is to be written, from `csum_start`.
    pub csum_offset: u16,
    /// Chains of buffers that the frame takes.
    pub num_buffers: u16,
}

impl VnetHeader {
    /// The header of a frame that needs nothing and takes one buffer (5.1.6.4.1: 1 without VIRTIO_NET_F_MRG_RXBUF too).
    pub const PLAIN: Self =
        Self { flags: 0, gso_type: GSO_NONE, hdr_len: 0, gso_size: 0, csum_start: 0, csum_offset: 0, num_buffers: 1 };

    /// The header that stands in `bytes`.
    #[inline]
    pub const fn from_bytes(bytes: &[u8; VNET_HEADER_BYTES]) -> Self {
        let [flags, gso_type, a, b, c, d, e, f, g, h, i, j] = *bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([a, b]),
            gso_size: u16::from_le_bytes([c, d]),
            csum_start: u16::from_le_bytes([e, f]),
            csum_offset: u16::from_le_bytes([g, h]),
            num_buffers: u16::from_le_bytes([i, j]),
        }
    }

    /// Its bytes.
    #[inline]
    pub const fn to_bytes(self) -> [u8; VNET_HEADER_BYTES] {
        let ([a, b], [c, d]) = (self.hdr_len.to_le_bytes(), self.gso_size.to_le_bytes());
        let ([e, f], [g, h]) = (self.csum_start.to_le_bytes(), self.csum_offset.to_le_bytes());
        let [i, j] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h, i, j]
    }

    /// Whether a driver that wrote `bytes` asks for nothing: one test for all frames that need no offload. Flags that mean
    /// nothing to a device (DATA_VALID, unknown bits) are ignored, as virtio 1.3, 5.1.6.2.2 says.
    #[inline]
    pub const fn asks_nothing(bytes: &[u8; VNET_HEADER_BYTES]) -> bool {
        bytes[0] & NEEDS_CSUM | bytes[1] == 0
    }

    /// The GSO type without [`GSO_ECN`].
    #[inline]
    pub const fn kind(&self) -> u8 {
        self.gso_type & !GSO_ECN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_standard_has_them() {
        let bytes = [1, 0x81, 66, 0, 0xa8, 5, 34, 0, 16, 0, 1, 2];
        let header = VnetHeader::from_bytes(&bytes);
        let expected = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4 | GSO_ECN,
            hdr_len: 66,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0x201,
        };
        assert_eq!((header, header.kind(), header.to_bytes()), (expected, GSO_TCPV4, bytes));
        assert_eq!(VnetHeader::PLAIN.to_bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }

    #[test]
    fn flags_that_only_a_device_sets_ask_for_nothing() {
        let with = |flags, gso_type| VnetHeader { flags, gso_type, ..VnetHeader::PLAIN }.to_bytes();
        assert!(VnetHeader::asks_nothing(&with(0, 0)) && VnetHeader::asks_nothing(&with(0xfe, 0)));
        assert!(!VnetHeader::asks_nothing(&with(1, 0)) && !VnetHeader::asks_nothing(&with(0, 0x80)));
    }
}
