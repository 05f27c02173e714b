//! Where a packed ring goes on when whoever ran it has died, by what it has left of that ([`super::super::record`]):
//! [`PackedRing::resume`].
//!
//! A front end that has lost track says the same base as before, and the ring goes on where the record says, if the ring in memory
//! bears that out. Any other base is the truth. But QEMU (7.2 to 10.0, hw/virtio/virtio.c: virtqueue_packed_drop_all) gives back
//! itself what a guest sends while nobody is connected, and begins where the ring began last, not knowing how far it got since. It
//! finds that descriptor available if the guest has come round to it, and leaves all from where we stood to there to nobody; and its
//! base is behind what it took. So what is still available from where the ring stood up to the base is given back here, unread like
//! that: the guest takes its buffers back in their order, and would wait for the first of them for ever.
//!
//! That harms no ring whose front end does know: there the driver is at the base, a descriptor before it that looks available is
//! left of the middle of a chain, and the driver does not look at it again before it has written it.

use super::super::descriptor::NEXT;
use super::super::place::{AVAIL, Place, USED};
use super::super::record::{Element, Record, Stand};
use super::PackedRing;

impl PackedRing {
    /// Keeps `record` from now on, and goes on where it says instead of at the base, or gives back what is left before the base.
    pub fn resume(&mut self, record: Record) {
        self.record = record;
        let file = self.memory.file_at(self.config.descriptors);
        let mut last = Element::default();
        match self.record.stand(&self.config, file) {
            Some(stand) if stand.base != self.config.base => last = self.give_back_before_base(&stand),
            Some(stand) if self.bears_out(&stand) => {
                last = stand.last;
                let place = self.recover(&stand);
                (self.next, self.used, self.published) = (place, place, place);
            }
            _ => {}
        }
        self.record.bind(&self.config, file, self.next.0, last);
    }

    /// Whether the ring cannot stand where it is to go on: the driver counts from another place, and neither side will ever
    /// see what the other does. Only for a ring from which nothing was taken since it was started.
    ///
    /// The descriptor where we go on was not used in this lap. The one before it was made available in its lap, whether or not
    /// it was written when it was used, and so is not as it was used in the lap before; in a ring that is new, its lap is one
    /// that no driver has made, with all bits zero.
    pub fn is_misplaced(&self) -> bool {
        let before = self.next.back(1, self.size);
        self.is_used(self.next) || self.is_used(Place(before.0 ^ Place::WRAP))
    }

    /// The flags of the descriptor in `slot`.
    fn flags(&self, slot: u16) -> u16 {
        (self.tail(slot) >> 48) as u16
    }

    /// Whether the descriptor there is as one that was used in that lap.
    fn is_used(&self, place: Place) -> bool {
        self.flags(place.slot()) & (AVAIL | USED) == place.used_bits()
    }

    /// Whether the descriptor there is as one that was made available in that lap.
    fn is_available(&self, place: Place) -> bool {
        self.flags(place.slot()) & (AVAIL | USED) == place.available_bits()
    }

    /// Whether the descriptors are such as they must be where a ring was left that stood there. A driver that has made the
    /// ring anew at the same place has written zeros and AVAIL only, and begins at the first slot.
    fn bears_out(&self, stand: &Stand) -> bool {
        let (place, target) = (Place(stand.place), Place(stand.target));
        let within = |place: Place| place.slot() < self.size;
        if !within(place) || stand.count > 0 && !within(target) || stand.count > self.size {
            return false;
        }
        let listed = |at| self.record.element(at).filter(|element| element.slot < self.size);
        if (0..stand.count).any(|at| listed(at).is_none()) {
            return false;
        }
        // What is used here now can only be the publication that was on its way.
        if stand.count == 0 && self.is_used(place) {
            return false;
        }
        // What was published last is as it was written, or was made available anew, which leaves USED as it is.
        let Element { slot, word } = stand.last;
        let rewritten = (0..stand.count).filter_map(listed).any(|element| element.slot == slot);
        if word != 0 && !rewritten && (slot >= self.size || (self.flags(slot) ^ (word >> 48) as u16) & USED != 0) {
            return false;
        }
        let ours = |Element { slot, word }: Element| slot < self.size && word != 0 && self.tail(slot) == word;
        let used = |slot| self.flags(slot) & USED != 0;
        self.next.0 != Place::WRAP
            || ours(stand.last)
            || (0..stand.count).filter_map(listed).any(ours)
            || (0..self.size).any(used)
    }

    /// Finishes a publication that was on its way; returns where the ring stands.
    fn recover(&self, stand: &Stand) -> Place {
        let place = Place(stand.place);
        if stand.count == 0 {
            return place;
        }
        if self.is_available(place) {
            self.write_list(stand.count);
        }
        Place(stand.target)
    }

    /// How many slots on from `place` the base is; `None` if it is not, or more than one time round.
    fn to_base(&self, place: Place) -> Option<u16> {
        let within = place.slot() < self.size;
        let far = within.then(|| place.distance(Place(self.config.base), self.size));
        far.filter(|far| *far <= self.size)
    }

    /// Gives back what is still available between where the ring stood and its base, where it goes on; returns what was given back
    /// last. It is published like any batch, so that the next of us finishes it should we die meanwhile.
    fn give_back_before_base(&mut self, stand: &Stand) -> Element {
        let nothing = Element::default();
        let Some(far) = self.to_base(Place(stand.place)) else { return nothing };
        let target = self.to_base(Place(stand.target)).filter(|target| *target <= far);
        if stand.count > self.size || stand.count > 0 && target.is_none() {
            return nothing;
        }
        let place = self.recover(stand);
        self.record.settle(place.0, stand.last);
        let (mut next, mut left, mut count) = (place, self.to_base(place).unwrap_or(0), 0);
        while left > 0 && self.is_available(next) {
            let (id, slots) = self.extent(next);
            let word = u64::from(id) << 32 | u64::from(next.used_bits()) << 48;
            self.record.set_element(count, Element { word, slot: next.slot() });
            count += 1;
            next = next.forward(slots, self.size);
            left = left.saturating_sub(slots);
        }
        let Some(last) = count.checked_sub(1).and_then(|at| self.record.element(at)) else { return nothing };
        self.record.begin(place.0, self.config.base, count);
        self.write_list(count);
        self.record.settle(self.config.base, last);
        last
    }

    /// The id of the chain that begins there, and how many slots it has.
    fn extent(&self, first: Place) -> (u16, u16) {
        let (mut at, mut slots) = (first, 1);
        while self.flags(at.slot()) & NEXT != 0 && slots < self.size {
            at = at.forward(1, self.size);
            slots += 1;
        }
        ((self.tail(at.slot()) >> 32) as u16, slots)
    }
}
