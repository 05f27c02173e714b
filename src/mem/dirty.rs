//! Which pages of a guest's memory we have written while it is being migrated: [`DirtyLog`].
//!
//! The front end shares a bitmap with one bit for each 4 KiB of guest-physical memory (vhost-user, "Migration"); whoever
//! writes to guest memory sets the bits, and the front end sends those pages again and clears them. All devices of a VM
//! share the bitmap and the front end clears bits at any time, so a bit is set with an atomic OR; it is looked at first,
//! because most writes hit pages that are marked already and an OR would take the cache line from whoever reads it.
//!
//! A page is marked after it was written: a bit that is set before its write may be sent and cleared in between, and the
//! write is lost on the destination. A page that the bitmap does not reach is never marked; [`DirtyLog::covers`] tells
//! whether all of a memory is reached, and memory or logs that would break that are refused.
//!
//! Indexed by guest-physical address and not by mapping, so a log outlives any change of the memory map. While nothing
//! migrates there is no log, and what a batch pays is one predictable branch.

#![allow(unsafe_code)] // Bytes that another process changes at any time are no Rust slice.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering, fence};

use super::{GuestMemory, Span};
use crate::limits::MEMORY_BYTES;
use crate::sys::eventfd::EventFd;
use crate::sys::mapped_file::{Backing, Loss, MappedFile, MappedFileError};

/// Bytes of guest memory that one bit stands for (VHOST_LOG_PAGE of vhost-user, "Migration").
const PAGE_BYTES: u64 = 4096;
/// Bytes of guest memory that one byte of the log stands for.
const LOG_BYTE_COVERS: u64 = 8 * PAGE_BYTES;

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirtyLogError {
    /// No bytes, more than any memory needs, or an end beyond 64 bits.
    #[error("a log of {len} bytes at offset {offset:#x} is empty or larger than any guest memory needs")]
    Bounds {
        /// Length in bytes.
        len: u64,
        /// Where it begins in its file.
        offset: u64,
    },
    /// The log has no bits for the end of the memory that is shared.
    #[error("a log of {len} bytes covers guest memory up to {covers:#x} only, and {end:#x} is shared")]
    TooSmall {
        /// Length in bytes.
        len: u64,
        /// The first guest address that it has no bit for.
        covers: u64,
        /// Where the shared memory ends.
        end: u64,
    },
    /// Its file is none that can be mapped, or does not hold it.
    #[error("the log cannot be mapped")]
    File(#[from] MappedFileError),
}

/// The bitmap of pages that were written.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: MappedFile,
}

impl DirtyLog {
    /// Maps the log that a front end shares: `len` bytes from `offset` of `file`. `attention` is signalled if a page of the
    /// file is found missing later.
    ///
    /// # Errors
    /// What is wrong with the file, or what the kernel says.
    pub fn new(file: File, offset: u64, len: u64, attention: Arc<EventFd>) -> Result<Self, DirtyLogError> {
        let within = offset.checked_add(len).is_some() && (1..=MEMORY_BYTES / LOG_BYTE_COVERS).contains(&len);
        if !within {
            return Err(DirtyLogError::Bounds { len, offset });
        }
        let backing = Backing::of(&file)?;
        Ok(Self { mapping: MappedFile::of_peer(Arc::new(file), &backing, offset, len, attention)? })
    }

    /// Whether marks were lost.
    pub fn failed(&self) -> bool {
        self.mapping.failure().is_some()
    }

    /// Loses all marks from now on, without a fault for each page of the log: once it has failed.
    pub fn settle(&self) {
        self.mapping.cover();
    }

    /// Why marks were lost, if they were: the front end would not send pages that it should.
    pub fn loss(&self) -> Option<Loss> {
        self.mapping.loss()
    }

    /// Whether every byte of `memory` has its bit.
    ///
    /// # Errors
    /// Where the log and the memory end.
    pub fn covers(&self, memory: &GuestMemory) -> Result<(), DirtyLogError> {
        let len = self.mapping.len() as u64;
        let covers = len * LOG_BYTE_COVERS;
        let end = memory.regions().last().map_or(0, |region| region.guest + region.len);
        if end <= covers { Ok(()) } else { Err(DirtyLogError::TooSmall { len, covers, end }) }
    }

