//! The virtio-net device as one connection has negotiated it: [`Device`], features, memory and rings, and their rules.
//!
//! Every method is one message. It either does what the message says or refuses and leaves everything as it was. The one
//! exception is the start of a ring, which follows from whichever message is the last that it needs: if it fails, what the
//! messages have set stays, and the next of them tries again.

use std::fs::File;
use std::sync::Arc;

use super::features::{self, F_LOG_ALL, F_PROTOCOL_FEATURES, F_RING_PACKED, PROTOCOL_REPLY_ACK};
use super::nic::Nic;
use super::refusal::Refusal;
use super::relay::lease::PeerEvent;
use super::view::DeviceView;
use super::vring::{Areas, Vring};
use crate::ident::MacAddr;
use crate::limits::{MTU_RANGE, QUEUE_PAIRS};
use crate::mem::{DirtyLog, GuestMemory, MappingError, NodePages, RegionRequest, SharedMemory, host_bytes};
use crate::port::rate_limit::{Admission, log_limited};
use crate::sys::mapped_file::Loss;

/// What one front end has negotiated and shared. Goes with its connection.
pub(super) struct Device {
    nic: Arc<Nic>,
    /// Acknowledged virtio bits; `None` before the first SET_FEATURES.
    features: Option<u64>,
    protocol: u64,
    /// The front end has asked which features there are.
    pub(super) asked: bool,
    /// The last SET_PROTOCOL_FEATURES named REPLY_ACK, refused or not.
    named_reply_ack: bool,
    mtu: Option<u16>,
    memory: SharedMemory,
    /// Where to note what is written to the guest's memory; in force while LOG_ALL is acknowledged as well.
    log: Option<Arc<DirtyLog>>,
    vrings: Vec<Vring>,
    /// What became of pinning the memory, if it was tried.
    pinned: Option<&'static str>,
    /// Where the memory lies was looked at since a ring has started last.
    placed: bool,
    /// Why everything was stopped, if it was.
    stopped: Option<&'static str>,
    /// What was refused last, of that which keeps rings from starting.
    obstacle: Option<String>,
    /// One bit for each queue pair that the front end has enabled and the port does not have.
    surplus: u128,
}

impl Device {
    /// A device that nothing is known of: no features, no memory, all rings stopped and disabled.
    pub(super) fn new(nic: Arc<Nic>) -> Self {
        let vrings = nic.queues.iter().enumerate().map(|(i, queue)| Vring::new(i, Arc::clone(queue))).collect();
        let memory = SharedMemory::new(Arc::clone(&nic.attention), nic.config.memory.unwrap_or_else(host_bytes));
        Self {
            nic,
            features: None,
            protocol: 0,
            asked: false,
            named_reply_ack: false,
            mtu: None,
            memory,
            log: None,
            vrings,
            pinned: None,
            placed: true,
            stopped: None,
            obstacle: None,
            surplus: 0,
        }
    }

    /// Remembers a refusal that explains why the port does not work.
    pub(super) fn note(&mut self, refusal: &Refusal) {
        if refusal.is_obstacle() {
            self.obstacle = Some(refusal.sentence());
        }
    }

    /// SET_FEATURES: once per queue pair with the same value, and with other ones only while nothing runs. LOG_ALL alone
    /// comes and goes at any time: with it a migration begins, and without it one was cancelled.
    pub(super) fn set_features(&mut self, acked: u64) -> Result<(), Refusal> {
        let extra = acked & !features::offered(self.nic.config.compat);
        if extra != 0 {
            return Err(Refusal::NotOffered(extra));
        }
        let from = self.features.unwrap_or(0);
        if (from ^ acked) & !F_LOG_ALL != 0 && self.vrings.iter().any(Vring::is_running) {
            return Err(Refusal::FeaturesInUse { from, to: acked });
        }
        if let (true, Some(log)) = (acked & F_LOG_ALL != 0, &self.log) {
            log.covers(self.memory.memory())?;
        }
        self.features = Some(acked);
        self.apply_log();
        self.stopped = self.stopped.filter(|_| self.lost().is_some());
        if acked & F_PROTOCOL_FEATURES == 0 {
            // vhost-user, "Ring states": without the feature, rings are born enabled.
            self.vrings.iter().for_each(|vring| vring.enable(true));
        }
        Ok(())
    }

    /// SET_LOG_BASE: the log that counts from now on. A front end makes it anew when memory is added.
    pub(super) fn set_log(&mut self, file: File, offset: u64, len: u64) -> Result<(), Refusal> {
        self.nic.mappings.spend(1);
        let log = DirtyLog::new(file, offset, len, Arc::clone(&self.nic.attention))?;
        log.covers(self.memory.memory())?;
        // The old one is unmapped here, after no ring uses it any more.
        let old = self.log.replace(Arc::new(log));
        self.apply_log();
        self.stopped = self.stopped.filter(|_| self.lost().is_some());
        drop(old);
        Ok(())
    }

