//! A network namespace of a scenario's own, with a shell in it: the host side of TAP ports. It has no name in the file
//! system; a sleeping process holds it, so it is gone with that process whatever happens to the test. `/sys` inside
//! shows the namespace's own interfaces, as `ip netns exec` would arrange it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::thread;

use crate::agent::Job;
use crate::child::{Child, tail};
use crate::traffic::Machine;
use crate::wait::{self, STEP};
use crate::{Error, Result, kit};

/// A network namespace, until dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
    dir: PathBuf,
    holder: Child,
    address: OnceLock<String>,
}

impl Netns {
    /// Makes a namespace with its loopback up; its log goes to `dir`. Needs root.
    pub fn new(name: &str, dir: &Path) -> Result<Netns> {
        let inside = "mount -t sysfs sysfs /sys && ip link set lo up && echo ready && exec sleep infinity";
        let command = ["unshare", "--net", "--mount", "sh", "-c", inside].map(str::to_owned);
        let log = dir.join(format!("{name}.log"));
        let holder = Child::start(name, &command, &log, Stdio::null())?;
        wait::until_true(&format!("network namespace {name}"), STEP, || Ok(tail(&log, 1) == "ready"))?;
        Ok(Netns { name: name.to_owned(), dir: dir.to_owned(), holder, address: OnceLock::new() })
    }

    /// What to put before a command so that it runs in this namespace.
    pub fn enter(&self) -> Vec<String> {
        ["nsenter", "--net", "--mount", "--target", &self.holder.pid().to_string(), "--"].map(str::to_owned).into()
    }

    /// Gives the namespace's interface an address, as in `10.9.0.9/24`, and brings it up.
    pub fn configure(&self, interface: &str, address: &str) -> Result<()> {
        self.sh(&format!("ip addr add {address} dev {interface} && ip link set {interface} up"))?;
        let bare = address.split('/').next().unwrap_or_default().to_owned();
        self.address.set(bare).map_err(|_| Error::Unexpected(format!("{} already has an address", self.name)))
    }
}

impl Machine for Netns {
    fn name(&self) -> &str {
        &self.name
    }

    fn address(&self) -> &str {
        self.address.get().map_or("", String::as_str)
    }

    fn scratch(&self) -> &Path {
        &self.dir
    }

    fn start(&self, script: &str) -> Result<Job> {
        let payload = kit::binary("payload", "cargo build -p qemu-tests --bins")?;
        let bin = payload.parent().unwrap_or(Path::new("/")).display().to_string();
        let path = format!("{bin}:{}", std::env::var("PATH").unwrap_or_default());
        let script_text = format!("exec 2>&1\n{script}");
        let enter = self.enter();
        let (sender, done) = channel();
        thread::spawn(move || {
            // Dies with this thread, which lives as long as the process at most.
            let mut command = Command::new(&enter[0]);
            command.args(&enter[1..]).args(["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", &script_text]);
            let result = match command.env("PATH", path).stdin(Stdio::null()).output() {
                Ok(done) => (done.status.code().unwrap_or(-1), String::from_utf8_lossy(&done.stdout).into_owned()),
                Err(error) => (127, error.to_string()),
            };
            // A job nobody waits for any more has dropped its receiver.
            let _ = sender.send(result);
        });
        Ok(Job::new(&self.name, script, done))
    }
}
