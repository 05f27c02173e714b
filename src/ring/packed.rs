//! The device's side of a packed virtqueue (virtio 1.3, 2.8): [`PackedRing`].
//!
//! One ring of descriptors lies in guest memory, which both sides write, and two words of event suppression, one for each
//! side to write. A descriptor belongs to the device when its AVAIL bit equals the driver's wrap counter and its USED bit
//! does not, and to the driver when both equal the device's. So nothing but descriptors is read for a batch: one acquire
//! load of length, id and flags each, and one load of the address behind it.
//!
//! What comes back goes into a list first ([`super::record`]), and [`DeviceRing::publish`] writes it to the ring, one 8-byte store per
//! chain, the last one first and the first one with release: the driver, which looks at them in order, sees all or
//! nothing. That keeps the cache lines of the ring with us for one burst per batch instead of one store per frame, and
//! leaves no ring half published if we die: what is not published is still available.
//!
//! With IN_ORDER the frames of a batch that the device only read come back as one element, with the id of the last
//! (virtio 1.3, 2.8.9). The other descriptors of the batch are then not written at all, which saves the driver a cache
//! miss for each four of them; DPDK's driver and vhost library do the same.
//!
//! Invariant: `taken` slots, from `used` up to `next`, are with us: gathered and not yet published. It never exceeds the
//! ring's size, so the list never overflows. At rest it is zero, and `next` with its wrap counter is what GET_VRING_BASE
//! must answer.

#![allow(unsafe_code)] // The ring is raw guest memory.

mod resume;
mod walk;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::descriptor::{Descriptor, INDIRECT, NEXT, WRITE, find};
use super::device::area;
use super::place::{AVAIL, Place, USED, passes};
use super::record::{Element, Record};
use super::{Chain, Chains, DeviceRing, Direction, RingConfig, RingError, RingFault};
use crate::limits::{BATCH_BYTES, BATCH_DESCRIPTORS, RING_SIZE};
use crate::mem::{GuestMemory, Window};
use crate::sys::cpu::prefetch_read;

/// RING_EVENT_FLAGS_ENABLE, _DISABLE, _DESC (2.8.10), in the upper half of an event suppression word.
const ENABLE: u32 = 0;
const DISABLE: u32 = 1;
const DESC: u32 = 2;
/// How many descriptors ahead the ring is fetched into the cache: two lines.
const AHEAD: u16 = 8;

/// A running packed ring.
#[derive(Debug)]
pub struct PackedRing {
    descriptors: *mut [u64; 2],
    /// Event suppression: the driver's word, then ours.
    driver_event: *mut u32,
    device_event: *mut u32,
    size: u16,
    next: Place,
    used: Place,
    taken: u16,
    /// Where the ring stands, and the list of what is to be published: `completed` entries.
    record: Record,
    completed: u16,
    /// The id that was completed last.
    newest: u16,
    /// Where publishing went on last; what is between it and `used` is completed.
    published: Place,
    /// The driver was told once where it counts from.
    signalled: bool,
    /// Frames that were only read may come back together.
    merges: bool,
    event_idx: bool,
    indirect: bool,
    in_order: bool,
    region: usize,
    /// An address in the region that buffers were last found in.
    around: u64,
    steps: usize,
    config: RingConfig,
    /// Keeps the areas mapped that the pointers above point into.
    memory: Arc<GuestMemory>,
}

// SAFETY: the pointers lead into mappings that `memory` keeps; one thread at a time has `&mut` to the ring.
unsafe impl Send for PackedRing {}

impl PackedRing {
    /// Starts a ring that lies in `memory`. The base has the wrap counter in bit 15, and holds for both directions: we
    /// leave nothing behind at a stop.
    ///
    /// # Errors
    /// A size, an alignment or a base that virtio does not allow, or an area that is not wholly in one region.
    pub fn start(config: RingConfig, memory: Arc<GuestMemory>) -> Result<Self, RingError> {
        if config.size == 0 || config.size > RING_SIZE {
            return Err(RingError::PackedSize(config.size));
        }
        let base = Place(config.base);
        if base.slot() >= config.size {
            return Err(RingError::Base { base: config.base, size: config.size });
        }
        let (descriptors, driver_event, device_event) = areas(&config, &memory)?;
        Ok(Self {
            descriptors: descriptors.cast(),
            driver_event: driver_event.cast(),
            device_event: device_event.cast(),
            size: config.size,
            next: base,
            used: base,
            taken: 0,
            record: Record::private(config.size),
            completed: 0,
            newest: 0,
            published: base,
            signalled: false,
            merges: false,
            event_idx: config.event_idx,
            indirect: config.indirect,
            in_order: config.in_order,
            region: 0,
            around: 0,
            steps: 0,
            config,
            memory,
        })
    }

