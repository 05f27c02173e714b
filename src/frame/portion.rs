//! What of a batch is dealt with in one visit of its queue, and how far a frame is that takes several: [`Flooding`].
//!
//! A batch borrows its frames from their sender, so none of it can wait. What is too much for one visit stays where it came
//! from: the batch is cut ([`Batch::cut`]), and its queue gives back the frames that are not in it any more. A frame that alone
//! is too much, because it goes to very many ports, goes to some of them in each of several visits
//! ([`Batch::flood_in_part`]); its queue keeps it until then, first in line, and remembers how far it is.

use std::ops::Range;

use super::Batch;
use crate::ident::MacAddr;

/// How far the first frame of a queue is, if it takes several visits to be flooded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flooding {
    /// Of the ports in its network those before this one, by their place in the network's list, have been served.
    pub next: u16,
    /// One of them took it.
    pub delivered: bool,
    /// What it was held against the port's bounds as: where it goes, and how many frames it is on the wire. The sender may have
    /// put another frame in its place since.
    pub held_as: (MacAddr, u32),
}

impl Default for Flooding {
    /// Not begun.
    fn default() -> Self {
        Self { next: 0, delivered: false, held_as: (MacAddr([0; 6]), 0) }
    }
}

/// What of a batch is dealt with, by the batch.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Portion {
    /// The queue can take back what is not dealt with.
    divisible: bool,
    /// How far the first frame is, before this visit and after it.
    flooding: Flooding,
    /// The ports that the first frame goes to in this visit end before this one; 0 if it goes to all that are left.
    end: u16,
    work: u32,
}

impl Batch<'_> {
    /// Says that the queue takes back what is not dealt with, and how far its first frame is. To be called before anybody
    /// decides; see [`Batch::dealt_with`] for afterwards.
    #[inline]
    pub fn make_divisible(&mut self, flooding: Flooding) {
        self.portion = Portion { divisible: true, flooding, ..Portion::default() };
    }

    /// Whether the queue takes back what is not dealt with.
    #[inline]
    pub fn is_divisible(&self) -> bool {
        self.portion.divisible
    }

    /// How far the first frame is.
    #[inline]
    pub fn flooding(&self) -> Flooding {
        self.portion.flooding
    }

    /// Whether some ports have had the first frame in an earlier visit.
    #[inline]
    pub fn is_begun(&self) -> bool {
        self.portion.flooding.next > 0
    }

    /// Has only the first `frames` frames dealt with in this visit. Never inline: that is the exception, in the middle of the hot loop.
    #[inline(never)]
    pub fn cut(&mut self, frames: usize) {
        for frame in self.frames.drain(frames.min(self.frames.len())..) {
            self.bytes -= u64::from(frame.len);
            self.gso -= u32::from(frame.needs.is_gso());
        }
    }

    /// Has only the first frame dealt with, which was held against the port's bounds as `held_as`, and given to no port from
    /// place `end` of its network's list on.
    pub fn flood_in_part(&mut self, end: u16, held_as: (MacAddr, u32)) {
        self.cut(1);
        self.portion.end = end;
        self.portion.flooding.held_as = held_as;
    }

    /// Forgets that the first frame was begun: it is another one now.
    pub fn begin_anew(&mut self) {
        self.portion.flooding = Flooding::default();
    }

    /// Notes what the visit comes to at most, in frames written: see [`crate::limits::VISIT_WORK`].
    pub fn note_work(&mut self, work: u32) {
        self.portion.work = work;
    }

    /// What the visit comes to at most, as far as it is more than a batch of frames to one port each.
    #[inline]
    pub fn work(&self) -> u32 {
        self.portion.work
    }

    /// Which ports a frame of the batch is flooded to in this visit, by place in the network's list, which has `members`.
    #[inline]
    pub fn flood_range(&self, index: usize, members: usize) -> Range<usize> {
        let Portion { flooding, end, .. } = self.portion;
        match (index, end) {
            (0, 0) => usize::from(flooding.next).min(members)..members,
            (0, end) => usize::from(flooding.next).min(members)..usize::from(end).min(members),
            _ => 0..members,
        }
    }

    /// Whether the first frame, the only one, has still other ports to go to after this visit.
    #[inline]
    pub fn is_flooded_in_part(&self) -> bool {
        self.portion.end > 0
    }

    /// Whether the first frame is flooded in several visits, of which this is one.
    #[inline]
    pub fn takes_several_visits(&self) -> bool {
        self.portion.flooding.next > 0 || self.portion.end > 0
    }

    /// Notes that this visit's part of a first frame that takes several visits is done, and whether a port took it. Returns
    /// whether one did in any visit so far.
    pub fn note_flooded(&mut self, delivered: bool) -> bool {
        let Portion { flooding, end, .. } = &mut self.portion;
        let delivered = delivered || flooding.delivered;
        *flooding = if *end > 0 { Flooding { next: *end, delivered, ..*flooding } } else { Flooding::default() };
        delivered
    }

    /// How many frames of the batch its queue may complete: all that are left of it, none if the first needs further visits.
    #[inline]
    pub fn dealt_with(&self) -> usize {
        if self.is_flooded_in_part() { 0 } else { self.frames.len() }
    }
}
