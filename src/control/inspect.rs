//! Looking: what runs, turned into [`super::report`]s. Changes nothing, and waits for no change and no port ([`super::view`],
//! [`super::calls`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;

use super::desired::Wish;
use super::events::{Event, Sight, Tally};
use super::pages::{FdbPlace, Order, Page, lowest};
use super::report::{
    CounterReport, Direction, DropReport, FdbReport, FdbTotals, FrameTotals, LogReport, MoveReport, NetworkReport,
    PortReport, PortState, ShardReport, StatusReport,
};
use super::view::{Facts, NetworkView, PortView, PortsView, ShardsView};
use super::{ControlError, Controller, FdbFilter};
use crate::config::{KindPlan, PortPlan};
use crate::ident::{Name, PortIndex};
use crate::log_queue::{LOG, Standing};
use crate::port::{Conduct, LinkState, Notifications};
use crate::shard::{Counters, QueueMove, Stall};
use crate::switch::{Fdb, FdbCounters, Flush, MacLimit, StormClass};
use crate::verdict::DropReason;

/// Said of a port that does not say it itself.
const SILENT: &str = "it does not answer: it waits for its far end or for the kernel";

impl Controller {
    /// The daemon as a whole.
    pub fn status(&self) -> StatusReport {
        let (view, shards, facts) = (self.shown.ports.load(), self.shown.shards.load(), self.shown.facts.load());
        let mut links = view.ask(&self.shown.calls, |port| port.link());
        let (mut frames, counters) = (FrameTotals::default(), shards.readings.counters());
        let (mut up, mut down, mut stopped) = (0, 0, Vec::new());
        for (name, port) in &view.ports {
            match link(port, links.remove(name).flatten()).0 {
                PortState::Up => up += 1,
                PortState::Down => down += 1,
                PortState::Stopped => stopped.push(name.to_string()),
            }
            let totals = port.totals(&counters);
            frames.rx_frames += totals.rx_frames;
            frames.rx_delivered += totals.rx_delivered;
            frames.rx_dropped += totals.rx_dropped.iter().sum::<u64>();
            frames.tx_frames += totals.tx_frames;
            frames.tx_dropped += totals.tx_dropped.iter().sum::<u64>();
        }
        StatusReport {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: self.clock.now().since(Default::default()).as_secs(),
            config: self.file.display().to_string(),
            generation: facts.generation,
            refused: facts.refused.clone(),
            restart_needed: facts.restart_needed.clone(),
            networks: view.networks.len(),
            ports_up: up,
            ports_down: down,
            ports_stopped: stopped,
            shards: shards.readings.count(),
            fdb: fdb_totals(&self.shown.fdb()),
            loops: self.shown.conflicts.load().loops().to_vec(),
            frames,
            log: log(),
        }
    }

    /// Every port, without what its kind has to tell.
    pub fn ports(&self) -> Vec<PortReport> {
        let (view, shards) = (self.shown.ports.load(), self.shown.shards.load());
        let mut links = view.ask(&self.shown.calls, |port| port.link());
        let (conflicts, counters) = (self.shown.conflicts.load(), shards.readings.counters());
        let fdb = self.shown.fdb();
        let report = |(name, port): (&Name, &PortView)| PortReport {
            macs: fdb.port_macs(port.number),
            macs_refused: by_limit(fdb.port_refused(port.number)),
            conflicts: conflicts.of_port(name.as_str()),
            in_loop: conflicts.is_in_loop(name.as_str()),
            ..report(&shards, &counters, name, port, links.remove(name).flatten())
        };
        view.ports.iter().map(report).collect()
    }

