//! What runs, as whoever looks sees it: [`Shown`], published after each change, and what was noted of conflicts, once a second.
//!
//! Looking takes no lock that a change holds, so a change that hangs, on a port, a shard or the kernel, keeps nobody from seeing
//! that. What changes by itself is read where it lies: counters from the shards, links from the ports, stations from the FDB.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::calls::{Calls, Handle};
use super::conflicts::ConflictsView;
use super::desired::Wish;
use super::diff::Change;
use crate::config::NetworkPlan;
use crate::ident::{Name, NetworkIndex, PortIndex};
use crate::port::{Handover, LinkState, Port};
use crate::shard::{Counters, PortTotals, QueueMove, Readings};
use crate::switch::{Fdb, Storm};

/// The last of each.
pub(super) struct Shown {
    pub(super) ports: ArcSwap<PortsView>,
    pub(super) shards: ArcSwap<ShardsView>,
    pub(super) facts: ArcSwap<Facts>,
    pub(super) conflicts: ArcSwap<ConflictsView>,
    pub(super) calls: Calls,
}

/// Ports and networks.
#[derive(Default)]
pub(super) struct PortsView {
    pub(super) ports: BTreeMap<Name, PortView>,
    pub(super) networks: BTreeMap<Name, NetworkView>,
}

/// One port.
pub(super) struct PortView {
    pub(super) number: PortIndex,
    pub(super) wish: Wish,
    /// The port, or why there is none.
    pub(super) port: Result<Arc<Handle>, String>,
    /// Why it is not served as it should be.
    pub(super) obstacle: Option<String>,
    /// What is to be said about where it is served.
    pub(super) remark: Option<String>,
    /// What ports that were here before have handed over.
    pub(super) handover: Handover,
    pub(super) storm: Arc<Storm>,
}

impl PortView {
    /// What was counted for it: by shards, and by the port itself of what it gives to its far end later.
    pub(super) fn totals(&self, counters: &Counters) -> PortTotals {
        let mut totals = counters.of(self.number);
        let port = self.port.as_ref().ok().and_then(|port| port.port());
        totals.hand_over(self.handover + port.map(|port| port.handover()).unwrap_or_default());
        totals
    }
}

/// One network.
pub(super) struct NetworkView {
    /// Nothing if no number was left.
    pub(super) number: Option<NetworkIndex>,
    pub(super) plan: NetworkPlan,
}

/// Shards, and who is served where.
pub(super) struct ShardsView {
    pub(super) readings: Readings,
    /// What the balancer moved lately, oldest first.
    pub(super) moves: Vec<QueueMove>,
}

/// What is known of the configuration that was applied last.
#[derive(Default)]
pub(super) struct Facts {
    pub(super) generation: u64,
    pub(super) refused: Option<String>,
    pub(super) restart_needed: Vec<Change>,
    /// Why each shard is on its CPU, if the host chose it.
    pub(super) chosen: BTreeMap<u16, String>,
}

impl Shown {
    /// Nothing but the shards.
    ///
    /// # Errors
    /// The kernel refused a thread for calls of ports.
    pub(super) fn new(readings: Readings) -> io::Result<Self> {
        Ok(Self {
            ports: ArcSwap::default(),
            shards: ArcSwap::from_pointee(ShardsView { readings, moves: Vec::new() }),
            facts: ArcSwap::default(),
            conflicts: ArcSwap::default(),
            calls: Calls::start()?,
        })
    }

    /// The FDB that shards use now.
    pub(super) fn fdb(&self) -> Arc<Fdb> {
        Arc::clone(&self.shards.load().readings.tables().switch.fdb)
    }
}

impl PortsView {
    /// What each port that was opened answers to `question`; `None` of those that do not answer.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        calls: &Calls,
        question: impl Fn(&dyn Port) -> T + Send + Sync + 'static,
    ) -> BTreeMap<&Name, Option<T>> {
        let open = || self.ports.iter().filter_map(|(name, port)| Some((name, port.port.as_ref().ok()?)));
        let answers = calls.ask(open().map(|(_, handle)| Arc::clone(handle)).collect(), move |_, port| question(port));
        open().map(|(name, _)| name).zip(answers).collect()
    }

    /// Names of the ports whose ground is gone. One that is stopped for what its far end did is not among them: that still has its
    /// connection, and other rings that run.
    pub(super) fn gone(&self, calls: &Calls) -> Vec<Name> {
        let links = self.ask(calls, |port| port.link());
        let gone = links.into_iter().filter(|(_, link)| matches!(link, Some(LinkState::Gone(_))));
        gone.map(|(name, _)| name.clone()).collect()
    }
}
