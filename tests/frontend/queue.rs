//! A guest's bookkeeping of one virtqueue, split or packed: [`Queue`] makes chains available, publishes them, and collects what
//! was used. What the bytes are is [`driver`]'s concern.
//!
//! It keeps every promise that virtio 1.2 asks of a driver and panics when the device breaks one of its own: a used
//! entry for a head that is not outstanding, a length beyond the buffer, IN_ORDER violated, an interrupt lost.
//!
//! [`driver`]: super::driver

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use super::doorbell::{Doorbell, wait_any};
use super::packed::{BY_DESC, DISABLE, ENABLE, FIRST_BASE, Packed, Place};
use super::ring::{DESC_LEN, Desc, INDIRECT, NO_INTERRUPT, NO_NOTIFY, Ring, WRITE};
use super::session::feature;

/// Entries of the indirect table that each head has at hand.
const TABLE: u64 = 64;

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

    /// Serves up to `most` available entries in the device's place, as QEMU does with a TX ring whose link is down, stopped or
    /// without a back end. It begins at `base`, wherever the device got since, and returns where it would go on.
    pub fn serve_as_vmm(&self, base: u16, most: u16) -> u16 {
        if self.packed.is_some() {
            return Packed::serve(&self.ring, base, most);
        }
        let mut idx = self.ring.used_idx();
        let count = self.ring.avail_idx().wrapping_sub(idx).min(most);
        for _ in 0..count {
            self.ring.set_used_entry(idx, self.ring.avail_entry(idx).into(), 0);
            idx = idx.wrapping_add(1);
        }
        self.ring.set_used_idx(idx);
        base.wrapping_add(count)
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
