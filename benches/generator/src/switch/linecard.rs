//! Linecard itself: `linecardd` with a configuration written for the occasion, asked through `linecard -o json`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::process::{Process, run};
use super::{Sample, Switch, SwitchError, Wiring, tail};
use crate::nic::Door;

/// Why Linecard may throw away a frame that there is nothing wrong with: no buffer; somebody else was in the receiver's ring for too
/// long, where the host gave the CPU away; the first frames of all ports, to addresses that are not known yet, were too many.
const NOT_TAKEN: [(&str, &str); 3] = [("ring-full", "tx"), ("receiver-busy", "tx"), ("storm-limited", "rx")];

const HINT: &str = "cargo build --release --bins, or --bin-dir";

/// A running `linecardd`.
#[derive(Debug)]
pub struct Linecard {
    process: Option<Process>,
    dir: TempDir,
    bin: PathBuf,
    ports: usize,
}

/// How Linecard is set up beyond its wiring.
#[derive(Clone, Debug)]
pub struct Setup {
    /// `shards.idle`.
    pub idle: String,
    /// `latency-sensitivity` of every port.
    pub latency: String,
    /// A CPU that is not the switch's: there must be a shared one, and at `high` all of the switch's are exclusive.
    pub spare: usize,
}

impl Default for Setup {
    /// As Open vSwitch with DPDK: always polling.
    fn default() -> Self {
        Self { idle: "never".into(), latency: "normal".into(), spare: 1 }
    }
}

impl Linecard {
    /// Starts the daemon in `bin`.
    pub fn start(bin: &Path, wiring: &Wiring, setup: &Setup) -> Result<Self, SwitchError> {
        let dir = TempDir::with_prefix("linecard-bench-")
            .map_err(|source| SwitchError::File { path: std::env::temp_dir(), source })?;
        let config = dir.path().join("linecard.yaml");
        std::fs::write(&config, yaml(dir.path(), wiring, setup))
            .map_err(|source| SwitchError::File { path: config, source })?;
        let mut switch = Self { process: None, dir, bin: bin.into(), ports: wiring.ports };
        switch.launch()?;
        Ok(switch)
    }

    /// Starts the process over the files that are there.
    pub fn launch(&mut self) -> Result<(), SwitchError> {
        let mut command = Command::new(self.bin.join("linecardd"));
        command.arg("--config").arg(self.dir.path().join("linecard.yaml"));
        self.process = Some(Process::start(&mut command, &self.dir.path().join("log"), HINT)?);
        Ok(())
    }

    /// Runs `linecard -o json` with `args`.
    pub fn linecard(&self, args: &[&str]) -> Result<Value, SwitchError> {
        let mut command = Command::new(self.bin.join("linecard"));
        command.arg("--api").arg(self.dir.path().join("api.sock")).args(["-o", "json"]).args(args);
        let said = run(&mut command, HINT)?;
        serde_json::from_str(&said).map_err(|_| SwitchError::Silent { program: "linecard", what: "JSON", said })
    }
}

impl Linecard {
    /// Frames that were dropped since it was started, whatever the reason.
    pub fn dropped(&self) -> Result<u64, SwitchError> {
        let drops = self.drops()?;
        let received = drops.iter().filter(|drop| drop["direction"] == "rx");
        Ok(received.filter_map(|drop| drop["count"].as_u64()).sum())
    }

    /// Changes the profile of all ports in the file and has that applied; how long `linecard apply` took.
    pub fn reload(&self) -> Result<Duration, SwitchError> {
        let path = self.dir.path().join("linecard.yaml");
        let file = |source| SwitchError::File { path: path.clone(), source };
        let text = std::fs::read_to_string(&path).map_err(file)?;
        std::fs::write(&path, text.replacen("limits: { macs: ", "limits: { macs: 1", 1)).map_err(file)?;
        let start = Instant::now();
        self.linecard(&["apply"])?;
        Ok(start.elapsed())
    }

