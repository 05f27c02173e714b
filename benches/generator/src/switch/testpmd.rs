//! DPDK's bare patch cable: testpmd with its vhost driver, which hands each frame of port 0 to port 1 and back and looks at
//! nothing (`io`). What a switch costs is measured from here.

use std::io::Write as _;
use std::process::{ChildStdin, Command, Stdio};
use std::time::Instant;

use tempfile::TempDir;

use super::process::{Process, run};
use super::{Sample, Switch, SwitchError, Wiring, tail};
use crate::nic::Door;

const HINT: &str = "Debian package dpdk: qemu-tests/setup.sh all";

/// A running testpmd.
#[derive(Debug)]
pub struct Testpmd {
    // In this order: testpmd ends when its input does.
    input: Option<ChildStdin>,
    process: Process,
    dir: TempDir,
    ports: usize,
}

impl Testpmd {
    /// Huge pages of 2 MiB that its DPDK takes.
    pub const PAGES: usize = 256;

    /// Starts it; the first CPU of `wiring` forwards, as in one-core comparisons.
    pub fn start(wiring: &Wiring) -> Result<Self, SwitchError> {
        let dir = TempDir::with_prefix("testpmd-bench-")
            .map_err(|source| SwitchError::File { path: std::env::temp_dir(), source })?;
        let cpu = wiring.cpus.first().copied().unwrap_or(0);
        let (queues, offloads) = (wiring.queues, if wiring.offloads { ",tso=1" } else { "" });
        let mut command = Command::new("dpdk-testpmd");
        command.args(["--lcores", &format!("0@{cpu},1@{cpu}"), "-m", &(2 * Self::PAGES).to_string()]);
        command.args(["--in-memory", "--single-file-segments", "--no-pci"]);
        for port in 0..wiring.ports {
            let socket = dir.path().join(format!("p{port}.sock"));
            let device = format!("net_vhost{port},iface={},queues={queues}{offloads}", socket.display());
            command.arg("--vdev").arg(device);
        }
        command.args(["--", "-i", "--nb-cores=1", "--forward-mode=io", "--auto-start", "--no-lsc-interrupt"]);
        command.args([format!("--rxq={queues}"), format!("--txq={queues}")]);
        if wiring.longest > 1518 {
            command.arg(format!("--max-pkt-len={}", wiring.longest + 8)).arg("--mbuf-size=10240");
            // Its own reckoning, for small buffers, would not fit.
            command.arg("--total-num-mbufs=16384");
        }
        command.stdin(Stdio::piped());
        let mut process = Process::start(&mut command, &dir.path().join("log"), HINT)?;
        let mut input = process.input();
        if let Some(input) = &mut input {
            let _ = input.flush();
        }
        Ok(Self { input, process, dir, ports: wiring.ports })
    }
}

impl Switch for Testpmd {
    fn doors(&self) -> Vec<Door> {
        (0..self.ports).map(|port| Door::Connect(self.dir.path().join(format!("p{port}.sock")))).collect()
    }

    fn sample(&mut self) -> Result<Option<Sample>, SwitchError> {
        Ok(None)
    }

    fn last_words(&self) -> String {
        tail(&self.dir.path().join("log"))
    }

    fn pid(&self) -> Option<u32> {
        Some(self.process.id())
    }

    fn restart(&mut self) -> Result<Instant, SwitchError> {
        let said = "testpmd keeps nothing that it could be started again with".into();
        Err(SwitchError::Failed { program: "dpdk-testpmd".into(), said })
    }
}

/// Which version it is.
pub fn version() -> Result<String, SwitchError> {
    let said = run(Command::new("dpkg-query").args(["-W", "-f", "${Version}", "dpdk"]), "Debian")?;
    Ok(format!("DPDK {}", said.trim()))
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        if let Some(mut input) = self.input.take() {
            let _ = input.write_all(b"quit\n");
        }
    }
}
