//! Stations that are seen at ports where they are not, as the shards noted it, told as events and kept for whoever looks:
//! [`Conflicts`]. And what they say together: that two ports are connected to each other.
//!
//! A conflict goes on being told once a minute and is forgotten when nothing was seen of it for the FDB's hold-down. Ports are
//! kept by name, because numbers are given to others. What one port can cause is bounded, so that it hides no other's. Who looks
//! sees a copy ([`ConflictsView`]). What may be flooded of ports whose bounds are `auto` goes by it: it is bounded as long as they
//! seem to be connected.

mod view;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::Controller;
use super::events::{Event, Events};
use super::kinds;
use super::report::ConflictReason;
use crate::clock::Instant;
use crate::ident::{MacAddr, NetworkIndex, PortIndex};
use crate::limits::PORT_CONFLICTS;
use crate::switch::{FLAP_HOLD_DOWN, FLAP_WINDOW, Incident, IncidentKind};
pub(super) use view::ConflictsView;

/// How often a conflict, or a loop, that goes on is told.
const REMINDER: Duration = Duration::from_secs(60);

/// How many stations have to be seen at two ports for these to be found connected to each other: what one sends may as well
/// come from several machines that have one address.
const LOOP_STATIONS: u64 = 2;

/// A network and two of its ports, in order.
type Pair = (Arc<str>, Arc<str>, Arc<str>);

/// What is going on.
#[derive(Debug, Default)]
pub(super) struct Conflicts {
    /// When the shards' notes were taken in last.
    now: Instant,
    stations: BTreeMap<(Arc<str>, MacAddr), Conflict>,
    /// When each pair of ports was told of last, and when it was seen last.
    loops: BTreeMap<Pair, Loop>,
    omitted: Omitted,
}

/// What the shards had no room to note, and was not told yet.
#[derive(Debug, Default)]
struct Omitted {
    count: u64,
    told: Option<Instant>,
}

/// One station that is seen at other ports than its own.
#[derive(Debug)]
struct Conflict {
    reason: ConflictReason,
    stays_at: Arc<str>,
    /// Where it is seen, too.
    sightings: BTreeMap<Arc<str>, Sighting>,
}

#[derive(Debug, Default)]
struct Sighting {
    last: Instant,
    count: u64,
    untold: u64,
    told: Option<Instant>,
}

#[derive(Debug)]
struct Loop {
    last: Instant,
    told: Option<Instant>,
    stations: u64,
}

/// Stations that are seen at both of two ports.
#[derive(Debug, Default, Clone, Copy)]
struct Common {
    /// Those that are at neither.
    of_others: u64,
    /// Those that are at one of the two.
    own: u64,
}

impl Common {
    fn stations(self) -> u64 {
        self.of_others + self.own
    }

    /// Whether that is how a loop begins, or, if there `is_known` to be one, how it goes on.
    fn is_loop(self, is_known: bool) -> bool {
        self.of_others > 0 && (is_known || self.stations() >= LOOP_STATIONS)
    }
}

/// What an incident is about, by name; nothing for a port or a network that has gone since.
struct Named {
    network: Arc<str>,
    port: Arc<str>,
    other: Arc<str>,
}

impl Conflicts {
    /// Takes in what the shards noted, and records what is new or goes on.
    fn note(
        &mut self,
        now: Instant,
        (incidents, lost): (&[Incident], u64),
        name: impl Fn(&Incident) -> Option<Named>,
        events: &Events,
    ) {
        self.now = now;
        let mut counts = self.counts();
        for incident in incidents {
            let Some(named) = name(incident) else { continue };
            let reason = match incident.kind {
                IncidentKind::Moved => {
                    let (network, mac, count) =
                        (named.network.to_string(), incident.mac.to_string(), incident.count.into());
                    let (port, other_port) = (named.port.to_string(), named.other.to_string());
                    events.record(Event::AddressMoved { network, mac, port, other_port, count });
                    continue;
                }
                IncidentKind::Damped => ConflictReason::Damped,
                IncidentKind::Pinned => ConflictReason::Pinned,
            };
            self.enter(now, incident, named, reason, &mut counts);
        }
        self.tell(now, events);
        self.omitted.add(now, lost, events);
        self.find_loops(now, events);
        self.forget(now);
    }

