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

/// A moment of the calendar, in milliseconds since 1970 (UTC). For people; nothing is decided by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WallTime(pub u64);

impl WallTime {
    /// What the machine takes for the time now.
    pub fn now() -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

impl std::fmt::Display for WallTime {
    /// As RFC 3339 says. The date is counted in 400 years, which all have as many days, and in years from March on, whose
    /// last day is the one that may be missing.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (seconds, millis) = (self.0 / 1000, self.0 % 1000);
        let days = seconds / 86_400 + 719_468;
        let (era, day) = (days / 146_097, days % 146_097);
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let date = day - (153 * month + 2) / 5 + 1;
        let (year, month) = if month < 10 { (year, month + 3) } else { (year + 1, month - 9) };
        let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        write!(f, "{:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z", year + 400 * era)
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

    /// Days that `date -u -d @SECONDS` was asked about.
    #[test]
    fn wall_time_is_written_as_rfc_3339_says() {
        let cases = [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_001, "2000-02-29T00:00:00.001Z"),
            (951_868_799_999, "2000-02-29T23:59:59.999Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (1_709_164_800_000, "2024-02-29T00:00:00.000Z"),
            (1_798_761_599_000, "2026-12-31T23:59:59.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ];
        for (millis, want) in cases {
            assert_eq!(WallTime(millis).to_string(), want);
        }
    }

    #[test]
    fn ticks_wrap() {
        assert_eq!(Tick(3).since(Tick(u32::MAX - 1)), Duration::from_millis(500));
        assert_eq!(Instant(250_000_000).tick(), Tick(2));
    }
}
