//! Shards: the threads that move frames. [`Shards`] is the control side's handle to all of them.
//!
//! # Who runs, what they may hold, how they end
//!
//! A shard is one thread on one CPU ([`worker`]). It owns receive queues; nobody else receives from them. In a turn it
//! visits the ports that have a queue awake, for as long as their share of cycles lasts ([`roster`], [`fairness`]): the queue
//! lends it a batch, [`crate::switch::process`] decides, [`outbox`] groups by destination and calls each destination's
//! transmit side. While it does, it holds the receive queue's lock and at most
//! one transmit lock; nothing else.
//!
//! The control side reaches a shard in two ways only. [`Tables`] are immutable and published whole: a shard takes the
//! newest once per turn, one atomic load. [`Shards::attach`] and [`Shards::detach`] put an order into the shard's mailbox
//! and wait until it was carried out, so at most one order per control thread is ever in a mailbox. A shard never waits
//! for the control side.
//!
//! A queue is *awake* (polled each turn) or *at rest* (armed: its far end notifies us). A queue that was empty for the
//! spin time of its latency level is put to rest; a shard whose queues all rest sleeps in epoll ([`idle`]). Everything
//! that makes a resting queue worth a look calls its [`Wake`](crate::port::Wake) ([`wake`]): kicks through epoll, the rest
//! through a list and an eventfd.
//!
//! Where queues are served is decided when their port comes ([`placement`]) and again once a second by how long their frames
//! wait ([`balance`]); queues that move and shards that come and go are in [`moves`].
//!
//! A shard that is held up in a peer's memory is found by the watchdog ([`watchdog`]), and another thread takes its queues over
//! ([`crew`]), which sleeps until then. Nobody waits for one that is held up. The next such thread is started by one that may
//! wait for it ([`recruiter`]).
//!
//! Teardown: `detach` first takes the wake-up back from the queue, so that none can come in, then has the shard forget
//! the queue; when it returns the port can be dropped. Tables that name a port's transmit side are replaced before that:
//! [`Shards::publish`] returns when every shard has taken the new ones.

mod arrears;
mod balance;
mod crew;
mod fairness;
mod flags;
mod idle;
mod moves;
mod outbox;
mod placement;
mod readings;
mod recruiter;
mod roster;
mod stalls;
mod stamp;
mod wake;
mod watchdog;
mod worker;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::ArcSwap;

use crate::clock::Clock;
use crate::ident::PortIndex;
use crate::limits::{PORTS, SHARDS};
use crate::port::{Handover, Receive, Transmit};
use crate::stats::{Counter, PortCounters, QueueLoad, ShardCounters};
use crate::switch;
use crate::verdict::DropReason;

pub use crew::Absent;
use crew::{Crew, Recipe};
pub use idle::IdlePolicy;
use moves::History;
pub use moves::QueueMove;
use placement::{Seat, choose_together};
pub use placement::{Service, preview};
pub use readings::{Counters, Readings};
pub use stalls::Stall;
use stalls::Stalls;
use stamp::Alarm;
use wake::Engagement;
use watchdog::Watchdog;

/// What the names of shards' threads begin with; the CPU follows.
pub const THREAD_NAME: &str = "shard-";

/// Why the shards could not be started or a port not be placed on one.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// No CPU was given, or too many.
    #[error("{0} shards were asked for: from 1 to {SHARDS} are possible")]
    Count(usize),
    /// The kernel refused what a shard needs.
    #[error("cannot set up the shard on CPU {cpu}: {what}")]
    Setup {
        /// The shard's CPU.
        cpu: u16,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The kernel refused the thread that watches them.
    #[error("cannot start the thread that watches the shards")]
    Watchdog(#[source] std::io::Error),
    /// A port of latency sensitivity `high` needs an exclusive CPU and none was configured.
    #[error("latency-sensitivity high needs a CPU of its own and none is configured: name one in shards.exclusive")]
    NoExclusiveCpu,
    /// Not enough of them are free.
    #[error(
        "latency-sensitivity high needs {needed} {} of its own, and of the {all} in shards.exclusive {free} {} free: add to it, or lower another port's",
        if *.needed == 1 { "CPU" } else { "CPUs" },
        if *.free == 1 { "is" } else { "are" }
    )]
    ExclusiveTaken {
        /// How many the port needs.
        needed: usize,
        /// How many serve nobody.
        free: usize,
        /// How many there are.
        all: usize,
    },
}

