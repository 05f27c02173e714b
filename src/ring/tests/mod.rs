//! Tests of the ring engine. [`setup`], [`batches`], [`chains`], [`buffers`] and [`used`] assert by hand, rule by rule, the
//! precise fault or the bound that holds, [`packed`] the same for packed rings; [`reference`] compares with virtio-queue; [`random`] feeds what no rule foresaw.
//!
//! The rules, with what they cost other switches where they were missing, have numbers that test names carry:
//!  1. every field that the guest wrote is read once, checked, and used from the copy
//!  2. an available index that moves by more than a ringful is a fault, not a clamp
//!  3. heads and `next` are below their table's size, and every walk ends
//!  4. indirect tables: one level, alone, negotiated, of whole descriptors, bounded; they may lie across regions
//!  5. all buffers of a chain have the ring's direction
//!  6. addresses are translated with their length, region by region (CVE-2018-1059); empty buffers are never translated
//!     (CVE-2020-10725); nothing overflows at the end of the address space
//!  7. lengths add up without overflow; more pieces than a frame may have are none
//! 10. what is given back is as if it had not been taken; nothing of it was published
//! 11. used indexes count modulo 2^16, slots modulo the size, and nothing is written beyond the area
//! 12. a turn ends at so many chains, bytes and descriptors (CVE-2019-3900 was a loop without such an end)
//! 14. event indexes are untrusted numbers: at worst the guest that wrote them has too many interrupts or too few
//! 15. nothing a guest writes may panic
//! 16. areas and buffers may overlap: that only harms the guest that made them so
//!
//! Rules 8, 9 and 13 are about frames, receive buffers and doorbells, which are the vNIC's.

#![allow(clippy::unwrap_used)]

mod batches;
mod buffers;
mod chains;
mod packed;
mod random;
mod reference;
mod setup;
mod used;

use super::driver::Driver;
use super::{Readable, RingFault};

/// The fault that gathering finds in a ring as it stands.
fn fault(driver: &Driver) -> RingFault {
    driver.gather::<Readable>(&mut driver.start()).unwrap_err()
}

/// Base indexes worth a try: around both ends of the 16 bits and of their halves.
const BASES: [u16; 7] = [0, 1, 255, 32767, 32768, 65279, 65535];
