//! A process of a scenario: its output goes to a log file, and it ends with the value that stands for it, or with
//! the thread that started it, should that die without unwinding (`setpriv --pdeathsig` works per thread, so a
//! child is started and kept on the scenario's own thread).
//!
//! While it lives a child is *watched*: [`check_all`], which every wait of the thread calls, fails when any child has
//! ended that nobody asked to. A dead daemon thus ends the wait for a guest's boot at once, and is named as the reason.

use std::cell::RefCell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use crate::wait::{self, STEP};
use crate::{Error, Result};

thread_local! {
    /// The children of this thread that are meant to be running: process, name, log.
    static WATCHED: RefCell<Vec<(Pid, String, PathBuf)>> = const { RefCell::new(Vec::new()) };
}

/// Fails, with the end of its log, when a child of this thread has ended on its own.
pub fn check_all() -> Result<()> {
    // NOWAIT leaves the status for the child's owner.
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    WATCHED.with_borrow(|watched| {
        watched.iter().try_for_each(|(pid, name, log)| match waitid(WaitId::Pid(*pid), options) {
            Ok(Some(status)) => {
                let status = match status.terminating_signal() {
                    Some(signal) => format!("signal {signal}"),
                    None => format!("status {}", status.exit_status().unwrap_or(-1)),
                };
                Err(Error::Ended { name: name.clone(), status, log: tail(log, 30) })
            }
            _ => Ok(()),
        })
    })
}

/// A running (or ended) process that this scenario owns.
#[derive(Debug)]
pub struct Child {
    name: String,
    process: std::process::Child,
}

impl Child {
    /// Starts `command` (program and arguments) with output to `log`; `stdin` is what it reads from.
    pub fn start(name: &str, command: &[String], log: &Path, stdin: Stdio) -> Result<Child> {
        let file = File::options().create(true).append(true).open(log).map_err(Error::io(format!("open {log:?}")))?;
        let errors = file.try_clone().map_err(Error::io(format!("open {log:?}")))?;
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .args(command)
            .stdin(stdin)
            .stdout(file)
            .stderr(errors)
            .spawn()
            .map_err(Error::io(format!("start {name}")))?;
        let watch = (Pid::from_child(&process), name.to_owned(), log.to_owned());
        WATCHED.with_borrow_mut(|watched| watched.push(watch));
        Ok(Child { name: name.to_owned(), process })
    }

    /// The process id; of the program itself, whatever it was started through.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Where the process reads from, when it was started with a pipe.
    pub fn stdin(&mut self) -> Option<&mut std::process::ChildStdin> {
        self.process.stdin.as_mut()
    }

    fn exited(&mut self) -> Result<Option<ExitStatus>> {
        self.process.try_wait().map_err(Error::io(format!("wait for {}", self.name)))
    }

    /// From here on the process may end.
    pub fn unwatch(&self) {
        let pid = Pid::from_child(&self.process);
        WATCHED.with_borrow_mut(|watched| watched.retain(|(watched, ..)| *watched != pid));
    }

    /// Sends a signal; nothing happens when the process has already ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.exited()?.is_none() {
            let pid = Pid::from_child(&self.process);
            kill_process(pid, signal).map_err(|e| Error::io(format!("signal {}", self.name))(e.into()))?;
        }
        Ok(())
    }

    /// Asks the process to end (SIGTERM) and waits until it has.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.unwatch();
        self.signal(Signal::TERM)?;
        let what = format!("{} to end after SIGTERM", self.name);
        wait::until(&what, STEP, || self.exited())
    }

    /// Ends the process without its help (SIGKILL) and waits until the kernel has taken it apart.
    pub fn kill(&mut self) {
        self.unwatch();
        // Both only fail for a process that is already gone.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The last `lines` lines of a log, for error texts.
pub fn tail(log: &Path, lines: usize) -> String {
    let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
