//! What somebody whom we do not trust has a thread of ours spend: [`Toll`], which says when that is too much, and [`Pardon`], for the
//! time that it was not that one's doing.
//!
//! Writing to an eventfd, and sending to or receiving from a socket, wakes all who wait for its other end, one after the other
//! with interrupts off. Whoever has that other end can wait for it a million times (epoll sets of duplicates), which makes a
//! microsecond 100 ms and more. Nothing ends such a call early, so who does that is found out by what the calls took.
//!
//! Only CPU time of the calling thread says so: time that passes may have gone to somebody else whom the kernel gave the CPU. But the
//! kernel counts as a thread's own what its CPU does meanwhile for interrupts, and what a host of virtual machines takes from it.

use std::time::{Duration, Instant};

/// CPU time of a step from which on it is a slow one: a hundred times what one takes.
const SLOW: Duration = Duration::from_millis(1);

/// Slow ones in a row, or time that slow ones took within [`WINDOW`], from which on the other side is to blame.
const SLOW_IN_A_ROW: u32 = 4;
const SLOW_TOGETHER: Duration = Duration::from_millis(100);
const WINDOW: Duration = Duration::from_secs(1);

/// What a single step may take where everybody waits for it.
pub const AT_ONCE: Duration = Duration::from_millis(20);

/// How often one single step is forgiven.
const PARDONED_EVERY: Duration = Duration::from_secs(60);

/// CPU time that the calling thread has used.
pub fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// What one of them has taken so far.
#[derive(Debug, Default)]
pub struct Toll {
    in_a_row: u32,
    together: Duration,
    window: Option<Instant>,
}

impl Toll {
    /// Whether a step that used so much CPU time at `now` is one too many.
    pub fn charge(&mut self, used: Duration, now: Instant) -> bool {
        if used < SLOW {
            self.in_a_row = 0;
            return false;
        }
        if self.window.is_none_or(|begin| now.saturating_duration_since(begin) > WINDOW) {
            (self.window, self.together) = (Some(now), Duration::ZERO);
        }
        self.in_a_row += 1;
        self.together += used;
        let too_much = self.in_a_row >= SLOW_IN_A_ROW || self.together >= SLOW_TOGETHER;
        if too_much {
            // Whoever comes next begins anew.
            *self = Self::default();
        }
        too_much
    }

    /// The same of a step that everybody waits for and that ends now: a single one can be too much.
    pub fn charge_at_once(&mut self, used: Duration) -> bool {
        self.charge(used, Instant::now()) || used >= AT_ONCE
    }
}

/// When somebody was last forgiven for a step that took too much.
#[derive(Debug, Default)]
pub struct Pardon {
    last: Option<Instant>,
}

impl Pardon {
    /// Forgives a step at `now`, unless one was a short while before.
    pub fn grant(&mut self, now: Instant) -> bool {
        let granted = self.is_due(now);
        if granted {
            self.last = Some(now);
        }
        granted
    }

    /// Whether the next one is forgiven.
    pub fn is_due(&self, now: Instant) -> bool {
        self.last.is_none_or(|last| now.saturating_duration_since(last) >= PARDONED_EVERY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_use_cpu_time_again_and_again_are_the_other_sides_doing() {
        let (ms, start) = (Duration::from_millis, Instant::now());
        let fed = |times: &[(u64, u64)]| {
            let mut toll = Toll::default();
            times.iter().position(|&(used, at)| toll.charge(ms(used), start + ms(at)))
        };
        assert_eq!(fed(&[(0, 0); 1000]), None);
        assert_eq!(fed(&[(2, 0), (2, 1), (2, 2), (2, 3)]), Some(3), "four in a row");
        assert_eq!(fed(&[(2, 0), (2, 1), (2, 2), (0, 3), (2, 4)]), None, "now and then is the host's doing");
        assert_eq!(fed(&[(60, 0), (0, 1), (60, 2)]), Some(2), "a tenth of a second");
        assert_eq!(fed(&[(60, 0), (0, 1), (60, 2000), (0, 2001), (60, 4000)]), None);
        assert_eq!(fed(&[(500, 0)]), Some(0));
    }

    #[test]
    fn one_is_forgiven_and_the_next_one_only_much_later() {
        let (mut pardon, start) = (Pardon::default(), Instant::now());
        let at = [0, 1, 59, 60, 61, 119, 121].map(|seconds| pardon.grant(start + Duration::from_secs(seconds)));
        assert_eq!(at, [true, false, false, true, false, false, true]);
    }

    #[test]
    fn a_single_step_that_everybody_waits_for_can_be_too_much() {
        assert!(!Toll::default().charge_at_once(AT_ONCE - SLOW) && Toll::default().charge_at_once(AT_ONCE));
        let before = thread_time();
        std::thread::sleep(2 * AT_ONCE);
        assert!(thread_time() - before < AT_ONCE, "time that only passes is not used");
        while thread_time() - before < AT_ONCE {}
    }
}
