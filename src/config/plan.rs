//! What a configuration means: every default filled in, every profile applied, every name known to exist.
//!
//! Plans are compared, not patched: a port whose [`PortPlan`] equals the running one is not touched. They serialize with
//! the keys of the file, so that what an operator wrote is found again in what is running.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::storm::{StormRate, StormRates};
use crate::ident::{Affinity, Compat, LatencySensitivity, MacAddr, Name};
use crate::shard::{self, Service, ShardError};

/// A whole configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// The daemon itself.
    pub daemon: DaemonPlan,
    /// Worker threads.
    pub shards: ShardsPlan,
    /// Broadcast domains.
    pub networks: BTreeMap<Name, NetworkPlan>,
    /// Named settings; ports have theirs applied already.
    pub profiles: BTreeMap<Name, ProfilePlan>,
    /// Ports of the file; those made at run time are not among them.
    pub ports: BTreeMap<Name, PortPlan>,
}

/// The daemon: where it is reached, where it keeps what survives it. `daemon:` in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DaemonPlan {
    /// Unix socket of the HTTP API.
    pub api: PathBuf,
    /// Group that owns the API's socket; `None` leaves the daemon's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_group: Option<String>,
    /// Permission bits of the API's socket.
    #[serde(serialize_with = "octal")]
    pub api_mode: u32,
    /// Directory for what must survive the daemon: ports made at run time.
    pub state_dir: PathBuf,
    /// Where metrics are served over TCP as well as on the API; `None`: on the API only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<SocketAddr>,
    /// Least severe messages that are logged.
    pub log: LogLevel,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// What needs somebody.
    Error,
    /// And what may soon.
    Warn,
    /// And what changed.
    #[default]
    Info,
    /// And why.
    Debug,
    /// And every message of a front end.
    Trace,
}

/// Worker threads, one per CPU. `shards:` in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ShardsPlan {
    /// CPUs of the shards that ports share.
    pub cpus: CpuChoice,
    /// CPUs of the shards that serve only ports of latency sensitivity `high`; ascending, none of them in `cpus`.
    pub exclusive: Vec<u16>,
    /// What a shard does when nothing comes.
    pub idle: Idle,
    /// SCHED_FIFO priority of the shards on `exclusive`; `None`: they are scheduled as everybody is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub realtime: Option<u8>,
}

/// Which CPUs carry shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuChoice {
    /// As the host suggests: it never suggests one of `exclusive`.
    Auto,
    /// These, ascending and at least one.
    List(Vec<u16>),
}

/// What a shard does when nothing comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Idle {
    /// Polls as long as its most sensitive port asks for, then sleeps.
    #[default]
    Adaptive,
    /// Always polls.
    Never,
}

/// One broadcast domain. An entry of `networks:` in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NetworkPlan {
    /// How long a learned address lives without being heard.
    #[serde(serialize_with = "duration")]
    pub mac_age: Duration,
    /// Most FDB entries of this network.
    pub mac_limit: u32,
}

/// What a profile says after inheritance; `None`: nothing, and the port's default stands. An entry of `profiles:`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ProfilePlan {
    /// Network of the ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<Name>,
    /// How much the ports mind delay.
    #[serde(rename = "latency-sensitivity", skip_serializing_if = "Option::is_none")]
    pub latency: Option<LatencySensitivity>,
    /// Which queues stay together on a shard.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// Largest IP packet, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Most addresses that one port may teach the switch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub macs: Option<u32>,
    /// How much of what they send may be flooded.
    #[serde(skip_serializing_if = "StormRates::is_empty")]
    pub storm: StormRates<Option<StormRate>>,
    /// Which offloads their far ends are left with.
    #[serde(skip_serializing_if = "Offloads::is_empty")]
    pub offloads: Offloads<Option<bool>>,
    /// Which features they offer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compat: Option<Compat>,
    /// Labels of the ports.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// One port with everything it got from its profile. An entry of `ports:` in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PortPlan {
    /// What is at its far end.
    pub kind: KindPlan,
    /// The station address behind it, if it was written down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// The profile it names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<Name>,
    /// The network it is in.
    pub network: Name,
    /// How much it minds delay.
    #[serde(rename = "latency-sensitivity")]
    pub latency: LatencySensitivity,
    /// Which queues stay together on a shard.
    pub affinity: Affinity,
    /// Largest IP packet in bytes, told to the guest and held against it; `None`: neither.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Most addresses it may teach the switch.
    pub macs: u32,
    /// How much of what it sends may be flooded.
    pub storm: StormRates<StormRate>,
    /// Which offloads its far end is left with of those that it can do.
    pub offloads: Offloads<bool>,
    /// Which features it offers to its far end.
    pub compat: Compat,
    /// What operators and their tools call it; the switch reads none of it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// A switch for each offload. `offloads:` in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Offloads<T: Default> {
    /// Checksums; without them nothing else.
    pub csum: T,
    /// Segmentation of TCP.
    pub tso: T,
    /// Segmentation of TCP whose first segment reduces the congestion window.
    pub ecn: T,
    /// Segmentation of UDP.
    pub uso: T,
    /// Generic receive offload: TCP segments that came one by one are given as one frame.
    pub gro: T,
}

impl Offloads<Option<bool>> {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// These switches, and where they say nothing those of `below`.
    pub(super) fn over(self, below: Self) -> Self {
        Self {
            csum: self.csum.or(below.csum),
            tso: self.tso.or(below.tso),
            ecn: self.ecn.or(below.ecn),
            uso: self.uso.or(below.uso),
            gro: self.gro.or(below.gro),
        }
    }

