//! The regions that one front end shares, checked before they are mapped: [`SharedMemory`].
//!
//! A region longer than its file costs the whole process its life at the first access behind the end (SIGBUS), so
//! everything is checked here first, with what [`Backing`] says of the file. What can still happen later, a file that
//! shrinks or a host that has no page left for it, is the matter of [`MappedFile`].
//!
//! A change never touches what is there. It makes a new `SharedMemory` that has the unchanged regions in common with the
//! old one; the caller hands its [`GuestMemory`] to every ring and only then drops the old one, which unmaps what is gone.

use std::fs::File;
use std::sync::Arc;

use super::budget::{Account, Budget, Exhausted};
use super::{GuestMemory, Region};
use crate::limits::{MEMORY_BYTES, MEMORY_REGIONS};
use crate::sys::eventfd::EventFd;
use crate::sys::mapped_file::{Backing, FileIdentity, Loss, MappedFile, MappedFileError, page_bytes};

/// Why a region cannot be shared with us.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// A region of no bytes, or one whose end does not fit 64 bits.
    #[error("region {0} is empty or ends beyond 64 bits")]
    Bounds(RegionRequest),
    /// Addresses, length or offset that are no multiple of the page size.
    #[error("region {0} does not begin and end at multiples of its {1} byte pages")]
    Unaligned(RegionRequest, u64),
    /// Two regions share addresses.
    #[error("region {0} overlaps region {1}")]
    Overlap(RegionRequest, RegionRequest),
    /// More regions than we take.
    #[error("{0} regions are more than {MEMORY_REGIONS}")]
    TooMany(usize),
    /// More bytes than the port takes.
    #[error(
        "the regions add up to {bytes} bytes and the port takes {most}: say in `memory` of its `vhost-user` how much its VM may have"
    )]
    TooLarge {
        /// What they add up to.
        bytes: u64,
        /// The limit.
        most: u64,
    },
    /// More regions than this process can map beside those of others.
    #[error(
        "it has {held} regions mapped, and there is no room for more beside those of other VMs, as this host lets a process have {limit} mappings: raise vm.max_map_count with sysctl and restart linecardd, or give the VM less pieces of memory"
    )]
    NoRoom {
        /// How many it has.
        held: u32,
        /// The kernel's limit.
        limit: u32,
    },
    /// More files than this process can have open beside those of others.
    #[error(
        "its memory is in {held} files, and there is no room for more beside those of other VMs, as linecardd may have {limit} descriptors: raise LimitNOFILE= of its unit (ulimit -Hn) and restart it, or give the VM its memory in fewer files"
    )]
    NoDescriptor {
        /// How many it has.
        held: u32,
        /// The process's limit.
        limit: u32,
    },
    /// Its file is none that can be mapped, or does not hold it.
    #[error("region {0}")]
    File(RegionRequest, #[source] MappedFileError),
}

/// A region as a front end describes it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionRequest {
    /// Guest-physical address.
    pub guest: u64,
    /// Address in the front end's own address space.
    pub user: u64,
    /// Length.
    pub len: u64,
    /// Where it begins in the file.
    pub offset: u64,
}

impl std::fmt::Display for RegionRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}+{:#x} (front end's {:#x}, file offset {:#x})", self.guest, self.len, self.user, self.offset)
    }
}

impl RegionRequest {
    /// Whether both name the same piece of guest memory. The offset does not count: REM_MEM_REG leaves it out.
    fn is_at(&self, other: &Self) -> bool {
        (self.guest, self.user, self.len) == (other.guest, other.user, other.len)
    }

    /// Whether they share guest-physical addresses or addresses of the front end. Bounds are checked already.
    fn overlaps(&self, other: &Self) -> bool {
        let meet = |a: u64, b: u64| a < b + other.len && b < a + self.len;
        meet(self.guest, other.guest) || meet(self.user, other.user)
    }
}

/// A region that is mapped, and what it was made from.
#[derive(Debug, Clone)]
struct Shared {
    request: RegionRequest,
    file: FileIdentity,
    region: Arc<Region>,
}

