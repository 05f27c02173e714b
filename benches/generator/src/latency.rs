//! Round trips: one frame from A to B, whose driver answers at once with one of its own, and back to A.
//!
//! Both drivers are this thread, which polls both rings, so what is measured is the switch: twice its way from a transmit
//! ring to a receive ring, with the kick and the wake-up where it sleeps. With [`Wait::Interrupt`] a driver looks at its
//! ring only after the switch has rung its bell, which adds what moderation of notifications costs, but no guest's exits.
//! Each ping has a number, which B's driver copies into its answer.

use std::time::Duration;

use crate::cycles;
use crate::frames::{HEADER, HEADERS};
use crate::load::{Figures, Load};
use crate::nic::Nic;

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

/// Two NICs, with a load on others beside them.
pub struct Pinger<'a> {
    nics: &'a mut [Nic; 2],
    load: Option<&'a mut Load>,
    wait: Wait,
    /// The driver was interrupted, and may look until its ring is empty.
    told: [bool; 2],
    /// Of the last ping.
    number: u64,
    figures: Figures,
}

impl<'a> Pinger<'a> {
    /// Nothing is sent yet.
    pub fn new(nics: &'a mut [Nic; 2], load: Option<&'a mut Load>, wait: Wait) -> Self {
        if wait == Wait::Interrupt {
            nics.iter_mut().for_each(|nic| nic.pairs[0].want_interrupts());
        }
        Self { nics, load, wait, told: [true; 2], number: 0, figures: Figures::default() }
    }

    /// Sends `pings` until their time is over.
    pub fn run(&mut self, pings: &Pings, stop: impl Fn() -> bool) -> Trips {
        let mut trips = Trips::default();
        let per_nanosecond = cycles::per_second() / 1e9;
        let gap = cycles::of(pings.gap);
        let end = cycles::now() + cycles::of(pings.span);
        while cycles::now() < end && !stop() {
            let start = cycles::now();
            self.number += 1;
            send(&mut self.nics[0], self.number);
            match self.answer(start + cycles::of(LOST)) {
                Some(back) => trips.nanoseconds.push(((back - start) as f64 / per_nanosecond) as u32),
                None => trips.lost += 1,
            }
            let next = start + gap;
            while cycles::now() < next {
                self.load_round();
            }
        }
        trips
    }

    /// When the answer to the last ping came, if it did before `end`; late answers to others are let go.
    fn answer(&mut self, end: u64) -> Option<u64> {
        loop {
            for _ in 0..LOOKS {
                if let Some(number) = self.arrival(1) {
                    send(&mut self.nics[1], number);
                }
                if self.arrival(0) == Some(self.number) {
                    return Some(cycles::now());
                }
            }
            self.load_round();
            if cycles::now() > end {
                return None;
            }
        }
    }

    /// The number of the next frame that came to NIC `at`, whose buffer is offered again.
    fn arrival(&mut self, at: usize) -> Option<u64> {
        let nic = &mut self.nics[at];
        if self.wait == Wait::Interrupt && !self.told[at] {
            self.told[at] = nic.pairs[0].was_interrupted();
            if !self.told[at] {
                return None;
            }
        }
        if !nic.pairs[0].receive.has_completed(1) {
            self.told[at] = false;
            return None;
        }
        let slot = nic.pairs[0].receive.completion(0).map(|(slot, _)| usize::from(slot));
        let mut number = [0; 8];
        if let Some(buffer) = slot.map(|slot| nic.receive_slots[0][slot]) {
            nic.memory.read(buffer.offset + HEADER + HEADERS, &mut number);
        }
        nic.pairs[0].receive.recycle(1);
        nic.pairs[0].kick_receive();
        Some(u64::from_le_bytes(number))
    }

    fn load_round(&mut self) {
        if let Some(load) = &mut self.load {
            load.round(&mut self.figures);
        }
    }
}

/// Sends one frame with `number` in it, of a buffer that came back or was never sent.
fn send(nic: &mut Nic, number: u64) {
    let pair = &mut nic.pairs[0];
    let done = pair.transmit.completed();
    pair.transmit.take(done);
    let buffer = nic.slots[0][usize::from(pair.transmit.next_slot(0))];
    nic.memory.write(buffer.offset + HEADER + HEADERS, &number.to_le_bytes());
    pair.transmit.offer(1);
    pair.kick_transmit();
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
