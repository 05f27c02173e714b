//! Frames for a guest: its receive rings, as the [`Transmit`] side of the port.
//!
//! For each frame there is one chain of guest buffers in the common case, and the frame is written into its only piece:
//! header and head in one copy of constant size, the tail in another, straight from the sender's memory. Scattered buffers,
//! a frame over several chains with VIRTIO_NET_F_MRG_RXBUF and the 10-byte header take the slower way through a `Cursor`;
//! frames that need what the guest cannot do are made complete in [`rewrite`], and segments that it would rather have in one
//! frame are merged in [`merge`]. The used index is published once for all frames, and the guest interrupted at most once.
//!
//! A guest that uses several queue pairs has frames spread over them by flow ([`super::steering`]); a flow keeps its order,
//! because it stays on its queue.

mod buffers;
mod merge;
mod rewrite;

use std::sync::Arc;
use std::time::Duration;

use arrayvec::ArrayVec;

use self::buffers::Buffers;
use self::rewrite::Rewrites;
use super::queue::{Queue, Running};
use super::steering::Steering;
use crate::frame::{Batch, Frame, Head, Needs};
use crate::limits::{BATCH_FRAMES, HEAD_BYTES, VNET_HEADER_BYTES};
use crate::mem::Span;
use crate::offload::Merger;
use crate::port::{Flush, Outcome, Transmit, earlier};
use crate::ring::{DeviceRing, Ring, RingFault};
use crate::verdict::DropReason;

/// The transmit side of a vNIC: the guest's receive rings, by queue pair.
pub(super) struct TransmitSide {
    rings: Vec<Arc<Queue>>,
    steering: Arc<Steering>,
}

impl TransmitSide {
    /// The transmit side over the guest's receive rings, one per queue pair.
    pub fn new(rings: Vec<Arc<Queue>>, steering: Arc<Steering>) -> Self {
        Self { rings, steering }
    }

    /// How many rings the guest uses: always the first ones (virtio 1.3, 5.1.6.5.5).
    #[inline]
    fn ready(&self) -> usize {
        self.rings.iter().take_while(|ring| ring.is_ready()).count()
    }

    /// Spreads the frames over the `ready` rings by flow and gives each ring its own, in their order. The rings share one
    /// budget for walking long chains: they are one guest's, and somebody else's frames pay.
    fn spread(&self, ready: usize, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        let (mut queues, now) = ([0u8; BATCH_FRAMES], self.steering.now());
        for &pick in picks {
            queues[usize::from(pick) % BATCH_FRAMES] = self.queue_for(ready, batch, pick, now) as u8;
        }
        let mut steps = 0;
        let mut left = picks.iter().fold(0u64, |left, &pick| left | 1 << (pick % 64));
        let mut own = ArrayVec::<u8, BATCH_FRAMES>::new_const();
        while left != 0 {
            let queue = queues[left.trailing_zeros() as usize % BATCH_FRAMES];
            own.clear();
            own.extend(picks.iter().copied().filter(|&pick| queues[usize::from(pick) % BATCH_FRAMES] == queue));
            own.iter().for_each(|&pick| left &= !(1 << (pick % 64)));
            if let Some(ring) = self.rings.get(usize::from(queue)) {
                transmit_to(ring, batch, &own, outcome, &mut steps);
            }
        }
    }

    /// The ring of frame `pick`: that of its flow; a flow that is new gets the first that nobody is in, from the one on that
    /// its hash says.
    fn queue_for(&self, ready: usize, batch: &Batch<'_>, pick: u8, now: u32) -> usize {
        let (index, frame) = (usize::from(pick), &batch.frames()[usize::from(pick)]);
        let head = batch.head(index).frame();
        let hash = self.steering.hash(head.get(..usize::from(frame.head_len)).unwrap_or(head));
        if let Some(queue) = self.steering.queue(hash, ready, now) {
            return queue;
        }
        let first = hash as usize % ready;
        let free = (first..ready).chain(0..first).find(|&queue| self.rings[queue].try_lock().is_some());
        let queue = free.unwrap_or(first);
        self.steering.note(hash, queue, now);
        queue
    }
}

impl Transmit for TransmitSide {
    fn transmit(&self, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        if self.steering.is_needed() {
            let ready = self.ready();
            self.steering.set_ready(ready);
            if ready > 1 {
                return self.spread(ready, batch, picks, outcome);
            }
        }
        match self.rings.first() {
            Some(ring) => transmit_to(ring, batch, picks, outcome, &mut 0),
            None => outcome.refuse_all(picks, DropReason::LinkDown),
        }
    }

    fn flush(&self, which: Flush) -> Option<u64> {
        let due = self.rings.iter().filter_map(|ring| ring.flush(which));
        due.reduce(|a, b| if earlier(b, a) { b } else { a })
    }

    fn hold_up(&self, held: Duration, times: u32, bar: bool, again: bool) {
        if let Some(ring) = self.rings.first() {
            ring.docket().hold_up(held, times, bar, again);
        }
    }
}

