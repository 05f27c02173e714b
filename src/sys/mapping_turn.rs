//! Who changes this process's mappings of peers' files, one thread at a time: [`in_turn`]; and how long the kernel kept each
//! waiting for that: [`take_wait`].
//!
//! Whoever maps or unmaps a file waits for the kernel's list of all its mappings (`i_mmap_rwsem`), in whichever process they are,
//! and holds this process's own table of mappings meanwhile (`mmap_lock`). The owner of a file can have that list held for many
//! seconds: it maps its file tens of thousands of times and has a hole punched into it by a thread that hardly ever runs. So
//! two things are to be told apart: a thread that waits for its own peer's file, and those that wait behind it for the
//! process's table. As only one is let in here, it is the one whose file is waited for, and the others wait for their turn,
//! which is held against nobody.
//!
//! What is measured is the time in which the thread neither ran nor waited for a CPU, and only if it let go of its CPU by itself:
//! mapping or unmapping much takes long and is no wait, however busy the host is.
//!
//! The turn is for threads that serve one peer each. None that others wait for takes it, and nobody takes it who holds a lock
//! that others need. A signal handler that replaces pages of a peer's file ([`super::sigbus`]) can wait for no turn, and may
//! be kept waiting in the same way: it says so ([`out_of_turn`]). If it came when nobody had the turn, it is its file that is
//! waited for, and its time is taken off what whoever has the turn next is told; otherwise it waits behind the one who has.

#![allow(unsafe_code)] // getrusage of a thread, which rustix has no call for.

use std::cell::Cell;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// How much of a wait may have been for a CPU where the kernel does not say (no CONFIG_SCHED_INFO, no procfs).
const UNTOLD: Duration = Duration::from_millis(900);

static TURN: Turn = Turn::new();

