//! A guest's network interface: virtio-net over vhost-user, as QEMU's command line says it.

use std::path::{Path, PathBuf};

/// Who listens on the socket and who dials, as seen from the daemon; QEMU is the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The daemon listens; QEMU dials, and again whenever the daemon has gone.
    Server,
    /// The daemon dials, and again whenever QEMU has gone; QEMU listens.
    Client,
}

/// One vhost-user NIC.
#[derive(Clone, Debug)]
pub struct Nic {
    socket: PathBuf,
    mode: Mode,
    queues: u16,
    mac: Option<String>,
    options: String,
}

impl Nic {
    /// A NIC with one queue pair; the switch listens on `socket` ([`Mode::Server`]).
    pub fn new(socket: &Path) -> Nic {
        Nic { socket: socket.to_owned(), mode: Mode::Server, queues: 1, mac: None, options: String::new() }
    }

    /// Chooses which side listens.
    pub fn mode(mut self, mode: Mode) -> Nic {
        self.mode = mode;
        self
    }

    /// Queue pairs of the device (the guest starts with one in use; `ethtool -L` uses more).
    pub fn queues(mut self, queues: u16) -> Nic {
        self.queues = queues;
        self
    }

    /// The device's MAC address, instead of [`Nic::default_mac`].
    pub fn mac(mut self, mac: &str) -> Nic {
        self.mac = Some(mac.to_owned());
        self
    }

    /// The same NIC on another socket, as the destination of a migration has it.
    pub fn moved(&self, socket: &Path, mac: String) -> Nic {
        Nic { socket: socket.to_owned(), mac: Some(self.mac.clone().unwrap_or(mac)), ..self.clone() }
    }

    /// Which side of the socket listens.
    pub fn socket_mode(&self) -> Mode {
        self.mode
    }

    /// Queue pairs of the device.
    pub fn queue_pairs(&self) -> u16 {
        self.queues
    }

    /// Further properties of `virtio-net-pci`, such as `mrg_rxbuf=off,packed=on`.
    pub fn options(mut self, options: &str) -> Nic {
        self.options = options.to_owned();
        self
    }

    /// The MAC address of a guest's `index`th NIC: locally administered by QEMU's convention, the low bytes a hash of
    /// the guest's name, so that guests of one scenario differ.
    pub fn default_mac(guest: &str, index: usize) -> String {
        let hash = guest.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        let [_, _, high, low] = hash.to_be_bytes();
        format!("52:54:00:{high:02x}:{low:02x}:{index:02x}")
    }

    /// The QEMU arguments of this NIC as the `index`th (from 1) of `guest`: chardev `chrN`, netdev `hostN`, device `netN`.
    pub fn arguments(&self, guest: &str, index: usize) -> Vec<String> {
        let socket = self.socket.display();
        let dial = match self.mode {
            Mode::Server => "reconnect-ms=100",
            Mode::Client => "server=on,wait=off",
        };
        let mac = self.mac.clone().unwrap_or_else(|| Nic::default_mac(guest, index));
        let mut device = format!("virtio-net-pci,id=net{index},netdev=host{index},mac={mac},romfile=");
        if self.queues > 1 {
            device += &format!(",mq=on,vectors={}", 2 * self.queues + 2); // each queue, configuration, control
        }
        if !self.options.is_empty() {
            device += &format!(",{}", self.options);
        }
        [
            "-chardev".to_owned(),
            format!("socket,id=chr{index},path={socket},{dial}"),
            "-netdev".to_owned(),
            format!("vhost-user,id=host{index},chardev=chr{index},queues={}", self.queues),
            "-device".to_owned(),
            device,
        ]
        .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_name_socket_direction_and_queues() {
        let nic = Nic::new(Path::new("/x.sock")).mode(Mode::Client).queues(4).options("packed=on");
        let line = nic.arguments("a", 1).join(" ");
        assert!(line.contains("socket,id=chr1,path=/x.sock,server=on,wait=off"), "{line}");
        assert!(
            line.contains("queues=4") && line.contains("mq=on,vectors=10") && line.ends_with(",packed=on"),
            "{line}"
        );
    }

    #[test]
    fn guests_have_macs_of_their_own() {
        assert_ne!(Nic::default_mac("a", 1), Nic::default_mac("b", 1));
        assert_ne!(Nic::default_mac("a", 1), Nic::default_mac("a", 2));
    }
}
