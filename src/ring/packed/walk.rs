//! Chains of a packed ring that are more than one buffer in one region: [`PackedRing::walk`]. Each loop is bounded by the ring or by
//! the table, and each field of a descriptor is read once.

use super::super::descriptor::{Descriptor, INDIRECT, NEXT, WRITE, add_buffer, check_table, finish};
use super::super::{Chain, Chains, Direction, RingFault};
use super::{Packed, PackedRing};
use crate::mem::GuestMemory;

impl PackedRing {
    /// Walks a chain that is more than one buffer in one region: several descriptors, an indirect table, a buffer across
    /// regions. `first` is its first descriptor. Returns its bytes.
    #[inline(never)]
    pub(super) fn walk<'m, D: Direction>(
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
}
