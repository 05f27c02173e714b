//! The `linecardd` under test: a directory of its own, its configuration, its process, and its API by way of the
//! `linecard` command.

use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::child;
use super::footprint::Footprint;
use super::{DEADLINE, eventually};

/// A running daemon; it is killed, and its log printed if the test failed, when this goes.
pub struct Daemon {
    dir: TempDir,
    child: Child,
}

impl Daemon {
    /// Starts a daemon with `ports` on network `lan` and a pair `well-1`, `well-2` on another, for the [`witness`].
    ///
    /// [`witness`]: super::witness
    #[track_caller]
    pub fn with_ports(ports: &[&str]) -> Self {
        Self::start(|dir| {
            let mut yaml = preamble(dir) + "networks: { lan: {}, well: {} }\nports:\n";
            for name in ports {
                yaml += &port(dir, name, "lan");
            }
            yaml + &port(dir, "well-1", "well") + &port(dir, "well-2", "well")
        })
    }

    /// Starts a daemon with the configuration that `yaml` writes for its directory, and waits for its API.
    #[track_caller]
    pub fn start(yaml: impl FnOnce(&Path) -> String) -> Self {
        let dir = TempDir::with_prefix("linecard-").expect("a temporary directory");
        fs::create_dir(dir.path().join("state")).expect("a state directory");
        let text = yaml(dir.path());
        fs::write(dir.path().join("linecard.yaml"), text).expect("a configuration file");
        let child = launch(dir.path());
        let mut daemon = Self { dir, child };
        daemon.wait_for_api();
        daemon
    }

