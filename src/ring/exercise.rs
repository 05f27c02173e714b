//! A ring driven by arbitrary bytes, with everything asserted that must hold whatever they are: [`exercise`] for a split
//! ring, [`exercise_packed`] for a packed one. The fuzz targets `ring` and `packed` call them, and so do the tests, with the
//! seeds of `fuzz/seeds` and with random bytes.
//!
//! The bytes are, in this order (integers little-endian, missing ones zero):
//! - 8 bytes: the size, of a split ring as a power of two (modulo 16), of a packed one as a number whose high byte comes
//!   last; flags (1 EVENT_IDX, 2 INDIRECT_DESC, 4 the device writes, 8 IN_ORDER); the base; where the three areas of the
//!   ring lie, one byte each, in units of 512 bytes; the high byte of a packed ring's size
//! - 2 bytes: how many bytes of ring memory follow; then these, written from address 0 on
//! - operations until the end: see [`Exercise::step`]
//!
//! Guest memory is two regions that adjoin, from address 0 on, so that small numbers are good addresses; and one page at
//! the end of all addresses.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use vm_memory::mmap::MmapRegion;

use super::{Chain, Chains, DeviceRing, Direction, PackedRing, Readable, RingConfig, RingFault, SplitRing, Writable};
use crate::limits::{BATCH_FRAMES, CHAIN_SEGMENTS, RING_SIZE};
use crate::mem::{GuestMemory, Region, Span};

/// Bytes of the first region: the largest ring fits.
const FIRST_BYTES: usize = 2 << 20;
/// Bytes of the second one.
const SECOND_BYTES: usize = 0x8000;

/// Anonymous memory for a region, aligned as a ring needs it. A mapping always is; under miri it is one of the allocator,
/// aligned to 8 bytes, so that every second one does.
pub(super) fn mapping(len: usize) -> MmapRegion {
    std::iter::repeat_with(|| MmapRegion::new(len).unwrap())
        .find(|mapping| mapping.as_ptr().addr().is_multiple_of(16))
        .expect("this ends with the first that is aligned")
}

/// Guest-physical address of a span of `memory`. Panics if it does not lie in one region: no span may do that.
pub(super) fn place(memory: &GuestMemory, span: &Span<'_>) -> u64 {
    let host = span.as_iovec().iov_base as usize;
    let holds = |region: &&Arc<Region>| {
        let offset = host.wrapping_sub(region.host_address()) as u64;
        offset < region.len && span.len() as u64 <= region.len - offset
    };
    let region = memory.regions().iter().find(holds).expect("every span lies in a region");
    region.guest + (host - region.host_address()) as u64
}

/// Asserts what holds for every chain that a ring gives.
pub(super) fn check_chain(memory: &GuestMemory, chains: &Chains<'_>, chain: &Chain) {
    let pieces = chains.pieces(chain);
    assert!(pieces.len() <= CHAIN_SEGMENTS);
    assert!(pieces.iter().all(|piece| !piece.is_empty()));
    pieces.iter().for_each(|piece| _ = place(memory, piece));
    let bytes: usize = pieces.iter().map(Span::len).sum();
    if chain.overlong {
        assert!(pieces.is_empty());
    } else {
        // 256 pieces can be more than 32 bits hold; then the sum is saturated.
        assert_eq!(chain.bytes, u32::try_from(bytes).unwrap_or(u32::MAX));
    }
    assert_eq!(chains.single(chain).is_some(), pieces.len() == 1);
}

/// What differs between the forms of a ring for whoever drives one.
trait Form: DeviceRing + Sized {
    /// Asserts what holds for a chain of this form of ring only.
    fn check(&self, chain: &Chain);
    /// Where the ring stands after it took `chains` at `base`.
    fn after(&self, base: u16, chains: &[Chain]) -> u16;
    /// As a driver would: makes `more` chains available beyond those that were taken.
    fn make_available(&self, config: &RingConfig, memory: &GuestMemory, more: u8);
    /// What the driver looks at to see that something came back.
    fn used(&self, config: &RingConfig, memory: &GuestMemory) -> u16;
}

impl Form for SplitRing {
    fn check(&self, chain: &Chain) {
        assert!(chain.head < self.size());
        assert_eq!(chain.slots, 1);
    }

    fn after(&self, base: u16, chains: &[Chain]) -> u16 {
        base.wrapping_add(chains.len() as u16)
    }

