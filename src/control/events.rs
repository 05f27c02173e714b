//! What happened, as it happened: [`Events`], a bounded list of numbered records that the API shows and lets others follow.
//!
//! Only the control side records, and it never waits for a reader: a record goes into the list, and whoever follows is
//! woken and reads the list from where it stood. A follower that is too slow misses records and sees that by their
//! numbers. When the list is full, the port with the most records in it loses its oldest one: a port that causes events all
//! the time pushes out its own and not those of others.
//!
//! Each record is a line in the log, too, unless there were too many of its kind and port lately.

mod kinds;
mod links;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::clock::WallTime;
use crate::limits::{EVENT_FOLLOWERS, EVENT_FOLLOWERS_READ_ONLY, EVENT_LOG_LINES, EVENT_REASON_BYTES, EVENTS, PORTS};
pub use kinds::{AddressLimit, Event, EventRecord, Traffic};
pub use links::Tally;
pub(super) use links::{Links, Sight};

/// The time in which so many lines of a kind and port are logged.
const LOG_PERIOD: Duration = Duration::from_secs(60);

/// The records, and those who follow them.
#[derive(Debug)]
pub struct Events {
    list: Mutex<List>,
    latest: watch::Sender<Latest>,
    /// Places for followers, and how many of them those may have who may only look.
    places: Arc<Semaphore>,
    read_only_places: Arc<Semaphore>,
}

/// What followers wait for a change of.
#[derive(Debug, Clone, Copy, Default)]
struct Latest {
    seq: u64,
    closed: bool,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            list: Mutex::default(),
            latest: watch::Sender::default(),
            places: Arc::new(Semaphore::new(EVENT_FOLLOWERS)),
            read_only_places: Arc::new(Semaphore::new(EVENT_FOLLOWERS_READ_ONLY)),
        }
    }
}

impl Events {
    /// Notes that something happened, and logs it. Takes a lock that nobody holds for longer than it takes to copy the list.
    pub fn record(&self, mut event: Event) {
        if let Some(reason) = event.reason_mut() {
            shorten(reason);
        }
        let mut list = self.list();
        let line = list.quota(&event, Instant::now());
        let level = event.level();
        let text = line.map(|left_out| told(&event, left_out));
        list.push(WallTime::now(), event);
        let seq = list.last;
        drop(list);
        self.latest.send_modify(|latest| latest.seq = latest.seq.max(seq));
        if let Some(text) = text {
            log::log!(level, "{text}");
        }
    }

    /// The records after number `since`, oldest first. A number that was not given out yet is one of an earlier daemon:
    /// then all of them.
    pub fn since(&self, since: u64) -> Vec<EventRecord> {
        let list = self.list();
        let since = if since > list.last { 0 } else { since };
        list.records.iter().filter(|record| record.seq > since).cloned().collect()
    }

    /// A place from which the records after number `since` are followed as they come; nothing if all places are taken.
    pub fn follow(self: &Arc<Self>, since: u64, may_write: bool) -> Option<Follower> {
        let own = (!may_write).then(|| self.read_only_places.clone().try_acquire_owned());
        let place = self.places.clone().try_acquire_owned().ok()?;
        let seen = if since > self.list().last { 0 } else { since };
        Some(Follower {
            events: self.clone(),
            seen,
            news: self.latest.subscribe(),
            _places: (place, own.transpose().ok()?),
        })
    }

    /// Lets followers read what there is, and ends them.
    pub fn close(&self) {
        self.latest.send_modify(|latest| latest.closed = true);
    }

    fn list(&self) -> MutexGuard<'_, List> {
        // The list is whole between two of its statements.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who reads records as they come. Its place is free when this is dropped.
#[derive(Debug)]
pub struct Follower {
    events: Arc<Events>,
    seen: u64,
    news: watch::Receiver<Latest>,
    _places: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
}

impl Follower {
    /// The next records, at least one; nothing once there will be no more.
    pub async fn next(&mut self) -> Option<Vec<EventRecord>> {
        loop {
            let closed = self.news.borrow_and_update().closed;
            let records = self.events.since(self.seen);
            if let Some(last) = records.last() {
                self.seen = last.seq;
                return Some(records);
            }
            if closed {
                return None;
            }
            self.news.changed().await.ok()?;
        }
    }
}

/// What the lock guards.
#[derive(Debug, Default)]
struct List {
    records: VecDeque<EventRecord>,
    /// The number given out last.
    last: u64,
    /// How many records each port has; those of no port are together under no name.
    held: BTreeMap<Option<String>, usize>,
    quotas: BTreeMap<(&'static str, Option<String>), Quota>,
}

/// How many lines of a kind and port were logged lately, and how many were not.
#[derive(Debug)]
struct Quota {
    began: Instant,
    lines: u32,
    left_out: u64,
}

impl List {
    fn push(&mut self, time: WallTime, event: Event) {
        if self.records.len() >= EVENTS {
            self.make_room();
        }
        self.last += 1;
        *self.held.entry(event.port().map(String::from)).or_default() += 1;
        self.records.push_back(EventRecord { seq: self.last, time: time.to_string(), event });
    }

    /// Takes out the oldest record of the port that has most.
    fn make_room(&mut self) {
        let most = self.held.iter().max_by_key(|(_, count)| **count).map(|(port, _)| port.clone());
        let oldest = most
            .as_ref()
            .and_then(|port| self.records.iter().position(|record| record.event.port() == port.as_deref()));
        let Some(gone) = self.records.remove(oldest.unwrap_or(0)) else { return };
        let port = gone.event.port().map(String::from);
        if let Some(count) = self.held.get_mut(&port) {
            *count -= 1;
            if *count == 0 {
                self.held.remove(&port);
            }
        }
    }

    /// Whether the event is logged: then how many like it were not, since the last that was.
    fn quota(&mut self, event: &Event, now: Instant) -> Option<u64> {
        let over = |quota: &Quota| now.saturating_duration_since(quota.began) >= LOG_PERIOD;
        // Names of ports come and go. What is over and left nothing out need not be remembered.
        if self.quotas.len() >= 4 * PORTS {
            self.quotas.retain(|_, quota| !over(quota));
            if self.quotas.len() >= 4 * PORTS {
                self.quotas.clear();
            }
        }
        let fresh = || Quota { began: now, lines: 0, left_out: 0 };
        let quota = self.quotas.entry((event.kind(), event.port().map(String::from))).or_insert_with(fresh);
        if over(quota) {
            (quota.began, quota.lines) = (now, 0);
        }
        if quota.lines >= EVENT_LOG_LINES {
            quota.left_out += 1;
            return None;
        }
        quota.lines += 1;
        Some(std::mem::take(&mut quota.left_out))
    }
}

fn told(event: &Event, left_out: u64) -> String {
    match left_out {
        0 => event.to_string(),
        n => format!("{event} ({n} lines like it were left out)"),
    }
}

/// Ends a text at the bound, between two characters.
fn shorten(text: &mut String) {
    if text.len() > EVENT_REASON_BYTES {
        text.truncate(text.floor_char_boundary(EVENT_REASON_BYTES));
        text.push_str("...");
    }
}

#[cfg(test)]
mod tests;
