//! Guest memory that never makes a shard wait for a page: [`GuestMemory::pin`], for ports of latency sensitivity `high`.
//!
//! A page that we touch for the first time is a fault of about a microsecond, or much more under memory pressure. Pinned
//! memory is mapped ahead and locked. Mapping ahead would also *allocate* what a file lacks, and a front end may share
//! terabytes of nothing, so only files that have all their pages are mapped ahead; of others, pages are locked as they
//! come. A VM has all its pages from the start with QEMU's `prealloc=on` or huge pages.

#![allow(unsafe_code)] // madvise, mlock and munlock on mappings of our own.

use std::os::linux::fs::MetadataExt;

use rustix::io::Errno;
use rustix::mm::{Advice, MlockFlags, madvise, mlock_with, munlock};

use super::GuestMemory;
use crate::sys::mapping_turn::in_turn;

/// What became of an attempt to pin memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pinned {
    /// All of it is mapped and locked.
    Whole,
    /// The VM has not allocated all of it yet: what comes later costs a fault when it is first touched.
    Sparse,
}

impl GuestMemory {
    /// Maps what is there ahead and locks it. Takes a second for a large VM.
    ///
    /// # Errors
    /// What the kernel refused: in practice locking, which takes CAP_IPC_LOCK or a large RLIMIT_MEMLOCK.
    pub fn pin(&self) -> std::io::Result<Pinned> {
        let mut pinned = Pinned::Whole;
        for region in self.regions() {
            let (address, len) = (region.host_address() as *mut _, region.len as usize);
            // SAFETY: exactly a mapping of ours, in whole pages of its file, which `region` keeps; neither call changes what is
            // in it, and a page that the file does not have is an error of theirs (EFAULT) and no signal.
            let ahead = unsafe {
                in_turn(|| mlock_with(address, len, MlockFlags::ONFAULT))?;
                region.note_locked(true);
                // Takes long where there is much, and others need not wait for it: the kernel's table of mappings is only read.
                if region.is_allocated() {
                    madvise(address, len, Advice::LinuxPopulateWrite)
                } else {
                    Err(Errno::FAULT)
                }
            };
            match ahead {
                Ok(()) => {}
                // A file that was cut just now is no more all there than one that never was.
                Err(Errno::FAULT) => pinned = Pinned::Sparse,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(pinned)
    }

    /// Takes a [`GuestMemory::pin`] back.
    pub fn unpin(&self) {
        for region in self.regions() {
            // Memory that was not locked, which is the only refusal there is, needs no unlocking.
            // SAFETY: exactly a mapping of ours, which `region` keeps.
            let _ = in_turn(|| unsafe { munlock(region.host_address() as *mut _, region.len as usize) });
            region.note_locked(false);
        }
    }
}

impl super::Region {
    fn note_locked(&self, locked: bool) {
        if let Some(mapped) = self.mapped_file() {
            mapped.note_locked(locked);
        }
    }

    /// Whether the file behind it has all its pages, and is what is mapped: where it was found to lack some, there may be pages of
    /// ours, or all of it may be ours, with nothing in it.
    fn is_allocated(&self) -> bool {
        let Some(mapped) = self.mapped_file().filter(|mapped| mapped.failure().is_none()) else { return false };
        let end = mapped.offset() + mapped.len() as u64;
        // Blocks have 512 bytes whatever the file system (stat(2)).
        let whole =
            |file: std::fs::Metadata| file.st_size() >= end && file.st_blocks().saturating_mul(512) >= file.st_size();
        mapped.file().metadata().is_ok_and(whole)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::mem::{RegionRequest, SharedMemory};
    use crate::sys::eventfd::EventFd;

    const LEN: u64 = 64 * 1024;

    fn shared(file: &File) -> SharedMemory {
        let memory = SharedMemory::new(Arc::new(EventFd::new().unwrap()), u64::MAX);
        let request = RegionRequest { guest: 0, user: 0, len: LEN, offset: 0 };
        memory.with(request, file.try_clone().unwrap()).unwrap().unwrap()
    }

    /// Kilobytes that the kernel counts as locked in the mapping at `address`.
    fn locked(address: usize) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mapping = maps.split_once(&format!("{address:x}-")).unwrap().1;
        let line = mapping.lines().find_map(|line| line.strip_prefix("Locked:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn memory_that_is_there_is_mapped_and_locked_and_none_is_made() {
        let file = File::from(memfd_create("pin", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(LEN).unwrap();
        let sparse = shared(&file);
        assert_eq!(sparse.memory().pin().unwrap(), Pinned::Sparse);
        assert_eq!(file.metadata().unwrap().st_blocks(), 0, "pinning allocated what the VM had not");
        file.write_all_at(&[1; LEN as usize], 0).unwrap();
        let whole = shared(&file);
        assert_eq!(whole.memory().pin().unwrap(), Pinned::Whole);
        let address = whole.memory().regions()[0].host_address();
        assert_eq!(locked(address), LEN / 1024);
        whole.memory().unpin();
        assert_eq!(locked(address), 0);
    }

    #[test]
    fn memory_whose_file_is_gone_is_not_mapped_ahead() {
        let file = File::from(memfd_create("pin", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(LEN).unwrap();
        let memory = shared(&file);
        file.set_len(0).unwrap();
        assert_eq!(memory.memory().pin().unwrap(), Pinned::Sparse, "a file of no bytes has all that it should have");
        let mut byte = [1];
        memory.memory().span(0, 1, &mut 0).unwrap().read(&mut byte);
        assert!(memory.failed());
        file.set_len(LEN).unwrap();
        file.write_all_at(&[1; LEN as usize], 0).unwrap();
        // A page of what is mapped now is ours, and it may be more: those that are not there are not to be made.
        assert_eq!(memory.memory().pin().unwrap(), Pinned::Sparse);
    }
}
