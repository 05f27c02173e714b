//! What a hostile front end can do with messages, descriptors and memory files, point by point, while a healthy pair on
//! the same daemon talks on and must lose nothing. After each attempt a good front end takes the port over and works, and
//! the daemon holds no descriptor, thread or mapping more than before.
//!
//! What is wrong may be refused with a NACK or end the connection; it may never be believed.

#![allow(clippy::unwrap_used)]

mod crowd;
mod descriptors;
mod directories;
#[path = "../frontend/mod.rs"]
mod frontend;
mod fuse;
mod held_page;
mod held_set;
mod holes;
mod host;
mod huge_faults;
mod hugepages;
mod last_descriptors;
mod losses;
mod mapping;
mod memory;
mod messages;
mod moments;
mod names;
mod pace;
mod pageless;
mod relay;
mod stalls;
mod together;
mod waiters;

use std::os::fd::{AsFd, BorrowedFd};

use frontend::daemon::Daemon;
use frontend::doorbell::Doorbell;
use frontend::eventually;
use frontend::footprint::Footprint;
use frontend::nic::{Nic, NicConfig, exchange, meet};
use frontend::session::{Session, is_closed, is_nack, protocol};
use frontend::witness::Witness;

const MIB: u64 = 1 << 20;

/// A daemon, the healthy pair, port `bad` to be abused, and a NIC on its network.
struct Scene {
    // Dropped first: the pair has to stop before its daemon does.
    witness: Witness,
    daemon: Daemon,
    peer: Nic,
    /// What the daemon holds while port `bad` has no front end.
    at_rest: Footprint,
}

impl Scene {
    fn new() -> Self {
        let daemon = Daemon::with_ports(&["bad", "peer", "other"]);
        let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
        let peer = Nic::up(&daemon.socket("peer"), &NicConfig::default());
        let mut scene = Self { at_rest: daemon.footprint(), daemon, witness, peer };
        // Once through all that is set up on first use.
        drop(scene.nic());
        scene.daemon.port_when("bad", "it has left", |port| port.state() == "down");
        scene.at_rest = scene.daemon.footprint_at_rest();
        scene
    }

    /// A connection that has negotiated REPLY_ACK and nothing else.
    fn session(&self) -> Session {
        session(&self.daemon, "bad")
    }

    /// A NIC that works, to be abused from there.
    fn nic(&mut self) -> Nic {
        let mut nic = Nic::up(&self.daemon.socket("bad"), &NicConfig::default());
        meet(&mut nic, &mut self.peer);
        nic
    }

    /// Whoever was there has gone. The daemon lives, the healthy pair talks on, a good front end is served, and then the
    /// daemon holds what it held at first.
    #[track_caller]
    fn expect_usable(&mut self, what: &str) {
        self.witness.keeps_going();
        assert!(self.daemon.is_running(), "{what}: the daemon is gone");
        let mut good = self.nic();
        exchange(&mut good, &mut self.peer, 16);
        drop(good);
        self.daemon.expect_given_back(&self.at_rest, what);
    }

    /// Port `bad` is told to have been barred for what this text is part of.
    #[track_caller]
    fn expect_barred(&self, why: &str) {
        let told = eventually(&format!("an event says `{why}`"), || {
            let barred = self.daemon.events("port-barred");
            barred.into_iter().find(|event| event["reason"].as_str().is_some_and(|reason| reason.contains(why)))
        });
        assert_eq!((&told["port"], &told["seconds"]), (&"bad".into(), &5.into()), "{told}");
    }

    fn finish(mut self) {
        self.expect_usable("at last");
        assert!(self.witness.finish() > 0);
    }
}

/// A connection to that port that has negotiated REPLY_ACK and nothing else.
fn session(daemon: &Daemon, port: &str) -> Session {
    eventually("a connection that stays", || {
        let session = Session::connect(&daemon.socket(port)).ok()?;
        session.get_features().ok()?;
        session.get_protocol_features().ok()?;
        let wanted = protocol::REPLY_ACK | protocol::MQ | protocol::NET_MTU | protocol::CONFIGURE_MEM_SLOTS;
        session.set_protocol_features(wanted).ok()?;
        session.set_owner(true).ok().map(|()| session)
    })
}

/// A message was refused: by a NACK, or by the end of the connection.
#[track_caller]
fn refused(result: std::io::Result<()>, what: &str) {
    let error = result.err().unwrap_or_else(|| panic!("{what} was accepted"));
    assert!(is_nack(&error) || is_closed(&error), "{what}: {error}");
}

/// A message may be refused or not; it has its answer.
#[track_caller]
fn answered(result: std::io::Result<()>, what: &str) {
    if let Err(error) = result {
        assert!(is_nack(&error) || is_closed(&error), "{what}: {error}");
    }
}

/// Many descriptors of one file.
fn fds(file: &impl AsFd, count: usize) -> Vec<BorrowedFd<'_>> {
    vec![file.as_fd(); count]
}

fn event() -> Doorbell {
    Doorbell::new()
}
