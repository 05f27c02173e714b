//! The CPUs of this machine, and which of them a shard should have when the configuration says `cpus: auto`.
//!
//! `auto` means one shard. One shard moves more frames than most hosts ever see between their VMs, and a second one that
//! nobody asked for would take a CPU from the guests. Which CPU, in this order:
//!
//! 1. one that the kernel keeps free of other work (`isolcpus=`, /sys/devices/system/cpu/isolated): somebody set it aside
//!    for just this;
//! 2. otherwise the highest-numbered one that is neither CPU 0 nor a hyper-thread of its core: the kernel's own chores
//!    and most interrupts land on CPU 0;
//! 3. otherwise whatever there is.
//!
//! Of each kind, first those that do not share a core with an exclusive CPU: two busy hyper-threads have little more than
//! half a core each.
//!
//! Only CPUs that this process may use count: affinity and cgroup cpusets both show in `sched_getaffinity(2)`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rustix::process::Pid;

use crate::shard;

/// What could not be learned about the CPUs, or cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// A file in /sys that could not be read.
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// A file in /sys that is not a list of CPUs.
    #[error("{} has \"{found}\" where a list of CPUs should be", path.display())]
    List {
        /// The file.
        path: PathBuf,
        /// Its content, cut short.
        found: String,
    },
    /// The configuration names CPUs that this process may not use.
    #[error(
        "{key} names CPU {missing}, but CPU {missing} is not allowed to this process, which may use only {allowed}: change the key, or the service's CPUAffinity= or cpuset"
    )]
    NotAllowed {
        /// Key of the configuration.
        key: &'static str,
        /// The CPUs it names that cannot be had.
        missing: String,
        /// Those that can.
        allowed: String,
    },
    /// The configuration names CPUs that do not exist, or are switched off.
    #[error(
        "{key} names CPU {missing}, but there is no CPU {missing} on this host, which runs CPU {online}: change the key"
    )]
    Absent {
        /// Key of the configuration.
        key: &'static str,
        /// The CPUs it names that are not there.
        missing: String,
        /// Those that are.
        online: String,
    },
    /// Nothing is left for a shard.
    #[error("shards.cpus is auto, but shards.exclusive ({0}) takes every CPU that this process may use")]
    NoneLeft(String),
}

/// The CPUs of this machine as far as this process is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpus {
    /// Those that this process may use, ascending.
    pub allowed: BTreeSet<u16>,
    /// Those that the kernel keeps free of other work.
    pub isolated: BTreeSet<u16>,
    /// CPU 0 and the hyper-threads of its core.
    pub boot_core: BTreeSet<u16>,
    /// Those that run.
    pub online: BTreeSet<u16>,
    /// Those that this process's cgroup leaves it, where that is known.
    pub cpuset: Option<BTreeSet<u16>>,
    /// The hyper-threads of each core.
    pub cores: Vec<BTreeSet<u16>>,
    /// The NUMA node of each CPU; those that are not here are on node 0.
    pub nodes: BTreeMap<u16, u16>,
}

/// A CPU for the one shard of `cpus: auto`, and why it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suggestion {
    /// The CPU.
    pub cpu: u16,
    /// Why, as the rest of a sentence that begins with "CPU 3 is".
    pub reason: &'static str,
}

impl Cpus {
    /// Reads what this machine has.
    ///
    /// # Errors
    /// /sys is not there or not as the kernel documents it.
    pub fn of_this_host() -> Result<Self, CpuError> {
        let sys = Path::new("/sys/devices/system/cpu");
        let online = read_list(&sys.join("online"))?;
        // The list is empty, or not there at all, where nothing is isolated.
        let isolated = read_list(&sys.join("isolated")).unwrap_or_default();
        let boot_core = read_list(&sys.join("cpu0/topology/thread_siblings_list")).unwrap_or_else(|_| [0].into());
        // More than 1024 CPUs do not fit the set that the call fills; then the shard's own pinning has the last word.
        let allowed = match rustix::thread::sched_getaffinity(None) {
            Ok(set) => online.iter().copied().filter(|&cpu| set.is_set(usize::from(cpu))).collect(),
            Err(_) => online.clone(),
        };
        let threads = |cpu: &u16| read_list(&sys.join(format!("cpu{cpu}/topology/thread_siblings_list"))).ok();
        let mut cores: Vec<BTreeSet<u16>> = online.iter().filter_map(threads).collect();
        cores.dedup();
        Ok(Self { allowed, isolated, boot_core, cores, nodes: nodes(), cpuset: cpuset(), online })
    }

    /// The hyper-threads of a CPU's core, itself included.
    pub fn siblings(&self, cpu: u16) -> impl Iterator<Item = u16> {
        self.cores.iter().find(|core| core.contains(&cpu)).into_iter().flatten().copied()
    }

    /// The NUMA node of a CPU.
    pub fn node(&self, cpu: u16) -> u16 {
        self.nodes.get(&cpu).copied().unwrap_or(0)
    }

