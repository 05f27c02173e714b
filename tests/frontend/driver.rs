//! The guest's virtio-net driver on one side of its rings, split or packed: [`Queue`] does the virtqueue bookkeeping, [`TxQueue`] and
//! [`RxQueue`] put frames over it.
//!
//! It keeps every promise that virtio 1.2 asks of a driver and panics when the device breaks one of its own: a used
//! entry for a head that is not outstanding, a length beyond the buffer, IN_ORDER violated, an interrupt lost.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use super::doorbell::{Doorbell, wait_any};
use super::packed::{BY_DESC, DISABLE, ENABLE, FIRST_BASE, Packed, Place};
use super::ring::{DESC_LEN, Desc, INDIRECT, NO_INTERRUPT, NO_NOTIFY, Ring, WRITE};
use super::session::feature;

/// Entries of the indirect table that each head has at hand.
const TABLE: u64 = 64;

/// How the bytes of header and frame lie over descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// All in one descriptor, as modern drivers with ANY_LAYOUT or VERSION_1 do.
    Joined,
    /// The header in a descriptor of its own, as legacy drivers must.
    HeaderApart,
    /// Descriptors of at most this many bytes, wherever they cut.
    Pieces(u32),
}

impl Shape {
    /// The lengths of the descriptors for `header` + `body` bytes.
    fn cut(self, header: u32, body: u32) -> Vec<u32> {
        match self {
            Shape::HeaderApart if body > 0 => vec![header, body],
            Shape::Joined | Shape::HeaderApart => vec![header + body],
            Shape::Pieces(most) => {
                let whole = header + body;
                (0..whole).step_by(most as usize).map(|at| most.min(whole - at)).collect()
            }
        }
    }
}

/// A used buffer: its head and how many bytes the device wrote; `None` if an IN_ORDER device skipped its entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    pub len: Option<u32>,
}

struct Chain {
    descs: Vec<u16>,
    /// Bytes that the device may write.
    writable: u32,
}

/// One virtqueue and the driver's books about it.
pub struct Queue {
    pub ring: Ring,
    pub kick: Doorbell,
    pub call: Doorbell,
    /// Interrupts taken so far.
    pub calls: u64,
    /// Kicks given so far.
    pub kicks: u64,
    event_idx: bool,
    in_order: bool,
    /// INDIRECT_DESC is acked, so chains may go into tables.
    indirect: bool,
    /// The driver asks for no interrupts and polls.
    quiet: bool,
    next_avail: u16,
    published: u16,
    last_used: u16,
    free: VecDeque<u16>,
    chains: Vec<Option<Chain>>,
    /// Outstanding heads in the order in which they were made available.
    order: VecDeque<u16>,
    tables: Option<u64>,
    /// Where the driver stands in a packed ring; heads are then ids.
    packed: Option<Packed>,
}

impl Queue {
    /// A queue over `ring` for the acked `features`; `indirect` gives each head a table.
    pub fn new(ring: Ring, features: u64, indirect: bool) -> Self {
        let tables = indirect.then(|| ring.ram.alloc(u64::from(ring.size) * TABLE * DESC_LEN, DESC_LEN));
        Self {
            kick: Doorbell::new(),
            call: Doorbell::new(),
            calls: 0,
            kicks: 0,
            event_idx: features & feature::EVENT_IDX != 0,
            in_order: features & feature::IN_ORDER != 0,
            indirect: features & feature::INDIRECT_DESC != 0,
            quiet: false,
            next_avail: 0,
            published: 0,
            last_used: 0,
            free: free_list(ring.size, features),
            chains: (0..ring.size).map(|_| None).collect(),
            order: VecDeque::new(),
            tables,
            packed: packed(features),
            ring,
        }
    }

