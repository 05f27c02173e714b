//! What is: the ports and networks that run, and how an [`Action`] is carried out on them.
//!
//! The order in which shards and ports hear of a change is what makes it safe:
//!
//! - A port comes: it is opened, its counters are cleared, tables with it are published, then its queues get a shard.
//! - A port goes: tables without it are published, and when that returns no shard can deliver to it; its queues are taken
//!   from their shards, and another thread ends it, which is waited for, but not for ever. Only then are its FDB entries
//!   forgotten, or a shard could learn it anew. Its number is free, and a port of its name is opened again, when it has ended.
//! - Pins are not patched by each action but settled afterwards against what the ports say, so that two ports may swap
//!   addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::calls::{Ended, Handle};
use super::desired::Desired;
use super::diff::Action;
use super::events::Events;
use super::kinds::{self, Kinds};
use super::locality::Locality;
use super::numbers::Numbers;
use super::refusals::Refusals;
use super::storms::Storms;
use super::view::{NetworkView, PortView, PortsView, ShardsView, Shown};
use crate::clock::Instant;
use crate::config::{KindPlan, NetworkPlan, PortPlan};
use crate::host::cpu;
use crate::host::cpu_plan::Choice;
use crate::host::dma_latency::DmaLatency;
use crate::ident::{LatencySensitivity, MacAddr, Name, NetworkIndex, PortIndex};
use crate::limits::{NETWORKS, PORTS};
use crate::port::{Handover, Port};
use crate::shard::{self, Absent, Service, ShardError, Shards, Wish};
use crate::switch::{self, Fdb, Flush, NetworkRow, PortRow, Storm};

/// One port that should be, and what became of it.
#[derive(Clone)]
pub(super) struct Running {
    /// Its number, for as long as it has the name.
    pub(super) number: PortIndex,
    /// The port, or why there is none.
    pub(super) port: Result<Arc<Handle>, String>,
    /// What ports that were here before have handed over.
    handover: Handover,
    /// Of the port that was here before: whether it has ended.
    before: Option<Arc<Ended>>,
    /// How the shards serve it, if they do, but for the NUMA node, which is not asked for but found.
    pub(super) served: Option<Service>,
    /// Why that is not as it should be.
    pub(super) obstacle: Option<String>,
    /// It was served at `high` when it was ended to be made anew, and is not served yet.
    was_high: bool,
    /// How much of what it sends may be flooded.
    pub(super) storm: Arc<Storm>,
    pub(super) storms: Storms,
    refusals: Refusals,
    /// Where its guest's memory is.
    pub(super) locality: Locality,
}

impl Running {
    /// A port that could not be had for this reason, so far.
    fn without(number: PortIndex, reason: &str) -> Self {
        Self {
            number,
            port: Err(reason.into()),
            handover: Handover::default(),
            before: None,
            served: None,
            obstacle: None,
            was_high: false,
            storm: Arc::default(),
            storms: Storms::default(),
            refusals: Refusals::default(),
            locality: Locality::default(),
        }
    }

    /// The port, if it was opened.
    fn opened(&self) -> Option<&Arc<dyn Port>> {
        self.port.as_ref().ok()?.port()
    }

    /// What it has handed over, and those before it.
    fn handover(&self) -> Handover {
        self.handover + self.opened().map(|port| port.handover()).unwrap_or_default()
    }

    /// The shards serve it at `high`, or did until this very change.
    fn is_high(&self) -> bool {
        self.was_high || self.served.as_ref().is_some_and(|service| service.latency == LatencySensitivity::High)
    }

    /// The shards serve it so now.
    fn serve(&mut self, service: Service) {
        (self.served, self.obstacle, self.was_high) = (Some(service), None, false);
    }
}

