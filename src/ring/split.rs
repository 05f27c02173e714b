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
//! with [`SplitRing::gather`] are either completed or given back with [`SplitRing::give_back`] before the lock around the
//! ring is released, so at rest "next available" is exactly what GET_VRING_BASE must answer.

#![allow(unsafe_code)] // Ring areas are raw guest memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::{Chain, Chains, Direction, RingError, RingFault};
use crate::limits::{BATCH_BYTES, BATCH_DESCRIPTORS, CHAIN_SEGMENTS, INDIRECT_DESCRIPTORS, RING_SIZE};
use crate::mem::GuestMemory;
use crate::sys::cpu::prefetch_read;

/// VIRTQ_DESC_F_NEXT, _WRITE, _INDIRECT (virtio 1.3, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// VIRTQ_AVAIL_F_NO_INTERRUPT (2.7.7) and VIRTQ_USED_F_NO_NOTIFY (2.7.10).
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// Where a ring lies and how the driver agreed to use it.
#[derive(Debug, Clone, Copy)]
pub struct RingConfig {
    /// Number of descriptors: a power of two up to 32768.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Index of the first available entry to take.
    pub base: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
}

/// One descriptor, read in one go (virtio 1.3, 2.7.5).
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A running split ring.
#[derive(Debug)]
pub struct SplitRing {
    descriptors: *const [u64; 2],
    available: *const AtomicU16,
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
            available: available.cast_const().cast(),
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
            steps: 0,
            config,
            memory,
        };
        ring.next_used = u16::from_le(ring.used_word(1).load(Ordering::Acquire));
        ring.published = ring.next_used;
        Ok(ring)
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Index of the next available entry to take: what GET_VRING_BASE answers.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Goes on at the used index instead of the base, if the driver's available index bears that out.
    ///
    /// A front end that comes back after we have died does not know how far we got. QEMU takes the base from the used
    /// index, but DPDK's virtio-user (`server=1`) sends base 0, and cloud-hypervisor the available index, which would
    /// lose every buffer that the driver has posted. We complete chains in order and leave none behind at a stop, so the
    /// used index is right wherever the two differ; DPDK's vhost library prefers it too.
    pub fn resume(&mut self) {
        let available = u16::from_le(self.available_word(1).load(Ordering::Acquire));
        if available.wrapping_sub(self.next_used) <= self.size {
            self.next_available = self.next_used;
            self.seen_available = self.next_used;
        }
    }

    /// Moves the ring to a new map of the same guest's memory.
    ///
    /// # Errors
    /// The new map does not hold the ring's areas any more.
    pub fn set_memory(&mut self, memory: &Arc<GuestMemory>) -> Result<(), RingFault> {
        let (descriptors, available, used) = areas(&self.config, memory).map_err(|_| RingFault::MemoryGone)?;
        (self.descriptors, self.available, self.used) = (descriptors.cast(), available.cast_const().cast(), used);
        self.memory = Arc::clone(memory);
        self.region = 0;
        Ok(())
    }

    /// How many chains the driver has made available and nobody has taken. Looks at guest memory only when the answer
    /// from the last look is used up.
    #[inline]
    pub fn pending(&mut self) -> Result<u16, RingFault> {
        let known = self.seen_available.wrapping_sub(self.next_available);
        if known > 0 { Ok(known) } else { self.look() }
    }

    /// Reads the available index. Hostile drivers write anything there: more than a ringful is a fault, not a clamp.
    #[inline]
    fn look(&mut self) -> Result<u16, RingFault> {
        let index = u16::from_le(self.available_word(1).load(Ordering::Acquire));
        let pending = index.wrapping_sub(self.next_available);
        if pending > self.size {
            return Err(RingFault::AvailableJump { from: self.next_available, to: index, size: self.size });
        }
        self.seen_available = index;
        Ok(pending)
    }

    /// Takes up to `limit` more chains off the ring and adds them to `chains`, whose spans lie in `memory` (the map that
    /// this ring was started with or last moved to). Stops early when `chains` is full or a batch's worth of bytes is in
    /// it; returns how many were added.
    ///
    /// Two steps per chain are in flight at once: while chain `n` is walked, the descriptor of chain `n + 4` and the
    /// first buffer of each chain walked are on their way into the cache.
    ///
    /// # Errors
    /// What the driver did wrong. The ring must then not be used again.
    #[inline]
    pub fn gather<'m, D: Direction>(
        &mut self,
        memory: &'m GuestMemory,
        limit: usize,
        chains: &mut Chains<'m>,
    ) -> Result<usize, RingFault> {
        let mut pending = usize::from(self.seen_available.wrapping_sub(self.next_available));
        if pending < limit {
            pending = usize::from(self.look()?);
        }
        let limit = limit.min(pending).min(chains.list.remaining_capacity());
        let (mut bytes, mut taken) = (0usize, 0);
        self.steps = 0;
        while taken < limit
            && bytes < BATCH_BYTES
            && self.steps < BATCH_DESCRIPTORS
            && chains.pieces.remaining_capacity() >= CHAIN_SEGMENTS
        {
            if taken + 4 < limit {
                let ahead = self.available_entry(self.next_available.wrapping_add(4));
                prefetch_read(self.descriptors.wrapping_add(usize::from(ahead)));
            }
            bytes += self.walk::<D>(memory, chains)? as usize;
            self.next_available = self.next_available.wrapping_add(1);
            taken += 1;
        }
        Ok(taken)
    }

    /// Gives the last `count` chains that were gathered back to the ring as if they had not been taken.
    #[inline]
    pub fn give_back(&mut self, count: usize) {
        self.next_available = self.next_available.wrapping_sub(count as u16);
        // A driver may have made a ringful available beyond chains that were taken then and are back now. What was seen
        // is never more than a ringful; forgetting it has the next look find the fault.
        if self.seen_available.wrapping_sub(self.next_available) > self.size {
            self.seen_available = self.next_available;
        }
    }

    /// Completes a chain: the driver gets its buffers back, `written` bytes of them filled, once [`SplitRing::publish`]
    /// is called.
    #[inline]
    pub fn complete(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let element = (u64::from(head) | u64::from(written) << 32).to_le();
        // SAFETY: the used area has `size` elements of 8 bytes from offset 4 (virtio 1.3, 2.7.8; `areas` checked its whole
        // length) and `slot < size`. Elements are 4-byte aligned only, hence the unaligned write.
        unsafe { self.used.add(4 + slot * 8).cast::<u64>().write_unaligned(element) };
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Makes all completed chains visible to the driver; returns whether it wants an interrupt for them, or `None` if
    /// there were none.
    #[inline]
    pub fn publish(&mut self) -> Option<bool> {
        if self.published == self.next_used {
            return None;
        }
        let before = self.published;
        self.used_word(1).store(self.next_used.to_le(), Ordering::Release);
        self.published = self.next_used;
        // Our index must be visible before we look whether anybody waits for it (virtio 1.3, 2.7.7.2).
        fence(Ordering::SeqCst);
        Some(self.wants_interrupt(before))
    }

    /// Whether the driver asked to be interrupted for what was published after `before`.
    #[inline]
    fn wants_interrupt(&mut self, before: u16) -> bool {
        if !self.event_idx {
            return u16::from_le(self.available_word(0).load(Ordering::Relaxed)) & NO_INTERRUPT == 0;
        }
        // The first interrupt after a start is unconditional: what the driver has seen before is not known.
        let since = self.signalled.replace(self.published);
        let event = u16::from_le(self.available_word(2 + usize::from(self.size)).load(Ordering::Relaxed));
        since.is_none() || crosses(event, self.published, since.unwrap_or(before))
    }

    /// Asks the driver to notify us of new chains; returns whether there are none yet, that is, whether one may sleep.
    ///
    /// # Errors
    /// See [`SplitRing::pending`].
    pub fn arm(&mut self) -> Result<bool, RingFault> {
        if self.event_idx {
            self.used_word(2 + 4 * usize::from(self.size)).store(self.next_available.to_le(), Ordering::Relaxed);
        } else {
            self.used_word(0).store(0, Ordering::Relaxed);
        }
        // The request must be visible before we look for the last time (virtio 1.3, 2.7.10).
        fence(Ordering::SeqCst);
        Ok(self.look()? == 0)
    }

    /// Tells the driver that notifications are not needed. With EVENT_IDX there is nothing to write: an event index that
    /// stays behind asks for no notification until the index has come all the way round.
    pub fn disarm(&mut self) {
        if !self.event_idx {
            self.used_word(0).store(NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    /// Walks the next chain, which goes to the end of `chains`; returns its bytes. Returning the chain itself would have
    /// it stored field by field and loaded as words again at once, which store forwarding cannot do; that was a third of a batch.
    #[inline]
    fn walk<'m, D: Direction>(&mut self, memory: &'m GuestMemory, chains: &mut Chains<'m>) -> Result<u32, RingFault> {
        let head = self.available_entry(self.next_available);
        if head >= self.size {
            return Err(RingFault::Head { head, size: self.size });
        }
        let first = self.descriptor(head);
        let start = chains.pieces.len() as u16;
        if first.flags & (NEXT | INDIRECT) == 0 && first.len > 0 {
            check_direction::<D>(head, first.flags)?;
            if let Some(span) = memory.span(first.address, first.len, &mut self.region) {
                if D::DEVICE_WRITES {
                    span.prefetch_write()
                } else {
                    span.prefetch()
                }
                chains.pieces.push(span);
                chains.list.push(Chain { head, bytes: first.len, overlong: false, start, count: 1 });
                return Ok(first.len);
            }
        }
        self.walk_long::<D>(memory, chains, head, first)
    }

    /// The rest of [`SplitRing::walk`]: several descriptors, an indirect table, or a buffer across regions.
    #[inline(never)]
    fn walk_long<'m, D: Direction>(
        &mut self,
        memory: &'m GuestMemory,
        chains: &mut Chains<'m>,
        head: u16,
        first: Descriptor,
    ) -> Result<u32, RingFault> {
        let start = chains.pieces.len();
        let mut chain = Chain { head, bytes: 0, overlong: false, start: start as u16, count: 0 };
        let mut descriptor = first;
        // A chain of `size` descriptors uses every one of them; a longer one comes back to one it had (2.7.5.2).
        for _ in 0..self.size {
            self.steps += 1;
            if descriptor.flags & INDIRECT != 0 {
                self.walk_table::<D>(memory, chains, &mut chain, descriptor)?;
            } else {
                add_buffer::<D>(memory, chains, &mut chain, &descriptor)?;
            }
            if descriptor.flags & (NEXT | INDIRECT) != NEXT {
                return Ok(finish(chains, chain));
            }
            if descriptor.next >= self.size {
                return Err(RingFault::Next { head, next: descriptor.next, size: self.size });
            }
            descriptor = self.descriptor(descriptor.next);
        }
        Err(RingFault::Loop { head, size: self.size })
    }

    /// Walks an indirect table (virtio 1.3, 2.7.5.3). Each entry is read once, where the chain comes to it.
    fn walk_table<'m, D: Direction>(
        &mut self,
        memory: &'m GuestMemory,
        chains: &mut Chains<'m>,
        chain: &mut Chain,
        table: Descriptor,
    ) -> Result<(), RingFault> {
        let head = chain.head;
        let entries = self.check_table(head, &table)?;
        let mut at = 0;
        for _ in 0..entries {
            self.steps += 1;
            let address = table.address.wrapping_add(u64::from(at) * 16);
            let unmapped = RingFault::Unmapped { head, address, len: 16 };
            let descriptor = Descriptor::read(memory, address, &mut self.region).ok_or(unmapped)?;
            if descriptor.flags & INDIRECT != 0 {
                return Err(RingFault::Indirect { head, why: "a table within a table", len: table.len });
            }
            add_buffer::<D>(memory, chains, chain, &descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            at = descriptor.next;
            if at >= entries {
                return Err(RingFault::Next { head, next: at, size: entries });
            }
        }
        Err(RingFault::Loop { head, size: entries })
    }

    /// Checks an indirect table's descriptor; returns how many entries it has.
    fn check_table(&self, head: u16, table: &Descriptor) -> Result<u16, RingFault> {
        let entries = table.len / 16;
        let why = if !self.indirect {
            "VIRTIO_F_INDIRECT_DESC was not negotiated"
        } else if table.flags & NEXT != 0 {
            "it is combined with a next descriptor"
        } else if entries == 0 || !table.len.is_multiple_of(16) {
            "its length is not a positive multiple of 16"
        } else if entries > u32::from(INDIRECT_DESCRIPTORS) {
            "it has more than 1024 descriptors"
        } else if ends_beyond_memory(table) {
            return Err(RingFault::Unmapped { head, address: table.address, len: table.len });
        } else {
            return Ok(entries as u16);
        };
        Err(RingFault::Indirect { head, why, len: table.len })
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
        u16::from_le(self.available_word(2 + usize::from(index & (self.size - 1))).load(Ordering::Relaxed))
    }

    /// 16-bit word number `word` of the available area: flags, index, `size` entries, used_event (virtio 1.3, 2.7.6).
    #[inline]
    fn available_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 3 + usize::from(self.size));
        // SAFETY: callers pass words of the layout above, all of which `areas` checked to be mapped and aligned; guest
        // memory of this kind is only ever accessed atomically by us, and `memory` keeps it mapped as long as `self`.
        unsafe { &*self.available.add(word) }
    }

    /// 16-bit word number `word` of the used area: flags, index, `size` elements of four words, avail_event (2.7.8).
    #[inline]
    fn used_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 3 + 4 * usize::from(self.size));
        // SAFETY: as for `available_word`; only flags, index and avail_event are accessed this way, never the elements,
        // which `complete` writes.
        unsafe { &*self.used.cast::<AtomicU16>().add(word) }
    }
}