/// How many regions and files a front end has, and may have beside others.
#[derive(Debug, Clone)]
struct Accounts {
    mappings: Arc<Account>,
    files: Arc<Account>,
}

/// All memory that one front end shares at one time.
#[derive(Debug)]
pub struct SharedMemory {
    regions: Vec<Shared>,
    memory: Arc<GuestMemory>,
    attention: Arc<EventFd>,
    accounts: Accounts,
    /// How many bytes there may be.
    most: u64,
}

impl SharedMemory {
    /// Nothing shared yet, and no more than `most` bytes, or [`MEMORY_BYTES`], to come. `attention` is signalled when a file
    /// shrinks under its mapping.
    pub fn new(attention: Arc<EventFd>, most: u64) -> Self {
        let [mappings, files] = [Budget::mappings_of_process(), Budget::files_of_process()].map(Account::new);
        Self::within(attention, most, Accounts { mappings, files })
    }

    fn within(attention: Arc<EventFd>, most: u64, accounts: Accounts) -> Self {
        Self { regions: Vec::new(), memory: Arc::default(), attention, accounts, most: most.min(MEMORY_BYTES) }
    }

    /// These regions under the same rules.
    fn of(&self, regions: Vec<Shared>) -> Self {
        let memory = Arc::new(GuestMemory::new(regions.iter().map(|shared| Arc::clone(&shared.region)).collect()));
        let (attention, accounts) = (Arc::clone(&self.attention), self.accounts.clone());
        Self { regions, memory, attention, accounts, most: self.most }
    }

    /// The map for rings.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// How many regions there are.
    pub fn region_count(&self) -> usize {
        self.regions.len()
    }