/// Everything that runs. `desired` is always what was carried out, stopped ports included.
pub(super) struct Runtime {
    pub(super) desired: Desired,
    pub(super) ports: BTreeMap<Name, Running>,
    pub(super) networks: BTreeMap<Name, NetworkIndex>,
    pub(super) fdb: Arc<Fdb>,
    pub(super) shards: Shards,
    kinds: Kinds,
    /// What keeps CPUs from deep sleep, or why that cannot be had.
    awake: Option<io::Result<DmaLatency>>,
    pins: BTreeMap<(NetworkIndex, MacAddr), PortIndex>,
    port_numbers: Numbers,
    network_numbers: Numbers,
    /// Numbers of ports that were removed, which are free when those have ended and no thread can mean them any more that was held
    /// up then.
    leaving: Vec<(PortIndex, Arc<Ended>, Absent)>,
    /// Where others see what runs.
    shown: Arc<Shown>,
}

/// How long a change waits for ports to end.
const ENDING: Duration = Duration::from_secs(2);

/// How long it waits for interfaces that are opened for it.
const OPENING: Duration = Duration::from_secs(1);

/// Why a port is not opened whose predecessor has not ended.
const NOT_ENDED: &str =
    "what was here before has not ended: it waits for its far end or for the kernel; `linecard apply` tries again";

impl Runtime {
    /// Nothing runs yet but the shards.
    pub(super) fn new(shards: Shards, kinds: Kinds, fdb: Fdb, shown: Arc<Shown>) -> Self {
        Self {
            desired: Desired::default(),
            ports: BTreeMap::new(),
            networks: BTreeMap::new(),
            fdb: Arc::new(fdb),
            shards,
            kinds,
            awake: None,
            pins: BTreeMap::new(),
            port_numbers: Numbers::below(PORTS),
            network_numbers: Numbers::below(NETWORKS),
            leaving: Vec::new(),
            shown,
        }
    }

    /// Has ports opened by `stand_in` that it has something for.
    #[cfg(test)]
    pub(super) fn stand_in(&mut self, stand_in: kinds::StandIn) {
        self.kinds.stand_in = Some(stand_in);
    }

    /// Who holds this has the kernel keep TAP ports waiting.
    #[cfg(test)]
    pub(super) fn kernel_of_taps(&self) -> Arc<std::sync::Mutex<()>> {
        self.kinds.taps.kernel()
    }

    /// Shows what runs now to those who look.
    pub(super) fn show(&self) {
        let port = |(name, running): (&Name, &Running)| {
            let view = PortView {
                number: running.number,
                wish: self.desired.ports.get(name)?.clone(),
                port: running.port.clone(),
                obstacle: running.obstacle.clone(),
                remark: running.locality.remark.clone(),
                handover: running.handover,
                storm: Arc::clone(&running.storm),
            };
            Some((name.clone(), view))
        };
        let network = |(name, plan): (&Name, &NetworkPlan)| {
            (name.clone(), NetworkView { number: self.networks.get(name).copied(), plan: plan.clone() })
        };
        let ports = self.ports.iter().filter_map(port).collect();
        let networks = self.desired.networks.iter().map(network).collect();
        self.show_shards();
        self.shown.ports.store(Arc::new(PortsView { ports, networks }));
    }

    /// Shows where ports are served now.
    pub(super) fn show_shards(&self) {
        let view = ShardsView { readings: self.shards.readings(), moves: self.shards.moves() };
        self.shown.shards.store(Arc::new(view));
    }

    /// Frees the numbers of ports that have ended since they were removed.
    pub(super) fn free_numbers(&mut self) {
        let is_free = |(_, ended, absent): &mut (_, Arc<Ended>, Absent)| ended.is_set() && !absent.is_any();
        for (number, ..) in self.leaving.extract_if(.., is_free) {
            self.port_numbers.give_back(number.0);
        }
    }

    /// Names of the ports that could not be had.
    pub(super) fn stopped(&self) -> BTreeSet<Name> {
        self.ports.iter().filter(|(_, running)| running.port.is_err()).map(|(name, _)| name.clone()).collect()
    }

    /// Ports that run otherwise than they should, with the reason.
    pub(super) fn obstacles(&self) -> BTreeMap<String, String> {
        let told = |(name, running): (&Name, &Running)| Some((name.to_string(), running.obstacle.clone()?));
        self.ports.iter().filter_map(told).collect()
    }