    /// Reads length, id and flags of the descriptor in `slot`, with acquire: what the driver wrote before it made the
    /// descriptor available is visible.
    #[inline]
    fn tail(&self, slot: u16) -> u64 {
        debug_assert!(slot < self.size);
        // SAFETY: the ring has `size` descriptors of two words (`areas` checked its whole length and alignment), every
        // `Place` is below `size`, and `memory` keeps it mapped. The atomic exists for this one access.
        let tail = unsafe { AtomicU64::from_ptr(self.descriptors.add(slot.into()).cast::<u64>().add(1)) };
        u64::from_le(tail.load(Ordering::Acquire))
    }

    /// The descriptor in `slot` whose second word is `tail`.
    #[inline]
    fn descriptor(&self, slot: u16, tail: u64) -> Packed {
        debug_assert!(slot < self.size);
        // SAFETY: as for `tail`; this is the first word of the same descriptor.
        let address = unsafe { AtomicU64::from_ptr(self.descriptors.add(slot.into()).cast::<u64>()) };
        let address = u64::from_le(address.load(Ordering::Relaxed));
        // The last field is the id here, so there is no `next`.
        let descriptor = Descriptor { address, len: tail as u32, flags: (tail >> 48) as u16, next: 0 };
        Packed { descriptor, id: (tail >> 32) as u16 }
    }

    /// Writes a used descriptor.
    #[inline]
    fn write(&self, element: Element, order: Ordering) {
        // Our own elements lie within the ring; those that a record tells of may be anything by now.
        if element.slot >= self.size {
            return;
        }
        // SAFETY: as for `tail`: the slot is within the ring.
        let tail = unsafe { AtomicU64::from_ptr(self.descriptors.add(element.slot.into()).cast::<u64>().add(1)) };
        tail.store(element.word.to_le(), order);
    }

    /// Writes the first `count` used descriptors of the list, the first one last and with release: that is when the driver,
    /// which goes by order, sees them.
    #[inline]
    fn write_list(&self, count: u16) {
        for at in (1..count).rev() {
            if let Some(element) = self.record.element(at) {
                self.write(element, Ordering::Relaxed);
            }
        }
        if let Some(first) = self.record.element(0) {
            self.write(first, Ordering::Release);
        }
    }

    /// What the driver says about interrupts.
    #[inline]
    fn driver_event(&self) -> u32 {
        // SAFETY: `areas` checked that the word is mapped and aligned, and `memory` keeps it so.
        u32::from_le(unsafe { AtomicU32::from_ptr(self.driver_event) }.load(Ordering::Relaxed))
    }

    /// Says something about notifications.
    fn set_device_event(&self, event: u32) {
        // SAFETY: as for `driver_event`.
        unsafe { AtomicU32::from_ptr(self.device_event) }.store(event.to_le(), Ordering::Release);
    }

    /// Whether the descriptor at `next` is available.
    #[inline]
    fn has_next(&self) -> bool {
        let flags = (self.tail(self.next.slot()) >> 48) as u16;
        flags & (AVAIL | USED) == self.next.available_bits()
    }

