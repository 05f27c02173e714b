//! Short times that ports' memory held shards up, which are nothing by themselves: [`Arrears`] adds them up.
//!
//! A front end that punches one small hole after the other has each visit of a shard wait for less than the watchdog minds, for ever.
//! So what a thread waits in a port's memory counts, less [a tenth](PAID_OFF) of the time that passes, and
//! [`HELD_UP_MILLIS`] of that are too much. Until then it costs the port nothing: memory that comes back from swap, is read in or is
//! touched for the first time has shards wait in bursts that are shorter. A tenth is what others lose to one who stays below that, and
//! what a front end may have a session wait while it maps memory, which page faults of others can wait for.
//!
//! What is counted is what the watchdog finds when it looks, as if it had been so since its last look: too much one time, too
//! little another time, and right over many.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::ident::PortIndex;
use crate::limits::HELD_UP_MILLIS;

/// What is owed, for this much of what goes by after it.
const PAID_OFF: u32 = 10;

/// What ports owe. There is an entry only for those in whose memory a thread was found to wait.
#[derive(Default)]
pub(super) struct Arrears(BTreeMap<(PortIndex, Blame), Account>);

/// Whether it was that port's memory that a thread waited in, or may have been another one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Blame {
    Sole,
    Shared,
}

/// Times that a shard was held up, one that goes on or many together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sum {
    pub held: Duration,
    pub times: u32,
}

struct Account {
    owed: Duration,
    at: Instant,
    sum: Sum,
}

impl Account {
    fn pay_off(&mut self, now: Instant) {
        self.owed = self.owed.saturating_sub(now.saturating_duration_since(self.at) / PAID_OFF);
        self.at = now;
    }
}

impl Arrears {
    /// A thread was found to wait there, and has for this long; `goes_on` if it did at the last look as well. Returns all that it
    /// came to if that is too much; then it begins anew.
    pub fn add(&mut self, whose: (PortIndex, Blame), waited: Duration, goes_on: bool, now: Instant) -> Option<Sum> {
        let none = Account { owed: Duration::ZERO, at: now, sum: Sum { held: Duration::ZERO, times: 0 } };
        let account = self.0.entry(whose).or_insert(none);
        account.pay_off(now);
        account.owed += waited;
        account.sum.held += waited;
        account.sum.times = account.sum.times.saturating_add(u32::from(!goes_on)).max(1);
        let sum = account.sum;
        let too_much = account.owed > Duration::from_millis(HELD_UP_MILLIS);
        if too_much {
            self.0.remove(&whose);
        }
        too_much.then_some(sum)
    }

    /// Forgets what has been paid off.
    pub fn settle(&mut self, now: Instant) {
        self.0.retain(|_, account| {
            account.pay_off(now);
            !account.owed.is_zero()
        });
    }

    /// Forgets what `port` owes.
    pub fn forget(&mut self, port: PortIndex) {
        self.0.retain(|&(whose, _), _| whose != port);
    }

    /// Whether nobody owes anything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOK: Duration = Duration::from_millis(5);

    /// Looks for that many seconds, of which so many in a hundred find a thread waiting, each at another place; what it came to, and
    /// after how many looks.
    fn looks(arrears: &mut Arrears, start: Instant, seconds: u32, percent: u32) -> Option<(Sum, u32)> {
        (0..seconds * 200).find_map(|look| {
            let now = start + look * LOOK;
            arrears.settle(now);
            let waits = look * percent / 100 != (look + 1) * percent / 100;
            let sum = waits.then(|| arrears.add((PortIndex(7), Blame::Sole), LOOK, false, now))?;
            Some((sum?, look + 1))
        })
    }

    #[test]
    fn short_times_that_add_up_are_too_much() {
        let start = Instant::now();
        let mut arrears = Arrears::default();
        let (sum, after) = looks(&mut arrears, start, 10, 100).expect("it waits all the time");
        assert!((40..50).contains(&after), "{after} looks");
        assert_eq!(sum, Sum { held: after * LOOK, times: after });
        assert!(arrears.is_empty(), "it begins anew");
        assert!(looks(&mut arrears, start, 60, 20).is_some());
    }

    #[test]
    fn a_burst_and_a_tenth_of_the_time_are_not() {
        let mut start = Instant::now();
        let mut arrears = Arrears::default();
        assert_eq!(looks(&mut arrears, start, 3600, 9), None);
        for _ in 0..10 {
            start += Duration::from_secs(7200);
            arrears.settle(start);
            assert!(arrears.is_empty(), "it is paid off");
            // 190 ms at once.
            let now = (0..38).map(|look| start + look * LOOK);
            let mut sums = now.map(|now| arrears.add((PortIndex(7), Blame::Sole), LOOK, false, now));
            assert!(sums.all(|sum| sum.is_none()));
        }
    }

    #[test]
    fn each_port_and_what_may_be_another_ones_is_counted_by_itself() {
        let (now, most) = (Instant::now(), Duration::from_millis(HELD_UP_MILLIS));
        let mut arrears = Arrears::default();
        for whose in [(PortIndex(1), Blame::Sole), (PortIndex(1), Blame::Shared), (PortIndex(2), Blame::Sole)] {
            assert_eq!(arrears.add(whose, most, false, now), None);
        }
        let sum = arrears.add((PortIndex(1), Blame::Sole), LOOK, true, now);
        assert_eq!(sum, Some(Sum { held: most + LOOK, times: 1 }), "one time that went on");
    }
}
