//! What the relay's process tells the daemon of its ports, each as often as it changes and until the daemon had room for it.

use std::collections::BTreeSet;

use rustix::net::SendFlags;

use super::super::News;
use super::Process;

impl Process {
    /// Tells the daemon how many descriptors of a port are held up.
    pub(super) fn tell_held(&mut self, port: u64) {
        let held = self.jobs.values().filter(|job| job.port == port && job.held).count();
        if !self.tell(port, News::Held(u32::try_from(held).unwrap_or(u32::MAX))) {
            self.held_untold.insert(port);
        }
    }

    /// The same of ports of which it could not be told. `false` if some of it has to be told again.
    pub(super) fn tell_held_again(&mut self) -> bool {
        std::mem::take(&mut self.held_untold).into_iter().for_each(|port| self.tell_held(port));
        self.held_untold.is_empty()
    }

    /// Tells the daemon which ports are full, where that is news. `false` if some of it has to be told again.
    pub(super) fn tell_full(&mut self) -> bool {
        let untold = self.ledger.news().into_iter().filter(|(port, is_full)| !self.tell(*port, News::Full(*is_full)));
        let untold: Vec<_> = untold.collect();
        untold.iter().for_each(|(port, _)| self.ledger.toggle(*port));
        untold.is_empty()
    }

    /// The same of ports that have something for which the kernel has no thread.
    pub(super) fn tell_refused(&mut self) -> bool {
        let refused = self.waiting.iter().filter(|(_, job, _)| self.refused.is_some() && job.refused);
        let now: BTreeSet<u64> = refused.map(|(_, job, _)| job.port).collect();
        let news: Vec<u64> = self.without_thread.symmetric_difference(&now).copied().collect();
        let mut all = true;
        for port in news {
            let is_refused = now.contains(&port);
            match self.tell(port, News::NoThreads(is_refused)) {
                true if is_refused => drop(self.without_thread.insert(port)),
                true => drop(self.without_thread.remove(&port)),
                false => all = false,
            }
        }
        all
    }

    /// Tells the daemon something of a port. `false` if it does not listen: it has ended, or is about to.
    pub(super) fn tell(&self, port: u64, news: News) -> bool {
        rustix::net::send(&self.control, &news.bytes(port), SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok()
    }
}