    /// Their bytes together.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|shared| shared.request.len).sum()
    }

    /// Whether a file was found to lack pages while it was mapped.
    pub fn failed(&self) -> bool {
        self.memory.failed()
    }

    /// Undoes what that has done to the kernel's table of mappings, once no ring runs any more: a front end that keeps what
    /// failed must not keep a part of that table.
    pub fn settle(&self) {
        self.regions.iter().for_each(|shared| shared.region.settle());
    }

    /// Why it does, of the first that does.
    pub fn loss(&self) -> Option<Loss> {
        self.regions.iter().find_map(|shared| shared.region.loss())
    }

    /// The memory once `table` takes the place of all regions (SET_MEM_TABLE). Regions that stay keep their mapping;
    /// `None` if all of them do.
    ///
    /// # Errors
    /// The first region that is refused; nothing has changed then.
    pub fn replaced(&self, table: Vec<(RegionRequest, File)>) -> Result<Option<Self>, MappingError> {
        let mut next = Self::within(Arc::clone(&self.attention), self.most, self.accounts.clone());
        for (request, file) in table {
            let backing = check(&request, &file)?;
            let kept = self.regions.iter().find(|s| s.request == request && s.file == backing.identity);
            match kept.filter(|s| !s.region.failed()) {
                Some(kept) if next.admits(&request, backing.identity)? => next.regions.push(kept.clone()),
                None if next.admits(&request, backing.identity)? => {
                    next.regions.push(next.map(request, file.into(), &backing, &self.regions)?)
                }
                _ => {}
            }
        }
        let same = |s: &Shared| self.regions.iter().any(|o| Arc::ptr_eq(&o.region, &s.region));
        let unchanged = next.regions.len() == self.regions.len() && next.regions.iter().all(same);
        Ok((!unchanged).then(|| self.of(next.regions)))
    }

    /// The memory with one region more (ADD_MEM_REG). `None` if that very region is there already: QEMU 7.2 adds each
    /// region once per queue pair.
    ///
    /// # Errors
    /// Why the region is refused.
    pub fn with(&self, request: RegionRequest, file: File) -> Result<Option<Self>, MappingError> {
        let backing = check(&request, &file)?;
        if !self.admits(&request, backing.identity)? {
            return Ok(None);
        }
        let mut regions = self.regions.clone();
        regions.push(self.map(request, file.into(), &backing, &[])?);
        Ok(Some(self.of(regions)))
    }

    /// The memory with one region less (REM_MEM_REG). `None` if there is no such region: QEMU 7.2 removes each region
    /// once per queue pair.
    pub fn without(&self, request: &RegionRequest) -> Option<Self> {
        let kept = |s: &&Shared| !s.request.is_at(request);
        let regions: Vec<_> = self.regions.iter().filter(kept).cloned().collect();
        (regions.len() < self.regions.len()).then(|| self.of(regions))
    }

    /// The memory with new mappings for the regions whose files were found to lack pages.
    ///
    /// # Errors
    /// A file does not hold its region any more.
    pub fn mapped_anew(&self) -> Result<Self, MappingError> {
        let mut regions = self.regions.clone();
        for shared in regions.iter_mut().filter(|shared| shared.region.failed()) {
            let Some(mapped) = shared.region.mapped_file() else { continue };
            let file = Arc::clone(mapped.file());
            let backing = check(&shared.request, &file)?;
            *shared = self.map(shared.request, file, &backing, &[])?;
        }
        Ok(self.of(regions))
    }

    /// Whether a checked region may be added to these: `false` if it is an exact duplicate.
    fn admits(&self, request: &RegionRequest, file: FileIdentity) -> Result<bool, MappingError> {
        if self.regions.iter().any(|s| s.request == *request && s.file == file && !s.region.failed()) {
            return Ok(false);
        }
        if let Some(other) = self.regions.iter().find(|s| s.request.overlaps(request)) {
            return Err(MappingError::Overlap(*request, other.request));
        }
        if self.regions.len() >= MEMORY_REGIONS {
            return Err(MappingError::TooMany(self.regions.len() + 1));
        }
        let bytes = self.bytes().saturating_add(request.len);
        if bytes > self.most {
            return Err(MappingError::TooLarge { bytes, most: self.most });
        }
        Ok(true)
    }

    /// Maps a region. Where another of these, or of `others`, lies in the same file, they have it together, and the descriptor that
    /// came with this one is closed.
    fn map(
        &self,
        request: RegionRequest,
        file: Arc<File>,
        backing: &Backing,
        others: &[Shared],
    ) -> Result<Shared, MappingError> {
        let Accounts { mappings, files } = &self.accounts;
        let place = mappings.take().map_err(|Exhausted { held, limit }| MappingError::NoRoom { held, limit })?;
        let mut there = self.regions.iter().chain(others).filter(|shared| shared.file == backing.identity);
        let (file, of_file) = match there.find_map(|shared| shared.region.open_file()) {
            Some(open) => open,
            None => {
                let room =
                    files.take().map_err(|Exhausted { held, limit }| MappingError::NoDescriptor { held, limit })?;
                (file, Arc::new(room))
            }
        };
        let attention = Arc::clone(&self.attention);
        let mapped = MappedFile::of_peer(file, backing, request.offset, request.len, attention)
            .map_err(|source| MappingError::File(request, source))?;
        let region = Arc::new(Region::of_file(request.guest, request.user, mapped, (place, of_file)));
        Ok(Shared { request, file: backing.identity, region })
    }
}

/// Looks at a region and its file before anything is mapped; returns what file it is.
fn check(request: &RegionRequest, file: &File) -> Result<Backing, MappingError> {
    let ends = [request.guest, request.user, request.offset].map(|start| start.checked_add(request.len));
    // File offsets are signed (mmap(2): off_t).
    let fits = ends.iter().all(|end| end.is_some_and(|end| i64::try_from(end).is_ok()));
    if request.len == 0 || !fits {
        return Err(MappingError::Bounds(*request));
    }
    let refused = |source| MappingError::File(*request, source);
    let backing = Backing::of(file).map_err(refused)?;
    let (small, page) = (page_bytes(), backing.page);
    let multiple = |value: u64, of: u64| value.is_multiple_of(of);
    // Guest addresses need not be aligned to huge pages, only what the kernel maps does.
    let aligned = multiple(request.guest, small) && multiple(request.user, small);
    if !aligned || !multiple(request.len, page) || !multiple(request.offset, page) {
        return Err(MappingError::Unaligned(*request, page));
    }
    let end = request.offset + request.len;
    if end > backing.size {
        return Err(refused(MappedFileError::TooShort { end, size: backing.size }));
    }
    Ok(backing)
}

