//! What the device does with a ring of either form: [`DeviceRing`], and [`Ring`], which is one of them.
//!
//! A port matches on a [`Ring`] once per batch and runs code that was compiled for that form, so nothing is decided per
//! chain that was settled when the ring started; what is not done per batch can be asked of the [`Ring`] itself.

use std::sync::Arc;

use super::{Chain, Chains, Direction, PackedRing, Record, RingConfig, RingError, RingFault, SplitRing};
use crate::mem::GuestMemory;

/// The device's side of a running virtqueue.
///
/// Chains are taken with [`DeviceRing::gather`] and then, in ring order, either completed or given back before the lock
/// around the ring is released. So at rest there is one index, [`DeviceRing::base`]: up to where the device has used the
/// ring and from where it goes on.
pub trait DeviceRing {
    /// Number of descriptors.
    fn size(&self) -> u16;

    /// Where the next chain is taken: what GET_VRING_BASE answers.
    fn base(&self) -> u16;

    /// Moves the ring to a new map of the same guest's memory.
    ///
    /// # Errors
    /// The new map does not hold the ring's areas any more.
    fn set_memory(&mut self, memory: &Arc<GuestMemory>) -> Result<(), RingFault>;

    /// At least how many chains the driver has made available that nobody has taken; 0 only if there are none.
    ///
    /// # Errors
    /// What the driver did wrong.
    fn pending(&mut self) -> Result<u16, RingFault>;

    /// Takes up to `limit` more chains off the ring and adds them to `chains`, whose spans lie in `memory` (the map that
    /// this ring was started with or last moved to). Stops early when `chains` is full or a batch's worth of bytes is in
    /// it; returns how many were added.
    ///
    /// # Errors
    /// What the driver did wrong. The ring must then not be used again, but for completing what was taken before.
    fn gather<'m, D: Direction>(
        &mut self,
        memory: &'m GuestMemory,
        limit: usize,
        chains: &mut Chains<'m>,
    ) -> Result<usize, RingFault>;

    /// How many descriptors of long chains the last [`DeviceRing::gather`] walked.
    fn steps(&self) -> usize;

    /// Gives the chains that were gathered last back to the ring as if they had not been taken.
    fn give_back(&mut self, chains: &[Chain]);

    /// Completes a chain: the driver gets its buffers back, `written` bytes of them filled, once
    /// [`DeviceRing::publish`] is called. Chains are completed in the order they were taken.
    fn complete(&mut self, chain: &Chain, written: u32);

    /// [Completes](DeviceRing::complete) many chains, each with how many bytes were written, and keeps where it is in registers
    /// meanwhile.
    fn complete_all<'c>(&mut self, chains: impl Iterator<Item = (&'c Chain, u32)>);

    /// Makes all completed chains visible to the driver; returns whether it wants an interrupt for them, or `None` if
    /// there were none.
    fn publish(&mut self) -> Option<bool>;

    /// Asks the driver to notify us of new chains; returns whether there are none yet, that is, whether one may sleep.
    ///
    /// # Errors
    /// What the driver did wrong.
    fn arm(&mut self) -> Result<bool, RingFault>;

    /// Tells the driver that notifications are not needed.
    fn disarm(&mut self);
}

/// A running ring of one of the forms that virtio knows.
#[derive(Debug)]
pub enum Ring {
    /// Virtio 1.3, 2.7.
    Split(SplitRing),
    /// Virtio 1.3, 2.8.
    Packed(PackedRing),
}

/// Calls a method of whichever ring it is.
macro_rules! either {
    ($ring:expr, $form:ident => $call:expr) => {
        match $ring {
            Ring::Split($form) => $call,
            Ring::Packed($form) => $call,
        }
    };
}

impl Ring {
    /// Starts a ring that lies in `memory`.
    ///
    /// # Errors
    /// A size or an alignment that virtio does not allow, or an area that is not wholly in one region.
    pub fn start(config: RingConfig, memory: Arc<GuestMemory>) -> Result<Self, RingError> {
        if config.packed {
            PackedRing::start(config, memory).map(Self::Packed)
        } else {
            SplitRing::start(config, memory).map(Self::Split)
        }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        either!(self, ring => ring.size())
    }

    /// See [`DeviceRing::base`].
    pub fn base(&self) -> u16 {
        either!(self, ring => ring.base())
    }

    /// Goes on where we left the ring, if its front end has lost track: see [`SplitRing::resume`] and, for a packed ring,
    /// which needs a record for that, [`PackedRing::resume`].
    pub fn resume(&mut self, record: Option<Record>) {
        match (self, record) {
            (Self::Split(ring), _) => ring.resume(),
            (Self::Packed(ring), Some(record)) => ring.resume(record),
            (Self::Packed(_), None) => {}
        }
    }

    /// Whether the ring that was just started makes no sense: see [`PackedRing::is_misplaced`]. A split ring's fault shows
    /// with the first look at it.
    pub fn is_misplaced(&self) -> bool {
        match self {
            Self::Split(_) => false,
            Self::Packed(ring) => ring.is_misplaced(),
        }
    }

    /// See [`DeviceRing::set_memory`].
    ///
    /// # Errors
    /// The new map does not hold the ring's areas any more.
    pub fn set_memory(&mut self, memory: &Arc<GuestMemory>) -> Result<(), RingFault> {
        either!(self, ring => ring.set_memory(memory))
    }

    /// See [`DeviceRing::publish`].
    #[inline]
    pub fn publish(&mut self) -> Option<bool> {
        either!(self, ring => ring.publish())
    }

    /// See [`DeviceRing::arm`].
    ///
    /// # Errors
    /// What the driver did wrong.
    pub fn arm(&mut self) -> Result<bool, RingFault> {
        either!(self, ring => ring.arm())
    }

    /// See [`DeviceRing::disarm`].
    pub fn disarm(&mut self) {
        either!(self, ring => ring.disarm());
    }
}

/// Host address of one area of a ring, checked for its whole length and alignment. For as long as somebody keeps `memory`, all
/// of it can be read and written, whatever others do to it: its contents change at any time, and where the file behind it
/// loses pages there are zeros ([`crate::sys::mapped_file`]).
pub(super) fn area(
    memory: &GuestMemory,
    area: &'static str,
    address: u64,
    len: u32,
    align: usize,
) -> Result<*mut u8, RingError> {
    let span = memory.span(address, len, &mut 0).ok_or(RingError::Unmapped { area, address, len })?;
    let host = span.as_iovec().iov_base.cast::<u8>();
    if host.addr().is_multiple_of(align) { Ok(host) } else { Err(RingError::Misaligned { area, address, align }) }
}
