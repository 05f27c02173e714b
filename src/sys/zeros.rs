//! Zero pages in the place of pages that a peer's file does not have: what [`super::sigbus`] lays over pages of a mapping, or over
//! all of it.
//!
//! They come from a sparse file of our own, mapped shared at the offset that equals the address. That costs no memory but
//! for pages that are really touched, and the kernel counts nothing ahead: private memory of a failed mapping's size would
//! be charged at once where `vm.overcommit_memory` is 2, or where RLIMIT_DATA is set, and be refused, or starve others. As
//! every address has an offset of its own, no two mappings have a page in common, laying the same page twice, as two threads that
//! fault at once do, changes nothing, and the kernel makes one mapping of neighbours. What was touched is given back when the
//! port is stopped, or with the mapping ([`release`]).
//!
//! Where the kernel has not a single page left, touching the file would be the next SIGBUS, in a loop. Then one of a few
//! pages that were allocated at the start stands in for the page in question ([`spare`]).
//!
//! All but [`prepare`] and [`release`] may be called in a signal handler: plain system calls, no locks, no allocation.

#![allow(unsafe_code)] // mmap over mappings that are in use.

use std::io;
use std::ops::Range;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::process::{Resource, getrlimit};

/// Bytes of the file: more than any address that a process can have (56 bits on x86-64 with five levels of page tables).
const ADDRESSES: u64 = 1 << 57;
/// Pages that are kept for when there is no other.
const SPARE_PAGES: usize = 64;

/// The two files; -1 where there is none.
static ZEROS: AtomicI32 = AtomicI32::new(-1);
static SPARE: AtomicI32 = AtomicI32::new(-1);
/// Bytes of an ordinary page.
static PAGE: AtomicUsize = AtomicUsize::new(4096);

/// What came of touching a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Touched {
    /// It is there.
    Present,
    /// The kernel has none to put there.
    Absent,
    /// The kernel cannot do that (before Linux 5.14).
    Unknown,
}

/// Makes the files; once, before the first mapping is watched.
///
/// # Errors
/// The kernel has no memory for the spare pages, or no descriptor.
pub(super) fn prepare() -> io::Result<()> {
    PAGE.store(page_bytes(), Ordering::Relaxed);
    let spare = memory_file("linecard-spare")?;
    let bytes = (SPARE_PAGES * page_bytes()) as u64;
    fallocate(&spare, FallocateFlags::empty(), 0, bytes)?;
    SPARE.store(spare.into_raw_fd(), Ordering::Release);
    // A process whose files are limited in size is killed for making a larger one (setrlimit(2)); it gets private memory.
    if getrlimit(Resource::Fsize).current.is_none() {
        let zeros = memory_file("linecard-zeros")?;
        ftruncate(&zeros, ADDRESSES)?;
        ZEROS.store(zeros.into_raw_fd(), Ordering::Release);
    }
    Ok(())
}

/// An empty file in memory, which nobody can execute where the kernel knows of that.
fn memory_file(name: &str) -> io::Result<OwnedFd> {
    let sealed = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL);
    Ok(sealed.or_else(|_| memfd_create(name, MemfdFlags::CLOEXEC))?)
}

/// Bytes of this machine's ordinary pages.
pub(super) fn page_bytes() -> usize {
    // SAFETY: sysconf reads a constant of the process.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Puts zero pages over `range`, which begins and ends at pages of what is mapped there. `false`: the kernel refused.
///
/// # Safety
/// All of `range` is one mapping of the caller's, which is only ever accessed by copies that may find any bytes there.
pub(super) unsafe fn cover(range: Range<usize>) -> bool {
    let file = ZEROS.load(Ordering::Acquire);
    let how = if file < 0 {
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE
    } else {
        libc::MAP_SHARED | libc::MAP_NORESERVE
    };
    let offset = if file < 0 { 0 } else { range.start };
    // SAFETY: the caller's, for `range`; the file reaches as far as addresses do.
    unsafe { lay(range, how, file, offset) }
}

/// Puts a page that is there for certain over the ordinary page of `address`. Mappings with the same `number` have it in
/// common.
///
/// # Safety
/// As for [`cover`], for that page.
pub(super) unsafe fn spare(address: usize, number: usize) -> bool {
    let page = PAGE.load(Ordering::Relaxed);
    let start = address & !(page - 1);
    let offset = number % SPARE_PAGES * page;
    // SAFETY: the caller's, for this page; the file has the page at `offset`.
    unsafe { lay(start..start + page, libc::MAP_SHARED, SPARE.load(Ordering::Acquire), offset) }
}

/// # Safety
/// As for [`cover`]; `file` is one of ours, or -1 for anonymous memory, and holds the range from `offset` on.
unsafe fn lay(range: Range<usize>, how: libc::c_int, file: libc::c_int, offset: usize) -> bool {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let offset = offset as libc::off_t;
    // SAFETY: the caller's: what MAP_FIXED takes away is a mapping of its own, and what it puts there can be read and
    // written as before. mmap is a plain system call.
    let laid = unsafe { libc::mmap(range.start as *mut _, range.len(), access, how | libc::MAP_FIXED, file, offset) };
    laid != libc::MAP_FAILED
}

/// Has the kernel bring in the ordinary page of `address` for writing, as the access that faulted will.
pub(super) fn touch(address: usize) -> Touched {
    let page = PAGE.load(Ordering::Relaxed);
    let start = (address & !(page - 1)) as *mut libc::c_void;
    // SAFETY: populating changes nothing that is mapped, and of an address that is not mapped it says ENOMEM.
    let done = unsafe { libc::madvise(start, page, libc::MADV_POPULATE_WRITE) };
    if done == 0 {
        return Touched::Present;
    }
    // SAFETY: errno belongs to this thread.
    match unsafe { *libc::__errno_location() } {
        libc::EINVAL | libc::ENOSYS => Touched::Unknown,
        _ => Touched::Absent,
    }
}

/// Gives back what was touched of the pages over `range`, which nobody needs any more.
pub(super) fn release(range: Range<usize>) {
    let file = ZEROS.load(Ordering::Acquire);
    if file >= 0 {
        let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // A hole that cannot be made costs memory and nothing else.
        // SAFETY: `file` is the file of zeros, which is never closed; a system call without pointers.
        let _ = unsafe { libc::fallocate(file, flags, range.start as libc::off_t, range.len() as libc::off_t) };
    }
}

/// Takes away what the file of zeros could give, as a kernel without memory would.
#[cfg(test)]
pub(super) fn exhaust() {
    // SAFETY: the file of zeros, which is never closed.
    unsafe { libc::ftruncate(ZEROS.load(Ordering::Acquire), 0) };
}

/// Bytes that the file of zeros has allocated.
#[cfg(test)]
pub(super) fn touched_bytes() -> u64 {
    // SAFETY: the file of zeros, which is never closed, so the borrow does not outlive it.
    let file = unsafe { std::os::fd::BorrowedFd::borrow_raw(ZEROS.load(Ordering::Acquire)) };
    rustix::fs::fstat(file).map_or(0, |stat| stat.st_blocks as u64 * 512)
}
