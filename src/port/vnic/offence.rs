//! What a front end can do that holds others up: [`Offence`]. It ends the connection, and its port serves nobody for a while
//! ([`Docket`]).
//!
//! Most of them hold up a shard, whose other ports another thread takes over in some milliseconds. One holds up the whole process:
//! while the kernel keeps a session waiting for its front end's file, no thread maps anything or is started
//! ([`crate::sys::mapping_turn`]). That costs minutes, and more each time.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::port::Conduct;
use crate::port::rate_limit::Pace;
use crate::sys::eventfd::EventFd;

/// For how long nobody is served after one.
const KEPT_OUT: Duration = Duration::from_secs(5);

/// The same after the first [`Offence::Mapping`]; each further one of the port doubles it, up to the most.
const KEPT_OUT_FOR_MAPPING: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// Milliseconds that a session may be kept waiting for its front end's files: so many at once, and so many in a second. The kernel
/// takes microseconds.
const MAPPING_WAIT: (u32, u32) = (100, 100);

/// Microseconds of CPU time for which changes of what shards wait for may spin for the lock of what a port is kicked with: so many
/// at once, and so many in a second. A change takes one or two, and below [`UNCHARGED`] it is none of the front end's.
const KICK_TIME: (u32, u32) = (100_000, 20_000);
const UNCHARGED: Duration = Duration::from_micros(100);

/// The longest time that a session lets pass before it goes on to the next ring.
const BREAK: Duration = Duration::from_secs(1);

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
    /// The kernel kept its session waiting to map or unmap a file of it, and everybody else who wanted to map anything.
    Mapping = 5,
    /// Page faults in its memory held shards up again and again, for less than would be told by itself.
    OftenHeldUp = 6,
    /// To begin or end to wait for an eventfd that it kicks with took long, and the shard needs a lock that is held for that.
    SlowKick = 7,
}

impl Offence {
    const ALL: [Self; 7] =
        [Self::Blocked, Self::Slow, Self::HeldUp, Self::SlowSocket, Self::Mapping, Self::OftenHeldUp, Self::SlowKick];

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
            Self::Mapping => "kept the switch from mapping memory, its own and that of others",
            // limits::HELD_UP_MILLIS
            Self::OftenHeldUp => {
                "held the switch up in the VM's memory again and again, more than 200 ms in short times"
            }
            Self::SlowKick => "had its kicks take long to wait for",
        }
    }
}

impl fmt::Display for Offence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.deed())
    }
}

/// How often a port served nobody for a while, and the last time: what is told together is kept in one number.
struct Bars {
    /// How often; of this, 40 bits are kept.
    count: u64,
    /// For how many seconds the last time; 16 bits.
    seconds: u64,
    /// For what; 8 bits.
    offence: u8,
}

impl Bars {
    fn of(number: u64) -> Self {
        Self { count: number >> 24, seconds: number >> 8 & 0xffff, offence: number as u8 }
    }

    fn number(&self) -> u64 {
        self.count << 24 | (self.seconds & 0xffff) << 8 | u64::from(self.offence)
    }
}

/// For how long a shard was held up, or shards were in many times, in one number.
pub(super) struct HeldUp {
    millis: u32,
    times: u32,
}

impl HeldUp {
    fn of(number: u64) -> Self {
        Self { millis: number as u32, times: (number >> 32) as u32 }
    }

    fn number(&self) -> u64 {
        u64::from(self.times) << 32 | u64::from(self.millis)
    }
}

impl fmt::Display for HeldUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { millis, times } = self;
        match times {
            0 | 1 => write!(f, "a shard was held up in the VM's memory for {millis} ms so far"),
            _ => write!(f, "shards were held up in the VM's memory for a moment, {millis} ms in {times} times"),
        }
    }
}

