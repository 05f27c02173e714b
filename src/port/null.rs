//! A port that swallows all it is given and never sends: [`Null`]. The smallest implementation of the port seam.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{LinkState, Outcome, Port, Receive, Transmit};
use crate::frame::Batch;

/// A port whose far end is nowhere.
pub struct Null(Arc<Sink>);

impl Null {
    /// A port that has swallowed nothing yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Arc::default()))
    }
}

impl Port for Null {
    /// None: a port that never sends needs no queue to be polled.
    fn receive_queues(&self) -> Vec<Arc<dyn Receive>> {
        Vec::new()
    }

    fn transmit_side(&self) -> Arc<dyn Transmit> {
        self.0.clone()
    }

    fn link(&self) -> LinkState {
        LinkState::Up
    }

    fn detail(&self) -> serde_json::Value {
        serde_json::json!({ "swallowed-frames": self.0.frames() })
    }
}

/// Takes every frame and counts it.
#[derive(Debug, Default)]
pub(super) struct Sink(AtomicU64);

impl Sink {
    /// Frames taken so far.
    pub(super) fn frames(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Transmit for Sink {
    fn transmit(&self, _batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        for &index in picks {
            outcome.deliver(index);
        }
        self.0.fetch_add(picks.len() as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::testing;

    #[test]
    fn every_picked_frame_is_delivered_and_counted() {
        let port = Null::new();
        assert!(port.receive_queues().is_empty());
        let frames = vec![vec![7; 60]; 3];
        let mut outcome = Outcome::new();
        testing::with_batch(&frames, |batch| port.transmit_side().transmit(batch, &[0, 2], &mut outcome));
        assert_eq!(outcome.delivered, 0b101);
        assert_eq!(port.detail()["swallowed-frames"], 2);
    }
}
