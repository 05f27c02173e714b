//! A stand-in for the receive side of a vNIC's queue pair.
use std::sync::Arc;

use super::queue::Queue;
use crate::frame::{Batch, Heads};
use crate::port::{Receive, Received, Wake};

pub(super) struct ReceiveQueue {
    _queue: Arc<Queue>,
}

impl ReceiveQueue {
    pub(super) fn new(queue: Arc<Queue>, _number: u16) -> Self {
        Self { _queue: queue }
    }
}

impl Receive for ReceiveQueue {
    fn receive(&self, _heads: &mut Heads, _process: &mut dyn FnMut(&mut Batch<'_>)) -> Received {
        Received::Nothing
    }
    fn arm(&self) -> bool {
        true
    }
    fn disarm(&self) {}
    fn attach(&self, _wake: Option<Arc<dyn Wake>>) {}
}
