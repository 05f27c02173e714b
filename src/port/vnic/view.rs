//! What is told of a connection to whoever asks: [`DeviceView`], a copy of what its device was when the session last let go of
//! it. The session publishes one after each message; nobody who asks waits for a message, a front end or a guest.
//!
//! What shards change, whether a ring runs and why it stopped, comes from the queues themselves, which tell without their lock.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::features;
use super::queue::Queue;
use crate::mem::NodePages;
use crate::port::LinkState;

/// What the messages so far have made of a device.
#[derive(Debug, Default)]
pub(super) struct DeviceView {
    /// Why everything was stopped, if it was.
    pub(super) stopped: Option<&'static str>,
    /// What was refused last, of that which keeps rings from starting.
    pub(super) obstacle: Option<String>,
    /// Acknowledged virtio bits.
    pub(super) features: u64,
    /// Acknowledged bits of the protocol.
    pub(super) protocol: u64,
    pub(super) mtu: Option<u16>,
    /// What is written to the guest's memory is noted.
    pub(super) migrating: bool,
    pub(super) regions: usize,
    pub(super) bytes: u64,
    /// What became of pinning the memory, if it was tried.
    pub(super) pinned: Option<&'static str>,
    /// How many queue pairs the VM would have, if it has enabled one that the port does not have.
    pub(super) pairs_wanted: Option<u32>,
    pub(super) rings: Vec<VringView>,
}

/// The control state of one ring.
#[derive(Debug, Clone, Copy)]
pub(super) struct VringView {
    pub(super) enabled: bool,
    pub(super) size: u16,
    /// It was started by this front end, so that a fault of the queue is this front end's.
    pub(super) was_started: bool,
    /// It has run since the front end connected.
    pub(super) has_run: bool,
    /// The front end has said all that there is to say of it, and it does not run.
    pub(super) waits: bool,
    /// What is wrong with where it was started, if that makes no sense.
    pub(super) doubt: Option<&'static str>,
}

impl VringView {
    fn is_running(self, queue: &Queue) -> bool {
        self.was_started && queue.is_running()
    }

    /// What is wrong with where it goes on, while it runs.
    fn doubted(self, queue: &Queue) -> Option<&'static str> {
        self.doubt.filter(|_| self.is_running(queue))
    }

    /// Why the ring stopped by itself, until it is started anew.
    fn fault(self, queue: &Queue) -> Option<String> {
        queue.fault().filter(|_| self.was_started).map(|fault| fault.to_string())
    }
}

impl DeviceView {
    /// Whether frames flow, and if not, why. `queues` are the port's.
    pub(super) fn link(&self, queues: &[Arc<Queue>]) -> LinkState {
        if let Some(lost) = self.stopped {
            return LinkState::Stopped(lost.into());
        }
        let rings = || self.rings.iter().zip(queues);
        if let Some((index, fault)) =
            rings().enumerate().find_map(|(index, (ring, queue))| Some((index, ring.fault(queue)?)))
        {
            let cure = "its guest must reset the device, or the VM reconnect";
            return LinkState::Stopped(format!("ring {index} stopped: {fault}; {cure}"));
        }
        if rings().any(|(ring, queue)| ring.enabled && ring.is_running(queue)) {
            let doubted = rings().map(|(ring, queue)| ring.doubted(queue)).enumerate();
            let doubt = doubted.filter_map(|(index, doubt)| Some(format!("ring {index}: {}", doubt?))).next();
            let surplus = self.pairs_wanted.map(|wanted| surplus(wanted, queues.len() / 2));
            return surplus.or(doubt).map_or(LinkState::Up, LinkState::Impaired);
        }
        match &self.obstacle {
            Some(obstacle) => LinkState::Stopped(format!("{obstacle}; the VM has to be set up anew")),
            None => LinkState::Down(self.idle().into()),
        }
    }

    /// Why no ring runs, though nothing was refused.
    fn idle(&self) -> &'static str {
        match () {
            () if self.regions == 0 && self.rings.iter().any(|ring| ring.waits) => {
                "the VM does not share its memory: give it a memory backend with share=on"
            }
            () if self.rings.iter().any(|ring| ring.has_run) => {
                "the VM has stopped its network device: it is paused, restarts, has moved away, or its link is off"
            }
            () => "the guest has not started its network device, or its VMM holds its link off",
        }
    }

    /// The device's part of `linecard port show`; its memory lies on `nodes`.
    pub(super) fn report(&self, nodes: &NodePages) -> Value {
        // One node says it all; several are told with their shares.
        let spread: BTreeMap<u16, u64> = nodes.percent().collect();
        let spread = Some(spread).filter(|spread| spread.len() > 1);
        json!({
            "features": features::names(features::VIRTIO, self.features),
            "protocol_features": features::names(features::PROTOCOL, self.protocol),
            "header_bytes": features::header_bytes(self.features),
            "guest_mtu": self.mtu,
            "migrating": self.migrating,
            "memory": {
                "regions": self.regions,
                "bytes": self.bytes,
                "pinned": self.pinned,
                "numa_node": nodes.node(),
                "percent_on_node": spread,
            },
            "last_refusal": self.obstacle,
        })
    }

    /// What `linecard port show` says of every ring, by index.
    pub(super) fn ring_reports(&self, queues: &[Arc<Queue>]) -> Vec<Value> {
        let report = |(ring, queue): (&VringView, &Arc<Queue>)| {
            json!({
                "started": ring.is_running(queue),
                "enabled": ring.enabled,
                "size": ring.size,
                "fault": ring.fault(queue),
                "doubt": ring.doubted(queue),
            })
        };
        self.rings.iter().zip(queues).map(report).collect()
    }
}

/// What a VM loses that uses `wanted` queue pairs of a port that has `pairs`.
fn surplus(wanted: u32, pairs: usize) -> String {
    format!(
        "the VM uses {wanted} queue pairs and the port has {pairs}: what its guest sends on the others is lost; set `queues: {wanted}` \
         of the port, or `ethtool -L DEV combined {pairs}` in the guest"
    )
}
