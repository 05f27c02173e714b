//! The load itself: one thread that keeps every NIC's transmit rings full and its receive rings empty.
//!
//! A visit to a queue pair is two looks at the switch's indices, and what came back is offered again in bulk, so the
//! price is per bulk and not per frame. Looking costs the switch too, as it takes the line with the index away from it,
//! so a round in which nothing was due is followed by a pause.

#![allow(unsafe_code, reason = "writes addresses into frames that the switch reads")]

use std::time::Duration;

use crate::cycles;
use crate::frames::{self, HEADER};
use crate::nic::Nic;
use crate::ring::Buffer;

/// Entries that are worth a visit.
const BULK: u16 = 64;
/// Spins between two rounds of which the first had nothing to do; about half a microsecond.
const PAUSE: u32 = 16;
/// Frames whose addresses are fetched before they are written.
const AHEAD: u16 = 16;
/// Rounds between two looks at the clock.
const ROUNDS: u32 = 64;

/// What the load did in a span of time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// How long it was.
    pub seconds: f64,
    /// Frames that came out of the switch.
    pub received: u64,
    /// Frames that the switch took.
    pub sent: u64,
    /// Cycles of visits that found something, and of all.
    pub busy_cycles: u64,
    /// Cycles in all.
    pub cycles: u64,
}

impl Figures {
    /// Millions of frames per second.
    pub fn mpps(&self) -> f64 {
        self.received as f64 / self.seconds / 1e6
    }

    /// The generator's own cycles per frame it received.
    pub fn cycles_per_frame(&self) -> f64 {
        self.busy_cycles as f64 / self.received.max(1) as f64
    }

    /// The share of its time that the generator worked, in percent.
    pub fn busy_percent(&self) -> f64 {
        100.0 * self.busy_cycles as f64 / self.cycles.max(1) as f64
    }

    /// Frames that the switch took and did not bring, in percent; those in flight at the edges count either way.
    pub fn lost_percent(&self) -> f64 {
        100.0 * (1.0 - self.received as f64 / self.sent.max(1) as f64).max(0.0)
    }
}

/// Many stations behind each port: every frame that is sent gets the next pair of addresses.
#[derive(Clone, Copy, Debug)]
struct Stations {
    count: u32,
    mask: u32,
    next: u32,
}

impl Stations {
    fn new(count: u32) -> Self {
        Self { count, mask: count.next_power_of_two() - 1, next: 0 }
    }

    /// All numbers below `count`, in an order without one, over and over (Hull and Dobell: full period).
    #[inline]
    fn take(&mut self) -> u32 {
        loop {
            self.next = self.next.wrapping_mul(0x5851_f42d).wrapping_add(0x3039) & self.mask;
            if self.next < self.count {
                return self.next;
            }
        }
    }
}

/// NICs in pairs, each sending to its neighbour.
pub struct Load {
    nics: Vec<Nic>,
    /// For each NIC, if it writes addresses.
    stations: Vec<Option<Stations>>,
    bulk: u16,
}

impl Load {
    /// A load over `nics`, with `stations` addresses behind each, if frames get new ones; offers their first frames.
    pub fn new(nics: Vec<Nic>, stations: Option<u32>) -> Self {
        let smallest = nics.iter().flat_map(|nic| &nic.pairs).map(|pair| pair.transmit.place().0).min().unwrap_or(0);
        let stations = nics.iter().map(|_| stations.map(Stations::new)).collect();
        let mut load = Self { nics, stations, bulk: BULK.min(smallest / 4).max(1) };
        for (nic, stations) in load.nics.iter_mut().zip(&mut load.stations) {
            for pair in 0..nic.pairs.len() {
                let size = nic.pairs[pair].transmit.place().0;
                readdress(nic, pair, size, stations);
                nic.pairs[pair].transmit.offer(size);
                nic.pairs[pair].kick_transmit();
            }
        }
        load
    }

    /// Its NICs, to be connected again.
    pub fn nics(&mut self) -> &mut [Nic] {
        &mut self.nics
    }

