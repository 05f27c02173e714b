//! The usual scenario: a daemon with two vNICs on one network, and a guest on each.

use crate::daemon::{Config, Daemon};
use crate::guest::{Guest, Spec};
use crate::nic::Nic;
use crate::scenario::Scenario;
use crate::traffic::{self, Flow};
use crate::{Error, Result};

/// Guests `a` (10.9.0.1, port `a`) and `b` (10.9.0.2, port `b`) on one daemon.
#[derive(Debug)]
pub struct Pair {
    /// First guest.
    pub a: Guest,
    /// Second guest.
    pub b: Guest,
    /// The switch between them; after the guests, so that it is the last to end.
    pub daemon: Daemon,
}

impl Pair {
    /// Boots both guests, each NIC and guest as `nic` and `guest` make it from the plain one and its name.
    pub fn boot(s: &Scenario, nic: impl Fn(&str, Nic) -> Nic, guest: impl Fn(&str, Spec) -> Spec) -> Result<Pair> {
        let mut config = Config::new(s.dir());
        let mut specs = Vec::new();
        for (name, address) in [("a", "10.9.0.1/24"), ("b", "10.9.0.2/24")] {
            let nic = nic(name, Nic::new(&s.path(&format!("{name}.sock"))));
            config = config.vnic(name, nic.socket_mode(), nic.queue_pairs());
            specs.push(guest(name, Guest::named(name).nic(nic).address(address)));
        }
        let daemon = s.daemon(&config.yaml())?;
        let specs: [Spec; 2] = specs.try_into().map_err(|_| Error::Unexpected("a pair is two".into()))?;
        let [a, b] = s.boot(specs)?;
        Ok(Pair { a, b, daemon })
    }

    /// Boots both guests as they are by default.
    pub fn plain(s: &Scenario) -> Result<Pair> {
        Pair::boot(s, |_, nic| nic, |_, guest| guest)
    }

    /// Pings both ways.
    pub fn ping(&self) -> Result<()> {
        traffic::ping_both(&self.a, &self.b)
    }

    /// Starts TCP and UDP both ways.
    pub fn flows(&self) -> Result<Vec<Flow<'_>>> {
        Flow::all(&self.a, &self.b)
    }

    /// Pings and sends `bytes` of checksummed payload, TCP and UDP, both ways.
    pub fn exchange(&self, bytes: u64) -> Result<()> {
        self.ping()?;
        traffic::finish_all(self.flows()?, bytes)
    }

    /// Checks that every frame had an end ([`Daemon::balanced`]).
    pub fn balanced(&self) -> Result<()> {
        self.daemon.balanced(&["a", "b"])
    }
}
