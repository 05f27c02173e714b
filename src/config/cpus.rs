//! Lists of CPUs, as the kernel's own files write them: `2-5,8`.

use super::plan::CpuChoice;
use super::reader::clipped;
use super::scalar::{Fault, Scalar, deserialize_scalar};
use crate::limits;

/// CPU ids, ascending and each once; may be empty.
#[derive(Debug, Default)]
pub(super) struct Cpus(pub(super) Vec<u16>);

/// Ids from here on do not exist: the kernel's own ceiling (`CONFIG_NR_CPUS`, arch/x86/Kconfig).
const CPU_IDS: u16 = 8192;

impl Cpus {
    fn parse(text: &str) -> Result<Self, String> {
        let id = |text: &str| {
            let plain = text.bytes().all(|b| b.is_ascii_digit());
            let id = text.parse().ok().filter(|&id: &u16| plain && id < CPU_IDS);
            id.ok_or_else(|| format!("\"{}\" is not a CPU: write ids below {CPU_IDS}, as in \"2-5,8\"", clipped(text)))
        };
        let mut cpus = Vec::new();
        for part in text.split(',').map(str::trim).filter(|_| !text.trim().is_empty()) {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (id(first.trim())?, id(last.trim())?),
                None => (id(part)?, id(part)?),
            };
            if first > last {
                return Err(format!("the range {part} runs backwards"));
            }
            if cpus.len() + usize::from(last - first) >= limits::SHARDS {
                return Err(format!(
                    "more than {} CPUs: there is one shard per CPU and no more shards",
                    limits::SHARDS
                ));
            }
            cpus.extend(first..=last);
        }
        cpus.sort_unstable();
        match cpus.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("CPU {} is named twice", pair[0])),
            None => Ok(Self(cpus)),
        }
    }
}

impl Scalar for Cpus {
    const EXPECTED: &'static str = "CPU ids, as in \"2-5,8\"";

    fn from_text(text: &str) -> Result<Self, Fault> {
        Self::parse(text).map_err(Fault::Because)
    }

    fn from_whole(number: u64) -> Result<Self, Fault> {
        Self::parse(&number.to_string()).map_err(Fault::Because)
    }
}

/// `auto`, or at least one CPU.
#[derive(Debug)]
pub(super) struct CpuSelection(pub(super) CpuChoice);

impl Scalar for CpuSelection {
    const EXPECTED: &'static str = "auto or CPU ids, as in \"2-5,8\"";

    fn from_text(text: &str) -> Result<Self, Fault> {
        if text == "auto" {
            return Ok(Self(CpuChoice::Auto));
        }
        let Cpus(cpus) = Cpus::parse(text).map_err(Fault::Because)?;
        if cpus.is_empty() { Err(Fault::Unlike) } else { Ok(Self(CpuChoice::List(cpus))) }
    }

    fn from_whole(number: u64) -> Result<Self, Fault> {
        Self::from_text(&number.to_string())
    }
}

deserialize_scalar!(Cpus, CpuSelection);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::scalar::tests::text;
    use super::*;

    #[test]
    fn cpu_lists_are_sorted_and_bounded() {
        assert_eq!(text::<Cpus>("8, 2-5").unwrap().0, [2, 3, 4, 5, 8]);
        assert!(text::<Cpus>("").unwrap().0.is_empty());
        for bad in ["5-2", "1,1", "1-3,2", "a", "1,", "-1", "+1", "8192", "0-64", "0-65535", "1-2-3"] {
            assert!(text::<Cpus>(bad).is_none(), "{bad}");
        }
        assert_eq!(text::<CpuSelection>("auto").unwrap().0, CpuChoice::Auto);
        assert!(text::<CpuSelection>(" ").is_none());
    }
}
