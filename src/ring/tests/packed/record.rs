//! A ring goes on where it stood when its front end has lost track, wherever in a publication we died; and only then.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bases;
use crate::ring::driver::{DATA, WRITE, buffer};
use crate::ring::packed_driver::{AVAIL, PackedDriver, Position, USED};
use crate::ring::record::Element;
use crate::ring::{DeviceRing, PackedRing, Record, Records, Writable};
use crate::sys::eventfd::EventFd;

/// A directory for records and the file in it.
fn place() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("rings").join("vm1");
    (directory, path)
}

fn open(path: &Path) -> Arc<Records> {
    Records::open(path, 2, Arc::new(EventFd::new().unwrap())).unwrap()
}

fn resumed(driver: &PackedDriver, record: Record) -> PackedRing {
    let mut ring = driver.start();
    ring.resume(record);
    ring
}

/// Has the driver offer `count` buffers and the device use them, unpublished.
fn use_some(driver: &mut PackedDriver, ring: &mut PackedRing, count: u16) {
    for _ in 0..count {
        driver.offer_one(buffer(DATA, 64).with(WRITE));
    }
    let chains = driver.gather::<Writable>(ring).unwrap().list().to_vec();
    assert_eq!(chains.len(), usize::from(count));
    chains.iter().for_each(|chain| ring.complete(chain, 60));
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn a_ring_goes_on_where_it_stood() {
    for size in [1, 5, 8, 300] {
        for base in bases(size) {
            let (_directory, path) = place();
            let mut driver = PackedDriver::new(size, base);
            let mut stood = base;
            for round in 0..20u16 {
                // A daemon of its own each time; the front end says what it said at first.
                let records = open(&path);
                let mut ring = resumed(&driver, records.record(1, size).unwrap());
                assert_eq!(ring.base(), stood, "{size} from {base:#x}, round {round}");
                let count = round % size.min(7);
                use_some(&mut driver, &mut ring, count);
                ring.publish();
                // These are taken, and nothing of them is seen before we die.
                driver.take_used();
                use_some(&mut driver, &mut ring, 1);
                stood = Position::of(stood).on(count, size).word();
                drop(ring);
                drop(records);
                let records = open(&path);
                let mut ring = resumed(&driver, records.record(1, size).unwrap());
                let chains = driver.gather::<Writable>(&mut ring).unwrap().list().to_vec();
                assert_eq!(chains.len(), 1, "what was not published is available as before");
                ring.complete(&chains[0], 9);
                ring.publish();
                assert_eq!(driver.take_used().len(), 1);
                stood = Position::of(stood).on(1, size).word();
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn a_publication_is_finished_wherever_it_was_when_we_died() {
    for base in bases(8) {
        for count in 1..=8u16 {
            for written in 0..=count + 1 {
                let (_directory, path) = place();
                let records = open(&path);
                let mut driver = PackedDriver::new(8, base);
                let mut ring = resumed(&driver, records.record(0, 8).unwrap());
                use_some(&mut driver, &mut ring, 3);
                ring.publish();
                driver.take_used();
                let before = Position::of(ring.base());
                use_some(&mut driver, &mut ring, count);
                drop(ring);
                let dying = records.record(0, 8).unwrap();
                let target = before.on(count, 8);
                dying.begin(before.word(), target.word(), count);
                for at in (count - written.min(count)..count).rev() {
                    let Element { slot, word } = dying.element(at).unwrap();
                    driver.write(driver.config.descriptors + 16 * u64::from(slot) + 8, &word.to_le_bytes());
                }
                let mut seen = 0;
                if written > count {
                    // The driver saw all of it, and made some of it available anew.
                    seen = driver.take_used().len();
                    (0..count / 2).for_each(|_| driver.offer_one(buffer(DATA, 64).with(WRITE)));
                }
                let mut ring = resumed(&driver, dying);
                assert_eq!(ring.base(), target.word(), "{count} from {base:#x}, {written} written");
                let used: Vec<_> = driver.take_used();
                assert_eq!(used.len() + seen, usize::from(count), "{count} from {base:#x}, {written} written");
                assert!(used.iter().all(|&(_, len)| len == 60));
                let left = if written > count { count / 2 } else { 0 };
                assert_eq!(driver.gather::<Writable>(&mut ring).unwrap().list().len(), usize::from(left));
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn the_front_end_knows_better() {
    let (_directory, path) = place();
    let records = open(&path);
    let left = || {
        let mut driver = PackedDriver::new(8, 0x8000);
        let mut ring = resumed(&driver, records.record(0, 8).unwrap());
        use_some(&mut driver, &mut ring, 3);
        ring.publish();
        driver
    };
    let base = |driver: &PackedDriver| resumed(driver, records.record(0, 8).unwrap()).base();
    let driver = left();
    assert_eq!(base(&driver), 0x8003);
    records.forget(0);
    assert_eq!(base(&driver), 0x8000, "it asked for the base, so it has it");
    let mut driver = left();
    driver.config.base = 5;
    assert_eq!(base(&driver), 5, "another base is of a ring that came from elsewhere");
    let mut driver = left();
    driver.config.used += 4;
    assert_eq!(base(&driver), 0x8000, "another place");
    let driver = left();
    driver.write(driver.config.descriptors, &[0; 8 * 16]);
    assert_eq!(base(&driver), 0x8000, "a ring that was made anew at the same place");
    let driver = left();
    driver.write(driver.config.descriptors, &[0; 8 * 16]);
    (0..8).for_each(|slot| driver.set_flags(slot, AVAIL | WRITE));
    assert_eq!(base(&driver), 0x8000, "and filled");
    let driver = left();
    driver.set_flags(3, AVAIL | USED);
    assert_eq!(base(&driver), 0x8000, "used where nothing can be");
    assert!(path.exists());
    records.forget(0);
    drop(records);
    assert!(!path.exists(), "nothing is kept where nothing is to be said");
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn a_record_that_was_scribbled_over_is_survived() {
    let (_directory, path) = place();
    let records = open(&path);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..2000 {
        let mut driver = PackedDriver::new(5, 0x8000);
        let mut ring = resumed(&driver, records.record(0, 5).unwrap());
        use_some(&mut driver, &mut ring, 2);
        ring.publish();
        use_some(&mut driver, &mut ring, 1);
        drop(ring);
        let record = records.record(0, 5).unwrap();
        record.set_element((random() % 5) as u16, Element { slot: random() as u16, word: random() });
        record.begin((random() % 7) as u16 | 0x8000, random() as u16 & 0x8007, (random() % 7) as u16);
        let ring = resumed(&driver, record);
        assert!(ring.base() & 0x7fff < 5);
    }
}
