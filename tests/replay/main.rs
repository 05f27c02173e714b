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

use frontend::nic::exchange;
use frontend::scene::{Mutator, RX, Scene, TX};
use frontend::session::{is_closed, is_nack};

impl Scene {
    /// The guest resets its device, and then it and its peer talk as before.
    #[track_caller]
    fn recover(&mut self) {
        self.witness.keeps_going();
        assert!(self.daemon.is_running(), "the daemon is gone");
        self.reset();
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
