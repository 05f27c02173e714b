//! A file that is mapped here and that somebody else may change at any moment: [`MappedFile`], the one owner of such a
//! mapping, whatever is in it (a guest's memory, a dirty log, records of rings).
//!
//! A peer's file is looked at first ([`Backing`]): only regular files on tmpfs (which memfd is) and hugetlbfs are taken,
//! since any other could stall a thread in a page fault, and only as far as they reach, since behind the end is SIGBUS.
//! What can still happen later is left to [`super::sigbus`], under whose watch every mapping is from its first moment to its
//! last. It replaces single pages, and [`MappedFile::settle`] and [`MappedFile::cover`] make one mapping of them again, on the
//! thread of whoever stops the port.
//!
//! The kernel may keep whoever maps or unmaps such a file waiting for as long as its owner likes, so that is done one at a time
//! ([`super::mapping_turn`]), and by nobody whom others wait for.
//!
//! Lengths are rounded to the file's pages once, here, for mapping, watching and unmapping alike: the kernel maps a part
//! of a huge page as all of it, and does not unmap a part.

#![allow(unsafe_code)] // mmap, munmap, madvise.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::linux::fs::MetadataExt;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FsWord;

use super::eventfd::EventFd;
use super::mapping_turn::in_turn;
use super::sigbus::{Failure, Watch};
use super::zeros;

/// statfs(2): `f_type` of tmpfs, which also backs memfd_create(2) without MFD_HUGETLB.
const TMPFS_MAGIC: FsWord = 0x0102_1994;
/// statfs(2): `f_type` of hugetlbfs, whose `f_bsize` is the huge page size.
const HUGETLBFS_MAGIC: FsWord = 0x9584_58f6;

/// Why a file cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappedFileError {
    /// The kernel did not tell about the file.
    #[error("its file cannot be examined")]
    Examine(#[source] io::Error),
    /// No regular file, or one on a file system whose pages can stall us.
    #[error("it is not in a regular file on tmpfs or hugetlbfs: use memfd, /dev/shm or hugepages")]
    NotMemory,
    /// It does not begin at a page of the file.
    #[error("it begins at byte {offset} of a file that has pages of {page} bytes")]
    Unaligned {
        /// Where it begins in the file.
        offset: u64,
        /// Bytes of the file's pages.
        page: u64,
    },
    /// A file that is too short, or a length that no file has.
    #[error("it ends at byte {end} of a file that has {size} bytes")]
    TooShort {
        /// Where it ends in the file; `u64::MAX` if beyond what 64 bits can say.
        end: u64,
        /// The file's size in bytes.
        size: u64,
    },
    /// The kernel did not map it.
    #[error("it cannot be mapped")]
    Map(#[source] io::Error),
    /// The mapping cannot be watched for SIGBUS.
    #[error("it cannot be watched for pages that go away")]
    Watch(#[source] io::Error),
}

/// What a file is, however often its descriptor was passed on: device, inode, and when it was made, in nanoseconds, as the
/// kernel gives inode numbers anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileIdentity {
    /// Number of the file system.
    pub device: u64,
    /// Number of the file in it.
    pub inode: u64,
    /// When it was made; 0 if the file system does not say.
    pub born: u64,
}

/// What a file is to somebody who wants to map it.
#[derive(Debug, Clone, Copy)]
pub struct Backing {
    /// Bytes of its pages.
    pub page: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Which file it is.
    pub identity: FileIdentity,
}

impl Backing {
    /// Asks the kernel about a peer's file.
    ///
    /// # Errors
    /// The kernel does not tell, or the file is none that can be shared with us.
    pub fn of(file: &File) -> Result<Self, MappedFileError> {
        // Only files of tmpfs and hugetlbfs have seals (memfd_file_seals_ptr in mm/memfd.c), and asking for them is a look at
        // our own table of descriptors: a file system in user space, which can keep fstat(2) waiting, is not asked at all.
        match rustix::fs::fcntl_get_seals(file) {
            Ok(_) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::BADF) => return Err(MappedFileError::NotMemory),
            Err(error) => return Err(MappedFileError::Examine(error.into())),
        }
        let stat = file.metadata().map_err(MappedFileError::Examine)?;
        let system = rustix::fs::fstatfs(file).map_err(|error| MappedFileError::Examine(error.into()))?;
        let small = page_bytes();
        let page = match system.f_type {
            TMPFS_MAGIC if stat.is_file() => small,
            HUGETLBFS_MAGIC if stat.is_file() => u64::try_from(system.f_bsize).unwrap_or(small).max(small),
            _ => return Err(MappedFileError::NotMemory),
        };
        let born = stat.created().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
        let born = born.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX));
        let identity = FileIdentity { device: stat.st_dev(), inode: stat.st_ino(), born };
        Ok(Self { page, size: stat.st_size(), identity })
    }

    /// How many bytes are to be mapped for `len` of them from `offset` on: whole pages.
    ///
    /// # Errors
    /// They do not begin at a page, or the file does not have them.
    fn whole_pages(&self, offset: u64, len: u64) -> Result<usize, MappedFileError> {
        if !offset.is_multiple_of(self.page) {
            return Err(MappedFileError::Unaligned { offset, page: self.page });
        }
        let too_short = |end| MappedFileError::TooShort { end, size: self.size };
        let end = offset.checked_add(len).ok_or(too_short(u64::MAX))?;
        if len == 0 || end > self.size {
            return Err(too_short(end));
        }
        let whole = len.checked_next_multiple_of(self.page).and_then(|len| usize::try_from(len).ok());
        whole.ok_or(too_short(end))
    }
}