/// Bytes of memory that this host has, swap included: what all VMs on it can have together.
pub fn host_bytes() -> u64 {
    let host = rustix::system::sysinfo();
    (host.totalram as u64).saturating_add(host.totalswap as u64).saturating_mul(host.mem_unit.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::fd::OwnedFd;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    const PAGE: u64 = 4096;

    fn memfd(len: u64) -> File {
        let file = File::from(memfd_create("linecard-test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    fn empty() -> SharedMemory {
        SharedMemory::new(Arc::new(EventFd::new().unwrap()), u64::MAX)
    }

    fn at(guest: u64, user: u64, len: u64, offset: u64) -> RegionRequest {
        RegionRequest { guest, user, len, offset }
    }

    #[test]
    fn regions_that_do_not_fit_their_file_or_64_bits_are_refused() {
        let memory = empty();
        let refused = |request, len| memory.with(request, memfd(len)).unwrap_err();
        assert!(
            matches!(refused(at(0, 0, 8 * PAGE, 0), 4 * PAGE), MappingError::File(_, MappedFileError::TooShort { size, .. }) if size == 4 * PAGE)
        );
        let too_short = refused(at(0, 0, 4 * PAGE, PAGE), 4 * PAGE);
        assert!(matches!(too_short, MappingError::File(_, MappedFileError::TooShort { .. })));
        assert!(matches!(refused(at(0, 0, PAGE, u64::MAX - PAGE + 1), PAGE), MappingError::Bounds(_)));
        assert!(matches!(refused(at(u64::MAX - 1, 0, PAGE, 0), PAGE), MappingError::Bounds(_)));
        assert!(matches!(refused(at(0, u64::MAX - 1, PAGE, 0), PAGE), MappingError::Bounds(_)));
        assert!(matches!(refused(at(0, 0, 0, 0), PAGE), MappingError::Bounds(_)));
        for odd in [at(1, 0, PAGE, 0), at(0, 1, PAGE, 0), at(0, 0, PAGE - 1, 0), at(0, 0, PAGE, 1)] {
            assert!(matches!(refused(odd, 4 * PAGE), MappingError::Unaligned(_, PAGE)), "{odd}");
        }
        let refusal = refused(at(0, 0, 8 * PAGE, 0), 4 * PAGE);
        let message = std::error::Error::source(&refusal).unwrap().to_string();
        assert!(message.ends_with("ends at byte 32768 of a file that has 16384 bytes"), "{message}");
    }

    #[test]
    fn only_memory_file_systems_are_taken() {
        let memory = empty();
        let proc = File::open("/proc/self/maps").unwrap();
        assert!(matches!(memory.with(at(0, 0, PAGE, 0), proc), Err(MappingError::File(_, MappedFileError::NotMemory))));
        let (pipe, _other) = std::io::pipe().unwrap();
        let pipe = File::from(OwnedFd::from(pipe));
        assert!(matches!(memory.with(at(0, 0, PAGE, 0), pipe), Err(MappingError::File(_, MappedFileError::NotMemory))));
        let read_only = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memfd(PAGE))));
        if let Ok(file) = read_only {
            assert!(matches!(
                memory.with(at(0, 0, PAGE, 0), file),
                Err(MappingError::File(_, MappedFileError::Map(_)))
            ));
        }
    }

    #[test]
    fn duplicates_are_one_region_and_overlaps_are_refused() {
        let file = memfd(16 * PAGE);
        let again = || file.try_clone().unwrap();
        let first = at(0x1000, 0x7000_0000, 4 * PAGE, 0);
        let one = empty().with(first, again()).unwrap().unwrap();
        assert!(one.with(first, again()).unwrap().is_none());
        for overlap in [
            at(0x4000, 0x9000_0000, PAGE, 0),
            at(0x10_0000, 0x7000_3000, PAGE, 0),
            at(0, 0x9000_0000, 16 * PAGE, 0),
            at(0x1000, 0x7000_0000, 4 * PAGE, PAGE),
        ] {
            assert!(matches!(one.with(overlap, again()), Err(MappingError::Overlap(..))), "{overlap}");
        }
        assert!(
            matches!(one.with(first, memfd(16 * PAGE)), Err(MappingError::Overlap(..))),
            "another file is no duplicate"
        );
        assert!(one.without(&at(0x1000, 0x7000_1000, 4 * PAGE, 0)).is_none());
        let none = one.without(&at(0x1000, 0x7000_0000, 4 * PAGE, 0x77)).unwrap();
        assert_eq!((one.region_count(), one.bytes(), none.region_count()), (1, 4 * PAGE, 0));
    }

    #[test]
    fn a_table_keeps_the_mappings_of_what_it_has_in_common_with_the_last() {
        let (low, high) = (memfd(4 * PAGE), memfd(4 * PAGE));
        let (a, b) = (at(0, 0x7000_0000, 4 * PAGE, 0), at(0x10_0000, 0x8000_0000, 4 * PAGE, 0));
        let table = |list: &[(RegionRequest, &File)]| {
            list.iter().map(|(request, file)| (*request, file.try_clone().unwrap())).collect::<Vec<_>>()
        };
        let one = empty().replaced(table(&[(a, &low)])).unwrap().unwrap();
        assert!(one.replaced(table(&[(a, &low)])).unwrap().is_none());
        let two = one.replaced(table(&[(b, &high), (a, &low), (a, &low)])).unwrap().unwrap();
        assert_eq!(two.region_count(), 2);
        assert!(Arc::ptr_eq(&two.memory().regions()[0], &one.memory().regions()[0]));
        let other = two.replaced(table(&[(a, &high)])).unwrap().unwrap();
        assert!(!Arc::ptr_eq(&other.memory().regions()[0], &one.memory().regions()[0]));
        assert!(two.replaced(table(&[(a, &low), (at(0x1000, 0x9000_0000, PAGE, 0), &high)])).is_err());
        assert_eq!(two.region_count(), 2, "a refused table changes nothing");
    }

    #[test]
    fn count_and_total_are_bounded() {
        let file = memfd((MEMORY_REGIONS as u64 + 1) * PAGE);
        let mut memory = empty();
        for i in 0..MEMORY_REGIONS as u64 {
            let request = at(i * PAGE, i * PAGE, PAGE, i * PAGE);
            memory = memory.with(request, file.try_clone().unwrap()).unwrap().unwrap();
        }
        let more = at(1 << 40, 1 << 40, PAGE, 0);
        assert!(matches!(memory.with(more, file), Err(MappingError::TooMany(510))));
        let sparse = memfd(MEMORY_BYTES + PAGE);
        assert!(matches!(empty().with(at(0, 0, MEMORY_BYTES + PAGE, 0), sparse), Err(MappingError::TooLarge { .. })));
    }

    #[test]
    fn a_port_takes_as_many_bytes_as_it_may_however_they_come() {
        let none = SharedMemory::new(Arc::new(EventFd::new().unwrap()), 4 * PAGE);
        let sparse = memfd(64 * PAGE);
        let file = || sparse.try_clone().unwrap();
        let [one, two, more] =
            [at(0, 0, 3 * PAGE, 0), at(8 * PAGE, 8 * PAGE, PAGE, 0), at(16 * PAGE, 16 * PAGE, PAGE, 0)];
        let full = none.with(one, file()).unwrap().unwrap().with(two, file()).unwrap().unwrap();
        let refused = full.with(more, file()).unwrap_err();
        assert!(
            refused.to_string().contains("add up to 20480 bytes and the port takes 16384: say in `memory`"),
            "{refused}"
        );
        let table = |regions: &[RegionRequest]| regions.iter().map(|region| (*region, file())).collect::<Vec<_>>();
        assert!(matches!(none.replaced(table(&[one, two, more])), Err(MappingError::TooLarge { .. })));
        // What goes makes room, and what stays is not counted twice.
        assert_eq!(full.replaced(table(&[one, more])).unwrap().unwrap().bytes(), 4 * PAGE);
        assert!(full.without(&two).unwrap().with(more, file()).unwrap().is_some());
        assert!(full.with(one, file()).unwrap().is_none());
    }

    fn within([mappings, files]: &[Arc<Budget>; 2]) -> SharedMemory {
        let [mappings, files] = [mappings, files].map(|budget| Account::new(Arc::clone(budget)));
        SharedMemory::within(Arc::new(EventFd::new().unwrap()), u64::MAX, Accounts { mappings, files })
    }

    /// Descriptors of this process for memory files of that name.
    fn descriptors_of(name: &str) -> usize {
        let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let links = open.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        links.filter(|link| link.to_string_lossy().contains(&format!("memfd:{name} "))).count()
    }

    #[test]
    fn regions_of_one_file_have_one_descriptor_together_for_as_long_as_one_of_them_is_there() {
        const NAME: &str = "linecard-test-shared";
        let file = File::from(memfd_create(NAME, MemfdFlags::CLOEXEC).unwrap());
        file.set_len(64 * PAGE).unwrap();
        let region = |i: u64| (at(i * PAGE, i * PAGE, PAGE, i * PAGE), file.try_clone().unwrap());
        let table = |range: std::ops::Range<u64>| range.map(region).collect::<Vec<_>>();
        let mut memory = empty().replaced(table(0..32)).unwrap().unwrap();
        assert_eq!(descriptors_of(NAME) - 1, 1, "beside the one here");
        for i in 32..64 {
            let (request, file) = region(i);
            memory = memory.with(request, file).unwrap().unwrap();
        }
        memory = memory.replaced(table(32..64)).unwrap().unwrap();
        assert_eq!((descriptors_of(NAME) - 1, memory.region_count()), (1, 32));
        for i in 32..63 {
            memory = memory.without(&region(i).0).unwrap();
        }
        assert_eq!(descriptors_of(NAME) - 1, 1);
        // Another file is another, and the first is closed with its last region.
        memory = memory.with(at(0, 0, PAGE, 0), memfd(PAGE)).unwrap().unwrap();
        memory = memory.without(&region(63).0).unwrap();
        assert_eq!((descriptors_of(NAME) - 1, memory.region_count()), (0, 1));
    }

    #[test]
    fn who_has_memory_in_many_files_leaves_descriptors_for_others() {
        let budgets = [Budget::of_mappings(4000), Budget::of_files(80)].map(Arc::new);
        let fill = |mut memory: SharedMemory| loop {
            let i = memory.region_count() as u64;
            match memory.with(at(i * PAGE, i * PAGE, PAGE, 0), memfd(PAGE)) {
                Ok(next) => memory = next.unwrap(),
                Err(error) => return (memory, error.to_string()),
            }
        };
        let (greedy, refused) = fill(within(&budgets));
        assert!(refused.starts_with("its memory is in 26 files") && refused.contains("80 descriptors"), "{refused}");
        let (other, _) = fill(within(&budgets));
        assert!(other.region_count() > 16, "{}", other.region_count());
        drop((greedy, other));
        assert_eq!(fill(within(&budgets)).0.region_count(), 26, "what goes makes room");
    }

    #[test]
    fn who_maps_many_regions_leaves_room_for_others_and_gives_back_what_it_unmaps() {
        let budgets = [Budget::of_mappings(400), Budget::of_files(400)].map(Arc::new);
        let port = || within(&budgets);
        let file = memfd(MEMORY_REGIONS as u64 * PAGE);
        let fill = |mut memory: SharedMemory| {
            for i in 0..MEMORY_REGIONS as u64 {
                match memory.with(at(i * PAGE, i * PAGE, PAGE, i * PAGE), file.try_clone().unwrap()) {
                    Ok(next) => memory = next.unwrap(),
                    Err(error) => return (memory, Some(error)),
                }
            }
            (memory, None)
        };
        let (greedy, refused) = fill(port());
        let refused = refused.expect("a bound").to_string();
        assert!(refused.starts_with("it has 82 regions mapped") && refused.contains("have 400 mappings"), "{refused}");
        assert!(refused.contains("vm.max_map_count"), "{refused}");
        let (other, _) = fill(port());
        assert!(other.region_count() > 32, "{}", other.region_count());
        // What goes makes room, also where a whole table takes the place of another, or is refused.
        drop((greedy, other));
        let table = |from: u64| {
            let region = |i: u64| (at(i * PAGE, i * PAGE, PAGE, (i % 64) * PAGE), file.try_clone().unwrap());
            (from..from + 32).map(region).collect::<Vec<_>>()
        };
        let mut memory = port();
        for round in 0..40 {
            memory = memory.replaced(table(1000 + 32 * round)).unwrap().unwrap();
            assert!(memory.with(at(0, 0, 0, 0), file.try_clone().unwrap()).is_err());
        }
    }

    #[test]
    fn a_host_has_some_memory_and_not_as_much_as_can_be_addressed() {
        assert!((1 << 24..MEMORY_BYTES).contains(&host_bytes()));
    }

    #[test]
    fn a_file_that_shrinks_reads_as_zeros_and_only_its_region_fails() {
        let attention = Arc::new(EventFd::new().unwrap());
        let (file, other) = (memfd(8 * PAGE), memfd(PAGE));
        let memory = SharedMemory::new(Arc::clone(&attention), u64::MAX);
        let memory = memory.with(at(0, 0, 8 * PAGE, 0), file.try_clone().unwrap()).unwrap().unwrap();
        let memory = memory.with(at(0x10_0000, 0x10_0000, PAGE, 0), other).unwrap().unwrap();
        let map = memory.memory();
        let mut hint = 0;
        for page in 0..8 {
            map.span(page * PAGE, 4, &mut hint).unwrap().write(b"full");
        }
        file.set_len(2 * PAGE).unwrap();
        let mut bytes = [0; 4];
        map.span(PAGE, 4, &mut hint).unwrap().read(&mut bytes);
        assert_eq!((&bytes, memory.failed()), (b"full", false));
        map.span(5 * PAGE, 4, &mut hint).unwrap().read(&mut bytes);
        assert_eq!((bytes, memory.failed(), attention.drain()), ([0; 4], true, 1));
        map.span(7 * PAGE, 4, &mut hint).unwrap().write(b"more");
        map.span(3 * PAGE, 4, &mut hint).unwrap().read(&mut bytes);
        assert_eq!((bytes, attention.drain()), ([0; 4], 2), "each page faults for itself");
        assert!(!map.regions()[1].failed());
        assert!(matches!(memory.mapped_anew(), Err(MappingError::File(_, MappedFileError::TooShort { .. }))));
        // The same region again: the failed mapping is not kept, and the file is measured anew.
        let refused = memory.replaced(vec![(at(0, 0, 8 * PAGE, 0), file.try_clone().unwrap())]);
        assert!(matches!(refused, Err(MappingError::File(_, MappedFileError::TooShort { .. }))));
        file.set_len(8 * PAGE).unwrap();
        let healed = memory.replaced(vec![(at(0, 0, 8 * PAGE, 0), file)]).unwrap().unwrap();
        assert!(!healed.failed());
        let again = memory.mapped_anew().unwrap();
        assert!(!again.failed() && Arc::ptr_eq(&again.memory().regions()[1], &memory.memory().regions()[1]));
    }
}
