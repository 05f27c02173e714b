//! DPDK's testpmd with its vhost-user back end: forwards all frames between pairs of sockets, with no switch at all.
//! The harness proves itself on it, and a test that fails on Linecard can be asked whether it passes here.
//! It polls: one of the machine's CPUs is busy for as long as it runs.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::child::Child;
use crate::nic::Mode;
use crate::wait::{self, STEP};
use crate::{Error, Result};

/// A running testpmd that connects socket 0 with 1, 2 with 3, and so on.
#[derive(Debug)]
pub struct Testpmd {
    _child: Child,
}

impl Testpmd {
    /// Starts forwarding between `sockets`, each with `queues` queue pairs; the log goes to `dir`.
    pub fn start(dir: &Path, sockets: &[PathBuf], mode: Mode, queues: u16) -> Result<Testpmd> {
        let client = if mode == Mode::Client { ",client=1" } else { "" };
        let mut line = "dpdk-testpmd -l 0-1 --no-pci --no-huge -m 256".to_owned();
        line += &format!(" --file-prefix linecard-{}", std::process::id());
        for (index, socket) in sockets.iter().enumerate() {
            line += &format!(" --vdev net_vhost{index},iface={},queues={queues}{client}", socket.display());
        }
        line += " -- -i --no-mlockall --forward-mode=io --nb-cores=1 --total-num-mbufs=8192 --no-lsc-interrupt";
        line += &format!(" --rxq={queues} --txq={queues}");
        let command: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let mut child = Child::start("testpmd", &command, &dir.join("testpmd.log"), Stdio::piped())?;
        let console = child.stdin().ok_or_else(|| Error::Unexpected("testpmd has no input".into()))?;
        console.write_all(b"start\n").map_err(Error::io("write to testpmd"))?;
        if mode == Mode::Server {
            wait::until_true("testpmd's sockets", STEP, || Ok(sockets.iter().all(|socket| socket.exists())))?;
        }
        Ok(Testpmd { _child: child })
    }
}
