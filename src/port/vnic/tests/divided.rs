//! Batches that are not dealt with whole: what is left comes again, in its order, and the ring says so to whoever asks.

use super::*;
use crate::frame::{Batch, Flooding, heads};
use crate::ident::MacAddr;
use crate::port::testing::bytes;
use crate::port::{Receive, Received};

/// Where the guest's frames are.
const BUFFER: u64 = 0xc_0000;

/// A guest whose first transmit ring has `frames` frames, each with its number in it.
fn sender(host: &Host, guest: &Guest, frames: u16) -> (Arc<Vnic>, Raw) {
    let (port, ring) = (host.port("vm1"), 1);
    let mut qemu = host.connect("vm1");
    qemu.negotiate();
    assert!(qemu.done(Req::SET_FEATURES, &(1u64 << 32 | 1 << 30).to_ne_bytes(), &[]));
    assert!(qemu.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
    let [descriptors, available, _] = areas(ring);
    for head in 0..frames {
        let (at, len) = (u64::from(head), 12 + 60u32);
        let frame = [vec![0; 12], vec![head as u8; 60]].concat();
        guest.memory.write_all_at(&frame, BUFFER + 128 * at).unwrap();
        let descriptor = [(BUFFER + 128 * at).to_le_bytes().as_slice(), &len.to_le_bytes(), &[0; 4]].concat();
        guest.memory.write_all_at(&descriptor, descriptors + 16 * at).unwrap();
        guest.memory.write_all_at(&head.to_le_bytes(), available + 4 + 2 * at).unwrap();
    }
    guest.memory.write_all_at(&frames.to_le_bytes(), available + 2).unwrap();
    qemu.start(ring, 0, guest);
    assert!(qemu.done(Req::SET_VRING_ENABLE, &state(ring, 1), &[]));
    (port, qemu)
}

/// Any.
const HELD_AS: (MacAddr, u32) = (MacAddr::BROADCAST, 1);

/// One visit in which `decide` has its way; the numbers of the frames that were in the batch before.
fn visit(queue: &dyn Receive, decide: impl Fn(&mut Batch<'_>)) -> (Received, Vec<u8>) {
    let (mut heads, mut seen) = (heads(), Vec::new());
    let received = queue.receive(&mut heads, &mut |batch| {
        seen = (0..batch.len()).map(|index| bytes(batch, index)[0]).collect();
        decide(batch);
    });
    (received, seen)
}

fn used(guest: &Guest) -> u16 {
    let mut index = [0; 2];
    guest.memory.read_exact_at(&mut index, areas(1)[2] + 2).unwrap();
    u16::from_le_bytes(index)
}

#[test]
fn what_was_not_dealt_with_is_the_guests_until_it_was() {
    let (host, guest) = (Host::new(), Guest::new());
    let (port, mut qemu) = sender(&host, &guest, 10);
    let queue = &*port.receive_queues()[0];
    assert_eq!(visit(queue, |batch| batch.cut(3)), (Received::Frames(3), (0..10).collect()));
    assert_eq!(used(&guest), 3);
    let part = |batch: &mut Batch<'_>| {
        batch.flood_in_part(5, HELD_AS);
        batch.note_flooded(true);
    };
    assert_eq!(visit(queue, part), (Received::Frames(0), (3..10).collect()));
    assert!(!queue.arm(), "a queue with a frame that is begun does not rest");
    queue.disarm();
    let begun =
        |batch: &mut Batch<'_>| assert_eq!(batch.flooding(), Flooding { next: 5, delivered: true, held_as: HELD_AS });
    let rest = |batch: &mut Batch<'_>| {
        begun(batch);
        batch.cut(1);
        assert!(batch.note_flooded(false), "it was delivered in the visit before");
    };
    assert_eq!(visit(queue, rest), (Received::Frames(1), (3..10).collect()));
    let first = |batch: &mut Batch<'_>| {
        assert!(!batch.is_begun());
        part(batch);
    };
    assert_eq!(visit(queue, first), (Received::Frames(0), (4..10).collect()));
    assert_eq!((used(&guest), qemu.base(1)), (4, 4), "whoever goes on begins with the frame that was begun");
    // The ring is started again: nobody knows of what was begun.
    qemu.start(1, 4, &guest);
    let anew = |batch: &mut Batch<'_>| assert!(!batch.is_begun());
    assert_eq!(visit(queue, anew), (Received::Frames(6), (4..10).collect()));
    assert_eq!((visit(queue, anew), used(&guest)), ((Received::Nothing, Vec::new()), 10));
}

#[test]
fn an_announcement_that_takes_several_visits_is_made_to_the_end_before_the_ring_is_looked_at() {
    let (host, guest) = (Host::new(), Guest::new());
    let (port, mut qemu) = sender(&host, &guest, 1);
    assert!(qemu.done_raw(19, &[2, 0, 0, 0, 0, 9, 0, 0], &[]));
    let queue = &*port.receive_queues()[0];
    let part = |batch: &mut Batch<'_>| {
        batch.flood_in_part(5, HELD_AS);
        batch.note_flooded(true);
    };
    assert_eq!(visit(queue, part), (Received::Frames(0), vec![0xff]));
    assert!(!queue.arm());
    let rest = |batch: &mut Batch<'_>| assert!(batch.note_flooded(false));
    assert_eq!(visit(queue, rest), (Received::Frames(1), vec![0xff]));
    assert_eq!(visit(queue, |batch| assert!(!batch.is_begun())), (Received::Frames(1), vec![0]));
}
