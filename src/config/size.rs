//! Sizes of memory with a unit: how they are written, and how they are shown.

use super::scalar::{Fault, Scalar, deserialize_scalar};
use crate::limits::MEMORY_BYTES;

/// So many bytes of memory, at least one MiB and no more than any front end may share.
#[derive(Debug, Clone, Copy)]
pub(super) struct MemorySize(pub(super) u64);

deserialize_scalar!(MemorySize);

/// Units of sizes, in bytes, the largest first.
const UNITS: [(&str, u64); 3] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)];

impl Scalar for MemorySize {
    const EXPECTED: &'static str = "a size with its unit (MiB, GiB or TiB), from 1MiB to 16TiB, as in 64GiB";

    fn from_text(text: &str) -> Result<Self, Fault> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = UNITS.iter().find(|(name, _)| *name == unit.trim_start()).ok_or(Fault::Unlike)?.1;
        let bytes = number.parse().ok().and_then(|number: u64| number.checked_mul(unit)).ok_or(Fault::Unlike)?;
        if (1..=MEMORY_BYTES).contains(&bytes) { Ok(Self(bytes)) } else { Err(Fault::Unlike) }
    }

    fn from_whole(number: u64) -> Result<Self, Fault> {
        Err(Fault::Because(format!("{number} has no unit: for GiB write {number}GiB")))
    }
}

/// The size with the largest unit that divides it, which reads back as the same.
pub(super) fn format_size(bytes: u64) -> String {
    let fits = UNITS.iter().find(|(_, unit)| bytes.is_multiple_of(*unit));
    fits.map_or_else(|| format!("{bytes}B"), |(name, unit)| format!("{}{name}", bytes / unit))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::scalar::tests::text;
    use super::*;

    #[test]
    fn sizes_need_a_unit_and_read_back() {
        for (written, bytes, shown) in [
            ("64GiB", 64 << 30, "64GiB"),
            ("1024 MiB", 1 << 30, "1GiB"),
            ("16TiB", 1 << 44, "16TiB"),
            ("1MiB", 1 << 20, "1MiB"),
        ] {
            let MemorySize(size) = text(written).unwrap();
            assert_eq!((size, format_size(size).as_str()), (bytes, shown), "{written}");
            assert_eq!(text::<MemorySize>(shown).unwrap().0, size);
        }
        for bad in ["", "GiB", "5", "5G", "5GB", "-1GiB", "1.5GiB", "0MiB", "17TiB", "99999999999999TiB", "５GiB"] {
            assert!(text::<MemorySize>(bad).is_none(), "{bad}");
        }
    }
}