    /// How many stations each port sees that are not there.
    fn counts(&self) -> BTreeMap<Arc<str>, usize> {
        let mut counts = BTreeMap::new();
        for port in self.stations.values().flat_map(|conflict| conflict.sightings.keys()) {
            *counts.entry(Arc::clone(port)).or_default() += 1;
        }
        counts
    }

    fn enter(
        &mut self,
        now: Instant,
        incident: &Incident,
        named: Named,
        reason: ConflictReason,
        counts: &mut BTreeMap<Arc<str>, usize>,
    ) {
        let Named { network, port, other: stays_at } = named;
        let key = (network, incident.mac);
        let is_known = self.stations.get(&key).is_some_and(|conflict| conflict.sightings.contains_key(&port));
        if !is_known {
            let count = counts.entry(Arc::clone(&port)).or_default();
            if *count >= PORT_CONFLICTS {
                return;
            }
            *count += 1;
        }
        let fresh = || Conflict { reason, stays_at: Arc::clone(&stays_at), sightings: BTreeMap::new() };
        let conflict = self.stations.entry(key).or_insert_with(fresh);
        if let (Some(_), Some(count)) = (conflict.sightings.remove(&stays_at), counts.get_mut(&stays_at)) {
            *count -= 1;
        }
        (conflict.reason, conflict.stays_at) = (reason, stays_at);
        let sighting = conflict.sightings.entry(port).or_default();
        sighting.last = now;
        sighting.count += u64::from(incident.count);
        sighting.untold += u64::from(incident.count);
    }

    fn tell(&mut self, now: Instant, events: &Events) {
        for ((network, mac), conflict) in &mut self.stations {
            let more_ports = (conflict.recent(now).count() as u64).saturating_sub(1);
            let Conflict { reason, stays_at, sightings } = conflict;
            for (port, sighting) in sightings.iter_mut().filter(|(_, sighting)| sighting.untold > 0) {
                if !is_due(now, sighting.told) {
                    continue;
                }
                let count = std::mem::take(&mut sighting.untold);
                sighting.told = Some(now);
                let (network, mac) = (network.to_string(), mac.to_string());
                let (port, other_port) = (port.to_string(), stays_at.to_string());
                events.record(match reason {
                    ConflictReason::Damped => {
                        Event::AddressDamped { network, mac, port, other_port, more_ports, count }
                    }
                    ConflictReason::Pinned => Event::AddressPinned { network, mac, port, other_port, count },
                });
            }
        }
    }

    /// Several stations that are seen at two ports, at least one of them at neither: what goes out at one comes in at the other. One
    /// station at however many ports is an address that several machines have.
    fn find_loops(&mut self, now: Instant, events: &Events) {
        for (ports, common) in self.common(now) {
            if !common.is_loop(self.loops.contains_key(&ports)) {
                continue;
            }
            let count = common.stations();
            let suspected = self.loops.entry(ports.clone()).or_insert(Loop { last: now, told: None, stations: 0 });
            (suspected.last, suspected.stations) = (now, suspected.stations.max(count));
            if is_due(now, suspected.told) {
                suspected.told = Some(now);
                let (network, port, other_port) = (ports.0.to_string(), ports.1.to_string(), ports.2.to_string());
                events.record(Event::LoopSuspected { network, port, other_port, count });
            }
        }
    }

    /// What pairs of ports have in common just now.
    fn common(&self, now: Instant) -> BTreeMap<Pair, Common> {
        let mut found: BTreeMap<_, Common> = BTreeMap::new();
        for ((network, _), conflict) in &self.stations {
            let mut recent: Vec<_> = conflict.recent(now).collect();
            recent.sort_by_key(|(_, sighting)| std::cmp::Reverse(sighting.last));
            for (port, _) in &recent {
                found.entry(pair(network, port, &conflict.stays_at)).or_default().own += 1;
            }
            if let [(a, _), (b, _), ..] = recent[..] {
                found.entry(pair(network, a, b)).or_default().of_others += 1;
            }
        }
        found
    }

