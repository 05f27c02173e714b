//! A loopback that does harm on purpose: [`Faulty`]. For tests of what must survive a bad network.
//!
//! Faults are counted, not drawn: every Nth frame has one, so a test knows how many there will be. Only where it hits
//! (which bit, what length) comes from a generator, and the same seed gives the same faults. One frame can have several.

use std::sync::{Arc, Mutex, PoisonError};

use super::loopback::Loop;
use super::store::FrameStore;
use super::{LinkState, Outcome, Port, Receive, Transmit};
use crate::frame::Batch;
use crate::verdict::DropReason;

/// Which faults a [`Faulty`] port injects; 0 means never, 1 means into each frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FaultyConfig {
    /// Every how many frames one is dropped, as [`DropReason::FaultInjected`].
    pub drop_every: u32,
    /// Every how many frames one loses bytes at its end; at least its first byte stays.
    pub truncate_every: u32,
    /// Every how many frames one comes back twice. The copy is left out when the queue is full.
    pub duplicate_every: u32,
    /// Every how many frames one comes back with one bit inverted.
    pub flip_every: u32,
    /// Start of the generator that says which bit and how many bytes.
    pub seed: u64,
}

/// A port that returns what is transmitted to it, with faults.
pub struct Faulty {
    queue: Arc<Loop>,
    side: Arc<FaultySide>,
}

impl Faulty {
    /// A port with an empty queue.
    pub fn new(config: FaultyConfig) -> Arc<Self> {
        let queue = Arc::new(Loop::default());
        let injector = Injector { config, random: Random(config.seed), frames: 0, faults: Faults::default() };
        let side = FaultySide { queue: queue.clone(), injector: Mutex::new(injector) };
        Arc::new(Self { queue, side: Arc::new(side) })
    }
}

impl Port for Faulty {
    fn receive_queues(&self) -> Vec<Arc<dyn Receive>> {
        vec![self.queue.clone()]
    }

    fn transmit_side(&self) -> Arc<dyn Transmit> {
        self.side.clone()
    }

    fn link(&self) -> LinkState {
        LinkState::Up
    }

    fn detail(&self) -> serde_json::Value {
        let mut detail = self.queue.detail();
        let faults = self.side.injector.lock().unwrap_or_else(PoisonError::into_inner).faults;
        detail["dropped-frames"] = faults.dropped.into();
        detail["truncated-frames"] = faults.truncated.into();
        detail["duplicated-frames"] = faults.duplicated.into();
        detail["flipped-frames"] = faults.flipped.into();
        detail
    }
}

/// The transmit side. Locks: the injector's, and inside it the queue's.
struct FaultySide {
    queue: Arc<Loop>,
    injector: Mutex<Injector>,
}

impl Transmit for FaultySide {
    fn transmit(&self, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        let mut injector = self.injector.lock().unwrap_or_else(PoisonError::into_inner);
        let mut refused = 0;
        self.queue.fill(|store| {
            for &index in picks {
                match injector.pass(store, batch, usize::from(index)) {
                    Ok(()) => outcome.deliver(index),
                    Err(reason) => {
                        refused += u64::from(reason == DropReason::RingFull);
                        outcome.refuse(index, reason);
                    }
                }
            }
        });
        self.queue.refuse(refused);
    }
}

/// What has been injected so far, in frames.
#[derive(Debug, Clone, Copy, Default)]
struct Faults {
    dropped: u64,
    truncated: u64,
    duplicated: u64,
    flipped: u64,
}

struct Injector {
    config: FaultyConfig,
    random: Random,
    frames: u64,
    faults: Faults,
}

impl Injector {
    /// Passes one frame on to `store`, with whatever faults are its turn.
    fn pass(&mut self, store: &mut FrameStore, batch: &Batch<'_>, index: usize) -> Result<(), DropReason> {
        self.frames += 1;
        let count = self.frames;
        let due = |every: u32| every != 0 && count.is_multiple_of(u64::from(every));
        if due(self.config.drop_every) {
            self.faults.dropped += 1;
            return Err(DropReason::FaultInjected);
        }
        let frame = store.push(batch, index).ok_or(DropReason::RingFull)?;
        let mut len = frame.len() as u64;
        if due(self.config.truncate_every) && len > 1 {
            len = 1 + self.random.below(len - 1);
            self.faults.truncated += 1;
        }
        if due(self.config.flip_every) && len > 0 {
            let bit = self.random.below(len * 8);
            frame[(bit / 8) as usize] ^= 1 << (bit % 8);
            self.faults.flipped += 1;
        }
        store.cut_last(len as u32);
        if due(self.config.duplicate_every) && store.repeat_last() {
            self.faults.duplicated += 1;
        }
        Ok(())
    }
}

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014): any seed will do.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0; so slightly uneven that no test of ours can see it.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::testing;

    /// Sends `count` frames of 100 equal bytes; returns what became of them and what came back.
    fn through(config: FaultyConfig, count: usize) -> (Outcome, Vec<Vec<u8>>, serde_json::Value) {
        let port = Faulty::new(config);
        let outcome = testing::transmit(&*port.transmit_side(), &vec![vec![0x55; 100]; count]);
        let got = testing::receive_all(&*port.receive_queues().remove(0));
        (outcome, got, port.detail())
    }

    #[test]
    fn without_faults_it_is_a_loopback() {
        let (outcome, got, _) = through(FaultyConfig::default(), 64);
        assert_eq!(outcome.delivered, u64::MAX);
        assert_eq!(got, vec![vec![0x55; 100]; 64]);
    }

    #[test]
    fn every_nth_frame_is_dropped_for_the_reason_that_says_so() {
        let (outcome, got, detail) = through(FaultyConfig { drop_every: 4, ..Default::default() }, 10);
        assert_eq!(outcome.delivered, 0b11_0111_0111);
        assert_eq!((outcome.reasons[3], outcome.reasons[7]), (DropReason::FaultInjected, DropReason::FaultInjected));
        assert_eq!((got.len(), &detail["dropped-frames"]), (8, &2.into()));
    }

    #[test]
    fn every_nth_frame_is_shorter_or_twice_or_has_one_bit_inverted() {
        let (_, got, _) = through(FaultyConfig { truncate_every: 2, ..Default::default() }, 4);
        assert!(got[0].len() == 100 && got[1].len() < 100 && got[2].len() == 100 && got[3].len() < 100);
        let (outcome, got, _) = through(FaultyConfig { duplicate_every: 3, ..Default::default() }, 6);
        assert_eq!((outcome.delivered, got.len()), (0b11_1111, 8));
        let (_, got, detail) = through(FaultyConfig { flip_every: 1, ..Default::default() }, 5);
        let wrong_bits = |frame: &Vec<u8>| frame.iter().map(|b| (b ^ 0x55).count_ones()).sum::<u32>();
        assert!(got.iter().all(|frame| frame.len() == 100 && wrong_bits(frame) == 1));
        assert_eq!(detail["flipped-frames"], 5);
    }

    #[test]
    fn the_same_seed_gives_the_same_faults_and_another_gives_others() {
        let config = FaultyConfig { drop_every: 7, truncate_every: 2, duplicate_every: 5, flip_every: 3, seed: 1 };
        assert_eq!(through(config, 60).1, through(config, 60).1);
        assert_ne!(through(config, 60).1, through(FaultyConfig { seed: 2, ..config }, 60).1);
    }
}
