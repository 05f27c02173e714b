//! The load with every frame checked: each carries its sender, a sequence number, filling made from that, and a checksum
//! over all of it; receivers look at every byte, at the order, and at which buffer came back.
//!
//! Slow, as it touches everything, and so not for figures: it is what says that the fast load, which looks at nothing,
//! counts frames that really came over.

use std::time::{Duration, Instant};

use crate::frames::{self, HEADER, HEADERS};
use crate::nic::Nic;

/// Where the sender and number of a frame stand, and the checksum after it.
const TAG: usize = HEADERS;
const SUM: usize = HEADERS + 8;
const FILLING: usize = HEADERS + 16;

/// How long nothing comes before what is missing counts as lost.
const QUIET: Duration = Duration::from_millis(300);

/// How long a switch may take nothing of what it was offered, on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Frames that the switch took.
    pub sent: u64,
    /// Frames that came to whom they were for.
    pub received: u64,
    /// Frames whose number was passed over, or that never came.
    pub lost: u64,
    /// Frames with a wrong byte, length or header.
    pub corrupt: u64,
    /// Frames that came after a later one of the same queue.
    pub misordered: u64,
    /// Frames for others: floods, before addresses are known.
    pub strays: u64,
    /// Buffers that did not come back in the order in which they were offered.
    pub shuffled: u64,
}

impl Findings {
    /// Whether nothing but drops happened, and no more of those than `dropped`.
    pub fn is_clean(&self, dropped: Option<u64>) -> bool {
        self.corrupt == 0
            && self.misordered == 0
            && self.shuffled == 0
            && dropped.is_none_or(|dropped| self.lost <= dropped)
    }
}

/// A verified load over some NICs.
pub struct Verifier {
    nics: Vec<Nic>,
    sizes: frames::Sizes,
    /// Of each port's queues: the number of the next frame to write, and the one expected next by its receiver.
    written: Vec<Vec<u64>>,
    expected: Vec<Vec<u64>>,
    findings: Findings,
    frame: Vec<u8>,
}

impl Verifier {
    /// Offers the first frames.
    pub fn new(nics: Vec<Nic>, sizes: frames::Sizes) -> Self {
        let zeroes: Vec<_> = nics.iter().map(|nic| vec![0; nic.pairs.len()]).collect();
        let mut this = Self {
            nics,
            sizes,
            written: zeroes.clone(),
            expected: zeroes,
            findings: Findings::default(),
            frame: vec![0; HEADER + sizes.longest() + 64],
        };
        for port in 0..this.nics.len() {
            for queue in 0..this.nics[port].pairs.len() {
                let size = this.nics[port].pairs[queue].transmit.place().0;
                this.send(port, queue, size);
            }
        }
        this
    }

    /// Sends for `span`, then receives what is under way.
    pub fn run(mut self, span: Duration, stop: impl Fn() -> bool) -> Findings {
        let end = Instant::now() + span;
        let mut last = Instant::now();
        while !stop() {
            let sending = Instant::now() < end;
            if self.round(sending) {
                last = Instant::now();
            } else if !sending && last.elapsed() > if self.all_taken() { QUIET } else { PATIENCE } {
                break;
            }
        }
        // What was lost at the very end has no successor that shows the gap.
        self.findings.lost = self.findings.sent - self.findings.received.min(self.findings.sent);
        self.findings
    }

    /// Whether the switch has taken every frame.
    fn all_taken(&self) -> bool {
        self.nics.iter().flat_map(|nic| &nic.pairs).all(|pair| pair.transmit.outstanding() == 0)
    }

    fn round(&mut self, sending: bool) -> bool {
        let mut any = false;
        for port in 0..self.nics.len() {
            for queue in 0..self.nics[port].pairs.len() {
                let pair = &self.nics[port].pairs[queue];
                let (came, gone) = (pair.receive.completed(), pair.transmit.completed());
                any |= came > 0 || gone > 0;
                self.receive(port, queue, came);
                for nth in 0..gone {
                    let ring = &self.nics[port].pairs[queue].transmit;
                    let wrong = ring.completion(nth).is_some_and(|(slot, _)| slot != ring.taken_slot(nth));
                    self.findings.shuffled += u64::from(wrong);
                }
                self.findings.sent += u64::from(gone);
                self.nics[port].pairs[queue].transmit.take(gone);
                if sending && gone > 0 {
                    self.send(port, queue, gone);
                }
            }
        }
        any
    }

