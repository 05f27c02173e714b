//! The thread that gives frames to the host: [`Writer`].
//!
//! What the host does with a frame it does in the thread that writes it, with softirqs off: its bridges, its filters, its sockets, and
//! all who wait for those. How long that takes is up to whoever has set them up, who needs no right on the switch: 0.5 s where
//! a socket of an unprivileged user has five million waiters, 6.5 s behind filters that a container has on its own interface. On a
//! shard's thread all ports of that shard waited for it. So shards copy frames ([`super::backlog`]), and this thread, which has none of
//! the shards' CPUs where others are left, writes them.
//!
//! Senders have turns, of a time each ([`TURN_MICROS`]), so that one that sends a lot takes nothing from others but its part, and one whose frames
//! are slow has others wait for one frame at a time. What frames take beyond that is charged to their sender ([`Account`]): one
//! that has taken too much is shut out for a while, and what it has waiting is dropped as `host-busy`, as is what has waited for long.
//!
//! Invariant: frames of a sender are written in the order in which they came into the backlog.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use super::account::{ALLOWANCE, Account, Cost};
use super::backlog::{Backlog, Spent};
use super::piece::{Piece, Pieces};
use crate::ident::PortIndex;
use crate::limits::VNET_HEADER_BYTES;
use crate::port::Handover;
use crate::port::batch_lock::micros;
use crate::sys::cpu;
use crate::sys::threads::{Schedule, ThreadSchedule};

/// Bytes of its stack.
const STACK_BYTES: usize = 64 * 1024;

/// How nice it is to others (setpriority(2)), where it may be less than they are: frames of all who use the interface wait for it, and
/// CPUs that are not the shards' are often those of VMs.
const NICE: i32 = -5;

/// How long frames are refused at once after the interface was found down or gone, in microseconds: those that are in the backlog by
/// then are lost.
const REFUSED_MICROS: u64 = 100_000;

/// What a turn of a sender may take, in microseconds, and how many frames and bytes it may have.
const TURN_MICROS: u64 = 100;
const TURN_FRAMES: usize = 32;
const TURN_BYTES: usize = 64 * 1024;

/// How many turns a sender passes at most whose frames are not slow: its last turn may have been long because the thread had no CPU.
const MOST_TURNS_OWED: u64 = 10;

/// What is borne of a host that takes long.
#[derive(Debug, Clone, Copy)]
struct Forbearance {
    /// What slow frames of one sender may take at once.
    allowance: Duration,
    /// How long a frame may have waited, in microseconds. A sender whose turn comes that late is one of many that are slow.
    late_micros: u64,
}

const FORBEARANCE: Forbearance = Forbearance { allowance: ALLOWANCE, late_micros: 1_000_000 };

/// How long the end of a port waits for the thread, which the host may have for long.
const PATIENCE: Duration = Duration::from_secs(1);

/// A host that has had a frame for so long is told of.
const LONG: Duration = Duration::from_secs(1);

/// For how long it is told that a sender was shut out.
const TOLD: Duration = Duration::from_secs(10);

/// What shards and who looks have of it.
pub(super) struct Outgoing {
    pub(super) backlog: Backlog,
    counters: Counters,
    /// Until when frames are refused at once, by [`cpu::cycles`]; 0 if they are not.
    refused_until: AtomicU64,
    /// Since when the host has a frame, by [`cpu::cycles`]; 0 if it has none.
    writing_since: AtomicU64,
    /// How many senders are shut out.
    shut: AtomicU64,
    /// What was charged to one that was, in microseconds, and when, by [`cpu::cycles`]; 0 if none was.
    charged_micros: AtomicU64,
    charged_at: AtomicU64,
    forbearance: Forbearance,
    ends: AtomicBool,
}

/// What became of the frames that shards have put into the backlog.
#[derive(Default)]
struct Counters {
    transmitted: AtomicU64,
    transmitted_bytes: AtomicU64,
    refused: AtomicU64,
    late: AtomicU64,
    /// The last error as an errno, 0 before the first.
    last_error: AtomicI32,
}

/// The thread, as its port has it.
pub(super) struct Writer {
    outgoing: Arc<Outgoing>,
    thread: Thread,
    /// Disconnected when the thread has ended.
    ended: Mutex<Receiver<()>>,
}

impl Writer {
    /// Starts it for `tun`, which it closes when it ends.
    ///
    /// # Errors
    /// The kernel has no thread.
    pub(super) fn start(outgoing: &Arc<Outgoing>, tun: OwnedFd, name: &str) -> io::Result<Self> {
        let ((alive, ended), own) = (channel::<()>(), Arc::clone(outgoing));
        let run = move || {
            let _ = cpu::set_nice(NICE);
            Turns::new(&own, &tun).run();
            drop(tun);
            drop(alive);
        };
        let thread = std::thread::Builder::new().name(format!("tap-{name}")).stack_size(STACK_BYTES).spawn(run)?;
        Ok(Self { outgoing: Arc::clone(outgoing), thread: thread.thread().clone(), ended: Mutex::new(ended) })
    }

