//! How many descriptors the relay has in hand, and of which port: [`Ledger`].
//!
//! A file system that never answers holds two threads of a port's, and behind them lies all that comes for the port meanwhile. So
//! each port has a share, and while it has that in hand nothing more is read of it, and the daemon accepts no connections for it.
//! How many come with a message is known when they are here: what a port has is its share and those of one message at most.
//!
//! Nor is anything read where those of one message might not find room: the kernel closes what it finds no number for, on the
//! thread that reads, and that may take for ever.

use std::collections::{BTreeSet, HashMap};

use super::kept::Kept;
use super::link::MOST;

/// The number of no port: news of the relay as a whole.
pub(super) const ALL_PORTS: u64 = 0;

/// What a port may have in hand of messages, and of connections that are being closed, beside two connections' eventfds.
const SHARE: usize = 64;

/// What there is, by who has it: a link or a job, by its number.
pub(super) struct Ledger {
    /// All that may be in hand.
    most: usize,
    total: usize,
    /// The port of each, and how many it has.
    holders: HashMap<u64, (u64, usize)>,
    ports: HashMap<u64, Port>,
    /// Ports that are full now and were not, or the other way round.
    changed: BTreeSet<u64>,
}

struct Port {
    count: usize,
    share: usize,
}

impl Port {
    /// One with so many rings. A connection may come while the eventfds of the last one are being closed.
    fn new(rings: u32) -> Self {
        Self { count: 0, share: SHARE + 2 * Kept::most(rings) }
    }

    fn is_full(&self) -> bool {
        self.count >= self.share
    }
}

impl Ledger {
    /// One of a process that may have so many in hand.
    pub(super) fn new(most: usize) -> Self {
        let (holders, ports, changed) = Default::default();
        Self { most, total: 0, holders, ports, changed }
    }

    /// A connection comes to a port with so many rings.
    pub(super) fn admit(&mut self, port: u64, rings: u32) {
        self.change(port, |entry| entry.share = Port::new(rings).share);
    }

    /// Changes what a port has or may have, and notes whether it is full as news.
    fn change(&mut self, port: u64, change: impl FnOnce(&mut Port)) {
        let entry = self.ports.entry(port).or_insert_with(|| Port::new(0));
        let was_full = entry.is_full();
        change(entry);
        if was_full != entry.is_full() {
            self.toggle(port);
        }
    }

    /// What was last told of a port is not so any more, or so again; or it could not be told.
    pub(super) fn toggle(&mut self, port: u64) {
        if !self.changed.remove(&port) {
            self.changed.insert(port);
        }
    }

    /// A link or job of a port has so many now.
    pub(super) fn set(&mut self, holder: u64, port: u64, count: usize) {
        let before = match count {
            0 => self.holders.remove(&holder),
            _ => self.holders.insert(holder, (port, count)),
        };
        let before = before.map_or(0, |(_, before)| before);
        let was_crowded = self.is_crowded();
        self.total = self.total + count - before;
        if was_crowded != self.is_crowded() {
            self.toggle(ALL_PORTS);
        }
        self.change(port, |entry| entry.count = entry.count + count - before);
        if self.ports.get(&port).is_some_and(|entry| entry.count == 0) {
            self.ports.remove(&port);
        }
    }

    /// Whether another message of a port may be read.
    pub(super) fn has_room(&self, port: u64) -> bool {
        !self.is_crowded() && !self.is_full(port)
    }

    /// All ports together have so much that nothing is read of any.
    fn is_crowded(&self) -> bool {
        self.total + MOST > self.most
    }

    fn is_full(&self, port: u64) -> bool {
        if port == ALL_PORTS { self.is_crowded() } else { self.ports.get(&port).is_some_and(Port::is_full) }
    }

    /// Ports of which that is news, and whether they are full; [`ALL_PORTS`] among them.
    pub(super) fn news(&mut self) -> Vec<(u64, bool)> {
        let changed = std::mem::take(&mut self.changed);
        changed.into_iter().map(|port| (port, self.is_full(port))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_has_its_share_and_one_message_and_says_when() {
        let mut ledger = Ledger::new(10_000);
        ledger.admit(1, 2);
        let share = Port::new(2).share;
        ledger.set(10, 1, share - 1);
        assert!(ledger.has_room(1) && ledger.news().is_empty());
        ledger.set(11, 1, MOST);
        assert!(!ledger.has_room(1) && ledger.has_room(2));
        assert_eq!(ledger.news(), [(1, true)]);
        assert!(ledger.news().is_empty(), "it is told once");
        ledger.set(11, 1, 0);
        assert_eq!(ledger.news(), [(1, false)]);
        // What is over before it was told is none.
        ledger.set(11, 1, 1);
        ledger.set(11, 1, 0);
        assert!(ledger.news().is_empty());
        ledger.set(10, 1, 0);
        assert!(ledger.ports.is_empty() && ledger.holders.is_empty() && ledger.total == 0);
    }

    #[test]
    fn a_port_that_may_have_more_is_not_full_any_more_and_says_so() {
        let mut ledger = Ledger::new(10_000);
        // Connections that nobody wants are here before the first that comes to its rings.
        ledger.set(10, 1, Port::new(0).share);
        assert_eq!(ledger.news(), [(1, true)]);
        ledger.admit(1, 2);
        assert_eq!(ledger.news(), [(1, false)]);
        // What could not be told is news until it is, or is over.
        ledger.set(11, 1, MOST);
        assert_eq!(ledger.news(), [(1, true)]);
        ledger.toggle(1);
        assert_eq!(ledger.news(), [(1, true)]);
        ledger.toggle(1);
        ledger.set(11, 1, 0);
        assert!(ledger.news().is_empty());
    }

    #[test]
    fn nothing_is_read_where_a_message_may_not_find_room() {
        let mut ledger = Ledger::new(2 * MOST);
        ledger.set(10, 1, MOST);
        assert!(ledger.has_room(2));
        ledger.set(11, 2, 1);
        assert!(!ledger.has_room(2) && !ledger.has_room(3));
        assert!(ledger.news().contains(&(ALL_PORTS, true)));
        ledger.set(10, 1, 1);
        assert!(ledger.has_room(2) && ledger.has_room(3));
        assert!(ledger.news().contains(&(ALL_PORTS, false)));
    }
}