/// Bytes of this machine's ordinary pages.
pub fn page_bytes() -> u64 {
    zeros::page_bytes() as u64
}

/// How files are mapped. Nothing is reserved: how many huge pages a VM gets is between it and the host.
const HOW: libc::c_int = libc::MAP_SHARED | libc::MAP_NORESERVE;
const ACCESS: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// A part of a file, mapped shared, readable and writable, until this is dropped.
///
/// Its memory is never a Rust reference: others write it. Accesses are raw copies and atomics, which find zeros where the
/// file has no page any more.
#[derive(Debug)]
pub struct MappedFile {
    /// `None` only while it is being dropped: the watch has to end while the pages are still ours.
    watch: Option<Watch>,
    address: NonNull<u8>,
    /// Bytes that are mapped: whole pages of the file.
    mapped: usize,
    /// Bytes of the file's pages.
    page: usize,
    /// Bytes that were asked for.
    len: usize,
    offset: u64,
    /// Its pages are locked as they come.
    locked: AtomicBool,
    file: Arc<File>,
    identity: FileIdentity,
}

// SAFETY: an address and a length of memory that is mapped for as long as `self`; this type does not access it, and
// mapping and unmapping is for any thread.
unsafe impl Send for MappedFile {}
// SAFETY: as above. What `&self` changes is what is mapped there (`settle`, `cover`), which is system calls on pages that
// whoever uses the address may find to have any contents at any time; the table of replaced pages and `locked` are atomics.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps `len` bytes from `offset` on of a peer's file, of which `backing` tells. `attention` is signalled when a page of
    /// it is found missing.
    ///
    /// # Errors
    /// The file is too short for that, or what the kernel says.
    pub fn of_peer(
        file: Arc<File>,
        backing: &Backing,
        offset: u64,
        len: u64,
        attention: Arc<EventFd>,
    ) -> Result<Self, MappedFileError> {
        let mapped = backing.whole_pages(offset, len)?;
        let mut new = Self::map(file, backing.page as usize, offset, mapped, len as usize, attention)?;
        new.identity = backing.identity;
        Ok(new)
    }

    /// Maps `len` bytes from the beginning of a file of our own, which lies in no huge pages.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn of_ours(file: Arc<File>, len: usize, attention: Arc<EventFd>) -> Result<Self, MappedFileError> {
        let page = zeros::page_bytes();
        Self::map(file, page, 0, len.next_multiple_of(page), len, attention)
    }

    fn map(
        file: Arc<File>,
        page: usize,
        offset: u64,
        mapped: usize,
        len: usize,
        attention: Arc<EventFd>,
    ) -> Result<Self, MappedFileError> {
        let start = i64::try_from(offset).map_err(|_| MappedFileError::TooShort { end: offset, size: 0 })?;
        let (at, refused) = in_turn(|| {
            // SAFETY: a new mapping at an address that the kernel chooses takes nothing away.
            let at = unsafe { libc::mmap(ptr::null_mut(), mapped, ACCESS, HOW, file.as_raw_fd(), start) };
            let refused = io::Error::last_os_error();
            if at != libc::MAP_FAILED {
                // What others own has no place in our core dumps. It is a matter of taste to the kernel, so a refusal is no error.
                // SAFETY: exactly the mapping that was just made; the advice does not change its contents.
                let _ = unsafe { libc::madvise(at, mapped, libc::MADV_DONTDUMP) };
            }
            (at, refused)
        });
        let Some(address) = NonNull::new(at.cast::<u8>()).filter(|_| at != libc::MAP_FAILED) else {
            return Err(MappedFileError::Map(refused));
        };
        let range = at as usize..at as usize + mapped;
        let identity = FileIdentity::default();
        let locked = AtomicBool::new(false);
        let mut new = Self { watch: None, address, mapped, page, len, offset, locked, file, identity };
        // SAFETY: exactly the mapping that was just made, of whole pages of `page` bytes, accessed as this type's
        // documentation says; `drop` ends the watch before it unmaps.
        new.watch = Some(unsafe { Watch::new(range, page, attention) }.map_err(MappedFileError::Watch)?);
        Ok(new)
    }

    /// Where it is mapped: at least [`MappedFile::len`] bytes, readable and writable for as long as `self`.
    pub fn address(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// How many bytes were asked for.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where it begins in the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Which file of a peer it is.
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// The file.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// What happened in it, if a page was found missing: parts of it are zeros of our own now.
    pub fn failure(&self) -> Option<Failure> {
        self.watch.as_ref().and_then(Watch::failure)
    }

    /// Why a page was missing, in words that go on after "the VM's memory file"; `None` if none was.
    pub fn loss(&self) -> Option<Loss> {
        let end = self.offset.saturating_add(self.len as u64);
        Some(match self.failure()? {
            Failure::Hardware => Loss::Hardware,
            // Asking is for any time: a file of tmpfs or hugetlbfs has its size in the kernel's memory.
            Failure::NoPage => match self.file.metadata() {
                Ok(stat) if stat.st_size() < end => Loss::Shrunk,
                _ => Loss::NoRoom,
            },
        })
    }

    /// Notes whether the kernel locks its pages as they come.
    pub fn note_locked(&self, locked: bool) {
        self.locked.store(locked, Ordering::Relaxed);
    }

    /// Has a failed mapping that nobody uses any more take no more of the kernel's mappings than any other: what faults have
    /// replaced is the file's again. It stays failed, and whoever uses it nevertheless faults again.
    pub fn settle(&self) {
        // hugetlbfs makes a file longer whose pages are mapped beyond its end (hugetlbfs_file_mmap), and this one is not ours;
        // covering its large pages is done soon.
        let ordinary = self.page == zeros::page_bytes();
        let failed = self.watch.as_ref().filter(|watch| watch.failure().is_some());
        if failed.is_some_and(|watch| !ordinary || !watch.undo(|page| self.put_back(page))) {
            self.cover();
        }
    }

    /// Has a failed mapping that goes on being used have no faults any more: it is zeros from now on, of ours, all of it.
    pub fn cover(&self) {
        if let Some(watch) = self.watch.as_ref().filter(|watch| watch.failure().is_some()) {
            watch.cover();
        }
    }

    /// Maps the file's ordinary page again that belongs at address `page`, with all that makes the kernel join it to its
    /// neighbours. A file that was sealed since (F_SEAL_FUTURE_WRITE) cannot be.
    fn put_back(&self, page: usize) -> bool {
        let offset = self.offset + (page - self.address.as_ptr() as usize) as u64;
        let (at, len, how) = (page as *mut libc::c_void, self.page, HOW | libc::MAP_FIXED);
        in_turn(|| {
            // SAFETY: a page of this mapping, which the watch's table names, and over which there is a page of ours; whoever accesses
            // it may find any bytes there. The file's has the same access. Neither advice nor locking changes its contents.
            unsafe {
                if libc::mmap(at, len, ACCESS, how, self.file.as_raw_fd(), offset as libc::off_t) == libc::MAP_FAILED {
                    return false;
                }
                libc::madvise(at, len, libc::MADV_DONTDUMP);
                if self.locked.load(Ordering::Relaxed) {
                    libc::mlock2(at, len, libc::MLOCK_ONFAULT);
                }
            }
            true
        })
    }
}

