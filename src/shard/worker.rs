//! The thread of one shard: [`Worker`], whose [`Worker::turn`] is the hot loop of the product.
//!
//! One turn visits every queue that is awake. Between turns, and only then, the worker reads its mailbox, puts queues to
//! rest, looks for kicks of those at rest, or sleeps. Time is the CPU's cycle counter, read once per turn; the switch's
//! clock (tenths of seconds) is brought up to date together with the look for kicks.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use arc_swap::{ArcSwap, Cache};

use super::idle::{IdlePolicy, LOOK_EVERY_MICROS};
use super::outbox::Outbox;
use super::wake::{Bell, Order, SlotWake};
use super::{Shared, Tables};
use crate::clock::{Clock, Tick};
use crate::frame::{self, Heads};
use crate::ident::{LatencySensitivity, PortIndex};
use crate::port::{Receive, Received};
use crate::switch;
use crate::sys::cpu;

/// A receive queue that this shard owns.
struct Slot {
    port: PortIndex,
    queue: Arc<dyn Receive>,
    /// For how many cycles it is polled when empty.
    spin: u64,
    /// The cycle count when it was first found empty; `None` if it had something last time.
    empty_since: Option<u64>,
    awake: bool,
}

/// One shard's thread, before and while it runs.
pub(super) struct Worker {
    bell: Arc<Bell>,
    shared: Arc<Shared>,
    tables: Cache<Arc<ArcSwap<Tables>>, Arc<Tables>>,
    policy: IdlePolicy,
    clock: Clock,
    slots: Vec<Option<Slot>>,
    awake: Vec<u32>,
    resting: usize,
    heads: Box<Heads>,
    outbox: Outbox,
    tick: Tick,
    look_cycles: u64,
    next_look: u64,
    /// Scratch of [`Worker::read_mail`], so that it does not allocate.
    orders: Vec<Order>,
    ready: Vec<u32>,
}

impl Worker {
    /// A worker without queues.
    pub fn new(
        bell: &Arc<Bell>,
        shared: &Arc<Shared>,
        tables: &Arc<ArcSwap<Tables>>,
        policy: IdlePolicy,
        clock: Clock,
    ) -> Self {
        Self {
            bell: Arc::clone(bell),
            shared: Arc::clone(shared),
            tables: Cache::new(Arc::clone(tables)),
            policy,
            clock,
            slots: Vec::new(),
            awake: Vec::new(),
            resting: 0,
            heads: frame::heads(),
            outbox: Outbox::new(),
            tick: clock.now().tick(),
            look_cycles: cpu::cycles_per_second() / 1_000_000 * LOOK_EVERY_MICROS,
            next_look: 0,
            orders: Vec::new(),
            ready: Vec::new(),
        }
    }

    /// Serves until it is told to stop.
    pub fn run(mut self) {
        let mut now = cpu::cycles();
        loop {
            if self.bell.rang() && !self.read_mail() {
                return;
            }
            let frames = self.turn(now);
            let after = cpu::cycles();
            let spent = after.wrapping_sub(now);
            now = after;
            if frames > 0 {
                self.shared.counters.busy_cycles.add(spent);
            } else {
                self.shared.counters.poll_cycles.add(spent);
                self.put_to_rest(now);
            }
            if self.awake.is_empty() {
                now = self.sleep(now);
            } else if now >= self.next_look {
                self.look(now);
            }
        }
    }

    /// Receives one batch from each queue that is awake, has the switch decide, delivers. Returns how many frames it moved.
    fn turn(&mut self, now: u64) -> usize {
        let Self { awake, slots, heads, outbox, shared, tick, tables, .. } = self;
        let tables: &Tables = tables.load();
        let mut moved = 0;
        for &index in awake.iter() {
            let Some(Some(slot)) = slots.get_mut(index as usize) else { continue };
            let port = slot.port;
            let received = slot.queue.receive(heads, &mut |batch| {
                switch::process(&tables.switch, port, batch, *tick);
                outbox.deliver(tables, port, batch, &shared.ports);
            });
            match received {
                Received::Frames(frames) => {
                    moved += frames;
                    slot.empty_since = None;
                    shared.counters.batches.add(1);
                }
                Received::Nothing => {
                    slot.empty_since.get_or_insert(now);
                }
            }
        }
        shared.counters.frames.add(moved as u64);
        moved
    }

