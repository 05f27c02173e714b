//! The other side of a packed ring, for tests: what a guest's driver does, and what a hostile one may do
//! ([`PackedDriver`]). Memory and descriptors are those of [`super::driver`], so the same buffers can be offered through
//! rings of both forms.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::sync::Arc;

use super::driver::{Descriptor, NEXT, RINGS, memory};
use super::exercise::place;
use super::{Chain, Chains, DeviceRing, Direction, PackedRing, RingConfig, RingFault};
use crate::mem::GuestMemory;

/// VIRTQ_DESC_F_AVAIL and _USED (virtio 1.3, 2.8.1).
pub(super) const AVAIL: u16 = 1 << 7;
pub(super) const USED: u16 = 1 << 15;

/// A place in the ring and the wrap counter there, counted on by one as virtio 1.3, 2.8.1 has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) slot: u16,
    pub(super) wrap: bool,
}

impl Position {
    /// Where a word of SET_VRING_BASE says.
    pub(super) fn of(base: u16) -> Self {
        Self { slot: base & 0x7fff, wrap: base >> 15 == 1 }
    }

    /// As such a word.
    pub(super) fn word(self) -> u16 {
        self.slot | u16::from(self.wrap) << 15
    }

    /// The next place.
    pub(super) fn next(self, size: u16) -> Self {
        if self.slot + 1 == size { Self { slot: 0, wrap: !self.wrap } } else { Self { slot: self.slot + 1, ..self } }
    }

    /// `count` places on.
    pub(super) fn on(self, count: u16, size: u16) -> Self {
        (0..count).fold(self, |position, _| position.next(size))
    }

    /// The bits of an available descriptor here.
    pub(super) fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }
}

/// A driver and the ring that it made.
#[derive(Debug)]
pub(super) struct PackedDriver {
    /// The guest's memory.
    pub(super) memory: Arc<GuestMemory>,
    /// Where the ring lies in it. Features and base may be changed before [`PackedDriver::start`].
    pub(super) config: RingConfig,
    /// Where the driver makes the next descriptor available.
    pub(super) next: Position,
    /// Up to where it has looked for used ones.
    pub(super) seen: Position,
    /// How many slots each outstanding id has, as it must remember (2.8.6), and in which order they were offered.
    outstanding: HashMap<u16, u16>,
    order: Vec<u16>,
}

impl PackedDriver {
    /// A ring of `size` descriptors that begins at `base`, without EVENT_IDX, with INDIRECT_DESC. All of its descriptors
    /// look as if they had been used in the round before.
    pub(super) fn new(size: u16, base: u16) -> Self {
        let available = RINGS + 16 * u64::from(size);
        let config = RingConfig {
            packed: true,
            size,
            descriptors: RINGS,
            available,
            used: available + 4,
            base,
            event_idx: false,
            indirect: true,
            in_order: false,
        };
        let start = Position::of(base);
        let (outstanding, order) = (HashMap::new(), Vec::new());
        let driver = Self { memory: memory(size), config, next: start, seen: start, outstanding, order };
        for slot in 0..size {
            let wrap = start.wrap == (slot < start.slot);
            driver.set_flags(slot, if wrap { AVAIL | USED } else { 0 });
        }
        driver
    }

    /// The device's side of the ring.
    pub(super) fn start(&self) -> PackedRing {
        PackedRing::start(self.config, Arc::clone(&self.memory)).unwrap()
    }