    fn wait_for_api(&mut self) {
        eventually("the daemon's API answers", || {
            if let Some(status) = self.child.try_wait().expect("a child to wait for") {
                panic!("linecardd ended at its start: {status}");
            }
            self.linecard(&["status"]).ok()
        });
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The vhost-user socket of a port.
    pub fn socket(&self, port: &str) -> PathBuf {
        self.dir.path().join(format!("{port}.sock"))
    }

    /// Runs `linecard --api SOCK -o json ARGS`; its output, or what it said on stderr.
    pub fn linecard(&self, args: &[&str]) -> Result<Value, String> {
        let output = self.run(args);
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        serde_json::from_slice(&output.stdout)
            .map_err(|error| format!("{error} in {}", String::from_utf8_lossy(&output.stdout)))
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_linecard"));
        child::output(command.arg("--api").arg(self.dir.path().join("api.sock")).args(["-o", "json"]).args(args))
    }

    /// The records of `linecard events` that are of one kind.
    pub fn events(&self, kind: &str) -> Vec<Value> {
        let output = self.run(&["events"]);
        let text = String::from_utf8_lossy(&output.stdout);
        let records = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a record"));
        records.filter(|record| record["event"] == kind).collect()
    }

    /// `linecard port show NAME`.
    #[track_caller]
    pub fn port(&self, name: &str) -> PortView {
        PortView(self.linecard(&["port", "show", name]).unwrap_or_else(|error| panic!("port show {name}: {error}")))
    }

    /// Waits until port `name` satisfies `wish`.
    #[track_caller]
    pub fn port_when(&self, name: &str, what: &str, wish: impl Fn(&PortView) -> bool) -> PortView {
        let mut last = None;
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually(what, || {
                let port = self.port(name);
                let fits = wish(&port);
                last = Some(port.0.clone());
                fits.then_some(port)
            })
        }));
        found.unwrap_or_else(|_| panic!("port {name} never got there ({what}): {last:?}"))
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child to wait for").is_none()
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32).expect("a pid above zero")
    }

    /// The process that looks at descriptors for it.
    #[track_caller]
    pub fn relay(&self) -> Pid {
        eventually("the daemon has a relay", || {
            self.children().into_iter().find(|child| {
                let stat = fs::read_to_string(format!("/proc/{}/stat", child.as_raw_nonzero())).unwrap_or_default();
                // Behind the name in parentheses is the state (proc_pid_stat(5)).
                stat.contains("(linecard-relay)") && !stat.contains(") Z")
            })
        })
    }

    /// Its child processes, ended ones too. No other process is looked at: what /proc tells of one may have to wait for it.
    pub fn children(&self) -> Vec<Pid> {
        let of = |task: fs::DirEntry| fs::read_to_string(task.path().join("children")).unwrap_or_default();
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("procfs");
        let lists: String = tasks.flatten().map(of).collect();
        lists.split_whitespace().filter_map(|number| Pid::from_raw(number.parse().ok()?)).collect()
    }

    /// SIGTERM, and its exit status.
    pub fn terminate(&mut self) -> ExitStatus {
        kill_process(self.pid(), Signal::TERM).expect("a running daemon");
        eventually("linecardd ends on SIGTERM", || self.child.try_wait().expect("a child to wait for"))
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().expect("a running daemon");
        self.child.wait().expect("its status");
    }

    /// Starts it again, over the same files, after [`Daemon::terminate`] or [`Daemon::kill`].
    #[track_caller]
    pub fn restart(&mut self) {
        self.child = launch(self.dir.path());
        self.wait_for_api();
    }

    /// A service manager that hears of the daemon from its next [start](Daemon::restart) on.
    pub fn manager(&self) -> Manager {
        let manager = UnixDatagram::bind(self.dir.path().join(MANAGER)).expect("a free name");
        manager.set_read_timeout(Some(DEADLINE)).expect("a timeout above zero");
        Manager(manager)
    }

    pub fn footprint(&self) -> Footprint {
        Footprint::of(self.pid())
    }

    /// The footprint once it no longer changes: what is being taken down is down.
    pub fn footprint_at_rest(&self) -> Footprint {
        const STEADY: usize = 10;
        let (mut last, mut same) = (self.footprint(), 0);
        eventually("the daemon comes to rest", || {
            std::thread::sleep(Duration::from_millis(20));
            let before = std::mem::replace(&mut last, self.footprint());
            same = if last.is_steady(&before) { same + 1 } else { 0 };
            (same == STEADY).then(|| last.clone())
        })
    }

    /// Waits until nothing is left that was not there `before`; what there is then.
    #[track_caller]
    pub fn expect_given_back(&self, before: &Footprint, what: &str) -> Footprint {
        let mut left = Vec::new();
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually(what, || {
                let now = self.footprint();
                left = now.beyond(before);
                left.is_empty().then_some(now)
            })
        }));
        found.unwrap_or_else(|_| panic!("{what}: still there: {}", left.join("; ")))
    }

    /// Processor time that it has used so far, all threads, to the nanosecond (proc_pid_schedstat, first field).
    pub fn processor_time(&self) -> Duration {
        Self::processor_time_of(self.pid())
    }

    /// The same of any process.
    pub fn processor_time_of(process: Pid) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero())).expect("procfs");
        let of = |task: fs::DirEntry| {
            let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            text.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or(0)
        };
        Duration::from_nanos(tasks.flatten().map(of).sum())
    }

    /// How often threads of a process have begun to wait so far, as whoever is woken does again (proc_pid_status).
    pub fn waits_of(process: Pid) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero())).expect("procfs");
        let of = |task: fs::DirEntry| {
            let text = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            let count = text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            count.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        tasks.flatten().map(of).sum()
    }

    /// What the daemon has logged so far.
    pub fn log(&self) -> String {
        await_written(self.child.id());
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

/// Returns when the thread of process `pid` that writes the log sleeps, as it does when it has written all; or is gone.
fn await_written(pid: u32) {
    eventually("the log is written", || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let mut stats = tasks.map(|task| fs::read_to_string(task.path().join("stat")).unwrap_or_default());
        let writes = stats.any(|stat| stat.contains(" (log) ") && !stat.contains(" (log) S"));
        (!writes).then_some(())
    });
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let status = self.child.wait();
        if std::thread::panicking() {
            eprintln!("linecardd ended with {status:?}; its log:\n{}", self.log());
        }
    }
}

/// Where a service manager listens, below the daemon's directory.
const MANAGER: &str = "manager.sock";

/// A service manager that ends whoever is silent for a while (sd_watchdog_enabled(3)), or would.
pub struct Manager(UnixDatagram);

