//! What a fault in a peer's file costs, and what is left of it: seen in this process's table of mappings.

#![allow(clippy::unwrap_used)]
#![allow(unsafe_code)] // Accesses to mappings, as shards make them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::*;
use crate::sys::alone;
use crate::sys::eventfd::EventFd;
use crate::sys::mapped_file::{Backing, MappedFile};
use crate::sys::sigbus::{self, Failure};

const PAGE: usize = 4096;

/// A file of so many pages of `page` bytes, mapped; a byte is in each of the first `full`, and the others are cut off.
struct Mapped {
    file: File,
    mapping: MappedFile,
    page: usize,
    pages: usize,
}

impl Mapped {
    fn new(pages: usize, full: usize) -> Self {
        let mapped = Self::of(pages, PAGE, MemfdFlags::ALLOW_SEALING);
        (0..full).for_each(|page| mapped.set(page, 1));
        mapped.file.set_len((full * PAGE) as u64).unwrap();
        mapped
    }

    fn of(pages: usize, page: usize, flags: MemfdFlags) -> Self {
        let file = memfd_create("pieces", MemfdFlags::CLOEXEC | flags).unwrap();
        ftruncate(&file, (pages * page) as u64).unwrap();
        let file = File::from(file);
        let backing = Backing::of(&file).unwrap();
        let (copy, attention) = (file.try_clone().unwrap(), Arc::new(EventFd::new().unwrap()));
        let mapping = MappedFile::of_peer(copy.into(), &backing, 0, (pages * page) as u64, attention).unwrap();
        Self { file, mapping, page, pages }
    }

    fn range(&self) -> Range<usize> {
        let start = self.mapping.address() as usize;
        start..start + self.pages * self.page
    }

    /// The first byte of a page, as a shard would find it.
    fn get(&self, page: usize) -> u8 {
        assert!(page < self.pages);
        // SAFETY: within the mapping, which lives through the access.
        unsafe { self.mapping.address().add(page * self.page).read_volatile() }
    }

    fn set(&self, page: usize, value: u8) {
        assert!(page < self.pages);
        // SAFETY: as above.
        unsafe { self.mapping.address().add(page * self.page).write_volatile(value) };
    }

    /// The lines of /proc/self/maps that are of it.
    fn mappings(&self) -> Vec<(Range<usize>, String)> {
        mappings(&self.range())
    }

    /// The pages of it that are ours.
    fn replaced(&self) -> Vec<usize> {
        let start = self.range().start;
        let ours = self.mappings().into_iter().filter(|(_, line)| line.contains("linecard-zeros"));
        ours.flat_map(|(range, _)| range.step_by(self.page)).map(|at| (at - start) / self.page).collect()
    }

    fn failed(&self) -> bool {
        self.mapping.failure() == Some(Failure::NoPage)
    }
}

/// The lines of /proc/self/maps in `range`, and what of it each has. The kernel joins zero pages of ours with those of other
/// mappings that happen to be beside them, and may tell of them again when it does so while we read (proc_pid_maps(5)).
fn mappings(range: &Range<usize>) -> Vec<(Range<usize>, String)> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let parsed = maps.lines().map(|line| {
        let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [from, to] = [from, to].map(|address| usize::from_str_radix(address, 16).unwrap());
        (from..to, line.to_owned())
    });
    let mut from = range.start;
    let new = parsed.map(|(mapped, line)| {
        let new = mapped.start.max(from)..mapped.end.min(range.end);
        from = from.max(new.end);
        (new, line)
    });
    new.filter(|(mapped, _)| !mapped.is_empty()).collect()
}

/// How many pages of `range` the table has.
fn noted(range: &Range<usize>) -> usize {
    let addresses = TABLE.iter().map(|place| place.load(Ordering::Relaxed));
    addresses.filter(|address| *address != 0 && range.contains(address)).count()
}

#[test]
fn a_fault_replaces_its_own_page_and_the_rest_stays_the_files() {
    let mapped = Mapped::new(64, 32);
    let before = sigbus::faults();
    assert_eq!((mapped.get(40), mapped.replaced(), mapped.failed()), (0, vec![40], true));
    assert_ne!(sigbus::faults(), before, "shards see that something has failed");
    mapped.set(40, 9);
    mapped.file.set_len(64 * PAGE as u64).unwrap();
    mapped.file.write_all_at(&[7], 50 * PAGE as u64).unwrap();
    assert_eq!([31, 40, 41, 50].map(|page| mapped.get(page)), [1, 9, 0, 7]);
    assert_eq!(mapped.replaced(), [40]);
}

#[test]
fn of_huge_pages_it_is_one_huge_page() {
    let mapped = Mapped::of(16, 2 << 20, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
    mapped.file.set_len(2 << 20).unwrap();
    mapped.set(5, 3);
    mapped.set(9, 4);
    assert_eq!((mapped.get(5), mapped.get(9), mapped.replaced()), (3, 4, vec![5, 9]));
    mapped.mapping.settle();
    assert_eq!((mapped.mappings().len(), mapped.replaced().len(), noted(&mapped.range())), (1, 16, 0));
    assert!(mapped.file.metadata().unwrap().len() == 2 << 20, "settling makes the peer's file no longer");
}

#[test]
fn many_threads_fault_in_neighbouring_pages_at_once() {
    const THREADS: usize = 8;
    // Each thread may note each page, and what other tests note has room beside that.
    const PAGES: usize = 128;
    const _: () = assert!(THREADS * PAGES <= PIECES / 4);
    let mapped = Mapped::new(PAGES, 2);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let mapped = &mapped;
            scope.spawn(move || {
                for round in 0..2 {
                    // Pages that others are at as well, each of them at another byte.
                    for page in 2..mapped.pages {
                        // SAFETY: within the mapping, which lives through the accesses.
                        let byte = unsafe { mapped.mapping.address().add(page * PAGE + 64 * thread) };
                        // SAFETY: as above.
                        unsafe {
                            assert_eq!(byte.read_volatile(), round, "what was put there stays");
                            byte.write_volatile(round + 1);
                        }
                    }
                }
            });
        }
    });
    assert_eq!(mapped.replaced(), (2..PAGES).collect::<Vec<_>>());
    assert_eq!(mapped.mappings().len(), 2, "the kernel joins neighbours");
}

