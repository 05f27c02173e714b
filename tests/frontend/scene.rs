//! A daemon with a healthy pair that must lose nothing, a guest that misbehaves, and one on its network: [`Scene`]. What a test
//! crate expects of it is added there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::daemon::Daemon;
use super::frame::{BROADCAST, frame};
use super::nic::{Nic, NicConfig, meet};
use super::queue::Queue;
use super::witness::Witness;

/// Ring numbers of the first pair.
pub const RX: usize = 0;
pub const TX: usize = 1;

/// The daemon and who is at its ports.
pub struct Scene {
    // Dropped first: the pair has to stop before its daemon does.
    pub witness: Witness,
    pub daemon: Daemon,
    pub bad: Nic,
    pub peer: Nic,
}

impl Scene {
    /// The guest that misbehaves is `bad`, the one on its network an ordinary one.
    pub fn with(bad: NicConfig) -> Self {
        Self::of(bad, NicConfig::default())
    }

    /// Both as they are described.
    pub fn of(bad: NicConfig, peer: NicConfig) -> Self {
        let daemon = Daemon::with_ports(&["bad", "peer"]);
        let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
        let mut bad = Nic::up(&daemon.socket("bad"), &bad);
        let mut peer = Nic::up(&daemon.socket("peer"), &peer);
        meet(&mut bad, &mut peer);
        Self { witness, daemon, bad, peer }
    }

    /// A fresh start for the bad guest: the device is reset and works. The peer speaks first, because what the bad guest
    /// has sent may have carried the peer's address.
    #[track_caller]
    pub fn reset(&mut self) {
        self.bad.rebind(self.bad.features()).unwrap();
        self.peer.send(&frame(BROADCAST, self.peer.mac, 60, 1));
        self.peer.drain();
        meet(&mut self.bad, &mut self.peer);
    }

    /// An empty RX ring of the bad guest, so that the buffers that come next are the test's own.
    pub fn empty_rx(&mut self) {
        let features = self.bad.features();
        self.bad.stop().unwrap();
        self.bad.pairs[0].rx.reset(features);
        self.bad.vmm.vrings[RX].base = Queue::first_base(features);
        self.bad.cont().unwrap();
    }
}

/// A thread that repeats `act` until it is dropped.
pub struct Mutator {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Mutator {
    pub fn start(mut act: impl FnMut() + Send + 'static) -> Self {
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