    /// Has it look at the backlog.
    #[inline]
    pub(super) fn wake(&self) {
        self.thread.unpark();
    }

    /// Has it end, with what is in the backlog lost. Waits for that, unless the host has it for long: then it ends when it comes back.
    pub(super) fn end(&self, name: &str) {
        self.outgoing.ends.store(true, Ordering::SeqCst);
        self.thread.unpark();
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            log::warn!("{name}: the host takes long for a frame: the interface is closed when it is done with that");
        }
    }
}

impl Outgoing {
    pub(super) fn new() -> Arc<Self> {
        Self::with(FORBEARANCE)
    }

    fn with(forbearance: Forbearance) -> Arc<Self> {
        Arc::new(Self {
            backlog: Backlog::new(),
            counters: Counters::default(),
            refused_until: AtomicU64::new(0),
            writing_since: AtomicU64::new(0),
            shut: AtomicU64::new(0),
            charged_micros: AtomicU64::new(0),
            charged_at: AtomicU64::new(0),
            forbearance,
            ends: AtomicBool::new(false),
        })
    }

    /// Whether frames are refused at once: the interface was down or gone a moment ago.
    #[inline]
    pub(super) fn refuses(&self) -> bool {
        let until = self.refused_until.load(Ordering::Relaxed);
        until != 0 && crate::port::earlier(cpu::cycles(), until)
    }

    /// The host's last error as an errno, 0 before the first.
    pub(super) fn last_error(&self) -> i32 {
        self.counters.last_error.load(Ordering::Relaxed)
    }

    /// What became of frames that shards have put into the backlog.
    pub(super) fn handover(&self) -> Handover {
        let Counters { transmitted, transmitted_bytes, refused, late, .. } = &self.counters;
        let [frames, bytes, refused, late] =
            [transmitted, transmitted_bytes, refused, late].map(|counter| counter.load(Ordering::Relaxed));
        Handover { frames, bytes, refused, late }
    }

    /// What is to be said of a host that takes too long.
    pub(super) fn trouble(&self) -> Option<String> {
        let since = self.writing_since.load(Ordering::Relaxed);
        let busy = cpu::duration(cpu::cycles().wrapping_sub(since));
        if since != 0 && busy >= LONG {
            return Some(format!("the host has been busy with one frame for {} s; others wait for it", busy.as_secs()));
        }
        let [charged_at, micros] =
            [&self.charged_at, &self.charged_micros].map(|counter| counter.load(Ordering::Relaxed));
        let told = charged_at != 0 && cpu::duration(cpu::cycles().wrapping_sub(charged_at)) < TOLD;
        told.then(|| {
            let millis = micros.div_ceil(1000);
            format!("the host took {millis} ms for one frame: ports that send such frames lose some of what they send (host-busy)")
        })
    }
}

/// Senders that have frames, and whose turn it is.
struct Turns<'w> {
    outgoing: &'w Outgoing,
    tun: &'w OwnedFd,
    round: VecDeque<PortIndex>,
    lanes: BTreeMap<PortIndex, Lane>,
    schedule: ThreadSchedule,
}

/// A sender.
struct Lane {
    /// What was taken of the backlog and not written yet, the first one first.
    records: Pieces,
    account: Account,
    /// What its last turn took beyond that of a turn, in counts of [`cpu::cycles`]: it passes so many.
    owes: u64,
    /// It is shut out until then, by [`cpu::cycles`].
    shut_until: Option<u64>,
}

impl Lane {
    /// Whether it does without this turn, because it has had it before.
    fn passes(&mut self) -> bool {
        let passes = self.owes >= micros(TURN_MICROS);
        if passes {
            self.owes -= micros(TURN_MICROS);
        }
        passes
    }

    /// It had a turn that took so long, in counts of [`cpu::cycles`]. What is more than some turns may be that the thread had no CPU, or is
    /// charged otherwise.
    fn had(&mut self, took: u64) {
        self.owes = took.saturating_sub(micros(TURN_MICROS)).min(micros(MOST_TURNS_OWED * TURN_MICROS));
    }
}

impl<'w> Turns<'w> {
    fn new(outgoing: &'w Outgoing, tun: &'w OwnedFd) -> Self {
        let (round, lanes) = (VecDeque::new(), BTreeMap::new());
        Self { outgoing, tun, round, lanes, schedule: ThreadSchedule::of_this_thread() }
    }

    fn run(mut self) {
        let mut spent = None;
        while !self.outgoing.ends.load(Ordering::SeqCst) {
            self.outgoing.backlog.settle(spent.take(), &mut self.round);
            let due = self.let_in();
            match self.round.pop_front() {
                Some(sender) => spent = self.turn(sender),
                None => due.map_or_else(std::thread::park, std::thread::park_timeout),
            }
        }
    }