    /// Marks the pages of the `len` bytes at guest-physical address `guest`, which have been written.
    pub fn mark(&self, guest: u64, len: u64) {
        if len == 0 {
            return;
        }
        // The write comes before the look at the bit (see above): a bit that is still seen set because the write waits in a
        // store buffer may be cleared, and its page sent, before the write is there. Only a full fence keeps that order.
        fence(Ordering::SeqCst);
        let last = guest.saturating_add(len - 1) / PAGE_BYTES;
        for page in guest / PAGE_BYTES..=last {
            let (at, bit) = ((page / 8) as usize, 1u8 << (page % 8));
            if at >= self.mapping.len() {
                return;
            }
            // SAFETY: `at` is within the mapping, which lives as long as `self`, and a byte is aligned everywhere. Every
            // access to it from this process is atomic; the front end's are its own affair. Where the file has no page, the
            // mapping's watch puts one of ours.
            let byte = unsafe { AtomicU8::from_ptr(self.mapping.address().add(at)) };
            if byte.load(Ordering::Relaxed) & bit == 0 {
                byte.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Marks the pages of the first `len` bytes of `pieces`, spans of `memory` that have been written in this order.
    pub fn mark_pieces(&self, memory: &GuestMemory, pieces: &[Span<'_>], len: usize) {
        let mut left = len;
        for piece in pieces {
            let written = left.min(piece.len());
            if let Some(guest) = memory.guest_of(piece) {
                self.mark(guest, written as u64);
            }
            left -= written;
            if left == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Read;

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::mmap::MmapRegion;

    use super::*;
    use crate::mem::Region;

    fn memfd(len: u64) -> File {
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    fn log(file: &File, offset: u64, len: u64) -> Result<DirtyLog, DirtyLogError> {
        let attention = Arc::new(EventFd::new().unwrap());
        DirtyLog::new(file.try_clone().unwrap(), offset, len, attention)
    }

    fn bytes(file: &File) -> Vec<u8> {
        use std::io::{Seek, SeekFrom};
        let mut file = file.try_clone().unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn each_page_that_a_range_touches_is_marked_and_no_other() {
        let file = memfd(8192);
        let log = log(&file, 4096, 2).unwrap();
        log.mark(0xfff, 2);
        log.mark(9 * 4096, 4096);
        log.mark(15 * 4096 + 4095, 1 << 40);
        log.mark(u64::MAX, u64::MAX);
        log.mark(3 * 4096, 0);
        let bytes = bytes(&file);
        assert_eq!(bytes[4096..4098], [0b11, 0b1000_0010]);
        assert!(bytes[..4096].iter().chain(&bytes[4098..]).all(|&byte| byte == 0), "outside of the log");
    }

    #[test]
    fn pieces_are_marked_where_they_lie_in_guest_memory() {
        let file = memfd(4096);
        let log = log(&file, 0, 64).unwrap();
        let region = |guest, len| Arc::new(Region::new(guest, guest, MmapRegion::new(len).unwrap()));
        let memory = GuestMemory::new(vec![region(0x10_0000, 0x2000), region(0, 0x1000)]);
        let first = memory.span(0x10_1000, 0x800, &mut 0).unwrap();
        let second = memory.span(0x10, 0x100, &mut 0).unwrap();
        log.mark_pieces(&memory, &[first, second], 0x800);
        assert_eq!(bytes(&file)[..64].iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
        assert_eq!(bytes(&file)[0x101 / 8], 1 << (0x101 % 8));
        log.mark_pieces(&memory, &[first, second], 0x801);
        assert_eq!(bytes(&file)[0], 1);
        assert!(log.covers(&memory).is_ok());
        let high = GuestMemory::new(vec![region(64 * LOG_BYTE_COVERS - 0x1000, 0x2000)]);
        assert!(matches!(log.covers(&high), Err(DirtyLogError::TooSmall { len: 64, .. })));
    }

    #[test]
    fn a_log_that_its_file_does_not_hold_is_refused() {
        let file = memfd(4096);
        for (offset, len) in [(0, 0), (u64::MAX, 1), (0, 1 << 40), (u64::MAX - 4, 8)] {
            assert!(matches!(log(&file, offset, len), Err(DirtyLogError::Bounds { .. })), "{offset} {len}");
        }
        let refused = |file, offset, len| match log(file, offset, len) {
            Err(DirtyLogError::File(error)) => error,
            other => panic!("{other:?}"),
        };
        assert!(matches!(refused(&file, 4096, 1), MappedFileError::TooShort { end: 4097, size: 4096 }));
        assert!(matches!(refused(&file, 1, 16), MappedFileError::Unaligned { offset: 1, page: 4096 }));
        let other = File::open("/proc/self/maps").unwrap();
        assert!(matches!(refused(&other, 0, 1), MappedFileError::NotMemory));
    }
}
