//! The guest's receive buffers while a batch is delivered: [`Buffers`], chains gathered off its ring and used from the front.
//!
//! What is gathered and not used goes back to the ring. While the guest is being migrated, what was written to a chain is noted
//! in its dirty log when the chain is used, or when the attempt was in vain.

use crate::frame::Batch;
use crate::limits::{BATCH_DESCRIPTORS, VNET_HEADER_BYTES};
use crate::mem::{Cursor, DirtyLog, GuestMemory};
use crate::ring::{Chain, Chains, DeviceRing, RingFault, Writable};
use crate::wire::virtio_net::VnetHeader;

/// Chains of guest buffers at hand, used up from the front.
pub(super) struct Buffers<'m> {
    pub(super) chains: Chains<'m>,
    pub(super) next: usize,
    memory: &'m GuestMemory,
    pub(super) log: Option<&'m DirtyLog>,
    /// Descriptors of long chains that were walked so far, of all rings of the guest that the batch goes to.
    pub(super) steps: usize,
}

impl<'m> Buffers<'m> {
    /// None yet, of a guest with this memory, and with this log of what is written while it is being migrated. `steps` were
    /// walked before.
    #[inline]
    pub(super) fn new(memory: &'m GuestMemory, log: Option<&'m DirtyLog>, steps: usize) -> Self {
        Self { chains: Chains::new(), next: 0, memory, log, steps }
    }

    /// How many chains are left.
    #[inline]
    pub(super) fn left(&self) -> usize {
        self.chains.list().len() - self.next
    }

    /// The chains that are left.
    #[inline]
    pub(super) fn rest(&self) -> &[Chain] {
        &self.chains.list()[self.next..]
    }

    /// Puts back what is left and takes up to `limit` chains anew; none once the batch's budget for walking long chains is
    /// spent. A guest may post chains of thousands of descriptors that hold one frame, and somebody else's frames pay.
    pub(super) fn refill<R: DeviceRing>(&mut self, ring: &mut R, limit: usize) -> Result<(), RingFault> {
        ring.give_back(self.rest());
        self.chains.clear();
        self.next = 0;
        if self.steps >= BATCH_DESCRIPTORS {
            return Ok(());
        }
        let gathered = ring.gather::<Writable>(self.memory, limit, &mut self.chains);
        self.steps += ring.steps();
        gathered.map(|_| ())
    }

    /// How many of the next `most` chains hold `bytes` together.
    pub(super) fn run(&self, bytes: usize, most: usize) -> Option<usize> {
        let mut room = 0;
        for (count, chain) in self.chains.list()[self.next..].iter().take(most).enumerate() {
            room += if chain.overlong { 0 } else { chain.bytes as usize };
            if room >= bytes {
                return Some(count + 1);
            }
        }
        None
    }

    /// Writes frame `index` over the next `count` chains and completes them.
    pub(super) fn scatter<R: DeviceRing>(
        &mut self,
        ring: &mut R,
        batch: &Batch<'_>,
        index: u8,
        header: usize,
        count: usize,
    ) {
        let run = &self.chains.list()[self.next..self.next + count];
        scatter(batch, usize::from(index), header, count, Cursor::new(self.chains.pieces_of(run)));
        let len = header + batch.frames()[usize::from(index)].len as usize;
        self.used(count, len, |chain, written| ring.complete(chain, written));
    }

    /// Hands out the next `count` chains, over which `len` bytes were written, each with its share of them.
    pub(super) fn used(&mut self, count: usize, len: usize, mut each: impl FnMut(&Chain, u32)) {
        self.note_written(count, len);
        self.shares(count, len).for_each(|(chain, written)| each(chain, written as u32));
        self.next += count;
    }

    /// Tells the dirty log, if the guest is being migrated, that `len` bytes were written over the next `count` chains.
    pub(super) fn note_written(&self, count: usize, len: usize) {
        let Some(log) = self.log else { return };
        for (chain, written) in self.shares(count, len) {
            log.mark_pieces(self.memory, self.chains.pieces(chain), written);
        }
    }

    /// The next `count` chains, each with its share of `len` bytes.
    fn shares(&self, count: usize, mut len: usize) -> impl Iterator<Item = (&Chain, usize)> {
        self.chains.list()[self.next..self.next + count].iter().map(move |chain| {
            let written = if chain.overlong { 0 } else { len.min(chain.bytes as usize) };
            len -= written;
            (chain, written)
        })
    }
}

/// Writes frame `index` behind a header of `header` bytes which says that it takes `chains` chains. The caller has made
/// sure that there is room for all.
fn scatter(batch: &Batch<'_>, index: usize, header: usize, chains: usize, mut to: Cursor<'_, '_>) {
    let vnet = VnetHeader { num_buffers: chains as u16, ..batch.head(index).header() }.to_bytes();
    to.write(&vnet[..header.min(VNET_HEADER_BYTES)]);
    batch.source(index).copy(batch.frames()[index].len as usize, &mut to);
}
