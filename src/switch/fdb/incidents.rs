//! What shards see and the control side tells: stations that moved, or were seen where they are not ([`Incidents`]).
//!
//! Shards note, the control side takes out once a second. Each slot has a state of one word, and whoever changes that from
//! [`FREE`] or [`FULL`] to [`TAKEN`] has the slot to itself for a few stores; nobody waits: a shard that finds a slot taken, or none
//! free, counts what it could not note. All of this is off the path of frames that come from where they should.
//!
//! The slots are in groups, chosen by the port at which the station was seen, so that a port that causes incidents all the
//! time does not hide those of most others.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::entry::Key;
use crate::ident::{MacAddr, NetworkIndex, PortIndex};

/// What happened to a station.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum IncidentKind {
    /// It moved.
    Moved,
    /// It was seen at a port and stays at another, because it has moved too often.
    Damped,
    /// It was seen at a port and is pinned at another.
    Pinned,
}

/// Something that happened to a station, so many times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incident {
    /// What.
    pub kind: IncidentKind,
    /// The station's network.
    pub network: NetworkIndex,
    /// Its address.
    pub mac: MacAddr,
    /// Where it was seen.
    pub port: PortIndex,
    /// Where it was when it moved, or else where it stays.
    pub other: PortIndex,
    /// How often. Frames that follow each other with the same source count once.
    pub count: u32,
}

const GROUPS: usize = 32;
const GROUP_SLOTS: usize = 8;

/// States of a slot.
const FREE: u32 = 0;
const TAKEN: u32 = 1;
const FULL: u32 = 2;

/// The incidents since they were taken out last.
#[derive(Debug)]
pub(super) struct Incidents {
    groups: Box<[[Slot; GROUP_SLOTS]]>,
    /// Those that found no slot.
    lost: AtomicU64,
}

/// One incident, or room for one. The fields are valid for whoever has taken the slot.
#[derive(Debug, Default)]
struct Slot {
    state: AtomicU32,
    count: AtomicU32,
    key: AtomicU64,
    /// From the lowest bit 16 bits port, 16 bits other port, then the kind.
    what: AtomicU64,
}

