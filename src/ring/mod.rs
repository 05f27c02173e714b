//! Virtqueues: the device's side of the rings that a guest driver makes in its memory.
//!
//! [`split`] is the split ring (virtio 1.3, 2.7); [`DeviceRing`] is what a port asks of a ring of any form. Reading and
//! writing chains share one walk, [`DeviceRing::gather`], which differs only in the [`Direction`] that the descriptors must have. Everything that the driver wrote is read once, into
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
pub mod split;
#[cfg(test)]
mod tests;

pub use chain::{Chain, Chains, Direction, Readable, Writable};
pub use device::{DeviceRing, Ring};
pub use fault::{RingError, RingFault};
pub use split::SplitRing;

/// Where a ring lies and how the driver agreed to use it.
#[derive(Debug, Clone, Copy)]
pub struct RingConfig {
    /// Number of descriptors: a power of two up to 32768.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Index of the first available entry to take.
    pub base: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
}
