//! What to paste into a VM's definition: QEMU options and libvirt elements for one port.
//!
//! Both sides must agree on three things, and most broken set-ups differ in one of them: who makes the socket, that the
//! VM's memory is shared, and how many queues there are. All three follow from the port here.

use std::fs;

use serde_json::Value;

use crate::control::report::PortReport;

/// A vNIC as its VM has to know it.
pub(super) struct VmSide {
    name: String,
    socket: String,
    /// The VM makes the socket.
    vm_listens: bool,
    queues: u64,
    mac: Option<String>,
    mtu: Option<u16>,
}

impl VmSide {
    /// The VM's side of `port`; `None` if there is no VM behind it.
    pub(super) fn of(port: &PortReport) -> Option<Self> {
        let text = |key: &str| port.config.get(key).and_then(Value::as_str);
        Some(Self {
            name: port.name.clone(),
            socket: text("socket")?.into(),
            vm_listens: text("mode") == Some("client"),
            queues: port.config.get("queues").and_then(Value::as_u64).unwrap_or(1),
            mac: port.mac.clone(),
            mtu: port.mtu,
        })
    }

    /// Options for QEMU 9.2 or newer, one on each line. `memory` is the size of the VM's memory.
    pub(super) fn qemu(&self, memory: &str) -> String {
        let name = &self.name;
        // A comma ends an option's value; doubled it stands for itself (QEMU: "Device url syntax", qemu-option.c).
        let socket = self.socket.replace(',', ",,");
        let who = if self.vm_listens { "server=on" } else { "reconnect-ms=1000" };
        let mut netdev = format!("vhost-user,id=net-{name},chardev=char-{name}");
        let mut device = format!("virtio-net-pci,netdev=net-{name}");
        let mac = self.mac.clone().unwrap_or_else(|| {
            // Which host it is (machine-id(5)); ports of other hosts may have the same name.
            made_up(&fs::read_to_string("/etc/machine-id").unwrap_or_default(), name)
        });
        device += &format!(",mac={mac}");
        if self.queues > 1 {
            netdev += &format!(",queues={}", self.queues);
            // One vector for each ring, one for configuration changes and one for the control queue.
            device += &format!(",mq=on,vectors={}", 2 * self.queues + 2);
        }
        if let Some(mtu) = self.mtu {
            device += &format!(",host_mtu={mtu}");
        }
        let options = [
            format!("-m {memory}"),
            format!("-object memory-backend-memfd,id=mem0,size={memory},share=on"),
            "-machine memory-backend=mem0".into(),
            format!("-chardev socket,id=char-{name},path={socket},{who}"),
            format!("-netdev {netdev}"),
            format!("-device {device}"),
        ];
        options.join(" \\\n") + "\n"
    }

    /// Elements for a libvirt domain: the first goes below `<domain>`, the second below `<devices>`.
    pub(super) fn libvirt(&self) -> String {
        let socket = escaped(&self.socket);
        let mut xml = String::from(MEMORY_BACKING);
        xml += "\n<interface type='vhostuser'>\n";
        if let Some(mac) = &self.mac {
            xml += &format!("  <mac address='{mac}'/>\n");
        }
        // libvirt's mode is the VM's side.
        xml += &match self.vm_listens {
            true => format!("  <source type='unix' path='{socket}' mode='server'/>\n"),
            false => format!(
                "  <source type='unix' path='{socket}' mode='client'>\n    <reconnect enabled='yes' timeout='1'/>\n  </source>\n"
            ),
        };
        xml += "  <model type='virtio'/>\n";
        if self.queues > 1 {
            xml += &format!("  <driver queues='{}'/>\n", self.queues);
        }
        xml += "</interface>\n";
        if let Some(mtu) = self.mtu {
            xml += &mtu_override(mtu);
        }
        xml
    }
}

const MEMORY_BACKING: &str = "\
<memoryBacking>
  <source type='memfd'/>
  <access mode='shared'/>
</memoryBacking>
";

