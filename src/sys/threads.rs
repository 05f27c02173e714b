//! Threads of this process as the kernel numbers them: [`id`], and whether one waits in the kernel: [`is_waiting`]; and stacks that are
//! there before they are used: [`touch_stack`].

use std::cell::Cell;
use std::io::Read;

/// Longest text of /proc/PID/stat up to the state: the number, a name of 15 bytes and what is around them.
const STAT_BYTES: usize = 64;

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

/// Whether a thread of this process waits in the kernel: neither runs nor could run (proc_pid_stat(5), field 3). `false` of one that
/// is gone. Some 20 us; allocates no more than the file's name.
pub fn is_waiting(id: i32) -> bool {
    let mut stat = [0; STAT_BYTES];
    let read = std::fs::File::open(format!("/proc/self/task/{id}/stat")).and_then(|mut file| file.read(&mut stat));
    let stat = &stat[..read.unwrap_or(0)];
    // What comes before is the name in parentheses, which may contain anything, but no more than 15 bytes of it.
    let state = stat.iter().rposition(|&byte| byte == b')').and_then(|end| stat.get(end + 2));
    matches!(state, Some(b'D' | b'S'))
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
    use std::sync::mpsc::channel;
    use std::time::{Duration, Instant};

    use super::*;

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
}
