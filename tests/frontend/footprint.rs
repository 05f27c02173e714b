//! What a daemon's process holds, and what of it front ends that have left must not have left behind.
//!
//! Three kinds of things come and go that are nobody's leak, and so two footprints are never held to be equal: descriptors
//! of API calls that are being answered; threads for requests that wait five seconds for another one; and what the daemon
//! opens or starts on its first use, once, and keeps. [`Footprint::beyond`] allows for these by kind and by name, and for
//! nothing else: what a front end gave (its memory, its connection's thread) has to be gone to the last one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Pid;

/// What a process holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Descriptors by what they refer to: a path, or a kind such as `socket`.
    pub fds: BTreeMap<String, usize>,
    /// Threads by name; those of connections, `vhost-PORT`, under one.
    pub threads: BTreeMap<String, usize>,
    pub mappings: usize,
    /// Resident pages.
    pub resident: usize,
}

/// The name that threads of connections are counted under.
pub const CONNECTIONS: &str = "vhost-PORT";
/// The acceptor, which is named like them.
const ACCEPTOR: &str = "vhost-accept";
/// Threads of the API: how many there are depends on how many calls came at once, and each is kept while calls come.
const API: &str = "requests";
const API_AT_ONCE: usize = 8;
/// Threads for calls of ports: one or two, as calls come one after the other or at once.
const CALLS: &str = "port-calls";
/// Sockets, eventfds and the like that the daemon may take for itself on a first use.
const OWN: usize = 2;

impl Footprint {
    pub fn of(pid: Pid) -> Self {
        let proc = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
        let text = |name: &str| fs::read_to_string(proc.join(name)).expect("procfs");
        let resident = text("statm").split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("statm");
        Self {
            // A descriptor or thread may go between being listed and being asked for what it is.
            fds: count(&proc.join("fd"), |entry| fs::read_link(entry).ok().map(|link| kind(&link.to_string_lossy()))),
            threads: count(&proc.join("task"), |entry| {
                fs::read_to_string(entry.join("comm")).ok().map(|name| role(&name))
            }),
            mappings: text("maps").lines().count(),
            resident,
        }
    }

    /// What there is more of than there was, and than the daemon may have taken for itself since: a line for each.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        let fds = more(&self.fds, &before.fds, most_fds);
        fds.chain(more(&self.threads, &before.threads, most_threads)).collect()
    }

    /// Whether there are as many descriptors and threads as in `other`, but for those of the API.
    pub fn is_steady(&self, other: &Self) -> bool {
        let own = |threads: &BTreeMap<String, usize>| {
            threads
                .iter()
                .filter(|(name, _)| *name != API)
                .map(|(name, count)| (name.clone(), *count))
                .collect::<Vec<_>>()
        };
        self.fds == other.fds && own(&self.threads) == own(&other.threads)
    }
}

fn most_fds(kind: &str, before: usize) -> usize {
    match kind {
        "socket" | "pipe" => before + OWN,
        kind if kind.starts_with("anon_inode:") => before + OWN,
        kind if kind.starts_with("/memfd:") || kind.ends_with(" (deleted)") => before,
        // A file of the daemon's own.
        _ => before.max(1),
    }
}

fn most_threads(name: &str, before: usize) -> usize {
    match name {
        CONNECTIONS => before,
        API => before + API_AT_ONCE,
        CALLS => before.max(2),
        _ => before.max(1),
    }
}

fn more<'a>(
    now: &'a BTreeMap<String, usize>,
    before: &'a BTreeMap<String, usize>,
    most: fn(&str, usize) -> usize,
) -> impl Iterator<Item = String> + 'a {
    now.iter().filter_map(move |(name, &now)| {
        let before = before.get(name).copied().unwrap_or(0);
        (now > most(name, before)).then(|| format!("{now} of {name}, {before} before"))
    })
}

fn count(directory: &Path, name: impl Fn(&Path) -> Option<String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for entry in fs::read_dir(directory).expect("procfs").flatten() {
        if let Some(name) = name(&entry.path()) {
            *counts.entry(name).or_insert(0) += 1;
        }
    }
    counts
}

/// `socket:[4711]` without its number; everything else as it is.
fn kind(link: &str) -> String {
    let numbered = ["socket:[", "pipe:["].iter().any(|kind| link.starts_with(kind));
    if numbered { link.split(':').next().unwrap_or(link).into() } else { link.into() }
}

fn role(name: &str) -> String {
    let name = name.trim_end();
    if name.starts_with("vhost-") && name != ACCEPTOR { CONNECTIONS.into() } else { name.into() }
}
