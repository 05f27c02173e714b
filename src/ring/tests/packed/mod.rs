//! The same rules for packed rings, where what they say is about another layout: [`walk`] what is read, [`used`] what is
//! written, [`record`] and [`overtaken`] what outlives us, [`alike`] that frames fare alike in rings of both forms.

mod alike;
mod overtaken;
mod record;
mod record_file;
mod used;
mod walk;

use crate::ring::packed_driver::PackedDriver;
use crate::ring::{Readable, RingFault};

/// Sizes worth a try: a packed ring's need not be a power of two.
const SIZES: [u16; 7] = [1, 2, 3, 5, 255, 256, 300];

/// The fault that gathering finds in a ring as it stands.
fn fault(driver: &PackedDriver) -> RingFault {
    driver.gather::<Readable>(&mut driver.start()).unwrap_err()
}

/// Bases worth a try in a ring of `size`: its ends and its middle, with either wrap counter.
fn bases(size: u16) -> impl Iterator<Item = u16> {
    [0, size / 2, size - 1].into_iter().flat_map(|slot| [slot, slot | 0x8000])
}
