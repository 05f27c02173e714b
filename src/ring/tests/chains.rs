//! Rules 3 to 5: what the indexes, the tables and the directions of a chain may be.

#![allow(clippy::unwrap_used)]

use super::fault;
use crate::limits::{INDIRECT_DESCRIPTORS, RING_SIZE};
use crate::ring::driver::{DATA, Descriptor, Driver, HOLE, INDIRECT, MORE, WRITE, buffer};
use crate::ring::{Readable, RingFault, Writable};

#[test]
fn rule_03_a_head_beyond_the_ring_is_a_fault() {
    for size in [1, 64, RING_SIZE] {
        for head in [size, size + 1, 65535] {
            let mut driver = Driver::new(size, 7);
            driver.offer(&[head]);
            assert_eq!(fault(&driver), RingFault::Head { head, size });
        }
    }
}

#[test]
fn rule_03_a_next_beyond_the_ring_is_a_fault() {
    for next in [16, 17, 65535] {
        let mut driver = Driver::new(16, 0);
        driver.offer_one(buffer(DATA, 64).then(next));
        assert_eq!(fault(&driver), RingFault::Next { head: 0, next, size: 16 });
    }
}

#[test]
fn rule_03_next_means_nothing_without_its_flag() {
    let mut driver = Driver::new(16, 0);
    driver.set_descriptor(3, buffer(DATA, 64).then(5));
    let mut last = buffer(DATA + 64, 64);
    last.next = 9999;
    driver.set_descriptor(5, last);
    driver.offer(&[3]);
    let mut ring = driver.start();
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    assert_eq!(driver.places(&chains, &chains.list()[0]), [(DATA, 64), (DATA + 64, 64)]);
}

