//! What goes over the wire: station addresses, frame sizes, and UDP frames made once.

use std::fmt;
use std::str::FromStr;

/// Bytes of the virtio-net header before each frame (virtio 1.3, 5.1.6, VERSION_1).
pub const HEADER: usize = 12;
/// Ethernet, IPv4 and UDP headers.
pub const HEADERS: usize = 42;
/// The simple IMIX: seven small, four middling, one full frame, dealt so that each dozen is mixed evenly.
const IMIX: [usize; 12] = [64, 594, 64, 64, 594, 64, 1518, 64, 594, 64, 594, 64];

/// Lengths of frames, as `64` or `imix`; without FCS, as virtio has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sizes {
    /// All the same.
    Fixed(usize),
    /// 7:4:1 of 64, 594 and 1518 bytes.
    Imix,
}

impl Sizes {
    /// The length of the `nth` frame.
    pub fn of(self, nth: usize) -> usize {
        match self {
            Self::Fixed(len) => len,
            Self::Imix => IMIX[nth % IMIX.len()],
        }
    }

    /// The longest.
    pub fn longest(self) -> usize {
        match self {
            Self::Fixed(len) => len,
            Self::Imix => 1518,
        }
    }

    /// Their mean, in bytes.
    pub fn mean(self) -> f64 {
        match self {
            Self::Fixed(len) => len as f64,
            Self::Imix => IMIX.iter().sum::<usize>() as f64 / IMIX.len() as f64,
        }
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(len) => write!(f, "{len}"),
            Self::Imix => f.write_str("imix"),
        }
    }
}

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(len) if (60..=9014).contains(&len) => Ok(Self::Fixed(len)),
            _ if text == "imix" => Ok(Self::Imix),
            _ => Err("frame sizes are 60 to 9014, or imix".into()),
        }
    }
}

/// The address of a port's `station`th station: locally administered, the port's number, and the station's number
/// scattered over the last three bytes, because no site's addresses come in a row.
pub fn mac(port: usize, station: u32) -> [u8; 6] {
    let port = (port as u16).to_be_bytes();
    // Odd, so every number below 2^24 is met once.
    let scattered = station.wrapping_mul(0x9e_3779) & 0xff_ffff;
    let [_, a, b, c] = scattered.to_be_bytes();
    [0x02, port[0], port[1], a, b, c]
}

/// A UDP frame of `len` bytes; `flow` picks its ports, and so the queue where a switch spreads by flow.
pub fn udp(destination: [u8; 6], source: [u8; 6], flow: u16, len: usize) -> Vec<u8> {
    let mut frame = vec![0; len.max(HEADERS)];
    frame[..6].copy_from_slice(&destination);
    frame[6..12].copy_from_slice(&source);
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    let ip = (frame.len() - 14) as u16;
    frame[14..16].copy_from_slice(&[0x45, 0]);
    frame[16..18].copy_from_slice(&ip.to_be_bytes());
    frame[22..24].copy_from_slice(&[64, 17]);
    frame[26..30].copy_from_slice(&[198, 18, source[1], source[2]]);
    frame[30..34].copy_from_slice(&[198, 18, destination[1], destination[2]]);
    let sum = ip_checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame[34..36].copy_from_slice(&(1024 + flow).to_be_bytes());
    frame[36..38].copy_from_slice(&9u16.to_be_bytes());
    // A UDP checksum of zero says that there is none (RFC 768), so a payload may change without it.
    frame[38..40].copy_from_slice(&(ip - 20).to_be_bytes());
    frame
}

/// RFC 1071 over a header whose checksum field is zero.
fn ip_checksum(header: &[u8]) -> u16 {
    let words = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn imix_is_seven_four_one() {
        let count = |len| (0..12).filter(|&nth| Sizes::Imix.of(nth) == len).count();
        assert_eq!([count(64), count(594), count(1518)], [7, 4, 1]);
        assert_eq!(Sizes::Imix.mean(), (7.0 * 64.0 + 4.0 * 594.0 + 1518.0) / 12.0);
    }

    #[test]
    fn stations_have_addresses_of_their_own() {
        let all: HashSet<_> = (0..2).flat_map(|port| (0..100_000).map(move |station| mac(port, station))).collect();
        assert_eq!(all.len(), 200_000);
        assert!(all.iter().all(|mac| mac[0] & 3 == 2), "individual and locally administered");
    }

    #[test]
    fn the_ip_header_is_whole() {
        let frame = udp([2, 0, 0, 0, 0, 1], [2, 0, 1, 0, 0, 2], 3, 64);
        assert_eq!(frame.len(), 64);
        let words = frame[14..34].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
        let sum: u32 = words.sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }
}
