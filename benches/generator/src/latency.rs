//! Round trips: one frame from A to B, whose driver answers at once with one of its own, and back to A.
//!
//! Both drivers are this thread, which polls both rings, so what is measured is the switch: twice its way from a transmit
//! ring to a receive ring, with the kick and the wake-up where it sleeps. With [`Wait::Interrupt`] a driver looks at its
//! ring only after the switch has rung its bell, which adds what moderation of notifications costs, but no guest's exits.

use std::time::Duration;

use crate::cycles;
use crate::load::Load;
use crate::nic::{Nic, Pair};

/// A frame that took longer than this was dropped.
const LOST: Duration = Duration::from_millis(200);
/// Looks at the rings between two rounds of a load beside it.
const LOOKS: u32 = 4;

/// How a driver learns that a frame came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Wait {
    /// It looks all the time.
    Poll,
    /// It is told.
    Interrupt,
}

/// What to send.
#[derive(Clone, Copy, Debug)]
pub struct Pings {
    /// From one answer to the next ping; none for one that is always in flight.
    pub gap: Duration,
    /// How long.
    pub span: Duration,
    /// How drivers wait.
    pub wait: Wait,
}

/// How long round trips took.
#[derive(Clone, Debug, Default)]
pub struct Trips {
    /// Each, in the order of time, in nanoseconds.
    pub nanoseconds: Vec<u32>,
    /// Frames that did not come back.
    pub lost: u64,
}

impl Trips {
    /// The duration in microseconds that the share `quantile` of all trips stayed within; `None` if there were none.
    pub fn quantile(sorted: &[u32], quantile: f64) -> Option<f64> {
        let last = sorted.len().checked_sub(1)?;
        let at = ((sorted.len() as f64 * quantile).ceil() as usize).saturating_sub(1).min(last);
        Some(f64::from(sorted[at]) / 1e3)
    }

    /// All, the fastest first.
    pub fn sorted(&self) -> Vec<u32> {
        let mut sorted = self.nanoseconds.clone();
        sorted.sort_unstable();
        sorted
    }
}

/// Pings between the first two of `nics`, with `load` on others beside them.
pub fn ping(nics: &mut [Nic], mut load: Option<&mut Load>, pings: &Pings, stop: impl Fn() -> bool) -> Trips {
    let [a, b, ..] = nics else { return Trips::default() };
    if pings.wait == Wait::Interrupt {
        a.pairs[0].want_interrupts();
        b.pairs[0].want_interrupts();
    }
    let (mut trips, mut figures) = (Trips::default(), Default::default());
    let per_nanosecond = cycles::per_second() / 1e9;
    let (gap, lost) = (cycles::of(pings.gap), cycles::of(LOST));
    let end = cycles::now() + cycles::of(pings.span);
    while cycles::now() < end && !stop() {
        let start = cycles::now();
        send(&mut a.pairs[0]);
        let mut back = None;
        while back.is_none() && cycles::now() - start < lost {
            if let Some(load) = &mut load {
                load.round(&mut figures);
            }
            for _ in 0..LOOKS {
                if arrived(&mut b.pairs[0], pings.wait) {
                    send(&mut b.pairs[0]);
                }
                if arrived(&mut a.pairs[0], pings.wait) {
                    back = Some(cycles::now());
                    break;
                }
            }
        }
        match back {
            Some(back) => trips.nanoseconds.push(((back - start) as f64 / per_nanosecond) as u32),
            None => trips.lost += 1,
        }
        let next = start + gap;
        while cycles::now() < next {
            match &mut load {
                Some(load) => {
                    load.round(&mut figures);
                }
                None => std::hint::spin_loop(),
            }
        }
    }
    trips
}

/// Sends one frame, of a buffer that came back or was never sent.
fn send(pair: &mut Pair) {
    let done = pair.transmit.completed();
    pair.transmit.take(done);
    pair.transmit.offer(1);
    pair.kick_transmit();
}

/// Whether a frame is there; its buffer is offered again.
fn arrived(pair: &mut Pair, wait: Wait) -> bool {
    if wait == Wait::Interrupt && !pair.was_interrupted() {
        return false;
    }
    let count = pair.receive.completed();
    if count > 0 {
        pair.receive.recycle(count);
        pair.kick_receive();
    }
    count > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_seen() {
        let trips = Trips { nanoseconds: (1..=1000).rev().map(|n| n * 1000).collect(), lost: 0 };
        let sorted = trips.sorted();
        let quantile = |q| Trips::quantile(&sorted, q);
        assert_eq!([0.5, 0.99, 0.999, 1.0].map(quantile), [500.0, 990.0, 999.0, 1000.0].map(Some));
        assert_eq!(Trips::quantile(&[], 0.5), None);
    }
}
