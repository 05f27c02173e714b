//! What goes on which CPU and why, from a configuration and this machine: [`CpuPlan`], what `linecard cpu plan` prints and
//! what the daemon starts by.
//!
//! Pure but for [`Cpus`], which is read once. Ports are placed by the same function that places them in the daemon
//! ([`shard::preview`]), in the same order; where they are after a while is the balancer's concern.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::cpu::{CpuError, Cpus, list};
use crate::config::{CpuChoice, Plan, ShardsPlan};
use crate::ident::LatencySensitivity;
use crate::shard;

/// What a CPU is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// A shard that ports share.
    Shared,
    /// A shard for ports of latency sensitivity `high`.
    Exclusive,
    /// Everything else: guests, the host, our control threads.
    Others,
    /// This process may not use it.
    Barred,
}

/// One CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuUse {
    /// Its number.
    pub cpu: u16,
    /// Its NUMA node.
    pub node: u16,
    /// Other hyper-threads of its core.
    pub siblings: String,
    /// What it is for.
    pub role: Role,
    /// Why.
    pub why: String,
    /// The ports of the file that it serves, with the number of queues.
    pub ports: BTreeMap<String, usize>,
}

/// All CPUs, and what there is to say about them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CpuPlan {
    /// The CPUs, ascending.
    pub cpus: Vec<CpuUse>,
    /// What could be better, and ports that get no CPU; each a sentence.
    pub remarks: Vec<String>,
}

/// The CPUs for shards, and why each of those that nobody chose.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Choice {
    /// CPUs of the shards that ports share.
    pub shared: Vec<u16>,
    /// CPUs of those for `high` ports.
    pub exclusive: Vec<u16>,
    /// Why, by CPU, as the rest of a sentence that begins with "CPU 3 is".
    pub reasons: BTreeMap<u16, String>,
}

impl Choice {
    /// Picks the CPUs that `plan` asks for.
    ///
    /// # Errors
    /// It names some that this process may not use, or leaves none.
    pub fn of(plan: &ShardsPlan, host: &Cpus) -> Result<Self, CpuError> {
        host.require("shards.exclusive", &plan.exclusive)?;
        let exclusive = plan.exclusive.clone();
        match &plan.cpus {
            CpuChoice::List(cpus) => {
                host.require("shards.cpus", cpus)?;
                Ok(Self { shared: cpus.clone(), exclusive, reasons: BTreeMap::new() })
            }
            CpuChoice::Auto => {
                let found = host.suggest(&plan.exclusive)?;
                Ok(Self { shared: vec![found.cpu], exclusive, reasons: [(found.cpu, found.reason.into())].into() })
            }
        }
    }
}

impl CpuPlan {
    /// What `plan` means on `host`.
    ///
    /// # Errors
    /// As [`Choice::of`].
    pub fn of(plan: &Plan, host: &Cpus) -> Result<Self, CpuError> {
        let choice = Choice::of(&plan.shards, host)?;
        let mut cpus: BTreeMap<u16, CpuUse> =
            host.online.iter().map(|&cpu| (cpu, cpu_use(cpu, &choice, host))).collect();
        let mut remarks = host.restrictions();
        remarks.extend(choice.exclusive.iter().flat_map(|&cpu| remarks_on(cpu, &choice, host)));
        let wishes: Vec<_> = plan.ports.values().map(|port| (port.queue_count(), port.service())).collect();
        let placed = shard::preview(&choice.shared, &choice.exclusive, &wishes);
        for (name, placed) in plan.ports.keys().zip(placed) {
            match placed {
                Ok(on) => {
                    for cpu in on {
                        if let Some(place) = cpus.get_mut(&cpu) {
                            *place.ports.entry(name.to_string()).or_default() += 1;
                        }
                    }
                }
                Err(error) => remarks.push(format!("port {name} cannot be served: {error}")),
            }
        }
        let high = plan.ports.values().any(|port| port.latency == LatencySensitivity::High);
        if high && plan.shards.realtime.is_none() && choice.exclusive.iter().any(|cpu| !host.isolated.contains(cpu)) {
            remarks.push("shards.realtime would keep other threads from interrupting exclusive shards".into());
        }
        if plan.ports.values().any(|port| port.latency == LatencySensitivity::Medium) {
            remarks.extend(remark_on_nodes(&choice, host));
        }
        Ok(Self { cpus: cpus.into_values().collect(), remarks })
    }
}

fn cpu_use(cpu: u16, choice: &Choice, host: &Cpus) -> CpuUse {
    let (role, why) = if choice.shared.contains(&cpu) {
        let named = || "named in shards.cpus".into();
        (Role::Shared, choice.reasons.get(&cpu).map_or_else(named, |why| format!("shards.cpus is auto: {why}")))
    } else if choice.exclusive.contains(&cpu) {
        (Role::Exclusive, "named in shards.exclusive".into())
    } else if host.allowed.contains(&cpu) {
        (Role::Others, if host.isolated.contains(&cpu) { "isolated by the kernel, not used" } else { "" }.into())
    } else {
        (Role::Barred, "not among those that this process may use".into())
    };
    let siblings = host.siblings(cpu).filter(|&sibling| sibling != cpu);
    CpuUse { cpu, node: host.node(cpu), siblings: list(siblings), role, why, ports: BTreeMap::new() }
}

