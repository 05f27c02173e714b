//! The thread of one shard: [`Worker`], whose [`Worker::turn`] is the hot loop of the product.
//!
//! One turn is one round of the [`Roster`] over the ports that have queues awake. Between turns, and only then, the
//! worker reads its mailbox, puts queues to rest, looks for kicks of those at rest, or sleeps. Time is the CPU's cycle
//! counter, read once per turn, and once per visit while several ports want to be served; the switch's clock (tenths of
//! seconds) is brought up to date together with the look for kicks.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use arc_swap::{ArcSwap, Cache};

use super::crew::QUEUES_AT_HAND;
use super::idle::{IdlePolicy, Looks};
use super::outbox::Outbox;
use super::roster::Roster;
use super::stamp::{Alarm, Phase, Stamp};
use super::wake::{Bell, Engagement, Order, SlotWake};
use super::{Shared, Tables};
use crate::clock::{Clock, Tick};
use crate::frame::{self, Heads};
use crate::ident::PortIndex;
use crate::limits::VISIT_WORK;
use crate::port::{Flush, Received};
use crate::switch;
use crate::sys::cpu;

/// One shard's thread, before and while it runs.
pub(super) struct Worker {
    bell: Arc<Bell>,
    shared: Arc<Shared>,
    newest: Arc<ArcSwap<Tables>>,
    /// None in particular until there is something to do.
    tables: Cache<Arc<ArcSwap<Tables>>, Arc<Tables>>,
    policy: IdlePolicy,
    clock: Clock,
    roster: Roster,
    stamp: Arc<Stamp>,
    alarm: Arc<Alarm>,
    heads: Box<Heads>,
    outbox: Outbox,
    tick: Tick,
    looks: Looks,
    last_look: u64,
    /// When the last turn with frames ended, and the last look that found a kick was.
    last_frames: u64,
    last_kick: u64,
    /// Scratch of [`Worker::read_mail`], so that it does not allocate.
    orders: Vec<Order>,
    ready: Vec<u32>,
}

impl Worker {
    /// A worker without queues. All that it allocates, but for a little with each queue beyond [`QUEUES_AT_HAND`], is allocated here.
    pub fn new(
        bell: &Arc<Bell>,
        shared: &Arc<Shared>,
        tables: &Arc<ArcSwap<Tables>>,
        policy: IdlePolicy,
        clock: Clock,
        stamp: &Arc<Stamp>,
        alarm: &Arc<Alarm>,
    ) -> Self {
        Self {
            bell: Arc::clone(bell),
            shared: Arc::clone(shared),
            newest: Arc::clone(tables),
            tables: Cache::new(Arc::new(ArcSwap::from_pointee(Tables::empty()))),
            policy,
            clock,
            roster: Roster::new(Arc::clone(stamp)),
            stamp: Arc::clone(stamp),
            alarm: Arc::clone(alarm),
            heads: frame::heads(),
            outbox: Outbox::new(Arc::clone(stamp), Arc::clone(alarm)),
            tick: clock.now().tick(),
            looks: Looks::new(),
            last_look: 0,
            last_frames: 0,
            last_kick: 0,
            orders: Vec::with_capacity(QUEUES_AT_HAND),
            ready: Vec::with_capacity(QUEUES_AT_HAND),
        }
    }

    /// Sleeps until the first order comes, without tables, which would be kept from going; returns whether to go on then.
    fn stand_by(&mut self) -> bool {
        self.stamp.asleep();
        while !self.bell.rang() {
            self.bell.sleep(None, &mut self.ready);
        }
        self.tables = Cache::new(Arc::clone(&self.newest));
        self.alarm.awake(&self.stamp);
        self.tick = self.clock.now().tick();
        self.read_mail()
    }

    /// Serves from the first order on until it is told to stop.
    pub fn run(mut self) {
        if !self.stand_by() {
            return;
        }
        let mut now = cpu::cycles();
        loop {
            if self.stamp.is_evicted() {
                return self.hand_over();
            }
            if self.bell.rang() && !self.read_mail() {
                return self.flush(Flush::All);
            }
            let busy = self.turn(now);
            let after = cpu::cycles();
            let spent = after.wrapping_sub(now);
            now = after;
            if busy {
                self.last_frames = now;
                self.shared.counters.busy_cycles.add(spent);
            } else {
                self.shared.counters.poll_cycles.add(spent);
                self.put_to_rest(now);
            }
            if self.outbox.is_holding() {
                self.flush(if busy { Flush::Due(now) } else { Flush::Idle(now) });
            }
            if self.roster.all_rest() {
                now = self.sleep(now);
            } else if now.wrapping_sub(self.last_look) >= self.looks.apart(busy, now.wrapping_sub(self.last_kick)) {
                self.look(now);
            }
        }
    }

