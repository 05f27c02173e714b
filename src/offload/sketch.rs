//! Large frames for tests, made as a driver makes them: [`Sketch`].

use proptest::prelude::*;

use crate::limits::GSO_SIZE_MIN;
use crate::wire::virtio_net::{GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHeader};

/// RFC 1071, 16 bits at a time.
pub(crate) fn naive_sum(bytes: &[u8], mut sum: u32) -> u32 {
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

/// A frame to be made, as a driver would.
#[derive(Debug, Clone)]
pub(crate) struct Sketch {
    pub(crate) tags: usize,
    pub(crate) v6: bool,
    pub(crate) udp: bool,
    /// Words of IPv4 options, or lengths of IPv6 extension headers in units of 8 bytes beyond the first.
    pub(crate) network_options: Vec<u8>,
    /// Words of TCP options.
    pub(crate) transport_options: usize,
    pub(crate) flags: u8,
    pub(crate) sequence: u32,
    pub(crate) identification: u16,
    pub(crate) payload: Vec<u8>,
    pub(crate) gso_size: u16,
}

impl Default for Sketch {
    fn default() -> Self {
        Self {
            tags: 0,
            v6: false,
            udp: false,
            network_options: Vec::new(),
            transport_options: 3,
            flags: 0x10,
            sequence: 0xffff_f000,
            identification: 0xfffe,
            payload: (0..5000u32).map(|i| (i * 7 % 251) as u8).collect(),
            gso_size: 1448,
        }
    }
}

/// A frame and its virtio-net header, and where its headers are.
pub(crate) struct Made {
    pub(crate) bytes: Vec<u8>,
    pub(crate) header: VnetHeader,
    pub(crate) network: usize,
    pub(crate) transport: usize,
    pub(crate) payload: usize,
}

impl Sketch {
    pub(crate) fn make(&self) -> Made {
        let mut bytes = vec![0x52, 0x54, 0, 0, 0, 2, 0x52, 0x54, 0, 0, 0, 1];
        for tag in 0..self.tags {
            bytes.extend(if tag == 0 && self.tags == 2 { [0x88, 0xa8, 0, 9] } else { [0x81, 0, 0x20, 5] });
        }
        bytes.extend(if self.v6 { [0x86, 0xdd] } else { [8, 0] });
        let network = bytes.len();
        let transport_len = if self.udp { 8 } else { 20 + 4 * self.transport_options };
        self.add_network(&mut bytes, transport_len + self.payload.len());
        let transport = bytes.len();
        let (source, destination) = ([0x9c, 0x40], [0x00, 0x50]);
        bytes.extend([source, destination].concat());
        if self.udp {
            bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            bytes.extend([0, 0]);
        } else {
            bytes.extend(self.sequence.to_be_bytes());
            bytes.extend([1, 2, 3, 4, (transport_len as u8 / 4) << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
            bytes.extend((0..4 * self.transport_options).map(|_| 1));
        }
        let payload = bytes.len();
        bytes.extend(&self.payload);
        let offset = if self.udp { 6 } else { 16 };
        let pseudo = pseudo(&bytes, network, self.v6, self.udp, bytes.len() - transport);
        bytes[transport + offset..][..2].copy_from_slice(&(pseudo as u16).to_be_bytes());
        let ecn = if self.flags & 0x80 != 0 && !self.udp { GSO_ECN } else { 0 };
        let gso_type = match (self.udp, self.v6) {
            (true, _) => GSO_UDP_L4,
            (_, false) => GSO_TCPV4 | ecn,
            (_, true) => GSO_TCPV6 | ecn,
        };
        let header = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type,
            hdr_len: 0xbad,
            gso_size: self.gso_size,
            csum_start: transport as u16,
            csum_offset: offset as u16,
            num_buffers: 0xbad,
        };
        Made { bytes, header, network, transport, payload }
    }

    fn add_network(&self, bytes: &mut Vec<u8>, len: usize) {
        let protocol = if self.udp { 17 } else { 6 };
        if self.v6 {
            let extensions: usize = self.network_options.iter().map(|&len| 8 + 8 * usize::from(len)).sum();
            let kinds = [0, 43, 60, 60];
            let next = |index: usize| if index < self.network_options.len() { kinds[index % 4] } else { protocol };
            bytes.extend([0x60, 1, 2, 3]);
            bytes.extend(((extensions + len) as u16).to_be_bytes());
            bytes.extend([next(0), 64]);
            bytes.extend((0..32u8).map(|i| i * 3));
            for (index, &len) in self.network_options.iter().enumerate() {
                bytes.extend([next(index + 1), len]);
                bytes.extend(vec![0; 6 + 8 * usize::from(len)]);
            }
        } else {
            let words = self.network_options.len().min(10);
            let total = (20 + 4 * words + len) as u16;
            let id = self.identification.to_be_bytes();
            bytes.extend([0x45 + words as u8, 0, (total >> 8) as u8, total as u8, id[0], id[1], 0x40, 0, 64, protocol]);
            bytes.extend([0xee, 0xee, 10, 0, 0, 1, 10, 0, 0, 2]);
            bytes.extend(vec![1; 4 * words]);
        }
    }
}

/// The sum of the pseudo-header (RFC 9293, 3.1; RFC 8200, 8.1) for `len` bytes of TCP or UDP.
fn pseudo(bytes: &[u8], network: usize, v6: bool, udp: bool, len: usize) -> u32 {
    let addresses = if v6 { &bytes[network + 8..network + 40] } else { &bytes[network + 12..network + 20] };
    let rest = [(len >> 16) as u8, (len >> 8) as u8, len as u8, 0, if udp { 17 } else { 6 }, 0];
    naive_sum(&[0, rest[4]], naive_sum(&rest[1..3], naive_sum(addresses, u32::from(rest[0]))))
}

prop_compose! {
    /// Any that a driver may send; the headers of some are longer than the switch takes.
    pub(crate) fn sketches()(
        (tags, v6, udp) in (0..3usize, any::<bool>(), any::<bool>()),
        network_options in prop::collection::vec(0..3u8, 0..4),
        transport_options in 0..11usize,
        (flags, sequence, identification) in any::<(u8, u32, u16)>(),
        payload in prop::collection::vec(any::<u8>(), 0..9000),
        gso_size in prop_oneof![GSO_SIZE_MIN..9000, 1..3u16],
    ) -> Sketch {
        // Now and then a size that divides the payload.
        let gso_size = if gso_size < GSO_SIZE_MIN { (payload.len() as u16 / gso_size).max(GSO_SIZE_MIN) } else { gso_size };
        Sketch { tags, v6, udp, network_options, transport_options, flags, sequence, identification, payload, gso_size }
    }
}
