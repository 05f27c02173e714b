//! How entries end: [`Fdb::sweep`] once a second, [`Fdb::flush`] and [`Fdb::forget_port`] on request. And how they are
//! listed.
//!
//! These walk the whole table and belong to the control side: a million entries take it some milliseconds. They take
//! nothing from the shards but the lines of entries that they change.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::Fdb;
use super::bucket::Slot;
use super::entry::{Key, Value};
use crate::clock::Tick;
use crate::ident::{MacAddr, NetworkIndex, PortIndex};
use crate::limits::{NETWORKS, PORT_MACS_SHARE, PORTS};

/// One entry, as `linecard fdb list` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdbEntry {
    /// The network of the station.
    pub network: NetworkIndex,
    /// Its address.
    pub mac: MacAddr,
    /// The port behind which it is.
    pub port: PortIndex,
    /// How long ago it was last seen, to a tenth of a second; nothing for a pin.
    pub age: Option<Duration>,
    /// Whether the configuration entered it.
    pub pinned: bool,
    /// How often it moved in quick succession, or tried to.
    pub moves: u8,
    /// It moved too often: frames from it are dropped at other ports.
    pub damped: bool,
    /// Where it was before it began to move, if it has.
    pub home: Option<PortIndex>,
    /// Its port was down and has not seen it since.
    pub vacant: bool,
}

/// What a sweep took out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Stations that were silent for too long, or whose network is gone.
    pub aged: usize,
    /// Second entries of a station that several shards entered at the same moment.
    pub duplicates: usize,
    /// Stations that moved to ports for which there is no room.
    pub surplus: usize,
}

/// Which learned entries to flush: those that match all that is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flush {
    /// Only those of this network.
    pub network: Option<NetworkIndex>,
    /// Only those at this port.
    pub port: Option<PortIndex>,
    /// Only those of this address.
    pub mac: Option<MacAddr>,
}

impl Flush {
    fn matches(&self, key: Key, value: Value) -> bool {
        self.network.is_none_or(|network| network == key.network())
            && self.port.is_none_or(|port| port == value.port())
            && self.mac.is_none_or(|mac| mac == key.mac())
    }
}

impl Fdb {
    /// Takes out learned entries whose station has been silent for as long as `mac_age` says of its network, or whose
    /// network it does not know; forgets the moves of stations that have settled; takes out second entries of a station. Those
    /// whose port is down are marked as vacant.
    ///
    /// To be called about once a second; at least every 60 s, for the reason that `Value` in `entry` gives.
    pub fn sweep(
        &self,
        now: Tick,
        mac_age: impl Fn(NetworkIndex) -> Option<Duration>,
        is_down: impl Fn(PortIndex) -> bool,
    ) -> Swept {
        let mut swept = Swept::default();
        for slot in self.slots() {
            let Some((key, value)) = slot.entry() else { continue };
            if value.is_pinned() {
                swept.duplicates += self.remove(key, |value| !value.is_pinned());
            } else if mac_age(key.network()).is_none_or(|limit| value.age(now) >= limit) {
                swept.aged += usize::from(self.take_out(slot, value));
            } else if self.is_second(slot, key) {
                swept.duplicates += usize::from(self.take_out(slot, value));
            } else if !value.is_vacant() && is_down(value.port()) {
                slot.replace(value, value.vacated());
            } else if let Some(settled) = value.decayed(now) {
                slot.replace(value, settled);
            }
        }
        self.counts.aged.fetch_add(swept.aged as u64, Relaxed);
        swept
    }

    /// Takes stations out of networks that have more than `most` says, and out of all if the host has too many; returns how many.
    ///
    /// A station that moves brings its place along, whatever the limits are, and leaves one within the share of the port where it was:
    /// two ports could fill the table in this way. So when there are more than the limit and the shares of all ports, which nothing
    /// else leads to, those go that moved lately, or whose port is down, and are at ports that have more than their share.
    pub fn trim(&self, most: impl Fn(NetworkIndex) -> Option<usize>) -> usize {
        let of_host = || self.len() > self.most.saturating_add(PORT_MACS_SHARE as usize * PORTS);
        let of_network = |network| most(network).is_some_and(|most| self.network_macs(network) as usize > most);
        if !of_host() && !(0..NETWORKS).any(|number| of_network(NetworkIndex(number as u16))) {
            return 0;
        }
        self.take_out_all(|key, value| {
            let moved = !value.is_pinned() && (value.moves() > 0 || value.is_away() || value.is_vacant());
            moved && self.counts.is_beyond_share(value.port()) && (of_network(key.network()) || of_host())
        })
    }

    /// Takes out the learned entries that match `which`; returns how many. Pins stay.
    pub fn flush(&self, which: Flush) -> usize {
        let flushed = self.take_out_all(|key, value| !value.is_pinned() && which.matches(key, value));
        if let Some(port) = which.port {
            self.forget_home(port, |key| which.network.is_none_or(|network| network == key.network()));
        }
        flushed
    }

    /// Takes out all entries of a port that is gone, pinned ones too; returns how many. To be called when no shard
    /// forwards by tables with the port any more, or it may be learned once again.
    pub fn forget_port(&self, port: PortIndex) -> usize {
        let forgotten = self.take_out_all(|_, value| value.port() == port);
        self.forget_home(port, |_| true);
        self.counts.forget_refused(port);
        forgotten
    }

    /// Has stations belong where they are that were at `port` before they began to move, of those that `which` picks.
    fn forget_home(&self, port: PortIndex, which: impl Fn(Key) -> bool) {
        for slot in self.slots() {
            let at_home_there = |value: Value| (value.moves() > 0 || value.is_away()) && value.home() == port;
            if let Some((_, value)) = slot.entry().filter(|(key, value)| at_home_there(*value) && which(*key)) {
                // If a shard changes it just now, the port is a hint that is no good for some time.
                slot.replace(value, value.settled());
            }
        }
    }

    /// The entries, in no order. Each is what it was at some moment of the walk.
    pub fn entries(&self, now: Tick) -> impl Iterator<Item = FdbEntry> + '_ {
        self.slots().filter_map(Slot::entry).map(move |(key, value)| FdbEntry {
            network: key.network(),
            mac: key.mac(),
            port: value.port(),
            age: (!value.is_pinned()).then(|| value.age(now)),
            pinned: value.is_pinned(),
            moves: value.moves(),
            damped: value.is_damped(),
            home: (value.moves() > 0 || value.is_away()).then(|| value.home()),
            vacant: value.is_vacant(),
        })
    }

    /// Takes out the entries of `key` whose value `which` picks; returns how many.
    pub(super) fn remove(&self, key: Key, which: impl Fn(Value) -> bool) -> usize {
        let slots = self.candidates(key).into_iter().flat_map(|bucket| bucket.slots());
        slots.filter(|slot| slot.read(key).is_some_and(|value| which(value) && self.take_out(slot, value))).count()
    }

    /// Takes out one entry, if its value still is `value`.
    pub(super) fn take_out(&self, slot: &Slot, value: Value) -> bool {
        slot.remove(value).map(|key| self.counts.left(key, value)).is_some()
    }

    fn take_out_all(&self, which: impl Fn(Key, Value) -> bool) -> usize {
        let picked =
            |slot: &&Slot| slot.entry().is_some_and(|(key, value)| which(key, value) && self.take_out(slot, value));
        self.slots().filter(picked).count()
    }

    /// Whether a lookup of `key` ends at another slot than this one.
    fn is_second(&self, slot: &Slot, key: Key) -> bool {
        self.find(key).is_some_and(|(first, _)| !std::ptr::eq(first, slot))
    }
}
