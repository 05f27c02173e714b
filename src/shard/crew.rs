//! The threads of one shard: [`Crew`], the one that serves its queues, and those that are held up.
//!
//! A thread that the kernel holds in a page fault of some peer's memory cannot be called back. So its queues are given to
//! another thread on the same CPU ([`Crew::evict`]), but for those of the port whose memory it is: they wait for the first
//! one. That one, once it is free, finds itself evicted before it visits anything else, and ends; what it counted is kept, and
//! what was left to it goes to whoever serves then ([`Crew::readmit`]).
//!
//! Nobody waits for a thread that is held up. An order is for whoever serves: when that changes, orders that were not carried
//! out count as done, because the new thread is given only what the shard has by then.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use super::stamp::{Alarm, Stamp};
use super::wake::{Bell, Engagement};
use super::worker::Worker;
use super::{Policy, ShardError, Shared, THREAD_NAME, Tables};
use crate::clock::Clock;
use crate::ident::PortIndex;
use crate::sys::numa::node_here;

/// Threads of one shard that may be held up at a time. Ports that hold up are barred, so that there are more is a flaw
/// elsewhere, and each costs a counter block. Tests have one.
const HELD_UP: usize = if cfg!(test) { 1 } else { 64 };

/// How long the end of a thread is waited for that does not move any more.
const PATIENCE: Duration = Duration::from_secs(1);

/// How threads of a shard are made.
#[derive(Clone)]
pub(super) struct Recipe {
    pub cpu: u16,
    pub exclusive: bool,
    pub policy: Policy,
    pub clock: Clock,
    pub tables: Arc<ArcSwap<Tables>>,
    pub alarm: Arc<Alarm>,
}

/// One thread that serves or served queues.
pub(super) struct Server {
    pub bell: Arc<Bell>,
    pub stamp: Arc<Stamp>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A shard's threads.
pub(super) struct Crew {
    recipe: Recipe,
    members: Mutex<Members>,
}

/// Who they are, and what they serve.
struct Members {
    server: Server,
    engaged: Vec<Engagement>,
    held_up: Vec<(Server, Vec<Engagement>)>,
    /// Counter blocks of threads that have ended, for those to come.
    blocks: Vec<Arc<Shared>>,
    evictions: u64,
    ends: bool,
}

impl Recipe {
    /// Starts a thread; returns the NUMA node that it is on, too.
    pub fn start(&self, shared: Arc<Shared>) -> Result<(Server, u16), ShardError> {
        let Self { cpu, exclusive, policy, clock, .. } = *self;
        let failed = |what| move |source| ShardError::Setup { cpu, what, source };
        let bell = Arc::new(Bell::new().map_err(failed("epoll and eventfd"))?);
        let stamp = Arc::<Stamp>::default();
        let worker = Worker::new(&bell, &shared, &self.tables, policy.idle, clock, &stamp, &self.alarm);
        let (started, start) = std::sync::mpsc::channel();
        let own = Arc::clone(&stamp);
        let run = move || {
            own.enroll();
            crate::sys::doorbell::enroll();
            let pinned = crate::sys::cpu::pin_to(cpu).map_err(|source| ("pin its thread", source));
            let realtime = policy.realtime.filter(|_| exclusive).map_or(Ok(()), crate::sys::cpu::run_realtime);
            let ready = pinned.and(realtime.map_err(|source| ("run it with SCHED_FIFO (shards.realtime)", source)));
            let good = ready.is_ok();
            // The receiver waits until this arrives.
            let _ = started.send(ready.map(|()| node_here()));
            if good {
                serve(worker);
            }
        };
        let name = format!("{THREAD_NAME}{cpu}");
        let thread = std::thread::Builder::new().name(name).spawn(run).map_err(failed("a thread"))?;
        let node = start.recv().unwrap_or(Ok(0)).map_err(|(what, source)| ShardError::Setup { cpu, what, source })?;
        Ok((Server { bell, stamp, shared, thread: Some(thread) }, node))
    }
}

/// Runs a worker to its end. A panic on a shard is a bug of ours that leaves its ports dead and the control side waiting
/// for it: end the process, which has said why, and let whoever supervises it start it anew. Guests reconnect.
fn serve(worker: Worker) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| worker.run())).is_err() {
        std::process::abort();
    }
}

impl Server {
    /// Whether its thread has ended.
    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Has it end; returns once it has, or does not move any more: then it ends when whoever holds it up lets go of it.
    fn end(&mut self) {
        self.bell.stop();
        let (mut seen, mut since) = (self.stamp.seen(), Instant::now());
        while !self.has_ended() {
            if self.stamp.seen().is_abroad() && since.elapsed() > PATIENCE {
                break;
            }
            std::thread::sleep(Duration::from_micros(200));
            if seen != self.stamp.seen() {
                (seen, since) = (self.stamp.seen(), Instant::now());
            }
        }
        if let Some(thread) = self.thread.take_if(|thread| thread.is_finished()) {
            // A shard that panics ends the process, so there is nothing to learn here.
            let _ = thread.join();
        }
        self.shared.resting.store(0, Ordering::Relaxed);
    }
}

