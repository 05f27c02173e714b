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

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::descriptor::{Descriptor, INDIRECT, NEXT, WRITE, add_buffer, check_table, find, finish};
use super::device::area;
use super::place::{AVAIL, Place, USED, passes};
use super::record::{Element, Record};
use super::{Chain, Chains, DeviceRing, Direction, RingConfig, RingError, RingFault};
use crate::limits::{BATCH_BYTES, BATCH_DESCRIPTORS, RING_SIZE};
use crate::mem::GuestMemory;
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

    /// Walks a chain that is more than one buffer in one region: several descriptors, an indirect table, a buffer across
    /// regions. `first` is its first descriptor. Returns its bytes.
    #[inline(never)]
    fn walk<'m, D: Direction>(
        &mut self,
        memory: &'m GuestMemory,
        chains: &mut Chains<'m>,
        first: Packed,
    ) -> Result<u32, RingFault> {
        let head = self.next.slot();
        let start = chains.pieces.len() as u16;
        let mut chain = Chain { head, bytes: 0, overlong: false, slots: 0, start, count: 0 };
        let (mut at, mut packed) = (self.next, first);
        // Slots that are with us already cannot be available once more; a chain ends before it comes to them (2.8.17).
        while self.taken + chain.slots < self.size {
            self.steps += 1;
            chain.slots += 1;
            if packed.descriptor.flags & INDIRECT != 0 {
                self.walk_table::<D>(memory, chains, &mut chain, packed.descriptor)?;
            } else {
                add_buffer::<D>(memory, chains, &mut chain, &packed.descriptor)?;
            }
            if packed.descriptor.flags & NEXT == 0 {
                self.take(chain.slots);
                // The id of a chain is in its last descriptor (2.8.6).
                chain.head = packed.id;
                return Ok(finish(chains, chain));
            }
            at = at.forward(1, self.size);
            packed = self.descriptor(at.slot(), self.tail(at.slot()));
        }
        Err(RingFault::Overrun { head, size: self.size })
    }

    /// Walks an indirect table (virtio 1.3, 2.8.7): all of its entries, in order. Each is read once.
    fn walk_table<'m, D: Direction>(
        &mut self,
        memory: &'m GuestMemory,
        chains: &mut Chains<'m>,
        chain: &mut Chain,
        table: Descriptor,
    ) -> Result<(), RingFault> {
        let head = chain.head;
        for at in 0..check_table(self.indirect, head, &table)? {
            self.steps += 1;
            let address = table.address.wrapping_add(u64::from(at) * 16);
            let unmapped = RingFault::Unmapped { head, address, len: 16 };
            let descriptor = Descriptor::read(memory, address, &mut self.region).ok_or(unmapped)?;
            // The words of a table's entry lie as those of a split ring's descriptor but for the last two fields. DPDK's
            // driver (22.11) leaves WRITE in entries that it means to be read; reading them harms nobody.
            let flags = if D::DEVICE_WRITES { descriptor.next } else { descriptor.next & !WRITE };
            let descriptor = Descriptor { flags, next: 0, ..descriptor };
            if descriptor.flags & INDIRECT != 0 {
                return Err(RingFault::Indirect { head, why: "a table within a table", len: table.len });
            }
            add_buffer::<D>(memory, chains, chain, &descriptor)?;
        }
        Ok(())
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
            let slot = self.next.slot();
            prefetch_read(self.descriptors.wrapping_add(usize::from(slot + AHEAD)));
            let tail = self.tail(slot);
            if (tail >> 48) as u16 & (AVAIL | USED) != self.next.available_bits() {
                break;
            }
            let first = self.descriptor(slot, tail);
            let Descriptor { len, flags, .. } = first.descriptor;
            // One buffer, of the right direction, not empty, in one region: nearly every chain.
            let plain = flags & (NEXT | INDIRECT | WRITE) == D::FLAGS && len > 0 && self.taken < self.size;
            if plain && let Some(span) = find(memory, &mut window, &mut self.around, &first.descriptor) {
                D::prefetch(&span);
                chains.push_single(first.id, span);
                bytes += len as usize;
                self.take(1);
            } else {
                bytes += self.walk::<D>(memory, chains, first)? as usize;
                if self.steps >= BATCH_DESCRIPTORS || !chains.has_room(limit - gathered) {
                    return Ok(gathered + 1);
                }
            }
            gathered += 1;
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
        let id = u64::from(chain.head) << 32;
        let here = self.used;
        self.used = here.forward(chain.slots, self.size);
        self.newest = chain.head;
        if self.merges && self.completed > 0 {
            // The one element there is stands for this chain too.
            return;
        }
        let flags = here.used_bits() | if written > 0 { WRITE } else { 0 };
        let word = u64::from(written) | id | u64::from(flags) << 48;
        if self.record.set_element(self.completed, Element { word, slot: here.slot() }) {
            self.completed += 1;
        }
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

/// Host addresses of the ring and of the two words of event suppression, the driver's first, each checked for its whole
/// length and alignment (virtio 1.3, 2.8.10.1).
fn areas(config: &RingConfig, memory: &GuestMemory) -> Result<(*mut u8, *mut u8, *mut u8), RingError> {
    Ok((
        area(memory, "descriptor", config.descriptors, 16 * u32::from(config.size), 16)?,
        area(memory, "driver event", config.available, 4, 4)?,
        area(memory, "device event", config.used, 4, 4)?,
    ))
}
