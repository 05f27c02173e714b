//! Frames for a guest: its receive rings, as the [`Transmit`] side of the port.
//!
//! For each frame there is one chain of guest buffers in the common case, and the frame is written into its only piece:
//! header and head in one copy of constant size, the tail in another, straight from the sender's memory. Scattered buffers,
//! a frame over several chains with VIRTIO_NET_F_MRG_RXBUF and the 10-byte header take the slower way through a [`Cursor`];
//! frames that need what the guest cannot do are made complete in [`rewrite`]. The used index is published once for all
//! frames, and the guest interrupted at most once.
//!
//! A guest that uses several queue pairs has frames spread over them by flow ([`super::steering`]); a flow keeps its order,
//! because it stays on its queue.

mod rewrite;

use std::sync::Arc;

use arrayvec::ArrayVec;

use self::rewrite::Rewrites;
use super::queue::{Queue, Running};
use super::steering::Steering;
use crate::frame::{Batch, Frame, Head, Needs};
use crate::limits::{BATCH_DESCRIPTORS, BATCH_FRAMES, HEAD_BYTES, VNET_HEADER_BYTES};
use crate::mem::{Cursor, DirtyLog, GuestMemory, Span};
use crate::port::{Flush, Outcome, Transmit, earlier};
use crate::ring::{Chain, Chains, DeviceRing, Ring, RingFault, Writable};
use crate::verdict::DropReason;
use crate::wire::ethernet::{Ethernet, TAG_BYTES};
use crate::wire::flow::flow_hash;
use crate::wire::virtio_net::VnetHeader;

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

    /// Spreads the frames over the `ready` rings by flow and gives each ring its own, in their order.
    fn spread(&self, ready: usize, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        let mut queues = [0u8; BATCH_FRAMES];
        for &pick in picks {
            queues[usize::from(pick) % BATCH_FRAMES] = self.queue_for(ready, batch, pick) as u8;
        }
        let mut left = picks.iter().fold(0u64, |left, &pick| left | 1 << (pick % 64));
        let mut own = ArrayVec::<u8, BATCH_FRAMES>::new_const();
        while left != 0 {
            let queue = queues[left.trailing_zeros() as usize % BATCH_FRAMES];
            own.clear();
            own.extend(picks.iter().copied().filter(|&pick| queues[usize::from(pick) % BATCH_FRAMES] == queue));
            own.iter().for_each(|&pick| left &= !(1 << (pick % 64)));
            if let Some(ring) = self.rings.get(usize::from(queue)) {
                transmit_to(ring, batch, &own, outcome);
            }
        }
    }

    /// The ring of frame `pick`: that of its flow; a flow that is new gets the first that nobody is in, from the one on that
    /// its hash says.
    fn queue_for(&self, ready: usize, batch: &Batch<'_>, pick: u8) -> usize {
        let (index, frame) = (usize::from(pick), &batch.frames()[usize::from(pick)]);
        let head = batch.head(index).frame();
        let hash = flow_hash(head.get(..usize::from(frame.head_len)).unwrap_or(head));
        if let Some(queue) = self.steering.queue(hash, ready) {
            return queue;
        }
        let first = hash as usize % ready;
        let free = (first..ready).chain(0..first).find(|&queue| self.rings[queue].try_lock().is_some());
        let queue = free.unwrap_or(first);
        self.steering.note(hash, queue);
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
            Some(ring) => transmit_to(ring, batch, picks, outcome),
            None => outcome.refuse_all(picks, DropReason::LinkDown),
        }
    }

    fn flush(&self, which: Flush) -> Option<u64> {
        let due = self.rings.iter().filter_map(|ring| ring.flush(which));
        due.reduce(|a, b| if earlier(b, a) { b } else { a })
    }
}

/// Gives the picked frames to the guest through one ring.
#[inline]
fn transmit_to(queue: &Queue, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
    let mut state = queue.lock();
    let (enabled, longest) = (state.enabled, state.longest());
    let Some(running) = state.running.as_mut().filter(|_| enabled) else {
        let faulted = state.fault.is_some();
        return outcome.refuse_all(picks, if faulted { DropReason::RingFaulted } else { DropReason::LinkDown });
    };
    let before = outcome.delivered;
    let delivered = deliver(running, longest, batch, picks, outcome);
    // What came before a fault has been written and is the guest's.
    let frames = (outcome.delivered ^ before).count_ones();
    let mut due = state.publish_frames(frames);
    if frames as usize != picks.len() && due.is_some() {
        // It is short of buffers: only the interrupt that was held back makes it post more.
        due = state.flush(Flush::All);
    }
    queue.note_held(due.is_some());
    if let Some(due) = due {
        outcome.hold(due);
    }
    if let Err(fault) = delivered {
        let lost = picks.iter().filter(|&&pick| outcome.delivered & 1 << (pick % 64) == 0);
        lost.for_each(|&pick| outcome.reasons[usize::from(pick) % BATCH_FRAMES] = DropReason::RingFaulted);
        queue.fail(&mut state, fault);
    }
}

