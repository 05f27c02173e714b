//! A running guest: described by a [`Spec`], started as one QEMU process, talked to through its agent and QMP.
//!
//! The guest is a kernel and an initramfs, nothing else: no disk, no firmware, no display. It boots in about 2 s under
//! emulation. A guest kernel that panics ends QEMU, so a crash is a dead process to everything that waits.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use serde_json::Value;

use crate::Result;
use crate::agent::{Agent, Job, PORT_NAME};
use crate::child::Child;
use crate::kit::{Accel, Kit, QEMU};
use crate::nic::Nic;
use crate::qmp::Qmp;
use crate::traffic::Machine;
use crate::wait::{self, BOOT, STEP};

/// A guest to be.
#[derive(Clone, Debug)]
pub struct Spec {
    name: String,
    memory: u32,
    dimm_slots: Option<u8>,
    balloon: bool,
    cpus: u8,
    host_cpu: Option<usize>,
    nics: Vec<Nic>,
    address: Option<String>,
    accel: Option<Accel>,
    reboots: bool,
    incoming: bool,
}

/// A guest, until dropped.
#[derive(Debug)]
pub struct Guest {
    pub(crate) spec: Spec,
    pub(crate) dir: PathBuf,
    /// The QEMU that runs it now; another one after a migration.
    pub(crate) process: Mutex<Process>,
    pub(crate) agent: OnceLock<Agent>,
    /// Boots that [`Guest::ready`] has seen.
    boots: AtomicU64,
}

/// One QEMU process.
#[derive(Debug)]
pub(crate) struct Process {
    /// Names its sockets and logs: the guest's own name until the guest moves.
    name: String,
    dir: PathBuf,
    pub(crate) qemu: Child,
    qmp: Option<Qmp>,
}

impl Process {
    pub(crate) fn connect(&self, socket: &str) -> Result<UnixStream> {
        let path = self.dir.join(format!("{}.{socket}", self.name));
        wait::until(&format!("{}'s {socket} socket", self.name), STEP, || Ok(UnixStream::connect(&path).ok()))
    }

    /// The QMP connection, opened at the first use.
    pub(crate) fn qmp(&mut self) -> Result<&mut Qmp> {
        let qmp = match self.qmp.take() {
            Some(qmp) => qmp,
            None => Qmp::new(&self.name, self.connect("qmp")?)?,
        };
        Ok(self.qmp.insert(qmp))
    }
}

impl Spec {
    /// Guest memory in MiB (256).
    pub fn memory(mut self, mib: u32) -> Spec {
        self.memory = mib;
        self
    }

    /// Slots for memory that is plugged in later, up to 1 GiB in all.
    pub fn dimm_slots(mut self, slots: u8) -> Spec {
        self.dimm_slots = Some(slots);
        self
    }

    /// A memory balloon, for [`Guest::qmp`] `balloon`. The guest's driver is a module: `modprobe virtio_balloon`.
    pub fn balloon(mut self) -> Spec {
        self.balloon = true;
        self
    }

    /// Virtual CPUs (1).
    pub fn cpus(mut self, cpus: u8) -> Spec {
        self.cpus = cpus;
        self
    }

    /// Keeps all of QEMU's threads on one CPU of the host.
    pub fn host_cpu(mut self, cpu: usize) -> Spec {
        self.host_cpu = Some(cpu);
        self
    }

    /// Adds a NIC: `eth0`, `eth1`, ... in this order.
    pub fn nic(mut self, nic: Nic) -> Spec {
        self.nics.push(nic);
        self
    }

    /// The address of `eth0`, as in `10.9.0.1/24`; the interface is then brought up at each boot.
    pub fn address(mut self, address: &str) -> Spec {
        self.address = Some(address.to_owned());
        self
    }

    /// Insists on an accelerator instead of the best one that works.
    pub fn accel(mut self, accel: Accel) -> Spec {
        self.accel = Some(accel);
        self
    }

    /// Lets a reset restart the guest instead of ending QEMU.
    pub fn reboots(mut self) -> Spec {
        self.reboots = true;
        self
    }

    /// The same machine under another name, which waits for a guest's state, its NICs on these sockets.
    pub(crate) fn destination(&self, name: &str, sockets: &[PathBuf], change: impl Fn(Nic) -> Nic) -> Spec {
        let nics = (1..).zip(&self.nics).zip(sockets);
        let moved = |((at, nic), to): ((usize, &Nic), &PathBuf)| nic.moved(to, Nic::default_mac(&self.name, at));
        let nics = nics.map(moved).map(change).collect();
        Spec { name: name.to_owned(), nics, incoming: true, ..self.clone() }
    }