    /// Carries out what [`super::diff::diff`] found, in its order.
    pub(super) fn perform(&mut self, actions: &[Action]) {
        self.free_numbers();
        self.close(actions);
        let before = self.places();
        let (mut changed, mut opening) = (Vec::new(), Vec::new());
        for action in actions {
            self.desired.perform(action);
            match action {
                Action::AddNetwork(name, _) => self.add_network(name),
                Action::AddPort(name, _) => {
                    self.add_port(name);
                    opening.push(name);
                }
                Action::RemakePort(name, ..) | Action::RetryPort(name) => opening.push(name),
                Action::ChangePort(name, ..) => changed.push(name),
                Action::RemovePort(_) | Action::ChangeNetwork(..) | Action::RemoveNetwork(_) => {}
            }
        }
        self.open_all(&opening);
        self.retune(&changed);
        self.publish();
        self.settle_pins();
        self.attach();
        self.leave_networks(&before, actions);
        self.show();
    }

    /// Tells running ports what changed that they know about; the rest is in the tables.
    fn retune(&self, names: &[&Name]) {
        let tuned = |name: &&Name| {
            let handle = Arc::clone(self.ports.get(*name)?.port.as_ref().ok()?);
            let plan = self.plan(name)?;
            Some((handle, (plan.mtu, kinds::offloads(plan))))
        };
        let (handles, settings): (Vec<_>, Vec<_>) = names.iter().filter_map(tuned).unzip();
        self.shown.calls.tell(handles, move |at, port| {
            let (mtu, offloads) = settings[at];
            port.set_mtu(mtu);
            port.set_offloads(offloads);
        });
    }

    /// Publishes a larger FDB if it is time for one.
    pub(super) fn grow_fdb(&mut self) {
        if self.fdb.is_crowded()
            && let Some(grown) = self.fdb.grown()
        {
            log::info!("FDB grows from {} to {} places", self.fdb.capacity(), grown.capacity());
            self.fdb = Arc::new(grown);
            self.publish();
        }
    }

    /// Says which ports began to send more than they may have flooded, and which no longer do.
    pub(super) fn watch_storms(&mut self, events: &Events) {
        for (name, Running { storms, storm, .. }) in &mut self.ports {
            storms.look(name, storm, events);
        }
    }

    /// Says of which ports stations are not learned, and because of which limit.
    pub(super) fn watch_refusals(&mut self, now: Instant, events: &Events) {
        for (name, Running { refusals, number, .. }) in &mut self.ports {
            let plan = self.desired.ports.get(name).and_then(|wish| wish.plan.as_ref().ok());
            let plans = plan.and_then(|plan| Some((plan, self.desired.networks.get(&plan.network)?)));
            if let Some(plans) = plans {
                refusals.look(now, name, plans, self.fdb.port_refused(*number), events);
            }
        }
    }

    /// The plan of a port, if it has one.
    pub(super) fn plan(&self, name: &Name) -> Option<&PortPlan> {
        self.desired.ports.get(name)?.plan.as_ref().ok()
    }

    /// Ends the ports that go or are made anew.
    fn close(&mut self, actions: &[Action]) {
        let mut ending = Vec::new();
        let mut removed = Vec::new();
        for action in actions {
            let (Action::RemovePort(name) | Action::RemakePort(name, ..) | Action::RetryPort(name)) = action else {
                continue;
            };
            let Some(running) = self.ports.get_mut(name) else { continue };
            let (was_high, handover) = (running.is_high(), running.handover());
            let Running { number, storms, refusals, .. } = *running;
            let storm = Arc::clone(&running.storm);
            let before = running.port.as_ref().map_or_else(|_| running.before.clone(), |handle| Some(handle.ended()));
            let fresh = Running {
                was_high,
                storm,
                storms,
                refusals,
                handover,
                before: before.clone(),
                ..Running::without(number, "it is being made anew")
            };
            let closed = std::mem::replace(running, fresh).port;
            ending.extend(closed.ok().map(|handle| (number, handle)));
            if matches!(action, Action::RemovePort(_)) {
                removed.push((number, before));
                self.ports.remove(name);
                log::info!("port {name}: removed");
            }
        }
        if !ending.is_empty() {
            self.publish();
            ending.iter().for_each(|(number, _)| self.shards.detach(*number));
            // Nobody finds them any more, so they end when who is looking at them now has done that.
            self.show();
            let ends: Vec<_> = ending.iter().map(|(_, handle)| handle.ended()).collect();
            drop(ending);
            Ended::wait_for(&ends, ENDING);
        }
        for (number, before) in removed {
            self.fdb.forget_port(number);
            self.pins.retain(|_, port| *port != number);
            match before {
                // No shard has it any more, but for those that are held up.
                Some(ended) => self.leaving.push((number, ended, self.shards.absent())),
                None => self.port_numbers.give_back(number.0),
            }
        }
        self.free_numbers();
    }

