//! One ring of a vNIC between its two users: the session that starts and stops it, and the shards that move frames.
//!
//! Everything is behind one mutex, held by a shard for one batch and by the session for one change. That is the whole
//! hand-over protocol: when [`Queue::stop`] or [`Queue::set_memory`] returns, no shard is in the ring any more, and what
//! the ring kept mapped can go. A shard that would receive does not wait for the lock: it comes back later.
//!
//! When a shard finds a [`RingFault`] it takes the ring out of service on the spot and signals `attention`, for the
//! session to tell the front end and the operator.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::features;
use super::kick::Kick;
use super::moderation::{Decision, Moderation};
use crate::frame::{Needs, longest_within};
use crate::ident::{LatencySensitivity, MacAddr};
use crate::limits::VNET_HEADER_BYTES;
use crate::mem::{DirtyLog, GuestMemory};
use crate::port::{Flush, Notifications, Wake, earlier};
use crate::ring::{Record, Ring, RingConfig, RingError, RingFault};
use crate::sys::cpu;
use crate::sys::doorbell::{self, Rang};
use crate::sys::eventfd::EventFd;
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Bytes of the virtio-net header when neither VERSION_1 nor MRG_RXBUF was negotiated (virtio 1.3, 5.1.6.1).
pub(super) const LEGACY_HEADER_BYTES: usize = 10;

/// All that a ring needs to start.
#[derive(Debug)]
pub(super) struct RingSetup {
    /// Number of descriptors.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Index of the first available entry to take.
    pub base: u16,
    /// The virtio features that the driver acknowledged.
    pub features: u64,
    /// The memory that the front end shares.
    pub memory: Arc<GuestMemory>,
    /// Signalled by the driver when it made something available.
    pub kick: OwnedFd,
    /// To be signalled when something was used.
    pub call: Option<OwnedFd>,
    /// Where to note what is written, while the guest is being migrated.
    pub log: Option<Arc<DirtyLog>>,
    /// Where a packed ring is noted to stand, by us when we ran it last.
    pub record: Option<Record>,
}

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
    state: Mutex<State>,
    ready: AtomicBool,
    /// An interrupt is held back.
    held: AtomicBool,
    /// The front end had an interrupt block.
    blocked: Arc<AtomicBool>,
    /// Kicks by eventfds that the ring had before its present one, which counts for itself.
    retired: AtomicU64,
    attention: Arc<EventFd>,
}

/// What the mutex of a [`Queue`] protects.
#[derive(Default)]
pub(super) struct State {
    /// The ring, while it runs.
    pub running: Option<Running>,
    /// The guest uses the queue (SET_VRING_ENABLE).
    pub enabled: bool,
    /// Why the ring was taken out of service, and the index it had then.
    pub fault: Option<(RingFault, u16)>,
    /// MAC addresses to announce, as frames that the port seems to send.
    pub announcements: Vec<MacAddr>,
    /// The shard that receives from this queue.
    pub wake: Option<Arc<dyn Wake>>,
    /// What wakes it for a ring that runs or was taken out of service.
    kick: Option<Arc<Kick>>,
    /// The kernel would not wait for the ring's kicks, so the queue must not rest.
    pub deaf: bool,
    /// Which offloads the guest is left with of those that it can do.
    offloads: Needs,
    /// The longest payload that the guest is given, in bytes; `None` for any.
    mtu: Option<u16>,
    /// The guest was asked to kick and the shard does not poll.
    rests: bool,
    /// It was woken from rest and has not had a batch since.
    kicked: bool,
    moderation: Moderation,
    /// But for kicks, which are counted elsewhere.
    counters: Notifications,
}

/// A ring in service.
pub(super) struct Running {
    pub ring: Ring,
    pub memory: Arc<GuestMemory>,
    /// Bytes of the virtio-net header: 12 or 10.
    pub header: usize,
    /// A frame may span several chains.
    pub mergeable: bool,
    /// What of offloads the guest's driver can do when it receives, as negotiated and as the port's settings leave it.
    pub accepts: Needs,
    /// What of offloads the guest's driver may leave to us when it sends.
    pub may: Needs,
    negotiated: Needs,
    /// Where to note what is written, while the guest is being migrated.
    pub log: Option<Arc<DirtyLog>>,
    /// The areas of the ring that the device writes: guest-physical addresses and lengths.
    written: [(u64, u64); 2],
    call: Option<OwnedFd>,
    blocked: Arc<AtomicBool>,
    attention: Arc<EventFd>,
}

