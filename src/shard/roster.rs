//! Which receive queues a shard owns, which of them are awake, and whose turn it is: [`Roster`].
//!
//! Queues are kept by port, because ports are what shares a shard fairly ([`super::fairness`]). A round visits every port
//! that has a queue awake. While several do, a port is visited until its cycles are used up or each of its queues in a row
//! gave less than a full batch, which means that it was drained; the rotation goes on where it stopped, so no queue of a
//! port starves another. While only one port is awake nothing is measured, and a round ends after [`ALONE_VISITS`] queues,
//! so that a port with 128 of them does not keep the shard from looking who else came.
//!
//! Rounds conserve work: if every port that has frames is in debt, all are given as much as the least indebted of them
//! lacks, so no round passes in which frames wait and nobody is served.
//!
//! Invariants: a slot is in its share's `awake` list if and only if it is awake, a share is in `active` if and only if that
//! list is not empty. Lists have room for all from [`Roster::attach`] on; nothing else allocates.

use std::sync::Arc;

use super::crew::QUEUES_AT_HAND;
use super::fairness::{Account, QUANTUM_NANOS};
use super::idle::{self, POLLED_WHEN_BUSY};
use super::stamp::{Phase, Stamp};
use super::wake::Engagement;
use crate::ident::PortIndex;
use crate::limits::BATCH_FRAMES;
use crate::port::{Receive, Received, Wake};
use crate::stats::QueueLoad;
use crate::sys::cpu;

/// Queues visited in one round while only one port is awake.
const ALONE_VISITS: usize = 8;

/// A receive queue that the shard owns.
pub(super) struct Slot {
    /// Its port.
    pub port: PortIndex,
    /// Which of its port's queues it is.
    number: u16,
    /// The queue.
    pub queue: Arc<dyn Receive>,
    share: u32,
    load: Arc<QueueLoad>,
    /// The cycle count when its last visit ended; `None` if it has been at rest since.
    visited: Option<u64>,
    /// For how many cycles it is polled when empty.
    spin: u64,
    /// The cycle count when it was first found empty; `None` if it had something last time.
    empty_since: Option<u64>,
    /// The cycle count when it last had something.
    served: Option<u64>,
    awake: bool,
}

/// One port's part of the shard.
struct Share {
    port: PortIndex,
    /// How many slots name this share; it is free if none does.
    queues: usize,
    /// The slots that are awake, and which of them comes next.
    awake: Vec<u32>,
    next: usize,
    account: Account,
    /// It had frames when it was visited last.
    busy: bool,
}

/// The queues of one shard.
pub(super) struct Roster {
    slots: Vec<Option<Slot>>,
    shares: Vec<Share>,
    active: Vec<u32>,
    resting: usize,
    quantum: i64,
    /// For how many cycles a few empty queues are polled while others have frames.
    busy_spin: u64,
    round: Round,
    stamp: Arc<Stamp>,
}

/// Where the present round stands.
#[derive(Default)]
struct Round {
    /// More than one port is awake, so cycles count.
    contended: bool,
    /// Place in `active`.
    at: usize,
    /// Visits that the port has left, of those that do not find a full batch.
    left: usize,
    /// The slot that is being visited.
    visiting: u32,
}

impl Roster {
    /// A roster without queues, of the shard that stamps this.
    pub fn new(stamp: Arc<Stamp>) -> Self {
        let quantum = cpu::cycles_per_second() / 1_000_000 * QUANTUM_NANOS / 1_000;
        Self {
            slots: Vec::with_capacity(QUEUES_AT_HAND),
            shares: Vec::with_capacity(QUEUES_AT_HAND),
            active: Vec::with_capacity(QUEUES_AT_HAND),
            resting: 0,
            quantum: i64::try_from(quantum).unwrap_or(i64::MAX).max(1),
            busy_spin: idle::busy_spin_cycles(),
            round: Round::default(),
            stamp,
        }
    }

    /// Queues at rest.
    pub fn resting(&self) -> usize {
        self.resting
    }

    /// Whether every queue is at rest.
    #[inline]
    pub fn all_rest(&self) -> bool {
        self.active.is_empty()
    }

