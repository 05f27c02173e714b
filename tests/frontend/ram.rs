//! Guest RAM: memfd regions mapped here, each with the address that the guest knows (GPA) and the one that the VMM
//! tells the back end about (UVA).
//!
//! The mappings are vm-memory's, so reads and writes are volatile and bounds-checked and nothing here is unsafe. The
//! UVA is made up: a back end must translate with what the memory table says, so any number that differs from the GPA
//! finds the ones that mix them up.
//!
//! Buffers come from a bump allocator that is only ever rewound as a whole.

use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

const MIB: u64 = 1 << 20;

/// One line of the memory table, with the file behind it.
#[derive(Clone, Debug)]
pub struct Region {
    pub gpa: u64,
    pub uva: u64,
    pub len: u64,
    /// Where in `file` the region starts.
    pub offset: u64,
    pub file: Arc<File>,
}

impl Region {
    /// A region over a memfd of its own.
    pub fn new(gpa: u64, uva: u64, len: u64) -> Self {
        Self { gpa, uva, len, offset: 0, file: memfd(len) }
    }
}

/// A fresh memfd of `len` bytes.
pub fn memfd(len: u64) -> Arc<File> {
    let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memfd");
    ftruncate(&fd, len).expect("ftruncate of a memfd");
    Arc::new(File::from(fd))
}

/// A fresh memfd of `len` bytes in huge pages of 2 MiB, or of 1 GiB. The host may have none to give: the file can be made
/// and shared all the same.
pub fn huge_memfd(len: u64, giant: bool) -> Arc<File> {
    let size = if giant { MemfdFlags::HUGE_1GB } else { MemfdFlags::HUGE_2MB };
    let fd =
        memfd_create("huge-ram", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | size).expect("a kernel with hugetlbfs");
    ftruncate(&fd, len).expect("ftruncate of a memfd");
    Arc::new(File::from(fd))
}

struct Books {
    regions: Vec<Region>,
    /// Bytes handed out, by region.
    taken: Vec<u64>,
}

/// All memory of one guest.
pub struct GuestRam {
    map: GuestMemoryAtomic<GuestMemoryMmap<()>>,
    books: Mutex<Books>,
}

impl GuestRam {
    pub fn new(regions: Vec<Region>) -> Arc<Self> {
        let mapped = regions.iter().map(map).collect();
        let map = GuestMemoryMmap::from_regions(mapped).expect("regions that do not overlap");
        let taken = vec![0; regions.len()];
        Arc::new(Self { map: GuestMemoryAtomic::new(map), books: Mutex::new(Books { regions, taken }) })
    }

    /// RAM as QEMU's `pc` machine lays it out: one file, three windows into it, low memory cut at 768 KiB, and a part
    /// above 4 GiB. `high` bytes are above; buffers come from there.
    pub fn qemu(high: u64) -> Arc<Self> {
        const UVA: u64 = 0x7f12_3400_0000;
        let low = 16 * MIB;
        let file = memfd(low + high);
        let window = |gpa, offset, len| Region { gpa, uva: UVA + offset, len, offset, file: file.clone() };
        Self::new(vec![
            window(0, 0, 0xc_0000),
            window(0x10_0000, 0x10_0000, low - 0x10_0000),
            window(0x1_0000_0000, low, high),
        ])
    }

    /// RAM as DPDK's virtio-user has it: one region whose GPA is its UVA.
    pub fn dpdk(len: u64) -> Arc<Self> {
        Self::new(vec![Region::new(0x1_0020_0000, 0x1_0020_0000, len)])
    }

    pub fn regions(&self) -> Vec<Region> {
        self.books.lock().unwrap().regions.clone()
    }

    /// Adds a region here; telling the back end is the VMM's business.
    pub fn plug(&self, region: Region) {
        let mut books = self.books.lock().unwrap();
        let map = self.map.memory().insert_region(Arc::new(map(&region))).expect("a region that does not overlap");
        self.map.lock().unwrap().replace(map);
        books.regions.push(region);
        books.taken.push(0);
    }

    /// Takes the region at `gpa` out again.
    pub fn unplug(&self, gpa: u64) -> Region {
        let mut books = self.books.lock().unwrap();
        let at = books.regions.iter().position(|region| region.gpa == gpa).expect("a region at this address");
        let (map, _) = self.map.memory().remove_region(GuestAddress(gpa), books.regions[at].len).expect("the region");
        self.map.lock().unwrap().replace(map);
        books.taken.remove(at);
        books.regions.remove(at)
    }

    /// Takes `len` zeroed bytes from the largest region.
    pub fn alloc(&self, len: u64, align: u64) -> u64 {
        let largest = {
            let books = self.books.lock().unwrap();
            books.regions.iter().max_by_key(|region| region.len).expect("a region").gpa
        };
        self.alloc_in(largest, len, align)
    }

    /// Takes `len` bytes from the region that starts at `gpa`.
    pub fn alloc_in(&self, gpa: u64, len: u64, align: u64) -> u64 {
        let mut books = self.books.lock().unwrap();
        let at = books.regions.iter().position(|region| region.gpa == gpa).expect("a region at this address");
        let start = (gpa + books.taken[at]).next_multiple_of(align);
        let end = start + len - gpa;
        assert!(end <= books.regions[at].len, "guest RAM at {gpa:#x} is used up: {end} of {}", books.regions[at].len);
        books.taken[at] = end;
        start
    }

    /// Forgets every allocation. The caller no longer uses any.
    pub fn rewind(&self) {
        self.books.lock().unwrap().taken.fill(0);
    }

    /// The VMM's address of `gpa`.
    pub fn uva(&self, gpa: u64) -> u64 {
        let books = self.books.lock().unwrap();
        let home = books.regions.iter().find(|region| gpa >= region.gpa && gpa - region.gpa < region.len);
        home.map(|region| region.uva + (gpa - region.gpa)).unwrap_or_else(|| panic!("no RAM at {gpa:#x}"))
    }

    pub fn read(&self, gpa: u64, into: &mut [u8]) {
        self.map.memory().read_slice(into, GuestAddress(gpa)).expect("readable guest RAM");
    }

    pub fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(gpa, &mut bytes);
        bytes
    }

    pub fn write(&self, gpa: u64, from: &[u8]) {
        self.map.memory().write_slice(from, GuestAddress(gpa)).expect("writable guest RAM");
    }

    pub fn zero(&self, gpa: u64, len: u64) {
        self.write(gpa, &vec![0; len as usize]);
    }

    /// An atomic load, acquire.
    pub fn load_u16(&self, gpa: u64) -> u16 {
        self.map.memory().load(GuestAddress(gpa), Ordering::Acquire).expect("guest RAM")
    }

    /// An atomic store, release.
    pub fn store_u16(&self, gpa: u64, value: u16) {
        self.map.memory().store(value, GuestAddress(gpa), Ordering::Release).expect("guest RAM");
    }

    pub fn u32(&self, gpa: u64) -> u32 {
        self.map.memory().read_obj(GuestAddress(gpa)).expect("guest RAM")
    }
}

fn map(region: &Region) -> GuestRegionMmap<()> {
    let file = FileOffset::from_arc(region.file.clone(), region.offset);
    let mapping = MmapRegion::from_file(file, region.len as usize).expect("mmap of a memfd");
    GuestRegionMmap::new(mapping, GuestAddress(region.gpa)).expect("an address below 2^64")
}
