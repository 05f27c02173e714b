//! A port that does not return from one of its calls until it is let: what no kind should be, for tests.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::frame::{Batch, Heads, Needs};
use crate::ident::LatencySensitivity;
use crate::mem::NodePages;
use crate::port::null::Null;
use crate::port::{Handover, LinkState, Notifications, Port, Receive, Received, Transmit, Wake};

/// What keeps ports.
#[derive(Default)]
pub(crate) struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Lets all calls return, now and from now on.
    pub(crate) fn open(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(open, |open| !*open));
    }
}

/// The port.
pub(crate) struct Stuck {
    /// The call that does not return.
    pub(crate) call: &'static str,
    pub(crate) gate: Arc<Gate>,
    pub(crate) link: LinkState,
    pub(crate) handover: Handover,
    null: Arc<Null>,
}

impl Stuck {
    pub(crate) fn new(call: &'static str, gate: &Arc<Gate>) -> Self {
        Self { call, gate: Arc::clone(gate), link: LinkState::Up, handover: Handover::default(), null: Null::new() }
    }

    fn in_call(&self, call: &str) {
        if call == self.call {
            self.gate.pass();
        }
    }
}

impl Port for Stuck {
    fn receive_queues(&self) -> Vec<Arc<dyn Receive>> {
        self.in_call("receive_queues");
        let gate = Arc::clone(&self.gate);
        if self.call == "receive" { vec![Arc::new(Queue(gate))] } else { self.null.receive_queues() }
    }

    fn transmit_side(&self) -> Arc<dyn Transmit> {
        self.in_call("transmit_side");
        self.null.transmit_side()
    }

    fn link(&self) -> LinkState {
        self.in_call("link");
        self.link.clone()
    }

    fn set_mtu(&self, _mtu: Option<u16>) {
        self.in_call("set_mtu");
    }

    fn set_latency(&self, _latency: LatencySensitivity) {
        self.in_call("set_latency");
    }

    fn notifications(&self) -> Vec<Notifications> {
        self.in_call("notifications");
        Vec::new()
    }

    fn handover(&self) -> Handover {
        self.handover
    }

    fn memory_nodes(&self) -> Option<NodePages> {
        self.in_call("memory_nodes");
        None
    }

    fn set_offloads(&self, _offloads: Needs) {
        self.in_call("set_offloads");
    }

    fn detail(&self) -> serde_json::Value {
        self.in_call("detail");
        self.null.detail()
    }
}

/// A queue of it that whoever receives does not come back from, as from memory that a front end punches holes into.
struct Queue(Arc<Gate>);

impl Receive for Queue {
    fn receive(&self, _heads: &mut Heads, _process: &mut dyn FnMut(&mut Batch<'_>)) -> Received {
        self.0.pass();
        Received::Nothing
    }

    fn arm(&self) -> bool {
        true
    }

    fn disarm(&self) {}

    fn attach(&self, _wake: Option<Arc<dyn Wake>>) {}
}

impl Drop for Stuck {
    fn drop(&mut self) {
        self.in_call("drop");
    }
}
