//! The threads of one shard: [`Crew`], the one that serves its queues, and those that are held up.
//!
//! A thread that the kernel holds in a page fault of some peer's memory cannot be called back. So its queues are given to
//! another thread on the same CPU ([`Crew::evict`]), but for those of the port whose memory it is, if that is known: they wait
//! for the first one. That one, once it is free, finds itself evicted before it visits anything else, and ends; what it counted is kept, and
//! what was left to it goes to whoever serves then ([`Crew::readmit`]).
//!
//! [Several](STAND_INS) others are there beforehand, asleep, with all that they need: to start one the kernel needs the lock of the
//! process's memory map, which may be held for as long as the faults that they are to help against. So neither the watchdog nor
//! whoever holds the lock of a crew starts or joins a thread or maps memory. Who may wait for that does it afterwards
//! ([`Crew::replenish`], [`super::recruiter`]).
//!
//! Nobody waits for a thread that is held up. An order is for whoever serves: when that changes, orders that were not carried
//! out count as done, because the new thread is given only what the shard has by then.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
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

/// Threads of a shard that are there to take its queues over. So many ports can hold it up one after the other while another one
/// keeps threads from being started. Each costs 2.8 MiB, most of it a counter block, and sleeps.
const STAND_INS: usize = 4;

/// Queues that a shard has room for from the start, so that a stand-in takes that many over without asking for memory.
pub(super) const QUEUES_AT_HAND: usize = 256;

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
    /// What the thread has until it has let go of everything else.
    present: Weak<()>,
}

/// Threads that were held up at some moment. Until they are gone, they may go on with what they found then: ports that have ended
/// since, by the numbers that these had.
#[derive(Default)]
pub struct Absent(Vec<Weak<()>>);

impl Absent {
    /// Whether any is still there.
    pub fn is_any(&self) -> bool {
        self.0.iter().any(|thread| thread.strong_count() > 0)
    }
}

impl FromIterator<Weak<()>> for Absent {
    fn from_iter<T: IntoIterator<Item = Weak<()>>>(threads: T) -> Self {
        Self(threads.into_iter().collect())
    }
}

/// A shard's threads.
pub(super) struct Crew {
    recipe: Recipe,
    members: Mutex<Members>,
}

/// Who they are, and what they serve.
struct Members {
    server: Server,
    /// They serve nothing yet, and the last is next.
    stand_ins: Vec<Server>,
    engaged: Vec<Engagement>,
    held_up: Vec<(Server, Vec<Engagement>)>,
    /// Those that were held up and have ended, to be joined.
    ended: Vec<Server>,
    /// Counter blocks of threads that have ended, for those to come.
    blocks: Vec<Arc<Shared>>,
    evictions: u64,
    ends: bool,
}

/// What came of the wish to give a thread's queues to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Eviction {
    /// Another one serves them.
    Done,
    /// It is not the one that serves any more, or too many are held up.
    Refused,
    /// The last stand-in was taken, and there is no other one yet.
    Nobody,
}

