//! Moving a guest to another QEMU: over a socket while it runs, or through a file while nobody runs it.
//!
//! A [`Destination`] is the same machine as a process that waits (`-incoming defer`), connected to the switch on sockets of
//! its own. When the state has arrived the [`Guest`] *is* that process: its QEMU, QMP and agent connections are replaced
//! in place, so scripts, flows and pings that were started in it before go on and are collected after.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use crate::guest::{Guest, Process};
use crate::nic::Nic;
use crate::wait::{self, BOOT};
use crate::{Error, Result, Scenario};

/// How hard QEMU tries to end a migration.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Bytes per second.
    bandwidth: u64,
    /// Stop the guest for the rest when QEMU thinks that this many milliseconds are enough...
    downtime: u64,
    /// ...at so many bytes per second; 0 for as many as went through so far.
    switchover: u64,
}

impl Pace {
    /// All that there is.
    pub const FULL: Pace = Pace { bandwidth: 4 << 30, downtime: 300, switchover: 0 };
    /// A few seconds for the memory of a test's guest, and then on for as long as the guest writes any.
    pub const BRISK: Pace = Pace { bandwidth: 32 << 20, ..Pace::TRICKLE };
    /// Without an end: any guest that runs writes more than this.
    pub const TRICKLE: Pace = Pace { bandwidth: 64 << 10, downtime: 1, switchover: 1000 };
}

/// A QEMU that waits for a guest's state.
#[derive(Debug)]
pub struct Destination {
    process: Process,
    agent: UnixStream,
    uri: String,
}

/// What QEMU says about a migration that has completed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// From the command to the end.
    pub total: Duration,
    /// How long the guest did not run.
    pub downtime: Duration,
    /// Memory sent, in MiB.
    pub mib: u64,
    /// How often the dirty pages were collected.
    pub rounds: u64,
}

impl Destination {
    /// Where the source is to send the state.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Runs a QMP command.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.process.qmp()?.execute(command, arguments)
    }

    /// Has QEMU wait for the state at `uri`: `unix:PATH`, `file:PATH`, `exec:COMMAND`.
    pub fn listen(&mut self, uri: &str) -> Result<()> {
        uri.clone_into(&mut self.uri);
        self.qmp("migrate-set-capabilities", json!({ "capabilities": capabilities(uri) }))?;
        self.qmp("migrate-incoming", json!({ "uri": uri })).map(drop)
    }

    /// From here on this QEMU may end: it does when the migration fails or is cancelled.
    pub fn may_end(&self) {
        self.process.qemu.unwatch();
    }

    /// Kills QEMU (SIGKILL).
    pub fn kill(mut self) {
        self.process.qemu.kill();
    }
}

/// `return-path`: the source hears whether the destination could load the state, and goes on when not.
fn capabilities(uri: &str) -> Value {
    json!([{ "capability": "events", "state": true },
           { "capability": "return-path", "state": uri.starts_with("unix:") }])
}

impl Guest {
    /// Starts a QEMU that this guest can move to, NIC by NIC on the sockets `NAME.sock` of the scenario's directory, and
    /// has it listen on a socket of its own. `name` names its logs.
    pub fn destination(&self, s: &Scenario, name: &str, ports: &[&str]) -> Result<Destination> {
        self.destination_like(s, name, ports, |nic| nic)
    }

    /// As [`Guest::destination`], with other NICs than the guest has.
    pub fn destination_like(
        &self,
        s: &Scenario,
        name: &str,
        ports: &[&str],
        change: impl Fn(Nic) -> Nic,
    ) -> Result<Destination> {
        let mut waiting = self.waiting(s, name, ports, change)?;
        waiting.listen(&format!("unix:{}", s.path(&format!("{name}.state")).display()))?;
        Ok(waiting)
    }

    fn waiting(&self, s: &Scenario, name: &str, ports: &[&str], change: impl Fn(Nic) -> Nic) -> Result<Destination> {
        let sockets: Vec<PathBuf> = ports.iter().map(|port| s.path(&format!("{port}.sock"))).collect();
        let process = self.spec.destination(name, &sockets, change).process(s.kit(), &self.dir)?;
        let agent = process.connect("agent")?;
        Ok(Destination { process, agent, uri: String::new() })
    }

