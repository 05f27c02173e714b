//! What frames of a sender take the host beyond what frames take: [`Account`].
//!
//! A frame takes the host 1 to 2 us, some 100 us where it is for hundreds of interfaces. One that takes a thousand times as long has others
//! wait, and nothing ends that call early. So a sender has some of that time at once, and half of all time after that; if it has
//! taken more it is shut out for as long as that comes to, and a second at most. No more, for it may be whoever receives that makes frames of
//! an innocent sender slow, with a socket that very many wait for or filters on an interface of its own: that takes no more from the sender
//! than the host's slowness does. What the thread has waited for a CPU does not count. Where it did not use as much CPU time, either the
//! kernel counts what it did as a softirq's (CONFIG_IRQ_TIME_ACCOUNTING), or the daemon was stopped meanwhile (SIGSTOP, a frozen cgroup), which
//! is nobody's doing: that is forgiven once in a minute.

use std::time::{Duration, Instant};

use crate::sys::toll::Pardon;

/// From when on a frame is a slow one.
const SLOW: Duration = Duration::from_millis(1);

/// What slow frames may take at once.
pub(super) const ALLOWANCE: Duration = Duration::from_millis(200);

/// How long a sender is shut out at most.
const LONGEST: Duration = Duration::from_secs(1);

/// What a frame took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cost {
    /// Time, but for what the thread has waited for a CPU.
    pub(super) took: Duration,
    /// CPU time that the thread has used, at least.
    pub(super) ran: Duration,
}

/// Of one sender.
#[derive(Debug)]
pub(super) struct Account {
    allowance: Duration,
    left: Duration,
    since: Instant,
    pardon: Pardon,
}

impl Account {
    /// Of one that may take so much at once.
    pub(super) fn new(allowance: Duration) -> Self {
        Self { allowance, left: allowance, since: Instant::now(), pardon: Pardon::default() }
    }

    /// Whether a frame that took the host so long is to be charged.
    #[inline]
    pub(super) fn is_slow(took: Duration) -> bool {
        took >= SLOW
    }

    /// Charges what a frame took, of one of whose like so many are shut out; returns for how long its sender is if that is too much.
    pub(super) fn charge(&mut self, cost: Cost, shut: u32) -> Option<Duration> {
        self.charge_at(cost, shut, Instant::now())
    }

    fn charge_at(&mut self, Cost { took, ran }: Cost, shut: u32, now: Instant) -> Option<Duration> {
        if !Self::is_slow(took) {
            return None;
        }
        let refilled = now.saturating_duration_since(self.since).saturating_sub(took);
        // Together they shall not have many times what one may have.
        self.left = (self.left + refilled).min(self.allowance / (1 + shut));
        self.since = now;
        if let Some(left) = self.left.checked_sub(took) {
            self.left = left;
            return None;
        }
        if ran < took / 2 && self.pardon.grant(now) {
            self.left = Duration::ZERO;
            return None;
        }
        let rest = (took - self.left).min(LONGEST);
        // By then nothing is owed, and nothing is left.
        (self.left, self.since) = (Duration::ZERO, now + rest);
        Some(rest)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    /// A frame that kept the CPU for so long.
    fn cost(took: Duration) -> Cost {
        Cost { took, ran: took }
    }

    #[test]
    fn slow_frames_have_some_time_at_once_and_half_of_it_later() {
        let (mut account, mut now) = (Account::new(ALLOWANCE), Instant::now());
        assert_eq!(account.charge_at(cost(MILLI / 2), 0, now), None, "not slow");
        for _ in 0..4 {
            assert_eq!(account.charge_at(cost(50 * MILLI), 0, now), None);
        }
        let rest = account.charge_at(cost(50 * MILLI), 0, now).unwrap();
        assert_eq!(rest, 50 * MILLI);
        // In the long run.
        let (begin, mut slow) = (now, Duration::ZERO);
        for _ in 0..50 {
            now += account.charge_at(cost(100 * MILLI), 0, now).unwrap_or_default();
            (now, slow) = (now + 100 * MILLI, slow + 100 * MILLI);
        }
        let part = slow.as_secs_f64() / (now - begin).as_secs_f64();
        assert!((0.45..0.55).contains(&part), "{part}");
        assert_eq!(account.charge_at(cost(Duration::from_secs(1000)), 0, now + LONGEST), Some(LONGEST));
    }

    #[test]
    fn who_was_well_behaved_for_a_while_has_all_of_it_again_and_no_more() {
        let (mut account, now) = (Account::new(ALLOWANCE), Instant::now());
        assert!(
            account.charge_at(cost(200 * MILLI), 0, now).is_none() && account.charge_at(cost(MILLI), 0, now).is_some()
        );
        let later = now + Duration::from_secs(3600);
        assert!(
            account.charge_at(cost(200 * MILLI), 0, later).is_none()
                && account.charge_at(cost(MILLI), 0, later).is_some()
        );
    }

    #[test]
    fn the_more_are_shut_out_the_less_the_next_one_has_at_once() {
        let now = Instant::now();
        assert_eq!(Account::new(ALLOWANCE).charge_at(cost(200 * MILLI), 0, now), None);
        assert_eq!(Account::new(ALLOWANCE).charge_at(cost(50 * MILLI), 3, now), None);
        assert_eq!(Account::new(ALLOWANCE).charge_at(cost(51 * MILLI), 3, now), Some(MILLI));
    }

    #[test]
    fn time_in_which_the_thread_did_not_run_is_forgiven_once_in_a_minute() {
        let (mut account, now) = (Account::new(ALLOWANCE), Instant::now());
        let stopped = Cost { took: 1000 * MILLI, ran: 9 * MILLI };
        assert_eq!(account.charge_at(stopped, 0, now), None);
        assert_eq!(account.charge_at(stopped, 0, now), Some(LONGEST));
        assert_eq!(account.charge_at(stopped, 0, now + 61_000 * MILLI), None);
    }
}
