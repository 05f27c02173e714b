//! What the figures were made on and with.

use std::fs;

use serde::Serialize;

use super::Plan;
use crate::cycles;
use crate::measure::{Kind, MeasureError};
use crate::switch;

/// The machine, and the versions of everything that was compared.
#[derive(Clone, Debug, Serialize)]
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
    /// Processes that wanted a CPU in the minute before: above zero, others were at work beside the switches.
    pub load_average: f64,
    /// Versions, by switch.
    pub versions: Vec<(Kind, String)>,
}

/// Load average from which figures are of other work as well.
const BUSY: f64 = 0.5;

impl Machine {
    /// Whether others were at work.
    pub fn was_busy(&self) -> bool {
        self.load_average > BUSY
    }

    /// Looks around.
    pub(super) fn look(plan: &Plan) -> Result<Self, MeasureError> {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = text("/proc/cpuinfo");
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.split('\t').next() == Some(name));
            line.and_then(|line| line.split_once(": ")).map(|(_, value)| value.to_owned()).unwrap_or_default()
        };
        let kib = text("/proc/meminfo").split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
        let versions = [
            (Kind::Linecard, switch::linecard_version(&plan.bin_dir)?),
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
            load_average: text("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
            versions: versions.into(),
        })
    }
}