/// Gives the picked frames to the guest through one ring. `steps` is how many descriptors of long chains were walked for this
/// batch so far.
#[inline]
fn transmit_to(queue: &Queue, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome, steps: &mut usize) {
    let Some(mut state) = queue.enter(batch.bytes()) else {
        return outcome.refuse_all(picks, DropReason::ReceiverBusy);
    };
    let (enabled, settings) = (state.enabled, queue.settings());
    let Some(running) = state.running.as_mut().filter(|_| enabled) else {
        let faulted = state.fault.is_some();
        return outcome.refuse_all(picks, if faulted { DropReason::RingFaulted } else { DropReason::LinkDown });
    };
    if running.is_lost() {
        return outcome.refuse_all(picks, DropReason::RingFaulted);
    }
    let (before, cut) = (outcome.delivered, outcome.cut);
    let accepts = running.accepts(settings);
    let form = Form {
        header: running.header,
        mergeable: running.mergeable,
        accepts,
        longest: settings.longest(),
        merges: settings.merges() && !Needs::MERGED.within(accepts).is_none(),
    };
    let delivered = deliver(running, form, batch, picks, outcome, steps);
    // What came before a fault has been written and is the guest's.
    let frames = (outcome.delivered ^ before).count_ones();
    let mut due = state.publish_frames(frames);
    if (frames as usize != picks.len() || outcome.cut != cut) && due.is_some() {
        // It is short of buffers: only the interrupt that was held back makes it post more.
        due = state.flush(Flush::All);
    }
    queue.note_held(due.is_some());
    if let Some(due) = due {
        outcome.hold(due);
    }
    outcome.excess += state.take_excess();
    if let Err(fault) = delivered {
        let lost = picks.iter().filter(|&&pick| outcome.delivered & 1 << (pick % 64) == 0);
        lost.for_each(|&pick| outcome.reasons[usize::from(pick) % BATCH_FRAMES] = DropReason::RingFaulted);
        queue.fail(&mut state, fault);
    }
}

/// Writes the picked frames into the ring and completes their chains; the caller publishes.
fn deliver(
    running: &mut Running,
    form: Form,
    batch: &Batch<'_>,
    picks: &[u8],
    outcome: &mut Outcome,
    steps: &mut usize,
) -> Result<(), RingFault> {
    let Running { ring, memory, log, .. } = running;
    let buffers = Buffers::new(memory, log.as_deref(), *steps);
    let mut delivery = Delivery { form, buffers, batch, outcome, dry: false, rewrites: Rewrites::new(form) };
    let delivered = match ring {
        Ring::Split(ring) => delivery.run(ring, picks),
        Ring::Packed(ring) => delivery.run(ring, picks),
    };
    *steps = delivery.buffers.steps;
    delivered
}

/// How a guest takes frames.
#[derive(Clone, Copy)]
struct Form {
    /// Bytes of the virtio-net header.
    header: usize,
    /// A frame may span several chains.
    mergeable: bool,
    /// What of offloads it can do.
    accepts: Needs,
    /// Bytes of the longest untagged frame within the port's MTU.
    longest: u32,
    /// It takes segments that came one by one in one frame.
    merges: bool,
}

impl Form {
    /// Most chains that one frame may span.
    fn most(self) -> usize {
        if self.mergeable { BATCH_FRAMES } else { 1 }
    }
}

/// A batch on its way into one ring.
struct Delivery<'a, 'm> {
    form: Form,
    buffers: Buffers<'a>,
    batch: &'a Batch<'m>,
    outcome: &'a mut Outcome,
    /// As many chains as one frame may span have been looked at in search of room, and nothing was delivered since: however
    /// many frames do not fit, they are looked at once, because a guest may post chains that take long to walk and hold nothing.
    dry: bool,
    rewrites: Rewrites,
}

impl Delivery<'_, '_> {
    /// Delivers the picked frames. What is not used of the ring goes back to it, after a fault as well, so that its index
    /// says up to where the guest has got its buffers back. This and all below is compiled for each form of ring.
    #[inline]
    fn run<R: DeviceRing>(&mut self, ring: &mut R, picks: &[u8]) -> Result<(), RingFault> {
        let filled = self.buffers.refill(ring, picks.len()).and_then(|()| {
            if self.form.merges && Merger::is_promising(self.batch, picks) {
                self.fill_merged(ring, picks)
            } else {
                self.fill(ring, picks)
            }
        });
        ring.give_back(self.buffers.rest());
        filled
    }

    /// Writes the picked frames into the guest's buffers until one of these is faulty.
    #[inline]
    fn fill<R: DeviceRing>(&mut self, ring: &mut R, picks: &[u8]) -> Result<(), RingFault> {
        let mut at = 0;
        loop {
            at += self.fill_plain(ring, &picks[at..]);
            let Some(&index) = picks.get(at) else { return Ok(()) };
            let frame = &self.batch.frames()[usize::from(index)];
            if frame.exceeds(self.batch.head(usize::from(index)), self.form.longest) {
                self.outcome.refuse(index, DropReason::MtuExceeded);
            } else if !frame.needs.met_by(self.form.accepts) {
                self.rewrite(ring, index)?;
            } else if !self.fill_any(ring, index, picks.len() - at)? {
                self.outcome.refuse_all(&picks[at..], DropReason::RingFull);
                return Ok(());
            }
            at += 1;
        }
    }

