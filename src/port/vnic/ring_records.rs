//! Where a vNIC's packed rings stand, written down for when this process is gone: [`RingRecords`], the records of [`crate::ring`]
//! and when they are forgotten.
//!
//! They are for one case: this process ends, or the connection does, and the front end lives on with the same memory. So what
//! they say ends with the front end's process: when another one connects, and when the port goes and nobody is there.
//!
//! A front end knows its port by the socket and by nothing else, so the file has the socket's name ([`file_name`]): a port that
//! is renamed, or made anew in any way, finds the places of the VM that comes back to it.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::nic::Nic;
use crate::port::rate_limit::log_limited;
use crate::ring::{Record, Records, RecordsError};
use crate::sys::process_identity::ProcessIdentity;
use crate::sys::socket::Peer;

/// Forgets what is written down in `directory` of ports that are gone and of front ends that have ended since. One that was
/// connected when its port went may come back to another at that socket, so its end is what counts, and nobody tells us of it.
pub fn sweep_records(directory: &Path) {
    Records::sweep(directory);
}

/// The records of one port.
#[derive(Default)]
pub(super) struct RingRecords(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    records: Option<Arc<Records>>,
    /// The front end of now, or else the last one.
    front_end: Option<ProcessIdentity>,
    /// Why there are none, if some were wanted.
    trouble: Option<String>,
}

impl RingRecords {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A front end has connected: what is written down of another is forgotten.
    pub(super) fn connected(&self, peer: Peer) {
        let process = ProcessIdentity::of(peer.pid);
        let mut kept = self.kept();
        kept.front_end = process;
        if let Some(records) = &kept.records {
            records.set_front_end(process);
        }
    }

    /// The record of ring number `index`, a packed one of `size`. Without one the ring runs as well, until we die.
    pub(super) fn record(&self, nic: &Nic, index: usize, size: u16) -> Option<Record> {
        let directory = nic.config.records.as_ref()?;
        let mut kept = self.kept();
        let record = kept.open(nic, directory).and_then(|records| records.record(index, size));
        match record {
            Ok(record) => {
                kept.trouble = None;
                Some(record)
            }
            Err(error) => {
                let why = sentence(&error);
                let name = &nic.config.name;
                log_limited!(nic.log, log::Level::Warn, "{name}: {UNRECORDED}: {why}");
                kept.trouble = Some(why);
                None
            }
        }
    }

    /// Forgets where ring number `index` stood: its front end knows.
    pub(super) fn forget(&self, index: usize) {
        if let Some(records) = &self.kept().records {
            records.forget(index);
        }
    }

    /// Deals with a file that has lost pages: what is in it from now on is not to be believed.
    pub(super) fn attend(&self, nic: &Nic) {
        // Without the lock: covering what is mapped may wait for its turn.
        let Some(records) = self.kept().records.take_if(|records| records.failed()) else { return };
        records.abandon();
        let (name, path) = (&nic.config.name, records.path().display());
        let why = format!("the host has no memory left for {path}, or somebody cut it short");
        log_limited!(nic.log, log::Level::Warn, "{name}: {UNRECORDED}: {why}");
        self.kept().trouble = Some(why);
    }

    /// The port goes and nobody is connected any more. Where rings of a VM stand that has ended, nobody will ask; one that was
    /// there to the end, `connected`, may come back.
    pub(super) fn close(&self, nic: &Nic, connected: bool) {
        let Some(directory) = &nic.config.records else { return };
        let mut kept = self.kept();
        let left = kept.records.is_none() && Records::exist(directory, &file_name(&nic.config.socket));
        if connected || left && kept.open(nic, directory).is_err() {
            return;
        }
        if let Some(records) = &kept.records
            && records.front_end().is_some_and(|process| !process.is_running())
        {
            records.forget_all();
        }
        kept.records = None;
    }

    /// Where they are, or why there are none; `None` if none were needed yet. Waits for nobody: the session opens the file, for
    /// which the kernel may keep it waiting.
    pub(super) fn report(&self) -> Option<String> {
        let kept = match self.0.try_lock() {
            Ok(kept) => kept,
            Err(TryLockError::Poisoned(kept)) => kept.into_inner(),
            Err(TryLockError::WouldBlock) => return Some("not known just now: the port's session is at them".into()),
        };
        let trouble = kept.trouble.as_ref().map(|why| format!("none: {why}"));
        trouble.or_else(|| Some(kept.records.as_ref()?.path().display().to_string()))
    }
}

impl Kept {
    /// The records, opened now if they are not yet.
    fn open(&mut self, nic: &Nic, directory: &Path) -> Result<&Arc<Records>, RecordsError> {
        if self.records.is_none() {
            let attention = Arc::clone(&nic.attention);
            let records = Records::open(directory, &file_name(&nic.config.socket), nic.queues.len(), attention)?;
            records.set_front_end(self.front_end);
            self.records = Some(records);
        }
        self.records.as_ref().ok_or(RecordsError::NoRing(0))
    }
}

/// What the file for a port at `socket` is called: each socket's has a name of its own, of 214 bytes at most, twice what the path
/// of a socket may have (unix(7)).
fn file_name(socket: &Path) -> String {
    let mut name = String::new();
    for character in socket.to_string_lossy().chars() {
        match character {
            '/' => name.push('!'),
            '!' => name.push_str("%1"),
            '%' => name.push_str("%2"),
            other => name.push(other),
        }
    }
    name
}

const UNRECORDED: &str =
    "where packed rings stand is not written down, so they will not survive the end of this process";

/// An error with its causes.
fn sentence(error: &RecordsError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_socket_has_a_file_name_of_its_own() {
        let name = |path: &str| file_name(Path::new(path));
        assert_eq!(name("/run/linecard/vm1-eth0.sock"), "!run!linecard!vm1-eth0.sock");
        let paths = ["/a", "!a", "%1a", "%a", "/%1", "%!", "//a", "/a/"];
        let names: std::collections::BTreeSet<_> = paths.map(name).into();
        assert_eq!(names.len(), paths.len(), "{names:?}");
        assert!(names.iter().all(|name| !name.contains('/')));
    }
}
