//! A libvirtd of a scenario's own, and the domains that it runs.
//!
//! The daemon has namespaces of its own for processes, mounts and host name: its domains end with it whatever happens to
//! the test, the machine's own libvirt is not touched, and two of them can migrate a domain to each other, as on two
//! hosts. `/etc/libvirt`, `/run`, `/var/lib/libvirt` and `/var/log/libvirt` are empty for it; only what it found out about
//! QEMU (8 s) is kept, in the kit. Every `virsh` runs under a deadline: some failures make it wait for ever.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::agent::{Agent, Job, PORT_NAME};
use crate::child::Child;
use crate::guest::kernel_arguments;
use crate::kit::{Accel, Kit};
use crate::traffic::Machine;
use crate::wait::{self, BOOT, STEP};
use crate::{Error, Netns, Result, Scenario};

/// A running libvirtd, until dropped.
#[derive(Debug)]
pub struct Libvirt {
    dir: PathBuf,
    uri: String,
    _daemon: Child,
}

/// No security driver, no cgroups, no other user: what is tested is the way from libvirt's XML to the switch.
const QEMU_CONF: &str = r#"security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
"#;

/// Runs as process 1 of the new namespaces; `$1` is the daemon's directory, `$2` the kit's cache, `$3` its host name.
const INSIDE: &str = "set -e; mkdir -p /var/lib/libvirt /var/log/libvirt /var/cache/libvirt; hostname \"$3\"
for dir in /etc/libvirt /run /var/lib/libvirt /var/log/libvirt; do mount -t tmpfs tmpfs $dir; done
mount --bind \"$2\" /var/cache/libvirt
cp \"$1/qemu.conf\" /etc/libvirt/
libvirtd --config \"$1/libvirtd.conf\" --pid-file \"$1/libvirtd.pid\" & wait";

impl Libvirt {
    /// Starts a daemon called `name` in `netns`, with a directory of that name for its socket and logs.
    pub fn start(s: &Scenario, netns: &Netns, name: &str) -> Result<Libvirt> {
        let (dir, cache) = (s.path(name), s.kit().dir.join("libvirt-cache"));
        for dir in [&dir, &cache] {
            fs::create_dir_all(dir).map_err(Error::io(format!("create {dir:?}")))?;
        }
        let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(Error::io("make a uuid"))?;
        let conf = format!(
            "unix_sock_dir = \"{}\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\nhost_uuid = \"{}\"\n\
             log_outputs = \"2:stderr\"\n",
            dir.display(),
            uuid.trim()
        );
        for (file, text) in [("libvirtd.conf", conf.as_str()), ("qemu.conf", QEMU_CONF)] {
            fs::write(dir.join(file), text).map_err(Error::io(format!("write {file}")))?;
        }
        let mut command = netns.enter();
        command.extend(
            ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child=KILL", "--mount-proc"].map(str::to_owned),
        );
        let arguments = [dir.as_path(), cache.as_path(), Path::new(name)].map(|path| path.display().to_string());
        command.extend(["sh", "-c", INSIDE, "sh"].map(str::to_owned));
        command.extend(arguments);
        let daemon = Child::start(name, &command, &s.path(&format!("{name}.log")), std::process::Stdio::null())?;
        let uri = format!("qemu+unix:///system?socket={}/libvirt-sock", dir.display());
        let libvirt = Libvirt { dir, uri, _daemon: daemon };
        wait::until_true(&format!("libvirtd {name}"), STEP, || Ok(libvirt.virsh(&["version"]).is_ok()))?;
        Ok(libvirt)
    }