    /// The log that rings have to keep, if any.
    fn log_in_force(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref().filter(|_| self.features.is_some_and(|acked| acked & F_LOG_ALL != 0))
    }

    /// Brings all rings to the log that is in force. No message says that a log is not needed any more: without LOG_ALL it
    /// stays mapped, unused, until the next one or the end of the connection.
    fn apply_log(&mut self) {
        let log = self.log_in_force().cloned();
        self.vrings.iter_mut().for_each(|vring| vring.set_log(log.as_ref()));
    }

    /// Whether rings are enabled by SET_VRING_ENABLE, not by their start.
    fn has_protocol_features(&self) -> bool {
        self.features.is_some_and(|acked| acked & F_PROTOCOL_FEATURES != 0)
    }

    /// SET_PROTOCOL_FEATURES.
    pub(super) fn set_protocol_features(&mut self, acked: u64) -> Result<(), Refusal> {
        self.named_reply_ack = acked & PROTOCOL_REPLY_ACK != 0;
        let extra = acked & !features::offered_protocol(self.nic.config.compat);
        if extra != 0 {
            return Err(Refusal::NotOffered(extra));
        }
        self.protocol = acked;
        Ok(())
    }

    /// Whether NEED_REPLY has a meaning. The `vhost` crate, which acknowledges most messages, wants to have been asked for
    /// the features as well, and goes by protocol features that we refused too (its `update_reply_ack_flag`); what we
    /// acknowledge ourselves follows it.
    pub(super) fn has_reply_ack(&self) -> bool {
        self.asked && self.named_reply_ack
    }

    /// The ring of a message that changes it.
    pub(super) fn vring(&mut self, index: u32) -> Result<&mut Vring, Refusal> {
        let pairs = self.vrings.len() / 2;
        self.vrings.get_mut(index as usize).ok_or(Refusal::NoSuchRing { index, pairs })
    }

    /// SET_VRING_ADDR.
    pub(super) fn set_areas(&mut self, index: u32, areas: Areas) -> Result<(), Refusal> {
        self.vring(index)?.set_areas(areas)?;
        self.start(index as usize)
    }

    /// SET_VRING_NUM.
    pub(super) fn set_size(&mut self, index: u32, size: u32) -> Result<(), Refusal> {
        let features = self.features.unwrap_or(0);
        self.vring(index)?.set_size(size, features)?;
        self.start(index as usize)
    }

    /// SET_VRING_KICK.
    pub(super) fn set_kick(&mut self, index: u32, kick: Option<Arc<PeerEvent>>) -> Result<(), Refusal> {
        let born_enabled = !self.has_protocol_features();
        // What has failed is stopped first, so that this is the start of a ring and not a change of one.
        self.attend();
        let vring = self.vring(index)?;
        vring.set_kick(kick)?;
        if born_enabled && !vring.is_enabled() && !vring.is_running() {
            vring.enable(true);
        }
        self.start(index as usize)
    }

    /// SET_VRING_ENABLE. Front ends switch off every ring they know of, also those that this port does not have.
    pub(super) fn enable(&mut self, index: u32, enabled: bool) -> Result<(), Refusal> {
        let refusal = match self.vring(index) {
            Ok(vring) => {
                vring.enable(enabled);
                return Ok(());
            }
            Err(refusal) => refusal,
        };
        let Some(pair) = 1u128.checked_shl(index / 2) else { return Err(refusal) };
        if enabled {
            self.surplus |= pair;
            return Err(refusal);
        }
        self.surplus &= !pair;
        Ok(())
    }

    /// GET_VRING_BASE. Needs an answer whatever it asks for, so a ring that the port does not have is simply at its start.
    /// A packed ring has a place for what is available and one for what is used, each with its wrap counter in its half of
    /// the number; as nothing is left behind, they are the same.
    pub(super) fn stop(&mut self, index: u32) -> Result<u32, Refusal> {
        let packed = self.features.is_some_and(|acked| acked & F_RING_PACKED != 0);
        let stopped = self.vring(index).map(Vring::stop).map(u32::from);
        // After the stop: a shard that was in the ring has noted where it stands for the last time.
        self.nic.records.forget(index as usize);
        match stopped {
            Ok(base) => Ok(if packed { base << 16 | base } else { base }),
            Err(_) if (index as usize) < 2 * QUEUE_PAIRS => Ok(0),
            Err(_) => Err(Refusal::RingNumber),
        }
    }

