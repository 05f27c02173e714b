//! What a front end can do that holds others up: [`Offence`]. It ends the connection, and its port serves nobody for a while
//! ([`Docket`]).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use crate::port::Conduct;
use crate::sys::eventfd::EventFd;

/// For how long nobody is served after one.
pub(super) const KEPT_OUT: Duration = Duration::from_secs(5);

/// What a front end did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offence {
    /// An eventfd of it, which is to be non-blocking, blocked whoever rang it.
    Blocked = 1,
    /// An eventfd of it took milliseconds to ring, again and again.
    Slow = 2,
    /// A page fault in its memory held a shard up.
    HeldUp = 3,
    /// Each message, or being connected to, took milliseconds.
    SlowSocket = 4,
}

impl Offence {
    const ALL: [Self; 4] = [Self::Blocked, Self::Slow, Self::HeldUp, Self::SlowSocket];

    fn of_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|offence| *offence as u8 == number)
    }

    /// What the front end did.
    fn deed(self) -> &'static str {
        match self {
            Self::Blocked => "had an interrupt block the switch",
            Self::Slow => "had its interrupts take milliseconds each",
            Self::HeldUp => "held the switch up in the VM's memory",
            Self::SlowSocket => "had its socket take milliseconds to use",
        }
    }
}

impl fmt::Display for Offence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.deed())
    }
}

/// What a port's front end has done so far. All rings of the port share it.
pub(super) struct Docket {
    /// The last offence that nobody has looked at yet.
    last: AtomicU8,
    /// No shard enters a ring of the port until its front end has been sent away.
    barred: AtomicBool,
    /// How often a shard was held up, and for how long the last time that nobody has looked at yet, in milliseconds.
    held_up: AtomicU64,
    millis: AtomicU64,
    /// How often nobody was served for a while, times 256, and for which offence the last time.
    bars: AtomicU64,
    /// Signalled for the session.
    attention: Arc<EventFd>,
}

impl Docket {
    /// Nothing yet; `attention` is signalled when there is something.
    pub(super) fn new(attention: Arc<EventFd>) -> Self {
        let (last, barred, held_up, millis, bars) = Default::default();
        Self { last, barred, held_up, millis, bars, attention }
    }

    /// Notes one, which ends the connection.
    pub(super) fn enter(&self, offence: Offence) {
        self.last.store(offence as u8, Ordering::Relaxed);
        self.attention.signal();
    }

    /// Takes it away.
    pub(super) fn take(&self) -> Option<Offence> {
        if self.last.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let number = self.last.swap(0, Ordering::Relaxed);
        Offence::of_number(number)
    }

    /// A shard was held up for this long; it was told of that before if this is `again`. `bar` ends the connection.
    pub(super) fn hold_up(&self, held: Duration, bar: bool, again: bool) {
        self.held_up.fetch_add(u64::from(!again), Ordering::Relaxed);
        self.millis.store(u64::try_from(held.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        if bar {
            self.barred.store(true, Ordering::Relaxed);
            self.enter(Offence::HeldUp);
        }
        self.attention.signal();
    }

    /// For how long a shard was held up, if one was since this was asked last.
    pub(super) fn take_held_up(&self) -> Option<Duration> {
        Some(self.millis.swap(0, Ordering::Relaxed)).filter(|&millis| millis > 0).map(Duration::from_millis)
    }

    /// Nobody is served for a while. For the session's thread, or who looks for the VM while there is none.
    pub(super) fn sentence(&self, offence: Offence) {
        let count = self.bars.load(Ordering::Relaxed) >> 8;
        self.bars.store(count.wrapping_add(1) << 8 | offence as u64, Ordering::Relaxed);
    }

    /// What its front ends have done so far.
    pub(super) fn conduct(&self) -> Conduct {
        let bars = self.bars.load(Ordering::Relaxed);
        let deed = Offence::of_number(bars as u8).map(Offence::deed);
        let held_up = self.held_up.load(Ordering::Relaxed);
        Conduct { held_up, barred: bars >> 8, deed, seconds: KEPT_OUT.as_secs() }
    }

    /// Whether no shard is to enter a ring of the port.
    #[inline]
    pub(super) fn is_barred(&self) -> bool {
        self.barred.load(Ordering::Relaxed)
    }

    /// The front end is gone, and no ring of the port runs.
    pub(super) fn acquit(&self) {
        self.barred.store(false, Ordering::Relaxed);
        self.last.store(0, Ordering::Relaxed);
    }

    /// Has the session look.
    pub(super) fn call(&self) {
        self.attention.signal();
    }
}
