//! Durations with a unit: how they are written, and how they are shown.

use std::time::Duration;

use super::scalar::{Fault, Scalar, deserialize_scalar};

/// A duration of at most 292 years.
#[derive(Debug, Clone, Copy)]
pub(super) struct Time(pub(super) Duration);

deserialize_scalar!(Time);

/// Units of durations, in nanoseconds, the largest first.
const UNITS: [(&str, u64); 6] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
];

impl Scalar for Time {
    const EXPECTED: &'static str = "a duration with its unit (us, ms, s, m, h or d), as in 300s";

    fn from_text(text: &str) -> Result<Self, Fault> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = UNITS.iter().find(|(name, _)| *name == unit.trim_start()).ok_or(Fault::Unlike)?.1;
        let nanos = number.parse().ok().and_then(|number: u64| number.checked_mul(unit)).ok_or(Fault::Unlike)?;
        Ok(Self(Duration::from_nanos(nanos)))
    }

    fn from_whole(number: u64) -> Result<Self, Fault> {
        Err(Fault::Because(format!("{number} has no unit: for seconds write {number}s")))
    }
}

/// The duration with the largest unit that divides it, which reads back as the same.
pub(super) fn format_duration(duration: Duration) -> String {
    let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    match UNITS.iter().find(|(_, unit)| nanos != 0 && nanos.is_multiple_of(*unit)) {
        Some((name, unit)) => format!("{}{name}", nanos / unit),
        None => format!("{}us", nanos / 1_000),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::scalar::tests::text;
    use super::*;

    #[test]
    fn durations_need_a_unit_and_read_back() {
        for (written, nanos, shown) in [
            ("300s", 300_000_000_000, "5m"),
            ("5 m", 300_000_000_000, "5m"),
            ("500us", 500_000, "500us"),
            ("1500ms", 1_500_000_000, "1500ms"),
            ("0s", 0, "0us"),
            ("1d", 86_400_000_000_000, "1d"),
        ] {
            let Time(time) = text(written).unwrap();
            assert_eq!((time, format_duration(time).as_str()), (Duration::from_nanos(nanos), shown), "{written}");
            assert_eq!(text::<Time>(shown).unwrap().0, time);
        }
        for bad in ["", "s", "5", "5 weeks", "-1s", "1.5s", "99999999999999d", "５s"] {
            assert!(text::<Time>(bad).is_none(), "{bad}");
        }
    }
}
