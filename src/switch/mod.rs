//! The switch itself: a batch and the tables in, a verdict for each frame out ([`process`]).
//!
//! Pure: no I/O, no locks, no `unsafe`, no clock, and no idea what kind of thing a port is. The [`Tables`] are an
//! immutable snapshot that the control side publishes; the one thing in them that changes is the [`Fdb`], which all
//! shards share and which needs no lock. A network is one broadcast domain of ports; no frame leaves its network.

#[cfg(any(test, fuzzing))]
pub mod exercise;
mod fdb;
mod flood;
mod forward;
mod storm;

use std::sync::Arc;
use std::time::Duration;

pub use fdb::{
    FLAP_HOLD_DOWN, FLAP_MOVES, FLAP_WINDOW, Fdb, FdbCounters, FdbEntry, Flush, Incident, IncidentKind, Learned,
    Limits, MacLimit, PinError, Swept,
};
pub use forward::process;
pub use storm::{Storm, StormClass, StormRates};

use crate::clock::Tick;
use crate::ident::{NetworkIndex, PortIndex};
use crate::limits::PORT_MACS_SHARE;

/// What frames are forwarded by.
#[derive(Debug, Clone)]
pub struct Tables {
    /// The ports, by [`PortIndex`]; none where a number is not given out.
    pub ports: Box<[Option<PortRow>]>,
    /// The networks, by [`NetworkIndex`]; none where a number is not given out.
    pub networks: Box<[Option<NetworkRow>]>,
    /// Where stations are.
    pub fdb: Arc<Fdb>,
}

/// What the switch knows of a port.
#[derive(Debug, Clone)]
pub struct PortRow {
    /// The network that the port is in.
    pub network: NetworkIndex,
    /// Longest payload of the frames that the port may send, in bytes, VLAN tags not counted. `None`: as long as they are.
    pub mtu: Option<u16>,
    /// How many stations may be learned at the port.
    pub macs: u32,
    /// How much of what it sends may be flooded.
    pub storm: Arc<Storm>,
}

/// What the switch knows of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkRow {
    /// The ports in it.
    pub members: Box<[PortIndex]>,
    /// How long a station may be silent before it is forgotten.
    pub mac_age: Duration,
    /// How many stations may be learned in it.
    pub mac_limit: u32,
}

impl Tables {
    /// The row of a port, if there is such a port.
    #[inline]
    pub fn port(&self, port: PortIndex) -> Option<&PortRow> {
        self.ports.get(port.index())?.as_ref()
    }

    /// The row of a network, if there is such a network.
    #[inline]
    pub fn network(&self, network: NetworkIndex) -> Option<&NetworkRow> {
        self.networks.get(network.index())?.as_ref()
    }

    /// Forgets stations that have been silent for their network's MAC age, and those that are too many because they moved, and has
    /// ports that are down hold none. See [`Fdb::sweep`] and [`Fdb::trim`].
    pub fn sweep(&self, now: Tick, is_down: impl Fn(PortIndex) -> bool) -> Swept {
        let swept = self.fdb.sweep(now, |network| self.network(network).map(|row| row.mac_age), is_down);
        let most = |row: &NetworkRow| row.mac_limit as usize + PORT_MACS_SHARE as usize * row.members.len();
        Swept { surplus: self.fdb.trim(|network| self.network(network).map(most)), ..swept }
    }
}