    /// One port, with what its kind has to tell.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn port(&self, name: &str) -> Result<PortReport, ControlError> {
        let (view, shards) = (self.shown.ports.load(), self.shown.shards.load());
        let Some((name, port)) = view.ports.get_key_value(name) else {
            return Err(ControlError::NoSuchPort { name: name.into() });
        };
        let handles = port.port.iter().cloned().collect();
        let asked = self.shown.calls.ask(handles, |_, port| (port.link(), port.detail()));
        let (link, detail) = asked.into_iter().next().flatten().unzip();
        let seen = self.shown.conflicts.load();
        let (conflicts, in_loop) = (seen.of_port(name.as_str()), seen.is_in_loop(name.as_str()));
        let report = report(&shards, &shards.readings.counters(), name, port, link);
        let fdb = self.shown.fdb();
        let (macs, macs_refused) = (fdb.port_macs(port.number), by_limit(fdb.port_refused(port.number)));
        Ok(PortReport { detail, conflicts, in_loop, macs, macs_refused, ..report })
    }

    /// Every network.
    pub fn networks(&self) -> Vec<NetworkReport> {
        let view = self.shown.ports.load();
        let (mut entries, fdb) = (BTreeMap::<_, usize>::new(), self.shown.fdb());
        fdb.entries(self.clock.now().tick()).for_each(|entry| *entries.entry(entry.network).or_default() += 1);
        let refused = |name: &Name| {
            let mut sums = [0; MacLimit::COUNT];
            for port in view.ports.values().filter(|port| port.is_in(name)) {
                sums.iter_mut().zip(fdb.port_refused(port.number)).for_each(|(sum, count)| *sum += count);
            }
            by_limit(sums)
        };
        let report = |(name, network): (&Name, &NetworkView)| NetworkReport {
            name: name.to_string(),
            mac_age_seconds: network.plan.mac_age.as_secs(),
            mac_limit: network.plan.mac_limit,
            macs_refused: refused(name),
            fdb_entries: network.number.and_then(|number| entries.get(&number)).copied().unwrap_or(0),
            ports: view.ports.iter().filter(|(_, port)| port.is_in(name)).map(|(port, _)| port.to_string()).collect(),
        };
        view.networks.iter().map(report).collect()
    }

    /// The FDB entries that `filter` picks, by network and address: the first [`FDB_PAGE`](crate::limits::FDB_PAGE) of those behind the place `after`.
    ///
    /// # Errors
    /// The filter names a network or port that there is not.
    pub fn fdb(&self, filter: &FdbFilter, after: Option<&FdbPlace>) -> Result<Page<FdbReport, FdbPlace>, ControlError> {
        let (view, fdb) = (self.shown.ports.load(), self.shown.fdb());
        let which = which(&view, filter)?;
        let order = Order::of(&view);
        let begin = after.map_or(0, |after| order.behind(after));
        let entries = fdb.entries(self.clock.now().tick()).filter(|entry| {
            which.network.is_none_or(|network| network == entry.network)
                && which.port.is_none_or(|port| port == entry.port)
                && which.mac.is_none_or(|mac| mac == entry.mac)
        });
        let keyed = entries.filter_map(|entry| Some((order.key(entry.network, entry.mac)?, entry)));
        let (first, more) = lowest(keyed.filter(|(key, _)| *key >= begin));
        let (ports, conflicts) = (view.names(), self.shown.conflicts.load());
        let end = first.last().filter(|_| more).map(|(key, _)| order.place(*key));
        let items = first.into_iter().filter_map(|(key, entry)| {
            let network = order.network(key).to_string();
            Some(FdbReport {
                also_at: conflicts.also_at(&network, entry.mac),
                damped: entry.damped,
                home: entry.home.and_then(|home| ports.get(&home)).map(|name| name.to_string()),
                network,
                mac: entry.mac.to_string(),
                port: ports.get(&entry.port)?.to_string(),
                pinned: entry.pinned,
                idle_seconds: entry.age.map(|age| age.as_secs()),
            })
        });
        Ok(Page { items: items.collect(), end })
    }

    /// Forgets the learned FDB entries that `filter` picks; returns how many.
    ///
    /// # Errors
    /// The filter names a network or port that there is not.
    pub fn flush_fdb(&self, filter: &FdbFilter) -> Result<usize, ControlError> {
        // Not while the FDB is being replaced by a larger one.
        let state = self.change()?;
        let which = which(&self.shown.ports.load(), filter)?;
        Ok(state.runtime.fdb.flush(which))
    }

    /// What the rings of all ports count of notifications, by port and ring number.
    pub fn notifications(&self) -> Vec<(String, usize, Notifications)> {
        let view = self.shown.ports.load();
        let answers = view.ask(&self.shown.calls, |port| port.notifications());
        let rings = answers.into_iter().flat_map(|(name, rings)| {
            let rings = rings.into_iter().flatten().enumerate();
            rings.map(|(ring, counts)| (name.to_string(), ring, counts))
        });
        rings.collect()
    }

    /// Every shard.
    pub fn shards(&self) -> Vec<ShardReport> {
        let (shards, facts) = (self.shown.shards.load(), self.shown.facts.load());
        shards.readings.report().iter().map(|now| self.shard(&facts, now)).collect()
    }

    /// What was dropped, at one port or at all of them, most frequent first.
    ///
    /// # Errors
    /// There is no such port.
    pub fn drops(&self, port: Option<&str>) -> Result<Vec<DropReport>, ControlError> {
        let (view, shards) = (self.shown.ports.load(), self.shown.shards.load());
        if let Some(name) = port.filter(|name| !view.ports.contains_key(*name)) {
            return Err(ControlError::NoSuchPort { name: name.into() });
        }
        let counters = shards.readings.counters();
        let wanted = view.ports.iter().filter(|(name, _)| port.is_none_or(|port| port == name.as_str()));
        let mut list: Vec<_> = wanted
            .flat_map(|(name, port)| {
                let totals = port.totals(&counters);
                DropReason::ALL.iter().flat_map(move |&reason| {
                    let rx = drops(name, Direction::Rx, reason, totals.rx_dropped[reason.index()]);
                    rx.into_iter().chain(drops(name, Direction::Tx, reason, totals.tx_dropped[reason.index()]))
                })
            })
            .collect();
        list.sort_by(|a, b| (b.count, &a.port, a.direction).cmp(&(a.count, &b.port, b.direction)));
        Ok(list)
    }

    /// What the balancer moved lately, oldest first.
    pub fn moves(&self) -> Vec<MoveReport> {
        let (view, shards) = (self.shown.ports.load(), self.shown.shards.load());
        let names = view.names();
        let report = |moved: QueueMove| {
            // A port that has gone since has no name any more.
            let port = names.get(&moved.port)?.to_string();
            let QueueMove { at, queues, from, to, delay_micros, .. } = moved;
            Some(MoveReport { seconds_ago: self.clock.now().since(at).as_secs(), port, queues, from, to, delay_micros })
        };
        shards.moves.iter().copied().filter_map(report).collect()
    }

    /// What each port's far end has done to others.
    pub fn conduct(&self) -> Vec<(String, Conduct)> {
        let view = self.shown.ports.load();
        let answers = view.ask(&self.shown.calls, |port| port.conduct());
        answers.into_iter().filter_map(|(name, conduct)| Some((name.to_string(), conduct?))).collect()
    }

    /// Records which shards were held up, and in whose memory, since the last call.
    pub(super) fn note_stalls(&self) {
        let view = self.shown.ports.load();
        let names = view.names();
        let name = |port| names.get(&port).map(ToString::to_string);
        for Stall { cpu, port, sender, held, times, .. } in self.shown.shards.load().readings.take_stalls() {
            // A port that has gone since has no name any more.
            let (Some(port), sender) = (name(port), sender.and_then(name)) else { continue };
            let milliseconds = u64::try_from(held.as_millis()).unwrap_or(u64::MAX);
            let short_times = Some(times).filter(|&times| times > 1);
            self.events.record(Event::ShardStalled { cpu, port, sender, milliseconds, short_times });
        }
    }

    /// How many ports were up, down and stopped when upkeep looked last.
    pub fn tally(&self) -> Tally {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).tally()
    }

    /// Records which ports came up, went down, stopped or were barred since the last call; returns those that are not up.
    pub(super) fn note_links(&self) -> BTreeSet<PortIndex> {
        let view = self.shown.ports.load();
        let mut answers = view.ask(&self.shown.calls, |port| (port.link(), port.conduct()));
        let mut down = BTreeSet::new();
        let ports = view.ports.iter().map(|(name, port)| {
            let (answer, conduct) = answers.remove(name).flatten().unzip();
            // Of one that does not answer nobody knows.
            if port.port.is_err() || answer.as_ref().is_some_and(|link| !link.is_up()) {
                down.insert(port.number);
            }
            let (state, reason) = link(port, answer);
            Sight { port: name.to_string(), state, reason, conduct }
        });
        self.links.lock().unwrap_or_else(PoisonError::into_inner).note(ports, &self.events);
        down
    }

    fn shard(&self, facts: &Facts, now: &crate::shard::ShardReport) -> ShardReport {
        let samples = self.samples();
        let before = samples.oldest(now.cpu);
        let since = |of: fn(&crate::shard::ShardReport) -> u64| of(now).saturating_sub(before.map_or(0, of)) as f64;
        let (busy, poll, sleep) = (since(|r| r.busy_cycles), since(|r| r.poll_cycles), since(|r| r.sleep_cycles));
        let percent = |part: f64| ratio(100.0 * part, busy + poll + sleep);
        ShardReport {
            cpu: now.cpu,
            chosen: facts.chosen.get(&now.cpu).cloned(),
            exclusive: now.exclusive,
            queues: now.queues,
            resting: now.resting,
            busy_percent: percent(busy),
            // A shard notes its sleep when it wakes; one that slept all the time has noted nothing.
            idle_percent: 100.0 - percent(busy),
            poll_percent: percent(poll),
            sleep_percent: percent(sleep),
            frames: now.frames,
            batches: now.batches,
            sleeps: now.sleeps,
            held_up: now.held_up,
            stuck: now.stuck,
            busy_cycles: now.busy_cycles,
            poll_cycles: now.poll_cycles,
            sleep_cycles: now.sleep_cycles,
            frames_per_batch: ratio(now.frames as f64, now.batches as f64),
            cycles_per_frame: ratio(now.busy_cycles as f64, now.frames as f64),
        }
    }
}