#[test]
fn what_nobody_uses_any_more_is_the_files_again_in_one_mapping() {
    for locked in [false, true] {
        let mapped = Mapped::new(256, 128);
        let range = mapped.range();
        if locked {
            // SAFETY: exactly the mapping; locking changes nothing in it.
            let done = unsafe { libc::mlock2(range.start as *const _, range.len(), libc::MLOCK_ONFAULT) };
            assert_eq!(done, 0);
            mapped.mapping.note_locked(true);
        }
        (128..256).step_by(2).for_each(|page| mapped.set(page, 9));
        assert_eq!((mapped.mappings().len(), noted(&range)), (129, 64));
        mapped.mapping.settle();
        assert_eq!((mapped.mappings().len(), noted(&range), mapped.failed()), (1, 0, true), "locked: {locked}");
        mapped.set(130, 8);
        assert_eq!((mapped.replaced(), noted(&range)), (vec![130], 1), "whoever uses it nevertheless faults again");
        mapped.mapping.settle();
        mapped.file.set_len(256 * PAGE as u64).unwrap();
        assert_eq!((mapped.get(127), mapped.get(130), mapped.mappings().len()), (1, 0, 1));
    }
}

#[test]
fn a_file_that_cannot_be_mapped_again_is_covered_as_a_whole() {
    let mapped = Mapped::new(256, 128);
    (128..256).step_by(2).for_each(|page| mapped.set(page, 9));
    fcntl_add_seals(&mapped.file, SealFlags::FUTURE_WRITE).unwrap();
    mapped.mapping.settle();
    assert_eq!((mapped.mappings().len(), mapped.replaced().len(), noted(&mapped.range())), (1, 256, 0));
    (0..256).for_each(|page| mapped.set(page, 5));
    assert_eq!(noted(&mapped.range()), 0, "there are no faults in it any more");
}

#[test]
fn what_is_used_on_is_covered_with_what_it_has_lost() {
    let mapped = Mapped::new(3000, 1000);
    mapped.mapping.cover();
    assert_eq!((mapped.get(10), mapped.replaced()), (1, vec![]), "it has not failed");
    (1000..3000).step_by(50).for_each(|page| mapped.set(page, 9));
    mapped.mapping.cover();
    assert_eq!((mapped.mappings().len(), mapped.replaced().len(), noted(&mapped.range())), (1, 3000, 0));
    assert_eq!((mapped.get(10), mapped.get(1050)), (0, 9), "and keeps what was put there since");
}

#[test]
fn a_mapping_that_ends_is_unmapped_with_all_that_was_replaced() {
    // Others would map something there at once, and fault in it.
    if alone::task().is_none() {
        let me = "sys::pieces::tests::a_mapping_that_ends_is_unmapped_with_all_that_was_replaced";
        return alone::expect(me, "end a mapping");
    }
    let mapped = Mapped::new(256, 128);
    let range = mapped.range();
    (128..256).step_by(2).for_each(|page| mapped.set(page, 9));
    assert_eq!((mapped.mappings().len(), noted(&range)), (129, 64));
    drop(mapped);
    assert_eq!((mappings(&range), noted(&range)), (vec![], 0));
}

#[test]
fn however_many_faults_there_are_the_mappings_are_bounded() {
    // They fill the table of the whole process.
    match alone::task() {
        Some(_) => fill_the_table(),
        None => alone::expect(
            "sys::pieces::tests::however_many_faults_there_are_the_mappings_are_bounded",
            "fill the table",
        ),
    }
}

/// What the process of its own does.
fn fill_the_table() {
    let (small, large) = (Mapped::new(16, 1), Mapped::new(2 * PIECES + 100, 1));
    let both = || small.mappings().len() + large.mappings().len();
    let plain = both();
    small.set(3, 6);
    (1..PIECES).for_each(|page| large.set(2 * page, 7));
    assert_eq!((both() - plain, noted(&(0..usize::MAX))), (MAPPINGS, PIECES));
    // One more than there may be, and the large mapping is one again.
    large.set(2 * PIECES, 8);
    assert_eq!((large.mappings().len(), noted(&(0..usize::MAX))), (1, 1));
    let values = [2, 3, 2 * PIECES - 2, 2 * PIECES - 1, 2 * PIECES].map(|page| large.get(page));
    assert_eq!((values, small.get(3)), ([7, 0, 7, 0, 8], 6));
    // There is room for others.
    small.set(9, 6);
    assert_eq!((small.replaced(), noted(&(0..usize::MAX))), (vec![3, 9], 2));
    large.mapping.settle();
    assert_eq!((large.mappings().len(), large.get(2)), (1, 0), "one mapping already, and its memory is given back");
    drop((small, large));
    assert_eq!(noted(&(0..usize::MAX)), 0);
}
