//! Which flow a frame belongs to, as a number that is the same for both directions: [`flow_hash`].
//!
//! A flow is the pair of endpoints of TCP, UDP or SCTP over IP, the pair of IP addresses of anything else over IP and of
//! every fragment (only the first has ports, and fragments of one packet must stay together), and the pair of MAC
//! addresses of the rest. Both endpoints are mixed alike and added, which is what makes the directions equal; mixing is
//! one wide multiplication each, whose halves are folded (2 ns for a frame in all).
//!
//! What is mixed in is secret ([`FlowKey`]), so nobody can look for flows of which the hash is what he wants. It is no cipher:
//! who can watch where many of his own flows go learns something of it.

use crate::wire::ethernet::{DESTINATION, EtherType, Ethernet, SOURCE};

/// Protocol numbers with ports at the beginning of their headers (IANA, "Protocol Numbers").
const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

/// More fragments, and the fragment offset, of IPv4's third word (RFC 791, 3.1).
const FRAGMENT: u16 = 0x3fff;

/// Random numbers that nobody else knows, on which all hashes depend.
#[derive(Debug, Clone, Copy)]
pub struct FlowKey {
    endpoints: Mix,
    whole: Mix,
}

impl FlowKey {
    /// A key of these numbers.
    pub const fn new([a, b, c, d]: [u64; 4]) -> Self {
        Self { endpoints: Mix::new(a, b), whole: Mix::new(c, d) }
    }
}

/// The flow's hash, from the first bytes of a frame: as much as there is of Ethernet, IP and the ports. 62 bytes are
/// enough for all but IP options and extension headers, behind which ports are not looked for.
#[inline]
pub fn flow_hash(key: &FlowKey, frame: &[u8]) -> u32 {
    let (a, b, protocol) = endpoints(key.endpoints, frame).unwrap_or((0, 0, 0));
    let sum = key.endpoints.mix(a).wrapping_add(key.endpoints.mix(b));
    let hash = key.whole.mix(sum ^ u64::from(protocol));
    (hash ^ hash >> 32) as u32
}

/// Both endpoints and the protocol; `None` for what is no Ethernet frame.
#[inline]
fn endpoints(mix: Mix, frame: &[u8]) -> Option<(u64, u64, u8)> {
    let ethernet = Ethernet::parse(frame).ok()?;
    let packet = ethernet.payload();
    let flow = match ethernet.ether_type() {
        EtherType::IPV4 => ipv4(packet),
        EtherType::IPV6 => ipv6(mix, packet),
        _ => None,
    };
    flow.or_else(|| Some((address(frame.get(SOURCE)?), address(frame.get(DESTINATION)?), 0)))
}

/// RFC 791, 3.1.
#[inline]
fn ipv4(packet: &[u8]) -> Option<(u64, u64, u8)> {
    let header: &[u8; 20] = packet.first_chunk()?;
    let protocol = header[9];
    let whole = u16::from_be_bytes([header[6], header[7]]) & FRAGMENT == 0;
    let length = usize::from(header[0] & 0x0f) * 4;
    let (source, destination) = if whole { ports(protocol, packet.get(length..)) } else { (0, 0) };
    Some((address(&header[12..16]) << 16 | source, address(&header[16..20]) << 16 | destination, protocol))
}

/// RFC 8200, 3.
#[inline]
fn ipv6(mix: Mix, packet: &[u8]) -> Option<(u64, u64, u8)> {
    let header: &[u8; 40] = packet.first_chunk()?;
    let protocol = header[6];
    let (source, destination) = ports(protocol, packet.get(40..));
    let folded = |at: usize| mix.mix(address(&header[at..at + 8])) ^ address(&header[at + 8..at + 16]);
    Some((folded(8).wrapping_add(source), folded(24).wrapping_add(destination), protocol))
}

/// Source and destination port of a segment whose protocol has them.
#[inline]
fn ports(protocol: u8, segment: Option<&[u8]>) -> (u64, u64) {
    match (protocol, segment.and_then(|segment| segment.first_chunk::<4>())) {
        (TCP | UDP | SCTP, Some(&[a, b, c, d])) => {
            (u64::from(u16::from_be_bytes([a, b])), u64::from(u16::from_be_bytes([c, d])))
        }
        _ => (0, 0),
    }
}

