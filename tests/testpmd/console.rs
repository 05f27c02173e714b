//! A running testpmd with two virtio-user NICs, driven by its own command line.
//!
//! Its standard input is a pipe and its output a file, line by line (`stdbuf`), in which each finished command is
//! followed by one more prompt: that is how a command is known to be done. It polls, so one CPU is busy while it forwards.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::frontend::eventually;

const PROGRAM: &str = "dpdk-testpmd";
const PROMPT: &str = "testpmd> ";

/// How the two NICs are set up.
#[derive(Clone, Copy, Debug)]
pub struct Nics {
    pub mrg_rxbuf: [bool; 2],
    pub in_order: bool,
    pub vectorized: bool,
    pub packed: bool,
    pub queues: u16,
    pub queue_size: u16,
    /// testpmd listens and the daemon connects.
    pub server: bool,
}

impl Default for Nics {
    fn default() -> Self {
        Self {
            mrg_rxbuf: [true; 2],
            in_order: true,
            vectorized: false,
            packed: false,
            queues: 1,
            queue_size: 256,
            server: false,
        }
    }
}

impl Nics {
    /// DPDK's name of NIC `index` and its arguments.
    pub fn vdev(&self, index: usize, socket: &Path) -> String {
        let mut vdev = format!("net_virtio_user{index},mac=02:00:00:00:00:0{},path={}", index + 1, socket.display());
        let [mrg_rxbuf, in_order] = [self.mrg_rxbuf[index], self.in_order].map(u8::from);
        vdev += &format!(",queues={},queue_size={}", self.queues, self.queue_size);
        vdev += &format!(",mrg_rxbuf={mrg_rxbuf},in_order={in_order}");
        for (option, on) in [("vectorized", self.vectorized), ("packed_vq", self.packed)] {
            if on {
                vdev += &format!(",{option}=1");
            }
        }
        if self.server {
            vdev += ",server=1";
        }
        vdev
    }

    /// Enough for two NICs whose receive rings are full and whose transmit rings hold frames of five mbufs.
    fn mbufs(&self) -> usize {
        4096 + 12 * usize::from(self.queues) * usize::from(self.queue_size)
    }
}

/// What a NIC of testpmd has counted since it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicStats {
    pub received: u64,
    pub sent: u64,
}

/// The process; killed, and its log printed if the test failed, when this goes.
pub struct Testpmd {
    child: Child,
    log: PathBuf,
    /// Where DPDK keeps files of this process, which stay behind when it is killed.
    runtime_dir: PathBuf,
    prompts: usize,
}

impl Testpmd {
    /// Starts testpmd with its NICs at `sockets` and waits for its prompt: both ports are started, nothing is sent.
    #[track_caller]
    pub fn start(dir: &Path, sockets: &[PathBuf; 2], nics: &Nics) -> Self {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).any(|dir| dir.join(PROGRAM).exists());
        assert!(found, "there is no {PROGRAM} on this machine: run `qemu-tests/setup.sh all`");
        let prefix = format!("linecard-{}-{}", std::process::id(), STARTED.fetch_add(1, Ordering::Relaxed));
        if nics.server {
            // One that was killed has left its sockets, and DPDK does not bind over them.
            sockets.iter().for_each(|socket| drop(fs::remove_file(socket)));
        }
        let log = dir.join(format!("{prefix}.log"));
        let output = File::create(&log).expect("a log file");
        let child = command(&prefix, sockets, nics)
            .stdin(Stdio::piped())
            .stdout(output.try_clone().expect("a second handle"))
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("stdbuf {PROGRAM}: {error}"));
        let mut testpmd = Self { child, log, runtime_dir: runtime_root().join(prefix), prompts: 1 };
        testpmd.wait_for_prompt("its start");
        testpmd
    }

    /// Types `line` and waits until it is done; what it printed.
    #[track_caller]
    pub fn say(&mut self, line: &str) -> String {
        let before = self.log().len();
        let mut console = self.child.stdin.as_ref().expect("a pipe");
        writeln!(console, "{line}").unwrap_or_else(|error| panic!("testpmd does not listen to {line}: {error}"));
        self.prompts += 1;
        self.wait_for_prompt(line);
        self.log().split_off(before)
    }

    #[track_caller]
    fn wait_for_prompt(&mut self, what: &str) {
        eventually(&format!("testpmd is done with {what}"), || {
            if let Some(status) = self.child.try_wait().expect("a child to wait for") {
                panic!("testpmd ended at {what}: {status}");
            }
            (self.log().matches(PROMPT).count() >= self.prompts).then_some(())
        });
    }

    /// The counters of both NICs.
    #[track_caller]
    pub fn stats(&mut self) -> [NicStats; 2] {
        let text = self.say("show port stats all");
        let numbers = |name: &str| -> Vec<u64> {
            let values = text.split(name).skip(1);
            values.filter_map(|rest| rest.split_whitespace().next()?.parse().ok()).collect()
        };
        let (received, sent) = (numbers("RX-packets:"), numbers("TX-packets:"));
        assert!(received.len() == 2 && sent.len() == 2, "statistics of two ports in {text}");
        [0, 1].map(|port| NicStats { received: received[port], sent: sent[port] })
    }

    /// Everything that it has printed.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).expect("a log file")).into_owned()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.runtime_dir);
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("testpmd's last words:\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
    }
}

/// `rte_eal_get_runtime_dir()`, less the prefix.
fn runtime_root() -> PathBuf {
    let own =
        (!rustix::process::getuid().is_root()).then(|| std::env::var_os("XDG_RUNTIME_DIR").unwrap_or("/tmp".into()));
    PathBuf::from(own.unwrap_or("/var/run".into())).join("dpdk")
}

/// Ordinary memory, no PCI, no shared files; `mac` forwarding, so that a frame goes back and forth for ever.
fn command(prefix: &str, sockets: &[PathBuf; 2], nics: &Nics) -> Command {
    let mut command = Command::new("stdbuf");
    command.args(["-oL", PROGRAM, "-l", "0-1", "--no-huge", "-m", "256", "--no-pci", "--no-shconf", "--no-telemetry"]);
    command.args(["--file-prefix", prefix, "--log-level", "pmd.net.virtio.init:info"]);
    for (index, socket) in sockets.iter().enumerate() {
        command.args(["--vdev", &nics.vdev(index, socket)]);
    }
    command.args("-- -i --nb-cores=1 --forward-mode=mac --no-mlockall --no-flush-rx --txonly-multi-flow".split(' '));
    command.args(["--eth-peer=0,02:00:00:00:00:02", "--eth-peer=1,02:00:00:00:00:01"]);
    command.args(["rxq", "txq"].map(|name| format!("--{name}={}", nics.queues)));
    command.args(["rxd", "txd"].map(|name| format!("--{name}={}", nics.queue_size)));
    command.arg(format!("--total-num-mbufs={}", nics.mbufs()));
    command
}
