//! Who changes this process's mappings of peers' files, one thread at a time: [`in_turn`]; who may be in a page fault of one:
//! [`in_faults`]; and how long the kernel kept each waiting for its peer's file: [`take_wait`].
//!
//! Whoever maps or unmaps a file waits for the kernel's list of all its mappings (`i_mmap_rwsem`), in whichever process they are,
//! and holds this process's own table of mappings meanwhile (`mmap_lock`). The owner of a file can have that list held for many
//! seconds: it maps its file tens of thousands of times and has a hole punched into it by a thread that hardly ever runs. So
//! those who change mappings have turns, in which nobody else does.
//!
//! A thread that is kept waiting in its turn may wait for its own peer's file, or for something that others can hold as well: the
//! process's table (a thread of ours in a page fault, whoever reads `/proc/PID/smaps`), memory. Time does not tell these apart, and
//! an innocent peer must not be charged. The kernel does: it names the function in which a thread waits (proc_pid_wchan(5)). So a
//! thread that does nothing else looks every [`LOOK`] at those that are long in a change, and what one waits in the functions that
//! take a file's list ([`LIST_TAKERS`]) is charged. Where the kernel names none (no CONFIG_KALLSYMS), nobody is charged.
//!
//! Who serves a peer also touches its memory, and a page fault there waits as long as the file's owner punches a hole at that place. It
//! keeps the table for that once the kernel has tried it twice, so it counts as well, in whatever of [`FAULTS`] the thread waits.
//!
//! A file in hugetlbfs has two locks more of its own that its owner can hold, without a page in it: the inode's, which whoever maps it
//! takes and whoever punches a hole holds, and that of each mapping. They count. But the kernel has page faults and holes of all
//! such files wait for a few mutexes as well that these have in common (`hugetlb_fault_mutex_table`), which any process can hold for
//! seconds: what is waited for there is charged to nobody. Who punches holes while such a mutex is held by a stranger, and has that
//! file mapped by us at the same moment, is charged for the stranger; no VMM does both at once.
//!
//! A signal handler that replaces pages of a peer's file ([`super::sigbus`]) can wait for no turn, but is looked at in the same
//! way ([`out_of_turn`]). The turn is for threads that serve one peer each. None that others wait for takes it, and nobody takes it
//! who holds a lock that others need.

#![cfg_attr(test, allow(unsafe_code))] // Mappings that tests wait for.

use std::cell::Cell;
use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use rustix::thread::gettid;
use rustix::time::{ClockId, clock_gettime};

/// How often those are looked at that are long in a change; one that takes less than that is not seen. Changes take microseconds.
const LOOK: Duration = Duration::from_millis(10);

/// How many can be in a change at once: the one whose turn it is, and shards in their signal handlers. And how many of those who
/// touch memory are looked at: sessions that are in the middle of a message, which those that wait for their turn are as well.
const PLACES: usize = 64;
const TOUCHERS: usize = 256;

/// Functions of the kernel, Linux 6.1 to 6.18, in which a thread that maps, unmaps, advises or locks waits for a file's list of
/// mappings, and for nothing that others hold (mm/mmap.c, mm/vma.c; the lock's own functions are not named).
const LIST_TAKERS: &[&str] = &[
    "mmap_region",
    "vma_link",
    "unlink_file_vma",
    "__vma_adjust",
    "vma_prepare",
    "__mmap_region",
    "__mmap_new_vma",
    "vma_link_file",
    "unlink_file_vma_batch_add",
    "unlink_file_vma_batch_final",
    "unlink_file_vma_batch_process",
    // Of huge pages: the inode's lock, and the list when a mapping ends (mm/hugetlb.c, fs/hugetlbfs/inode.c).
    "hugetlbfs_file_mmap",
    "hugetlbfs_file_mmap_prepare",
    "__hugetlb_zap_begin",
    "__unmap_hugepage_range_final",
    // A wait that is easily had.
    #[cfg(test)]
    "hrtimer_nanosleep",
];

/// Functions of the kernel in which a page fault waits for who punches a hole there (mm/shmem.c; mm/hugetlb.c, where a hole keeps the
/// lock of each mapping that it goes through). One that waits for something else, like a page that was swapped out, or that somebody
/// moves, is nobody's fault.
const FAULTS: &[&str] = &["shmem_fault", "shmem_falloc_wait", "hugetlb_vma_lock_read"];

