//! Ports whose stations are not learned because a limit is reached, told as events: [`Refusals`], from the FDB's counters, once a
//! second.
//!
//! Each limit is told of when it refuses for the first time, and as long as it goes on once a minute, with how many there were
//! since the last time. What finds no place for a second, until the FDB has grown, is counted only.

use std::time::Duration;

use super::events::{AddressLimit, Event, Events};
use crate::clock::Instant;
use crate::config::{NetworkPlan, PortPlan};
use crate::ident::Name;
use crate::limits::FDB_ENTRIES;
use crate::switch::MacLimit;

/// How often a limit that goes on refusing is told.
const REMINDER: Duration = Duration::from_secs(60);

/// What is going on at one port.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Refusals([Watch; MacLimit::COUNT]);

/// What is going on with one limit.
#[derive(Debug, Clone, Copy, Default)]
struct Watch {
    /// The counter, as it was told last.
    seen: u64,
    told: Option<Instant>,
}

impl Refusals {
    /// Looks at how many stations of port `name` were `refused`, and tells of them if it is time. To be called once a second.
    pub(super) fn look(
        &mut self,
        now: Instant,
        name: &Name,
        (port, network): (&PortPlan, &NetworkPlan),
        refused: [u64; MacLimit::COUNT],
        events: &Events,
    ) {
        for (at, limit) in MacLimit::ALL.into_iter().enumerate() {
            let (limit, most) = match limit {
                MacLimit::Port => (AddressLimit::Port, u64::from(port.macs)),
                MacLimit::Network => (AddressLimit::Network, u64::from(network.mac_limit)),
                MacLimit::Host => (AddressLimit::Host, FDB_ENTRIES as u64),
                MacLimit::Place => continue,
            };
            if let Some(count) = self.0[at].look(now, refused[at]) {
                let (network, port) = (port.network.to_string(), name.to_string());
                events.record(Event::AddressesRefused { network, port, limit, most, count });
            }
        }
    }
}

impl Watch {
    /// How many are to be told of.
    fn look(&mut self, now: Instant, refused: u64) -> Option<u64> {
        let count = refused.saturating_sub(self.seen);
        let is_due = self.told.is_none_or(|told| now.since(told) >= REMINDER);
        (count > 0 && is_due).then(|| {
            *self = Self { seen: refused, told: Some(now) };
            count
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_at_once_and_then_once_a_minute_while_they_go_on() {
        let mut watch = Watch::default();
        let mut look = |second: u64, refused| watch.look(Instant(second * 1_000_000_000), refused);
        assert_eq!([look(0, 0), look(1, 5), look(2, 9), look(60, 20)], [None, Some(5), None, None]);
        assert_eq!([look(61, 30), look(62, 30), look(121, 30)], [Some(25), None, None]);
        assert_eq!([look(500, 30), look(501, 31), look(502, 32)], [None, Some(1), None]);
    }
}
