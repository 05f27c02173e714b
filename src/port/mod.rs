//! The one seam that every kind of port implements: [`Receive`] a batch, [`Transmit`] a batch, [`Wake`] a shard.
//!
//! The words are the switch's: a port *receives* what comes from its far end (a guest, the host's stack) and *transmits*
//! to it. A port has one receive queue per queue pair, each owned by one shard at a time; its transmit side is shared by
//! all shards and locks for itself, once per batch.
//!
//! A turn of a shard looks the same for every kind: [`Receive::receive`] locks the queue, gathers a batch and lends it to
//! the closure it was given, which decides and calls [`Transmit::transmit`] of each destination; then the queue gives the
//! buffers back to its far end. The closure shape is what lets a batch borrow guest memory for exactly as long as the
//! lock that keeps it mapped is held.
//!
//! Locks: a shard holds one receive queue's lock and, inside it, one transmit lock at a time, for which it does not wait longer
//! than a batch may take: who is in there may be held up by a peer. The control side takes none of them, so no cycle can form.

pub mod faulty;
pub mod loopback;
pub mod null;
pub mod rate_limit;
pub mod replay;
pub mod tap;
pub mod vnic;

mod batch_lock;
mod store;
#[cfg(test)]
mod testing;
mod watch;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::frame::{Batch, Heads, Needs};
use crate::ident::LatencySensitivity;
use crate::limits::BATCH_FRAMES;
use crate::mem::NodePages;
use crate::verdict::DropReason;

/// What the far end of a port has done to others since the port was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Conduct {
    /// How often a shard was held up in its memory.
    pub held_up: u64,
    /// How often it was sent away for what it did, and the port served nobody for a while.
    pub barred: u64,
    /// What it did the last time: "had an interrupt block the switch".
    pub deed: Option<&'static str>,
    /// For how many seconds the port then serves nobody.
    pub seconds: u64,
}

/// What became of frames that a port takes to give them to its far end later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Handover {
    /// Those that the far end has taken.
    pub frames: u64,
    /// Their bytes, without FCS.
    pub bytes: u64,
    /// How many it refused.
    pub refused: u64,
    /// How many were dropped because they had waited for too long.
    pub late: u64,
}

impl std::ops::Add for Handover {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            frames: self.frames + other.frames,
            bytes: self.bytes + other.bytes,
            refused: self.refused + other.refused,
            late: self.late + other.late,
        }
    }
}

/// What a receive queue got done in one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// It had nothing, or its lock is held by the control side, which wakes the queue when it lets go.
    Nothing,
    /// It had frames, of which so many were dealt with, and may have more; 0 if the first takes further visits to be flooded.
    Frames(usize),
}