    /// Begins a round; returns whether the cycles of each visit are wanted.
    #[inline]
    pub fn begin(&mut self) -> bool {
        let Self { shares, active, quantum, round, .. } = self;
        round.contended = active.len() > 1;
        round.at = 0;
        if round.contended {
            let busy = active.iter().map(|&share| &shares[share as usize]).filter(|share| share.busy);
            let lacking = busy.map(|share| share.account.debt()).min().unwrap_or(0);
            for &share in active.iter() {
                shares[share as usize].account.grant(quantum.saturating_add(lacking), *quantum);
            }
        }
        self.open();
        self.round.contended
    }

    /// The queue to visit next in this round; tell [`Roster::settle`] what came of it.
    #[inline]
    pub fn next(&mut self) -> Option<&mut Slot> {
        loop {
            let share = &mut self.shares[*self.active.get(self.round.at)? as usize];
            if self.round.left == 0 || self.round.contended && share.account.is_spent() {
                self.round.at += 1;
                self.open();
                continue;
            }
            share.next = if share.next + 1 < share.awake.len() { share.next + 1 } else { 0 };
            self.round.visiting = *share.awake.get(share.next)?;
            return self.slots.get_mut(self.round.visiting as usize)?.as_mut();
        }
    }

    /// Notes what the visit that [`Roster::next`] asked for brought, at the cycle count `now`, and what it took.
    #[inline]
    pub fn settle(&mut self, received: Received, now: u64, cycles: u64) {
        let Some(Some(slot)) = self.slots.get_mut(self.round.visiting as usize) else { return };
        let share = &mut self.shares[slot.share as usize];
        let full = match received {
            Received::Frames(frames) => {
                slot.empty_since = None;
                slot.served = Some(now);
                share.busy = true;
                frames >= BATCH_FRAMES
            }
            Received::Nothing => {
                slot.empty_since.get_or_insert(now);
                false
            }
        };
        self.round.left = match self.round.contended {
            true if full => share.awake.len(),
            _ => self.round.left - 1,
        };
        let before = slot.visited.replace(now.wrapping_add(cycles));
        if self.round.contended {
            share.account.charge(cycles, self.quantum);
            slot.load.cycles.add(cycles);
            if let (Received::Frames(_), Some(before)) = (received, before) {
                slot.load.visits.add(1);
                slot.load.waited.add(now.wrapping_sub(before));
            }
        }
    }

    /// Charges `port` with cycles that others' visits took for it.
    #[cold]
    pub fn charge(&mut self, port: PortIndex, cycles: u64) {
        let own = |share: &&mut Share| share.queues > 0 && share.port == port;
        if let Some(share) = self.shares.iter_mut().find(own).filter(|_| self.round.contended) {
            share.account.charge(cycles, self.quantum);
        }
    }

    /// Comes to the port at the round's place.
    #[inline]
    fn open(&mut self) {
        let Some(&share) = self.active.get(self.round.at) else { return };
        let share = &mut self.shares[share as usize];
        if !self.round.contended {
            share.account.clear();
            self.round.left = share.awake.len().min(ALONE_VISITS);
        } else {
            self.round.left = share.awake.len();
            // One that has to sit the round out still has what it could not get rid of.
            share.busy &= share.account.is_spent();
        }
    }

    /// Puts the queues to rest that have been empty for as long as their level allows; while the shard is `busy` with others
    /// but for the few that a glance now and then is spent on.
    pub fn put_to_rest(&mut self, now: u64, busy: bool) {
        let Self { slots, shares, active, resting, busy_spin, stamp, .. } = self;
        let mut glances = if busy { POLLED_WHEN_BUSY } else { 0 };
        active.retain(|&share| {
            let share = &mut shares[share as usize];
            share.awake.retain(|&index| {
                let Some(Some(slot)) = slots.get_mut(index as usize) else { return false };
                let spent = slot.is_spent(now);
                let polled = spent && glances > 0 && slot.was_served_within(*busy_spin, now);
                glances -= usize::from(polled);
                // One of those before may have held this thread up, and then they are another's.
                let rests = spent && !polled && !stamp.is_evicted() && slot.may_rest(stamp);
                slot.awake = !rests;
                *resting += usize::from(rests);
                !rests
            });
            !share.awake.is_empty()
        });
    }

