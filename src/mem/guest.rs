//! The memory that one front end shares, as an immutable map: [`GuestMemory`].
//!
//! A change of the map (hot-plug, a new table) is a new `GuestMemory` that shares the unchanged [`Region`]s with the old
//! one, so host addresses of what stays do not change. Rings hold the map in an `Arc`; the control side swaps it under
//! each ring's lock and drops the old one itself, so the unmapping happens on a control thread, never on a shard.
//!
//! Translation is by guest-physical address over a small sorted array: front ends share one to eight regions (QEMU: two),
//! and the last hit is tried first, so a lookup is one compare. Trials with a map or with vm-memory's own lookup cost 5
//! to 10 times as much per frame. The mappings themselves are vm-memory's.

#![allow(unsafe_code)] // The floor of the house: host pointers of guest memory are made here.

use std::fs::File;
use std::marker::PhantomData;
use std::sync::Arc;

use vm_memory::mmap::MmapRegion;

use super::Span;
use super::budget::Place;
use crate::sys::mapped_file::{FileIdentity, Loss, MappedFile};

/// One contiguous piece of guest memory, mapped here.
#[derive(Debug)]
pub struct Region {
    /// Guest-physical address of its first byte.
    pub guest: u64,
    /// Address of its first byte in the front end's own address space: ring addresses are given in these.
    pub user: u64,
    /// Length in bytes.
    pub len: u64,
    mapping: Mapping,
    /// Goes when it is unmapped; that of its file with the last region that lies in it.
    places: Option<(Place, Arc<Place>)>,
}

/// What a region's bytes are kept in.
#[derive(Debug)]
enum Mapping {
    /// A file that a front end shares.
    File(MappedFile),
    /// Memory of our own, which plays a guest's.
    Own(MmapRegion),
}

impl Region {
    /// A region at guest address `guest` and front-end address `user` that is all of `memory` of our own.
    pub fn new(guest: u64, user: u64, memory: MmapRegion) -> Self {
        Self { guest, user, len: memory.size() as u64, mapping: Mapping::Own(memory), places: None }
    }

    /// The same of a file that a front end shares.
    pub(super) fn of_file(guest: u64, user: u64, file: MappedFile, places: (Place, Arc<Place>)) -> Self {
        Self { guest, user, len: file.len() as u64, mapping: Mapping::File(file), places: Some(places) }
    }

    /// Whether the file behind it was found to lack pages; they read as zeros now.
    pub fn failed(&self) -> bool {
        self.mapped_file().is_some_and(|file| file.failure().is_some())
    }

    /// Undoes what that has done to the table of mappings, once no ring is in it any more.
    pub(super) fn settle(&self) {
        if let Some(file) = self.mapped_file() {
            file.settle();
        }
    }

    /// Why it does.
    pub fn loss(&self) -> Option<Loss> {
        self.mapped_file()?.loss()
    }

    /// The file behind it, as it is mapped.
    pub(super) fn mapped_file(&self) -> Option<&MappedFile> {
        match &self.mapping {
            Mapping::File(file) => Some(file),
            Mapping::Own(_) => None,
        }
    }

    /// The file with its place, for another region that lies in it.
    pub(super) fn open_file(&self) -> Option<(Arc<File>, Arc<Place>)> {
        Some((Arc::clone(self.mapped_file()?.file()), Arc::clone(&self.places.as_ref()?.1)))
    }

    /// Where it is mapped: `len` bytes, readable and writable.
    fn address(&self) -> *mut u8 {
        match &self.mapping {
            Mapping::File(file) => file.address(),
            Mapping::Own(memory) => memory.as_ptr(),
        }
    }

    /// Where the region is mapped here, as a number.
    pub fn host_address(&self) -> usize {
        self.address() as usize
    }
}

/// All regions of one front end, sorted by guest-physical address; immutable.
#[derive(Debug, Default)]
pub struct GuestMemory {
    table: Box<[Entry]>,
    regions: Box<[Arc<Region>]>,
}

