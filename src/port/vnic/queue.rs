//! One ring of a vNIC between its two users: the session that starts and stops it, and the shards that move frames.
//!
//! What there is of the ring is behind one mutex, held by a shard for one batch and by the session for one change. That is
//! the whole hand-over protocol: when [`Queue::stop`] or [`Queue::set_memory`] returns, no shard is in the ring any more, and
//! what the ring kept mapped can go.
//!
//! Whoever is in a ring touches a peer's memory, and that may take as long as the peer likes: the kernel holds a page fault
//! for as long as somebody punches a hole there. So only the sessions of the ring's own port wait for the lock. A shard that
//! would receive comes back later; one that would transmit waits for as long as a batch may take ([`BatchLock`]) and then
//! drops. The control side reads and sets what it wants without the lock ([`published`], [`wakeup`]).
//!
//! Memory that lacks pages is a fault for each page that is touched, so a shard does nothing with a ring any more that has such
//! memory, from its next visit on ([`Running::is_lost`]); the session, which is told as well, stops it.
//!
//! When a shard finds a [`RingFault`] it takes the ring out of service on the spot and signals `attention`, for the
//! session to tell the front end and the operator. What peers gave us is closed on sessions' threads and without the lock.

mod published;
mod setup;
mod state;
mod wakeup;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};

use self::published::{Published, Settings};
pub(super) use self::setup::RingSetup;
use self::state::Loss;
pub(super) use self::state::{Running, State};
use self::wakeup::Wakeup;
use super::kick::Kick;
use super::offence::Docket;
use super::relay::lease::PeerEvent;
use crate::frame::Needs;
use crate::ident::{LatencySensitivity, MacAddr};
use crate::mem::{DirtyLog, GuestMemory};
use crate::port::batch_lock::{BatchLock, micros};
use crate::port::{Flush, Notifications, Wake};
use crate::ring::{RingError, RingFault};
use crate::sys::cpu;
use crate::sys::doorbell::Rang;

/// When a shard looks again after an interrupt that it could not send, in microseconds.
const LATER_MICROS: u64 = 1000;

/// What a queue did, for `port show`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct QueueReport {
    /// The ring is running.
    pub started: bool,
    /// The guest uses the queue.
    pub enabled: bool,
    /// Number of descriptors; 0 if the ring is not running.
    pub size: u16,
    /// Kicks and interrupts.
    #[serde(flatten)]
    pub notifications: Notifications,
}

/// One ring of a vNIC, in either direction.
pub(super) struct Queue {
    state: BatchLock<State>,
    ready: AtomicBool,
    /// An interrupt is held back.
    held: AtomicBool,
    /// The ring is polled, and its driver has still to be told: somebody else was in it.
    disarms: AtomicBool,
    shared: Arc<Shared>,
}

/// The parts of a queue that need no lock.
struct Shared {
    published: Published,
    settings: Settings,
    wakeup: Wakeup,
    docket: Arc<Docket>,
}

impl Queue {
    /// A queue whose ring is not running, of the port with this docket.
    pub fn new(docket: Arc<Docket>) -> Self {
        let (published, settings) = Default::default();
        let wakeup = Wakeup::new(Arc::clone(&docket));
        let shared = Arc::new(Shared { published, settings, wakeup, docket });
        Self {
            state: BatchLock::new(State::new(Arc::clone(&shared))),
            ready: false.into(),
            held: false.into(),
            disarms: false.into(),
            shared,
        }
    }

    /// Starts the ring and has it looked at once: the driver may have kicked before we were there. Returns whether the ring
    /// makes no sense where it goes on (see [`is_misplaced`](crate::ring::Ring::is_misplaced)).
    pub fn start(&self, mut setup: RingSetup) -> Result<bool, RingError> {
        let kick = Kick::new(Arc::clone(&setup.kick));
        let mut state = self.lock();
        if state.running.is_some() {
            return Err(RingError::Running);
        }
        let running = setup.start()?;
        let misplaced = running.ring.is_misplaced();
        running.log_ring();
        state.fault = None;
        state.running = Some(running);
        // Whoever ran the ring before us may have ended between giving frames and telling the guest.
        state.signal();
        let leftover = state.leftover.take();
        let old = self.shared.wakeup.start(kick);
        self.settle(&state);
        drop(state);
        drop(leftover);
        self.shared.wakeup.retire(old);
        self.shared.docket.pay_for_kicks();
        Ok(misplaced)
    }

