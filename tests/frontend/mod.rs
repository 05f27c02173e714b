//! An in-process front end: what a VMM and the guest's virtio-net driver do, without QEMU and without root.
//!
//! | file | what it plays |
//! |---|---|
//! | [`ram`] | guest memory: memfd regions with guest-physical and VMM addresses |
//! | [`message`] | one vhost-user message on the wire, well formed or not |
//! | [`session`] | a connection: requests, replies, acknowledgements |
//! | [`vmm`] | the message orders of QEMU 7.2, QEMU 10, DPDK's virtio-user and cloud-hypervisor |
//! | [`ring`] | every field of a split virtqueue, for friend and foe |
//! | [`packed`] | those of a packed one, and where its driver stands |
//! | [`queue`] | the driver's books of one virtqueue on top of either |
//! | [`driver`] | the guest's virtio-net driver on top of that: transmit and receive queues |
//! | [`nic`] | all of that brought up in one call |
//! | [`random`] | repeatable random numbers |
//! | [`frame`] | Ethernet frames whose every byte can be checked |
//! | [`large`] | large frames of TCP and UDP, and their segments |
//! | [`witness`] | a healthy pair of NICs that must lose nothing while others misbehave |
//! | [`scene`] | a daemon, that pair, a guest that misbehaves and one on its network |
//! | [`child`] | child processes, and what they must not have |
//! | [`daemon`] | the `linecardd` under test: its files, its process, its API |
//! | [`footprint`] | what the daemon's process holds, and what of it must be gone |
//! | [`loopback`] | a reference back end over the virtio-queue crate, to prove this harness itself |
//!
//! The front end is strict: whatever a correct guest could not live with (a used entry for a buffer that was never
//! offered, a length beyond the buffer, half a frame, a lost interrupt) panics with a sentence. Waiting always has a
//! deadline, [`DEADLINE`], which is generous because it only bounds failures.

// Each integration test is a crate of its own and uses a part of this module; `pub` is for the siblings.
#![allow(dead_code, unreachable_pub)]
#![allow(clippy::unwrap_used)]

pub mod child;
pub mod daemon;
pub mod doorbell;
pub mod driver;
pub mod footprint;
pub mod frame;
pub mod large;
pub mod loopback;
pub mod message;
pub mod nic;
pub mod packed;
pub mod queue;
pub mod ram;
pub mod random;
pub mod ring;
pub mod scene;
pub mod session;
pub mod vmm;
pub mod witness;

use std::time::{Duration, Instant};

/// How long anything may take before a test gives up on it.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Polls `condition` until it gives a value, or panics with `what` after [`DEADLINE`].
#[track_caller]
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
