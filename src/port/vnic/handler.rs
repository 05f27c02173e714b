//! Puts a [`Device`] behind the `vhost` crate's message loop: [`Handler`].
//!
//! The crate decodes and acknowledges most messages and calls the trait below; the few that it cannot take come through
//! [`Handler::serve`]. Either way a refusal is logged and remembered, so that the session can tell a refused message,
//! after which the connection goes on, from a broken one.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    FrontendReq as Req, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandler};

use super::device::Device;
use super::features;
use super::message::Request;
use super::nic::Nic;
use super::refusal::Refusal;
use super::relay::lease::{Lease, PeerEvent};
use super::relay::vetting;
use super::view::DeviceView;
use super::vring::Areas;
use crate::ident::MacAddr;
use crate::limits::{MEMORY_REGIONS, QUEUE_PAIRS};
use crate::mem::{NodePages, Pinned, RegionRequest};
use crate::port::rate_limit::log_limited;
use crate::sys::descriptors;

/// For how long it is taken to be true where memory lies.
const PLACED: Duration = Duration::from_secs(5);

/// One connection's device, as the crate's message loop wants it.
pub(super) struct Handler {
    nic: Arc<Nic>,
    device: Mutex<Device>,
    /// What is told of the device. Held for as long as it takes to copy a pointer.
    view: Mutex<Arc<DeviceView>>,
    /// Where the memory lay, and when that was seen.
    nodes: Mutex<Option<(Instant, NodePages)>>,
    /// Somebody wants to know it anew.
    nodes_wanted: AtomicBool,
    /// The message in hand was refused by us, not found broken by the crate.
    refused: Mutex<bool>,
    /// For the eventfds that come with messages.
    lease: Arc<Lease>,
}

/// The device while its session works at it. Whatever was changed is published when it lets go.
pub(super) struct Held<'a> {
    device: MutexGuard<'a, Device>,
    view: &'a Mutex<Arc<DeviceView>>,
    changed: bool,
}

impl Deref for Held<'_> {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Device {
        self.changed = true;
        &mut self.device
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.changed {
            let view = Arc::new(self.device.view());
            *self.view.lock().unwrap_or_else(PoisonError::into_inner) = view;
        }
    }
}

impl Handler {
    pub(super) fn new(nic: Arc<Nic>, lease: Arc<Lease>) -> Self {
        let device = Device::new(Arc::clone(&nic));
        let view = Mutex::new(Arc::new(device.view()));
        let (nodes, nodes_wanted, refused) = (Mutex::default(), AtomicBool::new(false), Mutex::new(false));
        Self { nic, device: Mutex::new(device), view, nodes, nodes_wanted, refused, lease }
    }

