//! DPDK's testpmd as an independent front end: two virtio-user NICs on two ports of one network send each other frames
//! for ever, unicast, so every frame that either counts has crossed the switch. Each case ends at rest, where the books
//! of both sides must agree to the frame.
//!
//! testpmd polls and takes a CPU of its own, so the tests of this file run one after the other.

#![allow(clippy::unwrap_used)]

mod console;
#[path = "../frontend/mod.rs"]
mod frontend;
mod restarts;
mod traffic;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use console::{Nics, Testpmd};
use frontend::daemon::{Daemon, PortView, port_with, preamble};
use serde_json::Value;

const PORTS: [&str; 2] = ["a", "b"];

/// Frames that a port has to receive beyond testpmd's first burst before it counts as bouncing.
const BOUNCES: u64 = 4000;

/// Bursts of 32 frames that start it, on every queue of both NICs: few enough for the shortest ring.
const FIRST_BURSTS: u64 = 4;

/// The daemon, testpmd, and this file's turn at the CPUs.
struct Scene {
    testpmd: Testpmd,
    daemon: Daemon,
    nics: Nics,
    _turn: MutexGuard<'static, ()>,
}

impl Scene {
    #[track_caller]
    fn new(nics: Nics) -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let mode = if nics.server { "client" } else { "server" };
        let daemon = Daemon::start(|dir| {
            let port = |name| port_with(dir, name, "lan", mode, "").replace("queues: 4", "queues: 8");
            preamble(dir) + "networks: { lan: {} }\nports:\n" + &PORTS.map(port).concat()
        });
        let testpmd = Testpmd::start(daemon.dir(), &sockets(&daemon), &nics);
        let scene = Self { testpmd, daemon, nics, _turn: turn };
        scene.expect_up();
        scene
    }

    /// Another testpmd, after the last one is gone, perhaps with other NICs. The daemon goes on.
    #[track_caller]
    fn replace_testpmd(&mut self, nics: Nics) {
        assert_eq!(nics.server, self.nics.server, "the ports' mode stays");
        let seen = self.ports().map(|port| connections(&port));
        self.testpmd = Testpmd::start(self.daemon.dir(), &sockets(&self.daemon), &nics);
        self.nics = nics;
        for (name, before) in PORTS.into_iter().zip(seen) {
            self.daemon.port_when(name, "the next front end is there", |port| connections(port) > before);
        }
        self.expect_up();
    }

    fn ports(&self) -> [PortView; 2] {
        PORTS.map(|name| self.daemon.port(name))
    }

    /// Both ports are up with every ring running, and nothing is wrong with them.
    #[track_caller]
    fn expect_up(&self) {
        for name in PORTS {
            let port = self.daemon.port_when(name, "up with all its queues", |port| {
                port.state() == "up" && running_rings(port) == 2 * usize::from(self.nics.queues)
            });
            assert_eq!(port.reason(), None, "{}", port.0);
            assert!(rings(&port).iter().all(|ring| ring["fault"].is_null()), "{}", port.0);
        }
    }

    /// Starts frames of `segments` (testpmd's `txpkts`) and waits until they go round and round.
    #[track_caller]
    fn bounce(&mut self, segments: &str) {
        let before = self.ports().map(|port| port.counter("rx_delivered"));
        self.testpmd.say(&format!("set txpkts {segments}"));
        self.testpmd.say(&format!("start tx_first {FIRST_BURSTS}"));
        // A first burst of either side is sent twice at most before somebody has to have received it.
        let wanted = BOUNCES + 2 * FIRST_BURSTS * 32 * u64::from(self.nics.queues);
        for (name, before) in PORTS.into_iter().zip(before) {
            let what = format!("{segments} bounce with {:?}", self.nics);
            self.daemon.port_when(name, &what, |port| port.counter("rx_delivered") >= before + wanted);
        }
    }

    /// Stops forwarding; the ports once all that was sent has had its end.
    #[track_caller]
    fn rest(&mut self) -> [PortView; 2] {
        self.testpmd.say("stop");
        let mut last = self.ports();
        let what = "every frame has had its end";
        frontend::eventually(what, || {
            let before = std::mem::replace(&mut last, self.ports());
            let still = [0, 1].map(|at| before[at].counter("rx_frames") == last[at].counter("rx_frames"));
            (still == [true; 2]).then_some(())
        });
        let ports = PORTS.map(|name| self.daemon.port_when(name, what, PortView::is_conserved));
        for (from, to) in [(0, 1), (1, 0)] {
            let (delivered, arrived) = (ports[from].counter("rx_delivered"), ports[to].counter("tx_frames"));
            assert_eq!(delivered, arrived, "from {} to {}", PORTS[from], PORTS[to]);
        }
        self.expect_up();
        ports
    }

    /// [`Scene::rest`], and testpmd has counted what the daemon has. Only while both have run since the same moment.
    #[track_caller]
    fn rest_and_compare(&mut self) -> [PortView; 2] {
        let ports = self.rest();
        let in_rings = u64::from(self.nics.queues) * u64::from(self.nics.queue_size);
        for (port, nic) in ports.iter().zip(self.testpmd.stats()) {
            let (received, sent) = (port.counter("rx_frames"), port.counter("tx_frames"));
            assert_eq!(received, nic.sent, "sent by {nic:?}, seen by {}", port.0);
            let unread = sent.checked_sub(nic.received).unwrap_or_else(|| panic!("{nic:?} has more than {}", port.0));
            assert!(unread <= in_rings, "{unread} frames on their way to {nic:?} are lost: {}", port.0);
        }
        ports
    }
}

fn sockets(daemon: &Daemon) -> [PathBuf; 2] {
    PORTS.map(|name| daemon.socket(name))
}

fn rings(port: &PortView) -> &[Value] {
    port.0["detail"]["queues"].as_array().map_or(&[], Vec::as_slice)
}

fn running_rings(port: &PortView) -> usize {
    rings(port).iter().filter(|ring| ring["started"] == true && ring["enabled"] == true).count()
}

/// How many front ends the port has seen.
fn connections(port: &PortView) -> u64 {
    port.0["detail"]["connections"].as_u64().unwrap_or_else(|| panic!("connections in {}", port.0))
}