/// What shards forward by: immutable, published as a whole.
pub struct Tables {
    /// What the switch decides by.
    pub switch: switch::Tables,
    /// The transmit side of each port, by port number.
    pub transmit: Box<[Option<Arc<dyn Transmit>>]>,
}

impl Tables {
    /// No ports, no networks.
    pub fn empty() -> Self {
        let fdb = Arc::new(switch::Fdb::with_capacity(0, [0; 2]));
        let switch = switch::Tables { ports: Box::default(), networks: Box::default(), fdb };
        Self { switch, transmit: Box::default() }
    }
}

/// Sums over all shards of what was counted for one port; fields as in [`PortCounters`], drops by reason's index.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // The fields are those of PortCounters and documented there.
pub struct PortTotals {
    pub rx_frames: u64,
    pub rx_bytes: u64,
    pub rx_delivered: u64,
    pub rx_dropped: [u64; DropReason::COUNT],
    pub rx_gso: u64,
    pub mtu_exceeded_bytes: u64,
    pub tx_frames: u64,
    pub tx_bytes: u64,
    pub tx_gso: u64,
    pub tx_segmented: u64,
    pub tx_segments_dropped: u64,
    pub tx_completed: u64,
    pub tx_merged: u64,
    pub tx_dropped: [u64; DropReason::COUNT],
}

/// What one shard did since it started. Cycles are those of [`crate::sys::cpu::cycles`].
#[derive(Debug, Clone, serde::Serialize)]
#[allow(missing_docs)] // The fields are those of ShardCounters and documented there.
pub struct ShardReport {
    /// The CPU that the shard is pinned to.
    pub cpu: u16,
    /// It serves ports of latency sensitivity `high` only.
    pub exclusive: bool,
    /// Receive queues that it owns.
    pub queues: usize,
    /// Those of them that are at rest.
    pub resting: usize,
    pub batches: u64,
    pub frames: u64,
    pub busy_cycles: u64,
    pub poll_cycles: u64,
    pub sleep_cycles: u64,
    pub sleeps: u64,
    /// How often it was held up in a VM's memory, so that another thread took over.
    pub held_up: u64,
    /// Threads that are held up now.
    pub stuck: usize,
}

/// One shard as everybody but its own thread sees it.
struct Shard {
    /// No other shard of this process had or will have it.
    number: u32,
    cpu: u16,
    /// The NUMA node of its CPU.
    node: u16,
    exclusive: bool,
    /// It gets no queues any more.
    leaving: bool,
    crew: Arc<Crew>,
}

/// What a shard's thread and the control side share beside the bell.
struct Shared {
    counters: ShardCounters,
    ports: Box<[PortCounters]>,
    resting: AtomicU64,
}

/// How shards run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// What they do when nothing comes.
    pub idle: IdlePolicy,
    /// SCHED_FIFO priority of the exclusive ones.
    pub realtime: Option<u8>,
}

impl From<IdlePolicy> for Policy {
    fn from(idle: IdlePolicy) -> Self {
        Self { idle, realtime: None }
    }
}

/// A handle to all shards. Dropping it stops them.
pub struct Shards {
    // Dropped first: it looks at the others.
    watchdog: Watchdog,
    shards: Vec<Shard>,
    alarm: Arc<Alarm>,
    stalls: Arc<Stalls>,
    tables: Arc<ArcSwap<Tables>>,
    policy: Policy,
    clock: Clock,
    placed: Mutex<Vec<Placed>>,
    history: Mutex<History>,
    /// What shards counted that have ended, by the CPU they were on.
    retired: Vec<(u16, Arc<Shared>)>,
    /// Threads of theirs that are held up.
    left_behind: Vec<Weak<()>>,
    next_number: u32,
}

/// A port to be served, and how.
pub struct Wish {
    /// Its number.
    pub port: PortIndex,
    /// Its receive queues.
    pub queues: Vec<Arc<dyn Receive>>,
    /// What it asks for.
    pub service: Service,
}

/// A queue, and where it is served.
struct Placed {
    port: PortIndex,
    number: u16,
    queue: Arc<dyn Receive>,
    service: Service,
    /// The shard's number.
    shard: u32,
    load: Arc<QueueLoad>,
    /// What the balancer saw of `load` last, and how often since it moved the queue.
    seen: [u64; 3],
    rested: u32,
}