    fn add_network(&mut self, name: &Name) {
        // A plan has at most as many networks as there are numbers; if not, its ports are shown as stopped.
        if let Some(number) = self.network_numbers.take() {
            self.networks.insert(name.clone(), NetworkIndex(number));
        }
    }

    fn add_port(&mut self, name: &Name) {
        let Some(number) = self.port_numbers.take().map(PortIndex) else {
            log::error!("port {name}: not added, there are {PORTS} ports already");
            self.desired.ports.remove(name);
            return;
        };
        self.shards.clear_port(number);
        self.ports.insert(name.clone(), Running::without(number, "it was not opened yet"));
    }

    /// Opens ports; those that the kernel may have wait come last, and are waited for together.
    fn open_all(&mut self, names: &[&Name]) {
        let is_tap = |name: &&&Name| self.plan(name).is_some_and(|plan| matches!(plan.kind, KindPlan::Tap(_)));
        let (taps, others): (Vec<_>, Vec<_>) = names.iter().partition(is_tap);
        for ports in [others, taps] {
            let deadline = std::time::Instant::now() + OPENING;
            ports.into_iter().for_each(|name| self.open(name, deadline));
        }
    }

    fn open(&mut self, name: &Name, deadline: std::time::Instant) {
        let before = self.ports.get(name).and_then(|running| running.before.as_ref());
        let opened = match self.desired.ports.get(name).map(|wish| &wish.plan) {
            Some(Ok(_)) if before.is_some_and(|ended| !ended.is_set()) => Err(NOT_ENDED.into()),
            Some(Ok(plan)) => match self.kinds.open(name, plan, deadline) {
                Ok(port) => Ok(Handle::new(port, &self.shown.calls)),
                Err(error) => Err(super::chain(&error)),
            },
            Some(Err(reason)) => Err(reason.clone()),
            None => return,
        };
        match &opened {
            Ok(_) => log::info!("port {name}: open"),
            Err(reason) => log::error!("port {name}: stopped: {reason}"),
        }
        if let Some(running) = self.ports.get_mut(name) {
            running.port = opened;
        }
    }

    /// Where each open port is.
    fn places(&self) -> BTreeMap<PortIndex, Place> {
        self.open_ports()
            .map(|(_, running, plan, _)| (running.number, self.networks.get(&plan.network).copied()))
            .collect()
    }

    fn open_ports(&self) -> impl Iterator<Item = (&Name, &Running, &PortPlan, &Arc<dyn Port>)> {
        self.ports.iter().filter_map(|(name, running)| Some((name, running, self.plan(name)?, running.opened()?)))
    }