    /// Starts over with an empty ring, as after a device reset, for the newly acked `features`.
    pub fn reset(&mut self, features: u64) {
        self.ring.clear();
        self.event_idx = features & feature::EVENT_IDX != 0;
        self.in_order = features & feature::IN_ORDER != 0;
        self.indirect = features & feature::INDIRECT_DESC != 0;
        (self.next_avail, self.published, self.last_used) = (0, 0, 0);
        self.free = free_list(self.ring.size, features);
        self.chains.fill_with(|| None);
        self.order.clear();
        self.packed = packed(features);
        self.call.take();
    }

    /// Where a new ring of this form begins, as SET_VRING_BASE says it.
    pub fn first_base(features: u64) -> u16 {
        if features & feature::RING_PACKED != 0 { FIRST_BASE } else { 0 }
    }

    /// Where the driver of a packed ring makes its next descriptor available.
    pub fn place(&self) -> Option<Place> {
        self.packed.as_ref().map(|packed| packed.next)
    }

    /// The head that the next [`Queue::add`] takes, if any descriptor is free.
    pub fn next_head(&self) -> Option<u16> {
        self.free.front().copied()
    }

    pub fn outstanding(&self) -> usize {
        self.order.len()
    }

    pub fn last_used(&self) -> u16 {
        self.last_used
    }

    /// Makes a chain of `buffers` available, unpublished yet, in an indirect table if that is wished and negotiated.
    /// `None` if too few descriptors are free.
    pub fn add(&mut self, buffers: &[Desc], indirect: bool) -> Option<u16> {
        let indirect = indirect && self.indirect;
        let needed = if indirect { 1 } else { buffers.len() };
        if needed > self.free.len() {
            return None;
        }
        // From the front, returned at the back: ring order as long as the device keeps it, which is what IN_ORDER
        // asks of the driver ("use descriptors in ring order", virtio 1.2, 2.7.9).
        let descs: Vec<u16> = self.free.drain(..needed).collect();
        let head = descs[0];
        if indirect {
            let table = self.tables.expect("a queue made with tables") + u64::from(head) * TABLE * DESC_LEN;
            assert!(buffers.len() as u64 <= TABLE, "{} buffers for a table of {TABLE}", buffers.len());
            for (slot, desc) in linked(buffers, |at| at as u16) {
                let entry = if self.packed.is_some() { desc.to_packed_entry() } else { desc.to_bytes() };
                self.ring.ram.write(table + DESC_LEN * slot as u64, &entry);
            }
            let len = (buffers.len() as u64 * DESC_LEN) as u32;
            let table = Desc { addr: table, len, flags: INDIRECT, next: 0 };
            match &mut self.packed {
                Some(packed) => packed.add(&self.ring, &[table], head),
                None => self.ring.set_desc(head, table),
            }
        } else if let Some(packed) = &mut self.packed {
            packed.add(&self.ring, buffers, head);
        } else {
            for (slot, desc) in linked(buffers, |at| descs[at]) {
                self.ring.set_desc(descs[slot], desc);
            }
        }
        let writable = buffers.iter().filter(|desc| desc.flags & WRITE != 0).map(|desc| desc.len).sum();
        self.chains[usize::from(head)] = Some(Chain { descs, writable });
        if self.packed.is_none() {
            self.ring.set_avail_entry(self.next_avail, head);
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        self.order.push_back(head);
        Some(head)
    }

    /// Publishes what was added and kicks if the device wants to know; true if it kicked.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_avail);
        if old == new {
            return false;
        }
        let published = match &mut self.packed {
            Some(packed) => packed.publish(&self.ring),
            None => {
                self.ring.set_avail_idx(new);
                None
            }
        };
        self.published = new;
        // The index must be visible before the device's wish is read (virtio 1.2, 2.7.13.4.1).
        fence(Ordering::SeqCst);
        let wanted = if let Some((before, count)) = published {
            Packed::is_wanted(&self.ring, before, count)
        } else if self.event_idx {
            crosses(self.ring.avail_event(), new, old)
        } else {
            self.ring.used_flags() & NO_NOTIFY == 0
        };
        if wanted {
            self.kick.ring();
            self.kicks += 1;
        }
        wanted
    }

