//! Doorbells that cannot block: [`ring`] adds one to an eventfd that a peer gave us, and comes back whatever the peer does.
//!
//! An eventfd is one open file that we share with who gave it: it can take O_NONBLOCK off again and fill the counter at any
//! moment, and then the write(2) of the next doorbell sleeps until somebody reads, which for a shard would be for ever. No
//! flag of a write keeps that from happening (eventfds refuse RWF_NOWAIT), and asking before each write whether it would
//! block costs another system call and proves nothing.
//!
//! So doorbells are watched. Each thread that rings has a sequence number, odd while it is inside the write. One watchdog
//! looks at them every [`LOOK`]; a number that is odd and the same as last time is a write that sleeps, and its thread is
//! sent a signal whose handler does nothing and does not have the write restarted: it ends with EINTR, which an eventfd
//! gives for no other reason. If the signal comes just before the write falls asleep, the next look sends another.
//!
//! When nobody has rung for [`LINGER`] looks, the watchdog parks, so an idle daemon stays idle. Parking: say so (`WATCHING`
//! = false), then look once more for odd numbers. Ringing: make the number odd, then look whether anybody watches. Both are
//! sequentially consistent, so at least one side sees the other. That fence costs a doorbell 20 cycles of its 1,000.
//!
//! A write can also take long without sleeping, if very many wait for the eventfd. Nothing ends that early, so such bells are
//! found out by what they took ([`Pace`], [`super::toll`]).
//!
//! The signal is SIGURG: nothing here uses it otherwise, and a stray one is ignored even without a handler.

#![allow(unsafe_code)] // Signal handling.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::thread::Pid;

use super::cpu;
use super::toll::{Toll, thread_time};

/// How often the watchdog looks: a doorbell that blocks holds its thread for once to twice this.
const LOOK: Duration = Duration::from_millis(2);

/// Looks without any doorbell after which the watchdog parks: half a second.
const LINGER: u32 = 250;

/// What became of a doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Rang {
    /// Whoever waits for it wakes up. A counter that is full counts as that: its reader is awake already.
    Done,
    /// The peer made the eventfd block and its counter was full.
    Blocked,
    /// It did wake up who waits, and took so long again and again that the peer must have seen to that.
    Slow,
}

/// Doorbells that are measured after one that seemed slow.
const MEASURED: u32 = 64;

/// How long the doorbells of one ring take, over all eventfds that it has in its life.
///
/// Time that passes is looked at always, which costs two looks at the cycle counter. It says little, because the kernel may
/// have given the CPU to somebody else, most of all to whom the doorbell has just woken. So a doorbell that seemed slow has
/// the next ones measured in CPU time of the thread, and only those count ([`Toll`]).
#[derive(Debug, Default)]
pub struct Pace {
    /// Doorbells that are to be measured still.
    measured: u32,
    toll: Toll,
    took: u64,
}

impl Pace {
    /// As [`ring`], and says so when it takes too long too often.
    #[inline]
    pub fn ring(&mut self, bell: BorrowedFd<'_>) -> Rang {
        let began = cpu::cycles();
        let rang = if self.measured == 0 { ring(bell) } else { self.ring_measured(bell) };
        self.took = cpu::cycles().wrapping_sub(began);
        if self.took > cpu::cycles_per_second() / 1_000 {
            self.measured = MEASURED;
        }
        rang
    }

    /// How many cycles the last one took.
    #[inline]
    pub fn took(&self) -> u64 {
        self.took
    }

    #[cold]
    fn ring_measured(&mut self, bell: BorrowedFd<'_>) -> Rang {
        self.measured -= 1;
        let before = thread_time();
        let rang = ring(bell);
        let used = thread_time().saturating_sub(before);
        if self.toll.charge(used, Instant::now()) && rang == Rang::Done { Rang::Slow } else { rang }
    }
}

/// One thread that rings doorbells.
struct Ringer {
    thread: Pid,
    /// Odd while the thread is inside a write.
    sequence: AtomicU64,
    /// What the watchdog saw last; nobody else uses it.
    seen: AtomicU64,
}

static RINGERS: Mutex<Vec<Arc<Ringer>>> = Mutex::new(Vec::new());
static WATCHING: AtomicBool = AtomicBool::new(false);
static WATCHDOG: OnceLock<Thread> = OnceLock::new();

thread_local! {
    static OWN: Arc<Ringer> = {
        let thread = rustix::thread::gettid();
        let own = Arc::new(Ringer { thread, sequence: AtomicU64::new(0), seen: AtomicU64::new(0) });
        RINGERS.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&own));
        own
    };
}

/// Makes the calling thread known ahead of its first doorbell, which then does not allocate, and sends it the signal once, so that
/// the pages are there that the kernel puts the frame of one on: where it finds such a page missing it takes the lock of the memory
/// map, and a peer may have somebody hold that.
pub fn enroll() {
    OWN.with(|own| own.interrupt());
}

