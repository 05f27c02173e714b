//! What the FDB is supposed to do, said with a map and full-size numbers: the oracle of the property tests here and in
//! `switch::forward`. It has no limit on the table as a whole; the tests stay far below it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{FLAP_HOLD_DOWN, FLAP_MOVES, FLAP_WINDOW, Fdb, Learned, Limits};
use crate::clock::Tick;
use crate::ident::{MacAddr, NetworkIndex, PortIndex};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Known {
    port: PortIndex,
    seen: Tick,
    moves: u8,
    tried: Tick,
    pinned: bool,
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
        let network_is_full = self.learned(|n, _| n == network) >= limits.network as usize;
        let Some(known) = self.0.get_mut(&(network, mac)) else {
            if port_is_full || network_is_full {
                return Learned::Refused;
            }
            self.0.insert((network, mac), Known { port, seen: now, moves: 0, tried: Tick(0), pinned: false });
            return Learned::New;
        };
        if known.port == port {
            if !known.pinned {
                known.seen = now;
            }
            return Learned::Known;
        }
        if known.pinned {
            return Learned::Pinned;
        }
        let quiet = now.since(known.tried);
        let damped = known.moves > FLAP_MOVES;
        let fresh = known.moves == 0 || quiet >= if damped { FLAP_HOLD_DOWN } else { FLAP_WINDOW };
        if !fresh && known.moves >= FLAP_MOVES {
            (known.moves, known.tried) = (FLAP_MOVES + 1, now);
            return Learned::Damped;
        }
        if port_is_full {
            return Learned::Refused;
        }
        let moves = if fresh { 1 } else { known.moves + 1 };
        *known = Known { port, seen: now, moves, tried: now, pinned: false };
        Learned::Moved
    }

    pub(in crate::switch) fn lookup(&self, network: NetworkIndex, mac: MacAddr) -> Option<PortIndex> {
        self.0.get(&(network, mac)).map(|known| known.port)
    }

    pub(in crate::switch) fn pin(&mut self, network: NetworkIndex, mac: MacAddr, port: PortIndex) {
        self.0.insert((network, mac), Known { port, seen: Tick(0), moves: 0, tried: Tick(0), pinned: true });
    }

    pub(in crate::switch) fn unpin(&mut self, network: NetworkIndex, mac: MacAddr) -> bool {
        let pinned = self.0.get(&(network, mac)).is_some_and(|known| known.pinned);
        if pinned {
            self.0.remove(&(network, mac));
        }
        pinned
    }

    pub(in crate::switch) fn sweep(&mut self, now: Tick, mac_age: impl Fn(NetworkIndex) -> Option<Duration>) -> usize {
        let aged = self.retain(|network, known| {
            known.pinned || mac_age(network).is_some_and(|limit| now.since(known.seen) < limit)
        });
        for known in self.0.values_mut().filter(|known| now.since(known.tried) >= FLAP_HOLD_DOWN) {
            known.moves = 0;
        }
        aged
    }

    pub(in crate::switch) fn flush(&mut self, network: NetworkIndex) -> usize {
        self.retain(|n, known| known.pinned || n != network)
    }

    pub(in crate::switch) fn forget_port(&mut self, port: PortIndex) -> usize {
        self.retain(|_, known| known.port != port)
    }

    /// Fails the test unless `fdb` has the very same entries and counts them rightly.
    pub(in crate::switch) fn assert_same(&self, fdb: &Fdb, now: Tick) {
        let row = |network, mac, port, age, pinned, moves| (network, mac, port, age, pinned, moves);
        let mut got: Vec<_> =
            fdb.entries(now).map(|e| row(e.network, e.mac, e.port, e.age, e.pinned, e.moves)).collect();
        got.sort_unstable();
        let want = self.0.iter().map(|(&(network, mac), known)| {
            row(network, mac, known.port, (!known.pinned).then(|| now.since(known.seen)), known.pinned, known.moves)
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
