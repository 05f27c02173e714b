//! The eventfd by which a guest kicks one ring, and how often it did: [`Kick`].
//!
//! Nobody on our side reads it. A shard waits for it edge-triggered, so the kernel's own counter says how many kicks came
//! since the ring took it over, those included that came together or while the ring was polled: what the guest paid for.
//! Asking for it is the control side's business, through `/proc`, and costs a shard nothing. It takes the eventfd's lock, which its
//! owner can have held for 100 ms, so nobody asks under a lock that others need.
//!
//! The counter is the front end's as well, which can write any number to it and read it away. So what is counted never becomes
//! less, and from one look to the next never grows by more than a guest can kick.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::relay::lease::PeerEvent;
use crate::sys::eventfd;

/// The least time between two kicks of one ring. A write(2) to an eventfd that somebody waits for takes longer, however many
/// CPUs do nothing else (they take turns at its lock), and a guest's exit ten times as long.
const APART: Duration = Duration::from_nanos(100);

/// The kick of a running ring.
pub(super) struct Kick {
    event: Arc<PeerEvent>,
    looked: Mutex<Look>,
}

/// What was seen of the counter last.
struct Look {
    /// What it was at; a front end may have had it for long before the ring took it over.
    at: u64,
    when: Instant,
    /// Kicks up to then.
    kicks: u64,
}

impl Look {
    /// Kicks up to `now`, when the counter is at `at`.
    fn again(&mut self, at: u64, now: Instant) -> u64 {
        // One that was read away has begun anew.
        let more = if at < self.at { at } else { at - self.at };
        let most = now.saturating_duration_since(self.when).as_nanos() / APART.as_nanos();
        self.kicks = self.kicks.saturating_add(more.min(u64::try_from(most).unwrap_or(u64::MAX).max(1)));
        (self.at, self.when) = (at, now);
        self.kicks
    }
}

impl Kick {
    /// Takes over an eventfd, whose kicks count from now on.
    pub fn new(event: Arc<PeerEvent>) -> Self {
        let at = eventfd::count(event.as_fd()).unwrap_or(0);
        Self { event, looked: Mutex::new(Look { at, when: Instant::now(), kicks: 0 }) }
    }

    /// Kicks since then. A front end that takes some away, or a `/proc` that does not tell, makes them fewer than there were.
    pub fn count(&self) -> u64 {
        // Nobody waits here but who asks for the same. The counter is read under the lock, so that looks come in order.
        let mut look = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        match eventfd::count(self.event.as_fd()) {
            Ok(at) => look.again(at, Instant::now()),
            Err(_) => look.kicks,
        }
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kicks_grow_by_what_came_and_by_no_more_than_can_have_come() {
        let start = Instant::now();
        let after = |millis| start + Duration::from_millis(millis);
        let mut look = Look { at: 7, when: start, kicks: 0 };
        assert_eq!(look.again(10, after(1)), 3);
        assert_eq!(look.again(10, after(1)), 3);
        assert_eq!(look.again(11, after(1)), 4, "a kick right after a look");
        assert_eq!(look.again(u64::MAX - 1, after(2)), 4 + 10_000, "a millisecond's worth");
        assert_eq!(look.again(2, after(3)), 4 + 10_000 + 2, "read away, and two after that");
        assert_eq!(look.again(0, after(4)), 4 + 10_000 + 2);
    }
}
