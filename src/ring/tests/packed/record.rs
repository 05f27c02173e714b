//! A ring goes on where it stood when its front end has lost track, wherever in a publication we died; and only then.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bases;
use crate::ring::driver::{DATA, WRITE, buffer};
use crate::ring::packed_driver::{AVAIL, PackedDriver, Position, USED};
use crate::ring::record::Element;
use crate::ring::{DeviceRing, PackedRing, Record, Records, RecordsError, Writable};
use crate::sys::eventfd::EventFd;
use crate::sys::mapped_file::FileIdentity;
use crate::sys::process_identity::ProcessIdentity;

/// A directory for records and the file in it.
pub(super) fn place() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("rings").join("vm1");
    (directory, path)
}

pub(super) fn open(path: &Path) -> Arc<Records> {
    try_open(path).unwrap()
}

pub(super) fn try_open(path: &Path) -> Result<Arc<Records>, RecordsError> {
    let (directory, name) = (path.parent().unwrap(), path.file_name().unwrap().to_str().unwrap());
    Records::open(directory, name, 2, Arc::new(EventFd::new().unwrap()))
}

pub(super) fn resumed(driver: &PackedDriver, record: Record) -> PackedRing {
    let mut ring = driver.start();
    ring.resume(record);
    ring
}

/// Has the driver offer `count` buffers and the device use them, unpublished.
pub(super) fn use_some(driver: &mut PackedDriver, ring: &mut PackedRing, count: u16) {
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
        // The front end has lost track or says another base.
        driver.config.base = [0x8000, 3, 0x8004][(random() % 3) as usize];
        let ring = resumed(&driver, record);
        assert!(ring.base() & 0x7fff < 5);
    }
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn a_ring_that_was_restored_before_what_is_written_down_goes_on_where_its_front_end_says() {
    let (_directory, path) = place();
    let records = open(&path);
    let mut driver = PackedDriver::new(8, 0x8003);
    let mut saved = [0; 8 * 16];
    driver.memory.span(driver.config.descriptors, 8 * 16, &mut 0).unwrap().read(&mut saved);
    let mut ring = resumed(&driver, records.record(0, 8).unwrap());
    use_some(&mut driver, &mut ring, 3);
    ring.publish();
    assert_eq!(resumed(&driver, records.record(0, 8).unwrap()).base(), 0x8006);
    // The state from before is restored, into the same memory file, and the front end says the same as then.
    driver.write(driver.config.descriptors, &saved);
    let ring = resumed(&driver, records.record(0, 8).unwrap());
    assert_eq!(ring.base(), 0x8003);
    assert!(!ring.is_misplaced());
    // Or into other memory, whatever it looks like.
    let record = records.record(1, 8).unwrap();
    let file = FileIdentity { device: 1, inode: 7, born: 3 };
    record.bind(&driver.config, file, 0x8006, Element::default());
    assert_eq!(record.stand(&driver.config, file).map(|stand| stand.place), Some(0x8006));
    for other in
        [FileIdentity { device: 2, ..file }, FileIdentity { inode: 8, ..file }, FileIdentity { born: 4, ..file }]
    {
        assert_eq!(record.stand(&driver.config, other), None);
    }
}

