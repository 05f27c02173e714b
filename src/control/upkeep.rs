//! What has to be done every second without anybody asking: FDB entries age, a crowded FDB grows, queues move to where they are
//! served better, storms are told of, and the shards' clocks are noted, so that a share of time can be told of the last seconds and not of the
//! daemon's whole life.

use std::collections::VecDeque;

use super::Controller;
use crate::shard::ShardReport;

/// How many samples, one per second, are kept: what "the last seconds" means.
const SAMPLES: usize = 10;

/// What each shard had counted at the last few seconds.
#[derive(Default)]
pub(super) struct Samples(VecDeque<Vec<ShardReport>>);

impl Samples {
    /// The oldest sample of the shard on `cpu`; nothing if it has been there for a shorter time than the last samples.
    pub(super) fn oldest(&self, cpu: u16) -> Option<&ShardReport> {
        self.0.iter().find_map(|sample| sample.iter().find(|shard| shard.cpu == cpu))
    }

    fn note(&mut self, reports: Vec<ShardReport>) {
        if self.0.len() >= SAMPLES {
            self.0.pop_front();
        }
        self.0.push_back(reports);
    }
}

impl Controller {
    /// To be called once a second: that is also the balancer's interval.
    pub fn upkeep(&self) {
        let mut state = self.lock();
        let swept = state.runtime.shards.tables().switch.sweep(self.clock.now().tick());
        if swept.aged > 0 {
            log::debug!("FDB: {} stations were silent for too long", swept.aged);
        }
        state.runtime.grow_fdb();
        let reports = state.runtime.shards.report();
        state.samples.note(reports);
        state.runtime.settle(&self.nodes, self.clock.now());
        state.runtime.balance(self.clock.now());
        state.note_links(&self.events);
        state.runtime.watch_storms(&self.events);
    }
}
