//! Finds shards that are held up in a peer's memory: [`Watchdog`].
//!
//! The kernel holds a page fault for as long as somebody punches a hole into the file (fallocate(2); shmem_fault waits for it
//! and takes no signal meanwhile), and a front end can do that to the memory that it shares. Nothing ends such a wait. What
//! can be done is to see it: every [`LOOK`] the watchdog looks at the shards' stamps ([`super::stamp`]). One that is the same
//! as last time, of a thread that waits in the kernel (its state in `/proc` is another than running), has been held up since
//! then. A thread that is merely kept from its CPU is runnable and counts for nothing.
//!
//! A thread may be held up and run: it makes the pages that it touches, huge ones of zeros, thousands in one visit; or the kernel has it
//! fault again and again, because whoever the page is charged to is out of memory and nobody is there to be killed for it. So one that
//! runs in the same place all along counts as well if it had page faults since the last look, or has used [`SPUN`] of CPU time there: an
//! interrupt that falls upon it, which every user of the host can have take 0.1 s and more, is neither. What it takes is its
//! port's own affair below [`HELD_UP`]: it is paid out of the port's part of the shard ([`super::fairness`]).
//!
//! After [`HELD_UP`] the shard's queues go to another thread on the same CPU ([`super::crew`]), so that other ports go on. The
//! port in whose memory it was is told ([`crate::port::Transmit::hold_up`]): it loses its connection for the second time in
//! [`MEMORY`], and at once for [`LONG`]. The first short one is forgiven, because a fault may also wait for swap, or for another
//! thread of ours that maps memory.
//!
//! Shorter times are nothing by themselves, and are told and held against the port when they [come to too much](super::arrears).
//!
//! A shard that writes a frame is in the memory of two ports: the receiver may have punched its buffers, and the sender what it
//! sends, since that was looked at. A time that may be either's is told with both and held against neither, or each could have
//! the other barred; but both are on probation for [`MEMORY`]. Shards copy the frames of such a port, and those for it, into their
//! own memory before they write them ([`super::outbox`]). So who does it again does it alone: a sender where its frames are read,
//! a receiver where they are written.
//!
//! The watchdog starts and joins no thread and maps nothing: while a front end has somebody hold the lock of the process's
//! memory map, that would have it wait ([`super::recruiter`]).
//!
//! While all shards sleep the watchdog parks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use super::Tables;
use super::arrears::{Arrears, Blame, Sum};
use super::crew::{Crew, Eviction};
use super::recruiter::{Call, Crews, Recruiter};
use super::stalls::{Ongoing, Stalls};
use super::stamp::{Alarm, Phase, Seen, Stamp};
use crate::ident::PortIndex;
use crate::sys::cpu;
use crate::sys::threads::{self, Activity};

/// How often the watchdog looks.
const LOOK: Duration = Duration::from_millis(5);

/// Looks at sleeping shards after which it parks: half a second.
const LINGER: u32 = 100;

/// How long a shard is held up until its other queues go elsewhere.
const HELD_UP: Duration = Duration::from_millis(20);

/// How long a shard is held up until the port is barred for the first time that it happens.
const LONG: Duration = Duration::from_millis(100);

/// CPU time in one place that counts without page faults: longer than any batch, and than the interrupts that a user can cause.
const SPUN: Duration = Duration::from_secs(1);

/// For how long a port's last time is remembered, and a port is on probation.
const MEMORY: Duration = Duration::from_secs(60);

/// The watchdog of some shards. Its thread ends with it.
pub(super) struct Watchdog {
    common: Arc<Common>,
    thread: Option<JoinHandle<()>>,
    // Ends after the watchdog, which calls it.
    _recruiter: Recruiter,
}

struct Common {
    alarm: Arc<Alarm>,
    crews: Crews,
    ends: AtomicBool,
}

/// One thread that is watched.
struct Watched {
    crew: Weak<Crew>,
    stamp: Arc<Stamp>,
    seen: Seen,
    /// What it had done at the last look, and the CPU time that it had used when it was first seen there.
    activity: Activity,
    ran: Duration,
    /// How long it has been held up at that place.
    held: Duration,
    evicted: bool,
    barred: bool,
    stall: Option<Ongoing>,
}

impl Watchdog {
    /// Starts one for shards that forward by `tables`.
    pub fn start(alarm: Arc<Alarm>, tables: Arc<ArcSwap<Tables>>, stalls: Arc<Stalls>) -> std::io::Result<Self> {
        let crews = Crews::default();
        let (recruiter, recruit) = Recruiter::start(Arc::clone(&crews))?;
        let common = Arc::new(Common { alarm, crews, ends: AtomicBool::new(false) });
        let own = Arc::clone(&common);
        let (watched, last_time, suspected, arrears) = Default::default();
        let patrol = Patrol { common: own, tables, stalls, recruit, watched, last_time, suspected, arrears };
        let patrol = move || patrol.run();
        let thread = std::thread::Builder::new().name("watchdog".into()).stack_size(256 * 1024).spawn(patrol)?;
        Ok(Self { common, thread: Some(thread), _recruiter: recruiter })
    }

