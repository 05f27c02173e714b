//! The other side of a split ring, for tests: what a guest's driver does, and what a hostile one may do ([`Driver`]).
//!
//! It lays a ring out in memory of its own, writes descriptors and makes chains available, and reads the used ring. Every
//! field can also be written as it should not be. Memory is three regions: [`RINGS`] holds the ring itself, [`DATA`] and
//! [`MORE`] hold buffers; the last two adjoin in guest addresses, so a buffer can lie across both, and a hole follows.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use super::exercise::{mapping, place};
use super::{Chain, Chains, DeviceRing, Direction, RingConfig, RingFault, SplitRing};
use crate::mem::{GuestMemory, Region};

/// VIRTQ_DESC_F_NEXT (virtio 1.3, 2.7.5).
pub(super) const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub(super) const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub(super) const INDIRECT: u16 = 4;

/// Guest-physical address of the region that holds the ring.
pub(super) const RINGS: u64 = 0x10_0000;
/// Guest-physical address of the first region for buffers and tables.
pub(super) const DATA: u64 = 0x4000_0000;
/// Guest-physical address of the second one, which begins where the first ends.
pub(super) const MORE: u64 = DATA + DATA_BYTES as u64;
/// Bytes of each region for buffers.
pub(super) const DATA_BYTES: usize = 0x1_0000;
/// Guest-physical address of the first byte that is not mapped.
pub(super) const HOLE: u64 = MORE + DATA_BYTES as u64;

/// One descriptor as the driver writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// Guest-physical address.
    pub(super) address: u64,
    /// Length in bytes.
    pub(super) len: u32,
    /// Flags, any bits.
    pub(super) flags: u16,
    /// Index of the next descriptor.
    pub(super) next: u16,
}

/// A buffer that the device may read, with nothing after it.
pub(super) fn buffer(address: u64, len: u32) -> Descriptor {
    Descriptor { address, len, flags: 0, next: 0 }
}

impl Descriptor {
    /// The same, followed by descriptor `next`.
    pub(super) fn then(self, next: u16) -> Self {
        Self { flags: self.flags | NEXT, next, ..self }
    }

    /// The same with more flags.
    pub(super) fn with(self, flags: u16) -> Self {
        Self { flags: self.flags | flags, ..self }
    }

    fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// The memory of a guest whose ring has `size` descriptors.
pub(super) fn memory(size: u16) -> Arc<GuestMemory> {
    let rings = (32 * usize::from(size) + 64).next_multiple_of(4096);
    let region = |guest, len| Arc::new(Region::new(guest, guest + (1 << 40), mapping(len)));
    Arc::new(GuestMemory::new(vec![region(RINGS, rings), region(DATA, DATA_BYTES), region(MORE, DATA_BYTES)]))
}

/// A driver and the ring that it made.
#[derive(Debug)]
pub(super) struct Driver {
    /// The guest's memory.
    pub(super) memory: Arc<GuestMemory>,
    /// Where the ring lies in it. Features and base may be changed before [`Driver::start`].
    pub(super) config: RingConfig,
    /// The available index: what the driver writes next.
    pub(super) available: u16,
    /// Up to where it has read the used ring.
    pub(super) seen_used: u16,
}

impl Driver {
    /// A ring of `size` descriptors whose indexes begin at `base`, without EVENT_IDX, with INDIRECT_DESC.
    pub(super) fn new(size: u16, base: u16) -> Self {
        let available = RINGS + 16 * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let config = RingConfig {
            packed: false,
            size,
            descriptors: RINGS,
            available,
            used,
            base,
            event_idx: false,
            indirect: true,
            in_order: false,
        };
        let driver = Self { memory: memory(size), config, available: base, seen_used: base };
        driver.set_available_index(base);
        driver.write(used + 2, &base.to_le_bytes());
        driver
    }

    /// The same, with EVENT_IDX.
    pub(super) fn with_event_index(size: u16, base: u16) -> Self {
        let mut driver = Self::new(size, base);
        driver.config.event_idx = true;
        driver
    }