static TURN: Mutex<()> = Mutex::new(());

static WATCHER: OnceLock<Option<Thread>> = OnceLock::new();

static CHANGES: [Operation; PLACES] = [const { Operation::none() }; PLACES];

static TOUCHES: [Operation; TOUCHERS] = [const { Operation::none() }; TOUCHERS];

thread_local! {
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Runs `change`, which maps or unmaps a peer's file or changes how it is mapped, while nobody else does such a thing.
pub fn in_turn<T>(change: impl FnOnce() -> T) -> T {
    let watcher = watcher();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (done, waited) = watched(watcher, Kind::Change, change);
    add_wait(waited);
    done
}

/// Runs `work`, which may touch memory of this thread's peer, and nobody else's.
pub fn in_faults<T>(work: impl FnOnce() -> T) -> T {
    let (done, waited) = watched(watcher(), Kind::Touch, work);
    add_wait(waited);
    done
}

/// Runs `change`, which replaces pages of a peer's file, at once; and says for how long the kernel kept it waiting for that file.
/// Async-signal-safe if `change` is.
pub(super) fn out_of_turn<T>(change: impl FnOnce() -> T) -> (T, Duration) {
    watched(WATCHER.get().and_then(Option::as_ref), Kind::Change, change)
}

/// Has [`take_wait`] tell of a wait in another thread, for this one's peer.
pub(super) fn add_wait(waited: Duration) {
    WAITED.set(WAITED.get().saturating_add(waited));
}

/// For how long the kernel has kept this thread waiting for its peer's files since this was asked last.
pub fn take_wait() -> Duration {
    WAITED.take()
}

/// What somebody does to a peer's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Changes how it is mapped.
    Change,
    /// Reads and writes it.
    Touch,
}

impl Kind {
    /// Those that are looked at.
    fn places(self) -> &'static [Operation] {
        match self {
            Self::Change => &CHANGES,
            Self::Touch => &TOUCHES,
        }
    }

    /// Whether a thread that does it waits for its peer's file if it waits in this function.
    fn waits_for_file(self, function: &str) -> bool {
        // The compiler's copies of a function have its name, a dot and more.
        let function = function.split('.').next().unwrap_or_default();
        let of_files = match self {
            Self::Change => LIST_TAKERS,
            Self::Touch => FAULTS,
        };
        of_files.contains(&function)
    }
}

/// One of that kind that is under way.
struct Operation {
    /// Who does it; [`Operation::FREE`] if nobody, [`Operation::TAKEN`] if somebody is about to or has just done so.
    thread: AtomicI32,
    /// When it was begun, and for how long its thread was seen to wait for its peer's file: nanoseconds.
    begun: AtomicU64,
    waited: AtomicU64,
}

impl Operation {
    const FREE: i32 = 0;
    const TAKEN: i32 = -1;

    const fn none() -> Self {
        Self { thread: AtomicI32::new(Self::FREE), begun: AtomicU64::new(0), waited: AtomicU64::new(0) }
    }

    /// Looks at who does it, and counts the time since `last` if that waits for its peer's file. Whether there is one.
    fn look(&self, kind: Kind, last: u64, now: u64) -> bool {
        let (thread, begun) = (self.thread.load(Ordering::SeqCst), self.begun.load(Ordering::SeqCst));
        if thread == Self::FREE {
            return false;
        }
        // A watcher that is late itself cannot say what went on meanwhile; and the place may be another's by the time that this is
        // counted.
        let unseen = now.saturating_sub(last.max(begun)).min(2 * LOOK.as_nanos() as u64);
        if thread != Self::TAKEN
            && now.saturating_sub(begun) >= LOOK.as_nanos() as u64
            && kind.waits_for_file(&waits_in(thread))
            // It still is the same.
            && (self.thread.load(Ordering::SeqCst), self.begun.load(Ordering::SeqCst)) == (thread, begun)
        {
            self.waited.fetch_add(unseen, Ordering::SeqCst);
        }
        true
    }
}