    /// Stops the ring; returns the next available index, or `None` if it was neither running nor faulted. When this
    /// returns no shard is using the ring or its memory.
    pub fn stop(&self) -> Option<u16> {
        let mut state = self.lock();
        let faulted = state.fault.take().map(|(_, index)| index);
        let stopped = state.take_running();
        let leftover = state.leftover.take();
        let old = self.shared.wakeup.take_kick();
        self.settle(&state);
        drop(state);
        drop(leftover);
        self.shared.wakeup.retire(old);
        self.shared.docket.pay_for_kicks();
        stopped.map(|running| running.ring.base()).or(faulted)
    }

    /// Whether the ring is in service.
    pub fn is_running(&self) -> bool {
        self.shared.published.is_running()
    }

    /// Notes whether the guest uses the queue. Legal at any time, with or without a ring.
    pub fn enable(&self, enabled: bool) {
        let mut state = self.lock();
        state.enabled = enabled;
        self.settle(&state);
    }

    /// Replaces the interrupt of the queue, and signals the new one: what the old one should have said may be lost.
    pub fn set_call(&self, call: Option<Arc<PeerEvent>>) {
        let mut state = self.lock();
        let old = state.running.as_mut().map(|running| {
            let old = std::mem::replace(&mut running.call, call);
            running.muted = false;
            old
        });
        state.signal();
        state.take_excess();
        drop(state);
        drop(old);
    }

    /// How much the guest minds interrupts that are held back.
    pub fn set_latency(&self, latency: LatencySensitivity) {
        self.shared.settings.set_latency(latency);
    }

    /// Notes whether an interrupt is held back, for [`Queue::flush`]. To be called under the lock.
    #[inline]
    pub fn note_held(&self, held: bool) {
        self.held.store(held, Ordering::Relaxed);
    }

    /// Sends the interrupt that is held back, if `which` names it; returns when it is due otherwise.
    pub fn flush(&self, which: Flush) -> Option<u64> {
        if !self.held.load(Ordering::Relaxed) {
            return None;
        }
        // Whoever is in the ring may be there for long: the interrupt goes a little later, or with that one's frames.
        let Some(mut state) = self.enter(0) else { return Some(cpu::cycles().wrapping_add(micros(LATER_MICROS))) };
        let due = state.flush(which);
        // Nobody's visit.
        state.take_excess();
        // Still under the lock: another shard may be about to hold one back, and must not have it forgotten.
        self.note_held(due.is_some());
        due
    }

    /// Rings another eventfd of the ring's front end; returns whether it may be rung again.
    pub fn ring(&self, bell: &PeerEvent) -> bool {
        self.lock().ring(bell.as_fd()) == Rang::Done
    }

    /// Replaces the kick of a running ring.
    pub fn set_kick(&self, kick: Arc<PeerEvent>) {
        self.shared.wakeup.replace(Kick::new(kick));
    }

    /// Moves a running ring to a new map of the guest's memory. A ring whose areas are gone is taken out of service.
    pub fn set_memory(&self, memory: &Arc<GuestMemory>) -> Result<(), RingFault> {
        let mut state = self.lock();
        let Some(running) = &mut state.running else { return Ok(()) };
        let moved = running.ring.set_memory(memory);
        running.memory = Arc::clone(memory);
        running.loss = Loss::unknown();
        if let Err(fault) = moved {
            state.fail(fault);
        }
        self.settle(&state);
        moved
    }

    /// Begins or ends the logging of what is written. When this returns, no shard uses the log that was there before.
    pub fn set_log(&self, log: Option<Arc<DirtyLog>>) {
        let mut state = self.lock();
        let old = state.running.as_mut().map(|running| {
            let old = std::mem::replace(&mut running.log, log);
            running.loss = Loss::unknown();
            running.log_ring();
            old
        });
        // It may have rested because the old log was lost.
        self.shared.wakeup.wake();
        drop(state);
        drop(old);
    }