impl Shards {
    /// Starts one shard on each CPU of `cpus`, and one for `high` ports only on each of `exclusive`.
    ///
    /// # Errors
    /// No CPU, too many, or what the kernel said of one.
    pub fn start(cpus: &[u16], exclusive: &[u16], policy: Policy, clock: Clock) -> Result<Self, ShardError> {
        let (tables, alarm) = (Arc::new(ArcSwap::from_pointee(Tables::empty())), Arc::<Alarm>::default());
        let stalls = Arc::<Stalls>::default();
        let watchdog = Watchdog::start(Arc::clone(&alarm), Arc::clone(&tables), Arc::clone(&stalls));
        let watchdog = watchdog.map_err(ShardError::Watchdog)?;
        let mut shards = Self {
            watchdog,
            shards: Vec::new(),
            alarm,
            stalls,
            tables,
            policy,
            clock,
            placed: Mutex::default(),
            history: Mutex::default(),
            retired: Vec::new(),
            left_behind: Vec::new(),
            next_number: 0,
        };
        shards.grow(cpus, exclusive)?;
        Ok(shards)
    }

    /// Starts a shard, which nobody knows of yet. It goes on counting where the last one on its CPU stopped.
    fn start_shard(&mut self, (cpu, exclusive): (u16, bool)) -> Result<Shard, ShardError> {
        let before = self.retired.iter().filter(|(retired, _)| *retired == cpu).map(|(_, shared)| Arc::clone(shared));
        let before: Vec<_> = before.take(2).collect();
        let (policy, clock, tables, alarm) =
            (self.policy, self.clock, Arc::clone(&self.tables), Arc::clone(&self.alarm));
        let recipe = Recipe { cpu, exclusive, policy, clock, tables, alarm };
        let (crew, node) = Crew::start(recipe, before.clone())?;
        let (number, crew) = (self.next_number, Arc::new(crew));
        self.watchdog.watch(&crew);
        self.next_number += 1;
        self.retired.retain(|(_, shared)| !before.iter().any(|block| Arc::ptr_eq(block, shared)));
        Ok(Shard { number, cpu, node, exclusive, leaving: false, crew })
    }

    /// Publishes new tables. When it returns every shard uses them and the old ones are gone, with all that only they
    /// named: they are dropped here, not on a shard. A thread that is held up in a peer's memory is no shard any more, and
    /// lets go of them when it is free.
    pub fn publish(&self, tables: Tables) {
        let old = self.tables.swap(Arc::new(tables));
        for shard in &self.shards {
            shard.crew.refresh();
        }
        drop(old);
    }

    /// The tables in force.
    pub fn tables(&self) -> Arc<Tables> {
        self.tables.load_full()
    }

    /// Gives a port's receive queues to shards, in place of those that serve them now, if any do. A port whose service
    /// changes is not interrupted: its frames wait for as long as the hand-over takes.
    ///
    /// # Errors
    /// `high` and no exclusive CPU, or none that is free; then nothing has changed.
    pub fn attach(&self, port: PortIndex, queues: Vec<Arc<dyn Receive>>, service: &Service) -> Result<(), ShardError> {
        let wish = Wish { port, queues, service: service.clone() };
        self.attach_together(vec![wish]).into_iter().collect()
    }

    /// As [`Shards::attach`] for several ports, in this order: those of latency sensitivity `high` come last. Each may have what
    /// another of them gives up.
    ///
    /// # Errors
    /// For each port, as above.
    pub fn attach_together(&self, wishes: Vec<Wish>) -> Vec<Result<(), ShardError>> {
        let mut placed = self.placed();
        let told: Vec<_> = wishes.iter().map(|wish| (wish.port, wish.queues.len(), &wish.service)).collect();
        let without = |ports: &BTreeSet<PortIndex>| self.seats(placed.iter().filter(|p| !ports.contains(&p.port)));
        let chosen = choose_together(without, &told);
        let place = |(wish, chosen): (Wish, Result<_, _>)| chosen.map(|on| self.place(&mut placed, wish, on));
        wishes.into_iter().zip(chosen).map(place).collect()
    }