    /// Has the queues in `ready` polled again; empties it.
    pub fn awaken(&mut self, ready: &mut Vec<u32>) {
        for index in ready.drain(..) {
            let Some(Some(slot)) = self.slots.get_mut(index as usize) else { continue };
            slot.empty_since = None;
            slot.visited = slot.visited.filter(|_| slot.awake);
            if !slot.awake && !self.stamp.is_evicted() {
                self.stamp.set(Phase::Receive, slot.port);
                slot.queue.disarm();
                self.stamp.clear();
                slot.awake = true;
                self.resting -= 1;
                self.enlist(index);
            }
        }
    }

    /// Owns a queue, awake, that is polled for `spin` cycles when empty. `wake` makes the means to wake its slot.
    pub fn attach(&mut self, engagement: Engagement, spin: u64, wake: impl FnOnce(u32) -> Arc<dyn Wake>) {
        let Engagement { port, number, queue, load, .. } = engagement;
        let share = self.share(port);
        let free = self.slots.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        queue.attach(Some(wake(index as u32)));
        self.slots[index] = Some(Slot {
            port,
            number,
            queue,
            share,
            load,
            visited: None,
            spin,
            empty_since: None,
            served: None,
            awake: true,
        });
        self.shares[share as usize].queues += 1;
        self.enlist(index as u32);
        // Room for everything that can wake up, so that waking never allocates.
        let Self { shares, active, .. } = self;
        active.reserve(shares.len() - active.len());
        let share = &mut shares[share as usize];
        share.awake.reserve(share.queues - share.awake.len());
    }

    /// Forgets the queues of `port`, or that one of them; returns how many there were.
    pub fn detach(&mut self, port: PortIndex, number: Option<u16>) -> usize {
        let mut removed = 0;
        for (index, place) in self.slots.iter_mut().enumerate() {
            let goes = |slot: &mut Slot| slot.port == port && number.is_none_or(|number| slot.number == number);
            let Some(slot) = place.take_if(goes) else { continue };
            slot.queue.attach(None);
            self.resting -= usize::from(!slot.awake);
            removed += 1;
            let share = &mut self.shares[slot.share as usize];
            share.queues -= 1;
            share.awake.retain(|&awake| awake as usize != index);
            if share.awake.is_empty() {
                self.active.retain(|&active| active != slot.share);
            }
        }
        removed
    }

    /// Forgets all queues, which another shard has by now.
    pub fn forget(&mut self) {
        self.slots.clear();
        self.active.clear();
        self.resting = 0;
    }

    /// The share of `port`, which may be a new one.
    fn share(&mut self, port: PortIndex) -> u32 {
        let own = |share: &Share| share.queues > 0 && share.port == port;
        let found = self.shares.iter().position(own);
        let place = found.or_else(|| self.shares.iter().position(|share| share.queues == 0));
        let index = place.unwrap_or(self.shares.len());
        if found.is_none() {
            let fresh = Share { port, queues: 0, awake: Vec::new(), next: 0, account: Account::default(), busy: false };
            match self.shares.get_mut(index) {
                Some(share) => *share = fresh,
                None => self.shares.push(fresh),
            }
        }
        index as u32
    }

    /// Adds a slot that is awake to its share's list.
    fn enlist(&mut self, index: u32) {
        let Some(Some(slot)) = self.slots.get(index as usize) else { return };
        let share = &mut self.shares[slot.share as usize];
        if share.awake.is_empty() {
            self.active.push(slot.share);
        }
        share.awake.push(index);
    }
}

impl Slot {
    /// Whether it has been empty for as long as its level allows.
    fn is_spent(&self, now: u64) -> bool {
        self.spin != u64::MAX && self.empty_since.is_some_and(|since| now.wrapping_sub(since) >= self.spin)
    }

    /// Whether it is of a level that polls at all, and had frames within the last `cycles`: kicks alone earn nothing.
    fn was_served_within(&self, cycles: u64, now: u64) -> bool {
        self.spin > 0 && self.served.is_some_and(|served| now.wrapping_sub(served) < cycles)
    }

    /// Asks the queue to notify; returns whether it rests.
    fn may_rest(&mut self, stamp: &Stamp) -> bool {
        stamp.set(Phase::Receive, self.port);
        let rests = self.queue.arm();
        if !rests {
            self.queue.disarm();
            self.empty_since = None;
        }
        stamp.clear();
        rests
    }
}

#[cfg(test)]
mod tests;