    /// Changes which offloads the guest is left with of those that it can do, from the next batch on.
    pub fn set_offloads(&self, offloads: Needs) {
        self.shared.settings.set_offloads(offloads);
    }

    /// Changes the longest payload that the guest is given, in bytes; `None` for any.
    pub fn set_mtu(&self, mtu: Option<u16>) {
        self.shared.settings.set_mtu(mtu);
    }

    /// Why the ring was taken out of service, if it was.
    pub fn fault(&self) -> Option<RingFault> {
        self.shared.published.fault()
    }

    /// Has the port announce `mac` to its network, as if the guest had.
    pub fn announce(&self, mac: MacAddr) {
        let mut state = self.lock();
        // QEMU announces a NIC five times (vhost_net_notify_migration_done and qemu_announce_self); more is somebody else.
        if state.announcements.len() < 8 && !state.announcements.contains(&mac) {
            state.announcements.push(mac);
        }
        drop(state);
        self.shared.wakeup.wake();
    }

    /// Tells the queue which shard receives from it, or that none does any more.
    pub fn attach(&self, wake: Option<Arc<dyn Wake>>) {
        self.shared.wakeup.attach(wake);
    }

    /// What the queue did so far.
    pub fn report(&self) -> QueueReport {
        let Shared { published, wakeup, .. } = &*self.shared;
        QueueReport {
            started: published.is_running(),
            enabled: published.is_enabled(),
            size: published.size(),
            notifications: published.notifications(wakeup.kicks()),
        }
    }

    /// The queue's state for a look at what there is to receive, if nobody has it just now.
    #[inline]
    pub fn glance(&self) -> Option<MutexGuard<'_, State>> {
        if self.shared.docket.is_barred() { None } else { self.try_lock() }
    }

    /// What the port's front end has done.
    pub fn docket(&self) -> &Docket {
        &self.shared.docket
    }

    /// What the control side has set of it.
    #[inline]
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// Whether frames can be put into this queue now: it runs and the guest uses it.
    #[inline]
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// The queue's state, waiting for it: for the session of the ring's own port, and nobody else.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The queue's state, if nobody has it just now.
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, State>> {
        self.state.try_lock()
    }

    /// The queue's state for a batch of so many `bytes`, after a wait if another shard is busy with one. `None` if somebody
    /// is held up there by the peer whose memory it is, or for long by the host that gave the CPU away ([`BatchLock`]).
    #[inline]
    pub fn enter(&self, bytes: u64) -> Option<MutexGuard<'_, State>> {
        if self.shared.docket.is_barred() {
            return None;
        }
        self.state.enter(bytes)
    }

    /// Has the driver told that the ring is polled, as soon as nobody else is in it.
    pub fn disarm(&self) {
        match self.enter(0) {
            Some(mut state) => self.disarm_now(&mut state),
            None => self.disarms.store(true, Ordering::Relaxed),
        }
    }

    /// Tells it if that is still to be done.
    #[inline]
    pub fn disarm_late(&self, state: &mut State) {
        if self.disarms.load(Ordering::Relaxed) {
            self.disarm_now(state);
        }
    }

    fn disarm_now(&self, state: &mut State) {
        self.disarms.store(false, Ordering::Relaxed);
        state.note_rest(false);
        if let Some(running) = &mut state.running {
            running.disarm();
        }
    }

    /// Takes the ring out of service for what the driver did, and has the session told.
    #[cold]
    pub fn fail(&self, state: &mut State, fault: RingFault) {
        state.fail(fault);
        self.settle(state);
        self.shared.docket.call();
    }

    /// Brings what others read without the lock, and the shard, up to date after a change.
    fn settle(&self, state: &State) {
        let size = state.running.as_ref().map(|running| running.ring.size());
        self.ready.store(size.is_some() && state.enabled, Ordering::Relaxed);
        self.shared.published.show(size, state.enabled, state.fault.map(|(fault, _)| fault));
        self.shared.wakeup.wake();
    }
}