    /// Moves a port's queues to these shards, by place in `self.shards`.
    fn place(&self, placed: &mut Vec<Placed>, wish: Wish, chosen: Vec<usize>) {
        let Wish { port, queues, service } = wish;
        self.remove(placed, port);
        for ((number, queue), at) in (0..).zip(queues).zip(chosen) {
            let shard = &self.shards[at];
            let (service, load) = (service.clone(), Arc::default());
            let mut place =
                Placed { port, number, queue, service, load, shard: shard.number, seen: [0; 3], rested: u32::MAX };
            shard.take_on(&mut place);
            place.rested = u32::MAX;
            placed.push(place);
        }
    }

    /// Takes a port's receive queues away; returns when no shard uses them any more.
    pub fn detach(&self, port: PortIndex) {
        self.remove(&mut self.placed(), port);
    }

    fn remove(&self, placed: &mut Vec<Placed>, port: PortIndex) {
        let serves = |shard: &&Shard| placed.iter().any(|place| place.port == port && place.shard == shard.number);
        self.shards.iter().filter(serves).for_each(|shard| shard.crew.detach(port, None));
        placed.retain(|place| place.port != port);
    }

    /// The CPUs that serve `port`, by queue.
    pub fn cpus_of(&self, port: PortIndex) -> Vec<u16> {
        let placed = self.placed();
        let own = placed.iter().filter(|place| place.port == port);
        own.filter_map(|place| Some(self.on(place)?.cpu)).collect()
    }

    /// The NUMA nodes that `port` is served on.
    pub fn nodes_of(&self, port: PortIndex) -> BTreeSet<u16> {
        let placed = self.placed();
        let own = placed.iter().filter(|place| place.port == port);
        own.filter_map(|place| Some(self.on(place)?.node)).collect()
    }

    /// The shard that serves a queue.
    fn on(&self, place: &Placed) -> Option<&Shard> {
        self.shards.iter().find(|shard| shard.number == place.shard)
    }

    fn placed(&self) -> MutexGuard<'_, Vec<Placed>> {
        // What is in it is true after every push and every removal.
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shards with those of `placed` that are there.
    fn seats<'a>(&self, placed: impl Iterator<Item = &'a Placed>) -> Vec<Seat> {
        let seat = |shard: &Shard| {
            let Shard { exclusive, leaving, node, .. } = *shard;
            Seat { exclusive, leaving, node, tenants: Vec::new() }
        };
        let mut seats: Vec<Seat> = self.shards.iter().map(seat).collect();
        for place in placed {
            if let Some(at) = self.shards.iter().position(|shard| shard.number == place.shard) {
                seats[at].tenants.push(place.service.tenant(place.port));
            }
        }
        seats
    }

    /// Sets what was counted for `port` to zero and has all else forgotten, before its number is used for another. The port must be
    /// detached and out of the tables, and nobody be [absent](Shards::absent) who was when that was done.
    pub fn clear_port(&self, port: PortIndex) {
        self.each_counters(port, PortCounters::clear);
        self.stalls.forget(port);
        self.alarm.former.put(port);
    }

    /// The threads that are held up now. They may mean any port that there was so far by its number.
    pub fn absent(&self) -> Absent {
        self.shards.iter().flat_map(|shard| shard.crew.absent()).chain(self.left_behind.iter().cloned()).collect()
    }

    /// What was counted for `port`.
    pub fn port_totals(&self, port: PortIndex) -> PortTotals {
        let mut sum = PortTotals::default();
        self.each_counters(port, |counters| sum.add(counters));
        sum
    }

    /// What each thread that there is or was counts for `port`.
    fn each_counters(&self, port: PortIndex, mut each: impl FnMut(&PortCounters)) {
        let serving = self.shards.iter().flat_map(|shard| shard.crew.blocks());
        let retired = self.retired.iter().map(|(_, shared)| Arc::clone(shared));
        for shared in serving.chain(retired) {
            if let Some(counters) = shared.ports.get(port.index()) {
                each(counters);
            }
        }
    }

    /// What each shard did.
    pub fn report(&self) -> Vec<ShardReport> {
        let placed = self.placed();
        let queues = |shard: &Shard| placed.iter().filter(|place| place.shard == shard.number).count();
        self.shards.iter().map(|shard| shard.report(queues(shard))).collect()
    }

    /// Stops all shards; returns when their threads have ended.
    pub fn stop(self) {}
}

