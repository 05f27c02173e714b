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

/// How many queues that would rest by their level a shard goes on polling while it moves frames of others, and for how long
/// after their last frame, in microseconds. It is awake anyway, so polling spares the guest a kick and its frame the wait for
/// the shard's next look: round trips at 1 kHz beside a pair that floods took 86 us, and take 8. Each costs some 100 cycles of
/// a turn, which has 4,000 when small frames come at full rate; so they are few.
pub(super) const POLLED_WHEN_BUSY: usize = 2;
const POLLED_WHEN_BUSY_MICROS: u64 = 5000;

/// For how many cycles after its last frame such a queue is polled.
pub(super) fn busy_spin_cycles() -> u64 {
    cpu::cycles_per_second() / 1_000_000 * POLLED_WHEN_BUSY_MICROS
}

/// How often a shard that moves frames looks for notifications of its resting queues, in microseconds: what their wake-up
/// can be late while others keep the shard busy. One look is a system call of about 0.3 us, so 50 us costs under 1 %.
const LOOK_WHEN_BUSY_MICROS: u64 = 50;

/// The same for as long as guests kick: within [`KICKS_RECENT_MICROS`] after a look that found one. It costs 3 %.
const LOOK_WHEN_KICKED_MICROS: u64 = 10;
const KICKS_RECENT_MICROS: u64 = 2000;

/// The same for a shard whose queues that are awake have nothing. It has nothing better to do, and it has to be well below
/// the time that a queue is polled for: two guests with one frame between them would otherwise take turns to rest, each
/// while it waits for a look at the other, and 100 us become the time of a round trip that takes 2.
const LOOK_WHEN_IDLE_MICROS: u64 = 5;

/// When a shard looks for notifications of its resting queues, in cycles.
pub(super) struct Looks {
    when_idle: u64,
    when_busy: u64,
    when_kicked: u64,
    recent: u64,
}

impl Looks {
    /// As this module has it.
    pub fn new() -> Self {
        let cycles = |micros| cpu::cycles_per_second() / 1_000_000 * micros;
        Self {
            when_idle: cycles(LOOK_WHEN_IDLE_MICROS),
            when_busy: cycles(LOOK_WHEN_BUSY_MICROS),
            when_kicked: cycles(LOOK_WHEN_KICKED_MICROS),
            recent: cycles(KICKS_RECENT_MICROS),
        }
    }

    /// Between two looks of a shard that moved frames in its last turn or did not, and found a kick so long ago.
    #[inline]
    pub fn apart(&self, moved: bool, since_kick: u64) -> u64 {
        match moved {
            false => self.when_idle,
            true if since_kick < self.recent => self.when_kicked,
            true => self.when_busy,
        }
    }

    /// Whether a shard that moved frames so long ago is awake for them.
    #[inline]
    pub fn is_busy(&self, since_frames: u64) -> bool {
        since_frames < self.when_busy
    }
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
        let looks = Looks::new();
        assert!(looks.apart(false, 0) < looks.apart(true, 0) && looks.apart(true, 0) < looks.apart(true, u64::MAX));
        assert!(
            4 * looks.apart(false, u64::MAX) < spin(Normal),
            "or two queues take turns to rest over one frame between them"
        );
    }
}