/// What a port's front end has done so far. All rings of the port share it.
pub(super) struct Docket {
    /// The last offence that nobody has looked at yet.
    last: AtomicU8,
    /// No shard enters a ring of the port until its front end has been sent away.
    barred: AtomicBool,
    /// How often a shard was held up, and what nobody has looked at yet of that: see [`HeldUp`].
    held_up: AtomicU64,
    last_held_up: AtomicU64,
    /// How often nobody was served for a while, and for how many seconds and which offence the last time: see [`Bars`].
    bars: AtomicU64,
    /// How often that was for [`Offence::Mapping`].
    mappings: AtomicU32,
    /// What its sessions were kept waiting for its files.
    waits: Pace,
    /// What was spent on its kicks.
    kicks: Pace,
    /// Signalled for the session.
    attention: Arc<EventFd>,
}

impl Docket {
    /// Nothing yet; `attention` is signalled when there is something.
    pub(super) fn new(attention: Arc<EventFd>) -> Self {
        let (last, barred, held_up, last_held_up, bars, mappings) = Default::default();
        let [waits, kicks] = [MAPPING_WAIT, KICK_TIME].map(|(burst, per_second)| Pace::new(burst, per_second));
        Self { last, barred, held_up, last_held_up, bars, mappings, waits, kicks, attention }
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

    /// A shard was held up for this long, or shards were in so many times; it was told of that before if this is `again`. `bar` ends
    /// the connection.
    pub(super) fn hold_up(&self, held: Duration, times: u32, bar: bool, again: bool) {
        self.held_up.fetch_add(u64::from(!again), Ordering::Relaxed);
        let millis = u32::try_from(held.as_millis()).unwrap_or(u32::MAX);
        self.last_held_up.store(HeldUp { millis, times }.number(), Ordering::Relaxed);
        if bar {
            self.barred.store(true, Ordering::Relaxed);
            self.enter(if times > 1 { Offence::OftenHeldUp } else { Offence::HeldUp });
        }
        self.attention.signal();
    }

    /// For how long a shard was held up, if one was since this was asked last.
    pub(super) fn take_held_up(&self) -> Option<HeldUp> {
        Some(HeldUp::of(self.last_held_up.swap(0, Ordering::Relaxed))).filter(|held| held.times > 0)
    }

    /// Its session was kept waiting for a file of the front end for this long; `true` if that is too much. For the session's
    /// thread.
    pub(super) fn kept_waiting(&self, waited: Duration) -> bool {
        // One wait is not held against it twice: what it owes is paid off long before it is served again.
        self.waits.spend(u32::try_from(waited.as_millis()).unwrap_or(u32::MAX).min(2 * MAPPING_WAIT.0));
        !waited.is_zero() && !self.waits.debt().is_zero()
    }

    /// A thread of ours used so much CPU time to begin or end to wait for a kick of the front end. Too much ends the connection.
    pub(super) fn charge_for_kick(&self, used: Duration) {
        if used < UNCHARGED {
            return;
        }
        // Of one change, as much as is paid off before it is served again.
        self.kicks.spend(u32::try_from(used.as_micros()).unwrap_or(u32::MAX).min(2 * KICK_TIME.0));
        if !self.kicks.debt().is_zero() {
            self.enter(Offence::SlowKick);
        }
    }

    /// Has a session wait that has spent too much on kicks, so that shards have time between its changes: a port can have a
    /// hundred rings, all of which are stopped when its connection ends. To be called where nobody else waits.
    pub(super) fn pay_for_kicks(&self) {
        std::thread::sleep(self.kicks.debt().min(BREAK));
    }

    /// Nobody is served for a while: for how long. For the session's thread, or who looks for the VM while there
    /// is none.
    pub(super) fn sentence(&self, offence: Offence) -> Duration {
        let time = match offence {
            Offence::Mapping => {
                let (first, most) = KEPT_OUT_FOR_MAPPING;
                let doubled = self.mappings.fetch_add(1, Ordering::Relaxed).min(16);
                first.saturating_mul(1 << doubled).min(most)
            }
            _ => KEPT_OUT,
        };
        let bars = Bars::of(self.bars.load(Ordering::Relaxed));
        let count = bars.count.wrapping_add(1);
        self.bars.store(Bars { count, seconds: time.as_secs(), offence: offence as u8 }.number(), Ordering::Relaxed);
        time
    }

    /// What its front ends have done so far.
    pub(super) fn conduct(&self) -> Conduct {
        let bars = Bars::of(self.bars.load(Ordering::Relaxed));
        let deed = Offence::of_number(bars.offence).map(Offence::deed);
        let held_up = self.held_up.load(Ordering::Relaxed);
        Conduct { held_up, barred: bars.count, deed, seconds: bars.seconds }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Instant;

    use super::*;
    use crate::limits::HELD_UP_MILLIS;

    fn docket() -> Docket {
        Docket::new(Arc::new(EventFd::new().unwrap()))
    }

    #[test]
    fn a_port_that_keeps_others_from_mapping_is_barred_for_longer_each_time() {
        let docket = docket();
        let mut sentences = vec![docket.sentence(Offence::HeldUp)];
        sentences.extend((0..8).map(|_| docket.sentence(Offence::Mapping)));
        assert_eq!(docket.conduct().seconds, 3600);
        sentences.push(docket.sentence(Offence::Slow));
        let seconds: Vec<_> = sentences.iter().map(Duration::as_secs).collect();
        assert_eq!(seconds, [5, 60, 120, 240, 480, 960, 1920, 3600, 3600, 5]);
        let conduct = docket.conduct();
        assert_eq!((conduct.barred, conduct.seconds, conduct.deed), (10, 5, Some(Offence::Slow.deed())));
    }

    #[test]
    fn many_short_times_are_told_as_such() {
        let docket = docket();
        docket.hold_up(Duration::from_millis(25), 1, false, false);
        assert_eq!(
            docket.take_held_up().unwrap().to_string(),
            "a shard was held up in the VM's memory for 25 ms so far"
        );
        assert!(docket.take_held_up().is_none() && docket.take().is_none());
        docket.hold_up(Duration::from_millis(230), 31, true, false);
        assert!(docket.take_held_up().unwrap().to_string().ends_with("230 ms in 31 times"));
        assert_eq!((docket.take(), docket.is_barred()), (Some(Offence::OftenHeldUp), true));
        assert!(Offence::OftenHeldUp.deed().contains(&format!("more than {HELD_UP_MILLIS} ms")));
        assert_eq!(docket.conduct().held_up, 2);
    }

    #[test]
    fn short_waits_for_files_are_put_up_with_and_long_or_many_are_not() {
        let millis = Duration::from_millis;
        assert!(!docket().kept_waiting(Duration::ZERO) && !docket().kept_waiting(millis(90)));
        assert!(docket().kept_waiting(millis(10_000)));
        let many = docket();
        assert!((0..20).any(|_| many.kept_waiting(millis(90))));
        assert!(!many.kept_waiting(Duration::ZERO), "it is waits that are held against it");
    }

    #[test]
    fn kicks_that_take_long_to_wait_for_end_the_connection() {
        let micros = Duration::from_micros;
        let charged = |used: Duration, times: usize| {
            let docket = docket();
            (0..times).for_each(|_| docket.charge_for_kick(used));
            docket.take()
        };
        assert_eq!(charged(micros(3), 100_000), None, "a front end that repeats itself");
        assert_eq!(charged(micros(90_000), 1), None, "the host's doing");
        for (used, times) in [(150_000, 1), (30_000, 10), (900, 1000)] {
            assert_eq!(charged(micros(used), times), Some(Offence::SlowKick), "{times} times {used} us");
        }
        let docket = docket();
        docket.charge_for_kick(Duration::from_secs(3600));
        assert!(docket.kicks.debt() <= KEPT_OUT, "paid off when it is served again");
        (0..100).for_each(|_| docket.charge_for_kick(Duration::from_secs(1)));
        let before = Instant::now();
        docket.pay_for_kicks();
        assert!(before.elapsed() >= BREAK, "shards have time between its rings");
    }
}