/// Runs `change` under the eyes of `watcher`. Async-signal-safe if `change` is.
fn watched<T>(watcher: Option<&Thread>, kind: Kind, change: impl FnOnce() -> T) -> (T, Duration) {
    let taken = |place: &&Operation| {
        place.thread.compare_exchange(Operation::FREE, Operation::TAKEN, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    };
    let (Some(watcher), Some(place)) = (watcher, kind.places().iter().find(taken)) else {
        return (change(), Duration::ZERO);
    };
    place.begun.store(monotonic(), Ordering::SeqCst);
    place.waited.store(0, Ordering::SeqCst);
    place.thread.store(gettid().as_raw_nonzero().get(), Ordering::SeqCst);
    watcher.unpark();
    let under_way = UnderWay(place);
    let done = change();
    (done, under_way.end())
}

/// An operation that is over when this goes, also by a panic.
struct UnderWay<'a>(&'a Operation);

impl UnderWay<'_> {
    /// For how long it was seen to wait.
    fn end(self) -> Duration {
        self.0.thread.store(Operation::TAKEN, Ordering::SeqCst);
        Duration::from_nanos(self.0.waited.load(Ordering::SeqCst))
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.thread.store(Operation::FREE, Ordering::SeqCst);
    }
}

/// The thread that looks, which is started with the first change; `None` if it could not be.
fn watcher() -> Option<&'static Thread> {
    let start = || {
        let started = thread::Builder::new().name("mappings".into()).stack_size(64 * 1024).spawn(watch);
        started.inspect_err(|error| log::error!("no thread to watch who maps memory: {error}")).ok()
    };
    WATCHER.get_or_init(|| start().map(|handle| handle.thread().clone())).as_ref()
}

/// What it does: it looks as long as there are changes, and sleeps otherwise.
fn watch() {
    loop {
        thread::park();
        let mut last = monotonic();
        loop {
            thread::sleep(LOOK);
            let now = monotonic();
            let look = |kind: Kind| kind.places().iter().filter(|operation| operation.look(kind, last, now)).count();
            if look(Kind::Change) + look(Kind::Touch) == 0 {
                break;
            }
            last = now;
        }
    }
}

/// The function of the kernel in which this thread waits.
fn waits_in(thread: i32) -> String {
    let mut name = [0; 64];
    let read = File::open(format!("/proc/self/task/{thread}/wchan")).and_then(|mut file| file.read(&mut name));
    String::from_utf8_lossy(name.get(..read.unwrap_or(0)).unwrap_or_default()).trim().into()
}

