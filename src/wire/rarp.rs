//! Reverse ARP (RFC 903) as hypervisors use it: the frame that tells every switch where a station is now, [`announce`].
//!
//! After a migration the guest itself stays silent until it has something to send. A broadcast from its address, which
//! no station answers, makes all bridges on the way learn its new place. QEMU sends the very same frame
//! (net/announce.c, `announce_self_create`).

use crate::ident::MacAddr;
use crate::wire::ethernet::{self, EtherType};

/// Bytes of an announcement: the shortest frame of IEEE 802.3, without FCS.
pub const ANNOUNCE_BYTES: usize = 60;

/// The request of a station that asks for its own protocol address (RFC 903, "request reverse").
const REQUEST_REVERSE: u16 = 3;

/// A broadcast from `mac` that asks for the protocol address of `mac`, padded to the shortest frame.
pub fn announce(mac: MacAddr) -> [u8; ANNOUNCE_BYTES] {
    let mut frame = [0; ANNOUNCE_BYTES];
    frame[ethernet::DESTINATION].copy_from_slice(&MacAddr::BROADCAST.0);
    frame[ethernet::SOURCE].copy_from_slice(&mac.0);
    frame[ethernet::TYPE].copy_from_slice(&EtherType::RARP.0.to_be_bytes());
    // RFC 826, "Packet format": both address spaces with their lengths, opcode, then sender and target. The protocol
    // addresses stay zero: they are what is being asked for.
    frame[14..16].copy_from_slice(&1u16.to_be_bytes());
    frame[16..18].copy_from_slice(&EtherType::IPV4.0.to_be_bytes());
    frame[18..20].copy_from_slice(&[6, 4]);
    frame[20..22].copy_from_slice(&REQUEST_REVERSE.to_be_bytes());
    frame[22..28].copy_from_slice(&mac.0);
    frame[32..38].copy_from_slice(&mac.0);
    frame
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::wire::ethernet::Ethernet;

    #[test]
    fn an_announcement_is_a_reverse_request_by_the_station_itself() {
        let mac: MacAddr = "52:54:00:12:34:56".parse().unwrap();
        let bytes = announce(mac);
        let frame = Ethernet::parse(&bytes).unwrap();
        assert_eq!((frame.destination(), frame.source()), (MacAddr::BROADCAST, mac));
        assert_eq!((frame.ether_type(), frame.tag_count()), (EtherType::RARP, 0));
        let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 3];
        arp.extend(mac.0.iter().chain(&[0; 4]).chain(&mac.0).chain(&[0; 4]));
        assert_eq!(frame.payload()[..28], arp);
        assert!(frame.payload()[28..].iter().all(|&byte| byte == 0));
    }
}
