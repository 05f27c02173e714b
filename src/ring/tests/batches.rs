//! Rules 2, 10 and 12: how much is taken in one turn, and how it is given back.

#![allow(clippy::unwrap_used)]

use super::{BASES, fault};
use crate::limits::{BATCH_BYTES, BATCH_DESCRIPTORS, BATCH_FRAMES, RING_SIZE};
use crate::ring::driver::{DATA, DATA_BYTES, Driver, HOLE, buffer};
use crate::ring::{Chain, Chains, DeviceRing, Readable, RingFault, SplitRing};

#[test]
fn rule_02_more_than_a_ringful_is_a_fault_not_a_clamp() {
    for size in [1, 2, 256, RING_SIZE] {
        for base in BASES {
            let driver = Driver::new(size, base);
            for jump in [size.wrapping_add(1), 65535, 32769] {
                if jump > size {
                    let to = base.wrapping_add(jump);
                    driver.set_available_index(to);
                    assert_eq!(fault(&driver), RingFault::AvailableJump { from: base, to, size });
                    assert!(driver.start().pending().is_err() && driver.start().arm().is_err());
                }
            }
        }
    }
}

#[test]
fn rule_02_a_ringful_is_taken_whole_at_every_base() {
    for base in BASES {
        let mut driver = Driver::new(256, base);
        (0..256).for_each(|index| driver.set_descriptor(index, buffer(DATA + 64 * u64::from(index), 64)));
        driver.offer(&(0..256).collect::<Vec<_>>());
        let mut ring = driver.start();
        assert_eq!(ring.pending(), Ok(256));
        for batch in 0..4 {
            let chains = driver.gather::<Readable>(&mut ring).unwrap();
            let heads: Vec<_> = chains.list().iter().map(|chain| chain.head).collect();
            assert_eq!(heads, (64 * batch..64 * (batch + 1)).collect::<Vec<_>>());
        }
        assert_eq!(ring.base(), base.wrapping_add(256));
        assert_eq!(ring.pending(), Ok(0));
    }
}

#[test]
fn rule_02_an_index_that_moves_back_is_a_fault() {
    let mut driver = Driver::new(8, 65535);
    (0..8).for_each(|index| driver.set_descriptor(index, buffer(DATA, 1)));
    driver.offer(&[0, 1, 2, 3]);
    let mut ring = driver.start();
    assert_eq!(driver.gather::<Readable>(&mut ring).unwrap().list().len(), 4);
    driver.set_available_index(1);
    assert_eq!(ring.pending(), Err(RingFault::AvailableJump { from: 3, to: 1, size: 8 }));
}

#[test]
fn rule_10_what_was_given_back_is_gathered_again_and_nothing_was_published() {
    for base in BASES {
        let mut driver = Driver::new(8, base);
        (0..8).for_each(|index| driver.set_descriptor(index, buffer(DATA + u64::from(index), 1)));
        driver.offer(&[0, 1, 2, 3, 4]);
        let mut ring = driver.start();
        let heads = |ring: &mut SplitRing| {
            let chains = driver.gather::<Readable>(ring).unwrap();
            chains.list().iter().map(|chain| chain.head).collect::<Vec<_>>()
        };
        assert_eq!(heads(&mut ring), [0, 1, 2, 3, 4]);
        ring.give_back(&[Chain::unwalked(0); 3]);
        assert_eq!((ring.base(), ring.pending()), (base.wrapping_add(2), Ok(3)));
        assert_eq!(heads(&mut ring), [2, 3, 4]);
        ring.give_back(&[Chain::unwalked(0); 5]);
        assert_eq!(ring.base(), base);
        assert_eq!((ring.publish(), driver.used_index()), (None, base));
    }
}

