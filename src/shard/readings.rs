//! What shards count and where ports are served, for readers that must not wait for a change: [`Readings`].
//!
//! Changes of shards and of who is served where take as long as a shard's turn does; what is here was taken down after the last
//! one. Counters are the shards' own and always of now.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::crew::Crew;
use super::stalls::Stalls;
use super::{PortTotals, Shard, ShardReport, Shards, Shared, Stall, Tables, report};
use crate::ident::PortIndex;

/// A look at all shards. Reading from it waits for no shard and no change.
pub struct Readings {
    shards: Vec<Reading>,
    retired: Vec<Arc<Shared>>,
    served: BTreeMap<PortIndex, Vec<u16>>,
    stalls: Arc<Stalls>,
    tables: Arc<ArcSwap<Tables>>,
}

/// One shard.
struct Reading {
    exclusive: bool,
    queues: usize,
    crew: Arc<Crew>,
}

/// Where all threads that there are or were count. A thread that is started later counts elsewhere.
pub struct Counters(Vec<Arc<Shared>>);

impl Shards {
    /// What there is to read from now on. Waits for a change that is going on.
    pub fn readings(&self) -> Readings {
        let placed = self.placed();
        let queues = |shard: &Shard| placed.iter().filter(|place| place.shard == shard.number).count();
        let reading = |shard: &Shard| Reading {
            exclusive: shard.exclusive,
            queues: queues(shard),
            crew: Arc::clone(&shard.crew),
        };
        let mut served: BTreeMap<PortIndex, Vec<u16>> = BTreeMap::new();
        for place in placed.iter() {
            served.entry(place.port).or_default().extend(self.on(place).map(|shard| shard.cpu));
        }
        served.values_mut().for_each(|cpus| {
            cpus.sort_unstable();
            cpus.dedup();
        });
        Readings {
            shards: self.shards.iter().map(reading).collect(),
            retired: self.retired.iter().map(|(_, shared)| Arc::clone(shared)).collect(),
            served,
            stalls: Arc::clone(&self.stalls),
            tables: Arc::clone(&self.tables),
        }
    }
}

impl Readings {
    /// What each shard did.
    pub fn report(&self) -> Vec<ShardReport> {
        self.shards.iter().map(|shard| report(&shard.crew, shard.exclusive, shard.queues)).collect()
    }

    /// How many shards there are.
    pub fn count(&self) -> usize {
        self.shards.len()
    }

    /// The counters of all ports, for whoever reads those of many.
    pub fn counters(&self) -> Counters {
        let serving = self.shards.iter().flat_map(|shard| shard.crew.blocks());
        Counters(serving.chain(self.retired.iter().map(Arc::clone)).collect())
    }

    /// The CPUs that serve `port`, ascending.
    pub fn cpus_of(&self, port: PortIndex) -> &[u16] {
        self.served.get(&port).map(Vec::as_slice).unwrap_or_default()
    }

    /// Shards that are held up in a peer's memory or were, since this was asked last: for one reader.
    pub fn take_stalls(&self) -> Vec<Stall> {
        self.stalls.take()
    }

    /// The tables in force.
    pub fn tables(&self) -> Arc<Tables> {
        self.tables.load_full()
    }
}

impl Counters {
    /// What was counted for `port` up to now.
    pub fn of(&self, port: PortIndex) -> PortTotals {
        let mut sum = PortTotals::default();
        self.0.iter().filter_map(|shared| shared.ports.get(port.index())).for_each(|counters| sum.add(counters));
        sum
    }
}
