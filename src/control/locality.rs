//! Which NUMA node each guest's memory is on, and whether its port is served there ([`Runtime::settle`]).
//!
//! Shards place by it ([`crate::shard`]); what is here decides when to look, and says so where a port that should be served near
//! its memory is not. A guest's memory says where it is only once its driver runs and shards have touched some of it, so every
//! running port is looked at once a second until it does. It can move later (numactl, the kernel's balancing, a VM that comes back
//! elsewhere), so it is looked at again, but rarely: [`AGAIN`].
//!
//! On a host whose CPUs are all on one node nothing of this is done.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::calls::Handle;
use super::running::{Running, Runtime};
use crate::clock::Instant;
use crate::host::cpu;
use crate::ident::{LatencySensitivity, Name};
use crate::mem::NodePages;

/// How long what was seen of a guest's memory is taken to be true.
const AGAIN: Duration = Duration::from_secs(30);

/// What a look at a port's memory found: nothing while there is no guest.
pub(super) type Found = Option<NodePages>;

/// What is known of a port's guest memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Locality {
    /// The node that it is on; nothing if it is spread, or not known yet.
    pub(super) node: Option<u16>,
    /// When that was seen, of the guest that is there.
    seen: Option<Instant>,
    /// What is to be said about where the port is served.
    pub(super) remark: Option<String>,
}

impl Locality {
    /// Whether it is time to look at the memory again.
    fn is_due(&self, now: Instant) -> bool {
        self.seen.is_none_or(|seen| now.since(seen) >= AGAIN)
    }

    /// Looks at the memory again if it is time to: `look` finds where it is, or nothing while there is no guest. `nodes` are
    /// those that have CPUs; memory on another is near to none of them.
    fn look(&mut self, nodes: &BTreeSet<u16>, now: Instant, look: impl FnOnce() -> Option<NodePages>) {
        if !self.is_due(now) {
            return;
        }
        // A guest that went mostly comes back to the same memory, so what was known is kept until the next one is seen.
        self.seen = None;
        if let Some(pages) = look().filter(|pages| !pages.is_empty()) {
            self.node = pages.node().filter(|node| nodes.contains(node));
            self.seen = Some(now);
        }
    }
}

impl Runtime {
    /// The ports whose memory is to be looked at now; none on a host that has one node.
    pub(super) fn to_locate(&self, nodes: &BTreeSet<u16>, now: Instant) -> Vec<(Name, Arc<Handle>)> {
        let due = |running: &Running| nodes.len() > 1 && running.served.is_some() && running.locality.is_due(now);
        let due = self.ports.iter().filter(|(_, running)| due(running));
        due.filter_map(|(name, running)| Some((name.clone(), Arc::clone(running.port.as_ref().ok()?)))).collect()
    }

    /// Has ports served on the node of their guest's memory, where their level asks for it and a shard of it has room. `nodes`
    /// are the NUMA nodes that have CPUs; `found` says where the memory is of those that were looked at. Returns whether there is
    /// something else to be said of a port than before.
    pub(super) fn settle(&mut self, nodes: &BTreeSet<u16>, now: Instant, found: &mut BTreeMap<Name, Found>) -> bool {
        if nodes.len() < 2 {
            return false;
        }
        let mut news = false;
        for (name, running) in &mut self.ports {
            let (Ok(_), Some(service)) = (&running.port, &running.served) else { continue };
            let locality = &mut running.locality;
            if let Some(found) = found.remove(name) {
                locality.look(nodes, now, || found);
            }
            if self.shards.settle(running.number, locality.node) {
                let cpus: BTreeSet<u16> = self.shards.cpus_of(running.number).into_iter().collect();
                let node = locality.node.unwrap_or_default();
                log::info!(
                    "port {name}: moved to CPU {}: its memory is on NUMA node {node}",
                    cpu::list(cpus.into_iter())
                );
            }
            let remark = remark(service.latency, locality.node, &self.shards.nodes_of(running.number));
            if let Some(said) = remark.as_ref().filter(|_| remark != locality.remark) {
                log::warn!("port {name}: {said}");
            }
            news |= remark != locality.remark;
            locality.remark = remark;
        }
        news
    }
}

/// What is to be said of a port at `latency` whose memory is on `node`, and which is served on the nodes `served`.
fn remark(latency: LatencySensitivity, node: Option<u16>, served: &BTreeSet<u16>) -> Option<String> {
    let home = node.filter(|_| latency >= LatencySensitivity::Medium)?;
    let away: Vec<u16> = served.iter().copied().filter(|node| *node != home).collect();
    let key = if latency == LatencySensitivity::High { "shards.exclusive" } else { "shards.cpus" };
    (!away.is_empty()).then(|| {
        let away = cpu::list(away.into_iter());
        format!(
            "its memory is on NUMA node {home} and it is served on node {away}, so its frames cross between nodes: name a free CPU \
             of node {home} in {key} (`linecard cpu plan` lists them), or start the VM on node {away}"
        )
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TWO: [u16; 2] = [0, 1];

    fn pages(nodes: &[u16]) -> Option<NodePages> {
        Some(nodes.iter().copied().collect())
    }

    #[test]
    fn memory_is_looked_at_until_it_is_seen_and_then_now_and_then() {
        let at = |seconds: u64| Instant::default().after(Duration::from_secs(seconds));
        let (mut locality, nodes) = (Locality::default(), TWO.into());
        let mut look = |second, pages: Option<NodePages>| {
            let mut looked = false;
            locality.look(&nodes, at(second), || {
                looked = true;
                pages
            });
            (looked, locality.node)
        };
        assert_eq!(look(1, None), (true, None), "no guest");
        assert_eq!(look(2, pages(&[])), (true, None), "it has not begun");
        assert_eq!(look(3, pages(&[1])), (true, Some(1)));
        assert_eq!(look(32, pages(&[0])), (false, Some(1)));
        assert_eq!(look(33, None), (true, Some(1)), "the guest is gone");
        assert_eq!(look(34, pages(&[0])), (true, Some(0)), "another is there");
        assert_eq!(look(64, pages(&[0, 1])), (true, None), "it is spread");
        assert_eq!(look(94, pages(&[1])), (true, Some(1)));
        assert_eq!(look(124, pages(&[2])), (true, None), "a node without CPUs is near to none");
    }

    #[test]
    fn only_ports_that_should_be_near_their_memory_and_are_not_are_told_of() {
        use LatencySensitivity::{High, Low, Medium, Normal};
        let told = |latency, node, served: &[u16]| remark(latency, node, &served.iter().copied().collect());
        let medium = told(Medium, Some(1), &[0]).unwrap();
        assert!(medium.contains("memory is on NUMA node 1 and it is served on node 0"), "{medium}");
        assert!(medium.contains("CPU of node 1 in shards.cpus"), "{medium}");
        assert!(told(High, Some(0), &[0, 1]).unwrap().contains("shards.exclusive"));
        assert_eq!(
            [told(Medium, Some(1), &[1]), told(High, None, &[0, 1]), told(Medium, Some(1), &[])],
            [None, None, None]
        );
        assert_eq!([told(Normal, Some(1), &[0]), told(Low, Some(1), &[0])], [None, None]);
    }
}
