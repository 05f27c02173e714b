//! Ethernet frames (IEEE 802.3, 3.1) with up to two VLAN tags (IEEE 802.1Q, 9.3): [`Ethernet`].
//!
//! Addresses, tags and the EtherType behind them; what follows is the payload and not looked at here. A third tag is
//! not parsed: it shows as the EtherType, which nothing in this switch gives a meaning, so the frame travels as it is.

use std::ops::Range;

use crate::ident::MacAddr;

/// Bytes of an untagged header: two addresses and the EtherType.
pub const HEADER_BYTES: usize = 14;

/// Bytes of one tag: tag protocol identifier and tag control information.
pub const TAG_BYTES: usize = 4;

/// Most tags a frame is parsed for: a service tag and a customer tag (IEEE 802.1Q, 9.5).
pub const TAGS: usize = 2;

/// The destination address (IEEE 802.3, 3.2.4).
pub const DESTINATION: Range<usize> = 0..6;

/// The source address (IEEE 802.3, 3.2.5).
pub const SOURCE: Range<usize> = 6..12;

/// The EtherType, or the first tag's protocol identifier (IEEE 802.3, 3.2.6).
pub const TYPE: Range<usize> = 12..14;

/// Why bytes are not an Ethernet frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EthernetError {
    /// The bytes end before the header does.
    #[error("{have} bytes of a frame whose Ethernet header has at least {need}")]
    Truncated {
        /// Bytes there are.
        have: usize,
        /// Bytes the header has, as far as it could be read.
        need: usize,
    },
}

/// What a frame's payload is, or that a tag comes first: the two bytes as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EtherType(pub u16);

impl EtherType {
    /// IPv4 (RFC 894).
    pub const IPV4: Self = Self(0x0800);
    /// ARP (RFC 826).
    pub const ARP: Self = Self(0x0806);
    /// Reverse ARP (RFC 903).
    pub const RARP: Self = Self(0x8035);
    /// IPv6 (RFC 2464, 3).
    pub const IPV6: Self = Self(0x86dd);
    /// A customer VLAN tag (IEEE 802.1Q, table 9-1).
    pub const C_TAG: Self = Self(0x8100);
    /// A service VLAN tag (IEEE 802.1Q, table 9-1; formerly 802.1ad).
    pub const S_TAG: Self = Self(0x88a8);

    /// Whether this announces a VLAN tag rather than a payload.
    #[inline]
    pub fn is_tag(self) -> bool {
        matches!(self, Self::C_TAG | Self::S_TAG)
    }
}

/// One VLAN tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    /// [`EtherType::C_TAG`] or [`EtherType::S_TAG`].
    pub protocol: EtherType,
    /// Tag control information: priority, drop eligibility, VLAN id (IEEE 802.1Q, 9.6).
    pub control: u16,
}

impl Tag {
    /// The VLAN id, 0 to 4095; 0 says that only the priority matters (IEEE 802.1Q, table 9-2).
    pub fn vlan(self) -> u16 {
        self.control & 0x0fff
    }

    /// The priority code point, 0 to 7.
    pub fn priority(self) -> u8 {
        (self.control >> 13) as u8
    }

    /// The drop eligible indicator.
    pub fn drop_eligible(self) -> bool {
        self.control & 0x1000 != 0
    }
}

/// A frame, or as much of its beginning as was copied, with a whole Ethernet header.
#[derive(Debug, Clone, Copy)]
pub struct Ethernet<'a> {
    bytes: &'a [u8],
    tags: usize,
}

