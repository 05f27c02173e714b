//! The control state of one ring: [`Vring`], what the front end has said of it so far.
//!
//! What the messages set is kept in vhost-user-backend's `VringRwLock` (guest addresses, next available index, enabled), but for
//! eventfds, which have to be [a front end's](PeerEvent). The ring itself runs in a [`Queue`]; on start its eventfds move there, and
//! come back by no other way than a new message.
//!
//! Rules, from the vhost-user specification ("Ring states") and from what front ends really do: started and enabled are
//! independent. A ring starts with SET_VRING_KICK, or as soon after it as size, addresses and memory are known, not with
//! the first kick, since kicks may have been swallowed before. GET_VRING_BASE is the only stop and leaves "enabled" alone.
//! The index of SET_VRING_BASE is the truth: QEMU takes from a ring itself while it is stopped.

use std::sync::Arc;

use vhost_user_backend::{VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::features::F_RING_PACKED;
use super::nic::Nic;
use super::queue::{Queue, RingSetup};
use super::refusal::Refusal;
use super::relay::lease::PeerEvent;
use super::view::VringView;
use crate::limits::RING_SIZE;
use crate::mem::{DirtyLog, GuestMemory, SharedMemory};

/// virtio 1.3, 2.7.10: notifications by index.
const F_EVENT_IDX: u64 = 1 << 29;

/// Descriptors of a ring that [`Vring::pages`] looks at.
const SAMPLED: u64 = 16;

/// Where a ring's areas are, in the front end's own addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Areas {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// One ring as the front end has described it.
pub(super) struct Vring {
    index: usize,
    queue: Arc<Queue>,
    control: VringRwLock<Arc<GuestMemoryMmap>>,
    areas: Option<Areas>,
    /// Number of descriptors. The crate's queue takes powers of two only, and a packed ring may have any.
    size: Option<u16>,
    /// What the ring starts with, until it does.
    kick: Option<Arc<PeerEvent>>,
    call: Option<Arc<PeerEvent>>,
    error: Option<PeerEvent>,
    /// Where the ring, while it runs, notes what it writes.
    log: Option<Arc<DirtyLog>>,
    /// It was started by this front end, so that a fault of the queue is this front end's.
    was_started: bool,
    /// The same, whether or not it was stopped since.
    has_run: bool,
    /// The queue's fault was passed on to the front end and to the log.
    fault_told: bool,
    /// It was started where it makes no sense.
    misplaced: bool,
}

impl Vring {
    /// A ring that nothing is known of, stopped and disabled, for `queue`.
    pub(super) fn new(index: usize, queue: Arc<Queue>) -> Self {
        // The crate's state wants a memory for accessors that we do not use: an empty one.
        let control = VringRwLock::new(Arc::new(GuestMemoryMmap::new()), RING_SIZE)
            .expect("the only error is a maximum size that is no power of two, and RING_SIZE is one");
        Self {
            index,
            queue,
            control,
            areas: None,
            size: None,
            kick: None,
            call: None,
            error: None,
            log: None,
            was_started: false,
            has_run: false,
            fault_told: false,
            misplaced: false,
        }
    }

    /// SET_VRING_NUM. Only a packed ring may have a size that is no power of two; which form it has, front ends say before.
    pub(super) fn set_size(&mut self, size: u32, features: u64) -> Result<(), Refusal> {
        let any = features & F_RING_PACKED != 0;
        let good = u16::try_from(size).ok().filter(|size| (1..=RING_SIZE).contains(size));
        let good = good.filter(|size| any || size.is_power_of_two());
        let size = good.ok_or(Refusal::RingSize(self.index, size))?;
        if self.queue.is_running() && self.size != Some(size) {
            return Err(Refusal::RingRuns(self.index, "size"));
        }
        self.size = Some(size);
        Ok(())
    }

    /// SET_VRING_ADDR. On a running ring it may only repeat itself (QEMU does so when dirty logging goes on or off).
    pub(super) fn set_areas(&mut self, areas: Areas) -> Result<(), Refusal> {
        if self.queue.is_running() && self.areas != Some(areas) {
            return Err(Refusal::RingRuns(self.index, "addresses"));
        }
        self.areas = Some(areas);
        Ok(())
    }

    /// SET_VRING_BASE. A packed ring's has its wrap counter in bit 15. QEMU repeats it in the high 16 bits for the used
    /// descriptors and DPDK leaves those zero; we leave nothing behind at a stop, so one is as good as two.
    pub(super) fn set_base(&mut self, base: u32) -> Result<(), Refusal> {
        if self.queue.is_running() {
            return Err(Refusal::RingRuns(self.index, "base"));
        }
        self.control.set_queue_next_avail(base as u16);
        Ok(())
    }

    /// SET_VRING_KICK: takes effect at once on a running ring, else it waits for [`Vring::try_start`].
    pub(super) fn set_kick(&mut self, kick: Option<Arc<PeerEvent>>) -> Result<(), Refusal> {
        let kick = kick.ok_or(Refusal::NoKick(self.index))?;
        if self.queue.is_running() {
            self.queue.set_kick(kick);
        } else {
            self.kick = Some(kick);
        }
        Ok(())
    }

    /// SET_VRING_CALL: `None` if the guest polls.
    pub(super) fn set_call(&mut self, call: Option<Arc<PeerEvent>>) {
        if self.queue.is_running() {
            self.queue.set_call(call);
        } else {
            self.call = call;
        }
    }

    /// SET_VRING_ERR: signalled when the ring faults.
    pub(super) fn set_error(&mut self, error: Option<PeerEvent>) {
        self.error = error;
    }

    /// SET_VRING_ENABLE. Front ends repeat it, and a shard may have the ring just then: what changes nothing leaves it alone.
    pub(super) fn enable(&self, enabled: bool) {
        if self.is_enabled() != enabled {
            self.control.set_enabled(enabled);
            self.queue.enable(enabled);
        }
    }

    /// Whether the ring is enabled.
    pub(super) fn is_enabled(&self) -> bool {
        self.control.get_ref().is_enabled()
    }

    /// Has the running ring note what it writes in `log`, or in none any more. SET_FEATURES comes once per pair, mostly with the
    /// same log as before.
    pub(super) fn set_log(&mut self, log: Option<&Arc<DirtyLog>>) {
        if self.was_started && self.log.as_ref().map(Arc::as_ptr) != log.map(Arc::as_ptr) {
            self.queue.set_log(log.cloned());
            self.log = log.cloned();
        }
    }

    /// Whether the ring is started and has not faulted.
    pub(super) fn is_running(&self) -> bool {
        self.queue.is_running()
    }

    /// Whether all that the front end has to say is said, and the ring only has to start.
    pub(super) fn waits(&self) -> bool {
        self.kick.is_some() && self.areas.is_some() && self.size.is_some() && !self.queue.is_running()
    }

    /// Starts the ring if all that it takes is there. `features` are the acknowledged virtio bits, `log` is where to note
    /// what is written, if the guest is being migrated.
    pub(super) fn try_start(
        &mut self,
        nic: &Nic,
        memory: &SharedMemory,
        features: u64,
        log: Option<&Arc<DirtyLog>>,
    ) -> Result<(), Refusal> {
        let waits = self.kick.is_some() && memory.region_count() > 0;
        let Some(areas) = self.areas.filter(|_| waits) else {
            return Ok(());
        };
        let Some(size) = self.size.filter(|_| !self.queue.is_running()) else {
            return Ok(());
        };
        if memory.failed() {
            return Err(Refusal::MemoryFailed);
        }
        let guest = |area, user| {
            let missing = Refusal::AreaUnmapped { ring: self.index, area, address: user };
            memory.memory().guest_address(user).ok_or(missing)
        };
        let descriptors = guest("descriptor table", areas.descriptors)?;
        let available = guest("available ring", areas.available)?;
        let used = guest("used ring", areas.used)?;
        let aligned = self.control.set_queue_info(descriptors, available, used);
        aligned.map_err(|_| Refusal::RingUnaligned(self.index))?;
        self.control.set_queue_event_idx(features & F_EVENT_IDX != 0);
        let mut setup = self.setup(size, memory, features, log)?;
        if features & F_RING_PACKED != 0 {
            setup.record = nic.records.record(nic, self.index, size);
        }
        self.misplaced = self.queue.start(setup).map_err(|source| Refusal::Ring(self.index, source))?;
        self.control.set_queue_ready(true);
        (self.kick, self.call) = (None, None);
        self.log = log.cloned();
        (self.was_started, self.has_run) = (true, true);
        self.fault_told = false;
        Ok(())
    }

    /// What the queue needs to know, from the control state.
    fn setup(
        &self,
        size: u16,
        memory: &SharedMemory,
        features: u64,
        log: Option<&Arc<DirtyLog>>,
    ) -> Result<RingSetup, Refusal> {
        let state = self.control.get_ref();
        let kick = self.kick.clone().ok_or(Refusal::NoKick(self.index))?;
        let queue = state.get_queue();
        Ok(RingSetup {
            size,
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            base: queue.next_avail(),
            features,
            memory: Arc::clone(memory.memory()),
            record: None,
            kick,
            call: self.call.clone(),
            log: log.cloned(),
        })
    }

    /// GET_VRING_BASE: stops the ring, whatever state it is in, and returns the index of the next available entry.
    pub(super) fn stop(&mut self) -> u16 {
        if let Some(next) = self.queue_stopped() {
            self.control.set_queue_next_avail(next);
        }
        self.control.set_queue_ready(false);
        (self.kick, self.call) = (None, None);
        self.control.queue_next_avail()
    }

    /// Where the queue stood, if it was started and is stopped only now.
    fn queue_stopped(&mut self) -> Option<u16> {
        self.log = None;
        std::mem::take(&mut self.was_started).then(|| self.queue.stop()).flatten()
    }

    /// Guest-physical addresses of memory that shards touch for the ring: its areas, and what some of its descriptors point at.
    /// In both forms of ring a descriptor has 16 bytes and begins with its address. What a guest writes there is looked up
    /// and nothing else.
    pub(super) fn pages(&self, memory: &GuestMemory) -> Vec<u64> {
        let state = self.control.get_ref();
        let queue = state.get_queue();
        let table = queue.desc_table();
        let mut pages = vec![table, queue.avail_ring(), queue.used_ring()];
        let (size, mut hint) = (u64::from(self.size.unwrap_or(0)), 0);
        for sample in 0..SAMPLED.min(size) {
            let mut address = [0; 8];
            if let Some(descriptor) = memory.span(table + 16 * (sample * size / SAMPLED.min(size)), 8, &mut hint) {
                descriptor.read(&mut address);
                pages.push(u64::from_le_bytes(address));
            }
        }
        pages
    }

    /// Why the ring stopped by itself, until it is started anew.
    fn fault(&self) -> Option<String> {
        self.queue.fault().filter(|_| self.was_started).map(|fault| fault.to_string())
    }

    /// What is wrong with where the ring was started, if that makes no sense.
    pub(super) fn doubt(&self) -> Option<&'static str> {
        (self.misplaced && self.queue.is_running()).then_some(MISPLACED)
    }

    /// Passes a fault of the queue on to the front end, and returns it the first time it is seen.
    pub(super) fn take_fault(&mut self) -> Option<String> {
        let fault = self.fault().filter(|_| !self.fault_told)?;
        self.fault_told = true;
        if self.error.as_ref().is_some_and(|error| !self.queue.ring(error)) {
            self.error = None;
        }
        Some(fault)
    }

    /// What is told of it.
    pub(super) fn view(&self) -> VringView {
        VringView {
            enabled: self.is_enabled(),
            size: self.size.unwrap_or(0),
            was_started: self.was_started,
            has_run: self.has_run,
            waits: self.waits(),
            doubt: self.doubt(),
        }
    }
}

const MISPLACED: &str = "its guest counts from another place than the front end says, so it may move no frames until its guest \
                         resets the device";