    fn make_available(&self, config: &RingConfig, memory: &GuestMemory, more: u8) {
        let index = self.base().wrapping_add(more.into());
        write(memory, config.available + 2, &index.to_le_bytes());
    }

    fn used(&self, config: &RingConfig, memory: &GuestMemory) -> u16 {
        read(memory, config.used + 2)
    }
}

impl Form for PackedRing {
    fn check(&self, chain: &Chain) {
        assert!((1..=self.size()).contains(&chain.slots));
    }

    fn after(&self, base: u16, chains: &[Chain]) -> u16 {
        let slots: u32 = chains.iter().map(|chain| u32::from(chain.slots)).sum();
        let (slot, size) = (u32::from(base & 0x7fff) + slots, u32::from(self.size()));
        // Each time round flips the wrap counter.
        (slot % size) as u16 | (base & 0x8000) ^ ((slot / size % 2) as u16) << 15
    }

    fn make_available(&self, config: &RingConfig, memory: &GuestMemory, more: u8) {
        let (mut slot, mut wrap) = (self.base() & 0x7fff, self.base() >> 15 == 1);
        for _ in 0..more {
            let place = config.descriptors + 16 * u64::from(slot) + 14;
            let flags = read(memory, place) & !(1 << 7 | 1 << 15) | if wrap { 1 << 7 } else { 1 << 15 };
            write(memory, place, &flags.to_le_bytes());
            slot += 1;
            if slot == self.size() {
                (slot, wrap) = (0, !wrap);
            }
        }
    }

    /// Whatever was written last is somewhere in the ring, which may be anything; that it did not move is all there is.
    fn used(&self, _: &RingConfig, _: &GuestMemory) -> u16 {
        0
    }
}

/// Drives a split ring with `bytes`. Returns the fault that ended it, if one did.
pub fn exercise(bytes: &[u8]) -> Option<RingFault> {
    let mut input = Input(bytes);
    let [power, flags, base_low, base_high, table, available, used, _] = input.take();
    let base = u16::from_le_bytes([base_low, base_high]);
    let config = config(flags, 1 << (power % 16), base, [table, available, used]);
    drive(&mut input, flags, config, |memory| SplitRing::start(config, memory).unwrap())
}

/// Drives a packed ring with `bytes`. Returns the fault that ended it, if one did.
pub fn exercise_packed(bytes: &[u8]) -> Option<RingFault> {
    let mut input = Input(bytes);
    let [size_low, flags, base_low, base_high, table, driver, device, size_high] = input.take();
    let size = u16::from_le_bytes([size_low, size_high]).clamp(1, RING_SIZE);
    let base = u16::from_le_bytes([base_low, base_high]);
    let base = (base & 0x8000) | ((base & 0x7fff) % size);
    let config = RingConfig { packed: true, ..config(flags, size, base, [table, driver, device]) };
    drive(&mut input, flags, config, |memory| PackedRing::start(config, memory).unwrap())
}

fn config(flags: u8, size: u16, base: u16, areas: [u8; 3]) -> RingConfig {
    let [descriptors, available, used] = areas.map(|unit| 512 * u64::from(unit));
    RingConfig {
        packed: false,
        size,
        descriptors,
        available,
        used,
        base,
        event_idx: flags & 1 != 0,
        indirect: flags & 2 != 0,
        in_order: flags & 8 != 0,
    }
}

fn drive<R: Form>(
    input: &mut Input<'_>,
    flags: u8,
    config: RingConfig,
    start: impl FnOnce(Arc<GuestMemory>) -> R,
) -> Option<RingFault> {
    let region = |guest, len| Arc::new(Region::new(guest, guest, mapping(len)));
    let first = region(0, FIRST_BYTES);
    let others = [region(FIRST_BYTES as u64, SECOND_BYTES), region(u64::MAX - 4095, 4096)];
    let memory = Arc::new(GuestMemory::new([vec![first], others.to_vec()].concat()));
    let len = input.u16();
    write(&memory, 0, input.slice(len.into()));
    let ring = start(Arc::clone(&memory));
    let mut exercise = Exercise { memory, config, ring, taken: Vec::new(), completed: 0, flags };
    while !input.0.is_empty() {
        if let Err(fault) = exercise.step(input) {
            assert!(!fault.to_string().is_empty());
            return Some(fault);
        }
    }
    None
}

