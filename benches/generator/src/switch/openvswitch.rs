//! Open vSwitch with DPDK: a database and a daemon of its own, a netdev bridge that learns (NORMAL), one poll-mode thread
//! per CPU, and `dpdkvhostuserclient` ports, so the generator listens. It has a network namespace of its own, which sockets
//! with a path do not mind, so another Open vSwitch on the machine does not either.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::process::{Process, run};
use super::{Sample, Switch, SwitchError, Wiring, mask, tail};
use crate::nic::Door;

const HINT: &str = "Debian package openvswitch-switch-dpdk: qemu-tests/setup.sh all";
/// The plain `ovs-vswitchd` of Debian's package has no DPDK in it.
const DAEMON: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const PATIENCE: Duration = Duration::from_secs(20);

/// A running Open vSwitch.
#[derive(Debug)]
pub struct OpenVswitch {
    // In this order: the daemon goes before its database, both before their files.
    daemon: Option<Process>,
    database: Process,
    dir: TempDir,
    ports: usize,
}

impl OpenVswitch {
    /// Huge pages of 2 MiB that its DPDK takes: a pool of 262144 buffers for the usual MTU, which it does not make smaller
    /// when it finds less.
    pub const PAGES: usize = 448;
    /// Of those, MiB that it takes when it starts.
    const MEMORY: usize = 512;

    /// Starts it.
    pub fn start(wiring: &Wiring) -> Result<Self, SwitchError> {
        let dir = TempDir::with_prefix("ovs-bench-")
            .map_err(|source| SwitchError::File { path: std::env::temp_dir(), source })?;
        let path = dir.path();
        run(in_dir("ovsdb-tool", path).arg("create").arg(path.join("conf.db")).arg(SCHEMA), HINT)?;
        let mut server = in_dir("ovsdb-server", path);
        server.arg(format!("--remote=punix:{}/db.sock", path.display())).arg(path.join("conf.db"));
        server.arg(format!("--unixctl={}/db.ctl", path.display()));
        let database = Process::start(&mut server, &path.join("ovsdb.log"), HINT)?;
        let mut switch = Self { daemon: None, database, dir, ports: wiring.ports };
        switch.configure(wiring)?;
        switch.start_daemon()?;
        switch.add_ports(wiring)?;
        Ok(switch)
    }