    /// Saves the guest to `save`, ends its QEMU, and has one called `name` go on from `restore`, on the same ports.
    pub fn save_and_restore(&self, s: &Scenario, name: &str, ports: &[&str], save: &str, restore: &str) -> Result<()> {
        self.send_state(save, Pace::FULL)?;
        self.migration_ended("completed")?;
        // The one QEMU has to leave the ports before the other can have them.
        self.process().qemu.kill();
        let mut restored = self.waiting(s, name, ports, |nic| nic)?;
        restored.listen(restore)?;
        self.arrive(restored)
    }

    /// Starts sending the state.
    pub fn send_state(&self, uri: &str, pace: Pace) -> Result<()> {
        self.qmp("migrate-set-capabilities", json!({ "capabilities": capabilities(uri) }))?;
        self.pace_migration(pace)?;
        self.qmp("migrate", json!({ "uri": uri })).map(drop)
    }

    /// Changes the pace of a migration that runs.
    pub fn pace_migration(&self, pace: Pace) -> Result<()> {
        let Pace { bandwidth, downtime, switchover } = pace;
        let limits =
            json!({ "max-bandwidth": bandwidth, "downtime-limit": downtime, "avail-switchover-bandwidth": switchover });
        self.qmp("migrate-set-parameters", limits).map(drop)
    }

    /// Asks QEMU to end the migration that runs; [`Guest::migration_ended`] with `cancelled` waits for it.
    pub fn cancel_migration(&self) -> Result<()> {
        self.qmp("migrate_cancel", json!({})).map(drop)
    }

    /// How the migration stands, as `query-migrate` says it.
    pub fn migration(&self) -> Result<Value> {
        self.qmp("query-migrate", json!({}))
    }

    /// Waits until all memory was sent once and the pages written since have been collected `rounds` times.
    pub fn migration_rounds(&self, rounds: u64) -> Result<()> {
        wait::until_true(&format!("round {rounds} of a migration"), BOOT, || {
            let now = self.migration()?;
            match now["status"].as_str() {
                Some("none" | "setup" | "active") => Ok(now["ram"]["dirty-sync-count"].as_u64() >= Some(rounds)),
                _ => Err(Error::Unexpected(format!("the migration should still be running: {now}"))),
            }
        })
    }

    /// Waits until the migration has ended, and fails unless it ended like this: `completed`, `cancelled`, `failed`.
    pub fn migration_ended(&self, expected: &str) -> Result<Summary> {
        let ended = wait::until("the migration to end", BOOT, || {
            let now = self.migration()?;
            let ended = matches!(now["status"].as_str(), Some("completed" | "cancelled" | "failed"));
            Ok(ended.then_some(now))
        })?;
        if ended["status"] != expected {
            return Err(Error::Unexpected(format!("the migration should have {expected}: {ended}")));
        }
        let time = |key: &str| Duration::from_millis(ended[key].as_u64().unwrap_or_default());
        Ok(Summary {
            total: time("total-time"),
            downtime: time("downtime"),
            mib: ended["ram"]["transferred"].as_u64().unwrap_or_default() >> 20,
            rounds: ended["ram"]["dirty-sync-count"].as_u64().unwrap_or_default(),
        })
    }

    /// Moves to `destination` without a limit, and ends the QEMU that was left.
    pub fn migrate(&self, destination: Destination) -> Result<Summary> {
        self.send_state(&destination.uri, Pace::FULL)?;
        let summary = self.migration_ended("completed")?;
        self.arrive(destination)?;
        Ok(summary)
    }

    /// Becomes the QEMU that has the guest's state now, and ends the one before.
    pub fn arrive(&self, mut destination: Destination) -> Result<()> {
        wait::until_true("the guest to run at its destination", BOOT, || {
            Ok(destination.qmp("query-status", json!({}))?["status"] == "running")
        })?;
        self.agent()?.follow(destination.agent)?;
        let left = std::mem::replace(&mut *self.process(), destination.process);
        drop(left);
        Ok(())
    }
}