impl PortView {
    fn is_in(&self, network: &Name) -> bool {
        self.wish.plan.as_ref().is_ok_and(|plan| plan.network == *network)
    }
}

impl PortsView {
    /// The ports' names by their numbers.
    fn names(&self) -> BTreeMap<PortIndex, &Name> {
        self.ports.iter().map(|(name, port)| (port.number, name)).collect()
    }
}

/// One port; `state` is what it says of its link, if it says anything.
fn report(
    shards: &ShardsView,
    counted: &Counters,
    name: &Name,
    port: &PortView,
    state: Option<LinkState>,
) -> PortReport {
    let wish: &Wish = &port.wish;
    let plan: Option<&PortPlan> = wish.plan.as_ref().ok();
    let (state, reason) = link(port, state);
    PortReport {
        name: name.to_string(),
        kind: plan.map(|plan| plan.kind.key().into()),
        network: plan.map(|plan| plan.network.to_string()),
        profile: plan.and_then(|plan| plan.profile.as_ref()).map(Name::to_string),
        latency_sensitivity: plan.map(|plan| plan.latency).unwrap_or_default(),
        affinity: plan.map(|plan| plan.affinity).unwrap_or_default(),
        cpus: shards.readings.cpus_of(port.number).to_vec(),
        compat: plan.filter(|plan| matches!(plan.kind, KindPlan::VhostUser(_))).map(|plan| plan.compat),
        storm: plan.map(|plan| plan.storm).unwrap_or_default(),
        offloads: plan.map(|plan| plan.offloads).unwrap_or_default(),
        mtu: plan.and_then(|plan| plan.mtu),
        mac: plan.and_then(|plan| plan.mac).map(|mac| mac.to_string()),
        labels: plan.map(|plan| plan.labels.clone()).unwrap_or_default(),
        origin: wish.origin,
        state,
        reason,
        mac_limit: plan.map(|plan| plan.macs),
        macs: 0,
        macs_refused: BTreeMap::new(),
        conflicts: Vec::new(),
        in_loop: false,
        counters: counters(counted, port),
        config: plan.map(|plan| settings(&plan.kind)).unwrap_or_default(),
        detail: None,
    }
}