#[test]
fn rule_10_a_ringful_on_top_of_what_is_given_back_is_a_fault() {
    for base in BASES {
        let mut driver = Driver::new(8, base);
        (0..8).for_each(|index| driver.set_descriptor(index, buffer(DATA, 1)));
        let mut ring = driver.start();
        driver.offer(&[0, 1, 2, 3]);
        assert_eq!(driver.gather::<Readable>(&mut ring).unwrap().list().len(), 4);
        driver.offer(&[0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(ring.pending(), Ok(8), "no more than a ringful beyond what was taken");
        ring.give_back(&[Chain::unwalked(0); 4]);
        let jump = RingFault::AvailableJump { from: base, to: base.wrapping_add(12), size: 8 };
        assert_eq!(ring.pending(), Err(jump));
        assert_eq!(driver.gather::<Readable>(&mut ring).unwrap_err(), jump);
    }
}

#[test]
fn rule_10_a_limit_is_kept_and_batches_add_up() {
    let mut driver = Driver::new(256, 65500);
    (0..256).for_each(|index| driver.set_descriptor(index, buffer(DATA, 1)));
    driver.offer(&(0..256).collect::<Vec<_>>());
    let (mut ring, mut chains) = (driver.start(), Chains::new());
    for (limit, taken) in [(0, 0), (1, 1), (30, 30), (usize::MAX, BATCH_FRAMES - 31), (9, 0)] {
        assert_eq!(ring.gather::<Readable>(&driver.memory, limit, &mut chains).unwrap(), taken);
    }
    assert_eq!(chains.list().len(), BATCH_FRAMES);
    chains.clear();
    assert_eq!(ring.gather::<Readable>(&driver.memory, 64, &mut chains).unwrap(), 64);
    assert_eq!(ring.base(), 65500u16.wrapping_add(128));
}

#[test]
#[cfg_attr(miri, ignore = "32768 descriptors take minutes there")]
fn rule_12_one_turn_walks_one_chain_of_a_whole_ring_of_empty_descriptors() {
    let mut driver = Driver::new(RING_SIZE, 0);
    for index in 0..RING_SIZE - 1 {
        driver.set_descriptor(index, buffer(HOLE, 0).then(index + 1));
    }
    driver.set_descriptor(RING_SIZE - 1, buffer(HOLE, 0));
    driver.offer(&[0; 200]);
    let mut ring = driver.start();
    for _ in 0..3 {
        assert_eq!(driver.gather::<Readable>(&mut ring).unwrap().list().len(), 1);
    }
}

#[test]
fn rule_12_no_chain_begins_beyond_the_budget_of_descriptors() {
    let mut driver = Driver::new(256, 0);
    (0..255).for_each(|index| driver.set_descriptor(index, buffer(HOLE, 0).then(index + 1)));
    driver.set_descriptor(255, buffer(HOLE, 0));
    driver.offer(&[0; 256]);
    let mut ring = driver.start();
    assert_eq!(driver.gather::<Readable>(&mut ring).unwrap().list().len(), BATCH_DESCRIPTORS / 256);
    // The budget is the turn's: the next turn has it again. Tables count as they are walked, not as they are long.
    let mut driver = Driver::new(256, 0);
    let mut table: Vec<_> = (0..255).map(|index| buffer(HOLE, 0).then(index + 1)).collect();
    table.push(buffer(HOLE, 0));
    let table = driver.set_table(DATA, &table);
    driver.set_descriptor(0, table);
    driver.offer(&[0; 256]);
    let mut ring = driver.start();
    for _ in 0..2 {
        let chains = driver.gather::<Readable>(&mut ring).unwrap();
        assert_eq!(chains.list().len(), BATCH_DESCRIPTORS.div_ceil(257));
    }
}

#[test]
fn rule_12_no_chain_begins_beyond_the_budget_of_bytes() {
    let mut driver = Driver::new(256, 0);
    driver.set_descriptor(0, buffer(DATA, DATA_BYTES as u32));
    driver.offer(&[0; 256]);
    let mut ring = driver.start();
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    assert_eq!(chains.list().len(), BATCH_BYTES / DATA_BYTES);
    driver.set_descriptor(0, buffer(DATA, 2 * DATA_BYTES as u32));
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    assert_eq!(chains.list().len(), BATCH_BYTES / (2 * DATA_BYTES), "across regions as well");
}

#[test]
fn rule_12_room_for_a_whole_chain_is_kept() {
    let mut driver = Driver::new(256, 0);
    (0..99).for_each(|index| driver.set_descriptor(index, buffer(DATA, 1).then(index + 1)));
    driver.set_descriptor(99, buffer(DATA, 1));
    driver.offer(&[0; 8]);
    let mut ring = driver.start();
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    // 512 pieces of room; after three chains 212 are left, fewer than one chain may have.
    assert_eq!(chains.list().len(), 3);
    assert!(chains.list().iter().all(|chain| chains.pieces(chain).len() == 100));
}
