//! The device's side of a split virtqueue (virtio 1.3, 2.7): [`SplitRing`].
//!
//! Three areas lie in guest memory: the descriptor table and the available ring, which the driver writes, and the used
//! ring, which we write. Their host addresses are checked and resolved once, when the ring starts, for their whole
//! length. After that a batch costs: one read of the available index (only when the cached one is used up), per chain one
//! 2-byte and one 16-byte read, and for giving chains back one 8-byte write each and one publication of the used index.
//!
//! The trial that this shape comes from measured 2 to 3 ns per frame for it, against 23 ns with virtio-queue, which looks
//! a region up for each access and publishes each chain; virtio-queue is the reference that tests compare this with.
//!
//! Who writes what, and in which order:
//! - the driver writes descriptors, then the available entry, then (release) the available index; we read the index with
//!   acquire, so everything before it is visible;
//! - we write payload, then used entries, then (release) the used index; then a full fence, then we read whether the driver
//!   wants an interrupt. The driver does the same the other way round, so one of the two always sees the other's write
//!   (virtio 1.3, 2.7.13.4.1 and 2.7.14).
//!
//! Invariant: `next_used - published` chains have been completed but are not visible to the driver yet; all chains taken
//! with [`SplitRing::gather`] are either completed or given back with [`DeviceRing::give_back`] before the lock around the
//! ring is released, so at rest "next available" is exactly what GET_VRING_BASE must answer.

#![allow(unsafe_code)] // Ring areas are raw guest memory.

mod walk;

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::descriptor::{Descriptor, INDIRECT, NEXT, WRITE, find};
use super::device::area;
use super::{Chain, Chains, DeviceRing, Direction, RingConfig, RingError, RingFault};
use crate::limits::{BATCH_BYTES, BATCH_DESCRIPTORS, RING_SIZE};
use crate::mem::{GuestMemory, Window};
use crate::sys::cpu::prefetch_read;

/// VIRTQ_AVAIL_F_NO_INTERRUPT (2.7.7) and VIRTQ_USED_F_NO_NOTIFY (2.7.10).
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// How many chains before its own turn a descriptor is fetched into the cache.
const DESCRIPTORS_AHEAD: usize = 4;

/// A running split ring.
#[derive(Debug)]
pub struct SplitRing {
    descriptors: *const [u64; 2],
    available: *mut u16,
    used: *mut u8,
    size: u16,
    next_available: u16,
    seen_available: u16,
    next_used: u16,
    published: u16,
    signalled: Option<u16>,
    event_idx: bool,
    indirect: bool,
    region: usize,
    /// An address in the region that buffers were last found in.
    around: u64,
    steps: usize,
    config: RingConfig,
    /// Keeps the areas mapped that the pointers above point into.
    memory: Arc<GuestMemory>,
}

// SAFETY: the pointers lead into mappings that `memory` keeps; one thread at a time has `&mut` to the ring.
unsafe impl Send for SplitRing {}

impl SplitRing {
    /// Starts a ring that lies in `memory`. The used index is taken from the ring itself: after a clean stop it equals the
    /// base, and where it does not (a front end that lost track) the driver counts on by its own.
    ///
    /// # Errors
    /// A size or an alignment that virtio does not allow, or an area that is not wholly in one region.
    pub fn start(config: RingConfig, memory: Arc<GuestMemory>) -> Result<Self, RingError> {
        if !config.size.is_power_of_two() || config.size > RING_SIZE {
            return Err(RingError::Size(config.size));
        }
        let (descriptors, available, used) = areas(&config, &memory)?;
        let mut ring = Self {
            descriptors: descriptors.cast(),
            available: available.cast(),
            used,
            size: config.size,
            next_available: config.base,
            seen_available: config.base,
            next_used: 0,
            published: 0,
            signalled: None,
            event_idx: config.event_idx,
            indirect: config.indirect,
            region: 0,
            around: 0,
            steps: 0,
            config,
            memory,
        };
        ring.next_used = ring.read_used_index();
        ring.published = ring.next_used;
        Ok(ring)
    }