/// The NUMA nodes without a shared shard, where `medium` ports cannot be near their memory.
fn remark_on_nodes(choice: &Choice, host: &Cpus) -> Option<String> {
    let served: BTreeSet<u16> = choice.shared.iter().map(|&cpu| host.node(cpu)).collect();
    let all: BTreeSet<u16> = host.allowed.iter().map(|&cpu| host.node(cpu)).collect();
    let without = list(all.difference(&served).copied());
    (!without.is_empty()).then(|| {
        format!(
            "shards.cpus has no CPU of NUMA node {without}: `medium` ports of VMs with their memory there are served from afar"
        )
    })
}

/// What disturbs an exclusive CPU.
fn remarks_on(cpu: u16, choice: &Choice, host: &Cpus) -> Vec<String> {
    let mut remarks = Vec::new();
    if !host.isolated.contains(&cpu) {
        remarks.push(format!(
            "CPU {cpu} is exclusive, but the kernel runs other threads there too: isolate it (isolcpus={cpu}, or an isolated cpuset)"
        ));
    }
    let siblings: BTreeSet<u16> = host.siblings(cpu).filter(|&sibling| sibling != cpu).collect();
    if !siblings.is_empty() {
        let used: Vec<u16> = siblings.iter().copied().filter(|cpu| choice.shared.contains(cpu)).collect();
        let whose = if used.is_empty() { "keep it idle" } else { "give the shared shard another CPU" };
        let siblings = list(siblings.into_iter());
        remarks
            .push(format!("CPU {cpu} is exclusive and shares its core with CPU {siblings}, which slows it: {whose}"));
    }
    let shared = choice.shared.iter().find(|&&shared| host.node(shared) != host.node(cpu));
    if let Some(shared) = shared {
        remarks.push(format!(
            "CPU {cpu} and CPU {shared} are on different NUMA nodes: frames between their ports are slower"
        ));
    }
    remarks
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::host::cpu::tests::cpus;

    fn plan(shards: &str, ports: &str) -> Plan {
        let text = format!("version: 1\nshards: {{ {shards} }}\nnetworks: {{ lan: }}\nports:\n{ports}");
        crate::config::check("test.yaml", &text).unwrap()
    }

    fn port(name: &str, more: &str) -> String {
        format!("  {name}: {{ vhost-user: {{ socket: /{name}, queues: 2 }}, network: lan{more} }}\n")
    }

    #[test]
    fn ports_and_cpus_are_explained() {
        let mut host = cpus("0-5", "4", "0,1");
        host.cores = vec![[0, 1].into(), [2, 3].into(), [4, 5].into()];
        host.online = (0..8).collect();
        host.nodes.insert(4, 1);
        let ports =
            port("a", "") + &port("b", ", latency-sensitivity: high") + &port("c", ", latency-sensitivity: high");
        let plan = CpuPlan::of(&plan("cpus: auto, exclusive: 4", &ports), &host).unwrap();
        let roles: Vec<Role> = plan.cpus.iter().map(|cpu| cpu.role).collect();
        use Role::{Barred, Exclusive, Others, Shared};
        assert_eq!(roles, [Others, Others, Others, Shared, Exclusive, Others, Barred, Barred]);
        assert_eq!(plan.cpus[3].ports, [("a".to_string(), 2)].into());
        assert_eq!(plan.cpus[4].ports, [("b".to_string(), 2)].into());
        assert_eq!((plan.cpus[4].siblings.as_str(), plan.cpus[4].node), ("5", 1));
        let all = plan.remarks.join("\n");
        assert!(all.contains("shares its core with CPU 5") && all.contains("different NUMA nodes"), "{all}");
        assert!(all.contains("port c cannot be served") && all.contains("CPU 6-7"), "{all}");
        assert!(!all.contains("isolcpus"), "CPU 4 is isolated: {all}");
    }

    #[test]
    fn nodes_that_medium_ports_cannot_be_served_on_are_told() {
        let mut host = cpus("0-3", "", "0");
        let remarks = |host: &Cpus, latency: &str| {
            let ports = port("a", &format!(", latency-sensitivity: {latency}"));
            CpuPlan::of(&plan("cpus: auto", &ports), host).unwrap().remarks.join("\n")
        };
        assert_eq!(remarks(&host, "medium"), "", "there is one node");
        host.nodes.extend([(2, 1), (3, 1)]);
        assert!(remarks(&host, "medium").contains("no CPU of NUMA node 0:"), "{}", remarks(&host, "medium"));
        assert_eq!(remarks(&host, "normal"), "");
    }

    #[test]
    fn what_cannot_be_had_is_an_error() {
        let refused =
            |shards| CpuPlan::of(&plan(shards, &port("a", "")), &cpus("0-1", "", "0")).unwrap_err().to_string();
        assert!(refused("cpus: \"7\"").contains("there is no CPU 7 on this host"));
        assert!(refused("exclusive: \"0-1\"").contains("takes every CPU"));
    }
}
