//! Jobs that take too long, while the relay runs: [`Process::expire`].

use std::time::{Duration, Instant};

use super::super::super::attendance::TURN;
use super::super::job::Job;
use super::{Process, RETRY};

/// How long a descriptor may take to be looked at or let go of, while this process runs. Then its connection is ended, and the daemon
/// hears of it.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

impl Process {
    /// How long until the oldest job may have taken too long, or until what waits for a thread, for the daemon to hear of it, or for
    /// its port to have time again, is tried again.
    pub(super) fn patience(&self) -> Option<Duration> {
        let waiting = self.waiting.iter().map(|(_, job, _)| job).filter(|job| job.work.link().is_some());
        let oldest = self.jobs.values().chain(waiting).filter(|job| job.may_be_late()).map(|job| job.since).min();
        let left = oldest.map(|since| (since + PATIENCE).saturating_sub(self.attendance.total()).min(TURN));
        let now = Instant::now();
        let due = self.refused.map(|refused| refused + RETRY).into_iter().chain(self.paced.values().copied().min());
        let due = due.chain(self.untold.then_some(now + RETRY)).min().map(|due| due.saturating_duration_since(now));
        left.into_iter().chain(due).min()
    }

    /// Ends connections whose descriptors take too long, and tells the daemon.
    pub(super) fn expire(&mut self) {
        let mut ended = Vec::new();
        let mut told = Vec::new();
        let waiting = self.waiting.iter_mut().map(|(_, job, _)| (false, job));
        let now = self.attendance.total();
        let late = |job: &Job| job.may_be_late() && now >= job.since + PATIENCE;
        for (running, job) in self.jobs.values_mut().map(|job| (true, job)).chain(waiting).filter(|(_, job)| late(job))
        {
            job.held = true;
            ended.extend(job.work.link());
            told.extend(running.then_some(job.port));
        }
        // First, so that the session's end can be explained.
        told.into_iter().for_each(|port| self.tell_held(port));
        ended.into_iter().for_each(|link| self.end(link));
    }
}
