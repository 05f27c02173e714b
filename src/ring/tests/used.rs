//! Rules 11 and 14: the used ring, and who is notified when.

#![allow(clippy::unwrap_used)]

use super::BASES;
use crate::ring::driver::{DATA, Driver, buffer};
use crate::ring::{Chain, DeviceRing, Readable, SplitRing};

#[test]
fn rule_11_nothing_is_visible_before_it_is_published() {
    let mut driver = Driver::new(4, 65534);
    let mut ring = driver.start();
    ring.complete(&Chain::unwalked(3), 64);
    ring.complete(&Chain::unwalked(1), 0);
    ring.complete(&Chain::unwalked(2), u32::MAX);
    assert_eq!(driver.used_index(), 65534);
    assert_eq!(ring.publish(), Some(true));
    assert_eq!(driver.used_index(), 1);
    assert_eq!(driver.take_used(), [(3, 64), (1, 0), (2, u32::MAX)]);
    assert_eq!(ring.publish(), None);
}

#[test]
fn rule_11_a_ring_goes_on_at_its_used_index_whatever_the_base() {
    for base in BASES {
        let mut driver = Driver::new(8, base);
        driver.set_descriptor(0, buffer(DATA, 1));
        driver.offer(&[0, 0, 0]);
        for stale in [base.wrapping_sub(6400), base.wrapping_sub(1), base, base.wrapping_add(3)] {
            driver.config.base = stale;
            let mut ring = driver.start();
            ring.resume();
            assert_eq!((ring.base(), ring.pending()), (base, Ok(3)), "told to start at {stale}");
        }
        // A used index that the driver cannot have seen proves nothing, so the base stands.
        driver.config.base = base.wrapping_add(1);
        driver.write(driver.config.used + 2, &base.wrapping_sub(6).to_le_bytes());
        let mut ring = driver.start();
        ring.resume();
        assert_eq!((ring.base(), ring.pending()), (base.wrapping_add(1), Ok(2)));
    }
}

#[test]
#[cfg_attr(miri, ignore = "65536 rounds take minutes there")]
fn rule_11_the_index_wraps_round_at_16_bits_for_every_size() {
    for size in [1, 2, 16, 1024] {
        let mut driver = Driver::new(size, 65000);
        driver.set_descriptor(0, buffer(DATA, 1));
        let mut ring = driver.start();
        for round in 0..66_000u32 {
            driver.offer(&[0]);
            assert_eq!(driver.gather::<Readable>(&mut ring).unwrap().list().len(), 1);
            ring.complete(&Chain::unwalked(0), round);
            assert_eq!(ring.publish(), Some(true));
            assert_eq!(driver.take_used(), [(0, round)]);
        }
        assert_eq!(driver.used_index(), 65000u16.wrapping_add(66_000u32 as u16));
    }
}

#[test]
fn rule_11_it_goes_on_where_the_ring_in_memory_stands() {
    let driver = Driver::new(16, 9);
    driver.write(driver.config.used + 2, &777u16.to_le_bytes());
    let mut ring = driver.start();
    ring.complete(&Chain::unwalked(5), 6);
    ring.publish();
    assert_eq!(driver.used_index(), 778);
    assert_eq!(driver.read::<8>(driver.config.used + 4 + 8 * (777 % 16)), [5, 0, 0, 0, 6, 0, 0, 0]);
}

#[test]
fn rule_11_it_stays_within_its_area() {
    let driver = Driver::new(8, 0);
    let end = driver.config.used + 6 + 8 * 8;
    driver.write(end, &[0xaa; 16]);
    driver.write(driver.config.used - 2, &[0xbb; 2]);
    let mut ring = driver.start();
    (0..100).for_each(|_| ring.complete(&Chain::unwalked(0xffff), 0xffff_ffff));
    ring.publish();
    assert_eq!(driver.read::<16>(end), [0xaa; 16]);
    assert_eq!(driver.read::<2>(driver.config.used - 2), [0xbb; 2]);
    assert_eq!(driver.available_event(), 0);
}