    /// Takes what nearly all is that there is: chains of one buffer, of the right direction, not empty, in the region of `window`;
    /// up to the end of the lap, and `most` at most. Returns how many; they have still to be taken off the ring.
    ///
    /// A function of its own, so that the compiler has registers for all that it needs: with the rest around it, it loads and
    /// stores half of that for each descriptor.
    #[inline(never)]
    fn gather_plain<'m, D: Direction>(
        &self,
        window: &Window<'m>,
        most: usize,
        bytes: &mut usize,
        chains: &mut Chains<'m>,
    ) -> usize {
        let (begin, plain) = (self.next.slot(), self.next.available_bits() | D::FLAGS);
        let left = usize::from((self.size - begin).min(self.size - self.taken));
        let mut sum = *bytes;
        let count = chains.push_singles(most.min(left), |count| {
            let slot = begin + count as u16;
            prefetch_read(self.descriptors.wrapping_add(usize::from(slot + AHEAD)));
            let tail = self.tail(slot);
            let Packed { descriptor, id } = self.descriptor(slot, tail);
            if descriptor.flags & (AVAIL | USED | NEXT | INDIRECT | WRITE) != plain
                || descriptor.len == 0
                || sum >= BATCH_BYTES
            {
                return None;
            }
            let span = window.span(descriptor.address, descriptor.len)?;
            D::prefetch(&span);
            sum += span.len();
            Some((id, span))
        });
        *bytes = sum;
        count
    }

    /// Lists chains as completed; returns where the ring is used up to then, how many the list has, and the id of the last one.
    ///
    /// A function of its own as [`PackedRing::gather_plain`] is.
    #[inline(never)]
    fn list<'c>(&self, chains: impl Iterator<Item = (&'c Chain, u32)>) -> (Place, u16, u16) {
        let (mut here, mut completed, mut newest) = (self.used, self.completed, self.newest);
        for (chain, written) in chains {
            completed += u16::from(self.record.set_element(completed, used_element(here, chain, written)));
            here = here.forward(chain.slots, self.size);
            newest = chain.head;
        }
        (here, completed, newest)
    }

    /// Whether a descriptor that is available is a chain of one buffer, of the right direction, not empty, that may be.
    fn is_plain<D: Direction>(&self, descriptor: &Descriptor) -> bool {
        let Descriptor { flags, len, .. } = *descriptor;
        flags & (NEXT | INDIRECT | WRITE) == D::FLAGS && len > 0 && self.taken < self.size
    }

    /// Takes `slots` descriptors off the ring.
    #[inline]
    fn take(&mut self, slots: u16) {
        self.next = self.next.forward(slots, self.size);
        self.taken += slots;
    }

    /// Whether the driver asked to be interrupted for what was published from `before` on.
    #[inline]
    fn wants_interrupt(&mut self, before: Place) -> bool {
        let event = self.driver_event();
        // The first interrupt by index is unconditional: what the driver has seen before is not known.
        let first = !std::mem::replace(&mut self.signalled, true);
        match event >> 16 {
            ENABLE => true,
            DESC if self.event_idx => first || passes(Place(event as u16), before, self.published, self.size),
            // DISABLE, and what no driver may write, which asks for nothing.
            _ => false,
        }
    }
}

/// One descriptor of a packed ring.
#[derive(Debug, Clone, Copy)]
struct Packed {
    descriptor: Descriptor,
    id: u16,
}

impl DeviceRing for PackedRing {
    fn size(&self) -> u16 {
        self.size
    }

    /// Place of the next descriptor to take, with the wrap counter in bit 15.
    fn base(&self) -> u16 {
        self.next.0
    }

    fn set_memory(&mut self, memory: &Arc<GuestMemory>) -> Result<(), RingFault> {
        let (descriptors, driver_event, device_event) =
            areas(&self.config, memory).map_err(|_| RingFault::MemoryGone)?;
        self.descriptors = descriptors.cast();
        (self.driver_event, self.device_event) = (driver_event.cast(), device_event.cast());
        self.memory = Arc::clone(memory);
        self.region = 0;
        Ok(())
    }

    /// 1 or 0: further chains show only when this one is walked.
    #[inline]
    fn pending(&mut self) -> Result<u16, RingFault> {
        if !self.has_next() {
            return Ok(0);
        }
        if self.taken < self.size { Ok(1) } else { Err(RingFault::Overrun { head: self.next.slot(), size: self.size }) }
    }