    /// Lets in who was shut out for long enough; returns when the next one is due.
    fn let_in(&mut self) -> Option<Duration> {
        if self.outgoing.shut.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let (now, mut next) = (cpu::cycles(), None);
        for (sender, lane) in &mut self.lanes {
            let Some(until) = lane.shut_until else { continue };
            if crate::port::earlier(now, until) {
                let left = cpu::duration(until.wrapping_sub(now));
                next = Some(next.map_or(left, |next: Duration| next.min(left)));
            } else {
                lane.shut_until = None;
                self.outgoing.backlog.shut(*sender, false);
                self.outgoing.shut.fetch_sub(1, Ordering::Relaxed);
            }
        }
        next
    }

    /// Gives `sender` a turn, and another one later if it has more.
    fn turn(&mut self, sender: PortIndex) -> Option<Spent> {
        let Forbearance { allowance, late_micros } = self.outgoing.forbearance;
        let new = || Lane { records: Pieces::default(), account: Account::new(allowance), owes: 0, shut_until: None };
        let lane = self.lanes.entry(sender).or_insert_with(new);
        if lane.passes() {
            self.round.push_back(sender);
            return None;
        }
        if lane.records.is_empty() {
            lane.records = self.outgoing.backlog.take(sender);
        }
        if lane.records.is_empty() {
            return None;
        }
        let (mut spent, mut bytes) = (Spent { sender, records: 0, pieces: Pieces::default() }, 0);
        let (begin, mut longest) = (cpu::cycles(), 0);
        self.schedule.refresh();
        for _ in 0..TURN_FRAMES {
            let Some(record) = lane.records.pop() else { break };
            bytes += record.len();
            let before = cpu::cycles();
            if lane.shut_until.is_some() || record.age(before) > micros(late_micros) {
                self.outgoing.counters.late.fetch_add(1, Ordering::Relaxed);
            } else {
                self.outgoing.write(self.tun, &record, before);
            }
            let after = cpu::cycles();
            longest = longest.max(after.wrapping_sub(before));
            record.come_apart(&mut spent.pieces);
            spent.records += 1;
            if bytes >= TURN_BYTES || after.wrapping_sub(begin) >= micros(TURN_MICROS) {
                break;
            }
        }
        lane.had(cpu::cycles().wrapping_sub(begin));
        self.charge(sender, cpu::duration(longest));
        self.round.push_back(sender);
        Some(spent)
    }

    /// Charges `sender` what one of its frames took, if that is too much.
    fn charge(&mut self, sender: PortIndex, longest: Duration) {
        let Some(lane) = self.lanes.get_mut(&sender).filter(|_| Account::is_slow(longest)) else { return };
        // What the thread has waited for a CPU meanwhile is nobody's doing.
        let Schedule { waited, ran } = self.schedule.since_refreshed();
        let took = longest.saturating_sub(waited);
        // Whoever has sent meanwhile comes first.
        lane.owes = micros(took.min(LONG).as_micros() as u64);
        let shut = self.outgoing.shut.load(Ordering::Relaxed) as u32;
        let Some(rest) = lane.account.charge(Cost { took, ran }, shut) else { return };
        if lane.shut_until.is_none() {
            self.outgoing.shut.fetch_add(1, Ordering::Relaxed);
        }
        lane.shut_until = Some(cpu::cycles().wrapping_add(micros(rest.as_micros() as u64)));
        self.outgoing.charged_micros.store(took.as_micros() as u64, Ordering::Relaxed);
        self.outgoing.charged_at.store(cpu::cycles().max(1), Ordering::Relaxed);
        self.outgoing.backlog.shut(sender, true);
    }
}

impl Outgoing {
    fn write(&self, tun: &OwnedFd, record: &Piece, now: u64) {
        let Counters { transmitted, transmitted_bytes, refused, last_error, .. } = &self.counters;
        self.writing_since.store(now.max(1), Ordering::Relaxed);
        let written = rustix::io::writev(tun.as_fd(), &record.slices());
        self.writing_since.store(0, Ordering::Relaxed);
        let Err(error) = written else {
            transmitted.fetch_add(1, Ordering::Relaxed);
            transmitted_bytes.fetch_add(record.len().saturating_sub(VNET_HEADER_BYTES) as u64, Ordering::Relaxed);
            self.refused_until.store(0, Ordering::Relaxed);
            return;
        };
        refused.fetch_add(1, Ordering::Relaxed);
        last_error.store(error.raw_os_error(), Ordering::Relaxed);
        // EIO: it is down; EBADFD: it was deleted (tun_get_user in drivers/net/tun.c). Anything else is about that frame.
        if matches!(error.raw_os_error(), libc::EIO | libc::EBADFD) {
            let until = cpu::cycles().wrapping_add(micros(REFUSED_MICROS)).max(1);
            self.refused_until.store(until, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