/// One receive queue of a port. Exactly one shard calls [`Receive::receive`], [`Receive::arm`] and [`Receive::disarm`].
pub trait Receive: Send + Sync {
    /// Gathers up to a batch of frames, lends it to `process`, and then gives its buffers back to the far end.
    ///
    /// A queue that can keep frames for its next visit makes the batch divisible ([`Batch::make_divisible`]) and keeps those that
    /// were not [dealt with](Batch::dealt_with).
    ///
    /// `process` is not called when there is nothing. `heads` is scratch memory of the shard.
    fn receive(&self, heads: &mut Heads, process: &mut dyn FnMut(&mut Batch<'_>)) -> Received;

    /// Asks the far end to notify from now on. Returns `true` if the queue may rest: nothing came in before the request
    /// could be seen. `false`: there is work, call [`Receive::receive`] again (and [`Receive::disarm`] first).
    fn arm(&self) -> bool;

    /// Tells the far end that notifications are not needed: the shard is polling.
    fn disarm(&self);

    /// Hands the queue the means to wake its shard: now, and each time the queue moves to another shard. `None` takes it
    /// back; the old shard is then never woken for this queue again.
    fn attach(&self, wake: Option<Arc<dyn Wake>>);
}

/// What a shard lends to each of its receive queues, so that the queue is looked at again.
pub trait Wake: Send + Sync {
    /// Has the queue polled soon: it may have become able to receive. Cheap to call twice.
    fn wake(&self);

    /// Has the queue polled whenever `fd` becomes readable (edge-triggered: nobody reads it). The caller calls
    /// [`Wake::unwatch`] before it closes the descriptor.
    ///
    /// # Errors
    /// What the kernel says of an `fd` that cannot be waited for.
    fn watch(&self, fd: BorrowedFd<'_>) -> std::io::Result<()>;

    /// Ends a [`Wake::watch`].
    fn unwatch(&self, fd: BorrowedFd<'_>);
}

/// The transmit side of a port, shared by all shards.
pub trait Transmit: Send + Sync {
    /// Gives the frames of `batch` that `picks` names (by index, ascending) to the far end, in that order, and notifies
    /// it at most once. What became of each is noted in `outcome`; no other frame's outcome is touched.
    fn transmit(&self, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome);

    /// Sends the notifications that [`Outcome::hold`] was told of and that `which` names. Returns when the first of those
    /// that are left is due.
    fn flush(&self, _which: Flush) -> Option<u64> {
        None
    }

    /// A shard was held up in the far end's memory for this long, and is still; or shards were in so many `times`, if these are more
    /// than one. If the port is to be barred, no shard finds anything there from now on, and the far end is sent away. `again`: it
    /// was told of the same time before, which goes on. Called by a thread that waits for nobody.
    fn hold_up(&self, _held: std::time::Duration, _times: u32, _bar: bool, _again: bool) {}
}

/// Which notifications that are held back are to be sent. Times are counts of [`crate::sys::cpu::cycles`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flush {
    /// Those that are due by now.
    Due(u64),
    /// Also those that were held back only because the shard had more to do: it has nothing now.
    Idle(u64),
    /// All of them: the shard stops looking.
    All,
}

/// What became of each frame of a batch at one destination.
#[derive(Debug)]
pub struct Outcome {
    /// One bit per frame of the batch: it was delivered.
    pub delivered: u64,
    /// For frames that were not: why. Valid where a pick's bit in `delivered` is not set.
    pub reasons: [DropReason; BATCH_FRAMES],
    /// Frames delivered as several, because the far end cannot segment.
    pub segmented: u32,
    /// Segments of those that found no room, while earlier ones of their frame did, and bytes of their payload.
    pub cut: (u32, u64),
    /// Frames delivered with a checksum that the far end could not complete.
    pub completed: u32,
    /// Frames delivered as parts of larger ones, because the far end takes such.
    pub merged: u32,
    /// When the first notification is due that was held back; nothing if none was.
    pub held: Option<u64>,
    /// The frames that were delivered are given to the far end later, and counted then ([`Port::handover`]).
    pub later: bool,
    /// Cycles that notifying the far end took, beyond what that takes: the far end's doing, not the sender's.
    pub excess: u64,
}

impl Outcome {
    /// Nothing delivered yet.
    pub const fn new() -> Self {
        Self {
            delivered: 0,
            reasons: [DropReason::NoDestination; BATCH_FRAMES],
            segmented: 0,
            cut: (0, 0),
            completed: 0,
            merged: 0,
            held: None,
            later: false,
            excess: 0,
        }
    }

    /// Notes that frame `index` was delivered.
    #[inline]
    pub fn deliver(&mut self, index: u8) {
        self.delivered |= 1 << (index % 64);
    }

    /// Notes that a frame that was delivered had to be made complete: by segmentation, or else by its checksum.
    pub fn rewritten(&mut self, by_segmentation: bool) {
        if by_segmentation {
            self.segmented += 1;
        } else {
            self.completed += 1;
        }
    }

    /// Notes that the last `segments` of a frame that was delivered could not be, with so many bytes of payload.
    pub fn cut(&mut self, segments: usize, bytes: usize) {
        self.cut.0 += segments as u32;
        self.cut.1 += bytes as u64;
    }

    /// Notes that frame `index` could not be delivered here.
    #[inline]
    pub fn refuse(&mut self, index: u8, reason: DropReason) {
        self.reasons[usize::from(index) % BATCH_FRAMES] = reason;
    }

    /// Notes that a notification was held back: the shard calls [`Transmit::flush`] at the cycle count `due`, or earlier.
    #[inline]
    pub fn hold(&mut self, due: u64) {
        self.held = Some(self.held.map_or(due, |other| if earlier(due, other) { due } else { other }));
    }

    /// Notes the same refusal for every frame of `picks`.
    pub fn refuse_all(&mut self, picks: &[u8], reason: DropReason) {
        for &index in picks {
            self.refuse(index, reason);
        }
    }
}

/// Whether the cycle count `a` comes before `b`. Counts wrap; what is compared here is never half a wrap apart.
#[inline]
pub fn earlier(a: u64, b: u64) -> bool {
    (a.wrapping_sub(b) as i64) < 0
}

impl Default for Outcome {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether a port can carry frames, and if not, why. What `linecard port show` prints.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "state", content = "reason", rename_all = "kebab-case")]
pub enum LinkState {
    /// It carries frames.
    Up,
    /// It carries frames, but not all that its far end has for it; the sentence says which are lost, and the way out.
    Impaired(String),
    /// It does not, and that is nobody's fault: the sentence says what it waits for.
    Down(String),
    /// It was stopped because of what its far end did; the sentence says what, and how it gets going again.
    Stopped(String),
    /// What it stands on is gone; the sentence says what. It is made again with the next change of the configuration.
    Gone(String),
}

impl LinkState {
    /// Whether it carries frames.
    pub fn is_up(&self) -> bool {
        matches!(self, Self::Up | Self::Impaired(_))
    }
}

/// What one ring of a port counts of kicks (the guest notifies the switch, which costs it an exit) and calls (the switch
/// interrupts the guest), and of those that could be spared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Notifications {
    /// How often the guest kicked.
    pub kicks: u64,
    /// Batches that the shard found without having waited for a kick.
    pub kicks_suppressed: u64,
    /// Interrupts sent to the guest.
    pub calls: u64,
    /// Batches after which the guest wanted no interrupt.
    pub calls_suppressed: u64,
    /// Batches whose interrupt went together with that of others.
    pub calls_coalesced: u64,
}

/// One port, as the control side holds it. Dropping it ends it: its far end sees the link go, its files are removed.
pub trait Port: Send + Sync {
    /// Its receive queues, by queue number.
    fn receive_queues(&self) -> Vec<Arc<dyn Receive>>;

