//! Frames that a guest sends: its transmit ring, as a [`Receive`] queue of the port.
//!
//! One batch: gather chains off the ring (descriptors are walked once, first buffers are on their way into the cache),
//! check each one's virtio-net header, copy the frames' heads, lend the batch to the shard, give the buffers back in the
//! order they came (which VIRTIO_F_IN_ORDER asks for and costs nothing otherwise).

use std::sync::Arc;

use super::queue::{Queue, Running, State};
use super::steering::Steering;
use crate::frame::{Batch, Flooding, Heads, Needs};
use crate::limits::{BATCH_FRAMES, FRAME_MAX_BYTES, VNET_HEADER_BYTES};
use crate::mem::{GuestMemory, Span};
use crate::offload;
use crate::port::{Receive, Received, Wake};
use crate::ring::{Chain, Chains, DeviceRing, Readable, Ring, RingFault};
use crate::verdict::DropReason;
use crate::wire::rarp;
use crate::wire::virtio_net::VnetHeader;

/// The receive queue of one queue pair.
pub(super) struct ReceiveQueue {
    ring: Arc<Queue>,
    pair: u16,
    steering: Arc<Steering>,
}

impl ReceiveQueue {
    /// The receive queue of pair number `pair`, over the guest's transmit ring. What comes in steers the answers.
    pub fn new(ring: Arc<Queue>, pair: u16, steering: Arc<Steering>) -> Self {
        Self { ring, pair, steering }
    }