/// What translation needs of a region, close together.
#[derive(Debug, Clone, Copy)]
struct Entry {
    guest: u64,
    len: u64,
    host: *mut u8,
}

// SAFETY: `host` points into the mapping that the `Arc<Region>` beside it keeps; it is only handed out in spans, whose
// accesses tolerate concurrent use and any contents.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; the map itself is immutable.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// A map of `regions`. The caller has made sure that no two overlap in guest-physical addresses.
    pub fn new(mut regions: Vec<Arc<Region>>) -> Self {
        regions.sort_by_key(|region| region.guest);
        let entry = |r: &Arc<Region>| Entry { guest: r.guest, len: r.len, host: r.address() };
        Self { table: regions.iter().map(entry).collect(), regions: regions.into() }
    }

    /// The regions, by ascending guest-physical address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Whether a file behind it was found to lack pages.
    pub fn failed(&self) -> bool {
        self.regions.iter().any(|region| region.failed())
    }

    /// The span of `len` bytes at guest-physical address `guest`, if all of it lies in one region. `hint` remembers the
    /// region of the last hit between calls.
    #[inline]
    pub fn span(&self, guest: u64, len: u32, hint: &mut usize) -> Option<Span<'_>> {
        if let Some(entry) = self.table.get(*hint) {
            let offset = guest.wrapping_sub(entry.guest);
            if offset < entry.len && u64::from(len) <= entry.len - offset {
                return Some(entry.span(offset, len));
            }
        }
        self.find(guest, len, hint)
    }

    /// The region that holds guest-physical address `guest`; one of no bytes if none does.
    pub fn window(&self, guest: u64) -> Window<'_> {
        let at = self.table.partition_point(|entry| entry.guest <= guest).checked_sub(1);
        let none = Entry { guest: 0, len: 0, host: std::ptr::null_mut() };
        Window { entry: at.and_then(|at| self.table.get(at)).copied().unwrap_or(none), memory: PhantomData }
    }

    /// The slow half of [`GuestMemory::span`]: another region than last time.
    #[cold]
    fn find(&self, guest: u64, len: u32, hint: &mut usize) -> Option<Span<'_>> {
        let at = self.table.partition_point(|entry| entry.guest <= guest).checked_sub(1)?;
        let entry = self.table.get(at)?;
        let offset = guest - entry.guest;
        if offset >= entry.len || u64::from(len) > entry.len - offset {
            return None;
        }
        *hint = at;
        Some(entry.span(offset, len))
    }

    /// The longest span that begins at `guest` and has at most `len` bytes: for buffers that lie across two regions.
    /// `None` if nothing is mapped there.
    pub fn span_up_to(&self, guest: u64, len: u32) -> Option<Span<'_>> {
        let at = self.table.partition_point(|entry| entry.guest <= guest).checked_sub(1)?;
        let entry = self.table.get(at)?;
        let offset = guest - entry.guest;
        let here = entry.len.checked_sub(offset).filter(|&left| left > 0)?;
        Some(entry.span(offset, u32::try_from(here).map_or(len, |here| here.min(len))))
    }

    /// Guest-physical address of `span`, if it lies in this memory. For the dirty log: a walk over the regions, of which
    /// most guests have two.
    pub fn guest_of(&self, span: &Span<'_>) -> Option<u64> {
        let address = span.as_iovec().iov_base as usize;
        let offset = |entry: &Entry| address.checked_sub(entry.host as usize).map(|offset| offset as u64);
        self.table.iter().find_map(|entry| offset(entry).filter(|&at| at < entry.len).map(|at| entry.guest + at))
    }

    /// Which file holds the memory at guest-physical address `guest`; that of no file if it is shared by none.
    pub fn file_at(&self, guest: u64) -> FileIdentity {
        let holds = |region: &&Arc<Region>| guest.checked_sub(region.guest).is_some_and(|offset| offset < region.len);
        let file = self.regions.iter().find(holds).and_then(|region| region.mapped_file());
        file.map_or(FileIdentity::default(), MappedFile::identity)
    }

    /// Guest-physical address of the front end's own address `user`, if it shares that.
    pub fn guest_address(&self, user: u64) -> Option<u64> {
        let holds = |r: &&Arc<Region>| user.checked_sub(r.user).is_some_and(|offset| offset < r.len);
        self.regions.iter().find(holds).map(|r| r.guest + (user - r.user))
    }
}

