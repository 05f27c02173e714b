//! What has to be done every second without anybody asking: FDB entries age, a crowded FDB grows, queues move to where they are
//! served better, storms, stations that are not learned, shards that were held up and ports that were barred are told of, what ports that are gone have left is
//! removed, and the shards' clocks are noted, so that a share of time can be told of the last seconds and not of the daemon's
//! whole life.

use std::collections::VecDeque;

use super::{Controller, kinds};
use crate::shard::ShardReport;

/// How many samples, one per second, are kept: what "the last seconds" means.
const SAMPLES: usize = 10;

/// After how many seconds the records of ports that are gone are looked through again.
const SWEEP: u64 = 10;

/// What each shard had counted at the last few seconds, and how many samples there were in all.
#[derive(Default)]
pub(super) struct Samples(VecDeque<Vec<ShardReport>>, u64);

impl Samples {
    /// The oldest sample of the shard on `cpu`; nothing if it has been there for a shorter time than the last samples.
    pub(super) fn oldest(&self, cpu: u16) -> Option<&ShardReport> {
        self.0.iter().find_map(|sample| sample.iter().find(|shard| shard.cpu == cpu))
    }

    /// Returns the number of the sample.
    fn note(&mut self, reports: Vec<ShardReport>) -> u64 {
        if self.0.len() >= SAMPLES {
            self.0.pop_front();
        }
        self.0.push_back(reports);
        self.1 += 1;
        self.1
    }
}

impl Controller {
    /// To be called once a second, by a thread that may wait: that is also the balancer's interval.
    pub fn upkeep(&self) {
        let tables = self.shown.shards.load().readings.tables();
        self.note_stalls();
        let down = self.note_links();
        let swept = tables.switch.sweep(self.clock.now().tick(), |port| down.contains(&port));
        if swept.aged > 0 {
            log::debug!("FDB: {} stations were silent for too long", swept.aged);
        }
        if swept.surplus > 0 {
            log::debug!("FDB: {} stations moved to ports that have no room for them", swept.surplus);
        }
        let reports = self.shown.shards.load().readings.report();
        let number = self.samples().note(reports);
        if let Some(run) = self.started.daemon.api.parent().filter(|_| number % SWEEP == 1) {
            kinds::sweep(run);
        }
        self.note_conflicts();
        // The rest can wait for a change that is going on.
        let Some(state) = self.try_lock() else { return };
        let to_locate = state.runtime.to_locate(&self.nodes, self.clock.now());
        drop(state);
        let (names, handles): (Vec<_>, Vec<_>) = to_locate.into_iter().unzip();
        let found = self.shown.calls.ask(handles, |_, port| port.memory_nodes());
        let mut found = names.into_iter().zip(found).filter_map(|(name, found)| Some((name, found?))).collect();
        let Some(mut state) = self.try_lock() else { return };
        let runtime = &mut state.runtime;
        runtime.free_numbers();
        runtime.grow_fdb();
        let news = runtime.settle(&self.nodes, self.clock.now(), &mut found);
        runtime.balance(self.clock.now());
        runtime.watch_storms(&self.events);
        runtime.watch_refusals(self.clock.now(), &self.events);
        if news { runtime.show() } else { runtime.show_shards() }
    }
}