    /// Watches a crew for as long as there is one.
    pub fn watch(&self, crew: &Arc<Crew>) {
        self.common.crews.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(crew));
        self.common.alarm.call();
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.common.ends.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// The watchdog's thread.
struct Patrol {
    common: Arc<Common>,
    tables: Arc<ArcSwap<Tables>>,
    stalls: Arc<Stalls>,
    recruit: Call,
    watched: Vec<Watched>,
    /// When each port has last held a shard up.
    last_time: BTreeMap<PortIndex, Instant>,
    /// When each port on probation was last one of two that may have.
    suspected: BTreeMap<PortIndex, Instant>,
    /// What short times have come to.
    arrears: Arrears,
}

/// How a thread is held up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// It waits in the kernel.
    Waits,
    /// It runs there.
    Runs,
}

impl Watched {
    fn new(crew: Weak<Crew>, stamp: Arc<Stamp>) -> Self {
        let (seen, activity, [ran, held]) = (stamp.seen(), Activity::default(), [Duration::ZERO; 2]);
        Self { crew, stamp, seen, activity, ran, held, evicted: false, barred: false, stall: None }
    }

    /// Whether it is held up where it was last seen, where it was at the look before if it `goes_on` there.
    fn look(&mut self, goes_on: bool) -> Option<How> {
        let activity = threads::activity(self.stamp.thread()?);
        // If it is elsewhere by now, it may be there that it waits: it sleeps, as a rule.
        if self.stamp.seen() != self.seen {
            return None;
        }
        let before = std::mem::replace(&mut self.activity, activity);
        if !goes_on {
            self.ran = activity.ran;
        }
        let toils = activity.faults > before.faults || activity.ran.saturating_sub(self.ran) >= SPUN;
        match activity.waits {
            true => Some(How::Waits),
            false => (goes_on && toils).then_some(How::Runs),
        }
    }

    /// Has its thread, if it runs, leave the CPU to the one that serves its ports now.
    fn step_back(&self, how: How) {
        let thread = self.stamp.thread().filter(|_| how == How::Runs);
        if let Some(error) = thread.and_then(|thread| cpu::step_back(thread).err()) {
            log::warn!("the thread that is held up keeps its part of the CPU: {error}");
        }
    }
}

impl Patrol {
    fn run(mut self) {
        let common = Arc::clone(&self.common);
        threads::touch_stack();
        common.alarm.serve();
        while !common.ends.load(Ordering::SeqCst) {
            common.alarm.look(true);
            let (mut quiet, mut last) = (0, Instant::now());
            while quiet < LINGER && !common.ends.load(Ordering::SeqCst) {
                std::thread::sleep(LOOK);
                // A watchdog that is late itself cannot say what went on meanwhile.
                let since = std::mem::replace(&mut last, Instant::now()).elapsed().min(2 * LOOK);
                quiet = if self.look(since) { 0 } else { quiet + 1 };
            }
            common.alarm.look(false);
            if !self.look(Duration::ZERO) && !common.ends.load(Ordering::SeqCst) {
                std::thread::park();
            }
        }
    }

    /// Looks at all of them; returns whether any is awake.
    fn look(&mut self, since: Duration) -> bool {
        self.enlist();
        self.forget();
        if !self.suspected.is_empty() {
            self.acquit();
        }
        if !self.arrears.is_empty() {
            self.arrears.settle(Instant::now());
        }
        let mut awake = false;
        for at in 0..self.watched.len() {
            awake |= self.look_at(at, since);
        }
        awake
    }

    /// Brings the list of threads up to date: those that serve, and those that are held up.
    fn enlist(&mut self) {
        let mut crews = self.common.crews.lock().unwrap_or_else(PoisonError::into_inner);
        crews.retain(|crew| crew.strong_count() > 0);
        for crew in crews.iter() {
            let Some(present) = crew.upgrade() else { continue };
            let (_, stamp) = present.server();
            if !self.watched.iter().any(|watched| Arc::ptr_eq(&watched.stamp, &stamp)) {
                self.watched.push(Watched::new(Weak::clone(crew), stamp));
            }
        }
        drop(crews);
        // A thread that has ended has left its stamp to us alone.
        self.watched.retain(|watched| Arc::strong_count(&watched.stamp) > 1);
    }

    fn look_at(&mut self, at: usize, since: Duration) -> bool {
        let Some(watched) = self.watched.get_mut(at) else { return false };
        let Some(crew) = watched.crew.upgrade() else { return false };
        if watched.evicted && crew.readmit() {
            self.recruit.make();
        }
        let seen = watched.stamp.seen();
        let goes_on = seen == watched.seen;
        if !goes_on || !seen.is_abroad() {
            (watched.seen, watched.held, watched.barred) = (seen, Duration::ZERO, false);
            watched.stall = None;
        }
        if !seen.is_abroad() {
            return watched.evicted || seen.at().0 != Phase::Asleep;
        }
        let Some(how) = watched.look(goes_on) else { return true };
        if goes_on {
            watched.held += since;
        }
        let long = watched.held >= HELD_UP;
        if long {
            self.find(at, &crew, how);
        }
        if long == (how == How::Runs) {
            self.find_short(at, &crew, since, goes_on);
        }
        true
    }