/// One region, for looking up many addresses that mostly lie in it: three words that a loop can keep in registers.
#[derive(Debug, Clone, Copy)]
pub struct Window<'m> {
    entry: Entry,
    memory: PhantomData<&'m GuestMemory>,
}

impl<'m> Window<'m> {
    /// The span of `len` bytes at guest-physical address `guest`, if all of it lies in this region.
    #[inline(always)]
    pub fn span(&self, guest: u64, len: u32) -> Option<Span<'m>> {
        let offset = guest.wrapping_sub(self.entry.guest);
        if offset < self.entry.len && u64::from(len) <= self.entry.len - offset {
            // SAFETY: as for `Entry::span`: within a live mapping, which the `GuestMemory` of `'m` keeps, and stays readable and
            // writable whatever its file does.
            return Some(unsafe { Span::from_raw(self.entry.host.add(offset as usize), len) });
        }
        None
    }
}

impl Entry {
    #[inline]
    fn span(&self, offset: u64, len: u32) -> Span<'_> {
        // SAFETY: callers have checked that `offset + len` lies within `self.len`, the length of a live mapping that is
        // readable and writable; the span borrows the map, whose `Arc<Region>` keeps the mapping, and keeps it so: where the
        // file has no page any more, the mapping's watch puts one of ours (`sys::mapped_file`). No Rust reference into guest
        // memory is ever made.
        unsafe { Span::from_raw(self.host.add(offset as usize), len) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn memory() -> GuestMemory {
        let region = |guest, user, len| Arc::new(Region::new(guest, user, MmapRegion::new(len).unwrap()));
        GuestMemory::new(vec![region(0x10_0000, 0x7000_0000, 0x2000), region(0, 0x8000_0000, 0x1000)])
    }

    #[test]
    fn translation_keeps_to_one_region_and_never_overflows() {
        let (memory, mut hint) = (memory(), 0);
        assert_eq!(memory.span(0xfff, 1, &mut hint).unwrap().len(), 1);
        assert!(memory.span(0xfff, 2, &mut hint).is_none());
        assert!(memory.span(0x10_0000, 0x2000, &mut hint).is_some());
        assert_eq!(hint, 1);
        assert!(memory.span(0x10_0000, 0x2001, &mut hint).is_none());
        assert!(memory.span(u64::MAX, 1, &mut hint).is_none());
        assert!(memory.span(u64::MAX - 1, u32::MAX, &mut hint).is_none());
        assert!(memory.span(0x1000, 0, &mut hint).is_none(), "a hole is a hole even for no bytes");
        assert_eq!(memory.span_up_to(0xff0, 0x100).unwrap().len(), 0x10);
        assert!(memory.span_up_to(0x1000, 1).is_none());
        assert_eq!(memory.guest_address(0x7000_0010), Some(0x10_0010));
        assert_eq!(memory.guest_address(0x7000_2000), None);
    }

    #[test]
    fn bytes_written_through_one_map_are_seen_through_another_that_shares_the_region() {
        let (old, mut hint) = (memory(), 0);
        old.span(0x10, 4, &mut hint).unwrap().write(b"abcd");
        let new = GuestMemory::new(vec![Arc::clone(&old.regions()[0])]);
        drop(old);
        let mut got = [0; 4];
        new.span(0x10, 4, &mut hint).unwrap().read(&mut got);
        assert_eq!(&got, b"abcd");
    }
}
