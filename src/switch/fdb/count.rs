//! What the FDB counts: entries of each port and network, which the limits are about, and what happened to entries.
//!
//! All shards write these, so they are real atomic additions. Only what is out of the ordinary pays for one: a station
//! that is where it was costs none.
//!
//! The first [`PORT_MACS_SHARE`] stations of a port are its share: its network's limit and the host's do not count for them, so
//! that ports that fill what all have in common cannot keep a VM from being learned. Whether a station is within the share is
//! decided by the one addition that takes its place at the port, so of several that shards enter at the same moment as many are
//! as there are places left.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};

use super::Fdb;
use super::entry::{Key, Value};
use crate::ident::{NetworkIndex, PortIndex};
use crate::limits::{NETWORKS, PORT_MACS_SHARE, PORTS};

/// What keeps a station from being learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MacLimit {
    /// Its port has as many as it may.
    Port,
    /// Its network has, and the port its share.
    Network,
    /// The host has, and the port its share.
    Host,
    /// The table has no place for it before it has grown.
    Place,
}

impl MacLimit {
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();

    /// All of them, in the order of their counters.
    pub const ALL: [Self; 4] = [Self::Port, Self::Network, Self::Host, Self::Place];

    /// Its name in reports and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Port => "port",
            Self::Network => "network",
            Self::Host => "host",
            Self::Place => "place",
        }
    }
}

/// What happened to entries since the daemon started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FdbCounters {
    /// Stations entered because a frame of theirs came in.
    pub learned: u64,
    /// Learned entries removed because their station was silent for the network's MAC age.
    pub aged: u64,
    /// Moves of a station from one port to another.
    pub moved: u64,
    /// Moves not followed because the station had moved too often.
    pub damped: u64,
    /// Learning and moves refused because of a port's or a network's limit.
    pub refused: u64,
    /// Stations not learned because the table had no room for them.
    pub full: u64,
}

impl Fdb {
    /// What happened to entries since the daemon started.
    pub fn counters(&self) -> FdbCounters {
        let Counts { learned, aged, moved, damped, refused, full, .. } = &self.counts;
        FdbCounters {
            learned: learned.load(Relaxed),
            aged: aged.load(Relaxed),
            moved: moved.load(Relaxed),
            damped: damped.load(Relaxed),
            refused: refused.load(Relaxed),
            full: full.load(Relaxed),
        }
    }

    /// How many entries there are, learned and pinned.
    pub fn len(&self) -> usize {
        self.counts.entries.load(Relaxed)
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many stations are learned at `port`.
    pub fn port_macs(&self, port: PortIndex) -> u32 {
        self.counts.ports.get(port.index()).map_or(0, |port| port.learned.load(Relaxed))
    }

    /// How many stations are learned in `network`.
    pub fn network_macs(&self, network: NetworkIndex) -> u32 {
        self.counts.networks.get(network.index()).map_or(0, |learned| learned.load(Relaxed))
    }

    /// How often learning at `port` was refused, in the order of [`MacLimit::ALL`]. Frames that follow each other with the same
    /// addresses count once.
    pub fn port_refused(&self, port: PortIndex) -> [u64; MacLimit::COUNT] {
        let refused = self.counts.ports.get(port.index()).map(|port| port.refused.each_ref().map(|n| n.load(Relaxed)));
        refused.unwrap_or_default()
    }
}

/// The counters themselves.
#[derive(Debug)]
pub(super) struct Counts {
    entries: AtomicUsize,
    ports: Box<[PortCount]>,
    networks: Box<[AtomicU32]>,
    pub(super) learned: AtomicU64,
    pub(super) aged: AtomicU64,
    pub(super) moved: AtomicU64,
    pub(super) damped: AtomicU64,
    refused: AtomicU64,
    full: AtomicU64,
    /// Those of `full` that this table had no place for.
    unplaced: AtomicUsize,
}

#[derive(Debug, Default)]
struct PortCount {
    learned: AtomicU32,
    /// By [`MacLimit`].
    refused: [AtomicU64; MacLimit::COUNT],
}

/// A place for one more station at a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Within the port's share.
    Own,
    /// One of those that its network and the host have for all.
    Common,
}

impl Counts {
    pub(super) fn new() -> Self {
        Self {
            entries: AtomicUsize::new(0),
            ports: (0..PORTS).map(|_| PortCount::default()).collect(),
            networks: (0..NETWORKS).map(|_| AtomicU32::new(0)).collect(),
            learned: AtomicU64::new(0),
            aged: AtomicU64::new(0),
            moved: AtomicU64::new(0),
            damped: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            full: AtomicU64::new(0),
            unplaced: AtomicUsize::new(0),
        }
    }

    /// An entry was put in, without asking for leave. The limits are about learned entries; pins are the operator's.
    pub(super) fn entered(&self, key: Key, value: Value) {
        self.entries.fetch_add(1, Relaxed);
        if !value.is_pinned() {
            self.add_port(value.port());
            if let Some(count) = self.networks.get(key.network().index()) {
                count.fetch_add(1, Relaxed);
            }
        }
    }