/// Whether a port carries frames, and what is to be said of that.
fn link(port: &PortView, link: Option<LinkState>) -> (PortState, Option<String>) {
    match (&port.port, link) {
        (Err(reason), _) => (PortState::Stopped, Some(format!("{reason}; `linecard apply` tries again"))),
        (Ok(_), None) => (PortState::Stopped, Some(SILENT.into())),
        (Ok(_), Some(LinkState::Up)) => (PortState::Up, port.obstacle.clone().or_else(|| port.remark.clone())),
        (Ok(_), Some(LinkState::Impaired(reason))) => (PortState::Up, Some(reason)),
        (Ok(_), Some(LinkState::Down(reason))) => {
            let obstacle = port.obstacle.iter().map(|obstacle| format!("; {obstacle}"));
            (PortState::Down, Some(reason + &obstacle.collect::<String>()))
        }
        (Ok(_), Some(LinkState::Stopped(reason) | LinkState::Gone(reason))) => (PortState::Stopped, Some(reason)),
    }
}

fn counters(counted: &Counters, port: &PortView) -> CounterReport {
    let totals = port.totals(counted);
    let by_reason = |counts: &[u64; DropReason::COUNT]| {
        let named = DropReason::ALL.iter().map(|reason| (reason.name().to_string(), counts[reason.index()]));
        named.filter(|(_, count)| *count > 0).collect()
    };
    CounterReport {
        rx_frames: totals.rx_frames,
        rx_bytes: totals.rx_bytes,
        rx_delivered: totals.rx_delivered,
        rx_dropped: totals.rx_dropped.iter().sum(),
        rx_gso: totals.rx_gso,
        mtu_exceeded_bytes: totals.mtu_exceeded_bytes,
        tx_frames: totals.tx_frames,
        tx_bytes: totals.tx_bytes,
        tx_gso: totals.tx_gso,
        tx_segmented: totals.tx_segmented,
        tx_segments_dropped: totals.tx_segments_dropped,
        tx_completed: totals.tx_completed,
        tx_merged: totals.tx_merged,
        tx_dropped: totals.tx_dropped.iter().sum(),
        drops: by_reason(&totals.rx_dropped),
        tx_drops: by_reason(&totals.tx_dropped),
        storm_drops: storm_drops(port.storm.refused()),
    }
}

