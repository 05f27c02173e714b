//! What changes about shards while they run: queues that move ([`Shards::balance`], [`Shards::settle`]), and shards that come and
//! go ([`Shards::grow`], [`Shards::shrink`]).
//!
//! A queue moves by being given up by one shard, which waits for the end of its turn, and taken on by another. Its frames wait
//! in its ring for that long. A shard goes when its queues have others; what it counted stays ([`super::Shards`] keeps its
//! block), so counters of ports never fall.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use super::balance::{Group, Load, Move, decide};
use super::placement::{Service, Tenant, choose};
use super::{Placed, Shard, ShardError, Shards, Wish};
use crate::clock::Instant;
use crate::ident::{LatencySensitivity, PortIndex};
use crate::limits::SHARDS;
use crate::port::Receive;
use crate::sys::cpu;

/// How many moves are remembered.
const MOVES: usize = 64;

/// Queues of a port that the balancer moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueMove {
    /// When.
    pub at: Instant,
    /// Whose.
    pub port: PortIndex,
    /// How many.
    pub queues: usize,
    /// The CPU of the shard that had them.
    pub from: u16,
    /// The CPU of the shard that has them.
    pub to: u16,
    /// How long frames waited on the old shard, in microseconds.
    pub delay_micros: u64,
}

/// What the balancer remembers from one look to the next.
#[derive(Debug, Default)]
pub(super) struct History {
    /// Busy cycles of each shard, by number.
    busy: BTreeMap<u32, u64>,
    moves: Vec<QueueMove>,
}

/// A port that needs another shard, with all its queues.
type Stranded = (PortIndex, Vec<Arc<dyn Receive>>, Service);

/// What stays together: all queues of a tenant, or one of a port.
type Key = (Tenant, Option<u16>);

impl Placed {
    fn key(&self) -> Key {
        let number = self.service.spreads().then_some(self.number);
        (if number.is_some() { Tenant::Port(self.port) } else { self.service.tenant(self.port) }, number)
    }

    /// What the queue counted since the last look.
    fn sample(&mut self, shard: usize) -> Group {
        let home = self.service.home();
        let now = [self.load.cycles.get(), self.load.visits.get(), self.load.waited.get()];
        let [cycles, visits, waited] = [0, 1, 2].map(|at| now[at].saturating_sub(self.seen[at]));
        self.seen = now;
        self.rested = self.rested.saturating_add(1);
        Group { shard, cycles, visits, waited, rested: self.rested, home }
    }
}

impl Shards {
    /// Moves what should move. To be called at even intervals, of a second or so. Returns what was moved.
    pub fn balance(&self, now: Instant) -> Vec<QueueMove> {
        let mut placed = self.placed();
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let shared: Vec<&Shard> = self.shards.iter().filter(|shard| !shard.exclusive && !shard.leaving).collect();
        let mut busy = |shard: &Shard| {
            let total = shard.busy_cycles();
            total.saturating_sub(history.busy.insert(shard.number, total).unwrap_or(total))
        };
        let loads: Vec<Load> = shared.iter().map(|shard| Load { node: shard.node, busy: busy(shard) }).collect();
        let (keys, groups) = groups(&mut placed, &shared);
        let micro = cpu::cycles_per_second() / 1_000_000;
        let Some(Move { group, to, delay }) = decide(&loads, &groups, micro) else { return Vec::new() };
        let (from, to) = (shared[groups[group].shard], shared[to]);
        let mut moves: BTreeMap<PortIndex, QueueMove> = BTreeMap::new();
        for place in placed.iter_mut().filter(|place| place.shard == from.number && place.key() == keys[group]) {
            from.crew.detach(place.port, Some(place.number));
            to.take_on(place);
            let delay_micros = delay / micro.max(1);
            let fresh = QueueMove { at: now, port: place.port, queues: 0, from: from.cpu, to: to.cpu, delay_micros };
            moves.entry(place.port).or_insert(fresh).queues += 1;
        }
        history.moves.extend(moves.values());
        let old = history.moves.len().saturating_sub(MOVES);
        history.moves.drain(..old);
        moves.into_values().collect()
    }

    /// Takes over on which NUMA node the memory of a port's guest is. Its queues move if more of them can be served on that node
    /// then, and if its level asks for it. Returns whether they did.
    pub fn settle(&self, port: PortIndex, node: Option<u16>) -> bool {
        let mut placed = self.placed();
        let own = |place: &&mut Placed| place.port == port;
        placed.iter_mut().filter(own).for_each(|place| place.service.node = node);
        let own: Vec<&Placed> = placed.iter().filter(|place| place.port == port).collect();
        let Some(service) = own.first().map(|place| place.service.clone()) else { return false };
        let Some(home) = service.home() else { return false };
        let near = own.iter().filter(|place| self.on(place).is_some_and(|shard| shard.node == home)).count();
        if near == own.len() {
            return false;
        }
        let seats = self.seats(placed.iter().filter(|place| place.port != port));
        let Ok(chosen) = choose(&seats, port, own.len(), &service) else { return false };
        if chosen.iter().filter(|&&at| seats[at].node == home).count() <= near {
            return false;
        }
        let queues = own.iter().map(|place| Arc::clone(&place.queue)).collect();
        self.place(&mut placed, Wish { port, queues, service }, chosen);
        true
    }

