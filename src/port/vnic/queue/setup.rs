//! What the session gives a ring to start with ([`RingSetup`]), and the ring that comes of it.

use std::sync::Arc;

use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::super::features;
use super::super::relay::lease::PeerEvent;
use super::state::{Loss, Running};
use crate::frame::Flooding;
use crate::limits::VNET_HEADER_BYTES;
use crate::mem::{DirtyLog, GuestMemory};
use crate::ring::{Record, Ring, RingConfig, RingError};

/// Bytes of the virtio-net header when neither VERSION_1 nor MRG_RXBUF was negotiated (virtio 1.3, 5.1.6.1).
const LEGACY_HEADER_BYTES: usize = 10;

/// All that a ring needs to start.
#[derive(Debug)]
pub(in crate::port::vnic) struct RingSetup {
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
    pub kick: Arc<PeerEvent>,
    /// To be signalled when something was used.
    pub call: Option<Arc<PeerEvent>>,
    /// Where to note what is written, while the guest is being migrated.
    pub log: Option<Arc<DirtyLog>>,
    /// Where a packed ring is noted to stand, by us when we ran it last.
    pub record: Option<Record>,
}

impl RingSetup {
    /// The ring, started, that asks for no kicks yet. The ring's lock is held meanwhile, so nothing of what a peer gave us is closed.
    ///
    /// # Errors
    /// Its areas are not in the memory, or overlap, or the place is none in a ring of its size.
    pub(super) fn start(&mut self) -> Result<Running, RingError> {
        let config = self.config();
        let mut ring = Ring::start(config, Arc::clone(&self.memory))?;
        ring.resume(self.record.take());
        ring.disarm();
        Ok(Running {
            ring,
            header: self.header(),
            mergeable: self.has(VIRTIO_NET_F_MRG_RXBUF),
            may: features::may(self.features),
            flooding: Flooding::default(),
            negotiated: features::accepts(self.features),
            written: config.written(),
            memory: Arc::clone(&self.memory),
            log: self.log.clone(),
            call: self.call.clone(),
            muted: false,
            loss: Loss::unknown(),
        })
    }

    fn config(&self) -> RingConfig {
        RingConfig {
            packed: self.has(VIRTIO_F_RING_PACKED),
            size: self.size,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            base: self.base,
            event_idx: self.has(VIRTIO_RING_F_EVENT_IDX),
            indirect: self.has(VIRTIO_RING_F_INDIRECT_DESC),
            in_order: self.has(VIRTIO_F_IN_ORDER),
        }
    }

    /// Bytes of the virtio-net header.
    fn header(&self) -> usize {
        let long = [VIRTIO_NET_F_MRG_RXBUF, VIRTIO_F_VERSION_1, VIRTIO_F_RING_PACKED];
        if long.into_iter().any(|bit| self.has(bit)) { VNET_HEADER_BYTES } else { LEGACY_HEADER_BYTES }
    }

    fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}