fn which(view: &PortsView, filter: &FdbFilter) -> Result<Flush, ControlError> {
    let network = filter.network.as_deref().map(|name| {
        let found = view.networks.get(name).and_then(|network| network.number);
        found.ok_or_else(|| ControlError::NoSuchNetwork { name: name.into() })
    });
    let port = filter.port.as_deref().map(|name| {
        let found = view.ports.get(name).map(|port| port.number);
        found.ok_or_else(|| ControlError::NoSuchPort { name: name.into() })
    });
    Ok(Flush { network: network.transpose()?, port: port.transpose()?, mac: filter.mac })
}

/// What storm control dropped, by class.
fn storm_drops(refused: [u64; 3]) -> BTreeMap<String, u64> {
    let named = StormClass::ALL.iter().zip(refused).filter(|(_, count)| *count > 0);
    named.map(|(class, count)| (class.name().to_string(), count)).collect()
}

/// How often stations were not learned, by what kept them from it.
fn by_limit(refused: [u64; MacLimit::COUNT]) -> BTreeMap<String, u64> {
    let named = MacLimit::ALL.iter().zip(refused).filter(|(_, count)| *count > 0);
    named.map(|(limit, count)| (limit.name().to_string(), count)).collect()
}

fn log() -> LogReport {
    let Standing { lost, stuck } = LOG.standing();
    LogReport { lines_lost: lost, stuck }
}

fn fdb_totals(fdb: &Fdb) -> FdbTotals {
    let FdbCounters { learned, aged, moved, damped, refused, full } = fdb.counters();
    FdbTotals { entries: fdb.len(), learned, aged, moved, damped, refused, full }
}

/// What the file has below the kind's key.
fn settings(kind: &KindPlan) -> serde_json::Value {
    let tree = serde_json::to_value(kind).unwrap_or_default();
    tree.get(kind.key()).cloned().unwrap_or_else(|| serde_json::json!({}))
}

fn drops(port: &Name, direction: Direction, reason: DropReason, count: u64) -> Option<DropReport> {
    (count > 0).then(|| DropReport {
        port: port.to_string(),
        direction,
        reason: reason.name().into(),
        count,
        meaning: reason.meaning().into(),
        advice: reason.advice().into(),
    })
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}