    /// Writes one frame over as many chains as it takes; a large one for which there are too few, or that are too small, as
    /// its segments. `false` if there is no chain at all; `left` is how many frames there are from this one on.
    fn fill_any<R: DeviceRing>(&mut self, ring: &mut R, index: u8, left: usize) -> Result<bool, RingFault> {
        if !self.has_chain(ring, left)? {
            return Ok(false);
        }
        let frame = &self.batch.frames()[usize::from(index)];
        match self.room(ring, frame.len as usize)? {
            Ok(count) => {
                self.buffers.scatter(ring, self.batch, index, self.form.header, count);
                self.outcome.deliver(index);
                self.dry = false;
            }
            // Its segments are shorter.
            Err(_) if frame.needs.is_gso() => self.rewrite(ring, index)?,
            Err(reason) => self.outcome.refuse(index, reason),
        }
        Ok(true)
    }

    /// Makes complete frames of one that the guest cannot take, and writes as many as it has room for.
    fn rewrite<R: DeviceRing>(&mut self, ring: &mut R, index: u8) -> Result<(), RingFault> {
        let before = self.outcome.delivered;
        self.rewrites.deliver(ring, &mut self.buffers, self.batch, index, self.outcome)?;
        self.dry &= self.outcome.delivered == before;
        Ok(())
    }

    /// Whether there is a chain, after a look at what the guest has posted meanwhile if need be.
    #[inline]
    fn has_chain<R: DeviceRing>(&mut self, ring: &mut R, frames: usize) -> Result<bool, RingFault> {
        if self.buffers.left() == 0 {
            self.buffers.refill(ring, frames)?;
            self.dry = false;
        }
        Ok(self.buffers.left() > 0)
    }

    /// How many of the next chains hold a frame of `len` bytes, after a look at all that the guest has posted if need be.
    fn room<R: DeviceRing>(&mut self, ring: &mut R, len: usize) -> Result<Result<usize, DropReason>, RingFault> {
        let (bytes, most) = (self.form.header + len, self.form.most());
        let mut count = self.buffers.run(bytes, most);
        if count.is_none() && self.form.mergeable && !self.dry && self.buffers.left() < most {
            self.buffers.refill(ring, BATCH_FRAMES)?;
            self.dry = true;
            count = self.buffers.run(bytes, most);
        }
        // More of the same buffers would help a guest that merges; nothing helps one whose buffers are too short.
        let full = self.buffers.left() < most;
        Ok(count.ok_or(if full { DropReason::RingFull } else { DropReason::BufferTooSmall }))
    }

    /// Writes frames as long as each fits the one piece of the next chain, as nearly all do; returns how many those were.
    /// None while the guest is being migrated: that what is written has to be noted is asked once per batch, here.
    #[inline]
    fn fill_plain<R: DeviceRing>(&mut self, ring: &mut R, picks: &[u8]) -> usize {
        let Self { form, buffers, batch, .. } = self;
        if form.header != VNET_HEADER_BYTES || buffers.log.is_some() {
            return 0;
        }
        let (mut filled, mut delivered) = (0, 0u64);
        for (&index, chain) in picks.iter().zip(buffers.rest()) {
            let Some(frame) = batch.frames().get(usize::from(index)) else { break };
            let Some(buffer) = buffers.chains.single(chain) else { break };
            let bytes = VNET_HEADER_BYTES + frame.len as usize;
            if buffer.len() < bytes || frame.len > form.longest || !frame.needs.met_by(form.accepts) {
                break;
            }
            write(batch, index, frame, buffer);
            delivered |= 1 << (index % 64);
            filled += 1;
        }
        let len = |index: u8| batch.frames().get(usize::from(index)).map_or(0, |frame| frame.len);
        let written = picks[..filled].iter().map(|&index| VNET_HEADER_BYTES as u32 + len(index));
        ring.complete_all(buffers.rest().iter().zip(written));
        buffers.next += filled;
        self.outcome.delivered |= delivered;
        filled
    }
}

/// Writes frame `index` with its 12-byte header into one piece that is large enough for both.
#[inline]
fn write(batch: &Batch<'_>, index: u8, frame: &Frame<'_>, buffer: Span<'_>) {
    let head: &Head = batch.head(usize::from(index));
    let head_len = usize::from(frame.head_len);
    if head_len == HEAD_BYTES {
        buffer.write_exact(head.usual());
    } else {
        buffer.write(&head.bytes[..VNET_HEADER_BYTES + head_len]);
        if head_len < HEAD_BYTES {
            return;
        }
    }
    let mut rest = buffer.split_at(VNET_HEADER_BYTES + head_len).1;
    if let Some(tail) = batch.single_tail(usize::from(index)) {
        // A copy of no bytes is a call all the same, and a frame of minimum size has all of them in its head.
        if !tail.is_empty() {
            tail.copy_to(rest);
        }
        return;
    }
    for piece in batch.tail(usize::from(index)) {
        rest = rest.split_at(piece.copy_to(rest)).1;
    }
}