    /// The device's side of the ring.
    pub(super) fn start(&self) -> SplitRing {
        SplitRing::start(self.config, Arc::clone(&self.memory)).unwrap()
    }

    /// Writes guest memory.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        let span = self.memory.span(address, bytes.len() as u32, &mut 0).unwrap();
        assert_eq!(span.write(bytes), bytes.len());
    }

    /// Reads guest memory.
    pub(super) fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        assert!(self.memory.span(address, N as u32, &mut 0).unwrap().read_exact(&mut bytes));
        bytes
    }

    fn read_u16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.read(address))
    }

    /// Writes descriptor `index` of the ring's table.
    pub(super) fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.write(self.config.descriptors + 16 * u64::from(index), &descriptor.to_bytes());
    }

    /// Writes an indirect table to `address`, which may lie across two regions; returns the descriptor that refers to it.
    pub(super) fn set_table(&self, address: u64, table: &[Descriptor]) -> Descriptor {
        for (at, byte) in table.iter().flat_map(|entry| entry.to_bytes()).enumerate() {
            self.write(address + at as u64, &[byte]);
        }
        buffer(address, 16 * table.len() as u32).with(INDIRECT)
    }

    /// Writes `head` into the next available entry, without telling the device.
    pub(super) fn push(&mut self, head: u16) {
        let slot = u64::from(self.available % self.config.size);
        self.write(self.config.available + 4 + 2 * slot, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
    }

    /// Makes `heads` available.
    pub(super) fn offer(&mut self, heads: &[u16]) {
        for &head in heads {
            self.push(head);
        }
        self.set_available_index(self.available);
    }

    /// Writes `descriptor` as number 0 and makes it available: the usual hostile ring.
    pub(super) fn offer_one(&mut self, descriptor: Descriptor) {
        self.set_descriptor(0, descriptor);
        self.offer(&[0]);
    }

    /// Writes the available index as it is given.
    pub(super) fn set_available_index(&self, index: u16) {
        self.write(self.config.available + 2, &index.to_le_bytes());
    }

    /// Writes the available ring's flags.
    pub(super) fn set_flags(&self, flags: u16) {
        self.write(self.config.available, &flags.to_le_bytes());
    }

    /// Writes used_event: interrupt me when the used index passes this.
    pub(super) fn set_used_event(&self, event: u16) {
        self.write(self.config.available + 4 + 2 * u64::from(self.config.size), &event.to_le_bytes());
    }

    /// The used ring's flags.
    pub(super) fn used_flags(&self) -> u16 {
        self.read_u16(self.config.used)
    }

    /// The used index.
    pub(super) fn used_index(&self) -> u16 {
        self.read_u16(self.config.used + 2)
    }

    /// avail_event: the device wants a notification when the available index passes this.
    pub(super) fn available_event(&self) -> u16 {
        self.read_u16(self.config.used + 4 + 8 * u64::from(self.config.size))
    }

    /// What the device gave back since the last call: heads and written lengths.
    pub(super) fn take_used(&mut self) -> Vec<(u32, u32)> {
        let mut used = Vec::new();
        while self.seen_used != self.used_index() {
            let slot = u64::from(self.seen_used % self.config.size);
            let [a, b, c, d, e, f, g, h] = self.read(self.config.used + 4 + 8 * slot);
            used.push((u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])));
            self.seen_used = self.seen_used.wrapping_add(1);
        }
        used
    }

    /// Gathers one batch from `ring`, with no limit of the caller's.
    pub(super) fn gather<D: Direction>(&self, ring: &mut SplitRing) -> Result<Chains<'_>, RingFault> {
        let mut chains = Chains::new();
        let count = ring.gather::<D>(&self.memory, usize::MAX, &mut chains)?;
        assert_eq!(count, chains.list().len());
        Ok(chains)
    }

    /// Where the pieces of `chain` lie: guest-physical addresses and lengths.
    pub(super) fn places(&self, chains: &Chains<'_>, chain: &Chain) -> Vec<(u64, usize)> {
        chains.pieces(chain).iter().map(|piece| (place(&self.memory, piece), piece.len())).collect()
    }
}