    /// The device, for the thread that serves the connection and nobody else: it may have to wait there for the front end's
    /// memory. Everybody else asks for the [view](Self::view).
    pub(super) fn device(&self) -> Held<'_> {
        let device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        Held { device, view: &self.view, changed: false }
    }

    /// What is told of the device, as of the last message. Waits for nobody.
    pub(super) fn view(&self) -> Arc<DeviceView> {
        Arc::clone(&self.view.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Where the guest's memory lay when it was looked at last, if a ring runs.
    pub(super) fn last_nodes(&self) -> NodePages {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.as_ref().map(|(_, nodes)| nodes.clone()).unwrap_or_default()
    }

    /// Where the guest's memory lies; `None` if no ring runs, or if it is not known just now. Then the session is asked to look,
    /// which touches the guest's memory and may take as long as that takes.
    pub(super) fn nodes(&self) -> Option<NodePages> {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = nodes.as_ref().filter(|(seen, _)| seen.elapsed() < PLACED).map(|(_, nodes)| nodes.clone());
        drop(nodes);
        if fresh.is_none() && !self.nodes_wanted.swap(true, Ordering::Relaxed) {
            self.nic.attention.signal();
        }
        fresh
    }

    /// What the session does after a message and when it was woken: memory is pinned as the port's latency sensitivity asks for,
    /// and looked at where somebody wants to know where it lies.
    pub(super) fn follow_up(&self) {
        self.pin();
        let started = self.device.lock().unwrap_or_else(PoisonError::into_inner).take_placement();
        if self.nodes_wanted.swap(false, Ordering::Relaxed) || started {
            let nodes = self.device().memory_nodes();
            *self.nodes.lock().unwrap_or_else(PoisonError::into_inner) = nodes.map(|nodes| (Instant::now(), nodes));
        }
    }

    /// Pins memory or lets it go. Only for the thread that handles the messages, so that no message is acknowledged while memory
    /// that it took away is still mapped here.
    fn pin(&self) {
        let Some((memory, wanted)) = self.device().to_pin() else { return };
        let name = &self.nic.config.name;
        let outcome = match wanted.then(|| memory.pin()) {
            None => {
                memory.unpin();
                None
            }
            Some(Ok(Pinned::Whole)) => Some("whole"),
            Some(Ok(Pinned::Sparse)) => {
                log_limited!(self.nic.log, log::Level::Info, "{name}: {SPARSE}");
                Some("as it comes")
            }
            Some(Err(error)) => {
                let level = log::Level::Warn;
                log_limited!(self.nic.log, level, "{name}: cannot lock the VM's memory: {error}; {LOCKING}");
                Some("failed")
            }
        };
        self.device().note_pinned(&memory, outcome);
    }

    /// Whether the last message was refused; forgets it.
    pub(super) fn take_refused(&self) -> bool {
        std::mem::take(&mut self.refused.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Does what a message asks for that the crate does not take; `true` if it is done.
    pub(super) fn serve(&self, request: Request, body: &[u8]) -> bool {
        self.answer(request, |device| {
            let eight: [u8; 8] = match request {
                Request::SET_VRING_ENABLE | Request::SEND_RARP | Request::NET_SET_MTU => {
                    body.try_into().map_err(|_| Refusal::Malformed)?
                }
                _ => return Err(Refusal::Unserved(request)),
            };
            let [a, b, c, d, e, f, g, h] = eight;
            match request {
                Request::SET_VRING_ENABLE => match u32::from_ne_bytes([e, f, g, h]) {
                    enabled @ 0..=1 => device.enable(u32::from_ne_bytes([a, b, c, d]), enabled == 1),
                    _ => Err(Refusal::Malformed),
                },
                // The address lies in the 64-bit field as it does in a frame.
                Request::SEND_RARP => device.announce(MacAddr([a, b, c, d, e, f])),
                _ => device.set_mtu(u64::from_ne_bytes(eight)),
            }
        })
        .is_ok()
    }

    /// A message was handled, as a whole.
    pub(super) fn next_message(&self) {
        self.lease.next_message();
    }

    /// Takes over the eventfd of a ring, before the device is held: what turns out to be none is closed here.
    fn event(
        &self,
        index: u8,
        which: &'static str,
        file: Option<File>,
    ) -> std::result::Result<Option<PeerEvent>, Refusal> {
        let Some(file) = file else { return Ok(None) };
        // Whatever becomes of the file, this goes after it.
        let receipt = self.lease.receipt();
        let file = spare(file)?;
        let taken = match vetting::refused(&file) {
            Some(what) => {
                Err(io::Error::new(ErrorKind::InvalidInput, format!("the descriptor is not an eventfd but {what}")))
            }
            None => PeerEvent::new(file.into(), receipt),
        };
        taken.map(Some).map_err(|source| Refusal::Event(index.into(), which, source))
    }

    /// Runs one message against the device; a refusal is logged, remembered and made the crate's error.
    fn answer<T>(
        &self,
        request: Request,
        act: impl FnOnce(&mut Device) -> std::result::Result<T, Refusal>,
    ) -> Result<T> {
        let mut device = self.device();
        act(&mut device).map_err(|refusal| {
            device.note(&refusal);
            drop(device);
            *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = true;
            let (name, reason) = (&self.nic.config.name, refusal.sentence());
            log_limited!(self.nic.log, log::Level::Warn, "{name}: refused {request} of the front end: {reason}");
            Error::InvalidOperation("refused")
        })
    }
}

/// A request's number as the crate's own name for it.
fn of(request: Req) -> Request {
    Request(request.into())
}

impl VhostUserBackendReqHandler for Handler {
    fn set_owner(&self) -> Result<()> {
        Ok(())
    }

    /// Ignored, as vhost-user recommends for this message ("VHOST_USER_RESET_OWNER").
    fn reset_owner(&self) -> Result<()> {
        Ok(())
    }

    fn get_features(&self) -> Result<u64> {
        self.device().asked = true;
        Ok(features::offered(self.nic.config.compat))
    }

    fn set_features(&self, acked: u64) -> Result<()> {
        self.answer(of(Req::SET_FEATURES), |device| device.set_features(acked))
    }

    fn get_protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::from_bits_truncate(features::offered_protocol(self.nic.config.compat)))
    }

    fn set_protocol_features(&self, acked: u64) -> Result<()> {
        self.answer(of(Req::SET_PROTOCOL_FEATURES), |device| device.set_protocol_features(acked))
    }

    /// QEMU compares this with its queue pairs and cloud-hypervisor with its rings, so it is the most that anybody can
    /// have, whatever the port has (DPDK answers the same).
    fn get_queue_num(&self) -> Result<u64> {
        Ok(QUEUE_PAIRS as u64)
    }

    fn get_max_mem_slots(&self) -> Result<u64> {
        Ok(MEMORY_REGIONS as u64)
    }

    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let files: std::result::Result<Vec<_>, _> = files.into_iter().map(memory_file).collect();
        self.answer(of(Req::SET_MEM_TABLE), |device| {
            let files = files?;
            if regions.len() != files.len() {
                return Err(Refusal::RegionFiles(regions.len(), files.len()));
            }
            device.set_memory(regions.iter().map(region_request).zip(files).collect())
        })?;
        Ok(None)
    }

    fn add_mem_region(
        &self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let file = memory_file(file);
        self.answer(of(Req::ADD_MEM_REG), |device| device.add_memory(region_request(region), file?))?;
        Ok(None)
    }

    fn remove_mem_region(&self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.answer(of(Req::REM_MEM_REG), |device| device.remove_memory(&region_request(region)))
    }

    fn set_vring_num(&self, index: u32, size: u32) -> Result<()> {
        self.answer(of(Req::SET_VRING_NUM), |device| device.set_size(index, size))
    }

    fn set_vring_addr(
        &self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let areas = Areas { descriptors, available, used };
        self.answer(of(Req::SET_VRING_ADDR), |device| device.set_areas(index, areas))
    }

    fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        self.answer(of(Req::SET_VRING_BASE), |device| device.vring(index)?.set_base(base))
    }

    fn get_vring_base(&self, index: u32) -> Result<VhostUserVringState> {
        let base = self.answer(of(Req::GET_VRING_BASE), |device| device.stop(index))?;
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&self, index: u8, kick: Option<File>) -> Result<()> {
        let kick = self.event(index, "kick", kick);
        self.answer(of(Req::SET_VRING_KICK), |device| device.set_kick(index.into(), kick?.map(Arc::new)))
    }

    fn set_vring_call(&self, index: u8, call: Option<File>) -> Result<()> {
        let call = self.event(index, "call", call);
        self.answer(of(Req::SET_VRING_CALL), |device| {
            device.vring(index.into())?.set_call(call?.map(Arc::new));
            Ok(())
        })
    }

    fn set_vring_err(&self, index: u8, error: Option<File>) -> Result<()> {
        let error = self.event(index, "error", error);
        self.answer(of(Req::SET_VRING_ERR), |device| {
            device.vring(index.into())?.set_error(error?);
            Ok(())
        })
    }

    fn set_vring_enable(&self, index: u32, enabled: bool) -> Result<()> {
        self.answer(of(Req::SET_VRING_ENABLE), |device| device.enable(index, enabled))
    }

    // None of the following is offered, so the session refuses these messages before the crate sees them.

    fn reset_device(&self) -> Result<()> {
        NOT_OFFERED
    }

    fn get_config(&self, _offset: u32, _size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn set_config(&self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        NOT_OFFERED
    }

    fn set_gpu_socket(&self, _socket: GpuBackend) -> Result<()> {
        NOT_OFFERED
    }

    fn get_shared_object(&self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn get_inflight_fd(&self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn set_inflight_fd(&self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        NOT_OFFERED
    }

    fn set_device_state_fd(
        &self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn check_device_state(&self) -> Result<()> {
        NOT_OFFERED
    }

    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn set_log_base(&self, log: &VhostUserLog, file: File) -> Result<()> {
        let file = memory_file(file);
        self.answer(of(Req::SET_LOG_BASE), |device| device.set_log(file?, log.mmap_offset, log.mmap_size))
    }
}

const NOT_OFFERED: Result<()> = Err(Error::InvalidOperation("not offered"));

/// A descriptor that there is room for beside what this process needs for itself.
fn spare(file: File) -> std::result::Result<File, Refusal> {
    if descriptors::is_of_reserve(&file) { Err(Refusal::NoDescriptors(descriptors::limit())) } else { Ok(file) }
}

/// The file of a region or a log, if it was let through.
fn memory_file(file: File) -> std::result::Result<File, Refusal> {
    vetting::refused(&file).map_or_else(|| spare(file), |what| Err(Refusal::NoMemory(what)))
}

fn region_request(region: &VhostUserMemoryRegion) -> RegionRequest {
    RegionRequest {
        guest: region.guest_phys_addr,
        user: region.user_addr,
        len: region.memory_size,
        offset: region.mmap_offset,
    }
}

const SPARSE: &str =
    "the VM's memory is not all there yet, so it is locked page by page; prealloc=on or huge pages have it there";

const LOCKING: &str = "give linecardd CAP_IPC_LOCK or LimitMEMLOCK=infinity";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rustix::fs::{MemfdFlags, memfd_create};
    use serde_json::Value;

    use super::*;
    use crate::ident::LatencySensitivity;

    const LEN: u64 = 64 * 1024;

    #[test]
    fn memory_is_pinned_after_its_message_and_what_is_replaced_meanwhile_does_not_count() {
        let nic = Arc::new(Nic::new(super::super::exercise::config()).unwrap());
        let handler = Handler::new(Arc::clone(&nic), Arc::default());
        let share = |guest| {
            let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
            file.set_len(LEN).unwrap();
            handler.set_mem_table(&[VhostUserMemoryRegion::new(guest, LEN, guest, 0)], vec![file], None).unwrap();
        };
        let pinned = || handler.view().report(&NodePages::default())["memory"]["pinned"].clone();
        nic.set_latency(LatencySensitivity::High);
        assert!(handler.device().to_pin().is_none(), "there is no memory yet");
        share(0);
        let (memory, wanted) = handler.device().to_pin().unwrap();
        assert_eq!((wanted, pinned()), (true, Value::Null));
        share(LEN);
        handler.device().note_pinned(&memory, Some("whole"));
        assert_eq!(pinned(), Value::Null);
        handler.pin();
        assert!(pinned().is_string() && handler.device().to_pin().is_none());
        nic.set_latency(LatencySensitivity::Normal);
        handler.pin();
        assert_eq!(pinned(), Value::Null);
    }
}
