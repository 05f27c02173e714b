//! Threads of this process as the kernel numbers them: [`id`]; whether one waits in the kernel, and what it has done so far:
//! [`is_waiting`], [`activity`]; and stacks that are there before they are used: [`touch_stack`].

use std::cell::Cell;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Longest text of /proc/PID/stat up to the state: the number, a name of 15 bytes and what is around them. And up to the CPU time:
/// twelve numbers more.
const STATE_BYTES: usize = 64;
const ACTIVITY_BYTES: usize = STATE_BYTES + 12 * 21;

/// What CPU time is counted in: USER_HZ is 100 on every architecture of ours (times(2)).
const CLOCK_TICK: Duration = Duration::from_millis(10);

/// Bytes of a stack that are touched: what any of our threads uses, with a margin for builds without optimisation.
const STACK_BYTES: usize = 128 * 1024;

thread_local! {
    static OWN: Cell<i32> = const { Cell::new(0) };
}

/// The number of the calling thread. One system call for each thread's first time.
#[inline]
pub fn id() -> i32 {
    let known = OWN.get();
    if known != 0 { known } else { ask() }
}

#[cold]
fn ask() -> i32 {
    let id = rustix::thread::gettid().as_raw_nonzero().get();
    OWN.set(id);
    id
}

/// What a thread has done so far, and does now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Activity {
    /// It waits in the kernel: neither runs nor could run.
    pub waits: bool,
    /// Page faults that came to an end, and found what they were for.
    pub faults: u64,
    /// CPU time, in steps of 10 ms.
    pub ran: Duration,
}

/// Whether a thread of this process waits in the kernel: neither runs nor could run. `false` of one that is gone. Some 20 us;
/// allocates no more than the file's name.
pub fn is_waiting(id: i32) -> bool {
    parse(stat(id, &mut [0; STATE_BYTES])).waits
}

/// What a thread of this process has done so far; nothing of one that is gone. Costs what [`is_waiting`] does.
pub fn activity(id: i32) -> Activity {
    parse(stat(id, &mut [0; ACTIVITY_BYTES]))
}

/// As much as fits of what the kernel says of a thread.
fn stat(id: i32, room: &mut [u8]) -> &[u8] {
    let read = std::fs::File::open(format!("/proc/self/task/{id}/stat")).and_then(|mut file| file.read(room));
    room.get(..read.unwrap_or(0)).unwrap_or_default()
}

/// What it says, by proc_pid_stat(5).
fn parse(stat: &[u8]) -> Activity {
    // What comes before is the name in parentheses, which may contain anything, but no more than 15 bytes of it.
    let fields = stat.iter().rposition(|&byte| byte == b')').and_then(|end| stat.get(end + 2..)).unwrap_or_default();
    let fields = std::str::from_utf8(fields).unwrap_or_default();
    // The first one here is the state, field 3.
    let number = |field: usize| fields.split(' ').nth(field - 3).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let ticks = u32::try_from(number(14) + number(15)).unwrap_or(u32::MAX);
    Activity {
        waits: fields.starts_with(['D', 'S']),
        faults: number(10) + number(12),
        ran: CLOCK_TICK.saturating_mul(ticks),
    }
}

/// What the scheduler has done with a thread in some time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Schedule {
    /// How long it ran.
    pub ran: Duration,
    /// How long it could have run and had no CPU.
    pub waited: Duration,
}

/// The same of one thread from reading to reading of its schedstat (fs/proc/base.c: the first two numbers, in nanoseconds).
#[derive(Debug)]
pub struct ThreadSchedule {
    file: Option<std::fs::File>,
    last: Schedule,
    read: Instant,
}

impl ThreadSchedule {
    /// How old a reading may be that later ones are compared with.
    const OLD: Duration = Duration::from_millis(10);

    /// That of the calling thread.
    pub fn of_this_thread() -> Self {
        let file = std::fs::File::open("/proc/thread-self/schedstat").ok();
        let mut schedule = Self { file, last: Schedule::default(), read: Instant::now() };
        schedule.last = schedule.read().unwrap_or_default();
        schedule
    }

    /// Reads it unless it was read a moment ago: costs 1 us a hundred times in a second.
    #[inline]
    pub fn refresh(&mut self) {
        if self.read.elapsed() >= Self::OLD {
            self.since_refreshed();
        }
    }

    /// What has been since it was read, which may be some milliseconds ago; that it has waited all the time where the kernel does not
    /// say (no CONFIG_SCHED_INFO). Reads it.
    pub fn since_refreshed(&mut self) -> Schedule {
        let (now, elapsed) = (self.read(), self.read.elapsed());
        let Schedule { ran, waited } = self.last;
        let since = now.map_or(Schedule { ran: Duration::ZERO, waited: elapsed }, |now| Schedule {
            ran: now.ran.saturating_sub(ran),
            waited: now.waited.saturating_sub(waited),
        });
        (self.last, self.read) = (now.unwrap_or_default(), Instant::now());
        since
    }