    fn configure(&mut self, wiring: &Wiring) -> Result<(), SwitchError> {
        let end = Instant::now() + PATIENCE;
        while !self.dir.path().join("db.sock").exists() && Instant::now() < end && !self.database.has_ended() {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.vsctl(&["--no-wait", "init"])?;
        let mask = mask(&wiring.cpus);
        let settings = [
            "dpdk-init=true".into(),
            format!("dpdk-socket-mem={}", Self::MEMORY),
            format!("pmd-cpu-mask={mask}"),
            format!("dpdk-lcore-mask={mask}"),
            // Its own mount of huge pages is not needed, and no device of the machine is touched.
            "dpdk-extra=\"--in-memory --no-pci\"".into(),
            format!("userspace-tso-enable={}", wiring.offloads),
        ];
        let mut args = vec!["--no-wait".to_owned(), "set".into(), "Open_vSwitch".into(), ".".into()];
        args.extend(settings.map(|setting: String| format!("other_config:{setting}")));
        self.vsctl(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn start_daemon(&mut self) -> Result<(), SwitchError> {
        let path = self.dir.path();
        // Its bridge makes TAP interfaces of fixed names, over which two of these would fall out: a network of its own.
        // `unshare` becomes the daemon, so the process is the daemon's.
        let mut command = in_dir("unshare", path);
        command.args(["--net", "--", DAEMON]);
        command.arg(format!("--unixctl={}/ctl", path.display()));
        command.arg(format!("--pidfile={}/vswitchd.pid", path.display()));
        command.arg(format!("unix:{}/db.sock", path.display()));
        self.daemon = Some(Process::start(&mut command, &path.join("vswitchd.log"), HINT)?);
        Ok(())
    }

    fn add_ports(&mut self, wiring: &Wiring) -> Result<(), SwitchError> {
        let mut args: Vec<String> =
            ["add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev"].map(Into::into).into();
        let table = (wiring.stations.unwrap_or(1) as usize * wiring.ports).clamp(8192, 1 << 20);
        args.push(format!("other_config:mac-table-size={table}"));
        for port in 0..wiring.ports {
            let socket = self.dir.path().join(format!("p{port}.sock"));
            args.extend(["--", "add-port", "br0"].map(Into::into));
            args.extend([format!("p{port}"), "--".into(), "set".into(), "Interface".into(), format!("p{port}")]);
            args.push("type=dpdkvhostuserclient".into());
            args.push(format!("options:vhost-server-path={}", socket.display()));
            // DPDK's own limit is the MTU, without the Ethernet header.
            if wiring.longest > 1518 {
                args.push(format!("mtu_request={}", wiring.longest - 14));
            }
        }
        self.vsctl(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn vsctl(&self, args: &[&str]) -> Result<(), SwitchError> {
        let db = format!("--db=unix:{}/db.sock", self.dir.path().display());
        run(in_dir("ovs-vsctl", self.dir.path()).args([&db, "--timeout=60"]).args(args), HINT).map(drop)
    }

    /// What a control command of the daemon answers.
    fn appctl(&self, command: &str) -> Result<String, SwitchError> {
        let target = self.dir.path().join("ctl");
        run(in_dir("ovs-appctl", self.dir.path()).arg("-t").arg(target).arg(command), HINT)
    }
}

impl Switch for OpenVswitch {
    fn doors(&self) -> Vec<Door> {
        (0..self.ports).map(|port| Door::Listen(self.dir.path().join(format!("p{port}.sock")))).collect()
    }

    fn sample(&mut self) -> Result<Option<Sample>, SwitchError> {
        let said = self.appctl("dpif-netdev/pmd-stats-show")?;
        let Some(sample) = pmd_stats(&said) else {
            return Err(SwitchError::Silent { program: "ovs-appctl", what: "its PMD statistics", said });
        };
        Ok(Some(sample))
    }

    fn last_words(&self) -> String {
        tail(&self.dir.path().join("vswitchd.log"))
    }

    fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Process::id)
    }

    fn restart(&mut self) -> Result<Instant, SwitchError> {
        if let Some(daemon) = self.daemon.take() {
            daemon.kill();
        }
        let start = Instant::now();
        self.start_daemon()?;
        Ok(start)
    }
}

/// Which version it is.
pub fn version() -> Result<String, SwitchError> {
    let said = run(Command::new(DAEMON).arg("--version"), HINT)?;
    Ok(said.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(", "))
}

/// Sums what poll-mode threads report; the main thread's paragraph forwards nothing that counts here.
fn pmd_stats(said: &str) -> Option<Sample> {
    let mut sample = Sample::default();
    let (mut pmd, mut any) = (false, false);
    for line in said.lines() {
        if !line.starts_with(' ') {
            pmd = line.starts_with("pmd thread");
            any |= pmd;
        }
        let Some((key, value)) = line.trim().split_once(": ").filter(|_| pmd) else { continue };
        let number = value.split(' ').next().and_then(|number| number.parse::<u64>().ok());
        match (key, number) {
            ("packets received", Some(frames)) => sample.frames += frames,
            ("processing cycles", Some(busy)) => {
                sample.busy += busy;
                sample.cycles += busy;
            }
            ("idle cycles", Some(idle)) => sample.cycles += idle,
            _ => {}
        }
    }
    any.then_some(sample)
}

fn in_dir(program: &str, dir: &Path) -> Command {
    let mut command = Command::new(program);
    for name in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR"] {
        command.env(name, dir);
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poll_mode_threads_are_summed() {
        let said = "pmd thread numa_id 0 core_id 0:\n  packets received: 100\n  idle cycles: 30 (75.00%)\n  \
                    processing cycles: 10 (25.00%)\npmd thread numa_id 0 core_id 1:\n  packets received: 1\n  \
                    idle cycles: 5 (50.00%)\n  processing cycles: 5 (50.00%)\nmain thread:\n  packets received: 7\n";
        let sample = pmd_stats(said).expect("statistics");
        assert_eq!((sample.frames, sample.busy, sample.cycles), (101, 15, 50));
        assert!(pmd_stats("main thread:\n  packets received: 7\n").is_none());
    }
}