    fn drops(&self) -> Result<Vec<Value>, SwitchError> {
        let drops = self.linecard(&["drops"])?;
        Ok(drops.as_array().or_else(|| drops["drops"].as_array()).cloned().unwrap_or_default())
    }
}

impl Switch for Linecard {
    fn doors(&self) -> Vec<Door> {
        (0..self.ports).map(|port| Door::Connect(self.dir.path().join(format!("p{port}.sock")))).collect()
    }

    fn sample(&mut self) -> Result<Option<Sample>, SwitchError> {
        let shards = self.linecard(&["shard", "list"])?;
        let list = shards.as_array().or_else(|| shards["shards"].as_array());
        let list = list.ok_or_else(|| SwitchError::Silent {
            program: "linecard",
            what: "a list of shards",
            said: shards.to_string(),
        })?;
        let sum = |key: &str| list.iter().filter_map(|shard| shard[key].as_u64()).sum::<u64>();
        let mut sample = Sample { frames: sum("frames"), busy: sum("busy-cycles"), cycles: 0, not_taken: 0 };
        sample.cycles = sample.busy + sum("poll-cycles") + sum("sleep-cycles");
        let drops = self.drops()?;
        // A frame with no room at its receiver counts there, and at its sender only if no other copy of a flood went out either;
        // one that its sender's `storm` stopped has no receiver.
        let not_taken =
            |drop: &&Value| NOT_TAKEN.iter().any(|pair| drop["reason"] == pair.0 && drop["direction"] == pair.1);
        sample.not_taken = drops.iter().filter(not_taken).filter_map(|drop| drop["count"].as_u64()).sum();
        Ok(Some(sample))
    }

    fn last_words(&self) -> String {
        tail(&self.dir.path().join("log"))
    }

    fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    fn restart(&mut self) -> Result<Instant, SwitchError> {
        if let Some(process) = self.process.take() {
            process.kill();
        }
        let start = Instant::now();
        self.launch()?;
        Ok(start)
    }
}

/// Which version it is.
pub fn version(bin: &Path) -> Result<String, SwitchError> {
    let said = run(Command::new(bin.join("linecardd")).arg("--version"), HINT)?;
    Ok(said.trim().to_owned())
}

/// The configuration for `wiring`, all of its files in `dir`.
fn yaml(dir: &Path, wiring: &Wiring, setup: &Setup) -> String {
    let at = dir.display();
    let cpus: Vec<_> = wiring.cpus.iter().map(usize::to_string).collect();
    let cpus = cpus.join(",");
    let high = setup.latency == "high";
    let (shared, exclusive) = if high { (setup.spare.to_string(), cpus) } else { (cpus, String::new()) };
    // Each port would get a CPU of its own otherwise, and switches are compared with the same CPUs.
    let together = if high { ", affinity: vm, labels: { vm: bench }" } else { "" };
    let stations = wiring.stations.unwrap_or(1).max(4096);
    let all = (stations as usize * wiring.ports).min(1 << 20);
    let mut yaml = format!(
        "version: 1\n\
         daemon: {{ api: {at}/api.sock, state-dir: {at}/state, log: warn }}\n\
         shards: {{ cpus: \"{shared}\", exclusive: \"{exclusive}\", idle: {idle} }}\n\
         networks: {{ lan: {{ mac-limit: {all} }} }}\n\
         profiles:\n  load: {{ network: lan, latency-sensitivity: {latency}, limits: {{ macs: {stations} }}{together} }}\n\
         ports:\n",
        idle = setup.idle,
        latency = setup.latency,
    );
    for port in 0..wiring.ports {
        let queues = wiring.queues;
        // Writing to a String does not fail.
        let _ = writeln!(
            yaml,
            "  p{port}: {{ vhost-user: {{ socket: {at}/p{port}.sock, queues: {queues} }}, profile: load }}"
        );
    }
    yaml
}
