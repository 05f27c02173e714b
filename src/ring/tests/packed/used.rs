//! What a packed ring writes: used descriptors, and when it interrupts and asks for notifications.

#![allow(clippy::unwrap_used)]

use super::{SIZES, bases};
use crate::ring::driver::{DATA, WRITE, buffer};
use crate::ring::packed_driver::{AVAIL, PackedDriver, Position, USED};
use crate::ring::{DeviceRing, PackedRing, Readable, Writable};

/// Event suppression flags (virtio 1.3, 2.8.10).
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const DESC: u16 = 2;

/// Offers `count` buffers and has the device use them; returns what publishing said.
fn exchange(driver: &mut PackedDriver, ring: &mut PackedRing, count: u16) -> Option<bool> {
    (0..count).for_each(|_| driver.offer_one(buffer(DATA, 1)));
    let chains = driver.gather::<Readable>(ring).unwrap().list().to_vec();
    assert_eq!(chains.len(), usize::from(count));
    chains.iter().for_each(|chain| ring.complete(chain, 0));
    let published = ring.publish();
    assert_eq!(driver.take_used().len(), usize::from(count));
    published
}

#[test]
fn rule_11_ids_and_lengths_come_back_through_many_rounds_at_every_size_and_base() {
    for size in SIZES {
        for base in bases(size) {
            let mut driver = PackedDriver::new(size, base);
            let (mut ring, mut id) = (driver.start(), 0u16);
            for round in 0..3 * u32::from(size).min(70) + 3 {
                let chains = 1 + round as u16 % size.min(60);
                let mut expected = Vec::new();
                let mut slots = 0;
                for _ in 0..chains {
                    let pieces = 1 + id % 3;
                    if slots + pieces > size {
                        break;
                    }
                    slots += pieces;
                    driver.offer(&vec![buffer(DATA, 9).with(WRITE); pieces.into()], id);
                    expected.push((id, round + u32::from(id)));
                    id = id.wrapping_add(1);
                }
                let gathered = driver.gather::<Writable>(&mut ring).unwrap();
                for (chain, (id, written)) in gathered.list().iter().zip(&expected) {
                    assert_eq!(chain.head, *id);
                    ring.complete(chain, *written);
                }
                drop(gathered);
                ring.publish();
                assert_eq!(driver.take_used(), expected, "{size} from {base:#x}, round {round}");
                assert_eq!(driver.seen, driver.next);
            }
        }
    }
}

#[test]
fn rule_11_nothing_is_visible_before_it_is_published() {
    let mut driver = PackedDriver::new(8, 0x8006);
    for id in 0..4 {
        driver.offer(&[buffer(DATA, 64), buffer(DATA, 64)], id);
    }
    let mut ring = driver.start();
    let before: Vec<_> = (0..8).map(|slot| driver.tail(slot)).collect();
    let chains = driver.gather::<Readable>(&mut ring).unwrap().list().to_vec();
    chains.iter().take(3).for_each(|chain| ring.complete(chain, 5));
    assert_eq!((0..8).map(|slot| driver.tail(slot)).collect::<Vec<_>>(), before);
    assert_eq!(ring.publish(), Some(true));
    // One descriptor per chain, the first of each, and no other.
    let after: Vec<_> = (0..8).map(|slot| driver.tail(slot)).collect();
    assert_eq!((after[6], after[0], after[2]), ((5, 0, AVAIL | USED | WRITE), (5, 1, WRITE), (5, 2, WRITE)));
    assert_eq!(
        [after[7], after[1], after[3], after[4], after[5]],
        [before[7], before[1], before[3], before[4], before[5]]
    );
    assert_eq!(ring.publish(), None);
    ring.give_back(&chains[3..]);
    assert_eq!(driver.take_used(), [(0, 5), (1, 5), (2, 5)]);
}

#[test]
fn in_order_what_was_only_read_comes_back_as_one() {
    for base in bases(7) {
        let mut driver = PackedDriver::new(7, base);
        driver.config.in_order = true;
        let mut ring = driver.start();
        for count in [3, 1, 2, 3, 3] {
            let first = driver.next;
            let mut expected = Vec::new();
            for index in 0..count {
                let id = driver.next.slot;
                driver.offer(&vec![buffer(DATA, 5); 1 + index % 2], id);
                expected.push(id);
            }
            let chains = driver.gather::<Readable>(&mut ring).unwrap().list().to_vec();
            chains.iter().for_each(|chain| ring.complete(chain, 0));
            assert_eq!(ring.publish(), Some(true));
            let used = if first.wrap { AVAIL | USED } else { 0 };
            assert_eq!(driver.tail(first.slot), (0, *expected.last().unwrap(), used));
            assert_eq!(driver.take_used_in_order(), expected);
            assert_eq!((driver.seen, driver.seen.word()), (driver.next, ring.base()));
        }
    }
}

