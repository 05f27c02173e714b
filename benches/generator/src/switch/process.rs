//! Programs that a switch is made of: run to their end, or kept until they are dropped.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::SwitchError;

/// How long a program may take to end when it is asked to.
const FAREWELL: Duration = Duration::from_secs(5);

/// A program that runs until this is dropped.
#[derive(Debug)]
pub(super) struct Process(Child);

impl Process {
    /// Starts `command`; both of its outputs go to `log`.
    pub(super) fn start(command: &mut Command, log: &Path, hint: &'static str) -> Result<Self, SwitchError> {
        let open = |source| SwitchError::File { path: log.into(), source };
        let file = File::create(log).map_err(open)?;
        command.stdout(file.try_clone().map_err(open)?).stderr(file);
        let program = command.get_program().to_string_lossy().into_owned();
        command.spawn().map(Self).map_err(|source| SwitchError::Run { program, hint, source })
    }

    /// Its standard input, if `command` piped that.
    pub(super) fn input(&mut self) -> Option<std::process::ChildStdin> {
        self.0.stdin.take()
    }

    /// Its number.
    pub(super) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Kills it outright.
    pub(super) fn kill(mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// Whether it has ended.
    pub(super) fn has_ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.0.id() as i32).filter(|_| !self.has_ended()) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let end = Instant::now() + FAREWELL;
        while !self.has_ended() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `command` to its end; what it printed.
pub(super) fn run(command: &mut Command, hint: &'static str) -> Result<String, SwitchError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output();
    let Output { status, stdout, stderr } = output.map_err(|source| SwitchError::Run { program, hint, source })?;
    if !status.success() {
        let said = String::from_utf8_lossy(&stderr).trim().to_owned();
        return Err(SwitchError::Failed { program: format!("{command:?}"), said });
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}
