//! What the figures were made on and with.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::cycles;
use crate::measure::{Kind, MeasureError};
use crate::switch;

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

/// The kernel's, over the last minute.
pub(super) fn load_average() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0)
}
