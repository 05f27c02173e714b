//! One port made whole, from a file or on its own, and what no two ports may share.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::inherit::{LABELS, report_labels, report_offloads, unknown};
use super::key_path::{KeyPath, Step};
use super::plan::{
    DaemonPlan, FaultyPlan, KindPlan, NetworkPlan, Plan, PortPlan, ProfilePlan, ReplayPlan, SocketMode, TapPlan,
    VhostUserPlan,
};
use super::reader::read;
use super::report::{At, Finding, Report};
use super::resolve::{SOCKET_MODE_DEFAULT, duration};
use super::written::{self, Table};
use crate::ident::{MacAddr, Name};
use crate::limits;

/// Time between two frames of a replay.
const INTERVAL_DEFAULT: Duration = Duration::from_millis(1);
const INTERVAL_RANGE: [Duration; 2] = [Duration::from_micros(1), Duration::from_secs(3600)];

/// Queue pairs of a vNIC unless the file says otherwise.
const QUEUES_DEFAULT: u16 = 1;

/// Resolves a port that is not in the file, against a plan. `None` if something was reported.
pub(super) fn single(name: &str, value: &Value, plan: &Plan, report: &mut Report) -> Option<PortPlan> {
    let path = KeyPath::of(&["ports", name]);
    let name: Name = match name.parse() {
        Ok(name) => name,
        Err(error) => {
            report.add(Finding::key(&path, error.to_string()));
            return None;
        }
    };
    let world = World { networks: Known::Planned(&plan.networks), profiles: Known::Planned(&plan.profiles) };
    let port = world.port(&name, read(value, &path, report)?, report)?;
    for claim in claims(&port) {
        let others = plan.ports.iter().filter(|(other, _)| **other != name);
        if claim == Claim::Socket(&plan.daemon.api) {
            report.add(claim.clash(&name, None));
        } else if let Some((other, _)) =
            others.into_iter().find(|(_, other)| claims(other).any(|theirs| theirs == claim))
        {
            report.add(claim.clash(&name, Some(other)));
        }
    }
    if plan.ports.len() >= limits::PORTS && !plan.ports.contains_key(&name) {
        report.add(Finding::key(&path, format!("the host has {} ports already, which is the most", plan.ports.len())));
    }
    Some(port)
}

/// What ports name: entries of a file, some of them with a mistake, or of a plan.
pub(super) enum Known<'a, T> {
    Written(&'a Table<T>),
    Planned(&'a BTreeMap<Name, T>),
}

impl<'a, T> Known<'a, T> {
    /// The entry, which is `Some(None)` if it is there but has a mistake.
    fn get(&self, name: &Name) -> Option<Option<&'a T>> {
        match self {
            Self::Written(table) => table.get(name).map(Option::as_ref),
            Self::Planned(entries) => entries.get(name).map(Some),
        }
    }

    fn names(&self) -> Vec<&'a str> {
        match self {
            Self::Written(table) => table.keys().map(Name::as_str).collect(),
            Self::Planned(entries) => entries.keys().map(Name::as_str).collect(),
        }
    }
}

/// What a port is resolved against.
pub(super) struct World<'a> {
    pub(super) networks: Known<'a, NetworkPlan>,
    pub(super) profiles: Known<'a, ProfilePlan>,
}

impl World<'_> {
    /// The port with its profile applied. `None` if it lacks something, which is reported here or was before.
    pub(super) fn port(&self, name: &Name, mut written: written::Port, report: &mut Report) -> Option<PortPlan> {
        let path = KeyPath::of(&["ports", name.as_str()]);
        let own = ProfilePlan::from(written.take_settings());
        report_offloads(&path, &own, report);
        if let Some(network) = own.network.as_ref().filter(|network| self.networks.get(network).is_none()) {
            let at = path.join(&[Step::Key("network".into())]);
            report.add(unknown(&at, "network", network, self.networks.names().into_iter()));
        }
        let mac = written.mac.map(|mac| mac.0);
        let named = written.profile.take();
        let kind = kind(name, written, report);
        let settings = match named.as_ref().map(|profile| (profile, self.profiles.get(profile))) {
            None => own,
            Some((_, Some(Some(profile)))) => own.over(profile),
            Some((_, Some(None))) => return None,
            Some((profile, None)) => {
                let at = path.join(&[Step::Key("profile".into())]);
                report.add(unknown(&at, "profile", profile, self.profiles.names().into_iter()));
                return None;
            }
        };
        if settings.labels.len() > LABELS {
            report_labels(&path, report);
        }
        let Some(network) = settings.network else {
            report.add(Finding::key(&path, "this port is in no network").help(self.network_help(named.as_ref())));
            return None;
        };
        let kind = kind?;
        Some(PortPlan {
            storm: settings.storm.or_of_kind(&kind),
            kind,
            mac,
            profile: named,
            network,
            latency: settings.latency.unwrap_or_default(),
            affinity: settings.affinity.unwrap_or_default(),
            mtu: settings.mtu,
            macs: settings.macs.unwrap_or(limits::PORT_MACS_DEFAULT),
            offloads: settings.offloads.or_on(),
            compat: settings.compat.unwrap_or_default(),
            labels: settings.labels,
        })
    }

    fn network_help(&self, profile: Option<&Name>) -> String {
        let names = self.networks.names();
        let place = match profile {
            Some(profile) => format!("here or in profile `{profile}`"),
            None => "here or in a profile that the port names".into(),
        };
        match names.as_slice() {
            [] => format!("add `networks: {{ lan: {{}} }}` and write `network: lan` {place}"),
            [first, ..] => format!("write `network: {first}` {place}"),
        }
    }
}

