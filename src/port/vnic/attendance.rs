//! Time for which a thread can answer: [`Attendance`].
//!
//! Who does not do what he should within some time is sent away. But while this process is stopped (a frozen cgroup, SIGSTOP, a
//! debugger) or gets no CPU, nobody can show that he has done it: what he sent lies in a socket, and the thread that does a job for
//! him does not run either. So such time counts next to nothing, and is followed by a turn in which that is found.

use std::time::{Duration, Instant};

/// How long a thread that counts time sleeps at most, and what counts at most of the time between two of its turns.
pub(super) const TURN: Duration = Duration::from_millis(500);

/// How long a thread was there, as it says itself.
#[derive(Debug)]
pub(super) struct Attendance {
    seen: Instant,
    total: Duration,
}

impl Attendance {
    /// One that begins at `now`.
    pub fn new(now: Instant) -> Self {
        Self { seen: now, total: Duration::ZERO }
    }

    /// A turn begins. Between turns that are about something with a time limit lies no more than [`TURN`], if nothing keeps the thread.
    pub fn turn(&mut self, now: Instant) {
        self.total += now.saturating_duration_since(self.seen).min(TURN);
        self.seen = now;
    }

    /// How long it was, up to this turn.
    pub fn total(&self) -> Duration {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_nothing_ran_counts_as_a_turn() {
        let (start, tenth) = (Instant::now(), Duration::from_millis(100));
        let mut attendance = Attendance::new(start);
        (1..=10).for_each(|n| attendance.turn(start + n * tenth));
        assert_eq!(attendance.total(), Duration::from_secs(1));
        attendance.turn(start + Duration::from_secs(3600));
        assert_eq!(attendance.total(), Duration::from_secs(1) + TURN);
        attendance.turn(start);
        assert_eq!(attendance.total(), Duration::from_secs(1) + TURN, "a clock does not go back");
    }
}
