//! What a configuration file says, key by key, before it is known to make sense as a whole.
//!
//! These types are the list of the keys. `None` means that a key is not written; defaults and cross references are
//! [`super::resolve`]'s. An entry of `networks`, `profiles` or `ports` in which something was refused is kept as `None`,
//! so that naming it elsewhere is not a second mistake.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;

use super::cpus::{CpuSelection, Cpus};
use super::key_path::KeyPath;
use super::plan::{Idle, LogLevel, Offloads, SocketMode};
use super::reader::read;
use super::report::{Finding, Report};
use super::scalar::{
    Account, Endpoint, FilePath, Interface, LabelKey, LabelValue, Mode, Names, SocketPath, StationMac, Version, Whole,
};
use super::size::MemorySize;
use super::storm::Storm;
use super::time::Time;
use crate::ident::{Affinity, Compat, LatencySensitivity, Name};
use crate::limits;

/// A count of FDB entries.
pub(super) type Entries = Whole<1, { limits::FDB_ENTRIES as u64 }>;

/// An MTU in bytes.
pub(super) type Mtu = Whole<{ *limits::MTU_RANGE.start() as u64 }, { *limits::MTU_RANGE.end() as u64 }>;

/// Every N-th frame.
pub(super) type Every = Whole<1, { u32::MAX as u64 }>;

/// A whole file.
#[derive(Debug, Default)]
pub(super) struct File {
    pub(super) daemon: Daemon,
    pub(super) shards: Shards,
    pub(super) networks: Table<Network>,
    pub(super) profiles: Table<Profile>,
    pub(super) ports: Table<Port>,
}

/// Named entries of one section.
pub(super) type Table<T> = BTreeMap<Name, Option<T>>;

/// The sections, for their names and those of their entries.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Sections {
    #[serde(rename = "version")]
    _version: Option<Version>,
    #[serde(rename = "daemon")]
    _daemon: IgnoredAny,
    #[serde(rename = "shards")]
    _shards: IgnoredAny,
    #[serde(rename = "networks")]
    _networks: BTreeMap<Name, IgnoredAny>,
    #[serde(rename = "profiles")]
    _profiles: BTreeMap<Name, IgnoredAny>,
    #[serde(rename = "ports")]
    _ports: BTreeMap<Name, IgnoredAny>,
}

/// `daemon:`
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Daemon {
    pub(super) api: Option<SocketPath>,
    pub(super) api_group: Option<Account>,
    pub(super) api_mode: Option<Mode>,
    pub(super) state_dir: Option<FilePath>,
    pub(super) metrics: Option<Endpoint>,
    pub(super) log: LogLevel,
}

/// `shards:`
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Shards {
    pub(super) cpus: Option<CpuSelection>,
    pub(super) exclusive: Cpus,
    pub(super) idle: Idle,
    pub(super) realtime: Option<Whole<1, 99>>,
}

/// An entry of `networks:`
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Network {
    pub(super) mac_age: Option<Time>,
    pub(super) mac_limit: Option<Entries>,
}

/// `limits:` of a profile or a port.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Limits {
    pub(super) macs: Option<Entries>,
}

/// The keys that profiles and ports have in common.
#[derive(Debug, Default)]
pub(super) struct Settings {
    pub(super) network: Option<Name>,
    pub(super) latency_sensitivity: Option<LatencySensitivity>,
    pub(super) affinity: Option<Affinity>,
    pub(super) mtu: Option<Mtu>,
    pub(super) limits: Limits,
    pub(super) storm: Storm,
    pub(super) offloads: Offloads<Option<bool>>,
    pub(super) compat: Option<Compat>,
    pub(super) labels: BTreeMap<LabelKey, LabelValue>,
}