    /// Gives new ports a shard, and those whose service changed perhaps another one. One that cannot have what it asks for is
    /// served on as it was; a new one is ended. Where exclusive CPUs are short, ports that had one already come first, and then
    /// it goes by name.
    fn attach(&mut self) {
        let (mut changed, mut wishes) = (Vec::new(), Vec::new());
        let wish = |name| self.desired.ports.get(name).and_then(|wish| wish.plan.as_ref().ok());
        let mut ports: Vec<_> = self.ports.iter_mut().collect();
        // Those that give an exclusive CPU up come before those that may want it.
        ports.sort_by_key(|(name, running)| match wish(*name) {
            Some(plan) if plan.latency == LatencySensitivity::High => 2 - u8::from(running.is_high()),
            _ => 0,
        });
        for (name, running) in ports {
            let (Some(plan), Ok(handle)) = (wish(name), &running.port) else { continue };
            let Some(port) = handle.port() else { continue };
            let service = plan.service();
            if running.served.as_ref() == Some(&service) {
                running.obstacle = None;
                if !(running.is_high() && self.shards.is_stranded(running.number)) {
                    continue;
                }
            }
            let placed = Service { node: running.locality.node, ..service.clone() };
            wishes.push(Wish { port: running.number, queues: port.receive_queues(), service: placed });
            changed.push((name, running, service));
        }
        let (mut refused, mut served) = (Vec::new(), Vec::new());
        for ((name, running, service), done) in changed.into_iter().zip(self.shards.attach_together(wishes)) {
            match done {
                Ok(()) => {
                    log_move(name, running.served.is_some(), &service, &self.shards.cpus_of(running.number));
                    served.extend(running.port.as_ref().ok().map(|handle| (Arc::clone(handle), service.latency)));
                    running.serve(service);
                }
                // Its CPU is no exclusive one any more: when its shard ends, it is asked once more and told then.
                Err(_) if running.served.as_ref() == Some(&service) => {}
                Err(error) if running.served.is_some() => {
                    let obstacle = format!("not served as asked but as before: {}", super::chain(&error));
                    log::error!("port {name}: {obstacle}");
                    running.obstacle = Some(obstacle);
                }
                Err(error) => refused.push((running.number, super::chain(&error))),
            }
        }
        let (handles, levels): (Vec<_>, Vec<_>) = served.into_iter().unzip();
        self.shown.calls.tell(handles, move |at, port| port.set_latency(levels[at]));
        self.stop(&refused);
        self.keep_awake();
    }

    /// Has shards on these CPUs as well as on those that they are on.
    pub(super) fn grow_shards(&mut self, choice: &Choice) -> Result<(), ShardError> {
        self.shards.grow(&choice.shared, &choice.exclusive)
    }

    /// Ends the shards that are on other CPUs than those of the last [`Runtime::grow_shards`]. Ports that no shard can serve
    /// then are ended.
    pub(super) fn shrink_shards(&mut self) {
        let refused: Vec<_> =
            self.shards.shrink().into_iter().map(|(port, error)| (port, super::chain(&error))).collect();
        self.stop(&refused);
        self.keep_awake();
    }

    /// Moves queues whose frames wait for too long to a shard that has room.
    pub(super) fn balance(&mut self, now: Instant) {
        for moved in self.shards.balance(now) {
            let name =
                self.ports.iter().find(|(_, running)| running.number == moved.port).map(|(name, _)| name.as_str());
            log::info!(
                "port {}: moved {} queues from CPU {} to CPU {}: frames waited for {} us",
                name.unwrap_or("?"),
                moved.queues,
                moved.from,
                moved.to,
                moved.delay_micros
            );
        }
    }

    /// Keeps the host's CPUs from deep sleep while there is a port of latency sensitivity `high`.
    fn keep_awake(&mut self) {
        let high = |running: &Running| running.served.as_ref().is_some_and(|s| s.latency == LatencySensitivity::High);
        let wanted = self.ports.values().any(high);
        if wanted && self.awake.is_none() {
            self.awake = Some(DmaLatency::hold().inspect_err(|error| {
                log::warn!("cannot keep CPUs from deep sleep for `high` ports (/dev/cpu_dma_latency): {error}");
            }));
        }
        if !wanted {
            self.awake = None;
        }
    }