/// Reads a 16-bit word of guest memory.
fn read(memory: &GuestMemory, address: u64) -> u16 {
    let mut bytes = [0; 2];
    memory.span(address, 2, &mut 0).unwrap().read(&mut bytes);
    u16::from_le_bytes(bytes)
}

/// Writes guest memory as far as it is mapped.
fn write(memory: &GuestMemory, address: u64, bytes: &[u8]) {
    if let Some(span) = memory.span_up_to(address, bytes.len() as u32) {
        span.write(bytes);
    }
}

/// A ring under exercise.
struct Exercise<R> {
    memory: Arc<GuestMemory>,
    config: RingConfig,
    ring: R,
    /// Chains taken and neither completed nor given back, in ring order.
    taken: Vec<Chain>,
    /// How many completed chains are not published.
    completed: u16,
    flags: u8,
}

impl<R: Form> Exercise<R> {
    /// One operation: a byte that says which (modulo 9), and what it needs.
    fn step(&mut self, input: &mut Input<'_>) -> Result<(), RingFault> {
        match input.u8() % 9 {
            0 if self.flags & 4 == 0 => self.gather::<Readable>(input.u8().into())?,
            0 => self.gather::<Writable>(input.u8().into())?,
            1 => self.complete(input.u8().into(), input.u16().into()),
            2 => self.publish(),
            3 => self.give_back(input.u8().into()),
            4 => _ = self.ring.arm()?,
            5 => self.ring.disarm(),
            6 => {
                let (address, len) = (input.u16(), input.u8());
                write(&self.memory, address.into(), input.slice(len.into()));
            }
            7 => self.ring.make_available(&self.config, &self.memory, input.u8()),
            _ => self.shrink()?,
        }
        Ok(())
    }

    fn gather<D: Direction>(&mut self, limit: usize) -> Result<(), RingFault> {
        let (before, memory) = (self.ring.base(), Arc::clone(&self.memory));
        let mut chains = Chains::new();
        let count = self.ring.gather::<D>(&memory, limit, &mut chains)?;
        assert!(count == chains.list().len() && count <= limit.min(BATCH_FRAMES).min(self.config.size.into()));
        assert_eq!(self.ring.base(), self.ring.after(before, chains.list()));
        for chain in chains.list() {
            self.ring.check(chain);
            check_chain(&memory, &chains, chain);
            self.touch(chains.pieces(chain));
            self.taken.push(*chain);
        }
        Ok(())
    }

    /// Reads or writes the first bytes of some pieces: the memory is there.
    fn touch(&self, pieces: &[Span<'_>]) {
        for piece in pieces.iter().take(4) {
            let mut bytes = [0; 64];
            let len = piece.read(&mut bytes);
            if self.flags & 4 != 0 {
                piece.write(&bytes[..len]);
            }
        }
    }

    fn complete(&mut self, count: usize, written: u32) {
        for chain in self.taken.drain(..count.min(self.taken.len())) {
            self.ring.complete(&chain, written);
            self.completed = self.completed.wrapping_add(1);
        }
    }

    fn publish(&mut self) {
        let before = self.ring.used(&self.config, &self.memory);
        let published = self.ring.publish();
        assert_eq!(published.is_some(), self.completed != 0);
        let after = self.ring.used(&self.config, &self.memory);
        assert!(published.is_some() || after == before, "nothing was published");
        self.completed = 0;
    }

    fn give_back(&mut self, count: usize) {
        let back = self.taken.split_off(self.taken.len() - count.min(self.taken.len()));
        let before = self.ring.base();
        self.ring.give_back(&back);
        assert_eq!(self.ring.after(self.ring.base(), &back), before);
    }

    /// Takes the last region away.
    fn shrink(&mut self) -> Result<(), RingFault> {
        let regions = self.memory.regions();
        let fewer = regions[..regions.len() - 1].to_vec();
        self.memory = Arc::new(GuestMemory::new(fewer));
        self.ring.set_memory(&self.memory)
    }
}

/// Bytes to take from; zero where there are none any more.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn slice(&mut self, len: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let now = self.slice(N);
        bytes[..now.len()].copy_from_slice(now);
        bytes
    }

    fn u8(&mut self) -> u8 {
        let [byte] = self.take();
        byte
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }
}