    /// Takes what the device has used, and frees the descriptors.
    pub fn collect(&mut self) -> Vec<Used> {
        let used = if self.packed.is_some() { self.collect_packed() } else { self.collect_split() };
        for Used { head, len } in &used {
            let chain = self.chains[usize::from(*head)].take().expect("a chain for an outstanding head");
            if let Some(len) = *len {
                assert!(len <= chain.writable, "head {head}: {len} bytes used of {} writable", chain.writable);
            }
            self.free.extend(chain.descs);
        }
        used
    }

    fn collect_packed(&mut self) -> Vec<Used> {
        let packed = self.packed.as_mut().expect("a packed ring");
        let mut used = Vec::new();
        while let Some((id, len)) = packed.peek(&self.ring) {
            let at = self.order.iter().position(|&head| head == id);
            let at = at.unwrap_or_else(|| panic!("used descriptor of buffer {id}, which is not outstanding"));
            // With IN_ORDER one may stand for a batch that ends with it (virtio 1.2, 2.8.9).
            let heads: Vec<_> = if self.in_order { self.order.drain(..=at).collect() } else { vec![id] };
            if !self.in_order {
                self.order.remove(at);
            }
            for head in heads {
                let slots = self.chains[usize::from(head)].as_ref().map_or(0, |chain| chain.descs.len());
                packed.used = packed.used.on(slots, self.ring.size);
                used.push(Used { head, len: (head == id).then_some(len) });
            }
        }
        self.last_used = self.last_used.wrapping_add(used.len() as u16);
        used
    }

    fn collect_split(&mut self) -> Vec<Used> {
        let idx = self.ring.used_idx();
        let pending = usize::from(idx.wrapping_sub(self.last_used));
        assert!(
            pending <= self.order.len(),
            "used index went from {} to {idx} with {} outstanding",
            self.last_used,
            self.order.len()
        );
        let mut used = Vec::with_capacity(pending);
        while used.len() < pending {
            let (id, len) = self.ring.used_entry(self.last_used.wrapping_add(used.len() as u16));
            let room = pending - used.len();
            let at = self.order.iter().position(|&head| u32::from(head) == id);
            let at = at.unwrap_or_else(|| panic!("used entry for head {id}, which is not outstanding"));
            if self.in_order {
                // One entry may stand for a batch that ends with it (virtio 1.2, 2.7.10.1).
                assert!(at < room, "IN_ORDER: head {id} used, {at} older ones are outstanding, {room} entries to go");
                for head in self.order.drain(..=at) {
                    used.push(Used { head, len: (u32::from(head) == id).then_some(len) });
                }
            } else {
                self.order.remove(at);
                used.push(Used { head: id as u16, len: Some(len) });
            }
        }
        self.last_used = idx;
        used
    }

    /// Asks for no more interrupts (true) or for them again (false).
    pub fn set_quiet(&mut self, quiet: bool) {
        self.quiet = quiet;
        if quiet {
            if let Some(packed) = &self.packed {
                packed.ask(&self.ring, DISABLE);
            } else if self.event_idx {
                // Half the index space away: not crossed by fewer than 32768 entries.
                self.ring.set_used_event(self.last_used.wrapping_add(0x8000));
            } else {
                self.ring.set_avail_flags(NO_INTERRUPT);
            }
        } else {
            self.arm();
        }
    }

    fn arm(&mut self) {
        if let Some(packed) = &self.packed {
            packed.ask(&self.ring, if self.event_idx { BY_DESC } else { ENABLE });
        } else if self.event_idx {
            self.ring.set_used_event(self.last_used);
        } else {
            self.ring.set_avail_flags(0);
        }
        fence(Ordering::SeqCst);
    }

    fn has_used(&self) -> bool {
        match &self.packed {
            Some(packed) => packed.peek(&self.ring).is_some(),
            None => self.ring.used_idx() != self.last_used,
        }
    }

