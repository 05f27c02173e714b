//! A port that receives what was transmitted to it: [`Loopback`], and the queue that it and `faulty` stand on, [`Loop`].
//!
//! The whole seam on one page: what a shard transmits is copied into the store that is filling; a shard that receives
//! drains the other store and swaps the two when its own is used up. So the two directions have a lock each, as
//! [`super`] wants it (one shard may receive from port A and transmit to B while another does the reverse), they share
//! only the swap, and a frame is lent from where it was copied to.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::store::FrameStore;
use super::{LinkState, Outcome, Port, Receive, Received, Transmit, Wake};
use crate::frame::{Batch, Heads};
use crate::limits::{BATCH_FRAMES, LOOPBACK_BYTES, LOOPBACK_FRAMES};
use crate::verdict::DropReason;

/// A port that is its own far end.
pub struct Loopback(Arc<Loop>);

impl Loopback {
    /// A port with an empty queue.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Arc::default()))
    }
}

impl Port for Loopback {
    fn receive_queues(&self) -> Vec<Arc<dyn Receive>> {
        vec![self.0.clone()]
    }

    fn transmit_side(&self) -> Arc<dyn Transmit> {
        self.0.clone()
    }

    fn link(&self) -> LinkState {
        LinkState::Up
    }

    fn detail(&self) -> serde_json::Value {
        self.0.detail()
    }
}

/// A bounded queue of frames from the transmit side back to the receive side.
pub(super) struct Loop {
    filling: Mutex<Filling>,
    draining: Mutex<FrameStore>,
    returned: AtomicU64,
    refused: AtomicU64,
}

/// The transmit side: what arrived, and whom to tell.
struct Filling {
    store: FrameStore,
    armed: bool,
    wake: Option<Arc<dyn Wake>>,
}

impl Default for Loop {
    fn default() -> Self {
        let store = || FrameStore::with_capacity(LOOPBACK_FRAMES, LOOPBACK_BYTES);
        Self {
            filling: Mutex::new(Filling { store: store(), armed: false, wake: None }),
            draining: Mutex::new(store()),
            returned: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }
}

impl Loop {
    /// Lets `fill` add frames to the queue, and wakes the receiving shard if it rests. The wake is under the lock, so
    /// that a shard which gave the queue away is not woken afterwards.
    pub(super) fn fill(&self, fill: impl FnOnce(&mut FrameStore)) {
        let mut filling = self.filling();
        let before = filling.store.len();
        fill(&mut filling.store);
        if filling.armed
            && filling.store.len() > before
            && let Some(wake) = &filling.wake
        {
            wake.wake();
        }
    }

    /// Counts `frames` copies that did not fit.
    pub(super) fn refuse(&self, frames: u64) {
        self.refused.fetch_add(frames, Ordering::Relaxed);
    }

    /// What there is to tell of the queue.
    pub(super) fn detail(&self) -> serde_json::Value {
        let waiting = self.filling().store.pending() + self.draining().pending();
        serde_json::json!({
            "waiting-frames": waiting,
            "returned-frames": self.returned.load(Ordering::Relaxed),
            "refused-frames": self.refused.load(Ordering::Relaxed),
        })
    }

