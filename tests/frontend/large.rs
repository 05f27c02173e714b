//! Large frames of TCP and UDP, and their segments, with checksums by code of this file's own: [`Large`].

use super::frame::frame;

const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// Bytes of payload of each segment.
pub const SEGMENT: usize = 1400;

/// RFC 1071, 16 bits at a time.
pub fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    words.fold(0, |sum, word| {
        let sum = sum + word;
        (sum & 0xffff) + (sum >> 16)
    })
}

/// One kind of large frame: TCP or UDP over IPv4 or IPv6.
#[derive(Debug, Clone, Copy)]
pub struct Large {
    pub v6: bool,
    pub udp: bool,
}

pub const KINDS: [Large; 4] = [
    Large { v6: false, udp: false },
    Large { v6: true, udp: false },
    Large { v6: false, udp: true },
    Large { v6: true, udp: true },
];

impl Large {
    pub fn transport(self) -> usize {
        if self.v6 { 54 } else { 34 }
    }

    pub fn headers(self) -> usize {
        self.transport() + if self.udp { 8 } else { 20 }
    }

    /// The sum of the pseudo-header for `len` bytes of TCP or UDP.
    pub fn pseudo(self, bytes: &[u8], len: usize) -> u32 {
        let addresses = if self.v6 { &bytes[22..54] } else { &bytes[26..34] };
        let rest = [(len >> 8) as u8, len as u8, 0, if self.udp { 17 } else { 6 }];
        sum(&[addresses, &rest].concat())
    }

    /// A frame with `payload` bytes, whose checksum is that of the pseudo-header, and its virtio-net header.
    pub fn make(self, to: [u8; 6], from: [u8; 6], payload: usize, seed: u64) -> ([u8; 12], Vec<u8>) {
        let mut bytes = [to, from].concat();
        let len = self.headers() - self.transport() + payload;
        let protocol = if self.udp { 17 } else { 6 };
        if self.v6 {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, (len >> 8) as u8, len as u8, protocol, 64]);
            bytes.extend((0..32).map(|i| i + 1));
        } else {
            let total = len + 20;
            bytes.extend([8, 0, 0x45, 0, (total >> 8) as u8, total as u8, 0, 7, 0x40, 0, 64, protocol, 0, 0]);
            bytes.extend([10, 0, 0, 1, 10, 0, 0, 2]);
            let header = !(sum(&bytes[14..34]) as u16);
            bytes[24..26].copy_from_slice(&header.to_be_bytes());
        }
        bytes.extend([0x9c, 0x40, 0, 53]);
        if self.udp {
            bytes.extend([(len >> 8) as u8, len as u8, 0, 0]);
        } else {
            bytes.extend([0, 0, 0, 0, 0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
        }
        let offset = if self.udp { 6 } else { 16 };
        let pseudo = self.pseudo(&bytes, len) as u16;
        bytes[self.transport() + offset..][..2].copy_from_slice(&pseudo.to_be_bytes());
        bytes.extend(&frame(to, from, 14 + payload, seed)[14..]);
        let kind = match (self.udp, self.v6) {
            (true, _) => GSO_UDP_L4,
            (_, false) => GSO_TCPV4,
            (_, true) => GSO_TCPV6,
        };
        let [size, start] = [SEGMENT as u16, self.transport() as u16].map(u16::to_le_bytes);
        let header = [1, kind, 0, 0, size[0], size[1], start[0], start[1], offset as u8, 0, 0, 0];
        (header, bytes)
    }

    /// Checks a complete frame and returns its payload.
    pub fn payload(self, bytes: &[u8]) -> &[u8] {
        let len = bytes.len() - self.transport();
        let written = |at: usize| usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
        if self.v6 {
            assert_eq!(written(18), len);
        } else {
            assert_eq!((written(16), sum(&bytes[14..34])), (len + 20, 0xffff), "IPv4 header of {self:?}");
        }
        if self.udp {
            assert_eq!(written(38 + if self.v6 { 20 } else { 0 }), len);
        }
        let whole = sum(&bytes[self.transport()..]) + self.pseudo(bytes, len);
        assert_eq!((whole & 0xffff) + (whole >> 16), 0xffff, "checksum of {self:?}");
        &bytes[self.headers()..]
    }

    /// The same as the frames that a sender makes who cannot segment, and completes checksums or leaves them out.
    pub fn segments(
        self,
        to: [u8; 6],
        from: [u8; 6],
        payload: usize,
        seed: u64,
        partial: bool,
    ) -> Vec<([u8; 12], Vec<u8>)> {
        let (header, whole) = self.make(to, from, payload, seed);
        let mut sequence = 1u32;
        let cut = |chunk: &[u8]| {
            let (mut header, mut bytes) = (header, self.make(to, from, chunk.len(), 0).1);
            bytes.truncate(self.headers());
            bytes.extend(chunk);
            // ACK alone: PSH would end what a receiver merges.
            bytes[self.transport() + 13] = 0x10;
            bytes[self.transport() + 4..][..4].copy_from_slice(&sequence.to_be_bytes());
            sequence += chunk.len() as u32;
            header[1..6].fill(0);
            if !partial {
                header = [0; 12];
                let sum = !(sum(&bytes[self.transport()..]) as u16);
                bytes[self.transport() + 16..][..2].copy_from_slice(&sum.to_be_bytes());
            }
            (header, bytes)
        };
        whole[self.headers()..].chunks(SEGMENT).map(cut).collect()
    }
}
