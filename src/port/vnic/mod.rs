//! A vNIC: a port whose far end is a VM's virtio-net device over vhost-user.
//!
//! The control side: the [`Acceptor`]'s one thread gets connections for all ports in server mode (`endpoint` makes their socket
//! files), a `dialler` those of one port in client mode; `attachment` takes one on at a time and gives it a thread, on which
//! `session` reads messages and `handler` turns them into calls of `device` (features, memory) and its `vring`s. The data side is the `queue` of each ring, which shards
//! run through `receive` and `transmit`. A [`Vnic`] outlives its connections: queues stay, rings come and go.
//!
//! Two threads meet only in a `queue`, under its lock: a session starts, stops and changes rings there, shards move
//! frames. Whatever a front end does wrong ends at most its connection; whatever a guest does wrong, at most its ring.

mod acceptor;
mod attachment;
mod attendance;
mod device;
mod dialler;
mod endpoint;
#[cfg(any(test, fuzzing))]
pub mod exercise;
mod features;
mod handler;
mod kick;
mod message;
mod moderation;
mod nic;
mod offence;
mod queue;
mod receive;
mod refusal;
pub mod relay;
mod ring_records;
mod session;
mod steering;
mod transmit;
mod view;
mod vring;

use std::io;
use std::sync::Arc;

use serde_json::{Value, json};

pub use acceptor::Acceptor;
pub use endpoint::EndpointError;
pub use nic::{Mode, VnicConfig};
pub use ring_records::sweep_records;

use acceptor::Registration;
use attachment::Attachment;
use nic::Nic;
use receive::ReceiveQueue;
use steering::Steering;
use transmit::TransmitSide;

use crate::frame::Needs;
use crate::ident::LatencySensitivity;
use crate::limits::QUEUE_PAIRS;
use crate::mem::NodePages;
use crate::port::{Conduct, LinkState, Notifications, Port, Receive, Transmit};
use crate::sys::socket_file::SocketFile;

/// Why a vNIC cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VnicError {
    /// No queue pairs, or more than a front end can address.
    #[error("{0} queue pairs: a vNIC has 1 to {QUEUE_PAIRS}")]
    QueuePairs(u16),
    /// Its socket cannot be made.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The process has run out of something, in practice of file descriptors.
    #[error("no resources for a vNIC (see `ulimit -n`)")]
    Resources(#[from] io::Error),
}

/// A port for a VM's network interface.
pub struct Vnic {
    attachment: Arc<Attachment>,
    receive: Vec<Arc<ReceiveQueue>>,
    transmit: Arc<TransmitSide>,
    registration: Option<Registration>,
    _file: Option<SocketFile>,
}

impl Vnic {
    /// Makes the port. In server mode its socket accepts from now on; in client mode it looks for the VM's.
    ///
    /// # Errors
    /// The socket cannot be made, or the process has run out of descriptors.
    pub fn new(config: VnicConfig, acceptor: &Acceptor) -> Result<Arc<Self>, VnicError> {
        if config.queue_pairs == 0 || usize::from(config.queue_pairs) > QUEUE_PAIRS {
            return Err(VnicError::QueuePairs(config.queue_pairs));
        }
        let waiting = format!("waiting for the VM at {}", config.socket.display());
        let nic = Arc::new(Nic::new(config)?);
        let steering = Arc::new(Steering::new(nic.config.queue_pairs));
        let numbered = (0..nic.config.queue_pairs).zip(nic.queues.iter().skip(1).step_by(2));
        let receive = |(number, queue)| Arc::new(ReceiveQueue::new(Arc::clone(queue), number, Arc::clone(&steering)));
        let receive = numbered.map(receive).collect();
        let rings = nic.queues.iter().step_by(2).map(Arc::clone).collect();
        let transmit = Arc::new(TransmitSide::new(rings, Arc::clone(&steering)));
        let attachment = Arc::new(Attachment::new(Arc::clone(&nic), waiting));
        let (registration, file) = match nic.config.mode {
            Mode::Server => {
                let (listener, file) = endpoint::listen(&nic.config)?;
                (acceptor.listen(listener, Arc::clone(&attachment))?, Some(file))
            }
            Mode::Client => (acceptor.dial(Arc::clone(&attachment))?, None),
        };
        Ok(Arc::new(Self { attachment, receive, transmit, registration: Some(registration), _file: file }))
    }
}

impl Drop for Vnic {
    fn drop(&mut self) {
        // First nobody new comes in, then who is there goes; the socket file goes last, with its field.
        self.registration = None;
        self.attachment.close();
    }
}

impl Port for Vnic {
    fn receive_queues(&self) -> Vec<Arc<dyn Receive>> {
        self.receive.iter().map(|queue| Arc::clone(queue) as Arc<dyn Receive>).collect()
    }

    fn transmit_side(&self) -> Arc<dyn Transmit> {
        Arc::clone(&self.transmit) as Arc<dyn Transmit>
    }

    fn link(&self) -> LinkState {
        self.attachment.link()
    }

    fn set_offloads(&self, offloads: Needs) {
        self.attachment.nic().queues.iter().for_each(|queue| queue.set_offloads(offloads));
    }

    fn set_latency(&self, latency: LatencySensitivity) {
        self.attachment.nic().set_latency(latency);
    }

    fn set_mtu(&self, mtu: Option<u16>) {
        self.attachment.nic().set_mtu(mtu);
    }

    fn memory_nodes(&self) -> Option<NodePages> {
        self.attachment.memory_nodes()
    }

    fn notifications(&self) -> Vec<Notifications> {
        self.attachment.nic().queues.iter().map(|queue| queue.report().notifications).collect()
    }

    fn conduct(&self) -> Conduct {
        self.attachment.nic().docket.conduct()
    }

    fn detail(&self) -> Value {
        let nic = self.attachment.nic();
        let (mut detail, mut vrings) = self.attachment.report();
        vrings.resize(nic.queues.len(), json!({ "started": false, "enabled": false }));
        let queues: Vec<Value> = vrings.into_iter().enumerate().map(|(i, vring)| queue_detail(nic, i, vring)).collect();
        detail["socket"] = json!(nic.config.socket.display().to_string());
        detail["mode"] = json!(nic.config.mode);
        detail["mac"] = json!(nic.config.mac);
        detail["ring_records"] = json!(nic.records.report());
        detail["mtu"] = json!(nic.mtu());
        let conduct = nic.docket.conduct();
        detail["held_up"] = json!(conduct.held_up);
        detail["barred"] = json!(conduct.barred);
        detail["offered"] = json!({
            "features": format!("{:#x}", features::offered(nic.config.compat)),
            "protocol_features": format!("{:#x}", features::offered_protocol(nic.config.compat)),
        });
        detail["queues"] = Value::Array(queues);
        detail
    }
}

/// One ring of `linecard port show`: what the data path counts, under what the front end has set.
fn queue_detail(nic: &Nic, index: usize, vring: Value) -> Value {
    let direction = if index.is_multiple_of(2) { "guest-rx" } else { "guest-tx" };
    let mut detail = json!({ "index": index, "pair": index / 2, "direction": direction });
    let counted = serde_json::to_value(nic.queues[index].report()).unwrap_or_default();
    for part in [counted, vring] {
        if let (Value::Object(to), Value::Object(from)) = (&mut detail, part) {
            to.extend(from);
        }
    }
    detail
}

#[cfg(test)]
mod tests;