    /// Goes on at the used index instead of the base, if the driver's available index bears that out.
    ///
    /// A front end that comes back after we have died does not know how far we got. QEMU takes the base from the used
    /// index, but DPDK's virtio-user (`server=1`) sends base 0, and cloud-hypervisor the available index, which would
    /// lose every buffer that the driver has posted. We complete chains in order and leave none behind at a stop, so the
    /// used index is right wherever the two differ; DPDK's vhost library prefers it too.
    pub fn resume(&mut self) {
        let available = self.read_available(1, Ordering::Acquire);
        if available.wrapping_sub(self.next_used) <= self.size {
            self.next_available = self.next_used;
            self.seen_available = self.next_used;
        }
    }

    /// Reads the available index. Hostile drivers write anything there: more than a ringful is a fault, not a clamp.
    #[inline]
    fn look(&mut self) -> Result<u16, RingFault> {
        let index = self.read_available(1, Ordering::Acquire);
        let pending = index.wrapping_sub(self.next_available);
        if pending > self.size {
            return Err(RingFault::AvailableJump { from: self.next_available, to: index, size: self.size });
        }
        self.seen_available = index;
        Ok(pending)
    }

    /// Whether the driver asked to be interrupted for what was published after `before`.
    #[inline]
    fn wants_interrupt(&mut self, before: u16) -> bool {
        if !self.event_idx {
            return self.read_available(0, Ordering::Relaxed) & NO_INTERRUPT == 0;
        }
        // The first interrupt after a start is unconditional: what the driver has seen before is not known.
        let since = self.signalled.replace(self.published);
        let event = self.read_available(2 + usize::from(self.size), Ordering::Relaxed);
        since.is_none() || crosses(event, self.published, since.unwrap_or(before))
    }