/// Up to eight bytes as a number.
#[inline]
fn address(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Spreads every bit of a number over all of the result.
#[derive(Debug, Clone, Copy)]
struct Mix {
    mask: u64,
    factor: u64,
}

impl Mix {
    const fn new(mask: u64, factor: u64) -> Self {
        // Odd, so that no two numbers have one product, and large, so that low bits reach the upper half.
        Self { mask, factor: factor | 1 << 63 | 1 }
    }

    #[inline]
    fn mix(self, x: u64) -> u64 {
        let wide = u128::from(x ^ self.mask) * u128::from(self.factor);
        wide as u64 ^ (wide >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    /// A frame with these endpoints, `tags` VLAN tags and, for IPv4, this fragment field.
    fn frame(v6: bool, tags: usize, protocol: u8, fragment: u16, a: ([u8; 16], u16), b: ([u8; 16], u16)) -> Vec<u8> {
        let mut bytes = [[2, 0, 0, 0, 0, b.0[0]], [2, 0, 0, 0, 0, a.0[0]]].concat();
        for _ in 0..tags {
            bytes.extend([0x81, 0, 0, 7]);
        }
        if v6 {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, protocol, 64]);
            bytes.extend([a.0, b.0].concat());
        } else {
            bytes.extend([0x08, 0, 0x45, 0, 0, 28, 0, 1]);
            bytes.extend(fragment.to_be_bytes());
            bytes.extend([64, protocol, 0, 0]);
            bytes.extend([&a.0[..4], &b.0[..4]].concat());
        }
        bytes.extend([a.1.to_be_bytes(), b.1.to_be_bytes()].concat());
        bytes.extend([0; 4]);
        bytes
    }

    /// Numbers without pattern (of SplitMix64), the same in every run.
    fn key(seed: u64) -> FlowKey {
        FlowKey::new([0, 1, 2, 3].map(|at| {
            let mut z = (4 * seed + at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        }))
    }

    /// Digits of pi.
    const KEY: FlowKey =
        FlowKey::new([0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0, 0x082e_fa98_ec4e_6c89]);

    proptest! {
        #[test]
        fn both_directions_are_one_flow(
            key: [u64; 4],
            v6: bool,
            tags in 0usize..3,
            protocol in prop_oneof![Just(TCP), Just(UDP), Just(SCTP), any::<u8>()],
            fragment in prop_oneof![Just(0u16), Just(0x4000), any::<u16>()],
            a: ([u8; 16], u16),
            b: ([u8; 16], u16),
        ) {
            let key = FlowKey::new(key);
            let (there, back) = (frame(v6, tags, protocol, fragment, a, b), frame(v6, tags, protocol, fragment, b, a));
            prop_assert_eq!(flow_hash(&key, &there), flow_hash(&key, &back));
        }

        #[test]
        fn no_bytes_are_too_odd(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            flow_hash(&KEY, &bytes);
            for kind in [[0x08, 0x00], [0x86, 0xdd]] {
                let mut bytes = bytes.clone();
                if let Some(place) = bytes.get_mut(12..14) {
                    place.copy_from_slice(&kind);
                }
                flow_hash(&KEY, &bytes);
            }
        }
    }

    #[test]
    fn flows_spread_evenly_over_queues_and_places() {
        let keys: Vec<_> = (0..32).map(key).collect();
        for (v6, key) in [false, true].into_iter().flat_map(|v6| keys.iter().map(move |key| (v6, key))) {
            let (mut queues, mut places) = ([0u32; 8], [0u32; 64]);
            for port in 0..4096 {
                let bytes = frame(v6, 0, TCP, 0, ([10; 16], 1024 + port), ([11; 16], 443));
                let hash = flow_hash(key, &bytes) as usize;
                queues[hash % 8] += 1;
                places[(hash >> 12) % 64] += 1;
            }
            assert!(queues.iter().all(|count| (400..=625).contains(count)), "{queues:?} of 512 each, {key:?}");
            assert!(places.iter().all(|count| (25..=110).contains(count)), "{places:?} of 64 each, {key:?}");
        }
    }

    #[test]
    fn flows_that_share_a_place_do_not_with_another_key() {
        let flows = (0..60_000u16).map(|port| frame(false, 0, UDP, 0, ([10; 16], port), ([11; 16], 53)));
        let place = |key, flow: &[u8]| flow_hash(key, flow) >> 12 & 0xfff;
        let chosen: Vec<_> = flows.filter(|flow| place(&KEY, flow) == 7).collect();
        assert!(chosen.len() > 5);
        let other = key(1);
        let first = place(&other, &chosen[0]);
        assert!(chosen.iter().filter(|flow| place(&other, flow) == first).count() < 3);
    }

    #[test]
    fn fragments_of_a_packet_stay_together_and_other_protocols_have_no_ports() {
        let (a, b) = (([1; 16], 5000), ([2; 16], 53));
        let first = flow_hash(&KEY, &frame(false, 0, UDP, 0x2000, a, b));
        let second = flow_hash(&KEY, &frame(false, 0, UDP, 0x0172, ([1; 16], 9), ([2; 16], 9)));
        assert_eq!(first, second);
        assert_ne!(first, flow_hash(&KEY, &frame(false, 0, UDP, 0, a, b)));
        let icmp = |a, b| flow_hash(&KEY, &frame(false, 0, 1, 0, a, b));
        assert_eq!(icmp(a, b), icmp(([1; 16], 1), ([2; 16], 2)));
    }
}
