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

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use frontend::daemon::Daemon;
use frontend::frame::{BROADCAST, frame};
use frontend::nic::{Nic, NicConfig, exchange, meet};
use frontend::queue::Queue;
use frontend::ring::Ring;
use frontend::witness::Witness;

/// Ring numbers of the first pair.
const RX: usize = 0;
const TX: usize = 1;

/// A daemon, the healthy pair, the guest that goes bad, and one on its network.
struct Scene {
    // Dropped first: the pair has to stop before its daemon does.
    witness: Witness,
    daemon: Daemon,
    bad: Nic,
    peer: Nic,
    features: u64,
}

impl Scene {
    fn new() -> Self {
        Self::with(NicConfig::default())
    }

    fn with(config: NicConfig) -> Self {
        let daemon = Daemon::with_ports(&["bad", "peer"]);
        let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
        let mut bad = Nic::up(&daemon.socket("bad"), &config);
        let mut peer = Nic::up(&daemon.socket("peer"), &NicConfig::default());
        meet(&mut bad, &mut peer);
        Self { daemon, witness, bad, peer, features: config.features }
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

    /// A fresh start for the bad guest: the device is reset and works. The peer speaks first, because what the bad guest
    /// has sent may have carried the peer's address.
    fn reset(&mut self) {
        self.bad.rebind(self.features).unwrap();
        self.peer.send(&frame(BROADCAST, self.peer.mac, 60, 1));
        self.peer.drain();
        meet(&mut self.bad, &mut self.peer);
    }

    /// An empty RX ring, so that the buffers that come next are the test's own.
    fn empty_rx(&mut self) {
        self.bad.stop().unwrap();
        let features = self.bad.features();
        self.bad.pairs[0].rx.reset(features);
        self.bad.vmm.vrings[RX].base = Queue::first_base(features);
        self.bad.cont().unwrap();
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

/// A thread that repeats `act` until it is dropped.
struct Mutator {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Mutator {
    fn start(mut act: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                act();
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Mutator {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
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