/// Writes the picked frames into the ring and completes their chains; the caller publishes.
fn deliver(
    running: &mut Running,
    longest: u32,
    batch: &Batch<'_>,
    picks: &[u8],
    outcome: &mut Outcome,
) -> Result<(), RingFault> {
    let Running { ring, memory, header, mergeable, accepts, log, .. } = running;
    let buffers = Buffers { chains: Chains::new(), next: 0, memory, log: log.as_deref(), steps: 0 };
    let form = Form { header: *header, mergeable: *mergeable, accepts: *accepts, longest };
    match ring {
        Ring::Split(ring) => deliver_to(ring, buffers, form, batch, picks, outcome),
        Ring::Packed(ring) => deliver_to(ring, buffers, form, batch, picks, outcome),
    }
}

/// [`deliver`], compiled for each form of ring. What is not used goes back to the ring, after a fault as well, so that its
/// index says up to where the guest has got its buffers back.
#[inline]
fn deliver_to<R: DeviceRing>(
    ring: &mut R,
    mut buffers: Buffers<'_>,
    form: Form,
    batch: &Batch<'_>,
    picks: &[u8],
    outcome: &mut Outcome,
) -> Result<(), RingFault> {
    let filled = fill(ring, &mut buffers, form, batch, picks, outcome);
    ring.give_back(buffers.rest());
    filled
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
}

impl Form {
    /// Most chains that one frame may span.
    fn most(self) -> usize {
        if self.mergeable { BATCH_FRAMES } else { 1 }
    }
}

/// Writes the picked frames into the guest's buffers until one of these is faulty.
#[inline]
fn fill<R: DeviceRing>(
    ring: &mut R,
    buffers: &mut Buffers<'_>,
    form: Form,
    batch: &Batch<'_>,
    picks: &[u8],
    outcome: &mut Outcome,
) -> Result<(), RingFault> {
    let Form { header, mergeable, accepts, longest } = form;
    let (mut dry, mut rewrites, mut at) = (false, Rewrites::new(form), 0);
    buffers.refill(ring, picks.len())?;
    loop {
        at += fill_plain(ring, buffers, form, batch, &picks[at..], outcome);
        let Some(&index) = picks.get(at) else { break };
        let frame = &batch.frames()[usize::from(index)];
        let bytes = header + frame.len as usize;
        if frame.len > longest && exceeds(frame, batch.head(usize::from(index)), longest) {
            outcome.refuse(index, DropReason::MtuExceeded);
            at += 1;
            continue;
        }
        if !frame.needs.met_by(accepts) {
            rewrites.deliver(ring, buffers, batch, index, outcome)?;
            (dry, at) = (false, at + 1);
            continue;
        }
        if buffers.left() == 0 {
            buffers.refill(ring, picks.len() - at)?;
            dry = false;
            if buffers.left() == 0 {
                outcome.refuse_all(&picks[at..], DropReason::RingFull);
                break;
            }
            continue;
        }
        at += 1;
        let most = form.most();
        if mergeable && !dry && buffers.left() < most && buffers.run(bytes, most).is_none() {
            buffers.refill(ring, BATCH_FRAMES)?;
            // All that there is has been walked: once per batch, however many frames do not fit, because a guest may post
            // chains that take long to walk and hold nothing.
            dry = true;
        }
        match buffers.run(bytes, most) {
            Some(count) => {
                buffers.scatter(ring, batch, index, header, count);
                outcome.deliver(index);
            }
            // More of the same buffers would help a guest that merges; nothing helps one whose buffers are too short.
            None if buffers.left() < most => outcome.refuse(index, DropReason::RingFull),
            None => outcome.refuse(index, DropReason::BufferTooSmall),
        }
    }
    Ok(())
}