    fn forget(&mut self, now: Instant) {
        for conflict in self.stations.values_mut() {
            conflict.sightings.retain(|_, sighting| now.since(sighting.last) < FLAP_HOLD_DOWN);
        }
        self.stations.retain(|_, conflict| !conflict.sightings.is_empty());
        self.loops.retain(|_, suspected| now.since(suspected.last) < FLAP_HOLD_DOWN);
    }
}

impl Omitted {
    /// So many more; told now, or with others when a minute has passed.
    fn add(&mut self, now: Instant, count: u64, events: &Events) {
        self.count += count;
        if self.count > 0 && is_due(now, self.told) {
            self.told = Some(now);
            events.record(Event::AddressesUntold { count: std::mem::take(&mut self.count) });
        }
    }
}

impl Conflict {
    /// Where it was seen just now, too.
    fn recent(&self, now: Instant) -> impl Iterator<Item = (&Arc<str>, &Sighting)> {
        self.sightings.iter().filter(move |(_, sighting)| now.since(sighting.last) < FLAP_WINDOW)
    }
}

fn pair(network: &Arc<str>, a: &Arc<str>, b: &Arc<str>) -> Pair {
    let (first, second) = if a < b { (a, b) } else { (b, a) };
    (Arc::clone(network), Arc::clone(first), Arc::clone(second))
}

/// Whether something that was told at `told` is to be told again.
fn is_due(now: Instant, told: Option<Instant>) -> bool {
    told.is_none_or(|told| now.since(told) >= REMINDER)
}