impl Recipe {
    /// Starts a thread, which sleeps until it is given something to do; returns the NUMA node that it is on, too. Maps memory.
    fn start(&self, shared: Arc<Shared>) -> Result<(Server, u16), ShardError> {
        let Self { cpu, exclusive, policy, clock, .. } = *self;
        let failed = |what| move |source| ShardError::Setup { cpu, what, source };
        // What enrolls needs the handler of its signal.
        crate::sys::doorbell::watch().map_err(failed("a thread that watches doorbells"))?;
        let bell = Arc::new(Bell::new().map_err(failed("epoll and eventfd"))?);
        let stamp = Arc::<Stamp>::default();
        let worker = Worker::new(&bell, &shared, &self.tables, policy.idle, clock, &stamp, &self.alarm);
        let (started, start) = std::sync::mpsc::channel();
        let (own, here) = (Arc::clone(&stamp), Arc::new(()));
        let present = Arc::downgrade(&here);
        let run = move || {
            crate::sys::threads::touch_stack();
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
            drop(here);
        };
        let name = format!("{THREAD_NAME}{cpu}");
        let thread = std::thread::Builder::new().name(name).spawn(run).map_err(failed("a thread"))?;
        let node = start.recv().unwrap_or(Ok(0)).map_err(|(what, source)| ShardError::Setup { cpu, what, source })?;
        Ok((Server { bell, stamp, shared, thread: Some(thread), present }, node))
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
    /// All of it, to be ended without a lock; what stays knows no thread any more.
    fn leave(&mut self) -> Self {
        let Self { bell, stamp, shared, thread, present } = self;
        let (bell, stamp, shared) = (Arc::clone(bell), Arc::clone(stamp), Arc::clone(shared));
        Self { bell, stamp, shared, thread: thread.take(), present: Weak::clone(present) }
    }

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
    /// Starts a crew: the thread that serves and its stand-ins. They go on counting in `blocks`. Returns the NUMA node that they
    /// are on, too.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn start(recipe: Recipe, mut blocks: Vec<Arc<Shared>>) -> Result<(Self, u16), ShardError> {
        let mut block = || blocks.pop().unwrap_or_else(|| Arc::new(Shared::new()));
        let (server, node) = recipe.start(block())?;
        let (engaged, held_up, ended) = (Vec::with_capacity(QUEUES_AT_HAND), Vec::new(), Vec::new());
        let stand_ins = Vec::with_capacity(STAND_INS);
        let members = Members { server, stand_ins, engaged, held_up, ended, blocks, evictions: 0, ends: false };
        let crew = Self { recipe, members: Mutex::new(members) };
        crew.replenish().inspect_err(|_| crew.end())?;
        Ok((crew, node))
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        // Held for a change of lists; whoever has it waits for nobody.
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

    /// Gives the queues of a thread that is held up to a stand-in, but for those of `port`, in whose memory it is, if that is
    /// known. Starts nothing and waits for nobody: [`Crew::replenish`] is to be called by somebody else then.
    pub fn evict(&self, stamp: &Arc<Stamp>, port: Option<PortIndex>) -> Eviction {
        let mut members = self.members();
        if members.ends || members.held_up.len() >= HELD_UP || !Arc::ptr_eq(&members.server.stamp, stamp) {
            return Eviction::Refused;
        }
        let Some(server) = members.stand_ins.pop() else { return Eviction::Nobody };
        let old = std::mem::replace(&mut members.server, server);
        old.stamp.evict();
        old.bell.close();
        let left = members.engaged.extract_if(.., |engagement| Some(engagement.port) == port).collect();
        let Members { server, engaged, .. } = &*members;
        engaged.iter().for_each(|engagement| server.bell.attach(engagement.clone()));
        server.bell.take_over();
        members.held_up.push((old, left));
        members.evictions += 1;
        Eviction::Done
    }

    /// Gives what was left to threads that were held up and have ended to the one that serves. Returns whether there were such;
    /// [`Crew::replenish`] joins them.
    pub fn readmit(&self) -> bool {
        let mut members = self.members();
        let Members { server, engaged, held_up, ended, blocks, .. } = &mut *members;
        let before = ended.len();
        for (old, left) in held_up.extract_if(.., |(server, _)| server.has_ended()) {
            old.shared.resting.store(0, Ordering::Relaxed);
            blocks.push(Arc::clone(&old.shared));
            ended.push(old);
            left.iter().for_each(|engagement| server.bell.attach(engagement.clone()));
            engaged.extend(left);
        }
        ended.len() > before
    }

    /// Joins threads that have ended, and starts the stand-ins that are missing. For a thread that may wait, and for one at a time.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn replenish(&self) -> Result<(), ShardError> {
        let ended = std::mem::take(&mut self.members().ended);
        ended.into_iter().for_each(|mut server| server.end());
        while let Some(block) = self.next_block() {
            let block = block.unwrap_or_else(|| Arc::new(Shared::new()));
            let started = self.recipe.start(Arc::clone(&block));
            let mut members = self.members();
            let (mut fresh, _) = started.inspect_err(|_| members.blocks.push(block))?;
            if !members.ends {
                members.stand_ins.push(fresh);
                continue;
            }
            members.blocks.push(Arc::clone(&fresh.shared));
            drop(members);
            fresh.end();
        }
        Ok(())
    }

    /// Where another stand-in is to count, if one is missing and there is such a place.
    #[allow(clippy::option_option)] // Whether one is missing, and whether there is.
    fn next_block(&self) -> Option<Option<Arc<Shared>>> {
        let mut members = self.members();
        let missing = !members.ends && members.stand_ins.len() < STAND_INS;
        missing.then(|| members.blocks.pop())
    }

    /// What all its threads have counted, block by block; those that somebody may be counting in, held up, last.
    pub fn blocks(&self) -> Vec<Arc<Shared>> {
        // Room before the lock is taken, under which nothing large is allocated.
        let mut all = Vec::with_capacity(2 * HELD_UP + 1 + STAND_INS);
        let members = self.members();
        let serving = std::iter::once(&members.server).chain(&members.stand_ins).map(|server| &server.shared);
        let held_up = members.held_up.iter().map(|(server, _)| &server.shared);
        all.extend(serving.chain(&members.blocks).chain(held_up).map(Arc::clone));
        all
    }

    /// The threads that are held up now, or were left behind at its end.
    pub fn absent(&self) -> Vec<Weak<()>> {
        let members = self.members();
        let last = Some(&members.server).filter(|_| members.ends);
        let all = members.held_up.iter().map(|(server, _)| server).chain(last);
        all.map(|server| Weak::clone(&server.present)).collect()
    }

    /// How often its queues had to be given to another thread, and how many threads are held up now.
    pub fn evictions(&self) -> (u64, usize) {
        let members = self.members();
        (members.evictions, members.held_up.len())
    }

    /// Ends its threads; returns when that has happened. One that is held up is left behind.
    pub fn end(&self) {
        let mut members = self.members();
        if std::mem::replace(&mut members.ends, true) {
            return;
        }
        let mut all = vec![members.server.leave()];
        all.extend(members.stand_ins.iter_mut().map(Server::leave));
        drop(members);
        all.into_iter().for_each(|mut server| server.end());
    }
}