/// Nanoseconds since some moment.
fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Instant;

    use super::*;

    const LONG: Duration = Duration::from_millis(300);

    #[test]
    fn sleep_in_the_kernel_is_a_wait_and_work_is_none() {
        take_wait();
        in_turn(|| {
            let end = Instant::now() + LONG;
            while Instant::now() < end {
                std::hint::spin_loop();
            }
        });
        assert_eq!(take_wait(), Duration::ZERO, "it was busy");
        in_turn(|| thread::sleep(LONG));
        let waited = take_wait();
        assert!(waited > Duration::ZERO && waited < 100 * LONG, "{waited:?}");
        assert_eq!(take_wait(), Duration::ZERO);
        let ((), waited) = out_of_turn(|| thread::sleep(LONG));
        assert!(waited > Duration::ZERO && take_wait() == Duration::ZERO, "{waited:?}");
    }

    #[test]
    fn a_watcher_that_is_late_charges_nobody_for_what_it_has_not_seen() {
        let (place, second) = (Operation::none(), 1_000_000_000);
        let (tell, told) = std::sync::mpsc::channel();
        let sleeper = thread::spawn(move || {
            tell.send(gettid().as_raw_nonzero().get()).unwrap();
            (0..10).for_each(|_| thread::sleep(LONG));
        });
        place.thread.store(told.recv().unwrap(), Ordering::SeqCst);
        place.begun.store(second, Ordering::SeqCst);
        while place.waited.load(Ordering::SeqCst) == 0 && !sleeper.is_finished() {
            place.look(Kind::Change, second, 11 * second);
        }
        sleeper.join().unwrap();
        let charged = Duration::from_nanos(place.waited.load(Ordering::SeqCst));
        assert!(charged > Duration::ZERO && charged <= 2 * LOOK, "{charged:?}");
    }

    #[test]
    fn a_panic_leaves_nothing_under_way() {
        let own = thread::spawn(|| {
            let panics = || in_faults(|| panic!("to be expected"));
            assert!(std::panic::catch_unwind(panics).is_err());
            gettid().as_raw_nonzero().get()
        });
        let thread = own.join().unwrap();
        assert!(TOUCHES.iter().all(|touch| touch.thread.load(Ordering::SeqCst) != thread));
    }

    #[test]
    fn a_wait_for_ones_turn_is_nobodys() {
        thread::scope(|scope| {
            let (inside, entered) = std::sync::mpsc::channel();
            scope.spawn(move || {
                in_turn(|| {
                    inside.send(()).unwrap();
                    thread::sleep(LONG);
                });
            });
            entered.recv().unwrap();
            take_wait();
            in_turn(|| {});
            assert_eq!(take_wait(), Duration::ZERO);
        });
    }

    /// Another thread of this process has the table for as long as it touches all of this.
    #[test]
    #[cfg_attr(miri, ignore = "maps files")]
    fn a_wait_for_the_table_of_mappings_is_nobodys() {
        use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
        const LEN: usize = 512 << 20;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place that the kernel chooses.
        let map = |len| unsafe { mmap_anonymous(std::ptr::null_mut(), len, access, MapFlags::PRIVATE) }.unwrap();
        // SAFETY: exactly what `map` has mapped, which nobody accesses any more.
        let unmap = |at, len| unsafe { munmap(at, len) }.unwrap();
        in_turn(|| {});
        take_wait();
        let (mut longest, mut charged) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..20 {
            let at = map(LEN) as usize;
            thread::scope(|scope| {
                // SAFETY: all of the mapping that was just made, which holds nothing.
                let touch = move || unsafe { madvise(at as *mut _, LEN, Advice::LinuxPopulateWrite) };
                let toucher = scope.spawn(touch);
                while !toucher.is_finished() {
                    let began = Instant::now();
                    in_turn(|| unmap(map(4096), 4096));
                    longest = longest.max(began.elapsed());
                    charged += take_wait();
                }
                toucher.join().unwrap().unwrap();
            });
            unmap(at as *mut _, LEN);
            if longest > 3 * LOOK {
                break;
            }
        }
        assert!(longest > 3 * LOOK, "it did not come to a wait: {longest:?}");
        assert_eq!(charged, Duration::ZERO, "of {longest:?}");
    }

    /// Waits that others can make long: for the table of mappings, for what is common to all huge pages, for a page fault of another
    /// thread of ours in that mapping, and for memory.
    const OF_OTHERS: [&str; 15] = [
        "vm_mmap_pgoff",
        "__vm_munmap",
        "do_madvise.part.0",
        "lock_mm_and_find_vma",
        "hugetlb_fault",
        "hugetlb_no_page",
        "remove_inode_hugepages",
        "__vma_start_write",
        "folio_wait_bit_common",
        "throttle_direct_reclaim",
        "balance_dirty_pages",
        "__mem_cgroup_handle_over_high",
        "futex_wait_queue",
        "0",
        "",
    ];

    #[test]
    fn who_changes_mappings_waits_for_a_file_where_its_list_is_taken() {
        let is_a_files = |name: &str| Kind::Change.waits_for_file(name);
        let takers = [
            "mmap_region",
            "__vma_adjust",
            "vma_prepare",
            "unlink_file_vma_batch_process.isra.0",
            "hugetlbfs_file_mmap",
        ];
        assert_eq!(takers.into_iter().find(|name| !is_a_files(name)), None);
        assert_eq!(OF_OTHERS.into_iter().find(|name| is_a_files(name)), None);
        assert!(!is_a_files("shmem_fault"), "it takes no list");
    }

    #[test]
    fn who_touches_memory_waits_for_a_file_where_a_hole_is_punched_into_tmpfs() {
        let is_a_files = |name: &str| Kind::Touch.waits_for_file(name);
        assert!(
            ["shmem_fault", "shmem_fault.constprop.0", "shmem_falloc_wait", "hugetlb_vma_lock_read"]
                .into_iter()
                .all(is_a_files)
        );
        assert_eq!(OF_OTHERS.into_iter().find(|name| is_a_files(name)), None);
        take_wait();
        in_faults(|| thread::sleep(LONG));
        assert_eq!(take_wait(), Duration::ZERO);
    }
}
