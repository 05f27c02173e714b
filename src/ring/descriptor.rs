//! One [`Descriptor`], and what a walk does with it whichever form its ring has: check its direction, look its buffer up,
//! add that to a [`Chain`].
//!
//! [`super::split`] and [`super::packed`] find descriptors in different places and follow them by different rules; what a
//! descriptor may say is the same in both (virtio 1.3, 2.7.5 and 2.8.5), and so are these checks. Each descriptor was read
//! once before it comes here; nothing here looks at the ring's memory again.

use super::{Chain, Chains, Direction, RingFault};
use crate::limits::{CHAIN_SEGMENTS, INDIRECT_DESCRIPTORS};
use crate::mem::{GuestMemory, Span, Window};

/// VIRTQ_DESC_F_NEXT, _WRITE, _INDIRECT (virtio 1.3, 2.7.5 and 2.8.13).
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// One descriptor, read in one go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    /// The index of the next descriptor, in a split ring and its tables.
    pub(super) next: u16,
}

impl Descriptor {
    /// The descriptor that two words of a split ring's table say.
    #[inline]
    pub(super) fn from_words([address, rest]: [u64; 2]) -> Self {
        let (address, rest) = (u64::from_le(address), u64::from_le(rest));
        Self { address, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    /// Reads a descriptor of an indirect table, which may lie across regions and need not be aligned.
    #[inline]
    pub(super) fn read(memory: &GuestMemory, address: u64, region: &mut usize) -> Option<Self> {
        let mut bytes = [0; 16];
        match memory.span(address, 16, region) {
            Some(span) => {
                span.read_exact(&mut bytes);
            }
            None => read_across(memory, address, &mut bytes)?,
        }
        let [a, b, c, d, e, f, g, h, rest @ ..] = bytes;
        Some(Self::from_words([u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u64::from_ne_bytes(rest)]))
    }
}

/// Checks an indirect table's descriptor; returns how many entries it has.
pub(super) fn check_table(negotiated: bool, head: u16, table: &Descriptor) -> Result<u16, RingFault> {
    let entries = table.len / 16;
    let why = if !negotiated {
        "VIRTIO_F_INDIRECT_DESC was not negotiated"
    } else if table.flags & NEXT != 0 {
        "it is combined with a next descriptor"
    } else if entries == 0 || !table.len.is_multiple_of(16) {
        "its length is not a positive multiple of 16"
    } else if entries > u32::from(INDIRECT_DESCRIPTORS) {
        "it has more than 1024 descriptors"
    } else if ends_beyond_memory(table) {
        return Err(RingFault::Unmapped { head, address: table.address, len: table.len });
    } else {
        return Ok(entries as u16);
    };
    Err(RingFault::Indirect { head, why, len: table.len })
}

/// The buffer of a descriptor, if it lies in one region: that of `window`, or else the one that `window` is moved to, which
/// `around` is then an address of.
#[inline(always)]
pub(super) fn find<'m>(
    memory: &'m GuestMemory,
    window: &mut Window<'m>,
    around: &mut u64,
    descriptor: &Descriptor,
) -> Option<Span<'m>> {
    let span = window.span(descriptor.address, descriptor.len);
    if span.is_some() {
        return span;
    }
    *around = descriptor.address;
    *window = memory.window(descriptor.address);
    window.span(descriptor.address, descriptor.len)
}

/// Adds one descriptor's buffer to a chain: usually one piece, more if it lies across regions. Empty buffers are allowed
/// and add nothing, whatever their address (CVE-2020-10725 was about translating those).
pub(super) fn add_buffer<'m, D: Direction>(
    memory: &'m GuestMemory,
    chains: &mut Chains<'m>,
    chain: &mut Chain,
    descriptor: &Descriptor,
) -> Result<(), RingFault> {
    check_direction::<D>(chain.head, descriptor.flags)?;
    chain.bytes = chain.bytes.saturating_add(descriptor.len);
    let unmapped = RingFault::Unmapped { head: chain.head, address: descriptor.address, len: descriptor.len };
    if ends_beyond_memory(descriptor) {
        return Err(unmapped);
    }
    let (mut address, mut left) = (descriptor.address, descriptor.len);
    while left > 0 {
        let span = memory.span_up_to(address, left).ok_or(unmapped)?;
        left -= span.len() as u32;
        // Wraps only behind the very last byte of a buffer, where nothing is left to look up.
        address = address.wrapping_add(span.len() as u64);
        let used = chains.pieces.len() - usize::from(chain.start);
        if used >= CHAIN_SEGMENTS || chains.pieces.try_push(span).is_err() {
            chain.overlong = true;
            return Ok(());
        }
    }
    Ok(())
}

/// Whether a descriptor's last byte lies beyond the last guest address. Without this check a region that ends at 2^64
/// would be followed by the one at 0.
fn ends_beyond_memory(descriptor: &Descriptor) -> bool {
    descriptor.address.checked_add(u64::from(descriptor.len.saturating_sub(1))).is_none()
}

/// Settles a long chain's pieces, none at all if it was overlong, and adds it to the others; returns its bytes.
pub(super) fn finish(chains: &mut Chains<'_>, mut chain: Chain) -> u32 {
    let start = usize::from(chain.start);
    if chain.overlong {
        chains.pieces.truncate(start);
    }
    chain.count = (chains.pieces.len() - start) as u16;
    chains.list.push(chain);
    chain.bytes
}

/// Refuses descriptors of the other direction (virtio 1.3, 5.1.6.2 and 5.1.6.3: all readable, all writable).
#[inline]
fn check_direction<D: Direction>(head: u16, flags: u16) -> Result<(), RingFault> {
    if (flags & WRITE != 0) == D::DEVICE_WRITES {
        return Ok(());
    }
    let found = if D::DEVICE_WRITES { "readable" } else { "writable" };
    Err(RingFault::Direction { head, found, expected: D::NAME })
}

/// Fills `to` from guest memory, across regions if need be.
fn read_across(memory: &GuestMemory, mut address: u64, mut to: &mut [u8]) -> Option<()> {
    while !to.is_empty() {
        let span = memory.span_up_to(address, to.len() as u32)?;
        let (now, later) = to.split_at_mut(span.len());
        span.read(now);
        address = address.wrapping_add(span.len() as u64);
        to = later;
    }
    Some(())
}