#[test]
fn a_ring_that_makes_no_sense_is_told_from_one_that_does() {
    for size in [1, 5, 8] {
        for base in bases(size) {
            let mut driver = PackedDriver::new(size, base);
            let mut ring = driver.start();
            assert!(!ring.is_misplaced(), "{size} from {base:#x}, new");
            for round in 0..4 * size {
                use_some(&mut driver, &mut ring, 1);
                ring.publish();
                driver.take_used();
                if round % 2 == 0 && size > 1 {
                    driver.offer_one(buffer(DATA, 64).with(WRITE));
                    driver.config.base = ring.base();
                    assert!(!driver.start().is_misplaced(), "{size} from {base:#x}, with one available");
                    let chains = driver.gather::<Writable>(&mut ring).unwrap().list().to_vec();
                    chains.iter().for_each(|chain| ring.complete(chain, 60));
                    ring.publish();
                    driver.take_used();
                }
                let stood = Position::of(ring.base());
                driver.config.base = stood.word();
                assert!(!driver.start().is_misplaced(), "{size} from {base:#x}, round {round}");
                for far in 1..size {
                    driver.config.base = stood.on(far, size).word();
                    assert!(driver.start().is_misplaced(), "{size} from {base:#x}, {far} too far");
                }
                // One lap on, where every slot is as it is here.
                driver.config.base = stood.word();
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn records_that_others_can_reach_are_refused_and_left_alone() {
    use std::fs::{self, File, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};
    let refused = |path: &Path| try_open(path).unwrap_err().to_string();
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    let (directory, path) = place();
    let rings = path.parent().unwrap();
    let elsewhere = directory.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("vm1"), vec![0x41; 1 << 20]).unwrap();

    symlink(&elsewhere, rings).unwrap();
    assert!(refused(&path).contains("is not a directory"), "{}", refused(&path));
    fs::remove_file(rings).unwrap();
    fs::write(rings, "").unwrap();
    assert!(refused(&path).contains("is not a directory"));
    fs::remove_file(rings).unwrap();
    fs::create_dir(rings).unwrap();
    mode(rings, 0o777);
    assert!(refused(&path).contains("others than its owner may write to"));
    mode(rings, 0o700);
    symlink(elsewhere.join("vm1"), &path).unwrap();
    assert!(refused(&path).contains("is not a regular file"));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(refused(&path).contains("is not a regular file"));
    fs::remove_dir(&path).unwrap();
    fs::hard_link(elsewhere.join("vm1"), &path).unwrap();
    assert!(refused(&path).contains("with one name"));
    fs::remove_file(&path).unwrap();
    fs::write(&path, vec![0x41; 1 << 20]).unwrap();
    mode(&path, 0o666);
    assert!(refused(&path).contains("(mode 0666)"));
    mode(&path, 0o600);
    assert!(refused(&path).contains("was not written by"));
    let left = [&path, &elsewhere.join("vm1")].map(|path| fs::read(path).unwrap());
    assert!(left.iter().all(|bytes| bytes.len() == 1 << 20 && bytes.iter().all(|&byte| byte == 0x41)), "changed");
    fs::remove_file(&path).unwrap();
    if rustix::process::geteuid().is_root() {
        File::create(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
        assert!(refused(&path).contains("belongs to user 65534"));
        fs::remove_file(&path).unwrap();
    }

    let first = open(&path);
    assert!(refused(&path).contains("another process is using"), "{}", refused(&path));
    drop(first);
    open(&path);
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn records_end_with_the_front_end_they_are_of_and_take_no_more_than_is_used() {
    use std::os::unix::fs::MetadataExt;
    // Other file systems than tmpfs allocate more than they are told to.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("rings").join("vm1");
    let records = open(&path);
    let mut driver = PackedDriver::new(300, 0x8000);
    let left = |driver: &mut PackedDriver, records: &Arc<Records>| {
        let mut ring = resumed(driver, records.record(0, 300).unwrap());
        use_some(driver, &mut ring, 3);
        ring.publish();
        driver.take_used();
    };
    let base = |driver: &PackedDriver, records: &Arc<Records>| resumed(driver, records.record(0, 300).unwrap()).base();
    let process = |started| Some(ProcessIdentity { pid: 4711, started });
    records.set_front_end(process(1));
    left(&mut driver, &records);
    assert!(path.metadata().unwrap().blocks() * 512 <= 2 * 4096, "the header, and one page of the ring");
    records.set_front_end(process(1));
    records.set_front_end(None);
    drop(records);
    let records = open(&path);
    assert_eq!(records.front_end(), process(1));
    records.set_front_end(process(1));
    assert_eq!(base(&driver, &records), 0x8003, "the same comes back");
    records.set_front_end(process(2));
    assert_eq!(base(&driver, &records), 0x8000, "another does not");
    records.forget_all();
    drop(records);
    assert!(!path.exists());

    // Somebody cuts the file: the ring runs on, and nothing that is left is believed.
    let records = open(&path);
    let mut driver = PackedDriver::new(300, 0x8000);
    let mut ring = resumed(&driver, records.record(0, 300).unwrap());
    for len in [1 << 20, 4096] {
        std::fs::File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        use_some(&mut driver, &mut ring, 3);
        ring.publish();
        assert_eq!(driver.take_used().len(), 3);
    }
    assert!(records.failed());
    records.abandon();
    drop(ring);
    drop(records);
    assert_eq!(base(&driver, &open(&path)), 0x8000);
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn what_nobody_will_ask_for_is_removed_and_nothing_else() {
    let (_directory, path) = place();
    let directory = path.parent().unwrap();
    Records::sweep(directory);
    assert!(!directory.exists(), "it makes nothing");
    let own = ProcessIdentity::of(std::process::id().cast_signed());
    let ended = own.map(|own| ProcessIdentity { started: own.started + 1, ..own });
    let left = |name: &str, process| {
        let records = open(&directory.join(name));
        records.set_front_end(process);
        // Silent ones go by themselves.
        let mut driver = PackedDriver::new(8, 0x8000);
        let mut ring = resumed(&driver, records.record(0, 8).unwrap());
        use_some(&mut driver, &mut ring, 1);
        ring.publish();
        records
    };
    drop((left("of-one-that-ended", ended), left("of-one-that-runs", own), left("of-one-unseen", None)));
    let open_still = left("of-one-that-ended-with-its-port-there", ended);
    std::fs::write(directory.join("not-ours"), [0x41; 64]).unwrap();
    std::os::unix::fs::symlink("not-ours", directory.join("elsewhere")).unwrap();
    Records::sweep(directory);
    let mut names: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let stay = ["elsewhere", "not-ours", "of-one-that-ended-with-its-port-there", "of-one-that-runs", "of-one-unseen"];
    assert_eq!(names, stay);
    drop(open_still);
    Records::sweep(directory);
    assert!(!directory.join("of-one-that-ended-with-its-port-there").exists());
}
