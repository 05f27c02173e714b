//! What the FDB is supposed to do, said with a map and full-size numbers: the oracle of the property tests here and in
//! `switch::forward`. It has no limit on the table as a whole; the tests stay far below it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{FLAP_HOLD_DOWN, FLAP_MOVES, FLAP_WINDOW, Fdb, FdbEntry, Flush, Learned, Limits};
use crate::clock::Tick;
use crate::ident::{MacAddr, NetworkIndex, PortIndex};
use crate::limits::PORT_MACS_SHARE;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Known {
    port: PortIndex,
    seen: Tick,
    /// The port before the first of the moves.
    home: PortIndex,
    moves: u8,
    damped: bool,
    tried: Tick,
    vacant: bool,
    pinned: bool,
}

impl Known {
    fn new(port: PortIndex, seen: Tick) -> Self {
        let tried = Tick(0);
        Self { port, seen, home: port, moves: 0, damped: false, tried, vacant: false, pinned: false }
    }

    /// What a sighting at another port leads to, and whether it is followed.
    fn moved(self, port: PortIndex, now: Tick) -> (Self, bool) {
        let quiet = now.since(self.tried);
        let there = Self { port, seen: now, tried: now, ..self };
        if self.vacant {
            return (Self { home: self.port, moves: 0, damped: false, vacant: false, ..there }, true);
        }
        if self.damped && quiet < FLAP_HOLD_DOWN {
            let free = port == self.home || now.since(self.seen) >= FLAP_WINDOW;
            return if free { (there, true) } else { (Self { tried: now, ..self }, false) };
        }
        if self.damped || self.moves == 0 || quiet >= FLAP_WINDOW {
            let may_come_back = !self.damped && quiet < FLAP_HOLD_DOWN;
            let home = if may_come_back { self.home } else { self.port };
            return (Self { home, moves: 1, damped: false, ..there }, true);
        }
        let moves = self.moves + 1;
        if moves <= FLAP_MOVES {
            return (Self { moves, ..there }, true);
        }
        let seen = if self.port == self.home { self.seen } else { now };
        (Self { port: self.home, seen, moves, damped: true, tried: now, ..self }, port == self.home)
    }

    fn has_home(&self) -> bool {
        self.moves > 0 || self.home != self.port
    }

    fn settle(&mut self) {
        (self.home, self.moves, self.damped, self.tried) = (self.port, 0, false, Tick(0));
    }
}

#[derive(Debug, Default)]
pub(in crate::switch) struct Model(BTreeMap<(NetworkIndex, MacAddr), Known>);

impl Model {
    pub(in crate::switch) fn learn(
        &mut self,
        network: NetworkIndex,
        mac: MacAddr,
        port: PortIndex,
        limits: Limits,
        now: Tick,
    ) -> Learned {
        let port_is_full = self.learned(|_, p| p == port) >= limits.port as usize;
        let has_share = self.learned(|_, p| p == port) >= PORT_MACS_SHARE as usize;
        let network_is_full = has_share && self.learned(|n, _| n == network) >= limits.network as usize;
        let Some(known) = self.0.get_mut(&(network, mac)) else {
            if port_is_full || network_is_full {
                return Learned::Refused;
            }
            self.0.insert((network, mac), Known::new(port, now));
            return Learned::New;
        };
        if known.port == port {
            // Within the tick in which it was seen last nothing is written.
            if known.vacant && known.seen != now {
                *known = Known::new(port, now);
            } else if !known.pinned {
                known.seen = now;
            }
            return Learned::Known;
        }
        if known.pinned {
            return Learned::Pinned;
        }
        let (next, followed) = known.moved(port, now);
        if followed && port_is_full {
            return Learned::Refused;
        }
        *known = next;
        if followed { Learned::Moved } else { Learned::Damped }
    }

    pub(in crate::switch) fn lookup(&self, network: NetworkIndex, mac: MacAddr) -> Option<PortIndex> {
        self.0.get(&(network, mac)).map(|known| known.port)
    }

    pub(in crate::switch) fn pin(&mut self, network: NetworkIndex, mac: MacAddr, port: PortIndex) {
        self.0.insert((network, mac), Known { pinned: true, ..Known::new(port, Tick(0)) });
    }

    pub(in crate::switch) fn unpin(&mut self, network: NetworkIndex, mac: MacAddr) -> bool {
        let pinned = self.0.get(&(network, mac)).is_some_and(|known| known.pinned);
        if pinned {
            self.0.remove(&(network, mac));
        }
        pinned
    }

    pub(in crate::switch) fn sweep(
        &mut self,
        now: Tick,
        mac_age: impl Fn(NetworkIndex) -> Option<Duration>,
        is_down: impl Fn(PortIndex) -> bool,
    ) -> usize {
        let aged = self.retain(|network, known| {
            known.pinned || mac_age(network).is_some_and(|limit| now.since(known.seen) < limit)
        });
        for known in self.0.values_mut().filter(|known| !known.pinned) {
            if is_down(known.port) || now.since(known.tried) >= FLAP_HOLD_DOWN {
                known.settle();
            }
            known.vacant |= is_down(known.port);
        }
        aged
    }

    pub(in crate::switch) fn flush(&mut self, which: Flush) -> usize {
        let Flush { network, port, .. } = which;
        let in_network = |n| network.is_none_or(|network| network == n);
        let flushed = self.retain(|n, known| known.pinned || !in_network(n) || port.is_some_and(|p| p != known.port));
        if let Some(port) = port {
            self.forget_home(port, in_network);
        }
        flushed
    }

    pub(in crate::switch) fn forget_port(&mut self, port: PortIndex) -> usize {
        let forgotten = self.retain(|_, known| known.port != port);
        self.forget_home(port, |_| true);
        forgotten
    }

    fn forget_home(&mut self, port: PortIndex, which: impl Fn(NetworkIndex) -> bool) {
        let known = self.0.iter_mut().filter(|((network, _), known)| which(*network) && known.home == port);
        known.filter(|(_, known)| known.has_home()).for_each(|(_, known)| known.settle());
    }

    /// Fails the test unless `fdb` has the very same entries and counts them rightly.
    pub(in crate::switch) fn assert_same(&self, fdb: &Fdb, now: Tick) {
        let mut got: Vec<_> = fdb.entries(now).collect();
        got.sort_unstable_by_key(|entry| (entry.network, entry.mac));
        let want = self.0.iter().map(|(&(network, mac), known)| FdbEntry {
            network,
            mac,
            port: known.port,
            age: (!known.pinned).then(|| now.since(known.seen)),
            pinned: known.pinned,
            moves: known.moves,
            damped: known.damped,
            home: known.has_home().then_some(known.home),
            vacant: known.vacant,
        });
        assert_eq!(got, want.collect::<Vec<_>>());
        assert_eq!(fdb.len(), got.len());
        for index in 0..8 {
            let (network, port) = (NetworkIndex(index), PortIndex(index));
            assert_eq!(fdb.network_macs(network) as usize, self.learned(|n, _| n == network), "{network:?}");
            assert_eq!(fdb.port_macs(port) as usize, self.learned(|_, p| p == port), "{port:?}");
        }
    }

    fn learned(&self, which: impl Fn(NetworkIndex, PortIndex) -> bool) -> usize {
        self.0.iter().filter(|((network, _), known)| !known.pinned && which(*network, known.port)).count()
    }

    fn retain(&mut self, keep: impl Fn(NetworkIndex, &Known) -> bool) -> usize {
        let before = self.0.len();
        self.0.retain(|(network, _), known| keep(*network, known));
        before - self.0.len()
    }
}