/// Why a mapped file has lost pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Its owner made it shorter.
    Shrunk,
    /// The host had no page for it: its tmpfs is full, or its pool of huge pages empty.
    NoRoom,
    /// The host's memory is broken there.
    Hardware,
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        self.watch = None;
        let unmapped = in_turn(|| {
            // SAFETY: exactly what `map` has mapped, and nobody has a pointer into it any more: those that there were live no
            // longer than `self`.
            let done = unsafe { libc::munmap(self.address.as_ptr().cast(), self.mapped) };
            if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        });
        if let Err(error) = unmapped {
            debug_assert!(false, "munmap of {} bytes: {error}", self.mapped);
            log::error!("{} bytes of shared memory stay mapped: {error}", self.mapped);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::ops::Range;
    use std::os::fd::AsFd;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::process::{Resource, Rlimit, setrlimit};

    use super::*;
    use crate::sys::alone;

    fn memfd(len: u64, flags: MemfdFlags) -> File {
        let file = memfd_create("mapped", MemfdFlags::CLOEXEC | flags).unwrap();
        ftruncate(&file, len).unwrap();
        file.into()
    }

    fn map(file: &File, len: u64) -> MappedFile {
        let backing = Backing::of(file).unwrap();
        MappedFile::of_peer(Arc::new(file.try_clone().unwrap()), &backing, 0, len, Arc::new(EventFd::new().unwrap()))
            .unwrap()
    }

    /// Puts `value` at byte `at` of the mapping and returns what was there.
    fn swap(mapped: &MappedFile, at: usize, value: u8) -> u8 {
        assert!(at < mapped.len());
        // SAFETY: within the mapping, which lives through the accesses.
        unsafe {
            let byte = mapped.address().add(at);
            let old = byte.read_volatile();
            byte.write_volatile(value);
            old
        }
    }

    /// How many bytes of `range` are mapped in this process.
    fn bytes_mapped(range: Range<usize>) -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let bounds = maps.lines().filter_map(|line| line.split_once(' ')?.0.split_once('-'));
        let address = |text| usize::from_str_radix(text, 16).unwrap();
        let within = |(from, to)| address(to).min(range.end).saturating_sub(address(from).max(range.start));
        bounds.map(within).sum()
    }

    const SHARED_HUGE: [(MemfdFlags, usize); 2] = [
        (MemfdFlags::HUGETLB.union(MemfdFlags::HUGE_2MB), 2 << 20),
        (MemfdFlags::HUGETLB.union(MemfdFlags::HUGE_1GB), 1 << 30),
    ];

    /// The host may have such pages to give, and then nothing is missing; it has not given any to most who run tests.
    #[test]
    fn a_part_of_a_huge_page_is_mapped_patched_and_unmapped_as_all_of_it() {
        // Others would map something there at once when it is unmapped.
        if alone::task().is_none() {
            let me = "sys::mapped_file::tests::a_part_of_a_huge_page_is_mapped_patched_and_unmapped_as_all_of_it";
            return alone::expect(me, "map huge pages");
        }
        for (flags, page) in SHARED_HUGE {
            let mapped = map(&memfd(1 << 30, flags), 256 * 1024);
            let start = mapped.address() as usize;
            assert_eq!((mapped.len(), bytes_mapped(start..start + page)), (256 * 1024, page));
            assert_eq!([swap(&mapped, 4097, 7), swap(&mapped, 4097, 8)], [0, 7]);
            assert!(mapped.failure().is_none_or(|failure| failure == Failure::NoPage));
            assert!(mapped.loss().is_none_or(|loss| loss == Loss::NoRoom));
            drop(mapped);
            assert_eq!(bytes_mapped(start..start + page), 0);
        }
    }

    #[test]
    fn a_huge_page_file_that_shrinks_is_patched_from_the_page_that_faulted() {
        let (flags, page) = SHARED_HUGE[0];
        let file = memfd(16 * page as u64, flags);
        let mapped = map(&file, 16 * page as u64);
        file.set_len(page as u64).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                // All at once, in pages that one of them has patched already or not.
                let mapped = &mapped;
                scope.spawn(move || {
                    (1..16).for_each(|at| {
                        swap(mapped, at * page + 77 * thread, 1);
                    })
                });
            }
        });
        assert_eq!((mapped.failure(), mapped.loss()), (Some(Failure::NoPage), Some(Loss::Shrunk)));
        assert_eq!(swap(&mapped, 15 * page, 2), 1, "what was put there stays");
    }

    #[test]
    fn a_fault_in_a_system_call_is_an_error_and_touching_makes_it_a_failure() {
        let file = memfd(8192, MemfdFlags::empty());
        let mapped = map(&file, 8192);
        file.set_len(4096).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        // SAFETY: 16 bytes of the mapping, which lives through the calls; the kernel only reads them.
        let write = || unsafe {
            let from = mapped.address().add(4096 - 8);
            let iovec =
                [(from, 8), (from.add(8), 8)].map(|(at, len)| libc::iovec { iov_base: at.cast(), iov_len: len });
            let done = libc::writev(writer.as_raw_fd(), iovec.as_ptr().add(1), 1);
            (done, io::Error::last_os_error().raw_os_error())
        };
        assert_eq!((write(), mapped.failure()), ((-1, Some(libc::EFAULT)), None));
        // SAFETY: within the mapping.
        unsafe { mapped.address().add(4096).read_volatile() };
        assert_eq!((write().0, mapped.failure()), (8, Some(Failure::NoPage)));
        drop(reader);
    }

    #[test]
    fn what_is_not_memory_is_refused_and_nobody_is_asked_about_it() {
        let refused = |file: File| matches!(Backing::of(&file), Err(MappedFileError::NotMemory));
        let (pipe, _other) = std::io::pipe().unwrap();
        let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        // devtmpfs calls itself tmpfs, and so does the file system of a directory there.
        for path in ["/dev/null", "/dev/zero", "/dev", "/dev/shm", "/proc/self/maps", "/proc/self/exe"] {
            assert!(refused(File::open(path).unwrap()), "{path}");
        }
        assert!(refused(std::os::fd::OwnedFd::from(pipe).into()) && refused(bell.into()));
        let by_path = rustix::fs::open("/dev/shm", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        assert!(refused(by_path.into()));
        let one = memfd(4096, MemfdFlags::empty());
        let identity = |file: &File| Backing::of(file).unwrap().identity;
        assert_eq!(identity(&one), identity(&one.as_fd().try_clone_to_owned().unwrap().into()));
        assert_ne!(identity(&one), identity(&memfd(4096, MemfdFlags::empty())));
    }

    #[test]
    fn no_memory_is_taken_for_a_failed_mapping_but_what_is_touched() {
        let me = "sys::mapped_file::tests::no_memory_is_taken_for_a_failed_mapping_but_what_is_touched";
        match alone::task() {
            Some(what) => lose_a_large_file(&what),
            None => ["limited", "exhausted", "given back"].into_iter().for_each(|what| alone::expect(me, what)),
        }
    }

    /// What the process of its own does.
    fn lose_a_large_file(what: &str) {
        const LEN: u64 = 64 << 30;
        let file = memfd(LEN, MemfdFlags::empty());
        let mapped = map(&file, LEN);
        file.set_len(0).unwrap();
        match what {
            "limited" => {
                // As where vm.overcommit_memory is 2: private memory of this size is refused.
                let limit = Rlimit { current: Some(1 << 30), maximum: Some(1 << 30) };
                setrlimit(Resource::Data, limit).unwrap();
                assert_eq!(swap(&mapped, 5 << 30, 1), 0);
            }
            "exhausted" => {
                zeros::exhaust();
                for at in [5 << 30, 9 << 30, 5 << 30] {
                    swap(&mapped, at, 1);
                }
                assert_eq!(swap(&mapped, 9 << 30, 2), 1);
            }
            _ => {
                for at in 0..100 {
                    swap(&mapped, at << 20, 1);
                }
                assert!(zeros::touched_bytes() >= 100 * 4096);
                drop(mapped);
                assert_eq!(zeros::touched_bytes(), 0);
                return;
            }
        }
        assert_eq!(mapped.failure(), Some(Failure::NoPage));
    }
}
