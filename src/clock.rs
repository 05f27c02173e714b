//! Time as a value: nobody below `shard` and `control` asks the machine what time it is, so tests run in virtual time.
//!
//! [`Instant`] counts nanoseconds since the daemon started. Ageing and flap damping need no more than tenths of seconds
//! and store a [`Tick`], which fits an FDB entry.

use std::time::Duration;

/// Nanoseconds since the daemon started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Instant(pub u64);

impl Instant {
    /// The time `later` after this one.
    pub fn after(self, later: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(later.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this is; zero if it is not.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// The tenth of a second that this time lies in.
    pub fn tick(self) -> Tick {
        Tick((self.0 / Tick::NANOS) as u32)
    }
}

/// Tenths of seconds since the daemon started; wraps after 13 years.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tick(pub u32);

impl Tick {
    const NANOS: u64 = 100_000_000;

    /// How long after `earlier` this is, counting through the wrap.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(u64::from(self.0.wrapping_sub(earlier.0)) * Self::NANOS)
    }
}

/// The machine's monotonic clock, read against the moment the daemon started.
#[derive(Debug, Clone, Copy)]
pub struct Clock(std::time::Instant);

impl Clock {
    /// A clock that reads zero now.
    pub fn start() -> Self {
        Self(std::time::Instant::now())
    }

    /// The time now.
    pub fn now(&self) -> Instant {
        Instant(u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_wrap() {
        assert_eq!(Tick(3).since(Tick(u32::MAX - 1)), Duration::from_millis(500));
        assert_eq!(Instant(250_000_000).tick(), Tick(2));
    }
}
