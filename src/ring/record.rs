//! Where a packed ring stands, written down outside of this process: [`Record`], one per ring, in the [`Records`] of a port.
//!
//! A split ring says in its used index how far the device got. A packed ring does not, and the front end that comes back
//! after we have died does not know either: QEMU repeats the base of the ring's last start (vhost-user,
//! SET_VRING_BASE). So the place is kept in a file that is mapped into this process, best on tmpfs. What a batch pays is
//! two stores more; the list of what is published lies in the file anyway instead of in memory of our own.
//!
//! A publication is several stores into the ring, and we may be killed between any two. Therefore:
//! 1. what is to be published is in the list, then `state` says that so many of it are on their way from one place to the next;
//! 2. the descriptors are written, the first one last, which is when the driver sees them;
//! 3. `state` says that the ring stands at the next place.
//!
//! Whoever finds a publication on its way looks at its first descriptor: if it is still available, nothing has been seen by
//! the driver, and all are written (again); if not, all were. Only the order of the stores matters for that, not when they
//! reach memory: a process that dies takes no store with it.
//!
//! A record counts only for a ring of the same addresses and size whose front end says the same base as when the record
//! was begun: one that has lost track repeats it, and one that brings a ring from another host knows better. And it counts
//! only until the front end stops the ring by asking for its base, which is then the truth. Whether the ring in memory bears
//! the record out is for [`super::packed`] to see.

#![allow(unsafe_code)] // The file is memory that another process may map as well, so it is no Rust slice.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use rustix::fs::{FallocateFlags, fallocate};

use super::RingConfig;
use crate::limits::RING_SIZE;
use crate::sys::eventfd::EventFd;
use crate::sys::mapped_file::MappedFile;

/// Words before the list: what ring it is (5), `state`, and what was published last (slot and descriptor).
const HEADER_WORDS: usize = 8;
const DESCRIPTORS: usize = 0;
const DRIVER: usize = 1;
const DEVICE: usize = 2;
const SIZE: usize = 3;
const BASE: usize = 4;
const STATE: usize = 5;
const LAST_SLOT: usize = 6;
const LAST_WORD: usize = 7;
/// Words of an entry of the list: slot and descriptor.
const ENTRY_WORDS: usize = 2;
/// Bytes of the file for each ring, in whole pages. Most of them are never touched, and then take no memory.
const RECORD_BYTES: usize = (8 * (HEADER_WORDS + ENTRY_WORDS * RING_SIZE as usize)).next_multiple_of(4096);
/// In `state`: it says something.
const VALID: u64 = 1 << 63;

/// A used descriptor that is not published yet: its slot, and its length, id and flags as one word.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Element {
    pub(super) word: u64,
    pub(super) slot: u16,
}

/// What a record says of its ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stand {
    /// Where the ring stood, as its base would be.
    pub(super) place: u16,
    /// Where it was about to stand, if `count` is not zero.
    pub(super) target: u16,
    /// How many entries of the list were on their way.
    pub(super) count: u16,
    /// What was published last.
    pub(super) last: Element,
}

/// The records of one port's rings, in one file. It goes when nothing is written in it and the port does.
#[derive(Debug)]
pub struct Records {
    path: PathBuf,
    file: Arc<File>,
    rings: usize,
    mapping: MappedFile,
}

impl Records {
    /// Opens or makes the file `path` for so many rings, and its directory if need be. `attention` is signalled should
    /// somebody cut the file short, which then costs the records and nothing else.
    ///
    /// # Errors
    /// The file cannot be made or mapped.
    pub fn open(path: &Path, rings: usize, attention: Arc<EventFd>) -> io::Result<Arc<Self>> {
        if let Some(directory) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = Arc::new(options.open(path)?);
        let len = rings * RECORD_BYTES;
        file.set_len(len as u64)?;
        let mapping = MappedFile::of_ours(Arc::clone(&file), len, attention).map_err(io::Error::other)?;
        Ok(Arc::new(Self { path: path.into(), file, rings, mapping }))
    }