    /// Starts QEMU; sockets and logs go to `dir`. [`Guest::ready`] waits for the boot.
    pub fn start(self, kit: &Kit, dir: &Path) -> Result<Guest> {
        let process = Mutex::new(self.process(kit, dir)?);
        let (agent, boots) = (OnceLock::new(), AtomicU64::new(0));
        Ok(Guest { spec: self, dir: dir.to_owned(), process, agent, boots })
    }

    pub(crate) fn process(&self, kit: &Kit, dir: &Path) -> Result<Process> {
        for socket in ["qmp", "agent"] {
            // A QEMU of this name that was killed has left its sockets; a connection must not find those.
            let _ = fs::remove_file(dir.join(format!("{}.{socket}", self.name)));
        }
        let command = self.command(kit, dir);
        let qemu = Child::start(&self.name, &command, &dir.join(format!("{}.log", self.name)), Stdio::null())?;
        Ok(Process { name: self.name.clone(), dir: dir.to_owned(), qemu, qmp: None })
    }

    fn command(&self, kit: &Kit, dir: &Path) -> Vec<String> {
        let (name, memory, dir) = (&self.name, self.memory, dir.display());
        let (accel, cpu) = match self.accel.unwrap_or_else(|| kit.accel()) {
            Accel::Kvm => ("kvm", "host"),
            Accel::Tcg => ("tcg,thread=multi", "max"),
        };
        let dimms = self.dimm_slots.map_or(String::new(), |slots| format!(",slots={slots},maxmem=1G"));
        let on_cpu = self.host_cpu.map(|cpu| ["taskset".to_owned(), "-c".to_owned(), cpu.to_string()]);
        let mut line: Vec<String> = on_cpu.into_iter().flatten().chain([QEMU.to_owned()]).collect();
        let mut add = |option: &str, value: String| line.extend([option.to_owned(), value]);
        add("-name", name.clone());
        add("-machine", "q35,memory-backend=ram".to_owned());
        add("-accel", accel.to_owned());
        add("-cpu", cpu.to_owned());
        add("-smp", self.cpus.to_string());
        add("-m", format!("{memory}{dimms}"));
        // share=on: the switch maps the guest's memory.
        add("-object", format!("memory-backend-memfd,id=ram,size={memory}M,share=on"));
        add("-kernel", kit.kernel.display().to_string());
        add("-initrd", kit.initramfs.display().to_string());
        add("-append", kernel_arguments(self.reboots));
        add("-qmp", format!("unix:{dir}/{name}.qmp,server=on,wait=off"));
        add("-chardev", format!("file,id=console,path={dir}/{name}.console,append=on"));
        add("-chardev", format!("socket,id=agent,path={dir}/{name}.agent,server=on,wait=off"));
        add("-device", "virtio-serial-pci,max_ports=4".to_owned());
        add("-device", "virtconsole,chardev=console,nr=0".to_owned());
        add("-device", format!("virtserialport,chardev=agent,name={PORT_NAME},nr=1"));
        if self.balloon {
            add("-device", "virtio-balloon-pci".to_owned());
        }
        line.extend(["-nodefaults", "-display", "none"].map(str::to_owned));
        if !self.reboots {
            line.push("-no-reboot".to_owned());
        }
        if self.incoming {
            line.extend(["-incoming", "defer"].map(str::to_owned));
        }
        for (index, nic) in (1..).zip(&self.nics) {
            line.extend(nic.arguments(name, index));
        }
        line
    }
}

/// The guest kernel's command line. The clock parameters matter under emulation: without the TSC's real frequency,
/// calibration on a loaded host goes wrong and guests disagree about what a second is. init_on_alloc=0 saves the CPU a write
/// to each page of a receive buffer; that write would also hide from QEMU that the switch has to report its own.
pub(crate) fn kernel_arguments(reboots: bool) -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz = cpuinfo.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(": ").nth(1)?.trim().parse().ok());
    let tsc = mhz.map_or(String::new(), |mhz: f64| format!(" tsc_early_khz={}", (mhz * 1000.0) as u64));
    // panic=-1 is an immediate reboot, which -no-reboot turns into QEMU's end. With reboots allowed, a panic must stay.
    let panic = if reboots { 0 } else { -1 };
    format!(
        "console=hvc0 quiet loglevel=4 panic={panic} tsc=reliable{tsc} no_timer_check lpj=5192240 mitigations=off \
         random.trust_cpu=on nokaslr audit=0 apparmor=0 nowatchdog cryptomgr.notests init_on_alloc=0"
    )
}