    fn start(&mut self, index: usize) -> Result<(), Refusal> {
        let log = self.log_in_force().cloned();
        let Some(vring) = self.vrings.get_mut(index) else { return Ok(()) };
        if self.memory.failed() && vring.waits() {
            return self.map_anew();
        }
        let ran = vring.is_running();
        vring.try_start(&self.nic, &self.memory, self.features.unwrap_or(0), log.as_ref())?;
        if vring.is_running() && !ran {
            self.obstacle = None;
            self.placed = false;
            let doubt = vring.doubt();
            if let Some(doubt) = doubt {
                let name = &self.nic.config.name;
                log_limited!(self.nic.log, log::Level::Warn, "{name}: ring {index}: {doubt}");
            }
            self.announce_start(index);
        }
        Ok(())
    }

    /// Tells the network where the guest is now that its first pair sends, if its address is known: after a migration other
    /// hosts learn it at once, whether or not the guest or its VM announces it too.
    fn announce_start(&self, index: usize) {
        let first = index == FIRST_TRANSMIT_RING;
        if let (true, Some(mac), Some(queue)) = (first, self.nic.config.mac, self.nic.queues.get(index)) {
            // One that comes too often is no loss: the network has heard of it.
            if !matches!(self.nic.announcements.admit(), Admission::Refused(_)) {
                queue.announce(mac);
            }
        }
    }

    /// SET_MEM_TABLE.
    pub(super) fn set_memory(&mut self, table: Vec<(RegionRequest, File)>) -> Result<(), Refusal> {
        let regions = table.len();
        let next = self.memory.replaced(table);
        self.pay(&next, regions);
        self.swap_memory(next?)
    }

    /// ADD_MEM_REG.
    pub(super) fn add_memory(&mut self, request: RegionRequest, file: File) -> Result<(), Refusal> {
        let next = self.memory.with(request, file);
        self.pay(&next, 1);
        self.swap_memory(next?)
    }

    /// REM_MEM_REG.
    pub(super) fn remove_memory(&mut self, request: &RegionRequest) -> Result<(), Refusal> {
        let next = Ok(self.memory.without(request));
        self.pay(&next, 1);
        self.swap_memory(next?)
    }

    /// Counts a change of so many regions for the port's pace; free if all is as it was. QEMU 7.2 tells everything once per
    /// queue pair. A change that was refused may have mapped all but the last region.
    fn pay(&self, next: &Result<Option<SharedMemory>, MappingError>, regions: usize) {
        if !matches!(next, Ok(None)) {
            self.nic.mappings.spend(u32::try_from(regions).unwrap_or(u32::MAX));
        }
    }

    /// Maps anew what the host had no page for, now that a ring is to run again: there may be room by now. If there is not,
    /// the next access tells. What was written to the pages of ours meanwhile is gone, and the rings are where their guest
    /// sees them.
    fn map_anew(&mut self) -> Result<(), Refusal> {
        let next = self.memory.mapped_anew();
        self.nic.mappings.spend(u32::try_from(self.memory.region_count()).unwrap_or(u32::MAX));
        self.swap_memory(Some(next?))
    }

    /// Gives every ring the new memory and then unmaps what only the old one had, on this thread and before the message
    /// is acknowledged: after the ack a front end frees what it took away.
    fn swap_memory(&mut self, next: Option<SharedMemory>) -> Result<(), Refusal> {
        let Some(next) = next else { return Ok(()) };
        if let Some(log) = self.log_in_force() {
            // QEMU sends a longer log before it adds memory (vhost_commit); without one the migration would lose writes.
            log.covers(next.memory())?;
        }
        for queue in self.nic.queues.iter().filter(|queue| queue.is_running()) {
            // A ring that lost its memory keeps that as its fault, which `attend` passes on.
            let _ = queue.set_memory(next.memory());
        }
        self.memory = next;
        self.pinned = None;
        self.stopped = self.stopped.filter(|_| self.lost().is_some());
        self.attend();
        for index in 0..self.vrings.len() {
            // The memory is as the front end wants it, whether or not it is what a waiting ring needs.
            if let Err(refusal) = self.start(index) {
                self.note(&refusal);
            }
        }
        Ok(())
    }

    /// NET_SET_MTU.
    pub(super) fn set_mtu(&mut self, mtu: u64) -> Result<(), Refusal> {
        let good = u16::try_from(mtu).ok().filter(|mtu| MTU_RANGE.contains(mtu)).ok_or(Refusal::Mtu(mtu))?;
        if let Some(limit) = self.nic.mtu().filter(|limit| good > *limit) {
            return Err(Refusal::MtuAbovePort(mtu, limit));
        }
        self.mtu = Some(good);
        Ok(())
    }