#[test]
fn rule_03_a_chain_of_the_whole_ring_ends_and_a_longer_one_is_a_loop() {
    for size in [1, 2, 64, 256] {
        let mut driver = Driver::new(size, 65530);
        for index in 0..size - 1 {
            driver.set_descriptor(index, buffer(DATA, 1).then(index + 1));
        }
        driver.set_descriptor(size - 1, buffer(DATA, 1));
        driver.offer(&[0]);
        let mut ring = driver.start();
        let chains = driver.gather::<Readable>(&mut ring).unwrap();
        assert_eq!((chains.list()[0].bytes, chains.pieces(&chains.list()[0]).len()), (size.into(), size.into()));
        // To the first, to the middle, to itself.
        for back in [0, size / 2, size - 1] {
            driver.set_descriptor(size - 1, buffer(DATA, 1).then(back));
            assert_eq!(fault(&driver), RingFault::Loop { head: 0, size });
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "32768 descriptors take minutes there")]
fn rule_03_a_loop_of_empty_descriptors_ends_too() {
    let mut driver = Driver::new(RING_SIZE, 0);
    driver.offer_one(buffer(HOLE, 0).then(0));
    assert_eq!(fault(&driver), RingFault::Loop { head: 0, size: RING_SIZE });
}

fn refused(driver: &mut Driver, table: Descriptor) -> (&'static str, u32) {
    driver.offer_one(table);
    let RingFault::Indirect { head: 0, why, len } = fault(driver) else { panic!("{:?}", fault(driver)) };
    (why, len)
}

#[test]
fn rule_04_what_is_not_allowed_is_named() {
    let one = |driver: &Driver| driver.set_table(DATA, &[buffer(MORE, 64)]);
    let new = || Driver::new(16, 65535);

    let mut driver = new();
    driver.config.indirect = false;
    let table = one(&driver);
    assert_eq!(refused(&mut driver, table), ("VIRTIO_F_INDIRECT_DESC was not negotiated", 16));

    let mut driver = new();
    let table = one(&driver).then(1);
    assert_eq!(refused(&mut driver, table), ("it is combined with a next descriptor", 16));

    for len in [0, 1, 15, 17, 24, 16 * u32::from(INDIRECT_DESCRIPTORS) + 8, u32::MAX] {
        let mut driver = new();
        let mut table = one(&driver);
        table.len = len;
        assert_eq!(refused(&mut driver, table), ("its length is not a positive multiple of 16", len));
    }
    for entries in [u32::from(INDIRECT_DESCRIPTORS) + 1, 65536, u32::MAX / 16] {
        let mut driver = new();
        let mut table = one(&driver);
        table.len = 16 * entries;
        assert_eq!(refused(&mut driver, table), ("it has more than 1024 descriptors", 16 * entries));
    }
    let mut driver = new();
    let table = driver.set_table(DATA, &[buffer(MORE, 64).then(1), buffer(MORE, 16).with(INDIRECT)]);
    assert_eq!(refused(&mut driver, table), ("a table within a table", 32));
}

#[test]
fn rule_04_the_largest_table_is_allowed_and_its_chain_is_overlong() {
    let mut driver = Driver::new(16, 0);
    let last = INDIRECT_DESCRIPTORS - 1;
    let entry = |index: u16| buffer(MORE, 1).then(index + 1);
    let mut table: Vec<_> = (0..last).map(entry).collect();
    table.push(buffer(MORE, 1));
    let table = driver.set_table(DATA, &table);
    driver.offer_one(table);
    let mut ring = driver.start();
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    let chain = &chains.list()[0];
    assert_eq!((chain.overlong, chain.bytes, chains.pieces(chain).len()), (true, 1024, 0));
}

#[test]
fn rule_04_a_next_beyond_the_table_is_a_fault_even_if_the_ring_has_it() {
    let mut driver = Driver::new(256, 0);
    for next in [2, 100, 65535] {
        let table = driver.set_table(DATA, &[buffer(MORE, 64).then(next), buffer(MORE, 64)]);
        driver.offer_one(table);
        assert_eq!(fault(&driver), RingFault::Next { head: 0, next, size: 2 });
    }
}

#[test]
fn rule_04_a_loop_in_a_table_is_a_fault() {
    let mut driver = Driver::new(256, 0);
    let table = driver.set_table(DATA, &[buffer(MORE, 64).then(1), buffer(MORE, 64).then(0)]);
    driver.offer_one(table);
    assert_eq!(fault(&driver), RingFault::Loop { head: 0, size: 2 });
}

#[test]
fn rule_04_a_table_may_lie_across_regions_and_need_not_be_aligned() {
    for at in [MORE - 32, MORE - 24, MORE - 17, MORE - 15, MORE - 8, MORE - 1] {
        let mut driver = Driver::new(16, 0);
        let table = driver.set_table(at, &[buffer(DATA, 64).then(2), buffer(HOLE, 9), buffer(DATA + 64, 32)]);
        driver.offer_one(table);
        let mut ring = driver.start();
        let chains = driver.gather::<Readable>(&mut ring).unwrap();
        assert_eq!(driver.places(&chains, &chains.list()[0]), [(DATA, 64), (DATA + 64, 32)], "{at:#x}");
    }
}

#[test]
fn rule_04_a_table_that_is_not_mapped_is_a_fault_where_the_walk_leaves_the_map() {
    let mut driver = Driver::new(16, 0);
    for at in [HOLE, 0, HOLE - 8, u64::MAX - 31] {
        driver.offer_one(buffer(at, 32).with(INDIRECT));
        assert_eq!(fault(&driver), RingFault::Unmapped { head: 0, address: at, len: 16 });
    }
    // Its first entry is mapped, its second is not, and is only looked at when the chain goes there.
    driver.set_table(HOLE - 16, &[buffer(DATA, 64)]);
    driver.offer_one(buffer(HOLE - 16, 32).with(INDIRECT));
    assert!(driver.gather::<Readable>(&mut driver.start()).is_ok());
    driver.set_table(HOLE - 16, &[buffer(DATA, 64).then(1)]);
    assert_eq!(fault(&driver), RingFault::Unmapped { head: 0, address: HOLE, len: 16 });
}

#[test]
fn rule_04_a_table_ends_a_chain_and_its_own_write_flag_means_nothing() {
    let mut driver = Driver::new(16, 0);
    let table = driver.set_table(DATA, &[buffer(MORE + 64, 8).with(WRITE)]);
    driver.set_descriptor(0, buffer(MORE, 64).with(WRITE).then(1));
    driver.set_descriptor(1, table);
    driver.set_descriptor(2, table.with(WRITE));
    driver.offer(&[0, 2]);
    let mut ring = driver.start();
    let chains = driver.gather::<Writable>(&mut ring).unwrap();
    assert_eq!(driver.places(&chains, &chains.list()[0]), [(MORE, 64), (MORE + 64, 8)]);
    assert_eq!(driver.places(&chains, &chains.list()[1]), [(MORE + 64, 8)]);
}

#[test]
fn rule_05_a_buffer_of_the_other_direction_is_a_fault_wherever_it_stands() {
    let (reads, writes) = (buffer(DATA, 8), buffer(DATA + 8, 8).with(WRITE));
    let expect = |driver: &Driver, writable: bool| {
        let mut ring = driver.start();
        let (result, found, expected) = if writable {
            (driver.gather::<Writable>(&mut ring).map(drop), "readable", "writable")
        } else {
            (driver.gather::<Readable>(&mut ring).map(drop), "writable", "readable")
        };
        assert_eq!(result, Err(RingFault::Direction { head: 0, found, expected }));
    };
    for (good, bad, writable) in [(reads, writes, false), (writes, reads, true)] {
        let mut driver = Driver::new(16, 0);
        driver.offer_one(bad);
        expect(&driver, writable);
        for (first, second) in [(good, bad), (bad, good)] {
            driver.set_descriptor(0, first.then(1));
            driver.set_descriptor(1, second);
            expect(&driver, writable);
            let table = driver.set_table(MORE, &[first.then(1), second]);
            driver.set_descriptor(0, table);
            expect(&driver, writable);
        }
        // An empty one counts too.
        driver.set_descriptor(0, Descriptor { len: 0, ..bad });
        expect(&driver, writable);
    }
}
