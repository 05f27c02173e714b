//! What a packed ring's walk takes, and what it refuses.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use super::{SIZES, bases, fault};
use crate::limits::{BATCH_BYTES, BATCH_DESCRIPTORS, BATCH_FRAMES, CHAIN_SEGMENTS, INDIRECT_DESCRIPTORS, RING_SIZE};
use crate::mem::GuestMemory;
use crate::ring::driver::{DATA, DATA_BYTES, Descriptor, HOLE, INDIRECT, MORE, NEXT, WRITE, buffer, memory};
use crate::ring::packed_driver::{AVAIL, PackedDriver, Position, USED};
use crate::ring::{Chains, DeviceRing, PackedRing, Readable, RingError, RingFault, Writable};

#[test]
fn sizes_bases_and_places_that_virtio_does_not_allow_are_refused() {
    let driver = PackedDriver::new(300, 0x8000);
    let refused = |change: &dyn Fn(&mut crate::ring::RingConfig)| {
        let mut config = driver.config;
        change(&mut config);
        PackedRing::start(config, Arc::clone(&driver.memory)).unwrap_err()
    };
    for size in [0, RING_SIZE + 1, 65535] {
        assert_eq!(refused(&|config| config.size = size), RingError::PackedSize(size));
    }
    for base in [300, 301, 0x8000 | 300, 0x7fff, 0xffff] {
        assert_eq!(refused(&|config| config.base = base), RingError::Base { base, size: 300 });
    }
    let at = driver.config.descriptors + 8;
    let misaligned = |area, address, align| RingError::Misaligned { area, address, align };
    assert_eq!(refused(&|config| config.descriptors = at), misaligned("descriptor", at, 16));
    let at = driver.config.available + 2;
    assert_eq!(refused(&|config| config.available = at), misaligned("driver event", at, 4));
    assert_eq!(refused(&|config| config.used = at), misaligned("device event", at, 4));
    let unmapped = |area, address, len| RingError::Unmapped { area, address, len };
    assert_eq!(refused(&|config| config.descriptors = HOLE - 16), unmapped("descriptor", HOLE - 16, 4800));
    assert_eq!(refused(&|config| config.available = HOLE), unmapped("driver event", HOLE, 4));
    assert_eq!(refused(&|config| config.used = HOLE), unmapped("device event", HOLE, 4));
    let mut config = driver.config;
    (config.available, config.used) = (HOLE - 4, HOLE - 8);
    assert!(PackedRing::start(config, Arc::clone(&driver.memory)).is_ok(), "the last byte of a region is in it");
}

#[test]
fn rule_02_a_ringful_is_taken_whole_at_every_size_and_base() {
    for size in SIZES {
        for base in bases(size) {
            let mut driver = PackedDriver::new(size, base);
            let mut ring = driver.start();
            assert_eq!((ring.pending(), ring.base()), (Ok(0), base), "{size} from {base:#x}");
            (0..size).for_each(|index| driver.offer(&[buffer(DATA + u64::from(index), 7)], 1000 + index));
            assert_eq!(ring.pending(), Ok(1));
            let mut ids = Vec::new();
            while ids.len() < size.into() {
                let chains = driver.gather::<Readable>(&mut ring).unwrap();
                assert!(!chains.list().is_empty());
                ids.extend(chains.list().iter().map(|chain| chain.head));
            }
            assert_eq!(ids, (1000..1000 + size).collect::<Vec<_>>());
            assert_eq!((ring.pending(), ring.base()), (Ok(0), base ^ 0x8000));
        }
    }
}

#[test]
fn rule_02_the_largest_ring_is_taken_whole() {
    let mut driver = PackedDriver::new(RING_SIZE, 0xffff);
    (0..RING_SIZE).for_each(|index| driver.offer(&[buffer(DATA, 1)], index));
    let (mut ring, mut taken) = (driver.start(), 0);
    while let 1.. = driver.gather::<Readable>(&mut ring).unwrap().list().len() {
        taken += 1;
    }
    assert_eq!((taken, ring.base()), (usize::from(RING_SIZE) / BATCH_FRAMES, 0x7fff));
}

#[test]
fn rule_02_more_than_a_ringful_is_a_fault() {
    for size in SIZES.into_iter().filter(|&size| usize::from(size) < BATCH_FRAMES) {
        for base in bases(size) {
            let mut driver = PackedDriver::new(size, base);
            (0..size).for_each(|index| driver.offer(&[buffer(DATA, 1)], index));
            let mut ring = driver.start();
            assert_eq!(driver.gather::<Readable>(&mut ring).unwrap().list().len(), usize::from(size));
            let head = driver.next.slot;
            driver.offer_one(buffer(DATA, 1));
            let overrun = RingFault::Overrun { head, size };
            assert_eq!(ring.pending(), Err(overrun));
            assert_eq!(ring.arm(), Err(overrun));
            assert_eq!(driver.gather::<Readable>(&mut ring).unwrap_err(), overrun);
        }
    }
}