    /// Writes and offers `count` frames.
    fn send(&mut self, port: usize, queue: usize, count: u16) {
        let nic = &mut self.nics[port];
        for nth in 0..count {
            let slot = usize::from(nic.pairs[queue].transmit.next_slot(nth));
            let number = self.written[port][queue];
            self.written[port][queue] += 1;
            let mut frame = frames::udp(
                frames::mac(port ^ 1, 0),
                frames::mac(port, 0),
                queue as u16,
                nic.slots[queue][slot].len as usize - HEADER,
            );
            fill(&mut frame, tag(port, queue, number));
            nic.memory.write(nic.slots[queue][slot].offset + HEADER, &frame);
        }
        nic.pairs[queue].transmit.offer(count);
        nic.pairs[queue].kick_transmit();
    }

    fn receive(&mut self, port: usize, queue: usize, count: u16) {
        for nth in 0..count {
            let ring = &self.nics[port].pairs[queue].receive;
            let expected = ring.taken_slot(nth);
            let Some((slot, len)) = ring.completion(nth) else {
                self.findings.corrupt += 1;
                continue;
            };
            self.findings.shuffled += u64::from(slot != expected);
            let len = (len as usize).min(self.frame.len());
            let nic = &self.nics[port];
            nic.memory.read(nic.receive_slots[queue][usize::from(slot)].offset, &mut self.frame[..len]);
            self.judge(port, len);
        }
        if count > 0 {
            let pair = &mut self.nics[port].pairs[queue];
            pair.receive.recycle(count);
            pair.kick_receive();
        }
    }

    /// Looks at the first `len` bytes of `self.frame`, which came to `port`.
    fn judge(&mut self, port: usize, len: usize) {
        let Some(frame) = self.frame[..len].get(HEADER..).filter(|frame| frame.len() >= FILLING) else {
            self.findings.corrupt += 1;
            return;
        };
        if frame[..6] != frames::mac(port, 0) {
            self.findings.strays += 1;
            return;
        }
        let tag = word(frame, TAG);
        let (from, queue, number) = ((tag >> 48) as usize, (tag >> 40 & 0xff) as usize, tag & 0xff_ffff_ffff);
        let known = from == port ^ 1 && self.expected.get(from).is_some_and(|queues| queue < queues.len());
        // Flags and segmentation: none; one buffer.
        let header = self.frame[..2] == [0, 0] && self.frame[10..12] == [1, 0];
        let ring = self.nics.get(from).map_or(1, |nic| u64::from(nic.pairs[0].transmit.place().0));
        let right_length = frame.len() == self.sizes.of((number % ring) as usize);
        if !known || !header || !right_length || word(frame, SUM) != sum(frame) {
            self.findings.corrupt += 1;
            return;
        }
        self.findings.received += 1;
        let expected = &mut self.expected[from][queue];
        if number < *expected {
            self.findings.misordered += 1;
        } else {
            *expected = number + 1;
        }
    }
}

fn tag(port: usize, queue: usize, number: u64) -> u64 {
    (port as u64) << 48 | (queue as u64) << 40 | number
}

/// Puts tag, filling and checksum into a frame that has its headers.
fn fill(frame: &mut [u8], tag: u64) {
    frame[TAG..SUM].copy_from_slice(&tag.to_le_bytes());
    let mut state = tag | 1 << 63;
    for chunk in frame[FILLING..].chunks_mut(8) {
        // Marsaglia's xorshift: other bytes for each frame, so that an old frame's rest shows.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let bytes = state.to_le_bytes();
        let len = chunk.len();
        chunk.copy_from_slice(&bytes[..len]);
    }
    let sum = sum(frame);
    frame[SUM..FILLING].copy_from_slice(&sum.to_le_bytes());
}

/// FNV-1a, by words, over all but the checksum.
fn sum(frame: &[u8]) -> u64 {
    let mix = |sum: u64, chunk: &[u8]| {
        let mut bytes = [0; 8];
        bytes[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(bytes)).wrapping_mul(0x0100_0000_01b3).rotate_left(29)
    };
    let start = frame[..SUM].chunks(8).fold(0xcbf2_9ce4_8422_2325, mix);
    frame[FILLING..].chunks(8).fold(start, mix)
}

fn word(frame: &[u8], at: usize) -> u64 {
    frame[at..at + 8].iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_flipped_bit_shows() {
        let mut frame = frames::udp([2; 6], [4; 6], 0, 77);
        fill(&mut frame, tag(3, 2, 1));
        assert_eq!(word(&frame, SUM), sum(&frame));
        assert_eq!(word(&frame, TAG), 3 << 48 | 2 << 40 | 1);
        for bit in 0..frame.len() * 8 {
            frame[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(word(&frame, SUM), sum(&frame), "bit {bit}");
            frame[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn drops_are_clean_as_long_as_the_switch_owns_up_to_them() {
        let lossy = Findings { sent: 10, received: 8, lost: 2, ..Findings::default() };
        assert!(lossy.is_clean(Some(2)) && !lossy.is_clean(Some(1)));
        assert!(!Findings { corrupt: 1, ..lossy }.is_clean(Some(2)));
    }
}
