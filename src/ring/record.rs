//! Where a packed ring stands, written down outside of this process: [`Record`], one per ring, in the [`Records`] of a port.
//!
//! A split ring says in its used index how far the device got. A packed ring does not, and the front end that comes back
//! after we have died does not know either: QEMU repeats the base of the ring's last start (vhost-user,
//! SET_VRING_BASE). So the place is kept in a file that is mapped into this process ([`super::records`]). What a batch pays is
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
//! A record counts only for a ring of the same addresses and size, in the same memory file, and says where the ring is to go on
//! only if its front end says the same base as when the record was begun: one that has lost track repeats it, and one that
//! brings a ring from another host, or from a saved state, knows better. A VM that is restored twice from one state says the
//! same twice, but has other memory. And it counts only until the front end stops the ring by asking for its base, which is
//! then the truth, or is gone ([`super::records`]). Whether the ring in memory bears the record out, and what becomes of the
//! descriptors before another base, is for [`super::packed`] to see.

#![allow(unsafe_code)] // The file is memory that another process may map as well, so it is no Rust slice.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use super::RingConfig;
use super::records::Records;
use crate::sys::mapped_file::FileIdentity;

/// Words before the list: what ring it is (8), `state`, what was published last (slot and descriptor), and one that is free.
pub(super) const HEADER_WORDS: usize = 12;
const DESCRIPTORS: usize = 0;
const DRIVER: usize = 1;
const DEVICE: usize = 2;
const SIZE: usize = 3;
const BASE: usize = 4;
const FILE_DEVICE: usize = 5;
const FILE_INODE: usize = 6;
const FILE_BORN: usize = 7;
pub(super) const STATE: usize = 8;
const LAST_SLOT: usize = 9;
const LAST_WORD: usize = 10;
/// Words of an entry of the list: slot and descriptor.
pub(super) const ENTRY_WORDS: usize = 2;
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
    /// What the front end said when the record was begun.
    pub(super) base: u16,
    /// Where the ring stood, as its base would be.
    pub(super) place: u16,
    /// Where it was about to stand, if `count` is not zero.
    pub(super) target: u16,
    /// How many entries of the list were on their way.
    pub(super) count: u16,
    /// What was published last.
    pub(super) last: Element,
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
    /// A record for a ring of `size` at `words`, which `records` keeps.
    ///
    /// # Safety
    /// From `words` on, which is aligned for them, `records` has mapped all words of such a record, readable and writable, and
    /// no other record is there that a second thread uses.
    pub(super) unsafe fn in_file(words: *mut u64, size: u16, records: Arc<Records>) -> Self {
        Self { words, capacity: size, _memory: Memory::File(records) }
    }

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
        // as `self`, and is aligned for words. Volatile, because a process of the same user may map the file as well, and
        // nothing is believed of it that the ring does not bear out. Should the file lose the page, the mapping's watch puts
        // one of ours.
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
    pub(super) fn bind(&self, config: &RingConfig, file: FileIdentity, place: u16, last: Element) {
        self.set_state(0);
        for (at, word) in identity(config, file) {
            self.write(at, word);
        }
        self.settle(place, last);
    }

    /// What it says of the ring of `config`, if it is about that one.
    pub(super) fn stand(&self, config: &RingConfig, file: FileIdentity) -> Option<Stand> {
        let state = self.read(STATE);
        let same = identity(config, file).into_iter().all(|(at, word)| at == BASE || self.read(at) == word);
        let last = Element { slot: self.read(LAST_SLOT) as u16, word: self.read(LAST_WORD) };
        let [place, target, count] = [state, state >> 16, state >> 32].map(|word| word as u16);
        let stand = Stand { base: self.read(BASE) as u16, place, target, count, last };
        (state & VALID != 0 && same).then_some(stand)
    }
}

/// What tells one ring from another, and its base, in the first words of a record. `file` is what holds the memory that the ring
/// lies in.
fn identity(config: &RingConfig, file: FileIdentity) -> [(usize, u64); 8] {
    let RingConfig { descriptors, available, used, size, base, .. } = *config;
    let FileIdentity { device, inode, born } = file;
    [
        (DESCRIPTORS, descriptors),
        (DRIVER, available),
        (DEVICE, used),
        (SIZE, size.into()),
        (BASE, base.into()),
        (FILE_DEVICE, device),
        (FILE_INODE, inode),
        (FILE_BORN, born),
    ]
}
