//! Where one is in a packed ring: [`Place`], a slot and the wrap counter there (virtio 1.3, 2.8.1), and whether an event's
//! place was passed. Pure numbers: those that a driver wrote may be any, so nothing here overflows for whatever they are.
//!
//! A ring's own places stay below its size, because they are only made by going on from such a one.

/// VIRTQ_DESC_F_AVAIL and _USED (virtio 1.3, 2.8.1).
pub(super) const AVAIL: u16 = 1 << 7;
pub(super) const USED: u16 = 1 << 15;

/// A place in the ring and the wrap counter there, as the words of virtio have them: bit 15 is the counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place(pub(super) u16);

impl Place {
    /// The wrap counter's bit.
    pub(super) const WRAP: u16 = 1 << 15;

    /// The slot.
    #[inline]
    pub(super) fn slot(self) -> u16 {
        self.0 & !Self::WRAP
    }

    /// The wrap counter.
    #[inline]
    pub(super) fn wrap(self) -> bool {
        self.0 & Self::WRAP != 0
    }

    /// The place `count` slots on in a ring of `size`, at most one time round.
    #[inline]
    pub(super) fn forward(self, count: u16, size: u16) -> Self {
        let slot = u32::from(self.slot()) + u32::from(count);
        match slot.checked_sub(size.into()) {
            None => Self(self.0 & Self::WRAP | slot as u16),
            Some(slot) => Self((self.0 ^ Self::WRAP) & Self::WRAP | slot as u16),
        }
    }

    /// The place `count` slots back.
    #[inline]
    pub(super) fn back(self, count: u16, size: u16) -> Self {
        match self.slot().checked_sub(count) {
            Some(slot) => Self(self.0 & Self::WRAP | slot),
            None => Self((self.0 ^ Self::WRAP) & Self::WRAP | (self.slot() + size - count)),
        }
    }

    /// How many slots on `to` is, at most one time round.
    #[inline]
    pub(super) fn distance(self, to: Self, size: u16) -> u16 {
        let round = if self.wrap() == to.wrap() { 0 } else { size };
        to.slot().wrapping_add(round).wrapping_sub(self.slot())
    }

    /// The AVAIL and USED bits of a descriptor that is available here.
    #[inline]
    pub(super) fn available_bits(self) -> u16 {
        if self.wrap() { AVAIL } else { USED }
    }

    /// The AVAIL and USED bits of a descriptor that is used here.
    #[inline]
    pub(super) fn used_bits(self) -> u16 {
        if self.wrap() { AVAIL | USED } else { 0 }
    }
}

/// Whether moving on from `old` to `new` passes `event`, which the driver wrote (virtio 1.3, 2.8.10.1): any number, and at
/// worst it has too many interrupts or too few.
#[inline]
pub(super) fn passes(event: Place, old: Place, new: Place, size: u16) -> bool {
    let (size, end) = (i32::from(size), i32::from(new.slot()));
    let begin = i32::from(old.slot()) - if new.slot() <= old.slot() { size } else { 0 };
    let event = i32::from(event.slot()) - if event.wrap() == new.wrap() { 0 } else { size };
    (begin..end).contains(&event)
}