    /// The first that is switched on beside the one that it cannot do without, which is switched off: both names.
    pub(super) fn contradiction(&self) -> Option<[&'static str; 2]> {
        let (csum, tso) = (("csum", self.csum), ("tso", self.tso));
        let (ecn, uso) = (("ecn", self.ecn), ("uso", self.uso));
        let gro = ("gro", self.gro);
        let pairs = [(tso, csum), (ecn, csum), (uso, csum), (gro, csum), (ecn, tso), (gro, tso)];
        let clash = pairs.iter().find(|((_, on), (_, without))| *on == Some(true) && *without == Some(false));
        clash.map(|((on, _), (without, _))| [*on, *without])
    }

    /// These switches, and on where they say nothing.
    pub(super) fn or_on(self) -> Offloads<bool> {
        let on = |switch: Option<bool>| switch.unwrap_or(true);
        Offloads { csum: on(self.csum), tso: on(self.tso), ecn: on(self.ecn), uso: on(self.uso), gro: on(self.gro) }
    }
}

impl PortPlan {
    /// What the port asks of the shards. The label is no part of it unless the affinity reads it: a port whose service is the
    /// same is not moved.
    pub fn service(&self) -> Service {
        let label = self.labels.get("vm").filter(|_| self.affinity == Affinity::Vm);
        let vm = label.map(|vm| vm.as_str().into());
        Service { latency: self.latency, affinity: self.affinity, vm, node: None }
    }

    /// How many receive queues it has.
    pub fn queue_count(&self) -> usize {
        match &self.kind {
            KindPlan::VhostUser(vnic) => vnic.queues.into(),
            _ => 1,
        }
    }
}

/// What is at the far end of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KindPlan {
    /// A VM's virtio-net device.
    VhostUser(VhostUserPlan),
    /// A network interface of the host.
    Tap(TapPlan),
    /// Nothing: frames come back.
    Loopback,
    /// Nothing: frames are gone.
    Null,
    /// A recording of frames.
    Replay(ReplayPlan),
    /// A loopback that fails on purpose.
    Faulty(FaultyPlan),
}

impl KindPlan {
    /// The key that stands for this kind in a file.
    pub fn key(&self) -> &'static str {
        match self {
            Self::VhostUser(_) => "vhost-user",
            Self::Tap(_) => "tap",
            Self::Loopback => "loopback",
            Self::Null => "null",
            Self::Replay(_) => "replay",
            Self::Faulty(_) => "faulty",
        }
    }
}

/// A vhost-user socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VhostUserPlan {
    /// Absolute, and short enough for a Unix socket.
    pub socket: PathBuf,
    /// Who makes the socket.
    pub mode: SocketMode,
    /// Most queue pairs that the VM may use, from 1.
    pub queues: u16,
    /// User that gets the socket; `None` leaves the daemon's own. Always `None` for [`SocketMode::Client`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Group that gets the socket; likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Permission bits of a socket that we make.
    #[serde(serialize_with = "octal")]
    pub permissions: u32,
    /// Most bytes of memory that the VM may share; `None` for as many as the host has.
    #[serde(serialize_with = "size", skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
}

/// Which side of a vhost-user socket the daemon is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SocketMode {
    /// The daemon makes the socket and the VM connects.
    #[default]
    Server,
    /// The VM makes the socket and the daemon connects, again and again until it can.
    Client,
}

/// A TAP interface of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TapPlan {
    /// Its name, made if it is not there.
    pub interface: String,
}

/// Frames from a pcap file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReplayPlan {
    /// The file.
    pub file: PathBuf,
    /// Time between two frames.
    #[serde(serialize_with = "duration")]
    pub interval: Duration,
    /// Whether to begin again at the end.
    #[serde(rename = "loop")]
    pub repeat: bool,
}

/// Which frames go wrong; `None`: none of them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FaultyPlan {
    /// Each frame whose number is a multiple of this is dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drop_every: Option<u32>,
    /// Each frame whose number is a multiple of this loses bytes at its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncate_every: Option<u32>,
    /// Each frame whose number is a multiple of this comes twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duplicate_every: Option<u32>,
    /// Each frame whose number is a multiple of this comes with a bit flipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flip_every: Option<u32>,
    /// Start of the generator that picks lengths and bits.
    pub seed: u32,
}

/// The ports that the shards could not serve if all of them came at once, in the order in which they are given: those of
/// latency sensitivity `high` that `shards.exclusive` has no CPU for.
pub fn unserved<'a>(
    shards: &ShardsPlan,
    ports: impl Iterator<Item = (&'a Name, &'a PortPlan)>,
) -> Vec<(&'a Name, ShardError)> {
    let (names, wishes): (Vec<_>, Vec<_>) =
        ports.map(|(name, port)| (name, (port.queue_count(), port.service()))).unzip();
    let shared: &[u16] = match &shards.cpus {
        CpuChoice::List(cpus) => cpus,
        // One that the host picks; which one is no matter here.
        CpuChoice::Auto => &[0],
    };
    let placed = shard::preview(shared, &shards.exclusive, &wishes);
    names.into_iter().zip(placed).filter_map(|(name, placed)| Some((name, placed.err()?))).collect()
}

/// Writes permission bits as they are written in a file: `"0660"`.
fn octal<S: serde::Serializer>(mode: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{mode:04o}"))
}

/// Writes a size with the largest unit that divides it.
fn size<S: serde::Serializer>(bytes: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    bytes.map(super::size::format_size).serialize(serializer)
}

/// Writes a duration with the largest unit that divides it: `300s` stays `5m`, and is read back as the same.
fn duration<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&super::time::format_duration(*duration))
}
