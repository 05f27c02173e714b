//! A front end that has lost track takes what its guest sends while nobody is connected, from where the ring began: nothing is left
//! to nobody, wherever that is and wherever in a publication we died.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use super::bases;
use super::record::{open, place, resumed, use_some};
use crate::ring::driver::{DATA, WRITE, buffer};
use crate::ring::packed_driver::{AVAIL, PackedDriver, Position, USED};
use crate::ring::record::Element;
use crate::ring::{DeviceRing, PackedRing, Records, Writable};

/// Gives back up to `most` chains of `slots` descriptors each, from `base` on, as QEMU does while nobody is connected
/// (hw/virtio/virtio.c: virtqueue_packed_drop_all); the base that it says from then on.
fn front_end_takes(driver: &PackedDriver, base: u16, slots: u16, most: u16) -> u16 {
    let mut at = Position::of(base);
    for _ in 0..most {
        let last = at.on(slots - 1, driver.config.size).slot;
        let ((.., flags), (_, id, _)) = (driver.tail(at.slot), driver.tail(last));
        if flags & (AVAIL | USED) != at.available() {
            break;
        }
        let used = if at.wrap { AVAIL | USED } else { 0 };
        let word = u64::from(id) << 32 | u64::from(used) << 48;
        driver.write(driver.config.descriptors + 16 * u64::from(at.slot) + 8, &word.to_le_bytes());
        at = at.on(slots, driver.config.size);
    }
    at.word()
}

/// Has the driver offer `count` chains of `slots` descriptors.
fn offer(driver: &mut PackedDriver, slots: u16, count: u16) {
    for _ in 0..count {
        let id = driver.next.slot;
        driver.offer(&vec![buffer(DATA, 64).with(WRITE); slots.into()], id);
    }
}

/// Gathers and publishes all that is available.
fn serve(driver: &PackedDriver, ring: &mut PackedRing) -> usize {
    let chains = driver.gather::<Writable>(ring).unwrap().list().to_vec();
    chains.iter().for_each(|chain| ring.complete(chain, 60));
    ring.publish();
    chains.len()
}

/// A ring of `size` that began at `base` and stands `stood` chains further; `offered` more are available, and the front end takes
/// `taken` from where it began. Returns whether it found any.
fn overtaken(records: &Arc<Records>, [size, base, slots, stood, offered, taken]: [u16; 6]) -> bool {
    records.forget(0);
    let mut driver = PackedDriver::new(size, base);
    let mut ring = resumed(&driver, records.record(0, size).unwrap());
    for _ in 0..stood {
        offer(&mut driver, slots, 1);
        assert_eq!(serve(&driver, &mut ring), 1);
        driver.take_used();
    }
    offer(&mut driver, slots, offered);
    drop(ring);
    driver.config.base = front_end_takes(&driver, base, slots, taken);
    let moved = driver.config.base != base;
    let mut returned = 0;
    // It comes back to one of us that dies at once, and to another one.
    for _ in 0..2 {
        let ring = resumed(&driver, records.record(0, size).unwrap());
        assert!(!ring.is_misplaced());
        assert!(!moved || ring.base() == driver.config.base);
        returned += driver.take_used().len();
    }
    let mut ring = resumed(&driver, records.record(0, size).unwrap());
    let rest = serve(&driver, &mut ring);
    returned += driver.take_used().len();
    assert_eq!(returned, usize::from(offered), "{size} from {base:#x}: {stood}, {offered}, {taken}, {slots} slots");
    assert!(moved || rest == usize::from(offered));
    offer(&mut driver, slots, size / slots);
    assert_eq!(serve(&driver, &mut ring), usize::from(size / slots));
    assert_eq!(driver.take_used().len(), usize::from(size / slots));
    moved
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn what_a_front_end_leaves_behind_it_is_given_back() {
    let (_directory, path) = place();
    let records = open(&path);
    let mut moved = 0;
    for base in bases(6) {
        for stood in 0..=13 {
            for offered in 0..=6 {
                for taken in [1, 2, 6] {
                    moved += u32::from(overtaken(&records, [6, base, 1, stood, offered, taken]));
                }
            }
        }
    }
    for (stood, offered, taken) in [(4, 3, 1), (4, 3, 3), (5, 3, 2), (3, 3, 3), (6, 2, 1)] {
        moved += u32::from(overtaken(&records, [6, 0x8000, 2, stood, offered, taken]));
    }
    assert!(moved > 300, "{moved} of them are of what this is about");
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn so_is_what_was_being_published_when_we_died() {
    for count in 1..=4u16 {
        for written in 0..=count + 1 {
            for ahead in 0..=2 {
                let (_directory, path) = place();
                let records = open(&path);
                let mut driver = PackedDriver::new(8, 0x8000);
                let mut ring = resumed(&driver, records.record(0, 8).unwrap());
                // Up to one lap or so from where it began with the same wrap counter.
                for _ in 0..16 - count - ahead {
                    use_some(&mut driver, &mut ring, 1);
                    ring.publish();
                    driver.take_used();
                }
                let before = Position::of(ring.base());
                use_some(&mut driver, &mut ring, count);
                drop(ring);
                let dying = records.record(0, 8).unwrap();
                dying.begin(before.word(), before.on(count, 8).word(), count);
                for at in (count - written.min(count)..count).rev() {
                    let Element { slot, word } = dying.element(at).unwrap();
                    driver.write(driver.config.descriptors + 16 * u64::from(slot) + 8, &word.to_le_bytes());
                }
                let seen = if written > count { driver.take_used().len() } else { 0 };
                (0..ahead + 2).for_each(|_| driver.offer_one(buffer(DATA, 64).with(WRITE)));
                driver.config.base = front_end_takes(&driver, 0x8000, 1, 8);
                assert_eq!(driver.config.base, 0x8002);
                let ring = resumed(&driver, dying);
                assert_eq!(ring.base(), 0x8002, "{count}, {written} written, {ahead} more");
                let used = driver.take_used();
                assert_eq!(
                    used.len() + seen,
                    usize::from(count + ahead + 2),
                    "{count}, {written} written, {ahead} more"
                );
                assert!(used.iter().take(usize::from(count) - seen).all(|&(_, len)| len == 60));
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn a_ring_whose_front_end_knows_better_stays_as_it_is() {
    let (_directory, path) = place();
    let records = open(&path);
    for base in 0..8u16 {
        for base in [base, base | 0x8000] {
            let mut driver = PackedDriver::new(8, 0x8000);
            let mut ring = resumed(&driver, records.record(0, 8).unwrap());
            use_some(&mut driver, &mut ring, 5);
            ring.publish();
            drop(ring);
            // Made anew there, with three available.
            let other = PackedDriver::new(8, base);
            driver.write(driver.config.descriptors, &all(&other));
            (driver.next, driver.seen) = (other.next, other.seen);
            driver.config.base = base;
            (0..3).for_each(|_| driver.offer_one(buffer(DATA, 64).with(WRITE)));
            let before = all(&driver);
            let ring = resumed(&driver, records.record(0, 8).unwrap());
            if base != 0x8000 {
                assert_eq!(all(&driver), before, "{base:#x}");
            }
            assert_eq!(ring.base(), base);
            assert!(!ring.is_misplaced());
        }
    }
}

/// The descriptors.
fn all(driver: &PackedDriver) -> [u8; 128] {
    let mut bytes = [0; 128];
    driver.memory.span(driver.config.descriptors, 128, &mut 0).unwrap().read(&mut bytes);
    bytes
}