    /// The last moves, oldest first.
    pub fn moves(&self) -> Vec<QueueMove> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).moves.clone()
    }

    /// Starts shards on those of these CPUs that have none yet. Those on others get no port any more; [`Shards::shrink`] ends
    /// them.
    ///
    /// # Errors
    /// No CPU, too many, or what the kernel said of one; then nothing has changed.
    pub fn grow(&mut self, cpus: &[u16], exclusive: &[u16]) -> Result<(), ShardError> {
        let count = cpus.len() + exclusive.len();
        if cpus.is_empty() || count > SHARDS {
            return Err(ShardError::Count(count));
        }
        let kinds = || cpus.iter().map(|&cpu| (cpu, false)).chain(exclusive.iter().map(|&cpu| (cpu, true)));
        let new: Vec<_> = kinds().filter(|kind| self.shards.iter().all(|shard| shard.kind() != *kind)).collect();
        let mut come = Vec::new();
        for kind in new {
            match self.start_shard(kind) {
                Ok(shard) => come.push(shard),
                Err(error) => {
                    come.into_iter().for_each(|shard| self.retire(shard));
                    return Err(error);
                }
            }
        }
        for shard in &mut self.shards {
            shard.leaving = kinds().all(|kind| shard.kind() != kind);
        }
        self.shards.extend(come);
        Ok(())
    }

    /// Ends the shards that [`Shards::grow`] found on CPUs that are not wanted; their ports go to others. Returns the ports
    /// that no shard can serve any more, and why.
    pub fn shrink(&mut self) -> Vec<(PortIndex, ShardError)> {
        let mut refused = Vec::new();
        for (port, queues, service) in self.stranded() {
            if let Err(error) = self.attach(port, queues, &service) {
                self.detach(port);
                refused.push((port, error));
            }
        }
        let (go, stay) = std::mem::take(&mut self.shards).into_iter().partition(|shard| shard.leaving);
        self.shards = stay;
        let go: Vec<Shard> = go;
        go.into_iter().for_each(|shard| self.retire(shard));
        refused
    }

    /// Whether `port` has queues on a shard that [`Shards::shrink`] is going to end.
    pub fn is_stranded(&self, port: PortIndex) -> bool {
        let leaving = |number| self.shards.iter().any(|shard| shard.leaving && shard.number == number);
        self.placed().iter().any(|place| place.port == port && leaving(place.shard))
    }

    /// Ends a shard and keeps what it counted.
    fn retire(&mut self, shard: Shard) {
        shard.crew.end();
        self.left_behind.retain(|thread| thread.strong_count() > 0);
        self.left_behind.extend(shard.crew.absent());
        self.retired.extend(shard.crew.blocks().into_iter().map(|block| (shard.cpu, block)));
    }

    /// The ports that have queues on shards which are to go.
    fn stranded(&self) -> Vec<Stranded> {
        let placed = self.placed();
        let going = |place: &Placed| self.shards.iter().any(|shard| shard.leaving && shard.number == place.shard);
        let mut ports: BTreeMap<PortIndex, (Vec<Arc<dyn Receive>>, Service)> = BTreeMap::new();
        for place in placed.iter().filter(|place| going(place)) {
            ports.entry(place.port).or_insert_with(|| (Vec::new(), place.service.clone()));
        }
        // All queues of such a port, in their order.
        for place in placed.iter() {
            if let Some((queues, _)) = ports.get_mut(&place.port) {
                queues.push(Arc::clone(&place.queue));
            }
        }
        ports.into_iter().map(|(port, (queues, service))| (port, queues, service)).collect()
    }
}

/// The groups that may move, and what each stands for.
fn groups(placed: &mut [Placed], shared: &[&Shard]) -> (Vec<Key>, Vec<Group>) {
    let (mut keys, mut groups): (Vec<Key>, Vec<Group>) = Default::default();
    for place in placed.iter_mut().filter(|place| place.service.latency != LatencySensitivity::High) {
        let Some(shard) = shared.iter().position(|shard| shard.number == place.shard) else { continue };
        let (key, sample) = (place.key(), place.sample(shard));
        match keys.iter().zip(&mut groups).find(|(other, group)| **other == key && group.shard == shard) {
            Some((_, group)) => {
                group.cycles += sample.cycles;
                group.visits += sample.visits;
                group.waited += sample.waited;
                group.rested = group.rested.min(sample.rested);
                group.home = group.home.or(sample.home);
            }
            None => {
                keys.push(key);
                groups.push(sample);
            }
        }
    }
    (keys, groups)
}
