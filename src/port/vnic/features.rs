//! What a vNIC offers to its front end: virtio feature bits and vhost-user protocol features, each with its reason.
//!
//! Both sets are part of a port's contract: QEMU refuses a backend that lost a bit on reconnect, and a migration needs at
//! least the same set on the other host. So what is offered depends on the port's `compat` and on nothing that happens at run
//! time: each [`Compat`] is a set that does not change any more. A feature that comes later goes into a new one.

use crate::frame::Needs;
use crate::ident::Compat;

/// One feature bit.
#[derive(Debug)]
pub(super) struct Feature {
    /// Number of the bit.
    pub(super) bit: u32,
    /// Its name, as the specification has it without the prefix.
    pub(super) name: &'static str,
    /// Why it is offered.
    #[cfg_attr(not(test), expect(dead_code, reason = "the table is documentation as well"))]
    pub(super) why: &'static str,
}

const fn feature(bit: u32, name: &'static str, why: &'static str) -> Feature {
    Feature { bit, name, why }
}

/// vhost-user, "Feature bits": the front end knows protocol features, and rings start disabled.
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// virtio 1.3, 2.8: packed rings.
pub(super) const F_RING_PACKED: u64 = 1 << 34;

/// vhost, VHOST_F_LOG_ALL: note every write in the dirty log. Not a virtio feature, so it may change while rings run.
pub(super) const F_LOG_ALL: u64 = 1 << 26;

/// Virtio bits that are offered (virtio 1.3, 5.1.3 and 6).
pub(super) const VIRTIO: &[Feature] = &[
    feature(0, "CSUM", "the guest leaves checksums to us; between guests nobody computes them"),
    feature(1, "GUEST_CSUM", "the guest takes frames whose checksum another guest left out"),
    feature(3, "MTU", "the guest takes over the MTU that its VM was configured with"),
    feature(7, "GUEST_TSO4", "the guest takes 64 KiB of TCP over IPv4 in one frame"),
    feature(8, "GUEST_TSO6", "the same over IPv6"),
    feature(9, "GUEST_ECN", "the same when the first segment reduces the congestion window"),
    feature(11, "HOST_TSO4", "the guest sends 64 KiB of TCP over IPv4 in one frame: a fortieth of the work per byte"),
    feature(12, "HOST_TSO6", "the same over IPv6"),
    feature(13, "HOST_ECN", "the same when the first segment reduces the congestion window"),
    feature(15, "MRG_RXBUF", "a long frame may fill several small buffers, so guests need not post 64 KiB ones"),
    feature(17, "CTRL_VQ", "cloud-hypervisor gives its guest a control queue only if we offer it; QEMU ignores it"),
    feature(21, "GUEST_ANNOUNCE", "after a migration the guest announces itself; without it QEMU sends SEND_RARP"),
    feature(22, "MQ", "several queue pairs"),
    feature(26, "LOG_ALL", "the VM can be migrated: set while it is, it never reaches the guest"),
    feature(27, "ANY_LAYOUT", "legacy drivers may lay out header and frame as they like; we handle any layout anyway"),
    feature(28, "INDIRECT_DESC", "a chain takes one ring entry"),
    feature(29, "EVENT_IDX", "notifications by index, which is what makes few of them enough"),
    feature(30, "PROTOCOL_FEATURES", "the door to everything below"),
    feature(32, "VERSION_1", "modern devices"),
    feature(34, "RING_PACKED", "one ring of descriptors, which costs guest and switch fewer cache misses; of any size"),
    feature(
        35,
        "IN_ORDER",
        "DPDK asks for it by default, and with it a reconnect of cloud-hypervisor loses no buffers",
    ),
    feature(
        54,
        "GUEST_USO4",
        "the guest takes several UDP datagrams over IPv4 in one frame; QEMU does not pass it on yet",
    ),
    feature(55, "GUEST_USO6", "the same over IPv6"),
    feature(56, "HOST_USO", "the guest sends several UDP datagrams in one frame, over either"),
];

/// Protocol features that are offered (vhost-user, "Protocol features").
pub(super) const PROTOCOL: &[Feature] = &[
    feature(0, "MQ", "several queue pairs"),
    feature(1, "LOG_SHMFD", "the bitmap of pages that we have written, without which QEMU refuses to migrate"),
    feature(2, "RARP", "QEMU asks us to announce a migrated guest that cannot do it itself"),
    feature(3, "REPLY_ACK", "a refusal reaches the front end"),
    feature(4, "NET_MTU", "the front end tells the guest's MTU"),
    feature(15, "CONFIGURE_MEM_SLOTS", "memory is added and removed by the region, and more than 8 of them"),
];

/// vhost-user protocol feature REPLY_ACK.
pub(super) const PROTOCOL_REPLY_ACK: u64 = 1 << 3;

/// All bits of a table.
pub(super) const fn bits(table: &[Feature]) -> u64 {
    let (mut all, mut i) = (0, 0);
    while i < table.len() {
        all |= 1 << table[i].bit;
        i += 1;
    }
    all
}