impl Slot {
    /// Takes the slot, if it is in state `from`.
    fn take(&self, from: u32) -> bool {
        self.state.compare_exchange(from, TAKEN, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    fn give(&self, state: u32) {
        self.state.store(state, Ordering::Release);
    }

    fn has(&self, key: Key, what: u64) -> bool {
        self.key.load(Ordering::Relaxed) == key.0 && self.what.load(Ordering::Relaxed) == what
    }

    /// Counts the same incident once more, if it is that.
    fn repeat(&self, key: Key, what: u64) -> bool {
        if !self.has(key, what) || !self.take(FULL) {
            return false;
        }
        // It may have become another one's in between.
        let same = self.has(key, what);
        if same {
            self.count.store(self.count.load(Ordering::Relaxed).saturating_add(1), Ordering::Relaxed);
        }
        self.give(FULL);
        same
    }

    fn enter(&self, key: Key, what: u64) -> bool {
        let free = self.take(FREE);
        if free {
            self.key.store(key.0, Ordering::Relaxed);
            self.what.store(what, Ordering::Relaxed);
            self.count.store(1, Ordering::Relaxed);
            self.give(FULL);
        }
        free
    }

    fn empty(&self) -> Option<Incident> {
        if !self.take(FULL) {
            return None;
        }
        let (key, what) = (Key(self.key.load(Ordering::Relaxed)), self.what.load(Ordering::Relaxed));
        let count = self.count.load(Ordering::Relaxed);
        self.give(FREE);
        let kind = match what >> 32 {
            0 => IncidentKind::Moved,
            1 => IncidentKind::Damped,
            _ => IncidentKind::Pinned,
        };
        let (port, other) = (PortIndex(what as u16), PortIndex((what >> 16) as u16));
        Some(Incident { kind, network: key.network(), mac: key.mac(), port, other, count })
    }
}

impl Default for Incidents {
    fn default() -> Self {
        Self { groups: (0..GROUPS).map(|_| Default::default()).collect(), lost: AtomicU64::new(0) }
    }
}

impl Incidents {
    /// Notes one. Never waits.
    pub(super) fn note(&self, kind: IncidentKind, key: Key, port: PortIndex, other: PortIndex) {
        let group = &self.groups[port.index() % GROUPS];
        let what = (kind as u64) << 32 | u64::from(other.0) << 16 | u64::from(port.0);
        let noted = group.iter().any(|slot| slot.repeat(key, what)) || group.iter().any(|slot| slot.enter(key, what));
        if !noted {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes out what was noted, in no order, and how many could not be.
    pub(super) fn take(&self) -> (Vec<Incident>, u64) {
        let incidents = self.groups.iter().flatten().filter_map(Slot::empty).collect();
        (incidents, self.lost.swap(0, Ordering::Relaxed))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn key(number: u8) -> Key {
        Key::new(NetworkIndex(1), MacAddr([2, 0, 0, 0, 0, number]))
    }

    #[test]
    fn an_incident_is_noted_once_and_counted() {
        let incidents = Incidents::default();
        for _ in 0..3 {
            incidents.note(IncidentKind::Damped, key(1), PortIndex(4095), PortIndex(7));
        }
        incidents.note(IncidentKind::Moved, key(1), PortIndex(4095), PortIndex(7));
        let (taken, lost) = incidents.take();
        let damped = Incident {
            kind: IncidentKind::Damped,
            network: NetworkIndex(1),
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            port: PortIndex(4095),
            other: PortIndex(7),
            count: 3,
        };
        assert_eq!((taken, lost), (vec![damped, Incident { kind: IncidentKind::Moved, count: 1, ..damped }], 0));
        assert_eq!(incidents.take(), (Vec::new(), 0));
    }

    #[test]
    fn a_noisy_port_leaves_room_for_others() {
        let incidents = Incidents::default();
        (0..100).for_each(|n| incidents.note(IncidentKind::Damped, key(n), PortIndex(3), PortIndex(4)));
        incidents.note(IncidentKind::Damped, key(200), PortIndex(4), PortIndex(3));
        let (taken, lost) = incidents.take();
        assert_eq!((taken.len(), lost), (GROUP_SLOTS + 1, 100 - GROUP_SLOTS as u64));
        assert!(taken.iter().any(|incident| incident.port == PortIndex(4)));
    }

    /// No incident names ports that it is not about, and none is counted twice, whoever notes and takes at once.
    #[test]
    fn shards_note_while_the_control_side_takes() {
        let rounds: u32 = if cfg!(miri) { 50 } else { 20_000 };
        let incidents = Incidents::default();
        let mut total = 0;
        std::thread::scope(|scope| {
            let shards: Vec<_> = (0..3u8)
                .map(|shard| {
                    let incidents = &incidents;
                    scope.spawn(move || {
                        for round in 0..rounds {
                            let number = (round % 5) as u8 * 3 + shard;
                            let ports = (PortIndex(u16::from(number)), PortIndex(u16::from(number) + 100));
                            incidents.note(IncidentKind::Pinned, key(number), ports.0, ports.1);
                        }
                    })
                })
                .collect();
            loop {
                let last = shards.iter().all(|shard| shard.is_finished());
                let (taken, lost) = incidents.take();
                for incident in &taken {
                    let number = u16::from(incident.mac.0[5]);
                    assert_eq!((incident.port.0, incident.other.0), (number, number + 100));
                }
                total += taken.iter().map(|incident| u64::from(incident.count)).sum::<u64>() + lost;
                if last {
                    break;
                }
            }
        });
        assert_eq!(total, 3 * u64::from(rounds));
    }
}

/// `cargo test --release --manifest-path tests/loom/Cargo.toml`.
#[cfg(all(test, loom))]
mod loom_tests {
    #![allow(clippy::unwrap_used)]

    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    fn key(number: u8) -> Key {
        Key::new(NetworkIndex(1), MacAddr([2, 0, 0, 0, 0, number]))
    }

    /// Port and other port of the incident with this number.
    fn what(number: u8) -> u64 {
        (u64::from(number) + 100) << 16 | u64::from(number)
    }

    fn assert_sound(incident: Incident) {
        let number = incident.mac.0[5];
        assert_eq!((incident.port, incident.other), (PortIndex(number.into()), PortIndex(u16::from(number) + 100)));
    }

    /// A slot that is emptied and becomes another incident's while a shard counts the first one again.
    #[test]
    fn nothing_is_counted_for_another_incident() {
        loom::model(|| {
            let slot = Arc::new(Slot::default());
            assert!(slot.enter(key(1), what(1)));
            let other = slot.clone();
            let taker = thread::spawn(move || {
                let taken = other.empty();
                let entered = taken.is_some() && other.enter(key(2), what(2));
                (taken, entered)
            });
            let repeated = slot.repeat(key(1), what(1));
            let (taken, entered) = taker.join().unwrap();
            taken.into_iter().for_each(assert_sound);
            let first = taken.map_or(0, |incident| incident.count);
            let left = slot.empty().inspect(|&incident| assert_sound(incident));
            let second = left.map_or(0, |incident| incident.count);
            if entered {
                assert_eq!((first, second), (1 + u32::from(repeated), 1));
            } else {
                assert_eq!(first + second, 1 + u32::from(repeated));
            }
        });
    }

    /// Two shards that note the same incident: none is lost, or its note says so.
    #[test]
    fn what_is_noted_is_told_once() {
        loom::model(|| {
            let slot = Arc::new(Slot::default());
            let note = |slot: &Slot| slot.repeat(key(1), what(1)) || slot.enter(key(1), what(1));
            let other = slot.clone();
            let rival = thread::spawn(move || note(&other));
            let mine = note(&slot);
            let theirs = rival.join().unwrap();
            let count = slot.empty().map_or(0, |incident| incident.count);
            assert_eq!(count, u32::from(mine) + u32::from(theirs));
            assert_eq!(slot.empty(), None);
        });
    }
}
