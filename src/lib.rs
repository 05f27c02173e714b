//! Linecard: a vhost-user switch for KVM/QEMU hosts. Every VM network interface is a port of it.
//!
//! The modules below stand in layers; each imports only from those above it, which `tests/layering.rs` checks.
//! ARCHITECTURE.md walks a frame through them.

pub mod clock;
pub mod ident;
pub mod limits;
pub mod log_queue;
pub mod printable;

pub mod wire;

pub mod mem;
pub mod ring;
pub mod sys;

pub mod frame;
pub mod stats;
pub mod verdict;

pub mod offload;

pub mod port;

pub mod switch;

pub mod shard;

pub mod config;

pub mod host;

pub mod control;

pub mod observe;

pub mod daemon;

pub mod cli;
