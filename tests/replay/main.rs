//! Faults that other back ends, drivers and front ends were found to have, replayed on ours: one test for each, named after
//! its number or commit, in the table "Replayed" of THREAT-MODEL.md.
//!
//! A test that has never failed proves nothing, so `weakened.patch` has for each a way to take out the check or the order
//! that it is about: `make replay-red` builds a copy with it and wants each test to fail. That the patch still fits the source
//! is a test here.

#![allow(clippy::unwrap_used)]

mod frames;
#[path = "../frontend/mod.rs"]
mod frontend;
mod messages;
mod rings;
mod weakenings;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use frontend::daemon::Daemon;
use frontend::frame::{BROADCAST, frame};
use frontend::nic::{Nic, NicConfig, exchange, meet};
use frontend::session::{is_closed, is_nack};
use frontend::witness::Witness;

/// Ring numbers of the first pair.
const RX: usize = 0;
const TX: usize = 1;

/// A daemon, a healthy pair that must lose nothing, the guest that misbehaves, and one on its network.
struct Scene {
    // Dropped first: the pair has to stop before its daemon does.
    witness: Witness,
    daemon: Daemon,
    bad: Nic,
    peer: Nic,
}

impl Scene {
    fn with(bad: NicConfig) -> Self {
        Self::of(bad, NicConfig::default())
    }

    fn of(bad: NicConfig, peer: NicConfig) -> Self {
        let daemon = Daemon::with_ports(&["bad", "peer"]);
        let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
        let mut bad = Nic::up(&daemon.socket("bad"), &bad);
        let mut peer = Nic::up(&daemon.socket("peer"), &peer);
        meet(&mut bad, &mut peer);
        Self { witness, daemon, bad, peer }
    }

    /// The guest's RX ring without buffers, so that those that come next are the test's own.
    fn empty_rx(&mut self) {
        let features = self.bad.features();
        self.bad.stop().unwrap();
        self.bad.pairs[0].rx.reset(features);
        self.bad.vmm.vrings[RX].base = frontend::queue::Queue::first_base(features);
        self.bad.cont().unwrap();
    }

    /// The guest resets its device, and then it and its peer talk as before.
    #[track_caller]
    fn recover(&mut self) {
        self.witness.keeps_going();
        assert!(self.daemon.is_running(), "the daemon is gone");
        self.bad.rebind(self.bad.features()).unwrap();
        self.peer.send(&frame(BROADCAST, self.peer.mac, 60, 1));
        self.peer.drain();
        meet(&mut self.bad, &mut self.peer);
        exchange(&mut self.bad, &mut self.peer, 16);
    }

    fn finish(mut self) {
        self.recover();
        self.daemon.port_when("bad", "every frame has had its end", |port| port.is_conserved());
        assert!(self.witness.finish() > 0);
    }
}

/// A message was refused: by a NACK, or by the end of the connection.
#[track_caller]
fn refused<T>(result: std::io::Result<T>, what: &str) {
    let error = result.err().unwrap_or_else(|| panic!("{what} was accepted"));
    assert!(is_nack(&error) || is_closed(&error), "{what}: {error}");
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