    /// Moves one batch; returns how many of its frames were dealt with, if there was one. A fault that the walk finds is returned after whatever came before it has been dealt with.
    fn batch(
        &self,
        state: &mut State,
        heads: &mut Heads,
        process: &mut dyn FnMut(&mut Batch<'_>),
    ) -> Result<Option<usize>, RingFault> {
        let enabled = state.enabled;
        let Some(running) = &mut state.running else { return Ok(None) };
        if running.is_lost() {
            return Ok(None);
        }
        let Running { ring, memory, header, may, flooding, .. } = running;
        let turn = Turn { memory, header: *header, may: *may, enabled, queue: self };
        let taken = match ring {
            Ring::Split(ring) => turn.take(ring, heads, flooding, process),
            Ring::Packed(ring) => turn.take(ring, heads, flooding, process),
        };
        state.publish();
        taken
    }

    /// Has the answers to these frames come back on this pair. Fragments and the like are steered by what they have.
    fn steer(&self, batch: &Batch<'_>) {
        let now = self.steering.now();
        for (index, frame) in batch.frames().iter().enumerate() {
            let head = batch.head(index).frame();
            let hash = self.steering.hash(head.get(..usize::from(frame.head_len)).unwrap_or(head));
            self.steering.note_sent(hash, usize::from(self.pair), now);
        }
    }

    /// Sends out the announcements that are waiting, as one batch.
    #[cold]
    fn announce(&self, state: &mut State, heads: &mut Heads, process: &mut dyn FnMut(&mut Batch<'_>)) -> usize {
        let mut frames: Vec<_> = state.announcements.iter().copied().map(rarp::announce).collect();
        let mut batch = Batch::new(heads, self.pair);
        for frame in &mut frames {
            let len = frame.len();
            batch.push(len, &[Span::from_buffer(frame)]);
        }
        batch.make_divisible(state.announced);
        process(&mut batch);
        let announced = batch.dealt_with();
        state.announced = batch.flooding();
        state.announcements.drain(..announced);
        announced
    }
}

/// One batch of a ring, with what of the queue's state it needs.
struct Turn<'a> {
    memory: &'a GuestMemory,
    header: usize,
    /// What the guest may leave to us.
    may: Needs,
    enabled: bool,
    queue: &'a ReceiveQueue,
}

impl Turn<'_> {
    /// Takes the batch off the ring, has it processed, and completes the chains of what was dealt with; the others it gives back
    /// and the next batch begins with them. The caller publishes. Compiled for each form of ring.
    #[inline]
    fn take<R: DeviceRing>(
        &self,
        ring: &mut R,
        heads: &mut Heads,
        flooding: &mut Flooding,
        process: &mut dyn FnMut(&mut Batch<'_>),
    ) -> Result<Option<usize>, RingFault> {
        let mut chains = Chains::new();
        let fault = ring.gather::<Readable>(self.memory, BATCH_FRAMES, &mut chains).err();
        let frames = chains.list().len();
        if frames == 0 {
            return fault.map_or(Ok(None), Err);
        }
        let mut batch = Batch::new(heads, self.queue.pair);
        for chain in chains.list() {
            if self.enabled {
                push(&mut batch, &chains, chain, self.header, self.may);
            } else {
                let len = (chain.bytes as usize).saturating_sub(self.header);
                push_dropped(&mut batch, len, DropReason::QueueDisabled);
            }
        }
        if self.queue.steering.is_needed() {
            self.queue.steer(&batch);
        }
        batch.make_divisible(*flooding);
        process(&mut batch);
        *flooding = batch.flooding();
        let dealt_with = batch.dealt_with().min(frames);
        drop(batch);
        let (done, kept) = chains.list().split_at(dealt_with);
        ring.complete_all(done.iter().map(|chain| (chain, 0)));
        if !kept.is_empty() {
            ring.give_back(kept);
        }
        fault.map_or(Ok(Some(dealt_with)), Err)
    }
}

impl Receive for ReceiveQueue {
    fn receive(&self, heads: &mut Heads, process: &mut dyn FnMut(&mut Batch<'_>)) -> Received {
        let Some(mut state) = self.ring.glance() else { return Received::Nothing };
        self.ring.disarm_late(&mut state);
        if !state.announcements.is_empty() {
            return Received::Frames(self.announce(&mut state, heads, process));
        }
        match self.batch(&mut state, heads, process) {
            Ok(frames) => frames.map_or(Received::Nothing, Received::Frames),
            Err(fault) => {
                self.ring.fail(&mut state, fault);
                Received::Nothing
            }
        }
    }

    fn arm(&self) -> bool {
        // While somebody else is in the ring it is polled.
        let Some(mut state) = self.ring.enter(0) else { return false };
        let armed = state.running.as_mut().map(|running| if running.is_lost() { Ok(true) } else { running.arm() });
        let rests = match armed {
            None => state.announcements.is_empty(),
            Some(Ok(rest)) => rest && state.is_heard() && state.announcements.is_empty(),
            Some(Err(fault)) => {
                self.ring.fail(&mut state, fault);
                true
            }
        };
        state.note_rest(rests);
        rests
    }

    fn disarm(&self) {
        self.ring.disarm();
    }

    fn attach(&self, wake: Option<Arc<dyn Wake>>) {
        self.ring.attach(wake);
    }
}

/// Adds a frame that is dropped. Its length is the guest's claim, which no frame can have: count what one can.
#[cold]
fn push_dropped(batch: &mut Batch<'_>, len: usize, reason: DropReason) {
    batch.push_dropped(len.min(FRAME_MAX_BYTES), reason);
}

/// Adds the frame that `chain` carries behind its virtio-net header of `header` bytes. Always inline: the compiler would not, and
/// a call is 10 instructions more a frame.
#[inline(always)]
fn push<'m>(batch: &mut Batch<'m>, chains: &Chains<'m>, chain: &Chain, header: usize, may: Needs) {
    if header == VNET_HEADER_BYTES
        && let Some(piece) = chains.single(chain)
        && batch.push_plain(piece)
    {
        return;
    }
    push_any(batch, chains, chain, header, may);
}

/// [`push`] for frames of any kind.
#[inline(never)]
fn push_any<'m>(batch: &mut Batch<'m>, chains: &Chains<'m>, chain: &Chain, header: usize, may: Needs) {
    let len = (chain.bytes as usize).saturating_sub(header);
    if chain.overlong {
        return push_dropped(batch, len, DropReason::TooManySegments);
    }
    if len == 0 {
        return batch.push_dropped(0, DropReason::HeaderTruncated);
    }
    if len > FRAME_MAX_BYTES {
        return push_dropped(batch, len, DropReason::FrameTooLong);
    }
    let mut vnet = [0; VNET_HEADER_BYTES];
    if let Some(piece) = chains.single(chain) {
        let (front, frame) = piece.split_at(header);
        front.read(&mut vnet);
        return add(batch, len, &[frame], &vnet, may);
    }
    push_scattered(batch, chains.pieces(chain), header, len, may);
}

/// [`push`] for a chain of several pieces. The header may be spread over any of them, a byte each (CVE-2022-2132).
fn push_scattered<'m>(batch: &mut Batch<'m>, pieces: &[Span<'m>], header: usize, len: usize, may: Needs) {
    let mut vnet = [0; VNET_HEADER_BYTES];
    let (mut at, mut index) = (0, 0);
    while at + pieces[index].len() <= header {
        at += pieces[index].read(&mut vnet[at..header]);
        index += 1;
    }
    let (front, first) = pieces[index].split_at(header - at);
    front.read(&mut vnet[at..header]);
    let mut frame = arrayvec::ArrayVec::<_, { crate::limits::CHAIN_SEGMENTS }>::new_const();
    frame.push(first);
    frame.extend(pieces[index + 1..].iter().copied());
    add(batch, len, &frame, &vnet, may);
}

/// Adds a frame whose virtio-net header has been read. The header is looked at for what it asks, once; a frame that asks
/// for nothing is told apart by one comparison.
#[inline]
fn add<'m>(batch: &mut Batch<'m>, len: usize, pieces: &[Span<'m>], vnet: &[u8; VNET_HEADER_BYTES], may: Needs) {
    if VnetHeader::asks_nothing(vnet) {
        batch.push(len, pieces);
    } else {
        offload::admit(batch, len, pieces, vnet, may);
    }
}
