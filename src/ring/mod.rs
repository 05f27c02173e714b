//! Virtqueues: the device's side of the rings that a guest driver makes in its memory.
//!
//! [`split`] is the split ring (virtio 1.3, 2.7). Reading and writing chains share one walk, [`SplitRing::gather`], which
//! differs only in the [`Direction`] that the descriptors must have. Everything that the driver wrote is read once, into
//! a local, checked, and used from there; what cannot be is a [`RingFault`], and the ring is not touched again until the
//! driver resets it.

mod chain;
#[cfg(test)]
mod driver;
#[cfg(any(test, fuzzing))]
pub mod exercise;
mod fault;
pub mod split;
#[cfg(test)]
mod tests;

pub use chain::{Chain, Chains, Direction, Readable, Writable};
pub use fault::{RingError, RingFault};
pub use split::{RingConfig, SplitRing};