impl Drop for Shard {
    fn drop(&mut self) {
        self.crew.end();
    }
}

impl Shard {
    /// Where it is and whom it serves.
    fn kind(&self) -> (u16, bool) {
        (self.cpu, self.exclusive)
    }

    /// Has it serve a queue that nobody serves.
    fn take_on(&self, place: &mut Placed) {
        let (port, number, latency) = (place.port, place.number, place.service.latency);
        let (queue, load) = (Arc::clone(&place.queue), Arc::clone(&place.load));
        self.crew.attach(Engagement { port, number, queue, latency, load });
        place.shard = self.number;
        place.rested = 0;
    }

    fn report(&self, queues: usize) -> ShardReport {
        report(&self.crew, self.exclusive, queues)
    }

    /// Cycles that it was busy so far.
    fn busy_cycles(&self) -> u64 {
        self.crew.blocks().iter().map(|block| block.counters.busy_cycles.get()).sum()
    }
}

/// What the shard of this crew did, which owns so many queues.
fn report(crew: &Crew, exclusive: bool, queues: usize) -> ShardReport {
    let blocks = crew.blocks();
    let sum = |of: fn(&ShardCounters) -> &Counter| blocks.iter().map(|block| of(&block.counters).get()).sum();
    let (held_up, stuck) = crew.evictions();
    ShardReport {
        cpu: crew.cpu(),
        exclusive,
        queues,
        resting: blocks.iter().map(|block| block.resting.load(Ordering::Relaxed) as usize).sum(),
        batches: sum(|counters| &counters.batches),
        frames: sum(|counters| &counters.frames),
        busy_cycles: sum(|counters| &counters.busy_cycles),
        poll_cycles: sum(|counters| &counters.poll_cycles),
        sleep_cycles: sum(|counters| &counters.sleep_cycles),
        sleeps: sum(|counters| &counters.sleeps),
        held_up,
        stuck,
    }
}

impl Shared {
    fn new() -> Self {
        Self {
            counters: ShardCounters::default(),
            // 2 MiB per shard, 512 bytes for each port number there can be: a shard never has to ask whether a block is there.
            ports: (0..PORTS).map(|_| PortCounters::default()).collect(),
            resting: AtomicU64::new(0),
        }
    }
}

impl Default for PortTotals {
    fn default() -> Self {
        let none = [0; DropReason::COUNT];
        Self {
            rx_frames: 0,
            rx_bytes: 0,
            rx_delivered: 0,
            rx_dropped: none,
            rx_gso: 0,
            mtu_exceeded_bytes: 0,
            tx_frames: 0,
            tx_bytes: 0,
            tx_gso: 0,
            tx_segmented: 0,
            tx_segments_dropped: 0,
            tx_completed: 0,
            tx_merged: 0,
            tx_dropped: none,
        }
    }
}

impl PortTotals {
    /// Counts what the port has done with frames that it was to give to its far end later.
    pub fn hand_over(&mut self, handover: Handover) {
        self.tx_frames += handover.frames;
        self.tx_bytes += handover.bytes;
        self.tx_dropped[DropReason::HostRefused.index()] += handover.refused;
        self.tx_dropped[DropReason::HostBusy.index()] += handover.late;
    }

    fn add(&mut self, counters: &PortCounters) {
        self.rx_frames += counters.rx_frames.get();
        self.rx_bytes += counters.rx_bytes.get();
        self.rx_delivered += counters.rx_delivered.get();
        self.rx_gso += counters.rx_gso.get();
        // Not a sum: each shard has the largest one that it saw.
        self.mtu_exceeded_bytes = self.mtu_exceeded_bytes.max(counters.mtu_exceeded_bytes.get());
        self.tx_frames += counters.tx_frames.get();
        self.tx_bytes += counters.tx_bytes.get();
        self.tx_gso += counters.tx_gso.get();
        self.tx_segmented += counters.tx_segmented.get();
        self.tx_segments_dropped += counters.tx_segments_dropped.get();
        self.tx_completed += counters.tx_completed.get();
        self.tx_merged += counters.tx_merged.get();
        for &reason in DropReason::ALL {
            self.rx_dropped[reason.index()] += counters.rx_dropped.get(reason);
            self.tx_dropped[reason.index()] += counters.tx_dropped.get(reason);
        }
    }
}
