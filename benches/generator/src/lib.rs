//! A load generator for vhost-user switches, and the side-by-side measurements that are made with it.
//!
//! testpmd's virtio-user NICs are the limit of a pair at 64 B: they touch every frame. A driver that only ever says "this
//! buffer again" spends a few cycles per frame, so the switch is the limit, whichever switch it is. [`ring`] is that
//! driver, [`nic`] a device of it, [`load`] the thread that keeps a number of them busy; [`switch`] starts Linecard, Open
//! vSwitch with DPDK, or testpmd's patch cable beside it, and [`measure`] takes turns with them.

pub mod bench;
pub mod cycles;
pub mod frames;
pub mod hugepages;
pub mod interrupt;
pub mod latency;
pub mod load;
pub mod measure;
pub mod memory;
pub mod nic;
pub mod report;
pub mod ring;
pub mod switch;
pub mod verify;