    /// One has been held up for so long that others are to serve its ports.
    fn find(&mut self, at: usize, crew: &Crew, how: How) {
        let Some(watched) = self.watched.get_mut(at) else { return };
        let ((_, port), sender) = (watched.seen.at(), watched.seen.sender());
        let (held, told) = (watched.held, watched.stall.is_some());
        let begin = || self.stalls.begin(crew.cpu(), (port, sender), held);
        watched.stall.get_or_insert_with(begin).lasts(held);
        if !watched.evicted {
            let stamp = Arc::clone(&watched.stamp);
            watched.evicted = evict(crew, &stamp, Some(port).filter(|_| sender.is_none()), held, told);
            if watched.evicted {
                self.recruit.make();
                watched.step_back(how);
            }
        }
        let sum = Sum { held, times: 1 };
        // Once for each stall, whether or not there was another thread.
        match sender {
            Some(sender) if !told => self.suspect([port, sender]),
            Some(_) => {}
            None if !told => {
                let again = self.last_time.insert(port, Instant::now()).is_some_and(|last| last.elapsed() < MEMORY);
                // Memory that is new has a host that is a VM itself run for some 10 ms, more than once.
                let bar = held >= LONG || again && how == How::Waits;
                self.accuse(at, port, sum, bar, told);
            }
            None if held >= LONG => self.accuse(at, port, sum, true, told),
            None => {}
        }
    }

    /// One is held up for a time that is nothing by itself: with others before it may be too much.
    fn find_short(&mut self, at: usize, crew: &Crew, since: Duration, goes_on: bool) {
        let Some(watched) = self.watched.get(at) else { return };
        let ((_, port), sender) = (watched.seen.at(), watched.seen.sender());
        let (now, blame) = (Instant::now(), if sender.is_some() { Blame::Shared } else { Blame::Sole });
        let mut add = |port| self.arrears.add((port, blame), since, goes_on, now);
        let (whose, senders) = (add(port), sender.and_then(add));
        let Some(sum) = whose.or(senders) else { return };
        self.stalls.note(crew.cpu(), (port, sender), sum);
        match sender {
            Some(sender) => self.suspect([port, sender]),
            None => {
                self.last_time.insert(port, now);
                self.accuse(at, port, sum, true, false);
            }
        }
    }

    /// Puts ports on probation of which one or the other held a shard up.
    fn suspect(&mut self, ports: [PortIndex; 2]) {
        for port in ports {
            self.suspected.insert(port, Instant::now());
            self.common.alarm.probation.put(port, true);
        }
    }

    /// Forgets all that is held against ports whose numbers are others' now.
    fn forget(&mut self) {
        let Self { common, last_time, suspected, arrears, .. } = self;
        common.alarm.former.take(|port| {
            last_time.remove(&port);
            arrears.forget(port);
            if suspected.remove(&port).is_some() {
                common.alarm.probation.put(port, false);
            }
        });
    }

    /// Ends the probation of those whose time has passed.
    fn acquit(&mut self) {
        let probation = &self.common.alarm.probation;
        self.suspected.retain(|&port, last| {
            let stays = last.elapsed() < MEMORY;
            if !stays {
                probation.put(port, false);
            }
            stays
        });
    }

    /// Tells a port that it held a shard up, whether that is to end its connection, once, and whether it was told before.
    fn accuse(&mut self, at: usize, port: PortIndex, Sum { held, times }: Sum, bar: bool, told: bool) {
        let Some(watched) = self.watched.get_mut(at).filter(|watched| !watched.barred) else { return };
        watched.barred = bar;
        let tables = self.tables.load();
        if let Some(Some(side)) = tables.transmit.get(port.index()) {
            side.hold_up(held, times, bar, told);
        }
    }
}

/// Gives a shard's queues to another thread, but for those of `port`; returns whether that was possible. If it was not, the next
/// look tries again, and says nothing of that once it was `told`.
fn evict(crew: &Crew, stamp: &Arc<Stamp>, port: Option<PortIndex>, held: Duration, told: bool) -> bool {
    let (cpu, held) = (crew.cpu(), held.as_millis());
    match crew.evict(stamp, port) {
        Eviction::Done => {
            log::warn!(
                "the shard on CPU {cpu} is held up in a VM's memory for {held} ms: another thread serves its ports"
            );
            true
        }
        Eviction::Nobody if !told => {
            log::error!(
                "the shard on CPU {cpu} is held up in a VM's memory for {held} ms, and so are its ports: no other thread is there yet"
            );
            false
        }
        Eviction::Refused | Eviction::Nobody => false,
    }
}