#[test]
fn rule_02_a_descriptor_is_available_by_both_bits_only() {
    for base in [3, 0x8003] {
        let driver = PackedDriver::new(8, base);
        let mut ring = driver.start();
        driver.set_slot(3, buffer(DATA, 1), 0);
        for flags in [0, AVAIL, USED, AVAIL | USED] {
            driver.set_flags(3, flags);
            let available = flags == Position::of(base).available();
            assert_eq!(ring.pending(), Ok(u16::from(available)));
            assert_eq!(driver.gather::<Readable>(&mut ring).unwrap().list().len(), usize::from(available));
            ring = driver.start();
        }
    }
}

#[test]
fn rule_03_a_chain_goes_on_in_the_next_slot_and_round_the_end_and_its_id_is_in_the_last() {
    for size in [3, 5, 255] {
        for base in bases(size) {
            let mut driver = PackedDriver::new(size, base);
            driver.offer(&[buffer(DATA, 10), buffer(MORE, 20), buffer(DATA + 64, 30)], 77);
            let mut ring = driver.start();
            let chains = driver.gather::<Readable>(&mut ring).unwrap();
            let [chain] = chains.list() else { panic!() };
            assert_eq!((chain.head, chain.bytes, chain.slots), (77, 60, 3));
            assert_eq!(driver.places(&chains, chain), [(DATA, 10), (MORE, 20), (DATA + 64, 30)]);
            assert_eq!(ring.base(), Position::of(base).on(3, size).word());
        }
    }
}

#[test]
fn rule_03_a_chain_of_the_whole_ring_ends_and_a_longer_one_is_a_fault() {
    for size in SIZES {
        for base in bases(size) {
            let mut driver = PackedDriver::new(size, base);
            driver.offer(&vec![buffer(DATA, 1); size.into()], 9);
            let chains = driver.gather::<Readable>(&mut driver.start()).map(|chains| chains.list()[0]);
            assert_eq!(chains.unwrap().bytes, u32::from(size));
            let last = Position::of(base).on(size - 1, size);
            driver.set_flags(last.slot, NEXT | last.available());
            assert_eq!(fault(&driver), RingFault::Overrun { head: Position::of(base).slot, size });
        }
    }
}

#[test]
fn rule_03_a_chain_does_not_run_into_what_was_taken_before() {
    let mut driver = PackedDriver::new(5, 0x8000);
    driver.offer(&[buffer(DATA, 1)], 0);
    driver.offer(&[buffer(DATA, 1)], 1);
    driver.offer(&[buffer(DATA, 1), buffer(DATA, 1), buffer(DATA, 1), buffer(DATA, 1)], 2);
    // The last descriptor of this chain is in slot 0, with the next round's bits, which the walk came by already.
    driver.set_flags(0, AVAIL);
    driver.set_flags(4, AVAIL | NEXT);
    let mut ring = driver.start();
    let mut chains = Chains::new();
    let overrun = RingFault::Overrun { head: 2, size: 5 };
    assert_eq!(ring.gather::<Readable>(&driver.memory, 64, &mut chains), Err(overrun));
    assert_eq!(chains.list().len(), 2, "what came before the fault");
    chains.list().iter().for_each(|chain| ring.complete(chain, 0));
    assert_eq!(ring.publish(), Some(true));
    assert_eq!(ring.base(), 0x8002);
}

#[test]
fn rule_04_a_table_is_read_from_its_first_entry_to_its_last() {
    let mut driver = PackedDriver::new(16, 0);
    // A driver may leave anything in the ids of a table, and NEXT in its flags, which mean nothing there (2.8.7).
    let entries = [buffer(MORE, 64).then(9), buffer(MORE + 64, 32), buffer(MORE + 128, 16)];
    let table = table(&driver, DATA, &entries);
    driver.offer(&[table], 5);
    driver.offer(&[buffer(DATA, 1), table], 6);
    let mut ring = driver.start();
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    let pieces = [(MORE, 64), (MORE + 64, 32), (MORE + 128, 16)];
    assert_eq!(driver.places(&chains, &chains.list()[0]), pieces);
    assert_eq!((chains.list()[0].head, chains.list()[0].slots, chains.list()[0].bytes), (5, 1, 112));
    assert_eq!(driver.places(&chains, &chains.list()[1])[1..], pieces);
    assert_eq!((chains.list()[1].head, chains.list()[1].slots), (6, 2));
}