/// vring_need_event, word for word (virtio 1.3, 2.7.7.2.1).
fn need_event(event_idx: u16, new_idx: u16, old_idx: u16) -> bool {
    new_idx.wrapping_sub(event_idx).wrapping_sub(1) < new_idx.wrapping_sub(old_idx)
}

fn publish(ring: &mut SplitRing, count: u16) -> Option<bool> {
    (0..count).for_each(|_| ring.complete(&Chain::unwalked(0), 0));
    ring.publish()
}

#[test]
fn rule_14_without_event_index_the_flag_decides() {
    let driver = Driver::new(8, 65535);
    let mut ring = driver.start();
    for (flags, wanted) in [(0, true), (1, false), (0xfffe, true), (0xffff, false), (0, true)] {
        driver.set_flags(flags);
        assert_eq!(publish(&mut ring, 1), Some(wanted));
    }
}

#[test]
fn rule_14_with_event_index_the_first_interrupt_is_unconditional_and_the_flag_means_nothing() {
    for event in [0, 1, 9, 65535] {
        let driver = Driver::with_event_index(8, 9);
        driver.set_flags(1);
        driver.set_used_event(event);
        let mut ring = driver.start();
        assert_eq!(ring.publish(), None);
        assert_eq!(publish(&mut ring, 1), Some(true));
        assert_eq!(publish(&mut ring, 1), Some(need_event(event, 11, 10)));
    }
}

#[test]
fn rule_14_every_event_index_is_answered_by_the_formula() {
    for base in BASES {
        for count in [1, 2, 7, 8] {
            let driver = Driver::with_event_index(8, base);
            let mut ring = driver.start();
            publish(&mut ring, 1);
            let mut old = base.wrapping_add(1);
            for offset in [0, 1, 2, 3, 7, 8, 9, 32768, 65527, 65534, 65535] {
                let event = old.wrapping_add(offset);
                driver.set_used_event(event);
                let new = old.wrapping_add(count);
                assert_eq!(publish(&mut ring, count), Some(need_event(event, new, old)), "{event} {old} {new}");
                old = new;
            }
        }
    }
}

#[test]
fn rule_14_an_event_that_is_passed_while_interrupts_are_asked_late_is_not_lost() {
    let driver = Driver::with_event_index(8, 0);
    let mut ring = driver.start();
    publish(&mut ring, 1);
    driver.set_used_event(3);
    let wanted: Vec<_> = (0..5).map(|_| publish(&mut ring, 1)).collect();
    assert_eq!(wanted, [Some(false), Some(false), Some(true), Some(false), Some(false)]);
}

#[test]
fn rule_14_asking_for_notifications_without_event_index_is_a_flag() {
    let driver = Driver::new(8, 0);
    let mut ring = driver.start();
    ring.disarm();
    assert_eq!(driver.used_flags(), 1);
    assert_eq!(ring.arm(), Ok(true));
    assert_eq!((driver.used_flags(), driver.available_event()), (0, 0));
}

#[test]
fn rule_14_asking_for_notifications_with_event_index_is_an_index_and_leaves_the_flag() {
    let mut driver = Driver::with_event_index(8, 65535);
    driver.set_descriptor(0, buffer(DATA, 1));
    let mut ring = driver.start();
    ring.disarm();
    assert_eq!(driver.used_flags(), 0);
    assert_eq!((ring.arm(), driver.available_event()), (Ok(true), 65535));
    driver.offer(&[0, 0]);
    driver.gather::<Readable>(&mut ring).unwrap();
    assert_eq!((ring.arm(), driver.available_event()), (Ok(true), 1));
}

#[test]
fn rule_14_arming_sees_what_came_in_between() {
    for mut driver in [Driver::new(8, 65535), Driver::with_event_index(8, 65535)] {
        driver.set_descriptor(0, buffer(DATA, 1));
        let mut ring = driver.start();
        assert_eq!(ring.pending(), Ok(0));
        driver.offer(&[0]);
        assert_eq!(ring.arm(), Ok(false));
        assert_eq!(ring.pending(), Ok(1));
        assert_eq!(driver.gather::<Readable>(&mut ring).unwrap().list().len(), 1);
        assert_eq!(ring.arm(), Ok(true));
    }
}