thread_local! {
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Runs `change`, which maps or unmaps a peer's file or changes how it is mapped, while nobody else does such a thing.
pub fn in_turn<T>(change: impl FnOnce() -> T) -> T {
    let (done, waited) = TURN.have(change);
    add_wait(waited);
    done
}

/// Runs `change`, which replaces pages of a peer's file, at once; and says for how long the kernel kept it waiting for that file.
/// Async-signal-safe if `change` is.
pub(super) fn out_of_turn<T>(change: impl FnOnce() -> T) -> (T, Duration) {
    TURN.pass_by(change)
}

/// Has [`take_wait`] tell of a wait in another thread, for this one's peer.
pub(super) fn add_wait(waited: Duration) {
    WAITED.set(WAITED.get().saturating_add(waited));
}

/// For how long the kernel has kept this thread waiting in its turns since this was asked last.
pub fn take_wait() -> Duration {
    WAITED.take()
}

/// The turn, and those who came when nobody had it and have none.
struct Turn {
    lock: Mutex<()>,
    /// Whether somebody has it.
    taken: AtomicBool,
    /// How many are outside of it now.
    outside: AtomicU32,
    /// When the last of them came, in nanoseconds.
    since: AtomicU64,
    /// How long those took that have gone, in nanoseconds.
    past: AtomicU64,
}

impl Turn {
    const fn new() -> Self {
        Self {
            lock: Mutex::new(()),
            taken: AtomicBool::new(false),
            outside: AtomicU32::new(0),
            since: AtomicU64::new(0),
            past: AtomicU64::new(0),
        }
    }

    /// Runs `change` when it is its turn; and says for how long it was kept waiting then by nobody who came before it.
    fn have<T>(&self, change: impl FnOnce() -> T) -> (T, Duration) {
        let _turn = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.taken.store(true, Ordering::SeqCst);
        let (before, others) = (Standing::of_this_thread(), self.time_outside());
        let done = change();
        let others = self.time_outside().saturating_sub(others);
        let waited = Standing::of_this_thread().waited_since(&before).saturating_sub(others);
        self.taken.store(false, Ordering::SeqCst);
        (done, waited)
    }

    fn pass_by<T>(&self, change: impl FnOnce() -> T) -> (T, Duration) {
        if self.taken.load(Ordering::SeqCst) {
            return (change(), Duration::ZERO);
        }
        let before = Standing::without_files();
        self.since.store(monotonic(), Ordering::SeqCst);
        self.outside.fetch_add(1, Ordering::SeqCst);
        let done = change();
        let took = u64::try_from(before.at.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.past.fetch_add(took, Ordering::SeqCst);
        self.outside.fetch_sub(1, Ordering::SeqCst);
        (done, Standing::without_files().waited_since(&before))
    }

    /// How long all who are or were outside took so far. It may be somewhat more, which is no place to hide in: each that was
    /// kept waiting is told so itself.
    fn time_outside(&self) -> Duration {
        let running = match self.outside.load(Ordering::SeqCst) {
            0 => 0,
            _ => monotonic().saturating_sub(self.since.load(Ordering::SeqCst)),
        };
        Duration::from_nanos(self.past.load(Ordering::SeqCst).wrapping_add(running))
    }
}

/// Nanoseconds since some moment.
fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Where a thread stands: what the kernel has given it so far.
struct Standing {
    at: Instant,
    /// For how long it has run.
    ran: Duration,
    /// For how long it was ready to run and did not, if the kernel says so.
    ready: Option<Duration>,
    /// How often it has let go of its CPU by itself.
    let_go: i64,
}

impl Standing {
    fn of_this_thread() -> Self {
        Self { ready: ready(), ..Self::without_files() }
    }

    /// The same without what only a file says. Async-signal-safe.
    fn without_files() -> Self {
        let ran = clock_gettime(ClockId::ThreadCPUTime);
        Self {
            at: Instant::now(),
            ran: Duration::new(ran.tv_sec.unsigned_abs(), u32::try_from(ran.tv_nsec).unwrap_or(0)),
            ready: None,
            let_go: let_go(),
        }
    }

    fn waited_since(&self, before: &Self) -> Duration {
        if self.let_go == before.let_go {
            return Duration::ZERO;
        }
        let ready = match (self.ready, before.ready) {
            (Some(now), Some(then)) => now.saturating_sub(then),
            _ => UNTOLD,
        };
        (self.at - before.at).saturating_sub(self.ran.saturating_sub(before.ran)).saturating_sub(ready)
    }
}

/// For how long this thread was ready to run and did not (proc_pid_schedstat: the second field); zeros mean that the kernel does
/// not count.
fn ready() -> Option<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let fields: Vec<u64> = text.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let &[ran, ready, _] = &*fields else { return None };
    (ran > 0).then(|| Duration::from_nanos(ready))
}

/// How often this thread has let go of its CPU by itself.
fn let_go() -> i64 {
    // SAFETY: zeros are a valid rusage, which lives through the call, and the call writes nothing else.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &mut usage);
        usage.ru_nvcsw
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LONG: Duration = Duration::from_millis(150);

    #[test]
    fn sleep_is_a_wait_and_work_is_none() {
        take_wait();
        in_turn(|| {
            let end = Instant::now() + LONG;
            while Instant::now() < end {
                std::hint::spin_loop();
            }
        });
        assert_eq!(take_wait(), Duration::ZERO, "it was busy");
        in_turn(|| std::thread::sleep(LONG + UNTOLD));
        assert!(take_wait() >= LONG, "less what it may have waited for a CPU where the kernel does not say");
        assert_eq!(take_wait(), Duration::ZERO);
    }

    #[test]
    fn a_wait_behind_a_handler_that_came_first_is_the_handlers() {
        static OWN: Turn = Turn::new();
        std::thread::scope(|scope| {
            let (inside, entered) = std::sync::mpsc::channel();
            let handler = scope.spawn(move || {
                OWN.pass_by(|| {
                    inside.send(()).unwrap();
                    std::thread::sleep(2 * LONG + UNTOLD);
                })
            });
            entered.recv().unwrap();
            let (((), handlers), ours) = OWN.have(|| handler.join().unwrap());
            assert!(handlers >= LONG && ours < LONG, "{handlers:?} and {ours:?}");
            let ((), ours) = OWN.have(|| std::thread::sleep(LONG + UNTOLD));
            assert!(ours >= LONG, "{ours:?} when it has gone");
        });
    }

    #[test]
    fn a_wait_behind_which_a_handler_came_is_not_the_handlers() {
        static OWN: Turn = Turn::new();
        let handler = || OWN.pass_by(|| std::thread::sleep(LONG + UNTOLD));
        let (((), handlers), ours) = OWN.have(|| std::thread::scope(|scope| scope.spawn(handler).join().unwrap()));
        assert!(handlers.is_zero() && ours >= LONG, "{handlers:?} and {ours:?}");
    }

    #[test]
    fn a_wait_for_ones_turn_is_nobodys() {
        std::thread::scope(|scope| {
            let (inside, entered) = std::sync::mpsc::channel();
            scope.spawn(move || {
                in_turn(|| {
                    inside.send(()).unwrap();
                    std::thread::sleep(LONG);
                });
            });
            entered.recv().unwrap();
            take_wait();
            in_turn(|| {});
            assert_eq!(take_wait(), Duration::ZERO);
        });
    }
}