impl Queue {
    /// A queue whose ring is not running. `attention` is signalled when a shard finds a fault.
    pub fn new(attention: Arc<EventFd>) -> Self {
        let state = State { offloads: Needs::ALL, ..State::default() };
        let (ready, held) = (false.into(), false.into());
        let retired = AtomicU64::new(0);
        Self { state: Mutex::new(state), ready, held, blocked: Arc::default(), retired, attention }
    }

    /// Starts the ring and has it looked at once: the driver may have kicked before we were there.
    pub fn start(&self, setup: RingSetup) -> Result<(), RingError> {
        let kick = Kick::new(setup.kick);
        let mut state = self.lock();
        if state.running.is_some() {
            return Err(RingError::Running);
        }
        let negotiated = |bit: u32| setup.features & (1 << bit) != 0;
        let config = RingConfig {
            packed: negotiated(VIRTIO_F_RING_PACKED),
            size: setup.size,
            descriptors: setup.descriptors,
            available: setup.available,
            used: setup.used,
            base: setup.base,
            event_idx: negotiated(VIRTIO_RING_F_EVENT_IDX),
            indirect: negotiated(VIRTIO_RING_F_INDIRECT_DESC),
            in_order: negotiated(VIRTIO_F_IN_ORDER),
        };
        let mut ring = Ring::start(config, Arc::clone(&setup.memory))?;
        ring.resume(setup.record);
        ring.disarm();
        let mergeable = negotiated(VIRTIO_NET_F_MRG_RXBUF);
        let long = mergeable || negotiated(VIRTIO_F_VERSION_1) || negotiated(VIRTIO_F_RING_PACKED);
        let header = if long { VNET_HEADER_BYTES } else { LEGACY_HEADER_BYTES };
        let (negotiated, may) = (features::accepts(setup.features), features::may(setup.features));
        let accepts = negotiated.within(state.offloads);
        let RingSetup { memory, call, log, .. } = setup;
        let written = config.written();
        let (blocked, attention) = (Arc::clone(&self.blocked), Arc::clone(&self.attention));
        let mut running = Running {
            ring,
            memory,
            header,
            mergeable,
            accepts,
            may,
            negotiated,
            log,
            written,
            call,
            blocked,
            attention,
        };
        running.log_ring();
        state.fault = None;
        // Whoever ran the ring before us may have ended between giving frames and telling the guest.
        running.signal();
        state.running = Some(running);
        let old = state.kick.replace(Arc::new(kick));
        state.watch();
        self.settle(&state);
        drop(state);
        self.retire(old);
        Ok(())
    }

    /// Stops the ring; returns the next available index, or `None` if it was neither running nor faulted. When this
    /// returns no shard is using the ring or its memory.
    pub fn stop(&self) -> Option<u16> {
        let mut state = self.lock();
        let faulted = state.fault.take().map(|(_, index)| index);
        let stopped = state.take_running().map(|running| running.ring.base());
        let old = state.kick.take();
        self.settle(&state);
        drop(state);
        self.retire(old);
        stopped.or(faulted)
    }

    /// Whether the ring is in service.
    pub fn is_running(&self) -> bool {
        self.lock().running.is_some()
    }

    /// Notes whether the guest uses the queue. Legal at any time, with or without a ring.
    pub fn enable(&self, enabled: bool) {
        let mut state = self.lock();
        state.enabled = enabled;
        self.settle(&state);
    }

    /// Replaces the interrupt of the queue, and signals the new one: what the old one should have said may be lost.
    pub fn set_call(&self, call: Option<OwnedFd>) {
        let mut state = self.lock();
        if let Some(running) = &mut state.running {
            running.call = call;
            running.signal();
        }
    }

    /// How much the guest minds interrupts that are held back.
    pub fn set_latency(&self, latency: LatencySensitivity) {
        self.lock().moderation.set_level(latency);
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
        let mut state = self.lock();
        let due = state.flush(which);
        // Still under the lock: another shard may be about to hold one back, and must not have it forgotten.
        self.note_held(due.is_some());
        due
    }

    /// Whether the front end had an interrupt block since this was asked last.
    pub fn take_blocked(&self) -> bool {
        self.blocked.load(Ordering::Relaxed) && self.blocked.swap(false, Ordering::Relaxed)
    }

