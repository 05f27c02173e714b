//! From verdicts to deliveries: [`Outbox`] groups a batch by destination and calls each destination's transmit side once.
//!
//! It also does the book-keeping that makes "received = delivered + dropped" true for every port: a frame counts as
//! delivered for its sender once at least one port took it, else as dropped for the reason that the last one gave. What a
//! destination did not take counts there as well, so both ends can see why a frame is missing. A frame that is flooded in
//! several visits ([`crate::frame::Flooding`]) is counted for its sender in the last of them.
//!
//! A destination may hold its notification back and say until when ([`Outcome::hold`]). The outbox remembers such ports, and
//! the shard has them flushed when that is due, which may end its sleep, or when it has nothing else to do.
//!
//! While the watchdog is not sure which of two ports held a shard up, the frames between one of them and others are copied into
//! memory of the shard's own before they are delivered, so that whoever holds it up then does so alone ([`Outbox::copies`]).
//!
//! A pick list per port number is kept ready (264 KiB, of which only the lists of ports that are spoken to are ever in the
//! cache); the destinations of this batch are in `touched`. Nothing is allocated per batch.

use std::sync::Arc;

use arrayvec::ArrayVec;

use super::Tables;
use super::stamp::{Alarm, Phase, Stamp};
use crate::frame::Batch;
use crate::ident::PortIndex;
use crate::limits::{BATCH_FRAMES, PORTS};
use crate::port::{Flush, Outcome, earlier};
use crate::stats::PortCounters;
use crate::verdict::{DropReason, Verdict};

/// The frames of a batch that go to one port, by index, ascending.
#[derive(Clone, Copy)]
struct Picks {
    count: u8,
    /// It is in the list of those that hold notifications back.
    holds: bool,
    list: [u8; BATCH_FRAMES],
}

impl Picks {
    const NONE: Self = Self { count: 0, holds: false, list: [0; BATCH_FRAMES] };

    #[inline]
    fn as_slice(&self) -> &[u8] {
        &self.list[..usize::from(self.count).min(BATCH_FRAMES)]
    }
}

/// Scratch memory for sorting one batch by destination.
pub(super) struct Outbox {
    picks: Box<[Picks]>,
    touched: Vec<PortIndex>,
    outcome: Outcome,
    /// The ports that hold notifications back, each once, and when the first of those is due.
    holding: Vec<PortIndex>,
    due: u64,
    /// All that is held back stays so while the shard has nothing to do.
    patient: bool,
    /// What notifying ports took, beyond what that takes, since somebody asked; the sender's where there is no room for more.
    excess: ArrayVec<(PortIndex, u64), EXCESSES>,
    stamp: Arc<Stamp>,
    alarm: Arc<Alarm>,
}

/// Ports whose notifications may take long in one batch, each 100 us and more.
const EXCESSES: usize = 16;

impl Outbox {
    /// An empty outbox of the shard that stamps this and is watched by who gives this alarm.
    pub fn new(stamp: Arc<Stamp>, alarm: Arc<Alarm>) -> Self {
        Self {
            picks: vec![Picks::NONE; PORTS].into(),
            touched: Vec::with_capacity(PORTS),
            outcome: Outcome::new(),
            holding: Vec::with_capacity(PORTS),
            due: 0,
            patient: false,
            excess: ArrayVec::new_const(),
            stamp,
            alarm,
        }
    }

    /// Delivers what the switch decided for `batch`, which came from `ingress`, and counts it.
    #[inline]
    pub fn deliver(&mut self, tables: &Tables, ingress: PortIndex, batch: &mut Batch<'_>, counters: &[PortCounters]) {
        // Whatever the sender's memory costs is paid before anybody else's ring is locked.
        self.stamp.set(Phase::Reading, ingress);
        batch.port = ingress;
        let copied = self.alarm.probation.is_any() && self.copies(ingress, batch);
        if !copied {
            batch.touch_tails();
        }
        let mut delivered = match sole_destination(batch) {
            Some(port) => {
                let all = EVERY_FRAME.get(..batch.len()).unwrap_or(&EVERY_FRAME);
                self.stamp.set_writing(port, if copied { port } else { ingress });
                let delivered = transmit(tables, port, batch, all, &mut self.outcome, counters);
                self.note_held(port);
                delivered
            }
            None => self.deliver_sorted(tables, ingress, batch, copied, counters),
        };
        if batch.takes_several_visits() {
            delivered |= u64::from(batch.note_flooded(delivered & 1 != 0));
            if batch.is_flooded_in_part() {
                // It is counted when all ports have had it.
                return;
            }
        }
        if let Some(counters) = counters.get(ingress.index()) {
            self.settle(batch, delivered, counters);
        }
    }

