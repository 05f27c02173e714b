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
use std::time::Instant;

use console::{NicStats, Nics, Testpmd};
use frontend::DEADLINE;
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
        self.settle(|_| true)
    }

    /// [`Scene::rest`], and testpmd has counted what the daemon has. Only while both have run since the same moment.
    #[track_caller]
    fn rest_and_compare(&mut self) -> [PortView; 2] {
        self.testpmd.say("stop");
        let nics = self.testpmd.stats();
        let in_rings = u64::from(self.nics.queues) * u64::from(self.nics.queue_size);
        let agree = |port: &PortView, nic: &NicStats| {
            // What was given to a NIC and not read by it lies in its rings still.
            let unread = port.counter("tx_frames").checked_sub(nic.received);
            port.counter("rx_frames") == nic.sent && unread.is_some_and(|frames| frames <= in_rings)
        };
        self.settle(|ports| ports.iter().zip(&nics).all(|(port, nic)| agree(port, nic)))
    }

    /// The ports once each frame has had its end, what one delivered is what the other got, and `wish` is fulfilled.
    #[track_caller]
    fn settle(&self, wish: impl Fn(&[PortView; 2]) -> bool) -> [PortView; 2] {
        let end = Instant::now() + DEADLINE;
        loop {
            let ports = self.ports();
            let arrived =
                |from: usize, to: usize| ports[from].counter("rx_delivered") == ports[to].counter("tx_frames");
            if ports.iter().all(PortView::is_conserved) && arrived(0, 1) && arrived(1, 0) && wish(&ports) {
                self.expect_up();
                return ports;
            }
            let [a, b] = ports.map(|port| port.0["counters"].clone());
            assert!(Instant::now() < end, "the books do not agree with {:?}: a {a}, b {b}", self.nics);
        }
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