    /// Replaces the kick of a running ring.
    pub fn set_kick(&self, kick: OwnedFd) {
        let kick = Arc::new(Kick::new(kick));
        let mut state = self.lock();
        state.unwatch();
        let old = if state.running.is_some() { state.kick.replace(kick) } else { None };
        state.watch();
        drop(state);
        self.retire(old);
    }

    /// Counts what came by a kick that is not ours any more. Never under the lock: asking the kernel takes a while, and a
    /// shard may want the ring.
    fn retire(&self, old: Option<Arc<Kick>>) {
        self.retired.fetch_add(old.map_or(0, |kick| kick.count()), Ordering::Relaxed);
    }

    /// Moves a running ring to a new map of the guest's memory. A ring whose areas are gone is taken out of service.
    pub fn set_memory(&self, memory: &Arc<GuestMemory>) -> Result<(), RingFault> {
        let mut state = self.lock();
        let Some(running) = &mut state.running else { return Ok(()) };
        let moved = running.ring.set_memory(memory);
        running.memory = Arc::clone(memory);
        if let Err(fault) = moved {
            state.fail(fault);
        }
        self.settle(&state);
        moved
    }

    /// Begins or ends the logging of what is written. When this returns, no shard uses the log that was there before.
    pub fn set_log(&self, log: Option<Arc<DirtyLog>>) {
        if let Some(running) = &mut self.lock().running {
            running.log = log;
            running.log_ring();
        }
    }

    /// Changes which offloads the guest is left with of those that it can do, from the next batch on.
    pub fn set_offloads(&self, offloads: Needs) {
        let mut state = self.lock();
        state.offloads = offloads;
        if let Some(running) = &mut state.running {
            running.accepts = running.negotiated.within(offloads);
        }
    }

    /// Changes the longest payload that the guest is given, in bytes; `None` for any.
    pub fn set_mtu(&self, mtu: Option<u16>) {
        self.lock().mtu = mtu;
    }

    /// Why the ring was taken out of service, if it was.
    pub fn fault(&self) -> Option<RingFault> {
        self.lock().fault.map(|(fault, _)| fault)
    }

    /// Has the port announce `mac` to its network, as if the guest had.
    pub fn announce(&self, mac: MacAddr) {
        let mut state = self.lock();
        // QEMU announces a NIC five times (vhost_net_notify_migration_done and qemu_announce_self); more is somebody else.
        if state.announcements.len() < 8 && !state.announcements.contains(&mac) {
            state.announcements.push(mac);
        }
        state.wake();
    }

    /// Tells the queue which shard receives from it, or that none does any more.
    pub fn attach(&self, wake: Option<Arc<dyn Wake>>) {
        let mut state = self.lock();
        state.unwatch();
        state.wake = wake;
        state.watch();
    }

    /// What the queue did so far.
    pub fn report(&self) -> QueueReport {
        let state = self.lock();
        let size = state.running.as_ref().map_or(0, |running| running.ring.size());
        let kick = state.kick.clone();
        let (started, enabled, mut notifications) = (state.running.is_some(), state.enabled, state.counters);
        // Asking the kernel takes a while, and a shard may want the ring.
        drop(state);
        notifications.kicks = self.retired.load(Ordering::Relaxed).saturating_add(kick.map_or(0, |kick| kick.count()));
        QueueReport { started, enabled, size, notifications }
    }

    /// Whether frames can be put into this queue now: it runs and the guest uses it.
    #[inline]
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// The queue's state, waiting for it. Waits are short: a batch of a shard, or one change of the session.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock cannot leave the state half changed in a way that matters: the ring is checked anew on
        // every access.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queue's state, if nobody has it just now.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Takes the ring out of service for what the driver did, and has the session told.
    #[cold]
    pub fn fail(&self, state: &mut State, fault: RingFault) {
        state.fail(fault);
        self.settle(state);
        self.attention.signal();
    }

    /// Brings what others read without the lock, and the shard, up to date after a change.
    fn settle(&self, state: &State) {
        self.ready.store(state.running.is_some() && state.enabled, Ordering::Relaxed);
        state.wake();
    }
}

impl State {
    /// Bytes of the longest untagged frame within the MTU.
    #[inline]
    pub fn longest(&self) -> u32 {
        longest_within(self.mtu)
    }

    /// Whether frames may be merged for the guest: not for one that minds delay, which has its frames as they came.
    #[inline]
    pub fn merges(&self) -> bool {
        self.moderation.level() != LatencySensitivity::High
    }