impl Descriptor {
    #[inline]
    fn from_words([address, rest]: [u64; 2]) -> Self {
        let (address, rest) = (u64::from_le(address), u64::from_le(rest));
        Self { address, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    /// Reads a descriptor of an indirect table, which may lie across regions and need not be aligned.
    #[inline]
    fn read(memory: &GuestMemory, address: u64, region: &mut usize) -> Option<Self> {
        let mut bytes = [0; 16];
        match memory.span(address, 16, region) {
            Some(span) => {
                span.read_exact(&mut bytes);
            }
            None => read_across(memory, address, &mut bytes)?,
        }
        let [a, b, c, d, e, f, g, h, rest @ ..] = bytes;
        Some(Self::from_words([u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u64::from_ne_bytes(rest)]))
    }
}

/// Adds one descriptor's buffer to a chain: usually one piece, more if it lies across regions. Empty buffers are allowed
/// and add nothing, whatever their address (CVE-2020-10725 was about translating those).
fn add_buffer<'m, D: Direction>(
    memory: &'m GuestMemory,
    chains: &mut Chains<'m>,
    chain: &mut Chain,
    descriptor: &Descriptor,
) -> Result<(), RingFault> {
    check_direction::<D>(chain.head, descriptor.flags)?;
    chain.bytes = chain.bytes.saturating_add(descriptor.len);
    let unmapped = RingFault::Unmapped { head: chain.head, address: descriptor.address, len: descriptor.len };
    if ends_beyond_memory(descriptor) {
        return Err(unmapped);
    }
    let (mut address, mut left) = (descriptor.address, descriptor.len);
    while left > 0 {
        let span = memory.span_up_to(address, left).ok_or(unmapped)?;
        left -= span.len() as u32;
        // Wraps only behind the very last byte of a buffer, where nothing is left to look up.
        address = address.wrapping_add(span.len() as u64);
        let used = chains.pieces.len() - usize::from(chain.start);
        if used >= CHAIN_SEGMENTS || chains.pieces.try_push(span).is_err() {
            chain.overlong = true;
            return Ok(());
        }
    }
    Ok(())
}

/// Whether a descriptor's last byte lies beyond the last guest address. Without this check a region that ends at 2^64
/// would be followed by the one at 0.
fn ends_beyond_memory(descriptor: &Descriptor) -> bool {
    descriptor.address.checked_add(u64::from(descriptor.len.saturating_sub(1))).is_none()
}

/// Settles a long chain's pieces, none at all if it was overlong, and adds it to the others; returns its bytes.
fn finish(chains: &mut Chains<'_>, mut chain: Chain) -> u32 {
    let start = usize::from(chain.start);
    if chain.overlong {
        chains.pieces.truncate(start);
    }
    chain.count = (chains.pieces.len() - start) as u16;
    chains.list.push(chain);
    chain.bytes
}

/// Refuses descriptors of the other direction (virtio 1.3, 5.1.6.2 and 5.1.6.3: all readable, all writable).
#[inline]
fn check_direction<D: Direction>(head: u16, flags: u16) -> Result<(), RingFault> {
    if (flags & WRITE != 0) == D::DEVICE_WRITES {
        return Ok(());
    }
    let found = if D::DEVICE_WRITES { "readable" } else { "writable" };
    Err(RingFault::Direction { head, found, expected: D::NAME })
}

/// Whether moving the used index from `old` to `new` passes `event` (vring_need_event of virtio 1.3, 2.7.7.2.1).
#[inline]
fn crosses(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Fills `to` from guest memory, across regions if need be.
fn read_across(memory: &GuestMemory, mut address: u64, mut to: &mut [u8]) -> Option<()> {
    while !to.is_empty() {
        let span = memory.span_up_to(address, to.len() as u32)?;
        let (now, later) = to.split_at_mut(span.len());
        span.read(now);
        address = address.wrapping_add(span.len() as u64);
        to = later;
    }
    Some(())
}

/// Host addresses of the three areas (descriptors, available, used), each checked for its whole length and alignment.
fn areas(config: &RingConfig, memory: &GuestMemory) -> Result<(*mut u8, *mut u8, *mut u8), RingError> {
    let size = u32::from(config.size);
    let area = |area, address, len, align| -> Result<*mut u8, RingError> {
        let span = memory.span(address, len, &mut 0).ok_or(RingError::Unmapped { area, address, len })?;
        let host = span.as_iovec().iov_base.cast::<u8>();
        if host.addr().is_multiple_of(align) { Ok(host) } else { Err(RingError::Misaligned { area, address, align }) }
    };
    Ok((
        area("descriptor", config.descriptors, 16 * size, 16)?,
        area("available", config.available, 6 + 2 * size, 2)?,
        area("used", config.used, 6 + 8 * size, 4)?,
    ))
}
