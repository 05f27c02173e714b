//! A stand-in for the transmit side of a vNIC.
use std::sync::Arc;

use super::queue::Queue;
use crate::frame::Batch;
use crate::port::{Outcome, Transmit};
use crate::verdict::DropReason;

pub(super) struct TransmitSide {
    _queues: Vec<Arc<Queue>>,
}

impl TransmitSide {
    pub(super) fn new(queues: Vec<Arc<Queue>>) -> Self {
        Self { _queues: queues }
    }
}

impl Transmit for TransmitSide {
    fn transmit(&self, _batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        outcome.refuse_all(picks, DropReason::LinkDown);
    }
}