    /// What keeps CPUs from this process, a sentence each.
    pub fn restrictions(&self) -> Vec<String> {
        let within = self.cpuset.as_ref().unwrap_or(&self.online);
        let by = |who: &str, kept: Vec<u16>| {
            (!kept.is_empty()).then(|| format!("{who} keeps CPU {} from this process", list(kept.into_iter())))
        };
        let by_cgroup = by("its cgroup's cpuset", self.online.difference(within).copied().collect());
        let by_affinity = by("its affinity mask", within.difference(&self.allowed).copied().collect());
        by_cgroup.into_iter().chain(by_affinity).collect()
    }

    /// The CPU that a single shard should have, leaving out those of `exclusive`.
    ///
    /// # Errors
    /// `exclusive` leaves none.
    pub fn suggest(&self, exclusive: &[u16]) -> Result<Suggestion, CpuError> {
        let beside = |cpu: &u16| self.siblings(*cpu).any(|sibling| exclusive.contains(&sibling));
        let free = self.allowed.iter().copied().filter(|cpu| !exclusive.contains(cpu));
        let (last, first): (Vec<u16>, Vec<u16>) = free.partition(beside);
        let found = self.best_of(&first).or_else(|| self.best_of(&last));
        let (cpu, reason) = found.ok_or_else(|| CpuError::NoneLeft(list(exclusive.iter().copied())))?;
        Ok(Suggestion { cpu, reason })
    }

    /// The best of `free`, which ascend, and why.
    fn best_of(&self, free: &[u16]) -> Option<(u16, &'static str)> {
        let free = || free.iter().rev().copied();
        let isolated = free().find(|cpu| self.isolated.contains(cpu));
        let apart = free().find(|cpu| !self.boot_core.contains(cpu) && *cpu != 0);
        isolated
            .map(|cpu| (cpu, "kept free of other work by the kernel (isolated)"))
            .or(apart.map(|cpu| (cpu, "the last that is not on the core of CPU 0, where the kernel's chores land")))
            .or(free().next().map(|cpu| (cpu, "what there is")))
    }

    /// Keeps all threads of this process but shards, and those that they start later, off the CPUs of shards; see
    /// [`Cpus::beside`].
    pub fn keep_off(&self, shared: &[u16], exclusive: &[u16]) {
        let mut rest = rustix::thread::CpuSet::new();
        self.beside(shared, exclusive).into_iter().for_each(|cpu| rest.set(usize::from(cpu)));
        if rest.count() == 0 {
            return;
        }
        // Only a courtesy to the shards: what the kernel refuses, and what starts meanwhile, is left as it is.
        for thread in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
            let name = std::fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
            let number = thread.file_name().to_str().and_then(|number| Pid::from_raw(number.parse().ok()?));
            if let Some(number) = number.filter(|_| !name.starts_with(shard::THREAD_NAME)) {
                let _ = rustix::thread::sched_setaffinity(Some(number), &rest);
            }
        }
    }

    /// The CPUs for everything but shards: those that have none. If each has one, those that ports share; a shard alone with
    /// its port must not wait for a thread that writes metrics.
    fn beside(&self, shared: &[u16], exclusive: &[u16]) -> BTreeSet<u16> {
        let without = |taken: &[u16]| self.allowed.iter().copied().filter(|cpu| !taken.contains(cpu)).collect();
        let free: BTreeSet<u16> = without(&[shared, exclusive].concat());
        if free.is_empty() { without(exclusive) } else { free }
    }

    /// Makes sure that this process may use each of `cpus`, which the configuration names under `key`.
    ///
    /// # Errors
    /// Says which it may not.
    pub fn require(&self, key: &'static str, cpus: &[u16]) -> Result<(), CpuError> {
        let beyond = |those: &BTreeSet<u16>| {
            let missing: Vec<u16> = cpus.iter().copied().filter(|cpu| !those.contains(cpu)).collect();
            (!missing.is_empty()).then(|| (list(missing.into_iter()), list(those.iter().copied())))
        };
        if let Some((missing, online)) = beyond(&self.online) {
            return Err(CpuError::Absent { key, missing, online });
        }
        match beyond(&self.allowed) {
            Some((missing, allowed)) => Err(CpuError::NotAllowed { key, missing, allowed }),
            None => Ok(()),
        }
    }
}

/// Whether the kernel takes the CPU from real-time threads that never sleep, for a part of each second (sched(7)).
pub fn realtime_is_throttled() -> bool {
    let runtime = std::fs::read_to_string("/proc/sys/kernel/sched_rt_runtime_us");
    runtime.is_ok_and(|text| text.trim() != "-1")
}

/// The NUMA node of each CPU.
fn nodes() -> BTreeMap<u16, u16> {
    let sys = Path::new("/sys/devices/system/node");
    // Without NUMA there is no such folder.
    let nodes = read_list(&sys.join("online")).unwrap_or_default();
    let on = |node: u16| read_list(&sys.join(format!("node{node}/cpulist"))).unwrap_or_default();
    nodes.into_iter().flat_map(|node| on(node).into_iter().map(move |cpu| (cpu, node))).collect()
}

