//! Which pages of failed mappings have zero pages of ours over them: a table of addresses for the whole process.
//!
//! Each page that [`super::sigbus`] replaces parts a mapping of its peer's file in two and is one more itself, and a process has
//! 65530 mappings unless its host says otherwise (vm.max_map_count). So there are [`PIECES`] at most, whoever they are of: no
//! more than [`MAPPINGS`] mappings beyond those that were made on purpose. Where there is no place left, a mapping is
//! replaced as a whole, which takes none. The pages of a mapping leave the table when it is unmapped, and long before that:
//! as soon as nobody uses it, its session undoes them ([`super::mapped_file::MappedFile::settle`]).
//!
//! It is written in a signal handler, by many threads at once: atomics only, and every walk ends after [`PIECES`] steps.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Pages that may be replaced at one time, one by one.
pub(super) const PIECES: usize = 4096;

/// Mappings that they take: each its own, and one for what is left behind it.
const MAPPINGS: usize = 2 * PIECES;
const _: () = assert!(MAPPINGS <= 65_530 / 4, "mem/budget.rs gives another quarter away");

/// Addresses of their first bytes; 0 is none, since nothing is mapped there.
static TABLE: [AtomicUsize; PIECES] = [const { AtomicUsize::new(0) }; PIECES];

/// Where to look for a free place first.
static NEXT: AtomicUsize = AtomicUsize::new(0);

/// Notes that the page at `address` is replaced. `false`: there are too many. Async-signal-safe.
pub(super) fn note(address: usize) -> bool {
    let first = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut places = (0..PIECES).map(|step| &TABLE[first.wrapping_add(step) % PIECES]);
    places.any(|place| place.compare_exchange(0, address, Ordering::AcqRel, Ordering::Relaxed).is_ok())
}

/// Whether the page at `address` is replaced. Async-signal-safe.
pub(super) fn contain(address: usize) -> bool {
    TABLE.iter().any(|place| place.load(Ordering::Acquire) == address)
}

/// Takes the pages in `range` out of the table, for `each` of them. Async-signal-safe if that is.
pub(super) fn take(range: &Range<usize>, mut each: impl FnMut(usize)) {
    for place in &TABLE {
        let address = place.load(Ordering::Relaxed);
        let taken = address != 0 && range.contains(&address);
        if taken && place.compare_exchange(address, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            each(address);
        }
    }
}

#[cfg(test)]
mod tests;
