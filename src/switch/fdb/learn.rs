//! What a frame's source address teaches: [`Fdb::learn`].
//!
//! Nearly always nothing: the station is where it was and was seen in this tenth of a second already. That path reads
//! one cache line and writes none, so shards do not steal lines from each other.

use std::sync::atomic::Ordering::Relaxed;

use super::Fdb;
use super::bucket::{SLOTS, Slot};
use super::count::{MacLimit, Place};
use super::entry::{Key, Move, Value};
use super::incidents::IncidentKind;
use crate::clock::Tick;
use crate::ident::{MacAddr, NetworkIndex, PortIndex};

/// How many stations may be learned. The first [`PORT_MACS_SHARE`](crate::limits::PORT_MACS_SHARE) of a port are, whatever its network has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// At the port that the frame came from.
    pub port: u32,
    /// In its network.
    pub network: u32,
}

/// What came of a sighting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learned {
    /// The station was known to be there.
    Known,
    /// It is entered now.
    New,
    /// It was known at another port and is here now.
    Moved,
    /// It has moved too often and is at another port; see [`super::FLAP_MOVES`].
    Damped,
    /// It is pinned at another port and stays there.
    Pinned,
    /// The port has as many learned stations as it may, or its network has and the port its share.
    Refused,
    /// The host has as many as it may and the port its share, or the table has no place for it.
    Full,
    /// The address is no station's.
    NoStation,
}

impl Fdb {
    /// Notes that a frame from station `mac` of `network` came in at `port`.
    #[inline]
    pub fn learn(&self, network: NetworkIndex, mac: MacAddr, port: PortIndex, limits: Limits, now: Tick) -> Learned {
        self.learn_key(Key::new(network, mac), port, limits, now)
    }

    /// [`Fdb::learn`] by key.
    #[inline]
    pub(in crate::switch) fn learn_key(&self, key: Key, port: PortIndex, limits: Limits, now: Tick) -> Learned {
        match self.find(key) {
            // Refreshed only when the tick has changed: a store per frame would have shards fight for the line.
            Some((_, value)) if value.port() == port && (value.is_fresh(now) || value.is_pinned()) => Learned::Known,
            Some((slot, value)) if value.port() == port => {
                // If this fails another shard has changed the entry at this very moment, and what it wrote is as good.
                slot.replace(value, value.seen_at(now));
                Learned::Known
            }
            Some((slot, value)) => self.relocate(slot, key, value, port, limits, now),
            None => self.enter(key, Value::learned(port, now), limits),
        }
    }

    /// A station was seen at `port` and is known at another one.
    #[cold]
    fn relocate(&self, slot: &Slot, key: Key, value: Value, port: PortIndex, limits: Limits, now: Tick) -> Learned {
        if value.is_pinned() {
            self.incidents.note(IncidentKind::Pinned, key, port, value.port());
            return Learned::Pinned;
        }
        match value.moved(port, now) {
            Move::Stay(damped) => {
                if damped != value {
                    slot.replace(value, damped);
                }
                self.damped(key, port, value.port())
            }
            Move::Return(home) => {
                // Counted before it can be seen there and move on. It was there before, and that port's limit is not at hand.
                self.counts.add_port(home.port());
                let returned = slot.replace(value, home);
                self.counts.release_port(if returned { value.port() } else { home.port() });
                self.damped(key, port, home.port())
            }
            // It brings the place that it has in its network and in the table, whatever their limits are; [`Fdb::trim`] has the rest.
            Move::Follow(_) if self.counts.take_port(port, limits.port).is_none() => {
                self.counts.refuse(port, MacLimit::Port);
                Learned::Refused
            }
            Move::Follow(moved) if slot.replace(value, moved) => {
                self.counts.release_port(value.port());
                self.counts.moved.fetch_add(1, Relaxed);
                self.incidents.note(IncidentKind::Moved, key, port, value.port());
                Learned::Moved
            }
            Move::Follow(_) => {
                // Another shard saw the station at the same moment and was quicker: the next frame decides.
                self.counts.release_port(port);
                Learned::Known
            }
        }
    }

    fn damped(&self, key: Key, port: PortIndex, stays: PortIndex) -> Learned {
        self.counts.damped.fetch_add(1, Relaxed);
        self.incidents.note(IncidentKind::Damped, key, port, stays);
        Learned::Damped
    }

    /// A station was seen that is not known.
    #[cold]
    fn enter(&self, key: Key, value: Value, limits: Limits) -> Learned {
        if !key.is_station() {
            return Learned::NoStation;
        }
        let (network, port) = (key.network(), value.port());
        let Some(place) = self.counts.take_port(port, limits.port) else {
            return self.refuse(port, MacLimit::Port);
        };
        if !self.counts.take_network(network, place, limits.network) {
            self.counts.release_port(port);
            return self.refuse(port, MacLimit::Network);
        }
        let taken = self.counts.take_entry(place, self.most);
        if taken && (self.place(key, value) || place == Place::Own && self.displace(key, value)) {
            self.counts.learned.fetch_add(1, Relaxed);
            return Learned::New;
        }
        if taken {
            self.counts.release_entry();
        }
        self.counts.release_port(port);
        self.counts.release_network(network);
        self.refuse(port, if taken { MacLimit::Place } else { MacLimit::Host })
    }

    fn refuse(&self, port: PortIndex, limit: MacLimit) -> Learned {
        self.counts.refuse(port, limit);
        match limit {
            MacLimit::Port | MacLimit::Network => Learned::Refused,
            MacLimit::Host | MacLimit::Place => Learned::Full,
        }
    }

    /// Puts an entry in the place of another's, which has to be one of a port that has more than its share. One that does not
    /// remember that it moved is preferred: that may be what has an address go back to its owner.
    fn displace(&self, key: Key, value: Value) -> bool {
        let may_go = |value: Value| !value.is_pinned() && self.counts.is_beyond_share(value.port());
        let unmoved = |value: Value| may_go(value) && value.moves() == 0 && !value.is_away();
        // Others may be quicker to enter what they see at the place that is made.
        (0..SLOTS).any(|_| (self.evict(key, unmoved) || self.evict(key, may_go)) && self.place(key, value))
    }
}