    /// How many buffers the device has used that were not collected. An IN_ORDER device may have used more.
    pub fn waiting(&self) -> usize {
        let Some(packed) = &self.packed else {
            return self.ring.used_idx().wrapping_sub(self.last_used).into();
        };
        let (mut place, mut count) = (packed.used, 0);
        while let Some((id, _)) = Packed::peek_at(&self.ring, place).filter(|_| count < self.order.len()) {
            let slots = self.chains[usize::from(id)].as_ref().map_or(1, |chain| chain.descs.len());
            place = place.on(slots, self.ring.size);
            count += 1;
        }
        count
    }

    /// Counts interrupts that nobody waited for.
    pub fn take_calls(&mut self) -> u64 {
        self.calls += self.call.take();
        self.calls
    }

    /// Serves up to `most` available entries in the device's place, as QEMU does with a stopped TX ring whose link is
    /// down. Returns how many; the ring's base moves on by as many.
    pub fn serve_as_vmm(&self, most: u16) -> u16 {
        let mut idx = self.ring.used_idx();
        let count = self.ring.avail_idx().wrapping_sub(idx).min(most);
        for _ in 0..count {
            self.ring.set_used_entry(idx, self.ring.avail_entry(idx).into(), 0);
            idx = idx.wrapping_add(1);
        }
        self.ring.set_used_idx(idx);
        count
    }
}

/// All descriptors; scattered unless IN_ORDER asks for ring order, so that nobody takes a head for a position.
fn free_list(size: u16, features: u64) -> VecDeque<u16> {
    let in_order = features & feature::IN_ORDER != 0;
    // A prime that does not divide the size visits each descriptor once.
    let step =
        if in_order { 1 } else { [5, 7, 11, 13, 17].into_iter().find(|step| !size.is_multiple_of(*step)).unwrap_or(1) };
    (0..u32::from(size)).map(|at| (at * u32::from(step) % u32::from(size)) as u16).collect()
}

/// A packed ring's driver at its start, if the feature was acked.
fn packed(features: u64) -> Option<Packed> {
    (features & feature::RING_PACKED != 0).then(Packed::new)
}

/// Sleeps until the device has used something on one of `queues` that was not collected, or `end` passes; true if it
/// has. Goes by interrupts alone, unless a queue is quiet, and panics if one is lost.
pub fn wait_used<'a>(queues: impl IntoIterator<Item = &'a mut Queue>, end: Instant) -> bool {
    let mut queues: Vec<_> = queues.into_iter().collect();
    let polling = queues.iter().any(|queue| queue.quiet);
    loop {
        for queue in queues.iter_mut().filter(|queue| !queue.quiet) {
            queue.arm();
        }
        if queues.iter().any(|queue| queue.has_used()) {
            return true;
        }
        let slice = if polling { end.min(Instant::now() + Duration::from_micros(100)) } else { end };
        let bells: Vec<_> = queues.iter().map(|queue| &queue.call).collect();
        let rang = wait_any(&bells, slice);
        for queue in &mut queues {
            if !rang && !queue.quiet && slice == end && queue.has_used() {
                // Used in this very moment, or a while ago and the interrupt is lost?
                let late = queue.call.wait(Duration::from_secs(2));
                assert!(late, "interrupt lost: used index {}, asked at {}", queue.ring.used_idx(), queue.last_used);
            }
            queue.calls += queue.call.take();
        }
        if !rang && Instant::now() >= end {
            return queues.iter().any(|queue| queue.has_used());
        }
    }
}

/// The buffers with NEXT and `next` set; `name` gives the index of the nth one.
fn linked(buffers: &[Desc], name: impl Fn(usize) -> u16) -> impl Iterator<Item = (usize, Desc)> {
    let last = buffers.len() - 1;
    buffers.iter().enumerate().map(move |(at, desc)| (at, if at < last { desc.then(name(at + 1)) } else { *desc }))
}

