//! The eventfd by which a guest kicks one ring, and how often it did: [`Kick`].
//!
//! Nobody on our side reads it. A shard waits for it edge-triggered, so the kernel's own counter says how many kicks came
//! since the ring took it over, those included that came together or while the ring was polled: what the guest paid for.
//! Asking for it is the control side's business, through `/proc`, and costs a shard nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys::eventfd;

/// The kick of a running ring.
pub(super) struct Kick {
    fd: OwnedFd,
    /// What the counter was at when the ring took it over: a front end may have had it for long.
    before: u64,
}

impl Kick {
    /// Takes over an eventfd, whose kicks count from now on.
    pub fn new(fd: OwnedFd) -> Self {
        let before = eventfd::count(fd.as_fd()).unwrap_or(u64::MAX);
        Self { fd, before }
    }

    /// Kicks since then. A front end that takes some away, or a `/proc` that does not tell, makes them fewer.
    pub fn count(&self) -> u64 {
        eventfd::count(self.fd.as_fd()).map_or(0, |now| now.saturating_sub(self.before))
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
