//! Survives SIGBUS in memory that another process owns: [`Watch`].
//!
//! A front end can shrink the file behind its memory at any time; whoever touches the lost pages then gets SIGBUS, which
//! by default ends the whole switch. So every mapping of such a file is watched: the handler finds the faulting address in
//! a table, lays zero pages over the rest of that mapping, marks it as failed and signals its port, whose control thread
//! then stops it. The interrupted copy goes on with zeros. A fault anywhere else is a bug and still ends the process.
//!
//! The table is read inside a signal handler, so it is made of atomics, grows by chunks that are never freed (a chunk
//! serves 256 mappings) and each slot carries a sequence number: odd while it is being written, and different afterwards.
//! A handler that sees one change skips the slot. It cannot be the one it looks for: a mapping that somebody is just
//! accessing is neither being mapped nor unmapped.

#![allow(unsafe_code)] // A signal handler, and mmap over a mapping that is in use.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::eventfd::EventFd;

/// Slots of one chunk of the table.
const CHUNK_SLOTS: usize = 256;

static TABLE: Chunk = Chunk::new();

/// Held by whoever gives out or takes back slots; never by the handler.
static WRITER: Mutex<()> = Mutex::new(());

/// A mapping under watch, until this is dropped. Drop it before the mapping is unmapped.
#[derive(Debug)]
pub struct Watch {
    slot: &'static Slot,
    /// Keeps the descriptor open that the handler writes to.
    _attention: Arc<EventFd>,
}

impl Watch {
    /// Watches the mapping at host addresses `range`, whose pages have `page` bytes (the huge page size on hugetlbfs).
    /// A fault in it signals `attention`. The first call installs the handler for the whole process.
    ///
    /// # Errors
    /// The kernel refused the handler, which it never does for SIGBUS.
    pub fn new(range: Range<usize>, page: usize, attention: Arc<EventFd>) -> io::Result<Self> {
        install()?;
        let _writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = TABLE.free_slot();
        slot.write(range, page, attention.as_raw_fd());
        Ok(Self { slot, _attention: attention })
    }

    /// Whether a fault happened in the mapping: parts of it are private zero pages now.
    pub fn failed(&self) -> bool {
        self.slot.failed.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
        self.slot.write(0..0, 1, -1);
    }
}

/// One watched mapping; free if `end` is zero.
#[derive(Debug)]
struct Slot {
    sequence: AtomicU32,
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    attention: AtomicI32,
    failed: AtomicBool,
}

/// What the handler reads of a slot.
struct Mapped {
    range: Range<usize>,
    page: usize,
    attention: i32,
}

impl Slot {
    const fn new() -> Self {
        Self {
            sequence: AtomicU32::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            page: AtomicUsize::new(1),
            attention: AtomicI32::new(-1),
            failed: AtomicBool::new(false),
        }
    }

    /// Changes the slot; the caller holds [`WRITER`].
    fn write(&self, range: Range<usize>, page: usize, attention: i32) {
        self.sequence.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(range.start, Ordering::Relaxed);
        self.end.store(range.end, Ordering::Relaxed);
        self.page.store(page, Ordering::Relaxed);
        self.attention.store(attention, Ordering::Relaxed);
        self.failed.store(false, Ordering::Relaxed);
        self.sequence.fetch_add(1, Ordering::Release);
    }

    /// A consistent copy, unless the slot is changing.
    fn read(&self) -> Option<Mapped> {
        let before = self.sequence.load(Ordering::Acquire);
        let mapped = Mapped {
            range: self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed),
            page: self.page.load(Ordering::Relaxed),
            attention: self.attention.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        (before.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == before).then_some(mapped)
    }
}

/// A piece of the table, and the next piece.
struct Chunk {
    slots: [Slot; CHUNK_SLOTS],
    next: AtomicPtr<Chunk>,
}

impl Chunk {
    const fn new() -> Self {
        Self { slots: [const { Slot::new() }; CHUNK_SLOTS], next: AtomicPtr::new(ptr::null_mut()) }
    }

    fn next(&self) -> Option<&'static Chunk> {
        // SAFETY: null, or a chunk that `free_slot` leaked for the life of the process and published with Release.
        unsafe { self.next.load(Ordering::Acquire).as_ref() }
    }

    /// A free slot of this chunk or one behind it; grows the table if there is none. The caller holds [`WRITER`].
    fn free_slot(&'static self) -> &'static Slot {
        let mut chunk = self;
        loop {
            if let Some(slot) = chunk.slots.iter().find(|slot| slot.end.load(Ordering::Relaxed) == 0) {
                return slot;
            }
            chunk = match chunk.next() {
                Some(next) => next,
                None => {
                    let fresh: &'static mut Chunk = Box::leak(Box::new(Chunk::new()));
                    chunk.next.store(fresh, Ordering::Release);
                    fresh
                }
            };
        }
    }

    /// Puts zero pages where `address` faulted. `false`: nobody watches it. Async-signal-safe.
    fn patch(&'static self, address: usize) -> bool {
        let mut chunk = Some(self);
        while let Some(here) = chunk {
            for slot in &here.slots {
                if let Some(mapped) = slot.read()
                    && mapped.range.contains(&address)
                {
                    return mapped.patch(address, slot);
                }
            }
            chunk = here.next();
        }
        false
    }
}