/// Declares a struct of keys together with those of [`Settings`]: serde's `flatten` cannot refuse unknown keys.
macro_rules! with_settings {
    ($(#[$meta:meta])* struct $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Default, Deserialize)]
        #[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
        pub(super) struct $name {
            $($(#[$field_meta])* pub(super) $field: $type,)*
            pub(super) network: Option<Name>,
            pub(super) latency_sensitivity: Option<LatencySensitivity>,
            pub(super) affinity: Option<Affinity>,
            pub(super) mtu: Option<Mtu>,
            pub(super) limits: Limits,
            pub(super) storm: Storm,
            pub(super) offloads: Offloads<Option<bool>>,
            pub(super) compat: Option<Compat>,
            pub(super) labels: BTreeMap<LabelKey, LabelValue>,
        }

        impl $name {
            /// Takes out the keys that profiles and ports have in common.
            pub(super) fn take_settings(&mut self) -> Settings {
                Settings {
                    network: self.network.take(),
                    latency_sensitivity: self.latency_sensitivity.take(),
                    affinity: self.affinity.take(),
                    mtu: self.mtu.take(),
                    limits: std::mem::take(&mut self.limits),
                    storm: std::mem::take(&mut self.storm),
                    offloads: std::mem::take(&mut self.offloads),
                    compat: self.compat.take(),
                    labels: std::mem::take(&mut self.labels),
                }
            }
        }
    };
}

with_settings! {
    /// An entry of `profiles:`
    struct Profile {
        inherit: Names,
    }
}

with_settings! {
    /// An entry of `ports:`
    struct Port {
        vhost_user: Option<VhostUser>,
        tap: Option<Tap>,
        loopback: Option<Nothing>,
        null: Option<Nothing>,
        replay: Option<Replay>,
        faulty: Option<Faulty>,
        mac: Option<StationMac>,
        profile: Option<Name>,
    }
}

/// `vhost-user:`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct VhostUser {
    pub(super) socket: SocketPath,
    #[serde(default)]
    pub(super) mode: SocketMode,
    pub(super) queues: Option<Whole<1, { limits::QUEUE_PAIRS as u64 }>>,
    pub(super) owner: Option<Account>,
    pub(super) group: Option<Account>,
    pub(super) permissions: Option<Mode>,
    pub(super) memory: Option<MemorySize>,
}

/// `tap:`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Tap {
    pub(super) interface: Interface,
}

/// `loopback:` and `null:` have no keys.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// `replay:`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Replay {
    pub(super) file: FilePath,
    pub(super) interval: Option<Time>,
    #[serde(default)]
    pub(super) r#loop: bool,
}

/// `faulty:`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Faulty {
    pub(super) drop_every: Option<Every>,
    pub(super) truncate_every: Option<Every>,
    pub(super) duplicate_every: Option<Every>,
    pub(super) flip_every: Option<Every>,
    pub(super) seed: Option<Whole<0, { u32::MAX as u64 }>>,
}

/// Reads a whole document. What could not be read is in `report`; what could is returned for further checks.
pub(super) fn file(document: &Value, report: &mut Report) -> File {
    let top = KeyPath::default();
    if document.get("version").is_none() && document.is_object() {
        let missing = Finding::key(&top, "the key `version` is missing");
        report.add(missing.help("begin the file with `version: 1`"));
    }
    // Only for its mistakes: the sections are read on their own, whatever is wrong beside them.
    let _: Option<Sections> = read(document, &top, report);
    File {
        daemon: section(document, "daemon", report),
        shards: section(document, "shards", report),
        networks: table(document, "networks", report),
        profiles: table(document, "profiles", report),
        ports: table(document, "ports", report),
    }
}

/// One section; its defaults if it is not written or has a mistake.
fn section<T: DeserializeOwned + Default>(document: &Value, key: &str, report: &mut Report) -> T {
    document.get(key).and_then(|value| read(value, &KeyPath::of(&[key]), report)).unwrap_or_default()
}

/// The entries of one section, each read on its own. Bad names were reported with the sections.
fn table<T: DeserializeOwned>(document: &Value, section: &str, report: &mut Report) -> Table<T> {
    let entries = document.get(section).and_then(Value::as_object).into_iter().flatten();
    entries
        .filter_map(|(name, value)| {
            let path = KeyPath::of(&[section, name]);
            Some((name.parse().ok()?, read(value, &path, report)))
        })
        .collect()
}