    /// Ends ports that no shard can serve, for the reasons given.
    fn stop(&mut self, refused: &[(PortIndex, String)]) {
        let mut ending = Vec::new();
        for (name, running) in &mut self.ports {
            let Some((_, reason)) = refused.iter().find(|(number, _)| *number == running.number) else { continue };
            log::error!("port {name}: stopped: {reason}");
            let (storm, storms, refusals) = (Arc::clone(&running.storm), running.storms, running.refusals);
            let before = running.port.as_ref().ok().map(|handle| handle.ended());
            let stopped = Running { storm, storms, refusals, before, ..Running::without(running.number, reason) };
            ending.push(std::mem::replace(running, stopped).port);
        }
        if !ending.is_empty() {
            self.publish();
            self.settle_pins();
        }
    }

    /// Forgets what was learned in networks that are gone, and about ports in networks that they left.
    fn leave_networks(&mut self, before: &BTreeMap<PortIndex, Place>, actions: &[Action]) {
        let now = self.places();
        let left = |(port, network): (&PortIndex, &Place)| {
            let stays = now.get(port).is_none_or(|now| now == network);
            network.filter(|_| !stays).map(|network| Flush { network: Some(network), port: Some(*port), mac: None })
        };
        let mut flushes: Vec<Flush> = before.iter().filter_map(left).collect();
        let mut gone = Vec::new();
        for action in actions {
            if let Action::RemoveNetwork(name) = action {
                gone.extend(self.networks.remove(name));
            }
        }
        flushes.extend(gone.iter().map(|network| Flush { network: Some(*network), ..Flush::default() }));
        if flushes.is_empty() {
            return;
        }
        self.publish();
        for which in flushes {
            self.fdb.flush(which);
        }
        gone.into_iter().for_each(|network| self.network_numbers.give_back(network.0));
    }

    /// Makes the FDB's pins those that the ports ask for.
    fn settle_pins(&mut self) {
        let wanted: BTreeMap<_, _> = self
            .open_ports()
            .filter_map(|(_, running, plan, _)| Some(((*self.networks.get(&plan.network)?, plan.mac?), running.number)))
            .collect();
        for (&(network, mac), port) in &self.pins {
            if wanted.get(&(network, mac)) != Some(port) {
                self.fdb.unpin(network, mac);
            }
        }
        for (&(network, mac), &port) in &wanted {
            if self.pins.get(&(network, mac)) != Some(&port)
                && let Err(error) = self.fdb.pin(network, mac, port)
            {
                log::warn!("{error}");
            }
        }
        self.pins = wanted;
    }

    /// Shows the shards what there is now.
    fn publish(&self) {
        let mut ports = vec![None; self.ports.values().map(|r| r.number.index() + 1).max().unwrap_or(0)];
        let mut transmit = vec![None; ports.len()];
        let mut members: BTreeMap<NetworkIndex, Vec<PortIndex>> = BTreeMap::new();
        let seen = self.shown.conflicts.load();
        for (name, running, plan, port) in self.open_ports() {
            let Some(&network) = self.networks.get(&plan.network) else { continue };
            let (number, storm) = (running.number, Arc::clone(&running.storm));
            storm.set(kinds::storm(plan, seen.is_in_loop(name.as_str())));
            ports[number.index()] = Some(PortRow { network, mtu: plan.mtu, macs: plan.macs, storm });
            transmit[number.index()] = Some(port.transmit_side());
            members.entry(network).or_default().push(number);
        }
        let mut networks = vec![None; self.networks.values().map(|n| n.index() + 1).max().unwrap_or(0)];
        for (name, number) in &self.networks {
            let Some(plan) = self.desired.networks.get(name) else { continue };
            let members = members.remove(number).unwrap_or_default().into_boxed_slice();
            networks[number.index()] = Some(NetworkRow { members, mac_age: plan.mac_age, mac_limit: plan.mac_limit });
        }
        let switch = switch::Tables { ports: ports.into(), networks: networks.into(), fdb: self.fdb.clone() };
        self.shards.publish(shard::Tables { switch, transmit: transmit.into() });
    }
}

type Place = Option<NetworkIndex>;

fn log_move(name: &Name, again: bool, service: &Service, cpus: &[u16]) {
    if again {
        let cpus: BTreeSet<u16> = cpus.iter().copied().collect();
        log::info!("port {name}: is served at {} on CPU {}", service.latency, cpu::list(cpus.into_iter()));
    }
}