    fn read(&self) -> Option<Schedule> {
        let mut text = [0; 64];
        let len = self.file.as_ref()?.read_at(&mut text, 0).ok()?;
        let mut numbers = std::str::from_utf8(text.get(..len)?).ok()?.split(' ').map(|number| number.parse().ok());
        let (ran, waited) = (numbers.next()??, numbers.next()??);
        Some(Schedule { ran: Duration::from_nanos(ran), waited: Duration::from_nanos(waited) })
    }
}

/// Writes to the part of the calling thread's stack that is going to be used; it has to be at least twice as large. For threads that
/// others wait for. Where the kernel is the first to write to a page, as when it gives back what a system call was asked for, it
/// takes the lock of the memory map (do_user_addr_fault in arch/x86/mm/fault.c), which a fault in user mode does not (Linux 6.4), and
/// front ends may have somebody hold that ([`super::mapping_turn`]).
#[inline(never)]
pub fn touch_stack() {
    std::hint::black_box(&mut [1_u8; STACK_BYTES]);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    #![allow(unsafe_code)] // mincore(2).
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    #[cfg_attr(miri, ignore = "asks the kernel for pages")]
    fn a_stack_that_was_touched_is_there() {
        let check = || {
            let here = std::hint::black_box(&mut [0_u8; 64]).as_ptr().addr();
            let page = (here - STACK_BYTES * 3 / 4) & !4095;
            touch_stack();
            let mut there = 0_u8;
            // SAFETY: the kernel says for one page, which is aligned, whether it is there; it reads and writes nothing of it.
            assert_eq!(unsafe { libc::mincore(page as *mut libc::c_void, 4096, &raw mut there) }, 0);
            there & 1 == 1
        };
        // Of a size that no other thread has, so that nobody has used the stack before.
        let thread = std::thread::Builder::new().stack_size(60 * STACK_BYTES).spawn(check);
        assert!(thread.unwrap().join().unwrap());
    }

    #[test]
    fn what_a_thread_did_is_read_behind_its_name() {
        let stat = b"1234 (a) S (b) R 0 0 ) R 1 1 1 0 -1 4194368 1005 7 3 9 250 50 0 0 20 0 9 0 123";
        let ran = Duration::from_secs(3);
        assert_eq!(parse(stat), Activity { waits: false, faults: 1008, ran });
        assert_eq!(parse(&stat[..40]), Activity::default());
        assert_eq!(parse(b""), Activity::default());
        let before = activity(id());
        let pages = std::hint::black_box(vec![1_u8; 64 << 20]);
        assert!(activity(id()).faults > before.faults + 16, "{} bytes were touched", pages.len());
        while activity(id()).ran <= before.ran {}
    }

    #[test]
    fn a_thread_that_sleeps_waits_and_one_that_runs_does_not() {
        let (tell, told) = channel();
        let (end, ended) = channel::<()>();
        // A name that ends as the field does, and is as long as one may be.
        let sleeper = std::thread::Builder::new().name("a) S (b) R 0 0 )".into());
        let sleeper = sleeper.spawn(move || {
            tell.send((id(), id())).unwrap();
            let _ = ended.recv();
        });
        let (one, same) = told.recv().unwrap();
        assert!(one == same && one != id());
        while !is_waiting(one) {
            std::thread::yield_now();
        }
        assert!(!is_waiting(id()));
        drop(end);
        sleeper.unwrap().join().unwrap();
        assert!(!is_waiting(0) && !is_waiting(-1));
        // Who is joined may still be on the way out, and wait there.
        let end = Instant::now() + Duration::from_secs(60);
        while is_waiting(one) {
            assert!(Instant::now() < end, "a thread that is gone waits");
            std::thread::yield_now();
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks the kernel")]
    fn a_thread_that_waits_for_a_cpu_is_told_from_one_that_runs() {
        let mut schedule = ThreadSchedule::of_this_thread();
        assert!(schedule.file.is_some() && schedule.read().is_some(), "the kernel says so");
        // Asleep it waits for none, and a busy host gives it one sooner or later.
        let quiet = (0..1000).any(|_| {
            schedule.since_refreshed();
            std::thread::sleep(Duration::from_millis(1));
            schedule.since_refreshed().waited < Duration::from_millis(1)
        });
        assert!(quiet);
        // Beside others on its CPU it waits for most of the time.
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let cpu = (0..u16::MAX).find(|&cpu| allowed.is_set(usize::from(cpu))).unwrap();
        let end = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    crate::sys::cpu::pin_to(cpu).unwrap();
                    while !end.load(std::sync::atomic::Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            scope.spawn(|| {
                crate::sys::cpu::pin_to(cpu).unwrap();
                let (begin, mut schedule) = (Instant::now(), ThreadSchedule::of_this_thread());
                let mut waited = Duration::ZERO;
                while waited < Duration::from_millis(50) {
                    assert!(begin.elapsed() < Duration::from_secs(60));
                    waited += schedule.since_refreshed().waited;
                }
                assert!(waited <= begin.elapsed());
                end.store(true, std::sync::atomic::Ordering::Relaxed);
            });
        });
    }
}
