//! IPv4 (RFC 791) and IPv6 (RFC 8200) headers as far as offloads need them: which transport header follows, and where.
//!
//! The walk over options and extension headers ends with the bytes it is given, because each step takes at least eight
//! of them. Bytes that end too early are told apart from headers that cannot be, so that a caller who has only the first
//! bytes of a frame can come back with more.

/// IPv4's total length, identification, fragmentation, protocol, header checksum, from the header's first byte.
pub const V4_TOTAL_LENGTH: usize = 2;
/// See [`V4_TOTAL_LENGTH`].
pub const V4_IDENTIFICATION: usize = 4;
/// See [`V4_TOTAL_LENGTH`].
pub const V4_FRAGMENT: usize = 6;
/// See [`V4_TOTAL_LENGTH`].
pub const V4_PROTOCOL: usize = 9;
/// See [`V4_TOTAL_LENGTH`].
pub const V4_CHECKSUM: usize = 10;
/// Bytes of IPv4's header without options.
pub const V4_BYTES: usize = 20;

/// IPv6's payload length and next header, from the header's first byte.
pub const V6_PAYLOAD_LENGTH: usize = 4;
/// See [`V6_PAYLOAD_LENGTH`].
pub const V6_NEXT_HEADER: usize = 6;
/// Extension headers (RFC 8200, 4.1). Authentication is not among them: what it signs must not be taken apart.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
/// Bytes of IPv6's own header: what its payload length does not count.
pub const V6_BYTES: usize = 40;

/// TCP (RFC 9293).
pub const TCP: u8 = 6;
/// UDP (RFC 768).
pub const UDP: u8 = 17;

/// Which IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// The header after IP's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transport {
    /// Its protocol number.
    pub protocol: u8,
    /// Where it begins.
    pub at: usize,
}

/// Why the transport header was not found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IpError {
    /// The bytes end before it begins.
    #[error("the bytes end within the IP headers")]
    Truncated,
    /// The header's version or length field is wrong, so whatever follows is not known.
    #[error("the IP header contradicts itself")]
    Malformed,
    /// The packet is a fragment: it has no transport header, or not all of what follows it.
    #[error("the packet is a fragment")]
    Fragment,
}

/// Whether an IPv6 header of this protocol number stands between IPv6's own and the transport's, or can.
pub const fn is_extension(protocol: u8) -> bool {
    matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS)
}

/// Finds the transport header of the packet whose IP header begins at `at`.
///
/// # Errors
/// [`IpError`].
pub fn transport(bytes: &[u8], at: usize, version: Version) -> Result<Transport, IpError> {
    match version {
        Version::V4 => transport_v4(bytes, at),
        Version::V6 => transport_v6(bytes, at),
    }
}

fn transport_v4(bytes: &[u8], at: usize) -> Result<Transport, IpError> {
    let header: &[u8; V4_BYTES] = chunk(bytes, at)?;
    let len = usize::from(header[0] & 15) * 4;
    if header[0] >> 4 != 4 || len < V4_BYTES {
        return Err(IpError::Malformed);
    }
    // All but "don't fragment" and the reserved bit: more fragments, and the offset (RFC 791, 3.1).
    if u16::from_be_bytes([header[V4_FRAGMENT], header[V4_FRAGMENT + 1]]) & 0x3fff != 0 {
        return Err(IpError::Fragment);
    }
    Ok(Transport { protocol: header[V4_PROTOCOL], at: at + len })
}

fn transport_v6(bytes: &[u8], at: usize) -> Result<Transport, IpError> {
    let header: &[u8; V6_BYTES] = chunk(bytes, at)?;
    if header[0] >> 4 != 6 {
        return Err(IpError::Malformed);
    }
    let mut next = Transport { protocol: header[V6_NEXT_HEADER], at: at + V6_BYTES };
    loop {
        match next.protocol {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                let [protocol, len] = *chunk(bytes, next.at)?;
                next = Transport { protocol, at: next.at + 8 + 8 * usize::from(len) };
            }
            FRAGMENT => return Err(IpError::Fragment),
            _ => return Ok(next),
        }
    }
}

/// The `N` bytes at `at`.
fn chunk<const N: usize>(bytes: &[u8], at: usize) -> Result<&[u8; N], IpError> {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(IpError::Truncated)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(first: u8, fragment: u16, protocol: u8) -> Vec<u8> {
        let mut bytes = vec![0xee; 14];
        bytes.extend([first, 0, 0, 40, 0, 0]);
        bytes.extend(fragment.to_be_bytes());
        bytes.extend([64, protocol]);
        bytes.resize(14 + 20, 0);
        bytes
    }

    fn v6(chain: &[(u8, u8)], last: u8) -> Vec<u8> {
        let mut bytes = vec![0x60; 40];
        bytes[6] = chain.first().map_or(last, |header| header.0);
        for (index, &(_, len)) in chain.iter().enumerate() {
            let next = chain.get(index + 1).map_or(last, |header| header.0);
            let start = bytes.len();
            bytes.extend([next, len]);
            bytes.resize(start + 8 + 8 * usize::from(len), 0);
        }
        bytes
    }

    #[test]
    fn ipv4_with_and_without_options() {
        let found = |bytes: &[u8]| transport(bytes, 14, Version::V4);
        assert_eq!(found(&v4(0x45, 0x4000, TCP)), Ok(Transport { protocol: TCP, at: 34 }));
        assert_eq!(found(&v4(0x4f, 0, UDP)), Ok(Transport { protocol: UDP, at: 74 }));
        for (first, fragment, error) in [
            (0x65, 0, IpError::Malformed),
            (0x44, 0, IpError::Malformed),
            (0x45, 0x2000, IpError::Fragment),
            (0x45, 1, IpError::Fragment),
        ] {
            assert_eq!(found(&v4(first, fragment, TCP)), Err(error), "{first:x} {fragment:x}");
        }
        assert_eq!(found(&v4(0x45, 0, TCP)[..33]), Err(IpError::Truncated));
    }

    #[test]
    fn ipv6_through_its_extension_headers() {
        let found = |bytes: &[u8]| transport(bytes, 0, Version::V6);
        assert_eq!(found(&v6(&[], UDP)), Ok(Transport { protocol: UDP, at: 40 }));
        let long = v6(&[(0, 0), (43, 2), (60, 1)], TCP);
        assert_eq!(found(&long), Ok(Transport { protocol: TCP, at: 40 + 8 + 24 + 16 }));
        for cut in 0..74 {
            assert_eq!(found(&long[..cut]), Err(IpError::Truncated), "{cut}");
        }
        assert_eq!(found(&v6(&[(44, 0)], TCP)), Err(IpError::Fragment));
        assert_eq!(found(&v6(&[(51, 0)], TCP)).map(|next| next.protocol), Ok(51), "not looked into");
        assert_eq!(found(&[0x45; 40]), Err(IpError::Malformed));
    }

    #[test]
    fn extension_headers_that_go_on_and_on_end_with_the_bytes() {
        let mut endless = vec![0; 256];
        endless[0] = 0x60;
        assert_eq!(transport(&endless, 0, Version::V6), Err(IpError::Truncated));
    }
}
