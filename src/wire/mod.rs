//! Bytes to headers and back. Pure: no I/O, no allocation, no `unsafe`.
//!
//! A view is made by a checked constructor; its getters cannot fail afterwards. No bytes whatsoever make a parser panic:
//! what does not fit is an error of the constructor. Field offsets are named, each with its place in the standard.

pub mod checksum;
pub mod ethernet;
pub mod flow;
pub mod ip;
pub mod rarp;
pub mod virtio_net;
