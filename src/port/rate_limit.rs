//! So many per period and no more: [`RateLimit`]. Where what comes must not be lost, whoever sends it waits: [`Pace`].
//!
//! What a guest, a front end or a peer can cause, it can cause in a loop: log lines, connections, announcements. Each port
//! has its own limits, so a noisy one does not silence the others.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets `burst` events through in each `period`. Not for the data path: it reads the clock and takes a lock.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    period: Duration,
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    end: Option<Instant>,
    admitted: u32,
    refused: u64,
}

/// Whether an event may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It may; so many before it were refused since the last that was admitted.
    Admitted(u64),
    /// Too many came; the next period begins after this time.
    Refused(Duration),
}

impl RateLimit {
    /// A limit of `burst` events in each `period`.
    pub const fn new(burst: u32, period: Duration) -> Self {
        Self { burst, period, window: Mutex::new(Window { end: None, admitted: 0, refused: 0 }) }
    }

    /// Counts an event that happens now.
    pub fn admit(&self) -> Admission {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Admission {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let end = match window.end.filter(|end| now < *end) {
            Some(end) => end,
            None => {
                let end = now + self.period;
                window.end = Some(end);
                window.admitted = 0;
                end
            }
        };
        if window.admitted >= self.burst {
            window.refused += 1;
            return Admission::Refused(end - now);
        }
        window.admitted += 1;
        Admission::Admitted(std::mem::take(&mut window.refused))
    }
}

/// Says how long to wait after events of which the first `burst` cost nothing and each one more an `interval`. Time in which
/// none comes is credit for later ones, up to the burst.
#[derive(Debug)]
pub struct Pace {
    burst: u32,
    interval: Duration,
    /// When all events so far will have been paid for.
    paid: Mutex<Option<Instant>>,
}

impl Pace {
    /// A pace of `per_second` events after the first `burst`.
    pub const fn new(burst: u32, per_second: u32) -> Self {
        let interval = Duration::from_nanos(1_000_000_000 / per_second as u64);
        Self { burst, interval, paid: Mutex::new(None) }
    }

    /// Counts so many events that happen now.
    pub fn spend(&self, events: u32) {
        self.spend_at(Instant::now(), events);
    }

    /// How long to wait before the next; nothing if there is credit.
    pub fn debt(&self) -> Duration {
        self.debt_at(Instant::now())
    }

    fn spend_at(&self, now: Instant, events: u32) {
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let from = paid.map_or(now, |paid| paid.max(now));
        *paid = Some(from + self.interval * events);
    }

    fn debt_at(&self, now: Instant) -> Duration {
        let paid = *self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let open = paid.map_or(Duration::ZERO, |paid| paid.saturating_duration_since(now));
        open.saturating_sub(self.interval * self.burst)
    }
}

/// Logs a line that a far end can cause, under `limit`; a line that follows suppressed ones says how many those were.
macro_rules! log_limited {
    ($limit:expr, $level:expr, $($message:tt)+) => {
        match $limit.admit() {
            $crate::port::rate_limit::Admission::Admitted(0) => log::log!($level, $($message)+),
            $crate::port::rate_limit::Admission::Admitted(n) => {
                log::log!($level, "{} ({n} lines like it were left out)", format_args!($($message)+))
            }
            $crate::port::rate_limit::Admission::Refused(_) => {}
        }
    };
}

pub(crate) use log_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_what_comes_faster_waits() {
        let (pace, start) = (Pace::new(4, 100), Instant::now());
        let millis = Duration::from_millis;
        let debt = |at| pace.debt_at(start + millis(at));
        assert_eq!(debt(0), Duration::ZERO);
        pace.spend_at(start, 4);
        assert_eq!(debt(0), Duration::ZERO, "the burst");
        pace.spend_at(start, 3);
        assert_eq!([debt(0), debt(20), debt(30)], [30, 10, 0].map(millis));
        pace.spend_at(start + millis(30), 1);
        assert_eq!(debt(30), millis(10));
        // Credit grows up to the burst and no further.
        let later = 10_000;
        pace.spend_at(start + millis(later), 5);
        assert_eq!(debt(later), millis(10));
    }

    #[test]
    fn a_burst_per_period_passes_and_the_rest_is_counted() {
        let (limit, start) = (RateLimit::new(2, Duration::from_secs(10)), Instant::now());
        let at = |seconds| limit.admit_at(start + Duration::from_secs(seconds));
        assert_eq!((at(0), at(3)), (Admission::Admitted(0), Admission::Admitted(0)));
        assert_eq!(
            (at(4), at(9)),
            (Admission::Refused(Duration::from_secs(6)), Admission::Refused(Duration::from_secs(1)))
        );
        assert_eq!((at(10), at(11)), (Admission::Admitted(2), Admission::Admitted(0)));
        assert_eq!(at(12), Admission::Refused(Duration::from_secs(8)));
    }
}