/// Writes frames as long as each fits the one piece of the next chain, as nearly all do; returns how many those were. None
/// while the guest is being migrated: that what is written has to be noted is asked once per batch, here.
#[inline]
fn fill_plain<R: DeviceRing>(
    ring: &mut R,
    buffers: &mut Buffers<'_>,
    form: Form,
    batch: &Batch<'_>,
    picks: &[u8],
    outcome: &mut Outcome,
) -> usize {
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
        ring.complete(chain, bytes as u32);
        write(batch, index, frame, buffer);
        delivered |= 1 << (index % 64);
        filled += 1;
    }
    buffers.next += filled;
    outcome.delivered |= delivered;
    filled
}

/// Whether a frame that is longer than `longest` is so on the wire, where it may be several, and without its VLAN tags.
#[cold]
fn exceeds(frame: &Frame<'_>, head: &Head, longest: u32) -> bool {
    let tags = Ethernet::parse(head.bytes_of(frame)).map_or(0, |view| view.tag_count());
    frame.wire_len(head) > longest.saturating_add((TAG_BYTES * tags) as u32)
}

/// Chains of guest buffers at hand, used up from the front.
struct Buffers<'m> {
    chains: Chains<'m>,
    next: usize,
    memory: &'m GuestMemory,
    log: Option<&'m DirtyLog>,
    /// Descriptors of long chains that were walked so far.
    steps: usize,
}

impl<'m> Buffers<'m> {
    /// How many chains are left.
    #[inline]
    fn left(&self) -> usize {
        self.chains.list().len() - self.next
    }

    /// The chains that are left.
    #[inline]
    fn rest(&self) -> &[Chain] {
        &self.chains.list()[self.next..]
    }

    /// Puts back what is left and takes up to `limit` chains anew; none once the batch's budget for walking long chains is
    /// spent. A guest may post chains of thousands of descriptors that hold one frame, and somebody else's frames pay.
    fn refill<R: DeviceRing>(&mut self, ring: &mut R, limit: usize) -> Result<(), RingFault> {
        ring.give_back(self.rest());
        self.chains.clear();
        self.next = 0;
        if self.steps >= BATCH_DESCRIPTORS {
            return Ok(());
        }
        let gathered = ring.gather::<Writable>(self.memory, limit, &mut self.chains);
        self.steps += ring.steps();
        gathered.map(|_| ())
    }

    /// How many of the next `most` chains hold `bytes` together.
    fn run(&self, bytes: usize, most: usize) -> Option<usize> {
        let mut room = 0;
        for (count, chain) in self.chains.list()[self.next..].iter().take(most).enumerate() {
            room += if chain.overlong { 0 } else { chain.bytes as usize };
            if room >= bytes {
                return Some(count + 1);
            }
        }
        None
    }

    /// Writes frame `index` over the next `count` chains and completes them.
    fn scatter<R: DeviceRing>(&mut self, ring: &mut R, batch: &Batch<'_>, index: u8, header: usize, count: usize) {
        let run = &self.chains.list()[self.next..self.next + count];
        scatter(batch, usize::from(index), header, count, Cursor::new(self.chains.pieces_of(run)));
        let len = header + batch.frames()[usize::from(index)].len as usize;
        self.used(count, len, |chain, written| ring.complete(chain, written));
    }

    /// Hands out the next `count` chains, over which `len` bytes were written, each with its share of them, which the dirty
    /// log is told if the guest is being migrated.
    fn used(&mut self, count: usize, len: usize, mut each: impl FnMut(&Chain, u32)) {
        let chains = &self.chains;
        let mut left = len;
        for chain in &chains.list()[self.next..self.next + count] {
            let written = if chain.overlong { 0 } else { left.min(chain.bytes as usize) };
            left -= written;
            each(chain, written as u32);
            if let Some(log) = self.log {
                log.mark_pieces(self.memory, chains.pieces(chain), written);
            }
        }
        self.next += count;
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

/// Writes frame `index` behind a header of `header` bytes which says that it takes `chains` chains. The caller has made
/// sure that there is room for all.
fn scatter(batch: &Batch<'_>, index: usize, header: usize, chains: usize, mut to: Cursor<'_, '_>) {
    let vnet = VnetHeader { num_buffers: chains as u16, ..batch.head(index).header() }.to_bytes();
    to.write(&vnet[..header.min(VNET_HEADER_BYTES)]);
    batch.source(index).copy(batch.frames()[index].len as usize, &mut to);
}