impl Mapped {
    fn patch(&self, address: usize, slot: &Slot) -> bool {
        let from = address & !(self.page - 1);
        let flags = libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        // SAFETY: `from..end` lies within a live mapping of guest memory (this thread is accessing it, so it is neither
        // being unmapped nor was it replaced), its ends are multiples of the page size, and guest memory is only ever
        // accessed by raw copies that may see any bytes. The Watch keeps the descriptor open. mmap and write are plain
        // system calls; nothing here allocates or locks.
        unsafe {
            let len = self.range.end - from;
            let zeros = libc::mmap(from as *mut _, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if zeros == libc::MAP_FAILED {
                return false;
            }
            slot.failed.store(true, Ordering::Release);
            let one = 1u64.to_ne_bytes();
            libc::write(self.attention, one.as_ptr().cast(), one.len());
        }
        true
    }
}

fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
        // SAFETY: a zeroed sigaction is a valid one; the handler has the signature that SA_SIGINFO asks for and calls
        // async-signal-safe functions only.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &action, ptr::null_mut())
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)) }
    });
    installed.map_err(io::Error::from_raw_os_error)
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; si_addr is meant for faults, which have a positive si_code
    // (sigaction(2)). errno belongs to this thread and is put back. sigaction and raise are async-signal-safe.
    unsafe {
        let errno = *libc::__errno_location();
        let fault = (*info).si_code > 0;
        if !fault || !TABLE.patch((*info).si_addr() as usize) {
            let mut default: libc::sigaction = std::mem::zeroed();
            default.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(libc::SIGBUS, &default, ptr::null_mut());
            if !fault {
                // Sent by kill(2): it does not come again by itself. Delivered when this handler returns.
                libc::raise(libc::SIGBUS);
            }
        }
        *libc::__errno_location() = errno;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn slots_are_found_while_in_use_reused_afterwards_and_the_table_grows() {
        static OWN: Chunk = Chunk::new();
        let take = |i: usize| {
            let slot = OWN.free_slot();
            slot.write(i * 16..i * 16 + 16, 16, -1);
            slot
        };
        let slots: Vec<_> = (1..=CHUNK_SLOTS + 3).map(take).collect();
        assert!(OWN.next().is_some() && OWN.next().unwrap().next().is_none());
        slots[5].write(0..0, 1, -1);
        assert!(ptr::eq(OWN.free_slot(), slots[5]));
        assert_eq!(slots[6].read().unwrap().range, 7 * 16..8 * 16);
        slots[6].sequence.fetch_add(1, Ordering::Relaxed);
        assert!(slots[6].read().is_none(), "a slot in change is not read");
    }

    /// Runs this test alone in a process of its own, with `what` to do there, and returns the signal that ended it.
    fn signal_of_child(what: &str) -> Option<i32> {
        let me = "sys::sigbus::tests::faults_elsewhere_still_end_the_process";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", me, "--test-threads=1"]).env(CHILD, what).stdout(std::process::Stdio::null());
        std::os::unix::process::ExitStatusExt::signal(&child.status().unwrap())
    }

    const CHILD: &str = "LINECARD_TEST_SIGBUS";

    #[test]
    fn faults_elsewhere_still_end_the_process() {
        match std::env::var(CHILD) {
            Ok(what) => end_by(&what),
            Err(_) => assert_eq!(["fault", "raise"].map(signal_of_child), [Some(libc::SIGBUS); 2]),
        }
    }

    /// What the process of its own does.
    fn end_by(what: &str) {
        let _watch = Watch::new(4096..8192, 4096, Arc::new(EventFd::new().unwrap())).unwrap();
        if what == "raise" {
            // SAFETY: raise has no preconditions.
            unsafe { libc::raise(libc::SIGBUS) };
        }
        let file = rustix::fs::memfd_create("empty", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        // SAFETY: a fresh mapping of one page; the access to it is what has to end the process.
        unsafe {
            let page = libc::mmap(ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0);
            assert_ne!(page, libc::MAP_FAILED);
            ptr::read_volatile(page.cast::<u8>());
        }
    }
}
