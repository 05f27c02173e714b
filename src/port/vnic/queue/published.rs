//! What of a queue is read and set without its lock: [`Published`], and [`Settings`].
//!
//! Whoever is in a ring may be held up there by the peer whose memory it is, and the lock with it. So what the control side
//! asks for is published by whoever holds the lock, in atomics, and what it sets lies in atomics that the next batch reads.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::frame::{Needs, longest_within};
use crate::ident::LatencySensitivity;
use crate::port::Notifications;
use crate::ring::RingFault;
use crate::stats::Counter;

/// What a queue shows. Written under the queue's lock, read by anybody.
#[derive(Default)]
pub(super) struct Published {
    running: AtomicBool,
    enabled: AtomicBool,
    size: AtomicU16,
    /// Held for as long as a fault takes to copy: nobody touches a peer's memory meanwhile.
    fault: Mutex<Option<RingFault>>,
    pub(super) counters: Counters,
}

/// But for kicks, which are counted elsewhere. Their one writer is who holds the queue's lock.
#[derive(Default)]
#[repr(align(64))]
pub(super) struct Counters {
    pub(super) kicks_suppressed: Counter,
    pub(super) calls: Counter,
    pub(super) calls_suppressed: Counter,
    pub(super) calls_coalesced: Counter,
}

impl Published {
    /// Shows how the queue is; `size` is that of its ring if it runs.
    pub(super) fn show(&self, size: Option<u16>, enabled: bool, fault: Option<RingFault>) {
        self.running.store(size.is_some(), Ordering::Relaxed);
        self.enabled.store(enabled, Ordering::Relaxed);
        self.size.store(size.unwrap_or(0), Ordering::Relaxed);
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// Whether its ring is in service.
    #[inline]
    pub(super) fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }

    /// Whether the guest uses it.
    #[inline]
    pub(super) fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Number of descriptors; 0 if the ring is not running.
    pub(super) fn size(&self) -> u16 {
        self.size.load(Ordering::Relaxed)
    }

    /// Why the ring was taken out of service, if it was.
    pub(super) fn fault(&self) -> Option<RingFault> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it counts, with so many `kicks`.
    pub(super) fn notifications(&self, kicks: u64) -> Notifications {
        let Counters { kicks_suppressed, calls, calls_suppressed, calls_coalesced } = &self.counters;
        Notifications {
            kicks,
            kicks_suppressed: kicks_suppressed.get(),
            calls: calls.get(),
            calls_suppressed: calls_suppressed.get(),
            calls_coalesced: calls_coalesced.get(),
        }
    }
}

/// What the control side sets of a queue. Each batch goes by what it finds.
pub(in crate::port::vnic) struct Settings {
    latency: AtomicU8,
    offloads: AtomicU8,
    /// The longest payload that the guest is given, in bytes; 0 for any.
    mtu: AtomicU16,
}

impl Default for Settings {
    fn default() -> Self {
        let latency = LatencySensitivity::default() as u8;
        Self { latency: latency.into(), offloads: Needs::ALL.bits().into(), mtu: 0.into() }
    }
}

impl Settings {
    /// How much the guest minds interrupts that are held back.
    pub(super) fn set_latency(&self, latency: LatencySensitivity) {
        self.latency.store(latency as u8, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn latency(&self) -> LatencySensitivity {
        use LatencySensitivity::{High, Low, Medium, Normal};
        let levels = [Low, Normal, Medium, High];
        levels.get(usize::from(self.latency.load(Ordering::Relaxed))).copied().unwrap_or_default()
    }

    /// Whether frames may be merged for the guest: not for one that minds delay, which has its frames as they came.
    #[inline]
    pub(in crate::port::vnic) fn merges(&self) -> bool {
        self.latency() != LatencySensitivity::High
    }

    /// Which offloads the guest is left with of those that it can do.
    pub(super) fn set_offloads(&self, offloads: Needs) {
        self.offloads.store(offloads.bits(), Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn offloads(&self) -> Needs {
        Needs::from_bits(self.offloads.load(Ordering::Relaxed))
    }

    /// The longest payload that the guest is given, in bytes; `None` for any.
    pub(super) fn set_mtu(&self, mtu: Option<u16>) {
        self.mtu.store(mtu.unwrap_or(0), Ordering::Relaxed);
    }

    /// Bytes of the longest untagged frame within the MTU.
    #[inline]
    pub(in crate::port::vnic) fn longest(&self) -> u32 {
        longest_within(Some(self.mtu.load(Ordering::Relaxed)).filter(|&mtu| mtu != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_what_the_next_batch_finds() {
        let settings = Settings::default();
        assert_eq!((settings.latency(), settings.offloads()), (LatencySensitivity::Normal, Needs::ALL));
        assert_eq!(settings.longest(), u32::MAX);
        for level in [LatencySensitivity::Low, LatencySensitivity::Medium, LatencySensitivity::High] {
            settings.set_latency(level);
            assert_eq!(settings.latency(), level);
        }
        settings.set_offloads(Needs::CSUM);
        settings.set_mtu(Some(1500));
        assert_eq!((settings.offloads(), settings.longest()), (Needs::CSUM, 1514));
    }
}