    /// Notes whether the queue rests from now on: the guest has to kick.
    pub fn note_rest(&mut self, rests: bool) {
        self.kicked |= self.rests && !rests;
        self.rests = rests;
    }

    /// Gives buffers back that the guest filled, and interrupts it if it wants that.
    #[inline]
    pub fn publish(&mut self) {
        let Some(wanted) = self.publish_ring() else { return };
        self.counters.kicks_suppressed += u64::from(!std::mem::take(&mut self.kicked));
        match wanted {
            true => self.call(),
            false => self.counters.calls_suppressed += 1,
        }
    }

    /// Gives the guest buffers with `frames` in them, and interrupts it if it wants that, now or later: returns when an
    /// interrupt is due that is held back.
    #[inline]
    pub fn publish_frames(&mut self, frames: u32) -> Option<u64> {
        let Some(wanted) = self.publish_ring() else { return self.moderation.due() };
        let owed = self.moderation.due().is_some();
        self.counters.calls_coalesced += u64::from(owed);
        match self.moderation.given(frames, wanted, cpu::cycles) {
            Decision::None => self.counters.calls_suppressed += 1,
            Decision::Call => self.call(),
            Decision::Hold(_) => {}
        }
        self.moderation.due()
    }

    /// Publishes what was completed; returns whether the guest wants an interrupt for it, or `None` if it was nothing.
    #[inline]
    fn publish_ring(&mut self) -> Option<bool> {
        let running = self.running.as_mut()?;
        let wanted = running.ring.publish()?;
        running.log_ring();
        Some(wanted)
    }

    /// Interrupts the guest.
    fn call(&mut self) {
        if let Some(running) = &mut self.running {
            self.counters.calls += 1;
            running.signal();
        }
    }

    /// Sends the interrupt that is held back, if `which` names it; returns when it is due otherwise.
    pub fn flush(&mut self, which: Flush) -> Option<u64> {
        let due = self.moderation.due()?;
        let waits = match which {
            Flush::Due(now) => earlier(now, due),
            Flush::Idle(now) => self.moderation.is_patient() && earlier(now, due),
            Flush::All => false,
        };
        if waits {
            return Some(due);
        }
        self.moderation.called(cpu::cycles());
        self.call();
        None
    }

    fn fail(&mut self, fault: RingFault) {
        let index = self.take_running().map_or(0, |running| running.ring.base());
        self.fault = Some((fault, index));
    }

    fn take_running(&mut self) -> Option<Running> {
        self.flush(Flush::All);
        self.unwatch();
        self.running.take()
    }

    fn wake(&self) {
        if let Some(wake) = &self.wake {
            wake.wake();
        }
    }

    /// Has the shard woken by the driver's kicks. Where the kernel has no room for one more wait (ENOSPC, ENOMEM) the queue
    /// is polled instead.
    fn watch(&mut self) {
        if let (Some(wake), Some(_), Some(kick)) = (&self.wake, &self.running, &self.kick) {
            self.deaf = wake.watch(kick.as_fd()).is_err();
        }
        self.wake();
    }

    fn unwatch(&self) {
        if let (Some(wake), Some(_), Some(kick)) = (&self.wake, &self.running, &self.kick) {
            wake.unwatch(kick.as_fd());
        }
    }
}

impl Running {
    /// Notes that the device's areas of the ring were written. All of them: three pages for a ring of 1024, most of them
    /// marked already, while a migration lasts.
    #[inline]
    pub fn log_ring(&self) {
        if let Some(log) = &self.log {
            self.written.iter().for_each(|&(guest, len)| log.mark(guest, len));
        }
    }

    /// Asks the driver to notify from now on; returns whether the ring may rest.
    pub fn arm(&mut self) -> Result<bool, RingFault> {
        let armed = self.ring.arm();
        self.log_ring();
        armed
    }

    /// Tells the driver that notifications are not needed.
    pub fn disarm(&mut self) {
        self.ring.disarm();
        self.log_ring();
    }

    /// Interrupts the guest. A call that blocked is not rung again, and the session is told, which ends the connection.
    #[inline]
    fn signal(&mut self) {
        let rang = self.call.as_ref().map_or(Rang::Done, |call| doorbell::ring(call.as_fd()));
        if rang == Rang::Blocked {
            self.call = None;
            self.blocked.store(true, Ordering::Relaxed);
            self.attention.signal();
        }
    }
}
