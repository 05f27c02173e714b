//! How much of the host's CPU time the relay spends on each port: [`Pacing`].
//!
//! Everybody's messages go through one thread, and those with files have two more threads do something each. A front end that sends
//! such messages as fast as it may had others wait for as long as there were 14 of its kind: 38 s for a VM that wanted to start. So
//! what a port's messages take is counted, the thread's time and that of the jobs, and a port that has used more than its part is
//! not read for a while; its session notices nothing but that. A VM that starts uses some milliseconds: it sends one or two files,
//! and eventfds, which cost little.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::sys::toll::Pardon;

/// What a port may use at once.
const BURST: Duration = Duration::from_millis(500);

/// What it may use in the long run, as a part of one CPU: one in so many.
const PART: u32 = 32;

/// What it owes at most, however much more it has used: whoever comes to the port next waits no longer than that, which is less than
/// a session waits for a first message.
const MOST: Duration = Duration::from_secs(5);

/// Until when each port has used what it may. Those of which the time has passed are let go of before a map grows.
#[derive(Default)]
pub(super) struct Pacing {
    used_up_to: HashMap<u64, Instant>,
    pardons: HashMap<u64, Pardon>,
}

impl Pacing {
    /// A port has used so much CPU time.
    pub(super) fn charge(&mut self, port: u64, used: Duration) {
        self.charge_at(Instant::now(), port, used);
    }

    /// How long a port is not to be read.
    pub(super) fn debt(&self, port: u64) -> Duration {
        self.debt_at(Instant::now(), port)
    }

    /// Whether a message of a port that took too much by itself is forgiven. By port, and not by connection: one that is made anew is
    /// no better.
    pub(super) fn forgives(&mut self, port: u64) -> bool {
        let now = Instant::now();
        if self.pardons.len() == self.pardons.capacity() {
            self.pardons.retain(|_, pardon| !pardon.is_due(now));
        }
        self.pardons.entry(port).or_default().grant(now)
    }

    fn charge_at(&mut self, now: Instant, port: u64, used: Duration) {
        if self.used_up_to.len() == self.used_up_to.capacity() {
            self.used_up_to.retain(|_, until| *until > now);
        }
        let until = self.used_up_to.entry(port).or_insert(now);
        *until = ((*until).max(now) + used * PART).min(now + BURST * PART + MOST);
    }

    fn debt_at(&self, now: Instant, port: u64) -> Duration {
        let until = self.used_up_to.get(&port).map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
        until.saturating_sub(BURST * PART)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_has_a_burst_and_then_its_part_and_others_have_theirs() {
        let (mut pacing, start, millis) = (Pacing::default(), Instant::now(), Duration::from_millis);
        pacing.charge_at(start, 1, BURST);
        assert_eq!(pacing.debt_at(start, 1), Duration::ZERO);
        pacing.charge_at(start, 1, millis(10));
        assert_eq!([pacing.debt_at(start, 1), pacing.debt_at(start, 2)], [millis(320), Duration::ZERO]);
        assert_eq!(pacing.debt_at(start + millis(300), 1), millis(20));
        // What was not used is no credit beyond the burst.
        let later = start + BURST * PART * 2;
        pacing.charge_at(later, 1, BURST + millis(1));
        assert_eq!(pacing.debt_at(later, 1), millis(32));
        pacing.charge_at(later, 1, millis(100_000));
        assert_eq!(pacing.debt_at(later, 1), MOST, "it is not kept out for ever");
    }

    #[test]
    fn each_port_is_forgiven_once() {
        let mut pacing = Pacing::default();
        assert_eq!([1, 1, 2, 1, 2].map(|port| pacing.forgives(port)), [true, false, true, false, false]);
    }

    #[test]
    fn ports_that_owe_nothing_are_forgotten() {
        let (mut pacing, start) = (Pacing::default(), Instant::now());
        for port in 0..10_000 {
            pacing.charge_at(start + Duration::from_secs(port), port, Duration::from_millis(1));
        }
        assert!(pacing.used_up_to.len() < 20, "{}", pacing.used_up_to.len());
    }
}
