//! Offloads (virtio 1.3, 5.1.6.2): what a sender may leave to the switch, and what the switch does for a receiver.
//!
//! A guest may send a frame whose checksum is not complete, or 64 KiB of TCP or UDP payload behind one set of headers.
//! [`admit()`] checks what its virtio-net header says, against the frame and against what was negotiated, and adds the frame
//! to the batch with a header that is true and the [`crate::frame::Needs`] that a receiver must meet. A receiver that meets
//! them gets the frame as it is, with no more work than any other frame. For one that does not, [`Rewrite`] makes complete
//! frames of it while it is copied; and a receiver that takes several TCP segments in one frame may be given those so that
//! came one by one ([`Merger`]). Who gets what is decided per receiver, so a flood costs only those what they lack.
//!
//! No offload ever depends on where a frame goes, so what is offered to a guest is the same on every host.

mod admit;
#[cfg(any(test, fuzzing))]
pub mod exercise;
mod gro;
mod layout;
mod rewrite;
mod segment;
#[cfg(test)]
pub(crate) mod sketch;
#[cfg(test)]
mod tests;

pub use admit::admit;
pub use gro::{Group, Merge, Merger};
pub use rewrite::Rewrite;