impl Manager {
    /// Returns when it was told twice more that the daemon is alive.
    #[track_caller]
    pub fn hears_on(&self) {
        let mut message = [0; 1000];
        self.0.set_nonblocking(true).expect("a socket");
        while self.0.recv(&mut message).is_ok() {}
        self.0.set_nonblocking(false).expect("a socket");
        let mut heard = 0;
        while heard < 2 {
            let length = self.0.recv(&mut message).expect("the watchdog is not fed");
            let text = String::from_utf8_lossy(&message[..length]);
            heard += text.lines().filter(|line| *line == "WATCHDOG=1").count();
        }
    }
}

fn launch(dir: &Path) -> Child {
    let log = File::options().create(true).append(true).open(dir.join("log")).expect("a log file");
    let mut command = Command::new(env!("CARGO_BIN_EXE_linecardd"));
    if dir.join(MANAGER).exists() {
        command.env("NOTIFY_SOCKET", dir.join(MANAGER)).env("WATCHDOG_USEC", "30000000");
    }
    command.arg("--config").arg(dir.join("linecard.yaml")).stdin(Stdio::null());
    child::spawn(command.stdout(log.try_clone().expect("a second handle")).stderr(log))
}

/// The CPUs that this process, and so the daemon, may use.
pub fn allowed_cpus() -> Vec<usize> {
    let set = rustix::thread::sched_getaffinity(None).expect("sched_getaffinity");
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
}

/// The first two of them: a shard's, and another.
///
/// # Panics
/// There is one only: what a test is about would go untested.
#[track_caller]
pub fn two_cpus() -> [usize; 2] {
    let cpus = allowed_cpus();
    let first = cpus.first_chunk().copied();
    first.unwrap_or_else(|| panic!("this test needs two CPUs, and its process may use {cpus:?} only: give it another"))
}

/// The head of a configuration: one shard on the first CPU there is, everything below `dir`.
pub fn preamble(dir: &Path) -> String {
    preamble_with(dir, "")
}

/// The same with `more` keys of `shards:` (", key: value").
pub fn preamble_with(dir: &Path, more: &str) -> String {
    let dir = dir.display();
    let cpu = allowed_cpus()[0];
    format!(
        "version: 1\n\
         daemon: {{ api: {dir}/api.sock, state-dir: {dir}/state }}\n\
         shards: {{ cpus: \"{cpu}\", idle: adaptive{more} }}\n"
    )
}

/// A line for a vhost-user port with four queue pairs that waits for its VMM.
pub fn port(dir: &Path, name: &str, network: &str) -> String {
    port_with(dir, name, network, "server", "")
}

/// A line for a vhost-user port whose socket is in `mode`, with `more` keys (", key: value").
pub fn port_with(dir: &Path, name: &str, network: &str, mode: &str, more: &str) -> String {
    let socket = dir.join(format!("{name}.sock"));
    let socket = socket.display();
    format!("  {name}: {{ vhost-user: {{ socket: {socket}, mode: {mode}, queues: 4 }}, network: {network}{more} }}\n")
}

/// A port as the API shows it.
#[derive(Clone, Debug)]
pub struct PortView(pub Value);

impl PortView {
    pub fn state(&self) -> &str {
        self.0["state"].as_str().unwrap_or_else(|| panic!("a state in {}", self.0))
    }

    pub fn reason(&self) -> Option<&str> {
        self.0["reason"].as_str()
    }

    #[track_caller]
    pub fn counter(&self, name: &str) -> u64 {
        self.0["counters"][name].as_u64().unwrap_or_else(|| panic!("counter {name} in {}", self.0))
    }

    /// Drops for `reason`; zero if it is not listed.
    pub fn drops(&self, reason: &str) -> u64 {
        self.0["counters"]["drops"][reason].as_u64().unwrap_or(0)
    }

    /// Drops for any reason.
    pub fn all_drops(&self) -> u64 {
        let drops = self.0["counters"]["drops"].as_object();
        drops.map(|drops| drops.values().filter_map(Value::as_u64).sum()).unwrap_or(0)
    }

    /// Whether every frame received has had its end, and each drop its reason.
    pub fn is_conserved(&self) -> bool {
        let [received, delivered, dropped] = ["rx_frames", "rx_delivered", "rx_dropped"].map(|name| self.counter(name));
        received == delivered + dropped && dropped == self.all_drops()
    }
}
