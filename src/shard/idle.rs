//! How long a queue that has nothing is polled before it is put to rest: the "when idle" column of the latency levels.
//!
//! | level  | polls for | then |
//! |--------|-----------|------|
//! | low    | nothing   | rests |
//! | normal | 50 us     | rests |
//! | medium | 500 us    | rests |
//! | high   | for ever  |      |
//!
//! Resting costs the guest a notification (an exit of its CPU, some microseconds) and us a wake-up; polling costs our CPU.
//! 50 us is about what both cost together at their worst, so polling for that long at most doubles the cost of either
//! choice, whatever the traffic does (the ski-rental argument). With `idle: never` nothing ever rests.

use crate::ident::LatencySensitivity;
use crate::sys::cpu;

/// Whether queues may be put to rest at all: `shards.idle` of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IdlePolicy {
    /// By their latency level.
    #[default]
    Adaptive,
    /// Never: every queue is polled all the time.
    Never,
}

impl IdlePolicy {
    /// For how many cycles an empty queue of this level is polled; `u64::MAX` for ever.
    pub fn spin_cycles(self, latency: LatencySensitivity) -> u64 {
        let micros = match (self, latency) {
            (Self::Never, _) | (_, LatencySensitivity::High) => return u64::MAX,
            (_, LatencySensitivity::Low) => 0,
            (_, LatencySensitivity::Normal) => 50,
            (_, LatencySensitivity::Medium) => 500,
        };
        cpu::cycles_per_second() / 1_000_000 * micros
    }
}

/// How often a shard that moves frames looks for notifications of its resting queues, in microseconds: what their wake-up
/// can be late while others keep the shard busy. One look is a system call of about 0.3 us, so 50 us costs under 1 %.
const LOOK_WHEN_BUSY_MICROS: u64 = 50;

/// The same for a shard whose queues that are awake have nothing. It has nothing better to do, and it has to be well below
/// the time that a queue is polled for: two guests with one frame between them would otherwise take turns to rest, each
/// while it waits for a look at the other, and 100 us become the time of a round trip that takes 2.
const LOOK_WHEN_IDLE_MICROS: u64 = 5;

/// Cycles between two looks of a shard that moved frames in its last turn, or did not.
pub(super) fn look_cycles(busy: bool) -> u64 {
    cpu::cycles_per_second() / 1_000_000 * if busy { LOOK_WHEN_BUSY_MICROS } else { LOOK_WHEN_IDLE_MICROS }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_poll_longer_the_more_they_mind_delay() {
        use LatencySensitivity::{High, Low, Medium, Normal};
        let spin = |level| IdlePolicy::Adaptive.spin_cycles(level);
        assert_eq!(spin(Low), 0);
        assert!(0 < spin(Normal) && spin(Normal) < spin(Medium) && spin(Medium) < spin(High));
        assert_eq!(IdlePolicy::Never.spin_cycles(Low), u64::MAX);
        assert!(4 * look_cycles(false) < spin(Normal), "or two queues take turns to rest over one frame between them");
    }
}
