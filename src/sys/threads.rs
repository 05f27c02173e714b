//! Threads of this process as the kernel numbers them: [`id`], and whether one waits in the kernel: [`is_waiting`].

use std::cell::Cell;
use std::io::Read;

/// Longest text of /proc/PID/stat up to the state: the number, a name of 15 bytes and what is around them.
const STAT_BYTES: usize = 64;

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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::mpsc::channel;
    use std::time::{Duration, Instant};

    use super::*;

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
