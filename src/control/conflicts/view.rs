//! What whoever looks sees of conflicts: [`ConflictsView`], published each time that the shards' notes were taken in.
//!
//! Guests choose how many conflicts there are, so nobody who looks keeps others from looking or noting, and what is made out for a
//! port is what there is of that port, not what all ports together have caused.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Conflicts;
use crate::clock::Instant;
use crate::control::report::{ConflictReason, ConflictReport, LoopReport};
use crate::ident::MacAddr;

/// Conflicts and loops as they were noted last.
#[derive(Debug, Default)]
pub(in crate::control) struct ConflictsView {
    /// When that was.
    now: Instant,
    /// By network, address, and port.
    seen: Vec<Seen>,
    /// Which of these each port has a part in.
    by_port: BTreeMap<Arc<str>, Vec<usize>>,
    loops: Vec<LoopReport>,
    /// The ports of these.
    looped: BTreeSet<Arc<str>>,
}

/// A station at a port where it is not.
#[derive(Debug)]
struct Seen {
    network: Arc<str>,
    mac: MacAddr,
    reason: ConflictReason,
    port: Arc<str>,
    stays_at: Arc<str>,
    count: u64,
    last: Instant,
}

impl ConflictsView {
    /// What `conflicts` has.
    pub(super) fn of(conflicts: &Conflicts) -> Self {
        let seen: Vec<_> = seen(conflicts).collect();
        let mut by_port: BTreeMap<_, Vec<usize>> = BTreeMap::new();
        for (at, Seen { port, stays_at, .. }) in seen.iter().enumerate() {
            for port in [port, stays_at] {
                by_port.entry(Arc::clone(port)).or_default().push(at);
            }
        }
        let looped = conflicts.loops.keys().flat_map(|(_, first, second)| [first, second].map(Arc::clone)).collect();
        Self { now: conflicts.now, seen, by_port, loops: loops(conflicts), looped }
    }

    /// The conflicts that port `port` has a part in.
    pub(in crate::control) fn of_port(&self, port: &str) -> Vec<ConflictReport> {
        self.part_of(port).map(|seen| seen.report(self.now)).collect()
    }

    /// The same, before anything is made out of it. Nothing else is gone through: its length is known before.
    fn part_of(&self, port: &str) -> impl ExactSizeIterator<Item = &Seen> {
        let part = self.by_port.get(port).map(Vec::as_slice).unwrap_or_default();
        part.iter().map(|&at| &self.seen[at])
    }

    /// The ports where a station is seen, too.
    pub(in crate::control) fn also_at(&self, network: &str, mac: MacAddr) -> Vec<String> {
        let begin = self.seen.partition_point(|seen| seen.station() < (network, mac));
        let alike = self.seen.iter().skip(begin).take_while(|seen| seen.station() == (network, mac));
        alike.map(|seen| seen.port.to_string()).collect()
    }

    /// Ports that seem to be connected to each other.
    pub(in crate::control) fn loops(&self) -> &[LoopReport] {
        &self.loops
    }

    /// Whether port `port` seems to be connected to another one.
    pub(in crate::control) fn is_in_loop(&self, port: &str) -> bool {
        self.looped.contains(port)
    }
}

impl Seen {
    fn station(&self) -> (&str, MacAddr) {
        (&self.network, self.mac)
    }

    fn report(&self, now: Instant) -> ConflictReport {
        ConflictReport {
            mac: self.mac.to_string(),
            reason: self.reason,
            port: self.port.to_string(),
            stays_at: self.stays_at.to_string(),
            count: self.count,
            seconds_ago: now.since(self.last).as_secs(),
        }
    }
}

fn seen(conflicts: &Conflicts) -> impl Iterator<Item = Seen> {
    conflicts.stations.iter().flat_map(|((network, mac), conflict)| {
        conflict.sightings.iter().map(|(port, sighting)| Seen {
            network: Arc::clone(network),
            mac: *mac,
            reason: conflict.reason,
            port: Arc::clone(port),
            stays_at: Arc::clone(&conflict.stays_at),
            count: sighting.count,
            last: sighting.last,
        })
    })
}

fn loops(conflicts: &Conflicts) -> Vec<LoopReport> {
    let reports = conflicts.loops.iter().map(|((network, first, second), suspected)| LoopReport {
        network: network.to_string(),
        ports: [first.to_string(), second.to_string()].into(),
        stations: suspected.stations,
    });
    reports.collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::tests::{incident, note};
    use super::*;
    use crate::limits::PORT_CONFLICTS;
    use crate::switch::IncidentKind;

    #[test]
    fn what_is_made_out_for_a_port_is_its_own() {
        // Ports 40 and up send with the addresses of ports 0 and up, all of them.
        let (senders, owners) = (40..80, 0..u8::try_from(PORT_CONFLICTS).unwrap());
        let pairs = senders.clone().flat_map(|port| owners.clone().map(move |owner| (port, owner)));
        let seen = pairs.map(|(port, owner)| incident(IncidentKind::Pinned, owner, port, owner.into(), 3));
        let mut conflicts = Conflicts::default();
        note(&mut conflicts, 0, &seen.collect::<Vec<_>>());
        let view = ConflictsView::of(&conflicts);
        let lengths = |ports: std::ops::Range<u16>| ports.map(|port| view.part_of(&format!("p{port}")).len());
        assert!(lengths(senders.clone()).all(|length| length == PORT_CONFLICTS));
        assert!(lengths(0..u16::from(owners.end)).all(|length| length == senders.len()));
        assert_eq!(view.part_of("p85").len(), 0);
        // A port's own reports, each once, by address and port.
        let reports: Vec<_> = view.of_port("p41").into_iter().map(|r| (r.mac, r.port, r.stays_at, r.count)).collect();
        let own = |owner: u8| (format!("02:00:00:00:00:{owner:02x}"), "p41".to_string(), format!("p{owner}"), 3);
        assert_eq!(reports, owners.map(own).collect::<Vec<_>>());
        let of_owner: Vec<_> = view.of_port("p7").into_iter().map(|report| (report.port, report.stays_at)).collect();
        let sent = |port: u16| (format!("p{port}"), "p7".to_string());
        assert_eq!(of_owner, senders.clone().map(sent).collect::<Vec<_>>());
        let ports = senders.map(|port| format!("p{port}")).collect::<Vec<_>>();
        assert_eq!(view.also_at("lan", MacAddr([2, 0, 0, 0, 0, 7])), ports);
        assert!(
            view.also_at("lan", MacAddr([2, 0, 0, 0, 0, 99])).is_empty()
                && view.also_at("other", MacAddr([2, 0, 0, 0, 0, 7])).is_empty()
        );
    }
}