/// Writes a table as a packed ring has it: length, id, flags.
fn table(driver: &PackedDriver, address: u64, entries: &[Descriptor]) -> Descriptor {
    for (at, entry) in entries.iter().enumerate() {
        driver.set_entry(address + 16 * at as u64, *entry);
    }
    buffer(address, 16 * entries.len() as u32).with(INDIRECT)
}

#[test]
fn rule_04_what_is_not_allowed_is_named() {
    let refused = |change: &dyn Fn(&mut PackedDriver, &mut Descriptor)| {
        let mut driver = PackedDriver::new(16, 0x8000);
        let mut table = table(&driver, DATA, &[buffer(MORE, 64)]);
        change(&mut driver, &mut table);
        driver.offer_one(table);
        let RingFault::Indirect { head: 0, why, .. } = fault(&driver) else { panic!("{:?}", fault(&driver)) };
        why
    };
    let not_negotiated = refused(&|driver, _| driver.config.indirect = false);
    assert_eq!(not_negotiated, "VIRTIO_F_INDIRECT_DESC was not negotiated");
    assert_eq!(refused(&|_, table| *table = table.then(1)), "it is combined with a next descriptor");
    for len in [0, 1, 15, 17, u32::MAX] {
        assert_eq!(refused(&|_, table| table.len = len), "its length is not a positive multiple of 16");
    }
    let long = 16 * u32::from(INDIRECT_DESCRIPTORS) + 16;
    assert_eq!(refused(&|_, table| table.len = long), "it has more than 1024 descriptors");
    let nested = |driver: &mut PackedDriver, _: &mut Descriptor| {
        table(driver, DATA, &[buffer(MORE, 64).with(INDIRECT)]);
    };
    assert_eq!(refused(&nested), "a table within a table");
}

#[test]
fn rule_04_a_table_that_is_not_mapped_is_a_fault() {
    let mut driver = PackedDriver::new(16, 0);
    driver.offer_one(buffer(HOLE - 16, 32).with(INDIRECT));
    assert_eq!(fault(&driver), RingFault::Unmapped { head: 0, address: HOLE, len: 16 });
    let mut driver = PackedDriver::new(16, 0);
    driver.offer_one(buffer(u64::MAX - 15, 32).with(INDIRECT));
    assert_eq!(fault(&driver), RingFault::Unmapped { head: 0, address: u64::MAX - 15, len: 32 });
}

#[test]
fn rule_05_a_buffer_of_the_other_direction_is_a_fault_wherever_it_stands() {
    let (reads, writes) = (buffer(DATA, 8), buffer(DATA + 8, 8).with(WRITE));
    for (good, bad, writable) in [(reads, writes, false), (writes, reads, true)] {
        // A table's entries may say that they are written where they are read, because DPDK's do.
        for number in 0..if writable { 5 } else { 4 } {
            let mut driver = PackedDriver::new(16, 0x8002);
            let chain = match number {
                0 => vec![bad],
                1 => vec![good, bad],
                2 => vec![bad, good],
                3 => vec![Descriptor { len: 0, ..bad }],
                _ => vec![table(&driver, MORE, &[good, bad])],
            };
            driver.offer(&chain, 11);
            let mut ring = driver.start();
            let (found, expected) = if writable { ("readable", "writable") } else { ("writable", "readable") };
            let result = match writable {
                true => driver.gather::<Writable>(&mut ring).map(drop),
                false => driver.gather::<Readable>(&mut ring).map(drop),
            };
            assert_eq!(result, Err(RingFault::Direction { head: 2, found, expected }));
        }
    }
}

#[test]
fn rule_05_entries_of_a_table_that_are_read_may_say_that_they_are_written() {
    let mut driver = PackedDriver::new(16, 0);
    let table = table(&driver, DATA, &[buffer(MORE, 12).with(WRITE), buffer(MORE + 64, 32)]);
    driver.offer_one(table);
    let mut ring = driver.start();
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    assert_eq!(driver.places(&chains, &chains.list()[0]), [(MORE, 12), (MORE + 64, 32)]);
}

#[test]
fn rule_06_buffers_lie_in_memory_that_is_shared_and_empty_ones_anywhere() {
    for (address, len) in
        [(HOLE, 1), (HOLE - 1, 2), (DATA - 1, 2), (u64::MAX, 1), (DATA, u32::MAX), (u64::MAX - 63, 64)]
    {
        let mut driver = PackedDriver::new(3, 1);
        driver.offer(&[buffer(DATA, 1), buffer(address, len)], 0);
        assert_eq!(fault(&driver), RingFault::Unmapped { head: 1, address, len });
        let mut driver = PackedDriver::new(3, 1);
        driver.offer_one(buffer(address, len));
        assert_eq!(fault(&driver), RingFault::Unmapped { head: 1, address, len });
    }
    let mut driver = PackedDriver::new(8, 0x8000);
    driver.offer(&[buffer(u64::MAX, 0)], 1);
    driver.offer(&[buffer(HOLE, 0), buffer(MORE - 10, 30), buffer(0, 0)], 2);
    let mut ring = driver.start();
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    assert_eq!((chains.list()[0].bytes, chains.list()[0].head), (0, 1));
    assert_eq!(driver.places(&chains, &chains.list()[1]), [(MORE - 10, 10), (MORE, 20)], "across regions");
}

