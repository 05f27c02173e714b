//! Rules 6, 7 and 16: where buffers may lie, how they add up, what they may overlap.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use super::fault;
use crate::limits::{CHAIN_SEGMENTS, RING_SIZE};
use crate::mem::{GuestMemory, Region};
use crate::ring::driver::{DATA, DATA_BYTES, Driver, HOLE, INDIRECT, MORE, NEXT, RINGS, WRITE, buffer};
use crate::ring::exercise::mapping;
use crate::ring::{Chains, DeviceRing, Readable, RingFault, Writable};

#[test]
fn rule_06_a_buffer_across_regions_is_one_piece_per_region() {
    let mut driver = Driver::new(16, 0);
    driver.offer_one(buffer(MORE - 10, 30));
    let mut ring = driver.start();
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    let chain = &chains.list()[0];
    assert_eq!(driver.places(&chains, chain), [(MORE - 10, 10), (MORE, 20)]);
    assert_eq!((chain.bytes, chains.single(chain).is_none()), (30, true));
}

#[test]
fn rule_06_a_buffer_that_is_not_wholly_mapped_is_a_fault() {
    let wild = [
        (HOLE, 1),
        (HOLE - 1, 2),
        (MORE - 1, DATA_BYTES as u32 + 2),
        (DATA - 1, 1),
        (DATA - 1, 2),
        (DATA, u32::MAX),
        (0, 1),
        (0, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (u64::MAX - 63, 64),
        (u64::MAX - u64::from(u32::MAX), u32::MAX),
        (1 << 63, 64),
    ];
    for (address, len) in wild {
        let fast = buffer(address, len);
        let mut driver = Driver::new(16, 0);
        driver.offer_one(fast);
        assert_eq!(fault(&driver), RingFault::Unmapped { head: 0, address, len });
        driver.set_descriptor(1, fast);
        driver.set_descriptor(0, buffer(DATA, 1).then(1));
        assert_eq!(fault(&driver), RingFault::Unmapped { head: 0, address, len });
        let table = driver.set_table(DATA, &[fast]);
        driver.set_descriptor(0, table);
        assert_eq!(fault(&driver), RingFault::Unmapped { head: 0, address, len });
    }
}

#[test]
fn rule_06_an_empty_buffer_adds_nothing_whatever_its_address() {
    // CVE-2020-10725 was a pointer made of such an address.
    for address in [0, HOLE, u64::MAX, DATA] {
        let mut driver = Driver::new(16, 0);
        driver.set_descriptor(0, buffer(address, 0));
        driver.set_descriptor(1, buffer(address, 0).then(2));
        driver.set_descriptor(2, buffer(DATA, 7).then(3));
        driver.set_descriptor(3, buffer(address, 0));
        driver.offer(&[0, 1]);
        let mut ring = driver.start();
        let chains = driver.gather::<Readable>(&mut ring).unwrap();
        let [empty, one] = chains.list() else { panic!() };
        assert_eq!((empty.bytes, empty.overlong, chains.pieces(empty).len()), (0, false, 0));
        assert!(chains.single(empty).is_none());
        assert_eq!(driver.places(&chains, one), [(DATA, 7)]);
    }
}

#[test]
fn rule_06_a_buffer_does_not_come_round_from_the_last_address_to_the_first() {
    // The session refuses a region that ends at 2^64; the walk does not depend on it.
    let region = |guest| Arc::new(Region::new(guest, guest, mapping(4096)));
    let mut driver = Driver::new(16, 0);
    let last = u64::MAX - 4095;
    let regions = driver.memory.regions().iter().cloned().chain([region(0), region(last)]);
    driver.memory = Arc::new(GuestMemory::new(regions.collect()));
    for (address, len) in [(u64::MAX, 2), (last, 4097), (last, u32::MAX)] {
        driver.offer_one(buffer(address, len));
        assert_eq!(fault(&driver), RingFault::Unmapped { head: 0, address, len });
    }
    driver.offer_one(buffer(u64::MAX - 15, 32).with(INDIRECT));
    driver.write(u64::MAX - 15, &[0; 8]);
    driver.write(u64::MAX - 7, &[0, 0, 0, 0, NEXT as u8, 0, 1, 0]);
    assert_eq!(fault(&driver), RingFault::Unmapped { head: 0, address: u64::MAX - 15, len: 32 });
    driver.offer_one(buffer(u64::MAX - 7, 16).with(INDIRECT));
    assert_eq!(fault(&driver), RingFault::Unmapped { head: 0, address: u64::MAX - 7, len: 16 });
    driver.offer(&[1]);
    driver.set_descriptor(0, buffer(last, 4096));
    driver.set_descriptor(1, buffer(u64::MAX, 1).then(0));
    let mut ring = driver.start();
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    let places = driver.places(&chains, chains.list().last().unwrap());
    assert_eq!(places, [(u64::MAX, 1), (last, 4096)], "the last byte of all is a byte like any other");
}

#[test]
#[cfg_attr(miri, ignore = "32768 descriptors take minutes there")]
fn rule_07_lengths_add_up_without_overflow() {
    // 32768 times 128 KiB is one more than 32 bits hold.
    let mut driver = Driver::new(RING_SIZE, 0);
    let len = 2 * DATA_BYTES as u32;
    for index in 0..RING_SIZE - 1 {
        driver.set_descriptor(index, buffer(DATA, len).then(index + 1));
    }
    driver.set_descriptor(RING_SIZE - 1, buffer(DATA, len));
    driver.offer(&[0]);
    let mut ring = driver.start();
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    let chain = &chains.list()[0];
    assert_eq!((chain.bytes, chain.overlong), (u32::MAX, true));
    assert!(u64::from(len) * u64::from(RING_SIZE) >= 1 << 32);
}

#[test]
fn rule_07_more_pieces_than_a_frame_may_have_are_none() {
    for (count, overlong) in [(CHAIN_SEGMENTS, false), (CHAIN_SEGMENTS + 1, true), (512, true)] {
        let mut driver = Driver::new(512, 0);
        let last = count as u16 - 1;
        (0..last).for_each(|index| driver.set_descriptor(index, buffer(DATA, 3).then(index + 1)));
        driver.set_descriptor(last, buffer(DATA, 3));
        // A good chain before it and one after it are not harmed.
        driver.offer(&[last, 0, last]);
        let mut ring = driver.start();
        let mut chains = Chains::new();
        while ring.pending().unwrap() > 0 {
            let before = chains.list().len();
            ring.gather::<Readable>(&driver.memory, usize::MAX, &mut chains).unwrap();
            if chains.list().len() == before {
                break;
            }
        }
        let chain = &chains.list()[1];
        assert_eq!((chain.overlong, chain.bytes), (overlong, 3 * count as u32));
        assert_eq!(chains.pieces(chain).len(), if overlong { 0 } else { count });
        assert_eq!(driver.places(&chains, &chains.list()[0]), [(DATA, 3)]);
        if overlong {
            assert_eq!(driver.places(&chains, &chains.list()[2]), [(DATA, 3)]);
        } else {
            assert_eq!(chains.list().len(), 2, "room for a whole chain is kept");
        }
    }
}

#[test]
fn rule_16_areas_and_buffers_that_overlap_are_the_guests_own_problem() {
    let mut driver = Driver::new(64, 0);
    driver.config.descriptors = RINGS;
    driver.config.available = RINGS;
    driver.config.used = RINGS;
    driver.config.base = 0;
    for round in 0u16..200 {
        driver.write(RINGS, &[round as u8; 1024]);
        driver.set_available_index(round % 65);
        let mut ring = driver.start();
        if let Ok(chains) = driver.gather::<Readable>(&mut ring) {
            chains.list().iter().for_each(|chain| drop(driver.places(&chains, chain)));
            chains.list().iter().for_each(|chain| ring.complete(chain, 1));
        }
        ring.publish();
        _ = ring.arm();
    }
}

#[test]
fn rule_16_the_ring_itself_can_be_a_buffer() {
    let mut driver = Driver::new(16, 0);
    driver.offer_one(buffer(RINGS, 512).with(WRITE));
    let mut ring = driver.start();
    let chains = driver.gather::<Writable>(&mut ring).unwrap();
    assert_eq!(chains.single(&chains.list()[0]).unwrap().write(&[0xff; 512]), 512);
    ring.complete(&chains.list()[0], 512);
    assert!(ring.publish().is_some());
}