    /// SEND_RARP: tells the network where the guest is now. Comes five times in a second, the first before any ring runs.
    pub(super) fn announce(&mut self, mac: MacAddr) -> Result<(), Refusal> {
        if !mac.is_station() {
            return Err(Refusal::NotAStation(mac));
        }
        if let Admission::Refused(_) = self.nic.announcements.admit() {
            return Err(Refusal::TooManyAnnouncements);
        }
        if let Some(queue) = self.nic.queues.get(FIRST_TRANSMIT_RING) {
            queue.announce(mac);
        }
        Ok(())
    }

    /// Deals with what the attention event stands for: memory that failed, and rings that did.
    pub(super) fn attend(&mut self) {
        let name = &self.nic.config.name;
        if let (None, Some(lost)) = (self.stopped, self.lost()) {
            self.stopped = Some(lost);
            self.vrings.iter_mut().for_each(|vring| {
                vring.stop();
            });
            log_limited!(self.nic.log, log::Level::Error, "{name}: stopped: {lost}");
            self.memory.settle();
            if let Some(log) = self.log_in_force() {
                log.settle();
            }
        }
        self.nic.records.attend(&self.nic);
        for (index, vring) in self.vrings.iter_mut().enumerate() {
            if let Some(fault) = vring.take_fault() {
                log_limited!(self.nic.log, log::Level::Warn, "{name}: ring {index} stopped: {fault}");
            }
        }
    }

    /// What is wrong with the memory, or with the log if there is one in force, if pages of it are missing.
    fn lost(&self) -> Option<&'static str> {
        let of_memory = self.memory.loss().map(|loss| match loss {
            Loss::Shrunk => {
                "the VM's memory file shrank while it was shared; the VM has to share its memory anew, a restart of it does that"
            }
            Loss::NoRoom => {
                "the host has no memory left for the VM's memory file (its tmpfs is full, or its pool of huge pages is empty); make room, then pause and resume the VM"
            }
            Loss::Hardware => "the host's memory is broken where the VM's memory is; restart the VM",
        });
        let of_log = || match self.log_in_force()?.loss()? {
            Loss::Shrunk => Some("the log of the VM's migration shrank while it was in use; cancel the migration"),
            Loss::NoRoom => Some("the host has no memory left for the log of the VM's migration; cancel the migration"),
            Loss::Hardware => {
                Some("the host's memory is broken where the log of the VM's migration is; cancel the migration")
            }
        };
        of_memory.or_else(of_log)
    }

    /// The memory, and whether it is to be pinned, if it is not yet as the port's latency sensitivity asks for.
    pub(super) fn to_pin(&self) -> Option<(Arc<GuestMemory>, bool)> {
        let wanted = self.nic.pins();
        let due = match (wanted, self.pinned) {
            (true, None) => self.memory.region_count() > 0,
            (false, Some(_)) => true,
            _ => false,
        };
        due.then(|| (Arc::clone(self.memory.memory()), wanted))
    }

    /// Takes down what became of pinning `memory`, unless another is shared now.
    pub(super) fn note_pinned(&mut self, memory: &Arc<GuestMemory>, outcome: Option<&'static str>) {
        if Arc::ptr_eq(self.memory.memory(), memory) {
            self.pinned = outcome;
        }
    }

    /// Ends everything: no ring runs, nothing is mapped, all descriptors are closed.
    pub(super) fn tear_down(&mut self) {
        for vring in &mut self.vrings {
            vring.stop();
            vring.enable(false);
        }
        *self = Self::new(Arc::clone(&self.nic));
    }

    /// What is told of it.
    pub(super) fn view(&self) -> DeviceView {
        DeviceView {
            stopped: self.stopped,
            obstacle: self.obstacle.clone(),
            features: self.features.unwrap_or(0),
            protocol: self.protocol,
            mtu: self.mtu,
            migrating: self.log_in_force().is_some(),
            regions: self.memory.region_count(),
            bytes: self.memory.bytes(),
            pinned: self.pinned,
            pairs_wanted: (self.surplus != 0).then(|| u128::BITS - self.surplus.leading_zeros()),
            rings: self.vrings.iter().map(Vring::view).collect(),
        }
    }

    /// What the front end shares now.
    #[cfg(test)]
    pub(super) fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(self.memory.memory())
    }

    /// Whether where the memory lies is to be looked at, as a ring has started; once for each time.
    pub(super) fn take_placement(&mut self) -> bool {
        !std::mem::replace(&mut self.placed, true)
    }

    /// On which NUMA nodes the memory lies that shards touch; `None` while no ring runs.
    pub(super) fn memory_nodes(&self) -> Option<NodePages> {
        let running = || self.vrings.iter().filter(|vring| vring.is_running());
        let memory = self.memory.memory();
        let named: Vec<u64> = running().flat_map(|vring| vring.pages(memory)).collect();
        (running().count() > 0).then(|| memory.nodes(named.into_iter()))
    }
}

/// Guest TX of the first pair: what the switch receives from, and so where announcements come in.
const FIRST_TRANSMIT_RING: usize = 1;
