//! Chains of a split ring that are more than one buffer in one region: [`SplitRing::walk`]. Each loop is bounded by the ring or by the
//! table, and each field of a descriptor is read once.

use super::super::descriptor::{Descriptor, INDIRECT, NEXT, add_buffer, check_table, finish};
use super::super::{Chain, Chains, Direction, RingFault};
use super::SplitRing;
use crate::mem::GuestMemory;

impl SplitRing {
    /// Walks a chain that is more than one buffer in one region: several descriptors, an indirect table, a buffer across
    /// regions. `first` is its first descriptor. Returns its bytes.
    #[inline(never)]
    pub(super) fn walk<'m, D: Direction>(
        &mut self,
        memory: &'m GuestMemory,
        chains: &mut Chains<'m>,
        head: u16,
        first: Descriptor,
    ) -> Result<u32, RingFault> {
        let start = chains.pieces.len();
        let mut chain = Chain { head, bytes: 0, overlong: false, slots: 1, start: start as u16, count: 0 };
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
        let entries = check_table(self.indirect, head, &table)?;
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
}