impl Guest {
    /// Describes a guest. The name appears in errors, logs and its MAC addresses; unique within a scenario.
    pub fn named(name: &str) -> Spec {
        Spec {
            name: name.to_owned(),
            memory: 256,
            dimm_slots: None,
            balloon: false,
            cpus: 1,
            host_cpu: None,
            nics: Vec::new(),
            address: None,
            accel: None,
            reboots: false,
            incoming: false,
        }
    }

    /// Waits until the guest runs commands and has its address. After a reset: until it does so again.
    pub fn ready(&self) -> Result<()> {
        self.ready_within(BOOT)
    }

    /// As [`Guest::ready`], with a deadline for the boot.
    pub fn ready_within(&self, deadline: Duration) -> Result<()> {
        let agent = self.agent()?;
        let boots = self.boots.load(Ordering::Relaxed) + 1;
        agent.wait_boots(boots, deadline)?;
        self.boots.store(boots, Ordering::Relaxed);
        self.configure()
    }

    /// Resets the machine as its reset button would, and waits for the new boot (needs [`Spec::reboots`]).
    pub fn reset(&self) -> Result<()> {
        self.agent()?.forget_jobs();
        self.qmp("system_reset", serde_json::json!({}))?;
        self.ready()
    }

    /// Takes the driver off `eth0`'s device and gives it back, then sets the interface up again.
    pub fn rebind_driver(&self) -> Result<()> {
        let driver = "/sys/bus/virtio/drivers/virtio_net";
        let device = "device=$(basename $(readlink /sys/class/net/eth0/device))";
        self.sh(&format!("{device}; echo $device > {driver}/unbind && echo $device > {driver}/bind"))?;
        self.configure()
    }

    /// Whether the driver of `eth0` has negotiated a virtio feature, by its bit number.
    pub fn negotiated(&self, bit: usize) -> Result<bool> {
        let features = self.sh("cat /sys/class/net/eth0/device/features")?;
        Ok(features.as_bytes().get(bit) == Some(&b'1'))
    }

    /// Whether `eth0` sees a carrier.
    pub fn carrier(&self) -> Result<bool> {
        Ok(self.sh("cat /sys/class/net/eth0/carrier")?.trim() == "1")
    }

    fn configure(&self) -> Result<()> {
        match &self.spec.address {
            Some(address) => self.sh(&format!("ip link set eth0 up && ip addr add {address} dev eth0")).map(drop),
            None => Ok(()),
        }
    }

    /// The process id of the QEMU that runs it now.
    pub fn pid(&self) -> u32 {
        self.process().qemu.pid()
    }

    /// Kills QEMU (SIGKILL).
    pub fn kill(self) {
        drop(self);
    }

    /// Runs a QMP command.
    pub fn qmp(&self, command: &str, arguments: Value) -> Result<Value> {
        self.with_qmp(|qmp| qmp.execute(command, arguments))
    }

    /// Uses the QMP connection, opened at the first use.
    pub fn with_qmp<T>(&self, work: impl FnOnce(&mut Qmp) -> Result<T>) -> Result<T> {
        work(self.process().qmp()?)
    }

    pub(crate) fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(crate) fn agent(&self) -> Result<&Agent> {
        if let Some(agent) = self.agent.get() {
            return Ok(agent);
        }
        let agent = Agent::new(&self.spec.name, self.process().connect("agent")?)?;
        Ok(self.agent.get_or_init(|| agent))
    }

    /// Runs a script and waits up to `deadline` for its end.
    pub fn sh_within(&self, script: &str, deadline: Duration) -> Result<String> {
        self.start(script)?.output(deadline)
    }
}

impl Machine for Guest {
    fn name(&self) -> &str {
        &self.spec.name
    }

    fn address(&self) -> &str {
        let address = self.spec.address.as_deref().unwrap_or_default();
        address.split('/').next().unwrap_or_default()
    }

    fn scratch(&self) -> &Path {
        Path::new("/tmp")
    }

    fn start(&self, script: &str) -> Result<Job> {
        self.agent()?.start(script)
    }
}
