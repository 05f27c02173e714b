//! The memory that one NIC shares with the switch: a memfd on 2 MiB huge pages where the machine has some reserved, on
//! ordinary pages otherwise, mapped and faulted in before anything runs.
//!
//! Handed out by bumping an offset and never given back: rings and buffers live as long as their NIC. Everything that
//! touches the mapping goes through the raw pointers of [`Memory::at`], because the switch writes there at the same
//! time; no reference into it is ever made.

#![allow(unsafe_code, reason = "maps memory that another process writes")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vhost::VhostUserMemoryRegionInfo;

/// Where the guest has this memory. Not what it is here, so that a switch that mixes up the two address spaces fails.
const GUEST_BASE: u64 = 1 << 32;

/// Pages of other memory.
const PAGE: usize = 4096;

/// Huge pages of this size are asked for.
pub const HUGE_PAGE: usize = 2 << 20;

/// One shared mapping.
#[derive(Debug)]
pub struct Memory {
    file: File,
    base: *mut u8,
    len: usize,
    taken: usize,
    huge: bool,
}

// SAFETY: the mapping belongs to this value alone and does not depend on the thread that uses it.
unsafe impl Send for Memory {}

impl Memory {
    /// `len` bytes or a little more; on huge pages if they are wanted and there are any.
    pub fn new(len: usize, huge: bool) -> io::Result<Self> {
        let small = || Self::map(len.next_multiple_of(PAGE), MemfdFlags::empty());
        if !huge {
            return small();
        }
        Self::map(len.next_multiple_of(HUGE_PAGE), MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).or_else(|_| small())
    }

    fn map(len: usize, flags: MemfdFlags) -> io::Result<Self> {
        let file = File::from(memfd_create("generator", flags | MemfdFlags::CLOEXEC)?);
        ftruncate(&file, len as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing that exists.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                &file,
                0,
            )?
        };
        let huge = flags.contains(MemfdFlags::HUGETLB);
        Ok(Self { file, base: base.cast(), len, taken: 0, huge })
    }

    /// Whether it lies on huge pages.
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// Takes `len` zeroed bytes; their offset.
    pub fn take(&mut self, len: usize, align: usize) -> usize {
        let start = self.taken.next_multiple_of(align);
        assert!(len <= self.len && start <= self.len - len, "{len} bytes wanted, {} of {} taken", self.taken, self.len);
        self.taken = start + len;
        start
    }

    /// The address of `offset` here. What is taken there may be read and written through it, by the rules for memory
    /// that others write too: volatile or atomic, and no references.
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len, "offset {offset} of {}", self.len);
        // SAFETY: checked just above to be inside the mapping.
        unsafe { self.base.add(offset) }
    }

    /// Copies `bytes` to `offset`, before the switch knows of the place or while it has no business there.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(bytes.len() <= self.len && offset <= self.len - bytes.len(), "{} bytes at {offset}", bytes.len());
        // SAFETY: in bounds as checked; `bytes` is ordinary memory, which never overlaps a mapping of our own that
        // nobody has references to.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(offset), bytes.len()) }
    }

    /// Copies what is at `offset`, after the switch has given the place back.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(into.len() <= self.len && offset <= self.len - into.len(), "{} bytes at {offset}", into.len());
        // SAFETY: in bounds as checked; `into` is ordinary memory. A switch that writes on shows as a wrong byte.
        unsafe { ptr::copy_nonoverlapping(self.at(offset), into.as_mut_ptr(), into.len()) }
    }

    /// The address of `offset` as descriptors have it.
    pub fn guest(&self, offset: usize) -> u64 {
        GUEST_BASE + offset as u64
    }

    /// The address of `offset` as vhost-user messages have it.
    pub fn user(&self, offset: usize) -> u64 {
        self.at(offset) as u64
    }

    /// Its line of the memory table.
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: self.len as u64,
            userspace_addr: self.base as u64,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and rings over it are dropped with the NIC that holds both.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}
