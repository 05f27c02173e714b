//! Times that shards were held up in a peer's memory: [`Stalls`], which the watchdog writes and the control side reads once a
//! second.
//!
//! One is told as soon as it is seen, and if it goes on, once more when it is over. No shard comes here.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::arrears::Sum;
use crate::ident::PortIndex;

/// Those that are kept until they are read: more than there can be in a second, as a port that does it twice is barred.
const KEPT: usize = 256;

/// A time that a shard was held up, or many short ones of a port together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// The shard's CPU, of many times the last.
    pub cpu: u16,
    /// The port whose far end shares the memory.
    pub port: PortIndex,
    /// The port whose frames were being written there, if it may be the one instead.
    pub sender: Option<PortIndex>,
    /// For how long, so far.
    pub held: Duration,
    /// In so many times: one, unless they were short.
    pub times: u32,
    /// It is no longer.
    pub over: bool,
}

/// Those that were not read yet, and those that go on.
#[derive(Default)]
pub(super) struct Stalls(Mutex<List>);

#[derive(Default)]
struct List {
    next: u64,
    entries: Vec<Entry>,
}

struct Entry {
    number: u64,
    stall: Stall,
    told: bool,
}

/// One that goes on for as long as this is there.
pub(super) struct Ongoing {
    stalls: Arc<Stalls>,
    number: u64,
}

impl Stalls {
    fn list(&self) -> MutexGuard<'_, List> {
        // Each entry is whole between two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that one has begun.
    pub fn begin(
        self: &Arc<Self>,
        cpu: u16,
        (port, sender): (PortIndex, Option<PortIndex>),
        held: Duration,
    ) -> Ongoing {
        let number = self.enter(Stall { cpu, port, sender, held, times: 1, over: false });
        Ongoing { stalls: Arc::clone(self), number }
    }

    /// Notes what many short ones came to.
    pub fn note(&self, cpu: u16, (port, sender): (PortIndex, Option<PortIndex>), Sum { held, times }: Sum) {
        self.enter(Stall { cpu, port, sender, held, times, over: true });
    }

    /// Returns its number.
    fn enter(&self, stall: Stall) -> u64 {
        let mut list = self.list();
        if list.entries.len() >= KEPT {
            let oldest = list.entries.iter().position(|entry| entry.stall.over).unwrap_or(0);
            list.entries.remove(oldest);
        }
        list.next += 1;
        let number = list.next;
        list.entries.push(Entry { number, stall, told: false });
        number
    }

    /// Forgets those that have to do with `port`, whose number is to be another's.
    pub fn forget(&self, port: PortIndex) {
        self.list().entries.retain(|Entry { stall, .. }| stall.port != port && stall.sender != Some(port));
    }

    /// Those that were not read before or that are over since.
    pub fn take(&self) -> Vec<Stall> {
        let mut list = self.list();
        let news =
            list.entries.iter().filter(|entry| !entry.told || entry.stall.over).map(|entry| entry.stall).collect();
        list.entries.retain(|entry| !entry.stall.over);
        list.entries.iter_mut().for_each(|entry| entry.told = true);
        news
    }
}

impl Ongoing {
    fn change(&self, change: impl FnOnce(&mut Stall)) {
        let mut list = self.stalls.list();
        if let Some(entry) = list.entries.iter_mut().find(|entry| entry.number == self.number) {
            change(&mut entry.stall);
        }
    }

    /// It is for so long by now.
    pub fn lasts(&self, held: Duration) {
        self.change(|stall| stall.held = held);
    }
}

impl Drop for Ongoing {
    fn drop(&mut self) {
        self.change(|stall| stall.over = true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_told_when_it_is_seen_and_when_it_is_over() {
        let stalls = Arc::<Stalls>::default();
        let whose = (PortIndex(7), Some(PortIndex(9)));
        let (port, sender) = whose;
        let at = |millis, over| Stall { cpu: 3, port, sender, held: Duration::from_millis(millis), times: 1, over };
        let long = stalls.begin(3, whose, Duration::from_millis(20));
        assert_eq!(stalls.take(), [at(20, false)]);
        long.lasts(Duration::from_millis(900));
        assert_eq!(stalls.take(), [], "it goes on, and was told");
        drop(long);
        drop(stalls.begin(3, whose, Duration::from_millis(25)));
        assert_eq!(stalls.take(), [at(900, true), at(25, true)]);
        let short = Sum { held: Duration::from_millis(230), times: 30 };
        stalls.note(3, whose, short);
        assert_eq!(stalls.take(), [Stall { times: 30, ..at(230, true) }], "once");
        assert_eq!(stalls.take(), []);
    }

    #[test]
    fn what_has_to_do_with_a_port_that_is_gone_is_not_told_of_its_successor() {
        let stalls = Arc::<Stalls>::default();
        let (gone, other) = (PortIndex(7), PortIndex(9));
        let goes_on = stalls.begin(3, (gone, None), Duration::from_millis(20));
        for whose in [(gone, Some(other)), (other, Some(gone)), (other, None)] {
            drop(stalls.begin(3, whose, Duration::from_millis(20)));
        }
        stalls.forget(gone);
        goes_on.lasts(Duration::from_millis(900));
        drop(goes_on);
        assert_eq!(stalls.take().iter().map(|stall| (stall.port, stall.sender)).collect::<Vec<_>>(), [(other, None)]);
    }

    #[test]
    fn no_more_are_kept_than_there_is_room_for() {
        let stalls = Arc::<Stalls>::default();
        for at in 0..2 * KEPT as u64 {
            drop(stalls.begin(0, (PortIndex(1), None), Duration::from_millis(at)));
        }
        let kept = stalls.take();
        assert_eq!((kept.len(), kept[0].held.as_millis()), (KEPT, KEPT as u128), "the oldest go");
    }
}
