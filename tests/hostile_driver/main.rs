//! What a hostile guest can write into its rings, point by point: each test does one kind of harm on port `bad` while a
//! healthy pair on the same daemon talks on, and must lose nothing. Afterwards the port shows a reason, or counts a drop,
//! and works again once its guest has reset the device.

#![allow(clippy::unwrap_used)]

mod descriptors;
mod floods;
#[path = "../frontend/mod.rs"]
mod frontend;
mod headers;
mod packed;
mod races;
mod traffic;

use frontend::frame::frame;
use frontend::nic::{NicConfig, exchange};
use frontend::ring::Ring;
use frontend::scene::{Mutator, RX, Scene, TX};

impl Scene {
    fn new() -> Self {
        Self::with(NicConfig::default())
    }

    fn ring(&self, index: usize) -> Ring {
        self.bad.vmm.vrings[index].ring.clone()
    }

    /// A frame with its header in memory of the bad guest, `len` bytes in all; its address.
    fn frame_in_ram(&self, len: usize) -> u64 {
        let at = self.bad.vmm.ram.alloc(len as u64 + 12, 64);
        self.bad.vmm.ram.write(at, &[0; 12]);
        self.bad.vmm.ram.write(at + 12, &frame(self.peer.mac, self.bad.mac, len.max(26) - 12, 1));
        at
    }

    /// Offers `head` on ring `index` and kicks. For RX the peer sends something as well.
    fn offer(&mut self, index: usize, head: u16) {
        self.ring(index).offer(head);
        self.stir(index);
    }

    /// Makes the switch look at ring `index`.
    fn stir(&mut self, index: usize) {
        self.bad.vmm.vrings[index].kick.ring();
        if index == RX {
            self.peer.send(&frame(self.bad.mac, self.peer.mac, 300, 9));
            self.peer.drain();
        }
    }

    /// The ring was stopped, its port says why in a sentence, and a reset revives it.
    #[track_caller]
    fn expect_stopped(&mut self, what: &str) {
        let port = self.daemon.port_when("bad", what, |port| port.state() == "stopped");
        let reason = port.reason().unwrap_or_else(|| panic!("{what}: stopped without a reason"));
        assert!(reason.contains(' ') && reason.len() > 20, "{what}: {reason:?} is no sentence");
        self.expect_alive(what);
    }

    /// The port goes on, or was stopped for a reason; either way nobody else is harmed and a reset revives it.
    #[track_caller]
    fn expect_alive(&mut self, what: &str) {
        self.witness.keeps_going();
        assert!(self.daemon.is_running(), "{what}: the daemon is gone");
        let port = self.daemon.port("bad");
        assert!(port.state() != "stopped" || port.reason().is_some(), "{what}: stopped without a reason");
        self.reset();
        let port = self.daemon.port_when("bad", "it is up again", |port| port.state() == "up");
        assert_eq!(port.reason(), None, "{what}: a port that is up has no reason not to be");
    }

    /// `count` frames of the bad guest were dropped for `reason`, the port is up, and good frames still pass.
    #[track_caller]
    fn expect_drops(&mut self, reason: &str, before: u64, count: u64) {
        self.daemon.port_when("bad", reason, |port| port.drops(reason) == before + count && port.is_conserved());
        assert_eq!(self.daemon.port("bad").state(), "up");
        exchange(&mut self.bad, &mut self.peer, 16);
        self.witness.keeps_going();
    }

    fn finish(mut self) {
        self.expect_alive("the end");
        exchange(&mut self.bad, &mut self.peer, 16);
        self.daemon.port_when("bad", "every frame has had its end", |port| port.is_conserved());
        assert!(self.witness.finish() > 0);
    }
}

/// Points every available entry that the device has not used at `head`, and adds one.
fn fill_with_entry(ring: &Ring, head: u16) {
    let mut idx = ring.used_idx();
    while idx != ring.avail_idx() {
        ring.set_avail_entry(idx, head);
        idx = idx.wrapping_add(1);
    }
    if ring.avail_idx().wrapping_sub(ring.used_idx()) < ring.size {
        ring.offer(head);
    }
}