#[test]
fn rule_07_more_pieces_than_a_frame_may_have_are_none() {
    let mut driver = PackedDriver::new(300, 0x8000 | 200);
    driver.offer(&vec![buffer(DATA, 3); CHAIN_SEGMENTS + 1], 8);
    driver.offer(&[buffer(MORE, 5)], 9);
    let mut ring = driver.start();
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    let [long, short] = chains.list() else { panic!() };
    assert_eq!((long.overlong, long.bytes, long.head), (true, 3 * 257, 8));
    assert!(chains.pieces(long).is_empty());
    assert_eq!(driver.places(&chains, short), [(MORE, 5)]);
}

#[test]
fn rule_10_what_was_given_back_is_gathered_again() {
    for size in [5, 7, 255] {
        for base in bases(size) {
            let mut driver = PackedDriver::new(size, base);
            driver.offer(&[buffer(DATA, 1), buffer(DATA, 1)], 0);
            driver.offer(&[buffer(DATA, 1)], 1);
            driver.offer(&[buffer(DATA, 1), buffer(DATA, 1)], 2);
            let mut ring = driver.start();
            for _ in 0..3 {
                let chains = driver.gather::<Readable>(&mut ring).unwrap();
                assert_eq!(chains.list().iter().map(|chain| chain.head).collect::<Vec<_>>(), [0, 1, 2]);
                ring.give_back(&chains.list()[2..]);
                assert_eq!(ring.base(), Position::of(base).on(3, size).word());
                let again = driver.gather::<Readable>(&mut ring).unwrap();
                assert_eq!(again.list().iter().map(|chain| chain.head).collect::<Vec<_>>(), [2]);
                ring.give_back(again.list());
                ring.give_back(&chains.list()[..2]);
                assert_eq!((ring.base(), ring.publish()), (base, None));
            }
        }
    }
}

#[test]
fn rule_12_no_chain_begins_beyond_the_budgets() {
    let mut driver = PackedDriver::new(RING_SIZE, 0x8000);
    for id in 0..128 {
        driver.offer(&vec![buffer(HOLE, 0); 255], id);
    }
    let mut ring = driver.start();
    for _ in 0..2 {
        assert_eq!(driver.gather::<Readable>(&mut ring).unwrap().list().len(), BATCH_DESCRIPTORS.div_ceil(255));
    }
    let mut driver = PackedDriver::new(100, 0);
    (0..100).for_each(|id| driver.offer(&[buffer(DATA, DATA_BYTES as u32)], id));
    let mut ring = driver.start();
    assert_eq!(driver.gather::<Readable>(&mut ring).unwrap().list().len(), BATCH_BYTES / DATA_BYTES);
    let mut driver = PackedDriver::new(300, 0);
    (0..300).for_each(|id| driver.offer(&[buffer(DATA, 1)], id));
    let (mut ring, mut chains) = (driver.start(), Chains::new());
    for (limit, taken) in [(0, 0), (1, 1), (30, 30), (usize::MAX, BATCH_FRAMES - 31), (9, 0)] {
        assert_eq!(ring.gather::<Readable>(&driver.memory, limit, &mut chains).unwrap(), taken);
    }
}

#[test]
fn it_moves_with_its_memory_or_faults_with_it() {
    let mut driver = PackedDriver::new(16, 0x8000);
    driver.offer(&[buffer(DATA, 4)], 3);
    let mut ring = driver.start();
    let moved = memory(16);
    let mut other = PackedDriver::new(16, 0x8000);
    other.memory = Arc::clone(&moved);
    ring.set_memory(&moved).unwrap();
    assert_eq!(ring.pending(), Ok(0), "the other memory's ring is empty");
    other.set_slot(0, buffer(MORE, 9), 1);
    other.set_flags(0, AVAIL);
    let chains = other.gather::<Readable>(&mut ring).unwrap();
    assert_eq!(other.places(&chains, &chains.list()[0]), [(MORE, 9)]);
    let gone = Arc::new(GuestMemory::new(driver.memory.regions()[1..].to_vec()));
    assert_eq!(ring.set_memory(&gone), Err(RingFault::MemoryGone));
}