/// The CPUs that this process's cgroup has (cgroup v2), or the nearest of those above it that says.
fn cpuset() -> Option<BTreeSet<u16>> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let folder = Path::new("/sys/fs/cgroup").join(own);
    let files = folder.ancestors().take_while(|folder| folder.starts_with("/sys/fs/cgroup"));
    files.map(|folder| folder.join("cpuset.cpus.effective")).find_map(|file| read_list(&file).ok())
}

/// Writes CPU numbers as the kernel does: `0-3,8`. They come in ascending order.
pub fn list(cpus: impl Iterator<Item = u16>) -> String {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(cpu) => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let text = ranges.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") });
    text.collect::<Vec<_>>().join(",")
}

fn read_list(path: &Path) -> Result<BTreeSet<u16>, CpuError> {
    let text = std::fs::read_to_string(path).map_err(|error| CpuError::Read(path.into(), error))?;
    parse_list(text.trim())
        .ok_or_else(|| CpuError::List { path: path.into(), found: text.trim().chars().take(80).collect() })
}

/// Reads `0-3,8`, the kernel's "List format" (Documentation/admin-guide/cputopology.rst).
fn parse_list(text: &str) -> Option<BTreeSet<u16>> {
    let mut cpus = BTreeSet::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<u16>().ok()?..=last.parse().ok()?);
    }
    Some(cpus)
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    pub(crate) fn cpus(allowed: &str, isolated: &str, boot_core: &str) -> Cpus {
        let read = |text| parse_list(text).unwrap();
        Cpus {
            allowed: read(allowed),
            isolated: read(isolated),
            boot_core: read(boot_core),
            online: read(allowed),
            cpuset: None,
            cores: Vec::new(),
            nodes: BTreeMap::new(),
        }
    }

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        for text in ["", "0", "0-3", "0-3,8", "1,3,5-7"] {
            assert_eq!(list(parse_list(text).unwrap().into_iter()), text);
        }
        assert!(parse_list("0-x").is_none() && parse_list("ff").is_none());
    }

    #[test]
    fn auto_takes_an_isolated_cpu_then_one_away_from_cpu_0_then_any() {
        assert_eq!(cpus("0-7", "2-3", "0,4").suggest(&[3]).unwrap().cpu, 2);
        assert_eq!(cpus("0-7", "", "0,7").suggest(&[]).unwrap().cpu, 6);
        assert_eq!(cpus("0-1", "", "0-1").suggest(&[]).unwrap().cpu, 1);
        assert_eq!(cpus("0", "", "0").suggest(&[]).unwrap().cpu, 0);
        // An isolated CPU that a cpuset keeps from us is of no use.
        assert_eq!(cpus("0-1", "6-7", "0").suggest(&[]).unwrap().cpu, 1);
        assert!(cpus("0-1", "", "0").suggest(&[0, 1]).is_err());
        // The other half of an exclusive CPU's core is a last resort.
        let cores = vec![[0, 1].into(), [2, 3].into()];
        assert_eq!(Cpus { cores: cores.clone(), ..cpus("0-3", "", "0-1") }.suggest(&[2]).unwrap().cpu, 1);
        assert_eq!(Cpus { cores, ..cpus("2-3", "", "0") }.suggest(&[2]).unwrap().cpu, 3);
    }

    #[test]
    fn control_threads_are_kept_off_shards_and_if_need_be_only_off_exclusive_ones() {
        let host = cpus("0-3", "", "0");
        assert_eq!(host.beside(&[1], &[3]), [0, 2].into());
        assert_eq!(host.beside(&[0, 1, 2], &[3]), [0, 1, 2].into());
        assert_eq!(host.beside(&[0, 1, 2, 3], &[]), [0, 1, 2, 3].into());
    }

    #[test]
    fn cpus_that_cannot_be_had_are_named() {
        let host = Cpus { online: (0..=5).collect(), ..cpus("0-3", "", "0") };
        let refused = |named: &[u16]| host.require("shards.cpus", named).unwrap_err().to_string();
        let absent = "shards.cpus names CPU 6-7, but there is no CPU 6-7 on this host, which runs CPU 0-5";
        assert!(refused(&[2, 6, 7]).starts_with(absent), "{}", refused(&[2, 6, 7]));
        let barred = "shards.cpus names CPU 4, but CPU 4 is not allowed to this process, which may use only 0-3";
        assert!(refused(&[2, 4]).starts_with(barred), "{}", refused(&[2, 4]));
        assert!(host.require("shards.cpus", &[0, 3]).is_ok());
    }

    #[test]
    fn this_machine_has_a_cpu_for_a_shard() {
        let here = Cpus::of_this_host().unwrap();
        assert!(here.allowed.contains(&here.suggest(&[]).unwrap().cpu));
    }
}