    /// Takes chains of one buffer, of the right direction, not empty, in the region of `window`, until there is another one; `most`
    /// at most, which are available. Returns how many; they have still to be taken off the ring.
    ///
    /// Two steps per chain are in flight at once: while chain `n` is looked at, the descriptor of chain `n + 4` and the first buffer
    /// of each chain before it are on their way into the cache. A function of its own, so that the compiler has registers for all
    /// that it needs: with the rest around it, it loads and stores half of that for each chain.
    #[inline(never)]
    fn gather_plain<'m, D: Direction>(
        &self,
        window: &Window<'m>,
        most: usize,
        bytes: &mut usize,
        chains: &mut Chains<'m>,
    ) -> usize {
        let mut sum = *bytes;
        let count = chains.push_singles(most, |count| {
            let at = self.next_available.wrapping_add(count as u16);
            if count + DESCRIPTORS_AHEAD < most {
                let ahead = self.available_entry(at.wrapping_add(DESCRIPTORS_AHEAD as u16));
                prefetch_read(self.descriptors.wrapping_add(usize::from(ahead)));
            }
            let head = self.available_entry(at);
            if head >= self.size || sum >= BATCH_BYTES {
                return None;
            }
            let descriptor = self.descriptor(head);
            if !is_plain::<D>(&descriptor) {
                return None;
            }
            let span = window.span(descriptor.address, descriptor.len)?;
            D::prefetch(&span);
            sum += span.len();
            Some((head, span))
        });
        *bytes = sum;
        count
    }

    /// Reads descriptor `index`, each byte once. `index` is below the ring's size.
    #[inline]
    fn descriptor(&self, index: u16) -> Descriptor {
        let index = usize::from(index & (self.size - 1));
        // SAFETY: the table has `size` entries of 16 bytes (`areas` checked its whole length and alignment) and `index` is
        // masked below `size`. Volatile, because the driver may write at any time and each word must be read just once.
        let words = unsafe { self.descriptors.add(index).read_volatile() };
        Descriptor::from_words(words)
    }

    /// Entry `index` of the available ring, by free-running index.
    #[inline]
    fn available_entry(&self, index: u16) -> u16 {
        self.read_available(2 + usize::from(index & (self.size - 1)), Ordering::Relaxed)
    }

    /// Reads 16-bit word number `word` of the available area: flags, index, `size` entries, used_event (virtio 1.3, 2.7.6).
    /// A reference to it would claim that nothing else lies there; a hostile driver may lay its areas over each other.
    #[inline]
    fn read_available(&self, word: usize, order: Ordering) -> u16 {
        debug_assert!(word < 3 + usize::from(self.size));
        // SAFETY: callers pass words of the layout above, all of which `areas` checked to be mapped and aligned, and
        // `memory` keeps them mapped as long as `self`. The atomic exists for this one access.
        u16::from_le(unsafe { AtomicU16::from_ptr(self.available.add(word)) }.load(order))
    }

    /// Reads the used index: what the device's side published last, or what the driver made of it.
    fn read_used_index(&self) -> u16 {
        // SAFETY: the used area begins with flags and index (2.7.8), and `areas` checked it as a whole.
        u16::from_le(unsafe { AtomicU16::from_ptr(self.used.cast::<u16>().add(1)) }.load(Ordering::Acquire))
    }

    /// Writes element `index` of the used ring, by free-running index.
    #[inline]
    fn write_element(&self, index: u16, head: u16, written: u32) {
        let slot = usize::from(index & (self.size - 1));
        let element = (u64::from(head) | u64::from(written) << 32).to_le();
        // SAFETY: the used area has `size` elements of 8 bytes from offset 4 (virtio 1.3, 2.7.8; `areas` checked its whole
        // length) and `slot < size`. Elements are 4-byte aligned only, hence the unaligned write.
        unsafe { self.used.add(4 + slot * 8).cast::<u64>().write_unaligned(element) };
    }

    /// Writes elements from the next one on; returns the index behind the last one. With `self` shared, which its compiler knows not
    /// to change meanwhile.
    #[inline]
    fn write_elements<'c>(&self, chains: impl Iterator<Item = (&'c Chain, u32)>) -> u16 {
        let mut index = self.next_used;
        for (chain, written) in chains {
            self.write_element(index, chain.head, written);
            index = index.wrapping_add(1);
        }
        index
    }

    /// Writes 16-bit word number `word` of the used area: flags, index, `size` elements of four words, avail_event
    /// (2.7.8). Never an element: those [`SplitRing::write_element`] writes.
    #[inline]
    fn write_used(&self, word: usize, value: u16, order: Ordering) {
        debug_assert!(word < 3 + 4 * usize::from(self.size));
        // SAFETY: as for `read_available`.
        unsafe { AtomicU16::from_ptr(self.used.cast::<u16>().add(word)) }.store(value.to_le(), order);
    }
}

impl DeviceRing for SplitRing {
    fn size(&self) -> u16 {
        self.size
    }

    /// Index of the next available entry to take.
    fn base(&self) -> u16 {
        self.next_available
    }

    fn set_memory(&mut self, memory: &Arc<GuestMemory>) -> Result<(), RingFault> {
        let (descriptors, available, used) = areas(&self.config, memory).map_err(|_| RingFault::MemoryGone)?;
        (self.descriptors, self.available, self.used) = (descriptors.cast(), available.cast(), used);
        self.memory = Arc::clone(memory);
        self.region = 0;
        Ok(())
    }

    /// Looks at guest memory only when the answer from the last look is used up.
    #[inline]
    fn pending(&mut self) -> Result<u16, RingFault> {
        let known = self.seen_available.wrapping_sub(self.next_available);
        if known > 0 { Ok(known) } else { self.look() }
    }