    /// Copies what frames carry beyond their heads, if they are of a port that is on probation or may go to one; returns whether it
    /// did.
    #[cold]
    fn copies(&self, ingress: PortIndex, batch: &mut Batch<'_>) -> bool {
        let probation = &self.alarm.probation;
        let suspect = |verdict| match verdict {
            Verdict::Deliver(port) => probation.has(port),
            // One of so many may be.
            Verdict::Flood => true,
            Verdict::Drop(_) | Verdict::Pending => false,
        };
        let copies = probation.has(ingress) || batch.frames().iter().any(|frame| suspect(frame.verdict));
        if copies {
            batch.copy_tails();
        }
        copies
    }

    /// The general case of [`Outbox::deliver`]: several destinations, floods, drops. Returns which frames somebody took.
    fn deliver_sorted(
        &mut self,
        tables: &Tables,
        ingress: PortIndex,
        batch: &Batch<'_>,
        copied: bool,
        counters: &[PortCounters],
    ) -> u64 {
        self.sort(tables, ingress, batch);
        let mut delivered = 0;
        for at in 0..self.touched.len() {
            let port = self.touched[at];
            let picks = self.picks[port.index()].as_slice();
            self.stamp.set_writing(port, if copied { port } else { ingress });
            delivered |= transmit(tables, port, batch, picks, &mut self.outcome, counters);
            self.picks[port.index()].count = 0;
            self.note_held(port);
        }
        self.touched.clear();
        delivered
    }

    /// The cycles that notifying ports took, beyond what that takes, since this was asked last: they are those ports'.
    #[inline]
    pub fn take_excess(&mut self) -> impl Iterator<Item = (PortIndex, u64)> + '_ {
        self.excess.drain(..)
    }

    /// Remembers `port` if it held its notification back, or if that took too long.
    #[inline]
    fn note_held(&mut self, port: PortIndex) {
        if self.outcome.excess > 0 {
            let _ = self.excess.try_push((port, std::mem::take(&mut self.outcome.excess)));
        }
        if let Some(due) = self.outcome.held.take() {
            self.hold(port, due);
        }
    }

    #[cold]
    fn hold(&mut self, port: PortIndex, due: u64) {
        self.patient = false;
        if self.holding.is_empty() || earlier(due, self.due) {
            self.due = due;
        }
        let Some(picks) = self.picks.get_mut(port.index()) else { return };
        if !std::mem::replace(&mut picks.holds, true) {
            self.holding.push(port);
        }
    }

    /// Whether notifications are held back.
    #[inline]
    pub fn is_holding(&self) -> bool {
        !self.holding.is_empty()
    }

    /// When the first notification is due that is held back.
    pub fn due(&self) -> Option<u64> {
        self.is_holding().then_some(self.due)
    }

    /// Sends the notifications that are held back and that `which` names.
    pub fn flush(&mut self, tables: &Tables, which: Flush) {
        match which {
            Flush::Due(now) if earlier(now, self.due) => return,
            Flush::Idle(now) if self.patient && earlier(now, self.due) => return,
            _ => {}
        }
        let Self { picks, holding, due, stamp, .. } = self;
        let mut next: Option<u64> = None;
        holding.retain(|port| {
            stamp.set(Phase::Writing, *port);
            let side = tables.transmit.get(port.index()).and_then(Option::as_ref);
            let Some(left) = side.and_then(|side| side.flush(which)) else {
                picks[port.index()].holds = false;
                return false;
            };
            next = Some(next.map_or(left, |other| if earlier(left, other) { left } else { other }));
            true
        });
        stamp.clear();
        *due = next.unwrap_or(0);
        self.patient = matches!(which, Flush::Idle(_));
    }

    /// Notes each frame in the pick list of each port that it goes to.
    #[inline]
    fn sort(&mut self, tables: &Tables, ingress: PortIndex, batch: &Batch<'_>) {
        for (index, frame) in batch.frames().iter().enumerate() {
            match frame.verdict {
                Verdict::Deliver(port) => self.pick(port, index as u8),
                Verdict::Flood => {
                    self.outcome.refuse(index as u8, DropReason::NoDestination);
                    let members = members(tables, ingress);
                    let ports = members.get(batch.flood_range(index, members.len())).unwrap_or_default();
                    for &port in ports.iter().filter(|&&port| port != ingress) {
                        self.pick(port, index as u8);
                    }
                }
                Verdict::Pending | Verdict::Drop(_) => {}
            }
        }
    }

    #[inline]
    fn pick(&mut self, port: PortIndex, index: u8) {
        let Some(picks) = self.picks.get_mut(port.index()) else { return };
        if picks.count == 0 {
            self.touched.push(port);
        }
        picks.list[usize::from(picks.count) % BATCH_FRAMES] = index;
        picks.count += 1;
    }

    /// Counts what became of the batch for the port that it came from.
    #[inline]
    fn settle(&self, batch: &Batch<'_>, delivered: u64, counters: &PortCounters) {
        if delivered != every_bit(batch.len()) {
            for (index, frame) in batch.frames().iter().enumerate() {
                if delivered & 1 << index == 0 {
                    let reason = self.reason(frame.verdict, index);
                    counters.rx_dropped.add(reason, 1);
                    if frame.verdict == Verdict::Drop(DropReason::MtuExceeded) {
                        note_over_long(counters, frame.wire_len(batch.head(index)));
                    }
                }
            }
        }
        counters.rx_frames.add(batch.len() as u64);
        counters.rx_bytes.add(batch.bytes());
        counters.rx_delivered.add(u64::from(delivered.count_ones()));
        if batch.gso_frames() > 0 {
            counters.rx_gso.add(batch.gso_frames().into());
        }
    }

    /// Why frame `index`, which nobody took, was dropped.
    fn reason(&self, verdict: Verdict, index: usize) -> DropReason {
        match verdict {
            Verdict::Drop(reason) => reason,
            Verdict::Deliver(_) | Verdict::Flood => self.outcome.reasons[index],
            Verdict::Pending => DropReason::NoDestination,
        }
    }
}