impl Controller {
    /// Takes in what the shards noted of stations since the last call.
    pub(super) fn note_conflicts(&self) {
        let (view, (incidents, lost)) = (self.shown.ports.load(), self.shown.fdb().take_incidents());
        let numbered = view.networks.iter().filter_map(|(name, network)| Some((network.number?, name)));
        let networks: BTreeMap<NetworkIndex, _> = numbered.collect();
        let ports: BTreeMap<PortIndex, _> = view.ports.iter().map(|(name, port)| (port.number, name)).collect();
        let name = |incident: &Incident| {
            let port = |port| ports.get(port).map(|name| Arc::from(name.as_str()));
            let network = Arc::from(networks.get(&incident.network)?.as_str());
            Some(Named { network, port: port(&incident.port)?, other: port(&incident.other)? })
        };
        // Whole between two statements.
        let mut conflicts = self.conflicts.lock().unwrap_or_else(PoisonError::into_inner);
        conflicts.note(self.clock.now(), (&incidents, lost), name, &self.events);
        let seen = ConflictsView::of(&conflicts);
        let plans = view.ports.iter().filter_map(|(name, port)| Some((name, port, port.wish.plan.as_ref().ok()?)));
        for (name, port, plan) in plans.filter(|(_, _, plan)| plan.storm.minds_loops()) {
            port.storm.set(kinds::storm(plan, seen.is_in_loop(name.as_str())));
        }
        self.shown.conflicts.store(Arc::new(seen));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn incident(kind: IncidentKind, last: u8, port: u16, other: u16, count: u32) -> Incident {
        let mac = MacAddr([2, 0, 0, 0, 0, last]);
        Incident { kind, network: NetworkIndex(0), mac, port: PortIndex(port), other: PortIndex(other), count }
    }

    /// Has `conflicts` note these at second `at`; what was recorded.
    pub(super) fn note(conflicts: &mut Conflicts, at: u64, incidents: &[Incident]) -> Vec<String> {
        note_with(conflicts, at, incidents, 0)
    }

    /// The same, where the shards had no room for so many more.
    fn note_with(conflicts: &mut Conflicts, at: u64, incidents: &[Incident], lost: u64) -> Vec<String> {
        let events = Events::default();
        let port = |port: PortIndex| Arc::from(format!("p{}", port.0));
        let named = |i: &Incident| Named { network: "lan".into(), port: port(i.port), other: port(i.other) };
        let name = |i: &Incident| (i.port.0 < 90).then(|| named(i));
        conflicts.note(Instant(at * 1_000_000_000), (incidents, lost), name, &events);
        events.since(0).iter().map(|record| format!("{} {}", record.event.kind(), record.event)).collect()
    }

    #[test]
    fn a_conflict_is_told_with_both_ports_and_again_once_a_minute() {
        let mut conflicts = Conflicts::default();
        let again = |count| [incident(IncidentKind::Damped, 1, 2, 1, count)];
        let told = |count: u32| {
            format!(
                "address-damped network lan: 02:00:00:00:00:01 is at ports p1 and p2 in turn: it stays at p1, and {count} times \
                 p2 was not believed"
            )
        };
        assert_eq!(note(&mut conflicts, 0, &again(3)), [told(3)]);
        assert!((1..60).all(|at| note(&mut conflicts, at, &again(1)).is_empty()));
        assert_eq!(note(&mut conflicts, 60, &again(1)), [told(60)]);
        assert!(note(&mut conflicts, 65, &[]).is_empty());
        let view = ConflictsView::of(&conflicts);
        let report = |port: &str| {
            let of_port = view.of_port(port);
            of_port.iter().map(|c| (c.port.clone(), c.stays_at.clone(), c.count, c.seconds_ago)).collect::<Vec<_>>()
        };
        assert_eq!(report("p1"), [("p2".to_string(), "p1".to_string(), 63, 5)]);
        assert_eq!((report("p2"), report("p3").len()), (report("p1"), 0));
        assert_eq!(view.also_at("lan", MacAddr([2, 0, 0, 0, 0, 1])), ["p2"]);
        assert!(view.loops().is_empty(), "one port that borrows an address is no loop");
        // Nothing is left of it after the hold-down, and a port that has gone is not named.
        assert!(note(&mut conflicts, 180, &[incident(IncidentKind::Pinned, 1, 99, 1, 1)]).is_empty());
        assert!(conflicts.stations.is_empty());
    }

    #[test]
    fn addresses_at_two_ports_that_are_not_theirs_are_a_loop() {
        let mut conflicts = Conflicts::default();
        let told = note(
            &mut conflicts,
            0,
            &[
                incident(IncidentKind::Damped, 1, 4, 1, 1),
                incident(IncidentKind::Damped, 1, 3, 1, 1),
                incident(IncidentKind::Pinned, 2, 3, 2, 1),
                incident(IncidentKind::Pinned, 2, 4, 2, 1),
            ],
        );
        let found = "loop-suspected network lan: ports p3 and p4 seem to be connected to each other: frames with the addresses of \
                     2 stations come in at both";
        assert_eq!(told.iter().filter(|line| line.starts_with("loop")).collect::<Vec<_>>(), [found]);
        assert_eq!(told.iter().filter(|line| line.starts_with("address-pinned")).count(), 2);
        let view = ConflictsView::of(&conflicts);
        let loops = view.loops();
        assert_eq!((loops.len(), loops[0].ports.clone(), loops[0].stations), (1, vec!["p3".into(), "p4".into()], 2));
        assert_eq!(["p2", "p3", "p4"].map(|port| view.is_in_loop(port)), [false, true, true]);
        assert!(note(&mut conflicts, 5, &[]).is_empty());
        assert!(ConflictsView::of(&conflicts).is_in_loop("p3"), "it may go on, and what it carries is bounded");
        note(&mut conflicts, 200, &[]);
        assert!(conflicts.loops.is_empty() && conflicts.stations.is_empty());
        assert!(!ConflictsView::of(&conflicts).is_in_loop("p3"));
    }

    /// A snapshot that was restored several times; a gateway's address that each of several routers has.
    #[test]
    fn one_address_at_several_ports_is_no_loop() {
        let mut conflicts = Conflicts::default();
        let seen = [3, 4, 5].map(|port| incident(IncidentKind::Damped, 1, port, 2, 7));
        let told = note(&mut conflicts, 0, &seen);
        let line = |port: &str| {
            format!(
                "address-damped network lan: 02:00:00:00:00:01 is at ports p2 and {port} in turn, and at 2 more: it stays at p2, and \
                 7 times {port} was not believed"
            )
        };
        assert_eq!(told, ["p3", "p4", "p5"].map(line));
        assert!(ConflictsView::of(&conflicts).loops().is_empty());
        // However often, and wherever it stays.
        for (at, stays_at) in (1..).zip([3, 4, 5, 2, 3]) {
            let others = [2, 3, 4, 5].into_iter().filter(|port| *port != stays_at);
            let seen: Vec<_> = others.map(|port| incident(IncidentKind::Damped, 1, port, stays_at, 7)).collect();
            note(&mut conflicts, at, &seen);
            assert!(ConflictsView::of(&conflicts).loops().is_empty(), "it stays at p{stays_at}");
        }
    }

    /// Two ports that the host joins: what it sends itself comes in at both, and one guest is all that there is beside it.
    #[test]
    fn one_bystander_and_who_joins_the_ports_are_enough_for_a_loop() {
        let mut conflicts = Conflicts::default();
        note(&mut conflicts, 0, &[incident(IncidentKind::Damped, 1, 4, 3, 1)]);
        assert!(conflicts.loops.is_empty(), "one address at both of them");
        let bystander = [3, 4].map(|port| incident(IncidentKind::Damped, 2, port, 1, 1));
        let told = note(&mut conflicts, 1, &bystander);
        assert_eq!(told.iter().filter(|line| line.starts_with("loop")).count(), 1, "{told:?}");
        assert_eq!(["p1", "p3", "p4"].map(|port| ConflictsView::of(&conflicts).is_in_loop(port)), [false, true, true]);
        // It goes on as long as anybody's frames come back.
        for at in [60, 150, 260] {
            note(&mut conflicts, at, &bystander);
            assert!(ConflictsView::of(&conflicts).is_in_loop("p3"), "{at}");
        }
    }

    #[test]
    fn moves_are_told_as_they_are() {
        let told = note(&mut Conflicts::default(), 0, &[incident(IncidentKind::Moved, 1, 2, 1, 1)]);
        assert_eq!(told, ["address-moved network lan: 02:00:00:00:00:01 moved from port p1 to port p2"]);
    }

    #[test]
    fn what_is_not_told_one_by_one_is_counted_and_told_once_a_minute() {
        let told = |count: u32| {
            format!(
                "addresses-untold addresses moved, or were seen at ports where they are not, {count} times more: too many at once \
                 to be told one by one"
            )
        };
        let (mut conflicts, moved) = (Conflicts::default(), incident(IncidentKind::Moved, 1, 2, 1, 1));
        assert_eq!(note_with(&mut conflicts, 0, &[moved], 42)[1..], [told(42)]);
        assert!((1..60).all(|at| note_with(&mut conflicts, at, &[], 2).is_empty()));
        assert_eq!(note(&mut conflicts, 60, &[]), [told(118)]);
        assert!((61..200).all(|at| note(&mut conflicts, at, &[]).is_empty()));
    }

    #[test]
    fn a_noisy_port_is_bounded() {
        let mut conflicts = Conflicts::default();
        let many: Vec<_> = (0..200).map(|n| incident(IncidentKind::Damped, n, 1, 2, 1)).collect();
        assert_eq!(note(&mut conflicts, 0, &many).len(), PORT_CONFLICTS);
        assert_eq!(note(&mut conflicts, 1, &[incident(IncidentKind::Damped, 250, 3, 2, 1)]).len(), 1);
    }
}