    /// The URI by which others reach this daemon.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// What `virsh ARGUMENTS` prints.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let seconds = BOOT.as_secs().to_string();
        let mut command = Command::new("timeout");
        command.args(["--signal=KILL", &seconds, "virsh", "--quiet", "--connect", &self.uri]).args(arguments);
        let output = command.stdin(std::process::Stdio::null()).output().map_err(Error::io("run virsh"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        Err(Error::Script {
            machine: "host".into(),
            status: output.status.code().unwrap_or(-1),
            script: format!("virsh {}", arguments.join(" ")),
            output: text + &String::from_utf8_lossy(&output.stderr),
        })
    }

    /// Writes `xml` to a file of this daemon and gives its path.
    pub fn file(&self, name: &str, xml: &str) -> Result<String> {
        let path = self.dir.join(name);
        fs::write(&path, xml).map_err(Error::io(format!("write {path:?}")))?;
        Ok(path.display().to_string())
    }

    /// Starts a domain whose devices are these (`linecard libvirt xml` prints them), and waits until it runs commands.
    pub fn create(&self, kit: &Kit, name: &str, address: &str, port: &str) -> Result<Domain> {
        let agent = self.dir.join(format!("{name}.agent"));
        let xml = domain_xml(kit, name, port, &self.dir);
        self.virsh(&["create", &self.file(&format!("{name}.xml"), &xml)?])?;
        let agent = Agent::new(name, connect(&agent)?)?;
        agent.wait_boots(1, BOOT)?;
        let domain = Domain { name: name.to_owned(), address: address.to_owned(), agent };
        domain.sh(&format!("ip link set eth0 up && ip addr add {address} dev eth0"))?;
        Ok(domain)
    }

    /// Moves a running domain to `to`, where its NIC is on the socket `there` instead of `here`.
    pub fn migrate(&self, domain: &Domain, to: &Libvirt, here: &Path, there: &Path) -> Result<()> {
        let name = domain.name.as_str();
        let xml = self.virsh(&["dumpxml", "--migratable", name])?;
        let (own, other) = (self.dir.display().to_string(), to.dir.display().to_string());
        let xml = xml.replace(&here.display().to_string(), &there.display().to_string()).replace(&own, &other);
        let xml = self.file("migrate.xml", &xml)?;
        let state = "tcp://127.0.0.1";
        self.virsh(&["migrate", "--live", name, to.uri(), "--migrateuri", state, "--xml", &xml])?;
        domain.agent.follow(connect(&to.dir.join(format!("{name}.agent")))?)
    }
}

fn connect(agent: &Path) -> Result<UnixStream> {
    wait::until(&format!("{agent:?}"), STEP, || Ok(UnixStream::connect(agent).ok()))
}

/// A guest that libvirt runs.
#[derive(Debug)]
pub struct Domain {
    name: String,
    address: String,
    agent: Agent,
}

impl Machine for Domain {
    fn name(&self) -> &str {
        &self.name
    }

    fn address(&self) -> &str {
        self.address.split('/').next().unwrap_or_default()
    }

    fn scratch(&self) -> &Path {
        Path::new("/tmp")
    }

    fn start(&self, script: &str) -> Result<Job> {
        self.agent.start(script)
    }
}

impl Domain {
    /// Whether the guest has this interface.
    pub fn has_interface(&self, name: &str) -> Result<bool> {
        Ok(self
            .start(&format!("test -e /sys/class/net/{name} || echo no"))?
            .output(Duration::from_secs(60))?
            .is_empty())
    }
}

/// What `linecard libvirt xml` prints, taken apart: the memory element, then the interface.
fn split(port: &str) -> (&str, &str) {
    port.split_at(port.find("<interface").unwrap_or(0))
}

/// A domain with the same machine as [`crate::guest::Spec`]: kernel and initramfs, an agent port, free slots for NICs.
fn domain_xml(kit: &Kit, name: &str, port: &str, dir: &Path) -> String {
    let (memory, interface) = split(port);
    let (kernel, initramfs, arguments) = (kit.kernel.display(), kit.initramfs.display(), kernel_arguments(false));
    let (kind, cpu) = match kit.accel() {
        Accel::Kvm => ("kvm", "host-passthrough"),
        Accel::Tcg => ("qemu", "maximum"),
    };
    let dir = dir.display();
    let slots: String =
        (1..=5).map(|n| format!("<controller type='pci' index='{n}' model='pcie-root-port'/>\n    ")).collect();
    format!(
        "<domain type='{kind}'>
  <name>{name}</name>
  <memory unit='MiB'>256</memory>
  {memory}
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{arguments}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='{cpu}'/>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/{qemu}</emulator>
    {interface}
    <channel type='unix'>
      <source mode='bind' path='{dir}/{name}.agent'/>
      <target type='virtio' name='{PORT_NAME}'/>
    </channel>
    <console type='file'>
      <source path='{dir}/{name}.console'/>
      <target type='virtio'/>
    </console>
    <controller type='usb' model='none'/>
    <controller type='pci' index='0' model='pcie-root'/>
    {slots}<memballoon model='none'/>
  </devices>
</domain>
",
        qemu = crate::kit::QEMU,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ports_xml_is_taken_apart() {
        assert_eq!(split("<memoryBacking/>\n\n<interface a='1'/>\n"), ("<memoryBacking/>\n\n", "<interface a='1'/>\n"));
    }
}
