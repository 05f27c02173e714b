//! The daemon under test and its command line, run as a user runs them: a configuration file, `linecardd`, and
//! `linecard -o json`. [`Config`] writes the few configurations that the scenarios need.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;

use crate::child::Child;
use crate::nic::Mode;
use crate::wait::{self, STEP};
use crate::{Error, Netns, Result, kit};

/// A configuration file: one plain network `lan` and ports on it. Every path is in one directory.
#[derive(Clone, Debug)]
pub struct Config {
    dir: PathBuf,
    ports: String,
}

impl Config {
    /// A configuration without ports whose files are in `dir`.
    pub fn new(dir: &Path) -> Config {
        Config { dir: dir.to_owned(), ports: String::new() }
    }

    /// Adds a vNIC with the socket `DIR/NAME.sock`.
    pub fn vnic(mut self, name: &str, mode: Mode, queues: u16) -> Config {
        let mode = match mode {
            Mode::Server => "server",
            Mode::Client => "client",
        };
        let socket = self.dir.join(format!("{name}.sock"));
        let socket = socket.display();
        self.ports += &format!(
            "  {name}: {{ vhost-user: {{ socket: {socket}, mode: {mode}, queues: {queues} }}, network: lan }}\n"
        );
        self
    }

    /// Adds a TAP port.
    pub fn tap(mut self, name: &str, interface: &str) -> Config {
        self.ports += &format!("  {name}: {{ tap: {{ interface: {interface} }}, network: lan }}\n");
        self
    }

    /// The file's text.
    pub fn yaml(&self) -> String {
        let dir = self.dir.display();
        let ports = &self.ports;
        format!(
            "version: 1\ndaemon: {{ api: {dir}/api.sock, state-dir: {dir}/state }}\n\
             shards: {{ cpus: \"0\", idle: adaptive }}\nnetworks: {{ lan: {{}} }}\nports:\n{ports}"
        )
    }
}

/// A running daemon, until dropped.
#[derive(Debug)]
pub struct Daemon {
    command: Vec<String>,
    log: PathBuf,
    api: PathBuf,
    cli: PathBuf,
    child: Child,
}

const FIX: &str = "cargo build (with the same profile), or set LINECARD_BIN_DIR";

impl Daemon {
    /// Writes `yaml` to `dir`, starts the daemon with it, in `netns` if given, and waits until its API answers.
    /// The file must name `dir/api.sock` as the API's socket.
    pub fn start(dir: &Path, yaml: &str, netns: Option<&Netns>) -> Result<Daemon> {
        let file = dir.join("linecard.yaml");
        fs::write(&file, yaml).map_err(Error::io(format!("write {file:?}")))?;
        let mut command = netns.map(Netns::enter).unwrap_or_default();
        let daemon = program("linecardd")?.display().to_string();
        command.extend([daemon, "--config".to_owned(), file.display().to_string()]);
        let (log, api, cli) = (dir.join("linecardd.log"), dir.join("api.sock"), program("linecard")?);
        let child = Child::start("linecardd", &command, &log, Stdio::null())?;
        let daemon = Daemon { command, log, api, cli, child };
        daemon.wait_serving()?;
        Ok(daemon)
    }

    /// Starts the daemon anew, as its service manager would; it must have been ended before.
    pub fn restart(&mut self) -> Result<()> {
        self.child = Child::start("linecardd", &self.command, &self.log, Stdio::null())?;
        self.wait_serving()
    }

    /// Kills the daemon (SIGKILL).
    pub fn kill(&mut self) {
        self.child.kill();
    }

    /// Asks the daemon to end (SIGTERM) and checks that it ends well.
    pub fn terminate(&mut self) -> Result<()> {
        let status = self.child.terminate()?;
        if status.success() { Ok(()) } else { Err(Error::Unexpected(format!("linecardd ended with {status}"))) }
    }

    /// Has the daemon read its file again (SIGHUP).
    pub fn reload(&mut self) -> Result<()> {
        self.child.signal(Signal::HUP)
    }

    /// What `linecard ARGUMENTS` prints.
    pub fn cli(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.cli);
        let output = command.arg("--api").arg(&self.api).args(arguments).stdin(Stdio::null()).output();
        let output = output.map_err(Error::io(format!("run {:?}", self.cli)))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        Err(Error::Script {
            machine: "host".into(),
            status: output.status.code().unwrap_or(-1),
            script: format!("linecard {}", arguments.join(" ")),
            output: text + &String::from_utf8_lossy(&output.stderr),
        })
    }

    /// What `linecard -o json ARGUMENTS` prints, read.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.cli(&[&["-o", "json"], arguments].concat())?;
        serde_json::from_str(&text)
            .map_err(|e| Error::Unexpected(format!("linecard {}: {e} in {text:?}", arguments.join(" "))))
    }

    /// A port as `port show` tells it.
    pub fn port(&self, name: &str) -> Result<Value> {
        self.json(&["port", "show", name])
    }

    /// One of a port's counters, such as `rx_frames`.
    pub fn counter(&self, port: &str, counter: &str) -> Result<u64> {
        let shown = self.port(port)?;
        let value = shown["counters"][counter].as_u64();
        value.ok_or_else(|| Error::Unexpected(format!("port {port} has no counter {counter}: {shown}")))
    }

    /// Checks that every frame of these ports had an end: received = delivered + dropped, once the last ones have arrived.
    pub fn balanced(&self, ports: &[&str]) -> Result<()> {
        ports.iter().try_for_each(|port| {
            wait::until_true(&format!("port {port}'s frames to be delivered or dropped"), STEP, || {
                let shown = self.port(port)?;
                let counter = |name: &str| shown["counters"][name].as_u64();
                let ends = counter("rx_delivered").zip(counter("rx_dropped"));
                Ok(ends.is_some() && counter("rx_frames") == ends.map(|(delivered, dropped)| delivered + dropped))
            })
        })
    }

    /// Waits until a port is in `state`, such as `up`.
    pub fn wait_state(&self, port: &str, state: &str) -> Result<()> {
        wait::until_true(&format!("port {port} to be {state}"), STEP, || Ok(self.port(port)?["state"] == state))
    }

    fn wait_serving(&self) -> Result<()> {
        wait::until_true("linecardd to serve its API", STEP, || Ok(self.api.exists() && self.json(&["status"]).is_ok()))
    }
}

fn program(name: &'static str) -> Result<PathBuf> {
    match std::env::var_os("LINECARD_BIN_DIR") {
        Some(dir) => Ok(PathBuf::from(dir).join(name)),
        None => kit::binary(name, FIX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_reads_as_the_documented_format() {
        let yaml = Config::new(Path::new("/d")).vnic("a", Mode::Client, 4).tap("host0", "lc0").yaml();
        let expected = "version: 1\n\
            daemon: { api: /d/api.sock, state-dir: /d/state }\n\
            shards: { cpus: \"0\", idle: adaptive }\n\
            networks: { lan: {} }\n\
            ports:\n\
            \x20 a: { vhost-user: { socket: /d/a.sock, mode: client, queues: 4 }, network: lan }\n\
            \x20 host0: { tap: { interface: lc0 }, network: lan }\n";
        assert_eq!(yaml, expected);
    }
}