/// The one kind that was written.
fn kind(name: &Name, written: written::Port, report: &mut Report) -> Option<KindPlan> {
    let kinds = [
        written.vhost_user.map(|written| KindPlan::VhostUser(vhost_user(name, written, report))),
        written.tap.map(|written| KindPlan::Tap(TapPlan { interface: written.interface.0 })),
        written.loopback.map(|_| KindPlan::Loopback),
        written.null.map(|_| KindPlan::Null),
        written.replay.map(|written| KindPlan::Replay(replay(name, written, report))),
        written.faulty.map(|written| {
            let every = |written: Option<written::Every>| written.map(|n| n.u32());
            KindPlan::Faulty(FaultyPlan {
                drop_every: every(written.drop_every),
                truncate_every: every(written.truncate_every),
                duplicate_every: every(written.duplicate_every),
                flip_every: every(written.flip_every),
                seed: written.seed.map_or(0, |n| n.u32()),
            })
        }),
    ];
    let mut kinds = kinds.into_iter().flatten();
    let path = KeyPath::of(&["ports", name.as_str()]);
    let Some(first) = kinds.next() else {
        let missing = Finding::key(&path, "this port has no kind");
        let help = "say what is at its far end: `vhost-user`, `tap`, `loopback`, `null`, `replay` or `faulty`";
        report.add(missing.help(help));
        return None;
    };
    let at = |kind: &KindPlan| path.join(&[Step::Key(kind.key().into())]);
    for other in kinds {
        let message = format!("a port has one kind, and this one is `{}` already", first.key());
        report.add(Finding::key(&at(&other), message).related(&at(&first), At::Key, "the first kind"));
    }
    Some(first)
}

fn vhost_user(name: &Name, written: written::VhostUser, report: &mut Report) -> VhostUserPlan {
    let access = [
        ("owner", written.owner.is_some()),
        ("group", written.group.is_some()),
        ("permissions", written.permissions.is_some()),
    ];
    if written.mode == SocketMode::Client {
        for (key, _) in access.into_iter().filter(|(_, is_written)| *is_written) {
            let path = KeyPath::of(&["ports", name.as_str(), "vhost-user", key]);
            let finding =
                Finding::key(&path, format!("`{key}` is for `mode: server`: a client's socket is made by the VM"));
            report.add(finding.help("remove it, or set it where the VM is started"));
        }
    }
    VhostUserPlan {
        socket: written.socket.0,
        mode: written.mode,
        queues: written.queues.map_or(QUEUES_DEFAULT, |queues| queues.u16()),
        owner: written.owner.map(|owner| owner.0),
        group: written.group.map(|group| group.0),
        permissions: written.permissions.map_or(SOCKET_MODE_DEFAULT, |mode| mode.0),
        memory: written.memory.map(|memory| memory.0),
    }
}

fn replay(name: &Name, written: written::Replay, report: &mut Report) -> ReplayPlan {
    let keys = ["ports", name.as_str(), "replay", "interval"];
    ReplayPlan {
        file: written.file.0,
        interval: duration(written.interval, INTERVAL_DEFAULT, INTERVAL_RANGE, &keys, report),
        repeat: written.r#loop,
    }
}

/// Something of the host or of a network that only one port can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Claim<'a> {
    /// Compared by components, so `/run//a` is `/run/a`.
    Socket(&'a Path),
    Interface(&'a str),
    Mac(&'a Name, MacAddr),
}

fn claims(port: &PortPlan) -> impl Iterator<Item = Claim<'_>> {
    let of_kind = match &port.kind {
        KindPlan::VhostUser(vhost_user) => Some(Claim::Socket(&vhost_user.socket)),
        KindPlan::Tap(tap) => Some(Claim::Interface(&tap.interface)),
        KindPlan::Loopback | KindPlan::Null | KindPlan::Replay(_) | KindPlan::Faulty(_) => None,
    };
    of_kind.into_iter().chain(port.mac.map(|mac| Claim::Mac(&port.network, mac)))
}

impl Claim<'_> {
    /// Where `port` has it.
    fn path(&self, port: &Name) -> KeyPath {
        let port = port.as_str();
        match self {
            Self::Socket(_) => KeyPath::of(&["ports", port, "vhost-user", "socket"]),
            Self::Interface(_) => KeyPath::of(&["ports", port, "tap", "interface"]),
            Self::Mac(..) => KeyPath::of(&["ports", port, "mac"]),
        }
    }

    /// The finding that `port` has what `other` has already; `None` is the daemon's API.
    fn clash(&self, port: &Name, other: Option<&Name>) -> Finding {
        let what = match self {
            Self::Socket(path) => format!("the socket {}", path.display()),
            Self::Interface(name) => format!("the interface {name}"),
            Self::Mac(network, mac) => format!("the address {mac} in network `{network}`"),
        };
        match other {
            Some(other) => Finding::value(&self.path(port), format!("port `{other}` has {what} already")).related(
                &self.path(other),
                At::Value,
                "it is here too",
            ),
            None => Finding::value(&self.path(port), format!("the daemon's API has {what} already")).related(
                &KeyPath::of(&["daemon", "api"]),
                At::Value,
                "it is here too",
            ),
        }
    }
}

/// Reports every port that has what one before it, in the order of names, has.
pub(super) fn report_clashes(daemon: &DaemonPlan, ports: &BTreeMap<Name, PortPlan>, report: &mut Report) {
    let mut owners: BTreeMap<Claim<'_>, Option<&Name>> = BTreeMap::from([(Claim::Socket(&daemon.api), None)]);
    for (name, port) in ports {
        for claim in claims(port) {
            match owners.get(&claim) {
                Some(owner) => report.add(claim.clash(name, *owner)),
                None => drop(owners.insert(claim, Some(name))),
            }
        }
    }
}