    /// Puts the queues to rest that have been empty for as long as their level allows.
    fn put_to_rest(&mut self, now: u64) {
        let Self { awake, slots, resting, .. } = self;
        awake.retain(|&index| {
            let Some(Some(slot)) = slots.get_mut(index as usize) else { return false };
            let spent = slot.empty_since.is_some_and(|since| now.wrapping_sub(since) >= slot.spin);
            if !spent || slot.spin == u64::MAX {
                return true;
            }
            if !slot.queue.arm() {
                slot.queue.disarm();
                slot.empty_since = None;
                return true;
            }
            slot.awake = false;
            *resting += 1;
            false
        });
        self.shared.resting.store(self.resting as u64, Ordering::Relaxed);
    }

    /// Looks for kicks of queues at rest, without waiting, and at the clock.
    fn look(&mut self, now: u64) {
        self.next_look = now.wrapping_add(self.look_cycles);
        self.tick = self.clock.now().tick();
        if self.resting > 0 {
            let mut ready = std::mem::take(&mut self.ready);
            self.bell.look(&mut ready);
            self.awaken(&mut ready);
            self.ready = ready;
        }
    }

    /// Sleeps until something comes in; returns the cycle count after.
    fn sleep(&mut self, fell_asleep: u64) -> u64 {
        let mut ready = std::mem::take(&mut self.ready);
        self.bell.sleep(&mut ready);
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
        for index in ready.drain(..) {
            let Some(Some(slot)) = self.slots.get_mut(index as usize) else { continue };
            slot.empty_since = None;
            if !slot.awake {
                slot.queue.disarm();
                slot.awake = true;
                self.awake.push(index);
                self.resting -= 1;
            }
        }
        self.shared.resting.store(self.resting as u64, Ordering::Relaxed);
    }

    /// Carries out the orders that came in; returns whether to go on.
    fn read_mail(&mut self) -> bool {
        let (mut orders, mut ready) = (std::mem::take(&mut self.orders), std::mem::take(&mut self.ready));
        self.bell.collect(&mut orders, &mut ready);
        let mut go_on = true;
        for order in orders.drain(..) {
            match order {
                Order::Attach { port, queue, latency } => self.attach(port, queue, latency),
                Order::Detach { port, done } => {
                    // Whoever asked may have gone; then nobody needs the answer.
                    let _ = done.send(self.detach(port));
                }
                Order::Refresh { done } => {
                    self.tables.load();
                    let _ = done.send(());
                }
                Order::Stop => go_on = false,
            }
        }
        self.awaken(&mut ready);
        (self.orders, self.ready) = (orders, ready);
        go_on
    }

    fn attach(&mut self, port: PortIndex, queue: Arc<dyn Receive>, latency: LatencySensitivity) {
        let free = self.slots.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let spin = self.policy.spin_cycles(latency);
        let slot = index as u32;
        queue.attach(Some(Arc::new(SlotWake { bell: Arc::clone(&self.bell), slot })));
        self.slots[index] = Some(Slot { port, queue, spin, empty_since: None, awake: true });
        self.awake.push(slot);
    }

    /// Forgets the queues of `port`; returns how many there were.
    fn detach(&mut self, port: PortIndex) -> usize {
        let mut removed = 0;
        for (index, place) in self.slots.iter_mut().enumerate() {
            let Some(slot) = place.take_if(|slot| slot.port == port) else { continue };
            slot.queue.attach(None);
            if slot.awake {
                self.awake.retain(|&awake| awake as usize != index);
            } else {
                self.resting -= 1;
            }
            removed += 1;
        }
        removed
    }
}