#[test]
fn in_order_what_was_written_comes_back_one_by_one() {
    let mut driver = PackedDriver::new(7, 0x8000);
    driver.config.in_order = true;
    let mut ring = driver.start();
    for _ in 0..5 {
        let ids: Vec<_> = (0..3)
            .map(|_| {
                let id = driver.next.slot;
                driver.offer(&[buffer(DATA, 64).with(WRITE)], id);
                id
            })
            .collect();
        let chains = driver.gather::<Writable>(&mut ring).unwrap().list().to_vec();
        // A chain that holds nothing of a frame is completed with nothing written.
        chains.iter().zip([64, 0, 0]).for_each(|(chain, written)| ring.complete(chain, written));
        ring.publish();
        assert_eq!(driver.take_used(), ids.into_iter().zip([64, 0, 0]).collect::<Vec<_>>());
    }
}

#[test]
fn rule_14_flags_decide_and_what_is_none_of_them_asks_for_nothing() {
    for event_idx in [false, true] {
        let mut driver = PackedDriver::new(8, 0x8000);
        driver.config.event_idx = event_idx;
        let mut ring = driver.start();
        for (flags, wanted) in [(ENABLE, true), (DISABLE, false), (3, false), (0xffff, false), (ENABLE, true)] {
            driver.set_event(0x8005, flags);
            assert_eq!(exchange(&mut driver, &mut ring, 1), Some(wanted), "{flags}");
        }
    }
    // An index that was not negotiated is none of them either.
    let mut driver = PackedDriver::new(8, 0x8000);
    let mut ring = driver.start();
    driver.set_event(0x8000, DESC);
    assert_eq!(exchange(&mut driver, &mut ring, 1), Some(false));
}

#[test]
fn rule_14_the_first_interrupt_by_index_is_unconditional() {
    for event in [0, 0x8007, 0xffff] {
        let mut driver = PackedDriver::new(8, 0x8000);
        driver.config.event_idx = true;
        let mut ring = driver.start();
        driver.set_event(event, DESC);
        assert_eq!(exchange(&mut driver, &mut ring, 1), Some(true));
        assert_eq!(exchange(&mut driver, &mut ring, 1), Some(false));
    }
}

#[test]
fn rule_14_an_index_is_passed_when_its_descriptor_is_used() {
    for size in [1, 2, 5, 8] {
        for base in bases(size) {
            for count in 1..=size {
                for event in 0..size {
                    for wrap in [0, 0x8000] {
                        let mut driver = PackedDriver::new(size, base);
                        driver.config.event_idx = true;
                        let mut ring = driver.start();
                        driver.set_event(0, DESC);
                        exchange(&mut driver, &mut ring, 1);
                        let mut passed = Vec::new();
                        let mut at = driver.next;
                        for _ in 0..count {
                            passed.push(at.word());
                            at = at.next(size);
                        }
                        driver.set_event(event | wrap, DESC);
                        let wanted = exchange(&mut driver, &mut ring, count);
                        assert_eq!(
                            wanted,
                            Some(passed.contains(&(event | wrap))),
                            "{size} {base:#x} {count} {event} {wrap}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn rule_14_any_index_is_survived() {
    for size in [1, 3, 300] {
        let mut driver = PackedDriver::new(size, 0);
        driver.config.event_idx = true;
        let mut ring = driver.start();
        for event in (0..=u16::MAX).step_by(251).chain([u16::MAX, 0x7fff]) {
            driver.set_event(event, DESC);
            assert!(exchange(&mut driver, &mut ring, 1).is_some());
        }
    }
}

#[test]
fn rule_14_arming_says_where_and_sees_what_came_in_between() {
    for (event_idx, base) in [(false, 0x8007), (true, 0x8007), (true, 3)] {
        let mut driver = PackedDriver::new(8, base);
        driver.config.event_idx = event_idx;
        let mut ring = driver.start();
        ring.disarm();
        assert_eq!(driver.device_event().1, DISABLE);
        assert_eq!(ring.arm(), Ok(true));
        assert_eq!(driver.device_event(), if event_idx { (base, DESC) } else { (0, ENABLE) });
        driver.offer_one(buffer(DATA, 1));
        assert_eq!(ring.arm(), Ok(false));
        let chains = driver.gather::<Readable>(&mut ring).unwrap().list().to_vec();
        assert_eq!(ring.arm(), Ok(true));
        let next = Position::of(base).next(8).word();
        assert_eq!(driver.device_event(), if event_idx { (next, DESC) } else { (0, ENABLE) });
        ring.complete(&chains[0], 0);
        assert_eq!(ring.publish(), Some(true));
    }
}