/// Starts the watchdog unless it runs. To be called before the first eventfd of a peer is rung, by a thread that is not
/// pinned to a CPU: the watchdog inherits where it may run.
///
/// # Errors
/// The kernel refused a thread or the handler.
pub fn watch() -> io::Result<()> {
    static STARTING: Mutex<()> = Mutex::new(());
    let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if WATCHDOG.get().is_none() {
        install()?;
        let dog = std::thread::Builder::new().name("doorbells".into()).stack_size(64 * 1024).spawn(patrol)?;
        let _ = WATCHDOG.set(dog.thread().clone());
    }
    Ok(())
}

/// Adds one to an eventfd, so that whoever waits for it wakes up.
#[inline]
pub fn ring(bell: BorrowedFd<'_>) -> Rang {
    OWN.with(|own| {
        let before = own.sequence.load(Ordering::Relaxed);
        own.sequence.store(before.wrapping_add(1), Ordering::SeqCst);
        if !WATCHING.load(Ordering::SeqCst) {
            call_the_dog();
        }
        let written = rustix::io::write(bell, &1u64.to_ne_bytes());
        own.sequence.store(before.wrapping_add(2), Ordering::Release);
        if written == Err(Errno::INTR) { Rang::Blocked } else { Rang::Done }
    })
}

#[cold]
fn call_the_dog() {
    if !WATCHING.swap(true, Ordering::SeqCst)
        && let Some(dog) = WATCHDOG.get()
    {
        dog.unpark();
    }
}

/// The watchdog's thread.
fn patrol() {
    loop {
        WATCHING.store(true, Ordering::SeqCst);
        let mut quiet = 0;
        while quiet < LINGER {
            std::thread::sleep(LOOK);
            quiet = if look() { 0 } else { quiet + 1 };
        }
        WATCHING.store(false, Ordering::SeqCst);
        let ringers = RINGERS.lock().unwrap_or_else(PoisonError::into_inner);
        let inside = ringers.iter().any(|ringer| ringer.sequence.load(Ordering::SeqCst) % 2 == 1);
        drop(ringers);
        if !inside {
            std::thread::park();
        }
    }
}

/// Interrupts doorbells that have been ringing since the last look; returns whether any rang since then.
fn look() -> bool {
    let mut ringers = RINGERS.lock().unwrap_or_else(PoisonError::into_inner);
    // Only this list knows a thread that has ended.
    ringers.retain(|ringer| Arc::strong_count(ringer) > 1);
    let mut rang = false;
    for ringer in ringers.iter() {
        let now = ringer.sequence.load(Ordering::Acquire);
        let same = ringer.seen.swap(now, Ordering::Relaxed) == now;
        rang |= !same || now % 2 == 1;
        if same && now % 2 == 1 {
            ringer.interrupt();
        }
    }
    rang
}

impl Ringer {
    /// Sends the thread the signal that ends its write. If it has ended meanwhile nobody gets one, or at worst another
    /// thread of this process does, for which it means nothing.
    fn interrupt(&self) {
        let (process, thread) = (rustix::process::getpid(), self.thread);
        // SAFETY: tgkill takes three numbers and touches no memory of ours.
        unsafe {
            libc::syscall(
                libc::SYS_tgkill,
                process.as_raw_nonzero().get(),
                thread.as_raw_nonzero().get(),
                libc::SIGURG,
            );
        }
    }
}

extern "C" fn on_signal(_signal: libc::c_int) {}

/// Gives the signal its handler. Without SA_RESTART: the interrupted write must end.
fn install() -> io::Result<()> {
    // SAFETY: a zeroed sigaction is a valid one; the handler has the signature of a plain handler and does nothing.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_ONSTACK;
        libc::sigaction(libc::SIGURG, &action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::fd::AsFd;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn a_full_eventfd_that_blocks_is_given_up_again_and_again() {
        watch().unwrap();
        let blocking = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert_eq!(ring(blocking.as_fd()), Rang::Done);
        rustix::io::write(&blocking, &(u64::MAX - 2).to_ne_bytes()).unwrap();
        for _ in 0..3 {
            assert_eq!(ring(blocking.as_fd()), Rang::Blocked);
        }
        let mut count = [0; 8];
        rustix::io::read(&blocking, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), u64::MAX - 1);
        assert_eq!(ring(blocking.as_fd()), Rang::Done);
    }

    #[test]
    fn a_doorbell_is_no_slower_for_sleeping_in_the_middle() {
        watch().unwrap();
        let blocking = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&blocking, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let mut pace = Pace::default();
        for _ in 0..8 {
            assert_eq!(pace.ring(blocking.as_fd()), Rang::Blocked, "its time is not its thread's");
        }
    }

    #[test]
    fn a_watchdog_that_parks_is_called_for_the_next_doorbell() {
        watch().unwrap();
        let full = || {
            let blocking = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            rustix::io::write(&blocking, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            blocking
        };
        // Whether it parks in between depends on what other tests ring; it has to come either way.
        for _ in 0..2 {
            std::thread::spawn(move || assert_eq!(ring(full().as_fd()), Rang::Blocked)).join().unwrap();
            std::thread::sleep(LOOK * (LINGER + 50));
        }
    }

    #[test]
    fn a_full_eventfd_that_does_not_block_has_rung() {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        rustix::io::write(&bell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        assert_eq!(ring(bell.as_fd()), Rang::Done);
    }
}
