//! Storm control: how many frames in a second one port may have flooded, by class ([`Storm`]).
//!
//! A flooded frame costs every other guest of the network a buffer and perhaps an interrupt, and it is its sender alone who
//! decides how many there are. So each class of them has a token bucket per port, shared by all shards that serve the port's
//! queues. What comes beyond the bucket is dropped as [`crate::verdict::DropReason::StormLimited`], at the sender.
//!
//! A bucket is one word, the tick of its last change and what was left then, and changes by compare-and-swap: the bound holds
//! however many shards take from it. It is looked at only for frames that are to be flooded, and only read while it is empty,
//! which is when there are many. Time is the switch's own, in tenths of a second, so what a port may send comes in portions of a
//! tenth of a second's worth. A bucket holds what may come at once ([`burst`]): what a sender within its bound has in its ring when
//! the switch, or the host, stood still for a moment.
//!
//! Frames are counted as they would be on a wire: one that is to be segmented counts as its segments, and goes through whole
//! if anything is left; what that overdraws is made good before the next one.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::clock::Tick;
use crate::ident::MacAddr;
use crate::limits::{STORM_BURST_MIN, STORM_BURST_RING};

/// Why a frame is flooded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StormClass {
    /// It is for everybody.
    Broadcast,
    /// It is for a group, and who is in it is not known.
    Multicast,
    /// It is for a station of which nobody knows where it is.
    UnknownUnicast,
}

impl StormClass {
    /// Every class, in the order of the counters.
    pub const ALL: [Self; 3] = [Self::Broadcast, Self::Multicast, Self::UnknownUnicast];

    /// The class's name in the configuration, counters and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Broadcast => "broadcast",
            Self::Multicast => "multicast",
            Self::UnknownUnicast => "unknown-unicast",
        }
    }

    /// The class of a flooded frame to `destination`.
    pub(super) fn of(destination: MacAddr) -> Self {
        if destination == MacAddr::BROADCAST {
            Self::Broadcast
        } else if destination.is_group() {
            Self::Multicast
        } else {
            Self::UnknownUnicast
        }
    }
}

/// Frames of one port that may be flooded in a second, by class in the order of [`StormClass::ALL`]; `None`: any number.
pub type StormRates = [Option<u32>; 3];

/// Storm control of one port. It lives as long as the port has its number, whatever tables name it.
#[derive(Debug)]
pub struct Storm([Class; 3]);

/// One class of it.
#[derive(Debug)]
struct Class {
    rate: AtomicU32,
    bucket: AtomicU64,
    refused: AtomicU64,
}

/// In [`Class::rate`]: as many as come.
const UNLIMITED: u32 = u32::MAX;

/// Buckets count tenths of frames, because a tick adds a tenth of a second's worth.
const FRAME: i64 = 10;

impl Default for Storm {
    /// Storm control that lets everything through.
    fn default() -> Self {
        // Full, whatever the rate will be, and as of the first tick there is.
        let full = Level { tick: Tick(0), left: i32::MAX };
        Self([(); 3].map(|()| Class { rate: UNLIMITED.into(), bucket: full.word().into(), refused: 0.into() }))
    }
}

impl Storm {
    /// Takes over what may be flooded in a second, from now on.
    pub fn set(&self, rates: StormRates) {
        for (class, rate) in self.0.iter().zip(rates) {
            class.rate.store(rate.unwrap_or(UNLIMITED), Ordering::Relaxed);
        }
    }

    /// What may be flooded in a second.
    pub fn rates(&self) -> StormRates {
        let rate = |class: usize| Some(self.0[class].rate.load(Ordering::Relaxed)).filter(|&rate| rate != UNLIMITED);
        [0, 1, 2].map(rate)
    }

    /// How many frames were dropped, by class in the order of [`StormClass::ALL`].
    pub fn refused(&self) -> [u64; 3] {
        [0, 1, 2].map(|class: usize| self.0[class].refused.load(Ordering::Relaxed))
    }

    /// Whether another frame of `class` may be flooded.
    pub(super) fn has_room(&self, class: StormClass, now: Tick) -> bool {
        self.0[class as usize].has_room(now)
    }

    /// Notes that `frames` of `class` are flooded; `false` if they may not be.
    pub(super) fn take(&self, class: StormClass, frames: u32, now: Tick) -> bool {
        self.0[class as usize].take(frames, now)
    }

    /// Counts frames that were dropped, by class in the order of [`StormClass::ALL`].
    pub(super) fn note_refused(&self, refused: [u64; 3]) {
        for (class, refused) in self.0.iter().zip(refused).filter(|(_, refused)| *refused > 0) {
            class.refused.fetch_add(refused, Ordering::Relaxed);
        }
    }
}

impl Class {
    /// Whether the bucket is not empty.
    fn has_room(&self, now: Tick) -> bool {
        let rate = self.rate.load(Ordering::Relaxed);
        rate == UNLIMITED || Level::of(self.bucket.load(Ordering::Relaxed)).at(now, rate).is_enough()
    }

    /// Takes `frames` out of the bucket; `false` if it is empty.
    fn take(&self, frames: u32, now: Tick) -> bool {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == UNLIMITED {
            return true;
        }
        // The bucket is a number that nothing else hangs on, so no order has to be kept.
        let taken = self.bucket.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            let level = Level::of(word).at(now, rate);
            level.is_enough().then(|| level.less(frames).word())
        });
        taken.is_ok()
    }
}

/// What a bucket holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Level {
    /// Up to when it was filled.
    tick: Tick,
    /// Tenths of frames; below zero what was overdrawn.
    left: i32,
}

impl Level {
    fn of(word: u64) -> Self {
        Self { tick: Tick((word >> 32) as u32), left: word as u32 as i32 }
    }

    fn word(self) -> u64 {
        u64::from(self.tick.0) << 32 | u64::from(self.left as u32)
    }

    /// What it holds at `now`, filled at `rate` frames in a second. Another shard may have been ahead of this one's clock.
    fn at(self, now: Tick, rate: u32) -> Self {
        let passed = i64::from(now.0.wrapping_sub(self.tick.0) as i32).max(0);
        let left = (i64::from(self.left) + passed * i64::from(rate)).min(burst(rate));
        Self { tick: if passed > 0 { now } else { self.tick }, left: narrow(left) }
    }

    /// Whether there is a frame left.
    fn is_enough(self) -> bool {
        i64::from(self.left) >= FRAME
    }

    fn less(self, frames: u32) -> Self {
        Self { left: narrow(i64::from(self.left) - i64::from(frames) * FRAME), ..self }
    }
}

/// Most that a bucket holds, in tenths of frames: a second's worth up to a ring's, or a quarter of a second's or what a guest sends
/// at once when it boots if that is more. Nothing at all where nothing is to be flooded.
fn burst(rate: u32) -> i64 {
    if rate == 0 {
        return 0;
    }
    let most = rate.clamp(STORM_BURST_MIN, STORM_BURST_RING);
    (i64::from(rate) * FRAME / 4).max(i64::from(most) * FRAME)
}

/// `number` in as many bits as a bucket has for it.
fn narrow(number: i64) -> i32 {
    number.clamp(i32::MIN.into(), i32::MAX.into()) as i32
}

#[cfg(test)]
mod tests;