    /// The record of ring number `index`, with room for a ring of `size`.
    ///
    /// # Errors
    /// There is no such ring, or no memory for it: a store to a page that tmpfs has no room for would be SIGBUS.
    pub fn record(self: &Arc<Self>, index: usize, size: u16) -> io::Result<Record> {
        if index >= self.rings {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let offset = index * RECORD_BYTES;
        let len = 8 * (HEADER_WORDS + ENTRY_WORDS * usize::from(size));
        fallocate(&self.file, FallocateFlags::KEEP_SIZE, offset as u64, len as u64)?;
        let words = self.mapping.address().wrapping_add(offset).cast();
        Ok(Record { words, capacity: size, _memory: Memory::File(Arc::clone(self)) })
    }

    /// Forgets ring number `index`: its front end has been told where it stands.
    pub fn forget(&self, index: usize) {
        if index < self.rings {
            self.state(index).store(0, Ordering::Release);
        }
    }

    fn state(&self, index: usize) -> &AtomicU64 {
        debug_assert!(index < self.rings);
        let word = self.mapping.address().wrapping_add(index * RECORD_BYTES + 8 * STATE);
        // SAFETY: `index` is below `rings`, so the word is within the mapping, which lives as long as `self` and begins at
        // a page; every access to it from this process is atomic.
        unsafe { AtomicU64::from_ptr(word.cast()) }
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        if (0..self.rings).all(|index| self.state(index).load(Ordering::Acquire) == 0) {
            // Whoever comes next makes it anew; one that cannot be removed is read as saying nothing.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What keeps the words of a record.
#[derive(Debug)]
enum Memory {
    File(#[expect(dead_code, reason = "keeps the mapping")] Arc<Records>),
    Own(#[expect(dead_code, reason = "keeps the words")] Box<[u64]>),
}

/// Where one ring stands.
#[derive(Debug)]
pub struct Record {
    words: *mut u64,
    /// Entries that the list has room for.
    capacity: u16,
    _memory: Memory,
}

// SAFETY: the pointer leads into memory that `_memory` keeps; one thread at a time has the ring that owns the record.
unsafe impl Send for Record {}

impl Record {
    /// A record that nobody else will see, for a ring of `size`.
    pub fn private(size: u16) -> Self {
        let mut own = vec![0u64; HEADER_WORDS + ENTRY_WORDS * usize::from(size)].into_boxed_slice();
        Self { words: own.as_mut_ptr(), capacity: size, _memory: Memory::Own(own) }
    }

    #[inline]
    fn word(&self, at: usize) -> *mut u64 {
        debug_assert!(at < HEADER_WORDS + ENTRY_WORDS * usize::from(self.capacity));
        self.words.wrapping_add(at)
    }

    #[inline]
    fn read(&self, at: usize) -> u64 {
        // SAFETY: callers pass words of the header or of entries below `capacity`, which the memory has; it lives as long
        // as `self`, and is aligned for words. Volatile, because somebody else may map the file.
        unsafe { self.word(at).read_volatile() }
    }

    #[inline]
    fn write(&self, at: usize, value: u64) {
        // SAFETY: as for `read`.
        unsafe { self.word(at).write_volatile(value) };
    }

    #[inline]
    fn set_state(&self, state: u64) {
        // SAFETY: as for `read`. Release: what was written before counts before this does.
        unsafe { AtomicU64::from_ptr(self.word(STATE)) }.store(state, Ordering::Release);
    }

    /// Entry `at` of the list; none beyond its end.
    #[inline]
    pub(super) fn element(&self, at: u16) -> Option<Element> {
        if at >= self.capacity {
            return None;
        }
        let first = HEADER_WORDS + ENTRY_WORDS * usize::from(at);
        Some(Element { slot: self.read(first) as u16, word: self.read(first + 1) })
    }

    /// Writes entry `at` of the list; `false` beyond its end.
    #[inline]
    pub(super) fn set_element(&self, at: u16, element: Element) -> bool {
        if at >= self.capacity {
            return false;
        }
        let first = HEADER_WORDS + ENTRY_WORDS * usize::from(at);
        self.write(first, element.slot.into());
        self.write(first + 1, element.word);
        true
    }

    /// Says that the first `count` entries of the list are on their way, from `place` to `target`.
    #[inline]
    pub(super) fn begin(&self, place: u16, target: u16, count: u16) {
        self.set_state(VALID | u64::from(place) | u64::from(target) << 16 | u64::from(count) << 32);
        // A process that is killed has run its instructions up to one of them, so the CPU needs no more than their order;
        // nor may the compiler move a later store above this one.
        compiler_fence(Ordering::SeqCst);
    }

    /// Says that the ring stands at `place`, and what was published last.
    #[inline]
    pub(super) fn settle(&self, place: u16, last: Element) {
        compiler_fence(Ordering::SeqCst);
        self.write(LAST_SLOT, last.slot.into());
        self.write(LAST_WORD, last.word);
        self.set_state(VALID | u64::from(place));
    }

    /// Makes this the record of a ring that stands at `place`, where nothing was published yet that could be told.
    pub(super) fn bind(&self, config: &RingConfig, place: u16, last: Element) {
        self.set_state(0);
        for (at, word) in identity(config) {
            self.write(at, word);
        }
        self.settle(place, last);
    }

    /// What it says of the ring of `config`, if it is about that one.
    pub(super) fn stand(&self, config: &RingConfig) -> Option<Stand> {
        let state = self.read(STATE);
        let same = identity(config).into_iter().all(|(at, word)| self.read(at) == word);
        let last = Element { slot: self.read(LAST_SLOT) as u16, word: self.read(LAST_WORD) };
        let stand = Stand { place: state as u16, target: (state >> 16) as u16, count: (state >> 32) as u16, last };
        (state & VALID != 0 && same).then_some(stand)
    }
}

/// What tells one ring from another.
fn identity(config: &RingConfig) -> [(usize, u64); 5] {
    let RingConfig { descriptors, available, used, size, base, .. } = *config;
    [(DESCRIPTORS, descriptors), (DRIVER, available), (DEVICE, used), (SIZE, size.into()), (BASE, base.into())]
}