    /// Whether all memory is on huge pages.
    pub fn is_huge(&self) -> bool {
        self.nics.iter().all(|nic| nic.memory.is_huge())
    }

    /// Frames that each NIC has to send until all of its stations were heard.
    pub fn stations(&self) -> u64 {
        self.stations.iter().flatten().map(|stations| u64::from(stations.count)).max().unwrap_or(1)
    }

    /// Keeps the switch busy for `span`, and on until `frames` were sent.
    pub fn run(&mut self, span: Duration, frames: u64, stop: impl Fn() -> bool) -> Figures {
        let mut figures = Figures::default();
        let start = cycles::now();
        let length = cycles::of(span);
        loop {
            for _ in 0..ROUNDS {
                if !self.round(&mut figures) {
                    (0..PAUSE).for_each(|_| std::hint::spin_loop());
                }
            }
            figures.cycles = cycles::now() - start;
            if (figures.cycles >= length && figures.sent >= frames) || stop() {
                break;
            }
        }
        figures.seconds = figures.cycles as f64 / cycles::per_second();
        figures
    }

    /// Visits every pair once; whether any had something.
    #[inline]
    pub fn round(&mut self, figures: &mut Figures) -> bool {
        let mut any = false;
        for (nic, stations) in self.nics.iter_mut().zip(&mut self.stations) {
            for index in 0..nic.pairs.len() {
                let pair = &mut nic.pairs[index];
                let (receive, transmit) =
                    (pair.receive.has_completed(self.bulk), pair.transmit.has_completed(self.bulk));
                if !receive && !transmit {
                    continue;
                }
                let start = cycles::now();
                if receive {
                    let count = pair.receive.completed();
                    pair.receive.recycle(count);
                    pair.kick_receive();
                    figures.received += u64::from(count);
                }
                if transmit {
                    let count = pair.transmit.completed();
                    readdress(nic, index, count, stations);
                    let pair = &mut nic.pairs[index];
                    pair.transmit.recycle(count);
                    pair.kick_transmit();
                    figures.sent += u64::from(count);
                }
                figures.busy_cycles += cycles::now() - start;
                any = true;
            }
        }
        any
    }
}

/// Has the processor fetch the line at `address` for writing.
#[inline]
fn fetch_to_write(address: *mut u32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that changes nothing a program can see, and a no-op where it is not known. By hand, because the
    // intrinsic becomes a fetch for reading unless the whole program is built for processors with PRFCHW.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Writes new addresses into the `count` frames that pair `index` sends next.
#[inline]
fn readdress(nic: &Nic, index: usize, count: u16, stations: &mut Option<Stations>) {
    let Some(stations) = stations else { return };
    let pair = &nic.pairs[index];
    let frame_of = |nth: u16| {
        let Buffer { offset, .. } = nic.slots[index][usize::from(pair.transmit.next_slot(nth))];
        nic.memory.at(offset + HEADER).cast::<u32>()
    };
    for nth in 0..count {
        // The line is in the switch's cache, some 100 cycles away.
        fetch_to_write(frame_of(nth.saturating_add(AHEAD)));
        let station = stations.take();
        let (to, from) = (frames::mac(nic.port ^ 1, station), frames::mac(nic.port, station));
        let words = [
            u32::from_ne_bytes([to[0], to[1], to[2], to[3]]),
            u32::from_ne_bytes([to[4], to[5], from[0], from[1]]),
            u32::from_ne_bytes([from[2], from[3], from[4], from[5]]),
        ];
        let frame = frame_of(nth);
        for (at, word) in words.into_iter().enumerate() {
            // SAFETY: the first twelve bytes of a frame of at least 60, aligned to 4 as buffers are to 64 and the header
            // is 12; the switch has given the buffer back, so nobody reads it now.
            unsafe { frame.add(at).write_volatile(word) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_station_speaks_once_a_round() {
        for count in [2, 3, 1000, 1 << 16] {
            let mut stations = Stations::new(count);
            let heard: HashSet<_> = (0..count).map(|_| stations.take()).collect();
            assert_eq!(heard.len(), count as usize);
        }
    }
}
