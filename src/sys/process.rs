//! Whether a process still runs: [`has_ended`].
//!
//! A process that was killed is not gone while one of its threads waits in the kernel for something that never comes (a file
//! system without its server, a device). It then keeps its descriptors, listening sockets among them, and executes nothing any
//! more.

use std::fs;

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

/// PF_EXITING of include/linux/sched.h: the thread is on its way out.
const EXITING: u64 = 0x4;

/// The bit of SIGKILL in a mask of /proc/PID/status (proc(5)).
const KILLED: u64 = 1 << (libc::SIGKILL - 1);

/// Whether no thread of process `pid` will run again. `false` where that cannot be told.
pub fn has_ended(pid: i32) -> bool {
    // Zero is a process of another PID namespace (unix(7)).
    let Some(process) = Some(pid).filter(|pid| *pid > 0).and_then(Pid::from_raw) else { return false };
    if test_kill_process(process) == Err(Errno::SRCH) {
        return true;
    }
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let mut threads = threads.flatten().peekable();
    threads.peek().is_some() && threads.all(|thread| thread_has_ended(&thread.path()).unwrap_or(false))
}

/// Whether the thread with this directory in /proc is dead, is exiting, or is going to when it leaves the kernel.
fn thread_has_ended(directory: &std::path::Path) -> Option<bool> {
    let stat = fs::read_to_string(directory.join("stat")).ok()?;
    // The name is in parentheses and may hold anything; the state is the first field behind it and the flags are the seventh.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let dead = matches!(fields.next()?, "Z" | "X");
    let exiting = fields.nth(5)?.parse::<u64>().ok()? & EXITING != 0;
    let status = fs::read_to_string(directory.join("status")).ok()?;
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:")).unwrap_or("0");
    let killed = u64::from_str_radix(pending.trim(), 16).ok()? & KILLED != 0;
    Some(dead || exiting || killed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn zombies_and_processes_that_are_gone_have_ended_and_others_have_not() {
        assert!(!has_ended(std::process::id() as i32) && !has_ended(1) && !has_ended(0) && !has_ended(-1));
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id() as i32;
        assert!(!has_ended(pid));
        child.kill().unwrap();
        let begin = std::time::Instant::now();
        while !has_ended(pid) {
            assert!(begin.elapsed().as_secs() < 60, "a zombie counts as running");
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(has_ended(pid));
    }
}
