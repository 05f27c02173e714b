//! A packed virtqueue (virtio 1.2, 2.8) as it lies in guest RAM, over the same [`Ring`] as a split one, and where its driver
//! stands in it: [`Packed`]. The descriptors are the ring's, the driver's event suppression lies where the available ring
//! would be and the device's where the used ring would be.

use super::ring::{DESC_LEN, Desc, NEXT, Ring};

/// Descriptor flags (virtio 1.2, 2.8.1).
pub const AVAIL: u16 = 1 << 7;
pub const USED: u16 = 1 << 15;
/// Event suppression flags (virtio 1.2, 2.8.10).
pub const ENABLE: u16 = 0;
pub const DISABLE: u16 = 1;
pub const BY_DESC: u16 = 2;
/// What a new ring begins with: slot 0, wrap counter 1.
pub const FIRST_BASE: u16 = 1 << 15;

/// A slot and the wrap counter there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub slot: u16,
    pub wrap: bool,
}

impl Place {
    pub const FIRST: Self = Self { slot: 0, wrap: true };

    /// `count` slots on in a ring of `size`.
    pub fn on(self, count: usize, size: u16) -> Self {
        let at = usize::from(self.slot) + count;
        let rounds = at / usize::from(size);
        Self { slot: (at % usize::from(size)) as u16, wrap: self.wrap ^ (rounds % 2 == 1) }
    }

    /// As bases and event indexes have it: the wrap counter in bit 15.
    pub fn word(self) -> u16 {
        self.slot | u16::from(self.wrap) << 15
    }

    /// The bits that make a descriptor available here.
    pub fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }
}

/// A driver's place in its packed ring.
pub struct Packed {
    /// Where the next descriptor is made available.
    pub next: Place,
    /// Where the next used one is looked for.
    pub used: Place,
    /// The flags that publish what was added, which are written last.
    first: Option<(Place, u16)>,
    /// Slots added and not published.
    added: usize,
}

impl Packed {
    pub fn new() -> Self {
        Self { next: Place::FIRST, used: Place::FIRST, first: None, added: 0 }
    }

    /// Adds a chain under `id`; whatever comes first since the last publication is not visible yet.
    pub fn add(&mut self, ring: &Ring, chain: &[Desc], id: u16) {
        for (at, desc) in chain.iter().enumerate() {
            let last = at + 1 == chain.len();
            let flags = desc.flags & !NEXT | if last { 0 } else { NEXT } | self.next.available();
            let slot = ring.desc + DESC_LEN * u64::from(self.next.slot);
            ring.ram.write(slot, &desc.addr.to_le_bytes());
            ring.ram.write(slot + 8, &desc.len.to_le_bytes());
            ring.ram.write(slot + 12, &(if last { id } else { !id }).to_le_bytes());
            if self.first.is_none() {
                self.first = Some((self.next, flags));
            } else {
                ring.set_slot_flags(self.next.slot, flags);
            }
            self.next = self.next.on(1, ring.size);
            self.added += 1;
        }
    }

    /// Makes visible what was added; the place before it, if there was anything.
    pub fn publish(&mut self, ring: &Ring) -> Option<(Place, usize)> {
        let (place, flags) = self.first.take()?;
        ring.set_slot_flags(place.slot, flags);
        Some((place, std::mem::take(&mut self.added)))
    }

    /// Whether the device wants to know of `count` slots made available from `before` on.
    pub fn is_wanted(ring: &Ring, before: Place, count: usize) -> bool {
        let (event, flags) = (ring.ram.load_u16(ring.used), ring.ram.load_u16(ring.used + 2));
        match flags {
            BY_DESC => (0..count).any(|at| before.on(at, ring.size).word() == event),
            flags => flags == ENABLE,
        }
    }

    /// The used descriptor here, if there is one: id and length.
    pub fn peek(&self, ring: &Ring) -> Option<(u16, u32)> {
        Self::peek_at(ring, self.used)
    }

    /// The used descriptor in `place`, if there is one.
    pub fn peek_at(ring: &Ring, place: Place) -> Option<(u16, u32)> {
        let both = if place.wrap { AVAIL | USED } else { 0 };
        if ring.slot_flags(place.slot) & (AVAIL | USED) != both {
            return None;
        }
        let slot = ring.desc + DESC_LEN * u64::from(place.slot);
        Some((ring.ram.load_u16(slot + 12), ring.ram.u32(slot + 8)))
    }

    /// Uses up to `most` chains of one slot each from `base` on, as QEMU does (virtqueue_packed_drop_all); where it would go on.
    pub fn serve(ring: &Ring, base: u16, most: u16) -> u16 {
        let mut place = Place { slot: base & !FIRST_BASE, wrap: base & FIRST_BASE != 0 };
        for _ in 0..most {
            let flags = ring.slot_flags(place.slot);
            if flags & (AVAIL | USED) != place.available() {
                break;
            }
            assert_eq!(flags & NEXT, 0, "a chain of one slot");
            ring.ram.write(ring.desc + DESC_LEN * u64::from(place.slot) + 8, &[0; 4]);
            ring.set_slot_flags(place.slot, if place.wrap { AVAIL | USED } else { 0 });
            place = place.on(1, ring.size);
        }
        place.word()
    }

    /// Asks for interrupts in this way, at the next used descriptor if it is by place.
    pub fn ask(&self, ring: &Ring, flags: u16) {
        ring.ram.store_u16(ring.avail, self.used.word());
        ring.ram.store_u16(ring.avail + 2, flags);
    }
}

impl Ring {
    /// A slot's flags, with acquire.
    pub fn slot_flags(&self, slot: u16) -> u16 {
        self.ram.load_u16(self.desc + DESC_LEN * u64::from(slot) + 14)
    }

    /// Writes a slot's flags, with release.
    pub fn set_slot_flags(&self, slot: u16, flags: u16) {
        self.ram.store_u16(self.desc + DESC_LEN * u64::from(slot) + 14, flags);
    }
}