    /// An entry was taken out.
    pub(super) fn left(&self, key: Key, value: Value) {
        self.release_entry();
        if !value.is_pinned() {
            self.release_port(value.port());
            self.release_network(key.network());
        }
    }

    /// Counts one more station at `port`, whatever the limit and what others do at this moment: until they are done, the count
    /// may be below zero, which looks like a very large one.
    pub(super) fn add_port(&self, port: PortIndex) {
        if let Some(count) = self.ports.get(port.index()) {
            count.learned.fetch_add(1, Relaxed);
        }
    }

    /// Takes a place for one more station at `port`, unless that is over `limit`.
    pub(super) fn take_port(&self, port: PortIndex, limit: u32) -> Option<Place> {
        let before = take(&self.ports.get(port.index())?.learned, limit)?;
        Some(if before < PORT_MACS_SHARE { Place::Own } else { Place::Common })
    }

    /// Whether `port` has more stations than its share.
    pub(super) fn is_beyond_share(&self, port: PortIndex) -> bool {
        self.ports.get(port.index()).is_some_and(|count| count.learned.load(Relaxed) > PORT_MACS_SHARE)
    }

    /// Takes what a station that has `place` at its port needs in `network`, unless that is over `limit`.
    pub(super) fn take_network(&self, network: NetworkIndex, place: Place, limit: u32) -> bool {
        let Some(count) = self.networks.get(network.index()) else { return false };
        match place {
            Place::Own => {
                count.fetch_add(1, Relaxed);
                true
            }
            Place::Common => take(count, limit).is_some(),
        }
    }

    /// Takes what a station that has `place` at its port needs in the table, whose limit is `limit`.
    pub(super) fn take_entry(&self, place: Place, limit: usize) -> bool {
        // Shards that come at the same moment may all pass: the table has room for twice as many.
        let free = place == Place::Own || self.entries.load(Relaxed) < limit;
        if free {
            self.entries.fetch_add(1, Relaxed);
        }
        free
    }

    /// Gives an entry's place back.
    pub(super) fn release_entry(&self) {
        self.entries.fetch_sub(1, Relaxed);
    }

    /// Gives a station's place at `port` back.
    pub(super) fn release_port(&self, port: PortIndex) {
        if let Some(count) = self.ports.get(port.index()) {
            count.learned.fetch_sub(1, Relaxed);
        }
    }

    /// Gives a station's place in `network` back.
    pub(super) fn release_network(&self, network: NetworkIndex) {
        if let Some(count) = self.networks.get(network.index()) {
            count.fetch_sub(1, Relaxed);
        }
    }

    /// Learning at `port` was refused because of `limit`.
    pub(super) fn refuse(&self, port: PortIndex, limit: MacLimit) {
        match limit {
            MacLimit::Port | MacLimit::Network => self.refused.fetch_add(1, Relaxed),
            MacLimit::Host | MacLimit::Place => self.full.fetch_add(1, Relaxed),
        };
        if limit == MacLimit::Place {
            self.unplaced.fetch_add(1, Relaxed);
        }
        if let Some(count) = self.ports.get(port.index()) {
            count.refused[limit as usize].fetch_add(1, Relaxed);
        }
    }

    /// Has whoever gets the number of a port that is gone begin anew.
    pub(super) fn forget_refused(&self, port: PortIndex) {
        let counts = self.ports.get(port.index()).into_iter().flat_map(|count| &count.refused);
        counts.for_each(|count| count.store(0, Relaxed));
    }

    /// How many entries there are and should be.
    pub(super) fn wanted(&self) -> usize {
        self.entries.load(Relaxed).saturating_add(self.unplaced.load(Relaxed))
    }

    /// Takes over what happened in the table that this one replaces. Its entries have been counted as they came in.
    pub(super) fn inherit(&self, old: &Self) {
        let ports = self.ports.iter().zip(&old.ports);
        for (new, old) in ports.flat_map(|(new, old)| new.refused.iter().zip(&old.refused)) {
            new.store(old.load(Relaxed), Relaxed);
        }
        let pairs = [
            (&self.learned, &old.learned),
            (&self.aged, &old.aged),
            (&self.moved, &old.moved),
            (&self.damped, &old.damped),
            (&self.refused, &old.refused),
            (&self.full, &old.full),
        ];
        for (new, old) in pairs {
            new.store(old.load(Relaxed), Relaxed);
        }
    }
}

/// Adds one unless that is over `limit`; what there was before. The load first spares a port at its limit the two writes.
fn take(count: &AtomicU32, limit: u32) -> Option<u32> {
    if count.load(Relaxed) >= limit {
        return None;
    }
    let before = count.fetch_add(1, Relaxed);
    if before >= limit {
        count.fetch_sub(1, Relaxed);
        return None;
    }
    Some(before)
}