/// `<mtu>` in a vhostuser interface has libvirt (11.3, qemu_command.c) set the MTU of a host interface that there is not,
/// so the guest is told with an override instead.
fn mtu_override(mtu: u16) -> String {
    format!(
        "
<!-- For MTU {mtu}, below <domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>, with the alias that the
     interface has in `virsh dumpxml`: -->
<qemu:override>
  <qemu:device alias='net0'>
    <qemu:frontend>
      <qemu:property name='host_mtu' type='unsigned' value='{mtu}'/>
    </qemu:frontend>
  </qemu:device>
</qemu:override>
"
    )
}

/// An address for the guest of a port that names none, the same each time. QEMU by itself gives 52:54:00:12:34:56 to the first
/// interface of every VM, and two VMs with one address do not reach each other; libvirt makes addresses up itself.
fn made_up(host: &str, port: &str) -> String {
    // FNV-1a (RFC 9923), of 64 bits.
    let bytes = host.trim().bytes().chain([0]).chain(port.bytes());
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let [.., a, b, c] = (hash ^ hash >> 24 ^ hash >> 48).to_be_bytes();
    // The range that QEMU and libvirt use: locally administered, no group.
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn side(vm_listens: bool, queues: u64, mtu: Option<u16>) -> VmSide {
        let (socket, mac) = ("/run/linecard/a,b&c.sock".into(), Some("52:54:00:12:34:56".into()));
        VmSide { name: "vm1-eth0".into(), socket, vm_listens, queues, mac, mtu }
    }

    #[test]
    fn qemu_connects_shares_its_memory_and_has_a_vector_per_ring() {
        let expected = "\
-m 2G \\
-object memory-backend-memfd,id=mem0,size=2G,share=on \\
-machine memory-backend=mem0 \\
-chardev socket,id=char-vm1-eth0,path=/run/linecard/a,,b&c.sock,reconnect-ms=1000 \\
-netdev vhost-user,id=net-vm1-eth0,chardev=char-vm1-eth0,queues=4 \\
-device virtio-net-pci,netdev=net-vm1-eth0,mac=52:54:00:12:34:56,mq=on,vectors=10,host_mtu=9000
";
        assert_eq!(side(false, 4, Some(9000)).qemu("2G"), expected);
    }

    #[test]
    fn a_guest_without_an_address_gets_one_of_its_own_each_time() {
        let device = |name: &str| {
            let side = VmSide { name: name.into(), mac: None, ..side(false, 1, None) };
            side.qemu("1G").rsplit_once(",mac=").unwrap().1.to_owned()
        };
        assert_eq!(device("vm1-eth0"), device("vm1-eth0"));
        let hosts = ["", "b5bb9d8014a0f9b1d61e21e796d78dcc\n"];
        let ports = (0..100).map(|number| format!("vm{number}-eth0"));
        let addresses: Vec<_> = ports.flat_map(|port| hosts.map(|host| made_up(host, &port))).collect();
        let different: std::collections::BTreeSet<_> = addresses.iter().collect();
        assert_eq!(different.len(), addresses.len());
        assert!(
            addresses.iter().all(|mac| mac.parse::<crate::ident::MacAddr>().is_ok() && mac.starts_with("52:54:00:"))
        );
    }

    #[test]
    fn qemu_listens_where_linecardd_connects() {
        let text = side(true, 1, None).qemu("4G");
        assert!(text.contains("c.sock,server=on \\\n") && !text.contains("queues") && !text.contains("mtu"), "{text}");
    }

    #[test]
    fn libvirt_gets_the_vms_side_of_the_mode() {
        let xml = side(false, 4, None).libvirt();
        assert!(
            xml.contains("path='/run/linecard/a,b&amp;c.sock' mode='client'>\n    <reconnect enabled='yes'"),
            "{xml}"
        );
        assert!(xml.contains("<driver queues='4'/>") && xml.contains("<access mode='shared'/>"), "{xml}");
        assert!(side(true, 1, Some(9000)).libvirt().contains("mode='server'/>"));
    }
}
