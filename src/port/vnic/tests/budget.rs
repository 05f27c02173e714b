//! What a guest can make somebody else's batch cost, over all of its rings.

use super::*;
use crate::limits::{BATCH_DESCRIPTORS, BATCH_FRAMES, INDIRECT_DESCRIPTORS};
use crate::port::testing::transmit;

/// An indirect table of as many descriptors as there may be, all empty but the last, which holds a frame.
const TABLE: u64 = 0x8_0000;
const BUFFER: u64 = 0xc_0000;

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    let parts: [&[u8]; 4] = [&address.to_le_bytes(), &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
    parts.concat()
}

#[test]
fn a_guest_with_two_rings_costs_no_more_than_one_with_one() {
    let (host, guest) = (Host::new(), Guest::new());
    let port = host.port("vm1");
    let mut qemu = host.connect("vm1");
    qemu.negotiate();
    // VERSION_1, INDIRECT_DESC and vhost-user's own.
    assert!(qemu.done(Req::SET_FEATURES, &(1u64 << 32 | 1 << 28 | 1 << 30).to_ne_bytes(), &[]));
    assert!(qemu.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
    let last = INDIRECT_DESCRIPTORS - 1;
    let table: Vec<_> = (0..last).flat_map(|at| descriptor(BUFFER, 0, 2 | 1, at + 1)).collect();
    guest.memory.write_all_at(&[table, descriptor(BUFFER, 2048, 2, 0)].concat(), TABLE).unwrap();
    for ring in [0, 2] {
        let [descriptors, available, _] = areas(ring);
        for head in 0..BATCH_FRAMES as u16 {
            let at = u64::from(head);
            let indirect = descriptor(TABLE, 16 * u32::from(INDIRECT_DESCRIPTORS), 4, 0);
            guest.memory.write_all_at(&indirect, descriptors + 16 * at).unwrap();
            guest.memory.write_all_at(&head.to_le_bytes(), available + 4 + 2 * at).unwrap();
        }
        guest.memory.write_all_at(&(BATCH_FRAMES as u16).to_le_bytes(), available + 2).unwrap();
        qemu.start(ring, 0, &guest);
        assert!(qemu.done(Req::SET_VRING_ENABLE, &state(ring, 1), &[]));
    }
    // A flow each.
    let frames: Vec<_> = (0..BATCH_FRAMES as u8).map(|at| [vec![2, 0, 0, 0, 0, at], vec![2; 54]].concat()).collect();
    let used = |ring| {
        let mut index = [0; 2];
        guest.memory.read_exact_at(&mut index, areas(ring)[2] + 2).unwrap();
        usize::from(u16::from_le_bytes(index))
    };
    let most = BATCH_DESCRIPTORS / usize::from(INDIRECT_DESCRIPTORS);
    for round in 1..=8 {
        let before = used(0) + used(2);
        assert_eq!(transmit(&*port.transmit_side(), &frames).delivered.count_ones() as usize, most, "round {round}");
        assert_eq!(used(0) + used(2) - before, most);
    }
}