    /// Nearly all that there is are chains of one buffer in one region, which [`SplitRing::gather_plain`] takes.
    #[inline]
    fn gather<'m, D: Direction>(
        &mut self,
        memory: &'m GuestMemory,
        limit: usize,
        chains: &mut Chains<'m>,
    ) -> Result<usize, RingFault> {
        let mut pending = usize::from(self.seen_available.wrapping_sub(self.next_available));
        if pending < limit {
            pending = usize::from(self.look()?);
        }
        let limit = limit.min(pending).min(chains.room());
        let (mut bytes, mut taken) = (0usize, 0);
        let mut window = memory.window(self.around);
        self.steps = 0;
        while taken < limit && bytes < BATCH_BYTES {
            let plain = self.gather_plain::<D>(&window, limit - taken, &mut bytes, chains);
            self.next_available = self.next_available.wrapping_add(plain as u16);
            taken += plain;
            if taken == limit || bytes >= BATCH_BYTES {
                break;
            }
            let head = self.available_entry(self.next_available);
            if head >= self.size {
                return Err(RingFault::Head { head, size: self.size });
            }
            let first = self.descriptor(head);
            let mut goes_on = true;
            if is_plain::<D>(&first)
                && let Some(span) = find(memory, &mut window, &mut self.around, &first)
            {
                D::prefetch(&span);
                bytes += span.len();
                chains.push_singles(1, |_| Some((head, span)));
            } else {
                bytes += self.walk::<D>(memory, chains, head, first)? as usize;
                goes_on = self.steps < BATCH_DESCRIPTORS && chains.has_room(limit - taken);
            }
            self.next_available = self.next_available.wrapping_add(1);
            taken += 1;
            if !goes_on {
                break;
            }
        }
        Ok(taken)
    }

    #[inline]
    fn steps(&self) -> usize {
        self.steps
    }

    #[inline]
    fn give_back(&mut self, chains: &[Chain]) {
        self.next_available = self.next_available.wrapping_sub(chains.len() as u16);
        // A driver may have made a ringful available beyond chains that were taken then and are back now. What was seen
        // is never more than a ringful; forgetting it has the next look find the fault.
        if self.seen_available.wrapping_sub(self.next_available) > self.size {
            self.seen_available = self.next_available;
        }
    }

    #[inline]
    fn complete(&mut self, chain: &Chain, written: u32) {
        self.write_element(self.next_used, chain.head, written);
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline]
    fn complete_all<'c>(&mut self, chains: impl Iterator<Item = (&'c Chain, u32)>) {
        self.next_used = self.write_elements(chains);
    }

    #[inline]
    fn publish(&mut self) -> Option<bool> {
        if self.published == self.next_used {
            return None;
        }
        let before = self.published;
        self.write_used(1, self.next_used, Ordering::Release);
        self.published = self.next_used;
        // Our index must be visible before we look whether anybody waits for it (virtio 1.3, 2.7.7.2).
        fence(Ordering::SeqCst);
        Some(self.wants_interrupt(before))
    }

    fn arm(&mut self) -> Result<bool, RingFault> {
        if self.event_idx {
            self.write_used(2 + 4 * usize::from(self.size), self.next_available, Ordering::Relaxed);
        } else {
            self.write_used(0, 0, Ordering::Relaxed);
        }
        // The request must be visible before we look for the last time (virtio 1.3, 2.7.10).
        fence(Ordering::SeqCst);
        Ok(self.look()? == 0)
    }

    /// With EVENT_IDX there is nothing to write: an event index that stays behind asks for no notification until the
    /// index has come all the way round.
    fn disarm(&mut self) {
        if !self.event_idx {
            self.write_used(0, NO_NOTIFY, Ordering::Relaxed);
        }
    }
}

/// Whether a chain that begins with this descriptor is one buffer, of the right direction, and not empty.
#[inline]
fn is_plain<D: Direction>(descriptor: &Descriptor) -> bool {
    descriptor.flags & (NEXT | INDIRECT | WRITE) == D::FLAGS && descriptor.len > 0
}

/// Whether moving the used index from `old` to `new` passes `event` (vring_need_event of virtio 1.3, 2.7.7.2.1).
#[inline]
fn crosses(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Host addresses of the three areas (descriptors, available, used), each checked for its whole length and alignment.
fn areas(config: &RingConfig, memory: &GuestMemory) -> Result<(*mut u8, *mut u8, *mut u8), RingError> {
    let size = u32::from(config.size);
    Ok((
        area(memory, "descriptor", config.descriptors, 16 * size, 16)?,
        area(memory, "available", config.available, 6 + 2 * size, 2)?,
        area(memory, "used", config.used, 6 + 8 * size, 4)?,
    ))
}