    /// Writes guest memory.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        let span = self.memory.span(address, bytes.len() as u32, &mut 0).unwrap();
        assert_eq!(span.write(bytes), bytes.len());
    }

    fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        assert!(self.memory.span(address, N as u32, &mut 0).unwrap().read_exact(&mut bytes));
        bytes
    }

    fn slot(&self, slot: u16) -> u64 {
        self.config.descriptors + 16 * u64::from(slot)
    }

    /// Writes all of a slot but the flags.
    pub(super) fn set_slot(&self, slot: u16, descriptor: Descriptor, id: u16) {
        self.write(self.slot(slot), &descriptor.address.to_le_bytes());
        self.write(self.slot(slot) + 8, &descriptor.len.to_le_bytes());
        self.write(self.slot(slot) + 12, &id.to_le_bytes());
    }

    /// Writes an entry of an indirect table.
    pub(super) fn set_entry(&self, address: u64, entry: Descriptor) {
        self.write(address, &entry.address.to_le_bytes());
        self.write(address + 8, &entry.len.to_le_bytes());
        self.write(address + 12, &entry.next.to_le_bytes());
        self.write(address + 14, &entry.flags.to_le_bytes());
    }

    /// Writes a slot's flags.
    pub(super) fn set_flags(&self, slot: u16, flags: u16) {
        self.write(self.slot(slot) + 14, &flags.to_le_bytes());
    }

    /// A slot's length, id and flags.
    pub(super) fn tail(&self, slot: u16) -> (u32, u16, u16) {
        let [a, b, c, d, e, f, g, h] = self.read(self.slot(slot) + 8);
        (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]))
    }

    /// Makes a chain of these descriptors available under `id`. Whether each has another after it, their `next` does not
    /// matter: the last one given is the last.
    pub(super) fn offer(&mut self, chain: &[Descriptor], id: u16) {
        let first = self.next;
        let mut flags_of_first = 0;
        for (at, descriptor) in chain.iter().enumerate() {
            let last = at + 1 == chain.len();
            // Only the last id counts; a driver that leaves rubbish in the others is within its rights.
            self.set_slot(self.next.slot, *descriptor, if last { id } else { !id });
            let flags = descriptor.flags | if last { 0 } else { NEXT } | self.next.available();
            if at == 0 {
                flags_of_first = flags;
            } else {
                self.set_flags(self.next.slot, flags);
            }
            self.next = self.next.next(self.config.size);
        }
        self.set_flags(first.slot, flags_of_first);
        self.outstanding.insert(id, chain.len() as u16);
        self.order.push(id);
    }

    /// Makes one descriptor available under its slot as id.
    pub(super) fn offer_one(&mut self, descriptor: Descriptor) {
        let id = self.next.slot;
        self.offer(&[descriptor], id);
    }

    /// What the device gave back since the last call: ids and written lengths, as a driver without IN_ORDER sees them.
    pub(super) fn take_used(&mut self) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        while let Some((id, len)) = self.used_here() {
            let slots = self.outstanding.remove(&id).expect("an id that was offered");
            self.order.retain(|&other| other != id);
            self.seen = self.seen.on(slots, self.config.size);
            used.push((id, len));
        }
        used
    }

    /// What the device gave back since the last call, as a driver with IN_ORDER sees it: all ids up to the one named.
    pub(super) fn take_used_in_order(&mut self) -> Vec<u16> {
        let mut used = Vec::new();
        while let Some((id, _)) = self.used_here() {
            let named = self.order.iter().position(|&other| other == id).expect("an id that was offered");
            for id in self.order.drain(..=named) {
                self.seen = self.seen.on(self.outstanding.remove(&id).unwrap(), self.config.size);
                used.push(id);
            }
        }
        used
    }

    fn used_here(&self) -> Option<(u16, u32)> {
        let (len, id, flags) = self.tail(self.seen.slot);
        let both = if self.seen.wrap { AVAIL | USED } else { 0 };
        (flags & (AVAIL | USED) == both).then_some((id, len))
    }

    /// Writes the driver's event suppression: an offset with its wrap counter, and flags.
    pub(super) fn set_event(&self, place: u16, flags: u16) {
        self.write(self.config.available, &(u32::from(place) | u32::from(flags) << 16).to_le_bytes());
    }

    /// The device's event suppression: an offset with its wrap counter, and flags.
    pub(super) fn device_event(&self) -> (u16, u16) {
        let [a, b, c, d] = self.read(self.config.used);
        (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
    }

    /// Gathers one batch from `ring`, with no limit of the caller's.
    pub(super) fn gather<D: Direction>(&self, ring: &mut PackedRing) -> Result<Chains<'_>, RingFault> {
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