impl Crew {
    /// A crew with its first thread.
    pub fn new(recipe: Recipe, server: Server) -> Self {
        let (engaged, held_up, blocks) = Default::default();
        Self { recipe, members: Mutex::new(Members { server, engaged, held_up, blocks, evictions: 0, ends: false }) }
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        // Held for a change of lists and the start of a thread; whoever has it waits for no shard.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The CPU.
    pub fn cpu(&self) -> u16 {
        self.recipe.cpu
    }

    /// The thread that serves, by its bell and its stamp.
    pub fn server(&self) -> (Arc<Bell>, Arc<Stamp>) {
        let members = self.members();
        (Arc::clone(&members.server.bell), Arc::clone(&members.server.stamp))
    }

    /// Has it serve one more queue.
    pub fn attach(&self, engagement: Engagement) {
        let mut members = self.members();
        members.engaged.push(engagement.clone());
        members.server.bell.attach(engagement);
    }

    /// Has it give up the queues of `port`, or that one of them; returns when it serves them no more.
    pub fn detach(&self, port: PortIndex, number: Option<u16>) {
        let goes = |engagement: &Engagement| {
            engagement.port == port && number.is_none_or(|number| engagement.number == number)
        };
        let mut members = self.members();
        let mut gone: Vec<_> = members.engaged.extract_if(.., |engagement| goes(engagement)).collect();
        for (_, left) in &mut members.held_up {
            gone.extend(left.extract_if(.., |engagement| goes(engagement)));
        }
        let bell = Arc::clone(&members.server.bell);
        drop(members);
        match number {
            Some(number) => bell.release(port, number),
            None => bell.detach(port),
        }
        // Whoever serves has done so, unless it was held up meanwhile.
        gone.iter().for_each(|engagement| engagement.queue.attach(None));
    }

    /// Returns when whoever serves has taken new tables.
    pub fn refresh(&self) {
        let (bell, _) = self.server();
        bell.refresh();
    }

    /// Gives the queues of a thread that is held up in memory of `port` to a new one, but for those of that port. `false` if
    /// it is not the one that serves any more, or if there is no other thread to be had.
    pub fn evict(&self, stamp: &Arc<Stamp>, port: PortIndex) -> Result<bool, ShardError> {
        let mut members = self.members();
        if members.ends || members.held_up.len() >= HELD_UP || !Arc::ptr_eq(&members.server.stamp, stamp) {
            return Ok(false);
        }
        let block = members.blocks.pop().unwrap_or_else(|| Arc::new(Shared::new()));
        let started = self.recipe.start(Arc::clone(&block));
        let (server, _) = started.inspect_err(|_| members.blocks.push(block))?;
        let old = std::mem::replace(&mut members.server, server);
        old.stamp.evict();
        old.bell.close();
        let left = members.engaged.extract_if(.., |engagement| engagement.port == port).collect();
        let Members { server, engaged, .. } = &*members;
        engaged.iter().for_each(|engagement| server.bell.attach(engagement.clone()));
        server.bell.take_over();
        members.held_up.push((old, left));
        members.evictions += 1;
        Ok(true)
    }

    /// Gives what was left to threads that were held up and have ended to the one that serves. Returns how many are held up
    /// still.
    pub fn readmit(&self) -> usize {
        let mut members = self.members();
        let Members { server, engaged, held_up, blocks, .. } = &mut *members;
        for (mut ended, left) in held_up.extract_if(.., |(server, _)| server.has_ended()) {
            ended.end();
            blocks.push(Arc::clone(&ended.shared));
            left.iter().for_each(|engagement| server.bell.attach(engagement.clone()));
            engaged.extend(left);
        }
        members.held_up.len()
    }

    /// What all its threads have counted, block by block.
    pub fn blocks(&self) -> Vec<Arc<Shared>> {
        let members = self.members();
        let held_up = members.held_up.iter().map(|(server, _)| &server.shared);
        let all = std::iter::once(&members.server.shared).chain(held_up).chain(&members.blocks);
        all.map(Arc::clone).collect()
    }

    /// How often its queues had to be given to another thread, and how many threads are held up now.
    pub fn evictions(&self) -> (u64, usize) {
        let members = self.members();
        (members.evictions, members.held_up.len())
    }

    /// Ends its threads; returns when that has happened. One that is held up is left behind.
    pub fn end(&self) {
        let mut members = self.members();
        if !std::mem::replace(&mut members.ends, true) {
            members.server.end();
        }
    }
}