    /// One round over the ports that have a queue awake: receives a batch, has the switch decide, delivers, again and again
    /// for as long as the ports' cycles last, or, where a single port has them all, until it comes to as much as one visit may.
    /// Returns whether there was anything to do.
    fn turn(&mut self, now: u64) -> bool {
        let Self { roster, heads, outbox, shared, tick, tables, stamp, .. } = self;
        let tables: &Tables = tables.load();
        let measured = roster.begin();
        let (mut moved, mut busy, mut work, mut before) = (0, false, 0, now);
        while let Some(slot) = roster.next() {
            let port = slot.port;
            stamp.set(Phase::Receive, port);
            let received = slot.queue.receive(heads, &mut |batch| {
                switch::process(&tables.switch, port, batch, *tick);
                outbox.deliver(tables, port, batch, &shared.ports);
                work += batch.work();
                stamp.set(Phase::Receive, port);
            });
            if let Received::Frames(frames) = received {
                moved += frames;
                busy = true;
                shared.counters.batches.add(1);
            }
            if stamp.is_evicted() {
                break;
            }
            let after = if measured { cpu::cycles() } else { before };
            let mut taken = after.wrapping_sub(before);
            for (port, cycles) in outbox.take_excess() {
                taken = taken.saturating_sub(cycles);
                roster.charge(port, cycles);
            }
            roster.settle(received, before, taken);
            before = after;
            if work >= VISIT_WORK && !measured {
                break;
            }
        }
        stamp.clear();
        shared.counters.frames.add(moved as u64);
        busy
    }

    /// Ends the service of a thread that was held up: another one has its queues, which must not hear of this one any more.
    fn hand_over(mut self) {
        self.flush(Flush::All);
        self.roster.forget();
    }

    /// Sends what a thread that is held up was to send, whatever ports that is for.
    fn take_over(&mut self) {
        let tables: &Tables = self.tables.load();
        for (port, side) in (0..).map(PortIndex).zip(&tables.transmit) {
            if let Some(side) = side {
                self.stamp.set(Phase::Writing, port);
                side.flush(Flush::All);
            }
        }
        self.stamp.clear();
    }

    /// Has notifications sent that were held back.
    fn flush(&mut self, which: Flush) {
        let Self { tables, outbox, .. } = self;
        outbox.flush(tables.load(), which);
    }

    /// Puts queues to rest that have been empty for long enough; fewer while the shard is busy with others, an empty turn now
    /// and then included.
    fn put_to_rest(&mut self, now: u64) {
        let busy = self.looks.is_busy(now.wrapping_sub(self.last_frames));
        self.roster.put_to_rest(now, busy);
        self.note_resting();
    }

    fn note_resting(&self) {
        self.shared.resting.store(self.roster.resting() as u64, Ordering::Relaxed);
    }

    /// Looks for kicks of queues at rest, without waiting, and at the clock.
    fn look(&mut self, now: u64) {
        self.last_look = now;
        self.tick = self.clock.now().tick();
        // While somebody keeps the shard busy, no turn is empty: those who have nothing are put to rest from here.
        self.put_to_rest(now);
        if self.roster.resting() > 0 {
            let mut ready = std::mem::take(&mut self.ready);
            self.bell.look(&mut ready);
            if !ready.is_empty() {
                self.last_kick = now;
            }
            self.awaken(&mut ready);
            self.ready = ready;
        }
    }

    /// Sleeps until something comes in or a notification is due that is still held back; returns the cycle count after.
    fn sleep(&mut self, fell_asleep: u64) -> u64 {
        if self.outbox.is_holding() {
            self.flush(Flush::Idle(fell_asleep));
        }
        let longest = self.outbox.due().map(|due| cpu::duration(due.wrapping_sub(fell_asleep)));
        let mut ready = std::mem::take(&mut self.ready);
        self.stamp.asleep();
        self.bell.sleep(longest, &mut ready);
        self.alarm.awake(&self.stamp);
        let now = cpu::cycles();
        self.shared.counters.sleep_cycles.add(now.wrapping_sub(fell_asleep));
        self.shared.counters.sleeps.add(1);
        self.tick = self.clock.now().tick();
        self.awaken(&mut ready);
        self.ready = ready;
        now
    }

    /// Has the queues in `ready` polled again; empties it.
    fn awaken(&mut self, ready: &mut Vec<u32>) {
        self.roster.awaken(ready);
        self.note_resting();
    }

    /// Carries out the orders that came in; returns whether to go on.
    fn read_mail(&mut self) -> bool {
        let (mut orders, mut ready) = (std::mem::take(&mut self.orders), std::mem::take(&mut self.ready));
        self.bell.collect(&mut orders, &mut ready);
        let (mut go_on, mut takes_over) = (true, false);
        for order in orders.drain(..) {
            match order {
                Order::Attach(engagement) => self.attach(engagement),
                Order::Detach { port, done } => {
                    self.roster.detach(port, None);
                    // Whoever asked may have gone; then nobody needs the answer.
                    let _ = done.send(());
                }
                Order::Release { port, number, done } => {
                    self.roster.detach(port, Some(number));
                    let _ = done.send(());
                }
                Order::Refresh { done } => {
                    self.tables.load();
                    let _ = done.send(());
                }
                Order::TakeOver => takes_over = true,
                Order::Stop => go_on = false,
            }
        }
        // Last, because it goes to peers' memory, and who gave the other orders waits.
        if takes_over {
            self.take_over();
        }
        self.awaken(&mut ready);
        (self.orders, self.ready) = (orders, ready);
        go_on
    }

    fn attach(&mut self, engagement: Engagement) {
        let spin = self.policy.spin_cycles(engagement.latency);
        let bell = &self.bell;
        self.roster.attach(engagement, spin, |slot| Arc::new(SlotWake { bell: Arc::clone(bell), slot }));
    }
}