impl<'a> Ethernet<'a> {
    /// Reads addresses, tags and EtherType at the beginning of `bytes`.
    ///
    /// # Errors
    /// [`EthernetError::Truncated`] if `bytes` ends within them.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Result<Self, EthernetError> {
        let mut tags = 0;
        loop {
            let need = HEADER_BYTES + TAG_BYTES * tags;
            if bytes.len() < need {
                return Err(EthernetError::Truncated { have: bytes.len(), need });
            }
            let view = Self { bytes, tags };
            if tags == TAGS || !view.ether_type().is_tag() {
                return Ok(view);
            }
            tags += 1;
        }
    }

    /// The destination address.
    #[inline]
    pub fn destination(&self) -> MacAddr {
        MacAddr(self.field(DESTINATION.start))
    }

    /// The source address.
    #[inline]
    pub fn source(&self) -> MacAddr {
        MacAddr(self.field(SOURCE.start))
    }

    /// How many tags there are, at most [`TAGS`].
    #[inline]
    pub fn tag_count(&self) -> usize {
        self.tags
    }

    /// The tags, outermost first.
    pub fn tags(&self) -> impl Iterator<Item = Tag> + '_ {
        (0..self.tags).map(|index| {
            let at = TYPE.start + TAG_BYTES * index;
            Tag { protocol: EtherType(self.number(at)), control: self.number(at + 2) }
        })
    }

    /// What the payload is: the EtherType behind the tags.
    #[inline]
    pub fn ether_type(&self) -> EtherType {
        EtherType(self.number(TYPE.start + TAG_BYTES * self.tags))
    }

    /// Bytes of the header with its tags.
    #[inline]
    pub fn header_len(&self) -> usize {
        HEADER_BYTES + TAG_BYTES * self.tags
    }

    /// What follows the header.
    pub fn payload(&self) -> &'a [u8] {
        self.bytes.get(self.header_len()..).unwrap_or(&[])
    }

    /// The 16-bit number at `at`, which the constructor has found to be there.
    #[inline]
    fn number(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.field(at))
    }

    /// The `N` bytes at `at`. Zeros stand for bytes beyond the end, which the constructor has ruled out.
    #[inline]
    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        self.bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const DOUBLE_TAGGED: [u8; 24] = [
        0x33, 0x33, 0, 0, 0, 1, 0x52, 0x54, 0, 1, 2, 3, 0x88, 0xa8, 0x30, 0x64, 0x81, 0x00, 0xe0, 0x0a, 0x86, 0xdd,
        0x60, 0,
    ];

    #[test]
    fn a_double_tagged_frame_shows_its_fields() {
        let frame = Ethernet::parse(&DOUBLE_TAGGED).unwrap();
        assert_eq!(frame.destination().to_string(), "33:33:00:00:00:01");
        assert_eq!(frame.source().to_string(), "52:54:00:01:02:03");
        let tags: Vec<Tag> = frame.tags().collect();
        assert_eq!((tags[0].protocol, tags[0].vlan(), tags[0].priority()), (EtherType::S_TAG, 100, 1));
        assert!(tags[0].drop_eligible() && !tags[1].drop_eligible());
        assert_eq!((tags[1].protocol, tags[1].vlan(), tags[1].priority()), (EtherType::C_TAG, 10, 7));
        assert_eq!((frame.ether_type(), frame.header_len(), frame.payload()), (EtherType::IPV6, 22, &[0x60, 0][..]));
    }

    #[test]
    fn a_third_tag_is_the_ether_type() {
        let mut bytes = DOUBLE_TAGGED;
        bytes[20..22].copy_from_slice(&[0x81, 0x00]);
        let frame = Ethernet::parse(&bytes).unwrap();
        assert_eq!((frame.tag_count(), frame.ether_type()), (2, EtherType::C_TAG));
    }

    #[test]
    fn a_header_cut_anywhere_is_refused_with_its_numbers() {
        for have in 0..22 {
            let need = [14, 18, 22].into_iter().find(|need| have < *need).unwrap();
            assert_eq!(
                Ethernet::parse(&DOUBLE_TAGGED[..have]).unwrap_err(),
                EthernetError::Truncated { have, need },
                "{have} bytes"
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_are_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..64), tags in 0..4usize) {
            for at in (0..tags).map(|tag| 12 + 4 * tag).filter(|at| at + 2 <= bytes.len()).collect::<Vec<_>>() {
                bytes[at..at + 2].copy_from_slice(&[0x81, 0x00]);
            }
            match Ethernet::parse(&bytes) {
                Ok(frame) => {
                    prop_assert!(frame.tag_count() >= tags.min(TAGS));
                    prop_assert_eq!(frame.tags().count(), frame.tag_count());
                    prop_assert_eq!(frame.header_len() + frame.payload().len(), bytes.len());
                    prop_assert!(frame.tag_count() == TAGS || !frame.ether_type().is_tag());
                    prop_assert_eq!(&frame.destination().0[..], &bytes[DESTINATION]);
                    prop_assert_eq!(&frame.source().0[..], &bytes[SOURCE]);
                }
                Err(EthernetError::Truncated { have, need }) => prop_assert!(have == bytes.len() && have < need),
            }
        }
    }
}
