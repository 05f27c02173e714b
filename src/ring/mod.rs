//! Virtqueues: the device's side of the rings that a guest driver makes in its memory.
//!
//! [`split`] is the split ring (virtio 1.3, 2.7), [`packed`] the packed one (2.8), whose place [`record`] keeps in a file of
//! [`records`]; [`DeviceRing`] is what a port asks of a ring of any form. Reading and writing chains share one walk, [`DeviceRing::gather`], which differs only in the [`Direction`] that the descriptors must have. Everything that the driver wrote is read once, into
//! a local, checked, and used from there; what cannot be is a [`RingFault`], and the ring is not touched again until the
//! driver resets it.

mod chain;
mod descriptor;
mod device;
#[cfg(test)]
mod driver;
#[cfg(any(test, fuzzing))]
pub mod exercise;
mod fault;
pub mod packed;
#[cfg(test)]
mod packed_driver;
mod place;
mod record;
mod records;
pub mod split;
#[cfg(test)]
mod tests;

pub use chain::{Chain, Chains, Direction, Readable, Writable};
pub use device::{DeviceRing, Ring};
pub use fault::{RingError, RingFault};
pub use packed::PackedRing;
pub use record::Record;
pub use records::{Records, RecordsError};
pub use split::SplitRing;

/// Where a ring lies and how the driver agreed to use it.
#[derive(Debug, Clone, Copy)]
pub struct RingConfig {
    /// VIRTIO_F_RING_PACKED was negotiated.
    pub packed: bool,
    /// Number of descriptors, up to 32768: in a split ring, a power of two.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring, or of the driver's event suppression in a packed ring.
    pub available: u64,
    /// Guest-physical address of the used ring, or of the device's event suppression in a packed ring.
    pub used: u64,
    /// Index of the first available entry to take; in a packed ring, the slot of the first descriptor to take, with the
    /// wrap counter in bit 15.
    pub base: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// VIRTIO_F_IN_ORDER was negotiated.
    pub in_order: bool,
}

impl RingConfig {
    /// The areas that the device writes: guest-physical addresses and lengths.
    pub fn written(&self) -> [(u64, u64); 2] {
        let size = u64::from(self.size);
        if self.packed {
            // Descriptors, and what it says about notifications (virtio 1.3, 2.8.10).
            [(self.descriptors, 16 * size), (self.used, 4)]
        } else {
            // Flags, index, elements, avail_event (2.7.8).
            [(self.used, 6 + 8 * size), (self.used, 0)]
        }
    }
}
