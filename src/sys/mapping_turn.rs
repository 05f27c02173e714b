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
//! that others need.

#![allow(unsafe_code)] // getrusage of a thread, which rustix has no call for.

use std::cell::Cell;
use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// How much of a wait may have been for a CPU where the kernel does not say (no CONFIG_SCHED_INFO, no procfs).
const UNTOLD: Duration = Duration::from_millis(900);

static TURN: Mutex<()> = Mutex::new(());

thread_local! {
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Runs `change`, which maps or unmaps a peer's file or changes how it is mapped, while nobody else does such a thing.
pub fn in_turn<T>(change: impl FnOnce() -> T) -> T {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let before = Standing::of_this_thread();
    let done = change();
    let waited = Standing::of_this_thread().waited_since(&before);
    WAITED.set(WAITED.get().saturating_add(waited));
    done
}

/// For how long the kernel has kept this thread waiting in its turns since this was asked last.
pub fn take_wait() -> Duration {
    WAITED.take()
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
        let ran = clock_gettime(ClockId::ThreadCPUTime);
        Self {
            at: Instant::now(),
            ran: Duration::new(ran.tv_sec.unsigned_abs(), u32::try_from(ran.tv_nsec).unwrap_or(0)),
            ready: ready(),
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
