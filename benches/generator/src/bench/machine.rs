//! What the figures were made on and with.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::measure::{Kind, MeasureError};
use crate::switch;
use crate::{cycles, interrupt};

/// The machine, and the versions of everything that was compared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Machine {
    /// The processor's name, family and model.
    pub processor: String,
    /// How many CPUs there are.
    pub cpus: usize,
    /// GHz of the time stamp counter, which "cycles" are of.
    pub ghz: f64,
    /// GiB of memory.
    pub memory: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// Whether it is a virtual machine, which shares its cores with others.
    pub is_virtual: bool,
    /// Versions, by switch.
    pub versions: Vec<(Kind, String)>,
}

impl Machine {
    /// Whether figures of `other` can stand beside those of this one: the same processor, kernel and switches.
    pub fn is_like(&self, other: &Self) -> bool {
        let key = |machine: &Self| {
            (machine.processor.clone(), machine.cpus, machine.kernel.clone(), machine.versions.clone())
        };
        key(self) == key(other)
    }

    /// Looks around; Linecard's binaries are in `bin_dir`.
    pub fn look(bin_dir: &Path) -> Result<Self, MeasureError> {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = text("/proc/cpuinfo");
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.split('\t').next() == Some(name));
            line.and_then(|line| line.split_once(": ")).map(|(_, value)| value.to_owned()).unwrap_or_default()
        };
        let kib = text("/proc/meminfo").split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
        let versions = [
            (Kind::Linecard, switch::linecard_version(bin_dir)?),
            (Kind::Ovs, switch::openvswitch_version()?),
            (Kind::Cable, switch::dpdk_version()?),
        ];
        Ok(Self {
            processor: format!("{}, family {}, model {}", field("model name"), field("cpu family"), field("model")),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            ghz: (cycles::per_second() / 1e7).round() / 100.0,
            memory: kib.unwrap_or(0) / (1 << 20),
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            is_virtual: field("flags").split(' ').any(|flag| flag == "hypervisor"),
            versions: versions.into(),
        })
    }
}

/// How many CPUs' worth of time is used in the second from now on, while nothing of ours runs: by others, those included that
/// share the host of a virtual machine. A load average would be of the minute before as well, and so of our own switches.
pub(super) fn cpus_in_use() -> f64 {
    let stat = || fs::read_to_string("/proc/stat").unwrap_or_default();
    let before = stat();
    interrupt::sleep(Duration::from_secs(1));
    in_use(&before, &stat()).unwrap_or(0.0)
}

/// The same between two states of `/proc/stat` (proc_stat(5)).
fn in_use(before: &str, after: &str) -> Option<f64> {
    // User, nice, system, idle, iowait, irq, softirq, steal; the two that follow are part of the first two.
    let times = |text: &str| {
        let fields = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8);
        fields.map(|field| field.parse::<u64>().ok()).collect::<Option<Vec<_>>>().filter(|times| times.len() == 8)
    };
    // A line for each CPU follows the one for all.
    let cpus = after.lines().skip(1).take_while(|line| line.starts_with("cpu")).count();
    let (before, after) = (times(before)?, times(after)?);
    let spent: Vec<_> = after.iter().zip(&before).map(|(after, before)| after.saturating_sub(*before) as f64).collect();
    let (all, idle) = (spent.iter().sum::<f64>(), spent[3] + spent[4]);
    let cpus = cpus as f64;
    (all > 0.0).then(|| (100.0 * cpus * (all - idle) / all).round() / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_use_is_all_but_idle_time() {
        let stat = |times: [u64; 10]| {
            format!("cpu  {}\ncpu0 1 2\ncpu1 3 4\ncpu2 5 6\nintr 7\n", times.map(|time| time.to_string()).join(" "))
        };
        let before = stat([1000, 10, 500, 90_000, 300, 1, 2, 3, 400, 5]);
        let idle = stat([1000, 10, 500, 90_150, 350, 1, 2, 3, 400, 5]);
        assert_eq!(in_use(&before, &idle), Some(0.0));
        let half = stat([1040, 20, 520, 90_080, 320, 11, 12, 13, 440, 5]);
        assert_eq!(in_use(&before, &half), Some(1.5));
        assert_eq!((in_use(&before, &before), in_use("", &half), in_use(&before, "cpu  1 2")), (None, None, None));
    }
}