    fn filling(&self) -> MutexGuard<'_, Filling> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draining(&self) -> MutexGuard<'_, FrameStore> {
        self.draining.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transmit for Loop {
    fn transmit(&self, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        let mut refused = 0;
        self.fill(|store| {
            for &index in picks {
                if store.push(batch, usize::from(index)).is_some() {
                    outcome.deliver(index);
                } else {
                    outcome.refuse(index, DropReason::RingFull);
                    refused += 1;
                }
            }
        });
        self.refuse(refused);
    }
}

impl Receive for Loop {
    fn receive(&self, heads: &mut Heads, process: &mut dyn FnMut(&mut Batch<'_>)) -> Received {
        let mut draining = self.draining();
        if draining.pending() == 0 {
            draining.clear();
            std::mem::swap(&mut *draining, &mut self.filling().store);
        }
        let mut batch = draining.lend(BATCH_FRAMES, heads);
        if batch.is_empty() {
            return Received::Nothing;
        }
        let frames = batch.len();
        process(&mut batch);
        let (dealt_with, flooding) = (batch.dealt_with(), batch.flooding());
        drop(batch);
        draining.keep(frames, dealt_with, flooding);
        self.returned.fetch_add(dealt_with as u64, Ordering::Relaxed);
        Received::Frames(dealt_with)
    }

    fn arm(&self) -> bool {
        let drained = self.draining().pending() == 0;
        let mut filling = self.filling();
        filling.armed = true;
        drained && filling.store.pending() == 0
    }

    fn disarm(&self) {
        self.filling().armed = false;
    }

    fn attach(&self, wake: Option<Arc<dyn Wake>>) {
        let mut filling = self.filling();
        filling.wake = wake;
        // What came in while nobody was attached woke nobody.
        if let Some(wake) = &filling.wake {
            wake.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::testing::{self, Shard};

    #[test]
    fn what_is_transmitted_is_received_again_in_order() {
        let port = Loopback::new();
        let frames: Vec<Vec<u8>> = (0..64u8).map(|i| vec![i; 14 + usize::from(i) * 37]).collect();
        let (queue, side) = (port.receive_queues().remove(0), port.transmit_side());
        for _ in 0..3 {
            assert_eq!(testing::transmit(&*side, &frames).delivered, u64::MAX);
        }
        assert_eq!(testing::receive_all(&*queue), [&frames[..], &frames, &frames].concat());
        assert_eq!(testing::receive_all(&*queue), [] as [Vec<u8>; 0]);
    }

    #[test]
    fn a_full_queue_refuses_and_every_frame_has_an_end() {
        let port = Loopback::new();
        let (queue, side) = (port.receive_queues().remove(0), port.transmit_side());
        let frames = vec![vec![1; 1514]; 64];
        let (mut delivered, mut refused) = (0, 0);
        for _ in 0..40 {
            let outcome = testing::transmit(&*side, &frames);
            delivered += outcome.delivered.count_ones() as usize;
            refused += outcome.reasons.iter().filter(|&&reason| reason == DropReason::RingFull).count();
        }
        assert_eq!((delivered + refused, delivered), (40 * 64, LOOPBACK_FRAMES));
        assert_eq!(testing::receive_all(&*queue).len(), delivered);
        assert_eq!(testing::transmit(&*side, &frames).delivered, u64::MAX, "room again");
        let expected = serde_json::json!({ "waiting-frames": 64, "returned-frames": 1024, "refused-frames": refused });
        assert_eq!(port.detail(), expected);
    }

    #[test]
    fn the_shard_that_has_the_queue_is_woken_when_it_rests_and_no_other() {
        let port = Loopback::new();
        let (queue, side) = (port.receive_queues().remove(0), port.transmit_side());
        let (old, new) = (Shard::new(), Shard::new());
        let frame = [vec![3; 60]];
        queue.attach(Some(old.clone()));
        assert_eq!(old.wakes(), 1, "a look at what came before");
        testing::transmit(&*side, &frame);
        assert_eq!(old.wakes(), 0, "it polls");
        assert!(!queue.arm(), "a frame waits already");
        queue.disarm();
        assert_eq!(testing::receive_all(&*queue).len(), 1);
        assert!(queue.arm());
        testing::transmit(&*side, &frame);
        assert_eq!(old.wakes(), 1);
        queue.disarm();
        testing::transmit(&*side, &frame);
        assert_eq!(old.wakes(), 0);
        queue.attach(Some(new.clone()));
        assert!(new.wakes() == 1 && !queue.arm());
        testing::transmit(&*side, &frame);
        assert_eq!((old.wakes(), new.wakes()), (0, 1));
        queue.attach(None);
        testing::transmit(&*side, &frame);
        assert_eq!((old.wakes(), new.wakes()), (0, 0));
        assert_eq!(testing::receive_all(&*queue).len(), 4);
    }

    #[test]
    fn two_shards_that_forward_to_each_other_do_not_block() {
        let (a, b) = (Loopback::new(), Loopback::new());
        testing::transmit(&*a.transmit_side(), &vec![vec![1; 60]; 64]);
        testing::transmit(&*b.transmit_side(), &vec![vec![2; 60]; 64]);
        let forward = |from: &Loopback, to: &Loopback| {
            let (queue, side) = (from.receive_queues().remove(0), to.transmit_side());
            let (mut heads, picks) = (crate::frame::heads(), (0..64).collect::<Vec<u8>>());
            for _ in 0..2000 {
                queue.receive(&mut heads, &mut |batch| {
                    side.transmit(batch, &picks[..batch.len()], &mut Outcome::new());
                });
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| forward(&a, &b));
            forward(&b, &a);
        });
        let left = |port: &Loopback| testing::receive_all(&*port.receive_queues().remove(0)).len();
        assert_eq!(left(&a) + left(&b), 128);
    }
}
