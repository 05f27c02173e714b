//! The switches that get the load: each is started with the same ports on the same CPU, tells what it counted, and is gone
//! when its value is dropped.

mod linecard;
mod openvswitch;
mod process;
mod testpmd;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use thiserror::Error;

pub use linecard::{Linecard, Setup as LinecardSetup, version as linecard_version};
pub use openvswitch::{OpenVswitch, version as openvswitch_version};
pub use testpmd::{Testpmd, version as dpdk_version};

use crate::nic::Door;

/// What a switch has to have.
#[derive(Clone, Debug)]
pub struct Wiring {
    /// Ports, all in one broadcast domain.
    pub ports: usize,
    /// Queue pairs of each.
    pub queues: usize,
    /// Addresses behind each, written into every frame; `None` for one that stays in the frames.
    pub stations: Option<u32>,
    /// The CPUs that it forwards on.
    pub cpus: Vec<usize>,
    /// Longest frame.
    pub longest: usize,
    /// Whether guests' segmentation offload is to pass whole, where a switch has to be told so.
    pub offloads: bool,
}

/// What a switch counted since it was started, over all CPUs that it forwards on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// Frames received.
    pub frames: u64,
    /// Cycles spent on them.
    pub busy: u64,
    /// Cycles in all.
    pub cycles: u64,
    /// Frames thrown away because no receiver had a buffer or the time for them, or too many were to be flooded.
    pub not_taken: u64,
}

/// Why a switch cannot be used.
#[derive(Debug, Error)]
pub enum SwitchError {
    /// A program did not start.
    #[error("cannot run {program} ({hint})")]
    Run {
        /// The program.
        program: String,
        /// Where it comes from.
        hint: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} failed: {said}")]
    Failed {
        /// The program and its arguments.
        program: String,
        /// Its last words.
        said: String,
    },
    /// Files that it needs.
    #[error("cannot prepare {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It said something else than expected.
    #[error("{program} does not say {what}: {said}")]
    Silent {
        /// The program.
        program: &'static str,
        /// What was looked for.
        what: &'static str,
        /// What it said.
        said: String,
    },
}

/// A running switch.
pub trait Switch {
    /// Where its ports are met, in order.
    fn doors(&self) -> Vec<Door>;

    /// What it has counted; `None` if it does not count cycles.
    fn sample(&mut self) -> Result<Option<Sample>, SwitchError>;

    /// The last lines of its log.
    fn last_words(&self) -> String;

    /// The process that forwards.
    fn pid(&self) -> Option<u32>;

    /// Kills that process outright, and starts it again over the same configuration; when it was started.
    fn restart(&mut self) -> Result<Instant, SwitchError>;
}

impl Sample {
    /// What happened since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            frames: self.frames.saturating_sub(before.frames),
            busy: self.busy.saturating_sub(before.busy),
            cycles: self.cycles.saturating_sub(before.cycles),
            not_taken: self.not_taken.saturating_sub(before.not_taken),
        }
    }

    /// Cycles per frame, of the time it had work.
    pub fn cycles_per_frame(&self) -> f64 {
        self.busy as f64 / self.frames.max(1) as f64
    }

    /// The share of its time that it had work, in percent.
    pub fn busy_percent(&self) -> f64 {
        100.0 * self.busy as f64 / self.cycles.max(1) as f64
    }
}

/// The last lines of the log at `path`.
fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<_> = text.lines().rev().take(5).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

/// CPUs as a mask in hexadecimal.
fn mask(cpus: &[usize]) -> String {
    format!("{:#x}", cpus.iter().fold(0u64, |mask, cpu| mask | 1 << cpu))
}

#[cfg(test)]
mod tests {
    #[test]
    fn masks_name_cpus() {
        assert_eq!(super::mask(&[0, 2]), "0x5");
    }
}