/// The port that every frame of the batch goes to, if there is one. Most batches are of one flow, and one comparison a
/// frame is all the sorting that they need.
#[inline]
fn sole_destination(batch: &Batch<'_>) -> Option<PortIndex> {
    let first = batch.frames().first()?.verdict;
    match first {
        Verdict::Deliver(port) if batch.frames().iter().all(|frame| frame.verdict == first) => Some(port),
        _ => None,
    }
}

/// The pick list of a whole batch.
const EVERY_FRAME: [u8; BATCH_FRAMES] = {
    let mut list = [0; BATCH_FRAMES];
    let mut index = 0;
    while index < BATCH_FRAMES {
        list[index] = index as u8;
        index += 1;
    }
    list
};

/// One bit for each of `frames` frames.
#[inline]
fn every_bit(frames: usize) -> u64 {
    u64::MAX.checked_shr((BATCH_FRAMES - frames.min(BATCH_FRAMES)) as u32).unwrap_or(0)
}

/// Gives `port` its frames; returns which of them it took.
#[inline]
fn transmit(
    tables: &Tables,
    port: PortIndex,
    batch: &Batch<'_>,
    picks: &[u8],
    outcome: &mut Outcome,
    counters: &[PortCounters],
) -> u64 {
    (outcome.delivered, outcome.later) = (0, false);
    match tables.transmit.get(port.index()) {
        Some(Some(side)) => side.transmit(batch, picks, outcome),
        _ => outcome.refuse_all(picks, DropReason::NoDestination),
    }
    let Some(counters) = counters.get(port.index()) else { return outcome.delivered };
    let mut bytes = batch.bytes();
    if outcome.delivered != every_bit(batch.len()) {
        bytes = 0;
        for &index in picks {
            if outcome.delivered & 1 << index != 0 {
                bytes += u64::from(batch.frames()[usize::from(index)].len);
            } else {
                let (reason, index) = (outcome.reasons[usize::from(index)], usize::from(index));
                counters.tx_dropped.add(reason, 1);
                if reason == DropReason::MtuExceeded {
                    note_over_long(counters, batch.frames()[index].wire_len(batch.head(index)));
                }
            }
        }
    }
    if batch.gso_frames() | outcome.completed | outcome.merged > 0 {
        bytes = bytes.saturating_sub(count_offloads(batch, picks, outcome, counters));
    }
    if !outcome.later {
        counters.tx_frames.add(u64::from(outcome.delivered.count_ones()));
        counters.tx_bytes.add(bytes);
    }
    outcome.delivered
}

/// Counts what became of frames that were to be segmented or completed, and how many were merged; returns how many bytes the
/// frames that were delivered lack.
#[cold]
fn count_offloads(batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome, counters: &PortCounters) -> u64 {
    let is_whole =
        |&&index: &&u8| outcome.delivered & 1 << index != 0 && batch.frames()[usize::from(index)].needs.is_gso();
    let gso = picks.iter().filter(is_whole).count() as u64;
    let (segmented, completed) = (std::mem::take(&mut outcome.segmented), std::mem::take(&mut outcome.completed));
    counters.tx_gso.add(gso - u64::from(segmented).min(gso));
    counters.tx_segmented.add(segmented.into());
    counters.tx_completed.add(completed.into());
    counters.tx_merged.add(std::mem::take(&mut outcome.merged).into());
    let (segments, bytes) = std::mem::take(&mut outcome.cut);
    counters.tx_segments_dropped.add(segments.into());
    bytes
}

/// Keeps the length of the largest frame that was dropped for the port's MTU: what the MTU would have to be.
#[cold]
fn note_over_long(counters: &PortCounters, bytes: u32) {
    counters.mtu_exceeded_bytes.set(counters.mtu_exceeded_bytes.get().max(bytes.into()));
}

/// The ports of the network that `ingress` is in.
fn members(tables: &Tables, ingress: PortIndex) -> &[PortIndex] {
    let row = tables.switch.port(ingress).and_then(|port| tables.switch.network(port.network));
    row.map_or(&[], |network| &network.members)
}