    /// Descriptors lie in the order they are walked, so the hint that fetches them costs next to nothing; the first buffer
    /// of each chain walked is on its way into the cache too.
    #[inline]
    fn gather<'m, D: Direction>(
        &mut self,
        memory: &'m GuestMemory,
        limit: usize,
        chains: &mut Chains<'m>,
    ) -> Result<usize, RingFault> {
        let limit = limit.min(chains.room());
        let (mut bytes, mut gathered) = (0usize, 0);
        let mut window = memory.window(self.around);
        self.steps = 0;
        self.merges = self.in_order && !D::DEVICE_WRITES;
        while gathered < limit && bytes < BATCH_BYTES {
            let plain = self.gather_plain::<D>(&window, limit - gathered, &mut bytes, chains);
            self.take(plain as u16);
            gathered += plain;
            if gathered == limit || bytes >= BATCH_BYTES || !self.has_next() {
                break;
            }
            // What is no plain one, or where a lap or a region ends.
            let slot = self.next.slot();
            let first = self.descriptor(slot, self.tail(slot));
            if self.is_plain::<D>(&first.descriptor)
                && let Some(span) = find(memory, &mut window, &mut self.around, &first.descriptor)
            {
                D::prefetch(&span);
                bytes += span.len();
                gathered += chains.push_singles(1, |_| Some((first.id, span)));
                self.take(1);
                continue;
            }
            bytes += self.walk::<D>(memory, chains, first)? as usize;
            gathered += 1;
            if self.steps >= BATCH_DESCRIPTORS || !chains.has_room((limit + 1).saturating_sub(gathered)) {
                break;
            }
        }
        Ok(gathered)
    }

    #[inline]
    fn steps(&self) -> usize {
        self.steps
    }

    #[inline]
    fn give_back(&mut self, chains: &[Chain]) {
        let slots: u16 = chains.iter().map(|chain| chain.slots).sum();
        self.next = self.next.back(slots, self.size);
        self.taken -= slots;
    }

    #[inline]
    fn complete(&mut self, chain: &Chain, written: u32) {
        let here = self.used;
        self.used = here.forward(chain.slots, self.size);
        self.newest = chain.head;
        if self.merges && self.completed > 0 {
            // The one element there is stands for this chain too.
            return;
        }
        if self.record.set_element(self.completed, used_element(here, chain, written)) {
            self.completed += 1;
        }
    }

    #[inline]
    fn complete_all<'c>(&mut self, chains: impl Iterator<Item = (&'c Chain, u32)>) {
        if self.merges {
            return chains.for_each(|(chain, written)| self.complete(chain, written));
        }
        (self.used, self.completed, self.newest) = self.list(chains);
    }

    #[inline]
    fn publish(&mut self) -> Option<bool> {
        let at = self.completed.checked_sub(1)?;
        let mut last = self.record.element(at)?;
        if self.merges {
            last.word = last.word & !(0xffff << 32) | u64::from(self.newest) << 32;
            self.record.set_element(at, last);
        }
        self.record.begin(self.published.0, self.used.0, self.completed);
        self.write_list(self.completed);
        self.record.settle(self.used.0, last);
        let before = std::mem::replace(&mut self.published, self.used);
        self.taken -= before.distance(self.used, self.size);
        self.completed = 0;
        // The descriptors must be visible before we look whether anybody waits for them.
        fence(Ordering::SeqCst);
        Some(self.wants_interrupt(before))
    }

    fn arm(&mut self) -> Result<bool, RingFault> {
        let event = if self.event_idx { DESC << 16 | u32::from(self.next.0) } else { ENABLE };
        self.set_device_event(event);
        // The request must be visible before we look for the last time.
        fence(Ordering::SeqCst);
        Ok(self.pending()? == 0)
    }

    fn disarm(&mut self) {
        self.set_device_event(DISABLE << 16);
    }
}

/// What is written where a chain is used, of which so many bytes were written.
#[inline]
fn used_element(here: Place, chain: &Chain, written: u32) -> Element {
    let flags = here.used_bits() | if written > 0 { WRITE } else { 0 };
    let word = u64::from(written) | u64::from(chain.head) << 32 | u64::from(flags) << 48;
    Element { word, slot: here.slot() }
}

/// Host addresses of the ring and of the two words of event suppression, the driver's first, each checked for its whole
/// length and alignment (virtio 1.3, 2.8.10.1).
fn areas(config: &RingConfig, memory: &GuestMemory) -> Result<(*mut u8, *mut u8, *mut u8), RingError> {
    Ok((
        area(memory, "descriptor", config.descriptors, 16 * u32::from(config.size), 16)?,
        area(memory, "driver event", config.available, 4, 4)?,
        area(memory, "device event", config.used, 4, 4)?,
    ))
}
