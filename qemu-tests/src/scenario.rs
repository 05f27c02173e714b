//! A scenario: the frame of every test. It holds the machine's QEMU slot and a directory for sockets and logs, and
//! when the test fails, by an error or a panic, it prints the end of every log in that directory. The directory goes
//! even when the process is killed: a shell that waits for the end of its input removes it then.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::child::tail;
use crate::guest::{Guest, Spec};
use crate::kit::{Kit, Slot};
use crate::{Daemon, Error, Netns, Result};

/// The surroundings of one test.
#[derive(Debug)]
pub struct Scenario {
    kit: &'static Kit,
    dir: tempfile::TempDir,
    passed: bool,
    janitor: std::process::Child,
    _slot: Slot,
}

/// Runs `body` as a scenario, alone on this machine's QEMU slot.
pub fn scenario(body: impl FnOnce(&Scenario) -> Result<()>) -> Result<()> {
    let mut scenario = Scenario::new()?;
    let result = body(&scenario);
    if result.is_ok() {
        scenario.pass();
    }
    result
}

impl Scenario {
    /// Takes the slot and makes the directory.
    pub fn new() -> Result<Scenario> {
        let slot = Kit::slot()?;
        let kit = Kit::open()?;
        // A socket's path has at most 107 bytes, so the directory's name stays short.
        let dir = tempfile::Builder::new().prefix("lc-").tempdir().map_err(Error::io("create a directory"))?;
        let janitor = janitor(dir.path()).map_err(Error::io("start a shell"))?;
        Ok(Scenario { kit, dir, passed: false, janitor, _slot: slot })
    }

    /// Counts the scenario as passed: its end prints no logs.
    pub fn pass(&mut self) {
        self.passed = true;
    }

    /// The scenario's directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What guests boot from.
    pub fn kit(&self) -> &'static Kit {
        self.kit
    }

    /// A path in the scenario's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a guest without waiting for its boot.
    pub fn start(&self, guest: Spec) -> Result<Guest> {
        guest.start(self.kit, self.dir())
    }

    /// Starts guests side by side and waits until all are ready.
    pub fn boot<const N: usize>(&self, guests: [Spec; N]) -> Result<[Guest; N]> {
        let started = guests.into_iter().map(|spec| self.start(spec)).collect::<Result<Vec<_>>>()?;
        started.iter().try_for_each(Guest::ready)?;
        started.try_into().map_err(|_| Error::Unexpected("guests were lost".into()))
    }

    /// Starts a daemon with this configuration file, and waits until it serves.
    pub fn daemon(&self, yaml: &str) -> Result<Daemon> {
        Daemon::start(self.dir(), yaml, None)
    }

    /// Makes a network namespace of the scenario's own.
    pub fn netns(&self, name: &str) -> Result<Netns> {
        Netns::new(name, self.dir())
    }
}

impl Drop for Scenario {
    fn drop(&mut self) {
        if !self.passed {
            self.print_logs();
        }
        drop(self.janitor.stdin.take());
        // It has nothing to report; the directory's own end removes what it could not.
        let _ = self.janitor.wait();
    }
}

impl Scenario {
    fn print_logs(&self) {
        let mut logs: Vec<PathBuf> =
            fs::read_dir(self.dir()).into_iter().flatten().flatten().map(|e| e.path()).collect();
        logs.retain(|path| path.extension().is_some_and(|e| e == "log" || e == "console"));
        logs.sort();
        for log in logs {
            eprintln!("----- {} -----\n{}", log.file_name().unwrap_or_default().to_string_lossy(), tail(&log, 60));
        }
    }
}

/// In a session of its own, where no terminal's interrupt reaches it.
fn janitor(dir: &Path) -> std::io::Result<std::process::Child> {
    let script = "cat >/dev/null; rm -rf -- \"$1\"";
    let mut command = Command::new("setsid");
    command.args(["sh", "-c", script, "sh"]).arg(dir);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}
