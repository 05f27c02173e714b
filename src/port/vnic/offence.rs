//! What a front end can do that holds a shard up: [`Offence`]. It ends the connection, and its port serves nobody for a while.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

/// What a front end did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offence {
    /// An eventfd of it, which is to be non-blocking, blocked whoever rang it.
    Blocked = 1,
    /// An eventfd of it took milliseconds to ring, again and again.
    Slow = 2,
}

impl fmt::Display for Offence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blocked => "had an interrupt block the switch",
            Self::Slow => "had its interrupts take milliseconds each",
        })
    }
}

/// The last offence that nobody has looked at yet.
#[derive(Default)]
pub(super) struct Docket(AtomicU8);

impl Docket {
    /// Notes one.
    pub(super) fn enter(&self, offence: Offence) {
        self.0.store(offence as u8, Ordering::Relaxed);
    }

    /// Takes it away.
    pub(super) fn take(&self) -> Option<Offence> {
        if self.0.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let number = self.0.swap(0, Ordering::Relaxed);
        [Offence::Blocked, Offence::Slow].into_iter().find(|offence| *offence as u8 == number)
    }
}