    /// Its transmit side.
    fn transmit_side(&self) -> Arc<dyn Transmit>;

    /// Whether it carries frames.
    fn link(&self) -> LinkState;

    /// Takes over a new largest MTU, in bytes, that its far end may announce; `None` if any will do. The switch enforces
    /// the MTU by itself; this is for kinds whose far end announces one while the port runs.
    fn set_mtu(&self, _mtu: Option<u16>) {}

    /// Takes over how much it minds delay, for kinds that hold notifications back. Called before shards serve the port, and
    /// again when it changes.
    fn set_latency(&self, _latency: LatencySensitivity) {}

    /// What its queues count of notifications, for kinds whose far end is notified.
    fn notifications(&self) -> Vec<Notifications> {
        Vec::new()
    }

    /// What its far end has done to others so far. Waits for nobody.
    fn conduct(&self) -> Conduct {
        Conduct::default()
    }

    /// What became of frames of which it said that they are [handed over later](Outcome::later). Waits for nobody.
    fn handover(&self) -> Handover {
        Handover::default()
    }

    /// On which NUMA nodes the memory lies that its frames are in, for kinds that have a guest's, as far as that is known;
    /// `None` while no guest is there. Costs some system calls.
    fn memory_nodes(&self) -> Option<NodePages> {
        None
    }

    /// Takes over which offloads its far end is left with of those that it can do. Kinds whose far end does everything, or
    /// nothing, have nothing to change.
    fn set_offloads(&self, _offloads: Needs) {}

    /// What this kind of port has to tell beyond that: peers, negotiated features, queues with their counters.
    fn detail(&self) -> serde_json::Value;
}