/// The virtio bits that are offered under `compat`. Nothing else has a say in it.
pub(super) const fn offered(compat: Compat) -> u64 {
    match compat {
        Compat::V2026_11 => bits(VIRTIO),
        Compat::V2026_11NoOffload => bits(VIRTIO) & !OFFLOADS,
    }
}

/// The protocol features that are offered under `compat`.
pub(super) const fn offered_protocol(compat: Compat) -> u64 {
    match compat {
        Compat::V2026_11 | Compat::V2026_11NoOffload => bits(PROTOCOL),
    }
}

/// Names of the bits of `bits` that are in `table`.
pub(super) fn names(table: &'static [Feature], bits: u64) -> Vec<&'static str> {
    table.iter().filter(|feature| bits & 1 << feature.bit != 0).map(|feature| feature.name).collect()
}

/// Bytes of the virtio-net header before each frame once `acked` is negotiated: the form with `num_buffers` is used by
/// every modern device and by legacy ones that merge buffers (virtio 1.3, 5.1.6.1).
pub(super) const fn header_bytes(acked: u64) -> usize {
    if acked & (1 << 15 | 1 << 32 | F_RING_PACKED) != 0 { 12 } else { 10 }
}

/// Offloads that a guest can do when it receives, by feature bit (virtio 1.3, 5.1.3).
const GUEST_OFFLOADS: &[(u32, Needs)] =
    &[(1, Needs::CSUM), (7, Needs::TSO4), (8, Needs::TSO6), (9, Needs::ECN), (54, Needs::USO4), (55, Needs::USO6)];

/// Offloads that a guest may leave to us when it sends.
const HOST_OFFLOADS: &[(u32, Needs)] =
    &[(0, Needs::CSUM), (11, Needs::TSO4), (12, Needs::TSO6), (13, Needs::ECN), (56, Needs::USO4.and(Needs::USO6))];

/// All bits of both.
const OFFLOADS: u64 = {
    let (mut all, mut i) = (0, 0);
    while i < GUEST_OFFLOADS.len() {
        all |= 1 << GUEST_OFFLOADS[i].0;
        i += 1;
    }
    let mut i = 0;
    while i < HOST_OFFLOADS.len() {
        all |= 1 << HOST_OFFLOADS[i].0;
        i += 1;
    }
    all
};

/// What of a table's offloads was acknowledged. All of them stand on the checksum (5.1.3.1): a driver that acknowledged
/// others without it has none.
fn offloads(table: &[(u32, Needs)], acked: u64) -> Needs {
    let all = table.iter().fold(Needs::NONE, |all, (bit, needs)| all.and(needs.when(acked & 1 << bit != 0)));
    all.when(Needs::CSUM.met_by(all))
}

/// What a guest that acknowledged `acked` can do when it receives. One that takes several TCP segments in one frame does not
/// see whether their sender had made one of them, or this switch.
pub(super) fn accepts(acked: u64) -> Needs {
    let accepts = offloads(GUEST_OFFLOADS, acked);
    accepts.and(Needs::MERGED.when(!accepts.within(Needs::TSO4.and(Needs::TSO6)).is_none()))
}

/// What a guest that acknowledged `acked` may leave to us when it sends.
pub(super) fn may(acked: u64) -> Needs {
    offloads(HOST_OFFLOADS, acked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_unique_and_explained_and_never_one_that_qemu_cannot_forward() {
        for table in [VIRTIO, PROTOCOL] {
            assert_eq!(bits(table).count_ones() as usize, table.len());
            assert!(table.iter().all(|feature| !feature.why.is_empty()));
        }
        // Frozen: a VM that was started against a set refuses a switch that lost one bit of it.
        let sets = [Compat::V2026_11, Compat::V2026_11NoOffload].map(|set| (offered(set), offered_protocol(set)));
        assert_eq!(sets, [(0x1c0_000d_7c62_bb8b, 0x801f), (0xd_7c62_8008, 0x801f)]);
        // NOTIFY_ON_EMPTY, NOTIFICATION_DATA, RING_RESET, HASH_REPORT, RSS, RSC_EXT.
        for never in [24, 38, 40, 57, 60, 61] {
            assert_eq!(bits(VIRTIO) & 1 << never, 0, "bit {never}");
        }
        assert_eq!(names(PROTOCOL, 0b101), ["MQ", "RARP"]);
        assert_eq!((header_bytes(0), header_bytes(1 << 15), header_bytes(1 << 32)), (10, 12, 12));
    }
    #[test]
    fn offloads_are_those_of_the_bits_and_none_without_the_checksum() {
        assert_eq!((accepts(bits(VIRTIO)), may(bits(VIRTIO)).and(Needs::MERGED)), (Needs::ALL, Needs::ALL));
        assert_eq!((accepts(1 << 1), may(1 << 1)), (Needs::CSUM, Needs::NONE));
        assert_eq!((accepts(1), may(1)), (Needs::NONE, Needs::CSUM));
        let both = Needs::CSUM.and(Needs::TSO4).and(Needs::USO6);
        assert_eq!(accepts(1 << 1 | 1 << 7 | 1 << 55), both.and(Needs::MERGED));
        assert_eq!((accepts(1 << 7 | 1 << 9), may(1 << 11 | 1 << 56)), (Needs::NONE, Needs::NONE));
    }
}