/// Whether the step from `old` to `new` passes `event` (virtio 1.2, 2.7.7.1, `vring_need_event`).
fn crosses(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Length of the virtio-net header: `num_buffers` is there with MRG_RXBUF or VERSION_1 (virtio 1.2, 5.1.6.1).
pub fn header_len(features: u64) -> usize {
    if features & (feature::MRG_RXBUF | feature::VERSION_1 | feature::RING_PACKED) == 0 { 10 } else { 12 }
}

/// What a TX or RX queue is made with.
#[derive(Clone, Copy, Debug)]
pub struct QueueLayout {
    pub size: u16,
    pub shape: Shape,
    pub indirect: bool,
    /// Bytes of one buffer, header included.
    pub buffer: u32,
}

/// A transmit queue.
pub struct TxQueue {
    pub queue: Queue,
    header_len: usize,
    layout: QueueLayout,
    buffers: u64,
}

impl TxQueue {
    pub fn new(ring: Ring, features: u64, layout: QueueLayout) -> Self {
        let buffers = ring.ram.alloc(u64::from(layout.size) * u64::from(layout.buffer), 64);
        let queue = Queue::new(ring, features, layout.indirect);
        Self { queue, header_len: header_len(features), layout, buffers }
    }

    pub fn reset(&mut self, features: u64) {
        self.queue.reset(features);
        self.header_len = header_len(features);
    }

    /// Where the buffer of `head` lies.
    pub fn buffer_of(&self, head: u16) -> u64 {
        self.buffers + u64::from(head) * u64::from(self.layout.buffer)
    }

    /// Puts one frame under a zero header, unpublished; false if the ring is full.
    pub fn queue_frame(&mut self, frame: &[u8]) -> bool {
        let header = [0; 12];
        self.queue_bytes(&header[..self.header_len], frame)
    }

    /// The same with a header of the caller's, of any length.
    pub fn queue_bytes(&mut self, header: &[u8], frame: &[u8]) -> bool {
        self.reclaim();
        let Some(head) = self.queue.next_head() else { return false };
        let whole = (header.len() + frame.len()) as u32;
        assert!(whole <= self.layout.buffer, "{whole} bytes for a buffer of {}", self.layout.buffer);
        let mut at = self.buffer_of(head);
        self.queue.ring.ram.write(at, header);
        self.queue.ring.ram.write(at + header.len() as u64, frame);
        let mut buffers = Vec::new();
        for len in self.layout.shape.cut(header.len() as u32, frame.len() as u32) {
            buffers.push(Desc::readable(at, len));
            at += u64::from(len);
        }
        self.queue.add(&buffers, self.layout.indirect).is_some()
    }

    /// Sends one frame now; false if the ring is full.
    pub fn send(&mut self, frame: &[u8]) -> bool {
        let queued = self.queue_frame(frame);
        self.queue.publish();
        queued
    }

    /// Frees the buffers that the device is done with; how many.
    pub fn reclaim(&mut self) -> usize {
        let used = self.queue.collect();
        for Used { head, len } in &used {
            // A device writes nothing into a readable buffer; `collect` has checked it against zero.
            debug_assert!(len.is_none_or(|len| len == 0), "TX head {head}");
        }
        used.len()
    }

    /// Waits until the device is done with every frame; false if it is not by `end`.
    pub fn drain(&mut self, end: Instant) -> bool {
        loop {
            self.reclaim();
            if self.queue.outstanding() == 0 {
                return true;
            }
            if !wait_used([&mut self.queue], end) {
                return false;
            }
        }
    }
}

/// A frame as the guest got it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    pub header: Vec<u8>,
    pub frame: Vec<u8>,
    /// Buffers that it took.
    pub buffers: usize,
}

impl Received {
    /// The `num_buffers` field, if the header has one.
    pub fn num_buffers(&self) -> Option<u16> {
        self.header.get(10..12).map(|field| u16::from_le_bytes([field[0], field[1]]))
    }
}

/// A receive queue.
pub struct RxQueue {
    pub queue: Queue,
    header_len: usize,
    mergeable: bool,
    layout: QueueLayout,
    buffers: u64,
}

impl RxQueue {
    /// An empty queue; [`RxQueue::fill`] posts its buffers.
    pub fn new(ring: Ring, features: u64, layout: QueueLayout) -> Self {
        let buffers = ring.ram.alloc(u64::from(layout.size) * u64::from(layout.buffer), 64);
        let queue = Queue::new(ring, features, layout.indirect);
        let mergeable = features & feature::MRG_RXBUF != 0;
        Self { queue, header_len: header_len(features), mergeable, layout, buffers }
    }

    pub fn reset(&mut self, features: u64) {
        self.queue.reset(features);
        self.header_len = header_len(features);
        self.mergeable = features & feature::MRG_RXBUF != 0;
    }

    /// Posts as many buffers as there are descriptors, then publishes.
    pub fn fill(&mut self) {
        self.post(usize::MAX);
    }

    /// Posts at most `most` buffers, then publishes; how many.
    pub fn post(&mut self, most: usize) -> usize {
        let cuts = self.layout.shape.cut(self.header_len as u32, self.layout.buffer - self.header_len as u32);
        let mut posted = 0;
        while posted < most {
            let Some(head) = self.queue.next_head() else { break };
            let mut at = self.buffer_of(head);
            let mut buffers = Vec::with_capacity(cuts.len());
            for len in &cuts {
                buffers.push(Desc::writable(at, *len));
                at += u64::from(*len);
            }
            if self.queue.add(&buffers, self.layout.indirect).is_none() {
                break;
            }
            posted += 1;
        }
        self.queue.publish();
        posted
    }

    pub fn buffer_of(&self, head: u16) -> u64 {
        self.buffers + u64::from(head) * u64::from(self.layout.buffer)
    }

    /// Takes the frames that are there, without posting new buffers.
    pub fn take(&mut self) -> Vec<Received> {
        let mut used = self.queue.collect().into_iter();
        let mut frames = Vec::new();
        while let Some(first) = used.next() {
            let mut bytes = self.bytes_of(first);
            let header_len = self.header_len;
            assert!(bytes.len() >= header_len, "RX buffer used with {} bytes, less than a header", bytes.len());
            let mut frame = bytes.split_off(header_len);
            let mut buffers = 1;
            if self.mergeable {
                let announced = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
                assert!(announced > 0, "num_buffers is zero");
                while buffers < announced {
                    // virtio 1.2, 5.1.6.4.1: all but the last buffer are used up.
                    let filled = header_len + frame.len() == buffers * self.layout.buffer as usize;
                    assert!(filled, "frame goes on after {} of {buffers} buffers' bytes", frame.len());
                    let next = used.next();
                    let next = next.unwrap_or_else(|| panic!("{buffers} of {announced} buffers of a frame published"));
                    frame.extend(self.bytes_of(next));
                    buffers += 1;
                }
            }
            frames.push(Received { header: bytes, frame, buffers });
        }
        frames
    }

    /// Takes the frames that are there and posts their buffers again.
    pub fn poll(&mut self) -> Vec<Received> {
        let frames = self.take();
        if !frames.is_empty() {
            self.fill();
        }
        frames
    }

    /// Waits for `count` frames, posting buffers as they free up; fewer only if `end` passes.
    pub fn receive(&mut self, count: usize, end: Instant) -> Vec<Received> {
        let mut frames = self.poll();
        while frames.len() < count && wait_used([&mut self.queue], end) {
            frames.extend(self.poll());
        }
        frames
    }

    fn bytes_of(&self, used: Used) -> Vec<u8> {
        // Skipped by an IN_ORDER device: it has then written all of it.
        let len = used.len.unwrap_or(self.layout.buffer);
        self.queue.ring.ram.bytes(self.buffer_of(used.head), len as usize)
    }
}
