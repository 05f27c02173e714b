//! What was written to what it means: defaults, names that must exist, and what must be only once.
//!
//! Anything that is `None` in a [`Table`] had a mistake that is reported already; what leans on it is passed over, so
//! that one mistake is one diagnostic.

use std::collections::BTreeMap;
use std::time::Duration;

use super::inherit::{profiles, unknown};
use super::key_path::KeyPath;
use super::plan::{CpuChoice, DaemonPlan, NetworkPlan, Plan, ShardsPlan};
use super::port::{Known, World, report_clashes};
use super::report::{At, Finding, Report};
use super::time::{Time, format_duration};
use super::written::{self, Table};
use crate::ident::Name;
use crate::limits;

/// Where the API listens unless the file says otherwise.
const API_DEFAULT: &str = "/run/linecard/api.sock";

/// Where run-time ports are kept unless the file says otherwise.
const STATE_DIR_DEFAULT: &str = "/var/lib/linecard";

/// Who may use a socket unless the file says otherwise: its owner and its group.
pub(super) const SOCKET_MODE_DEFAULT: u32 = 0o660;

/// How long a learned address lives (IEEE 802.1Q, table 8-6: 300 s recommended, at most 1,000,000 s).
const MAC_AGE_DEFAULT: Duration = Duration::from_secs(300);
const MAC_AGE_RANGE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1_000_000)];

/// FDB entries of one network: a sixteenth of the host's.
const MAC_LIMIT_DEFAULT: u32 = limits::FDB_ENTRIES as u32 / 16;

/// Resolves a whole file. The plan is good only if nothing was reported.
pub(super) fn file(mut file: written::File, report: &mut Report) -> Plan {
    report_count("profiles", file.profiles.len(), limits::PROFILES, report);
    if file.profiles.len() > limits::PROFILES {
        // What they would become together is not tried.
        file.profiles.values_mut().for_each(|profile| *profile = None);
    }
    let daemon = daemon(file.daemon);
    let shards = shards(file.shards, report);
    let networks = networks(file.networks, report);
    for (name, profile) in &file.profiles {
        // Here and not on the whole profile, or every heir would be blamed.
        let Some(network) = profile.as_ref().and_then(|profile| profile.network.as_ref()) else { continue };
        if !networks.contains_key(network) {
            let path = KeyPath::of(&["profiles", name.as_str(), "network"]);
            report.add(unknown(&path, "network", network, networks.keys().map(Name::as_str)));
        }
    }
    let profiles = profiles(file.profiles, report);
    let world = World { networks: Known::Written(&networks), profiles: Known::Written(&profiles) };
    let port = |(name, port): (Name, Option<written::Port>)| {
        let port = world.port(&name, port?, report)?;
        Some((name, port))
    };
    let ports: BTreeMap<_, _> = file.ports.into_iter().filter_map(port).collect();
    report_clashes(&daemon, &ports, report);
    report_count("ports", ports.len(), limits::PORTS, report);
    report_count("networks", networks.len(), limits::NETWORKS, report);
    Plan { daemon, shards, networks: whole(networks), profiles: whole(profiles), ports }
}

fn daemon(written: written::Daemon) -> DaemonPlan {
    DaemonPlan {
        api: written.api.map_or_else(|| API_DEFAULT.into(), |path| path.0),
        api_group: written.api_group.map(|group| group.0),
        api_mode: written.api_mode.map_or(SOCKET_MODE_DEFAULT, |mode| mode.0),
        state_dir: written.state_dir.map_or_else(|| STATE_DIR_DEFAULT.into(), |path| path.0),
        metrics: written.metrics.map(|endpoint| endpoint.0),
        log: written.log,
    }
}

fn shards(written: written::Shards, report: &mut Report) -> ShardsPlan {
    let cpus = written.cpus.map_or(CpuChoice::Auto, |selection| selection.0);
    let exclusive = written.exclusive.0;
    let path = KeyPath::of(&["shards", "exclusive"]);
    if let CpuChoice::List(cpus) = &cpus {
        let both: Vec<String> = cpus.iter().filter(|cpu| exclusive.contains(cpu)).map(u16::to_string).collect();
        if !both.is_empty() {
            let message =
                format!("CPU {} is in `cpus` too: no shard can have a CPU alone and share it", both.join(","));
            report.add(Finding::value(&path, message).related(
                &KeyPath::of(&["shards", "cpus"]),
                At::Value,
                "also named here",
            ));
        } else if cpus.len() + exclusive.len() > limits::SHARDS {
            let count = cpus.len() + exclusive.len();
            let message = format!("{count} CPUs together with `cpus`; there are at most {} shards", limits::SHARDS);
            report.add(Finding::value(&path, message));
        }
    }
    let realtime = written.realtime.map(|priority| priority.u16() as u8);
    ShardsPlan { cpus, exclusive, idle: written.idle, realtime }
}

fn networks(written: Table<written::Network>, report: &mut Report) -> Table<NetworkPlan> {
    let mut plan = |(name, network): (Name, Option<written::Network>)| {
        let network = network.map(|network| NetworkPlan {
            mac_age: duration(
                network.mac_age,
                MAC_AGE_DEFAULT,
                MAC_AGE_RANGE,
                &["networks", name.as_str(), "mac-age"],
                report,
            ),
            mac_limit: network.mac_limit.map_or(MAC_LIMIT_DEFAULT, |limit| limit.u32()),
        });
        (name, network)
    };
    written.into_iter().map(&mut plan).collect()
}

/// The duration at `keys`, which has to be in `range`, ends included.
pub(super) fn duration(
    written: Option<Time>,
    default: Duration,
    [least, most]: [Duration; 2],
    keys: &[&str],
    report: &mut Report,
) -> Duration {
    let Some(Time(time)) = written else { return default };
    if time < least || time > most {
        let (least, most) = (format_duration(least), format_duration(most));
        report.add(Finding::value(
            &KeyPath::of(keys),
            format!("{} is not from {least} to {most}", format_duration(time)),
        ));
    }
    time
}

fn report_count(section: &str, count: usize, most: usize, report: &mut Report) {
    if count > most {
        let message = format!("{count} {section} are too many: a host has at most {most}");
        report.add(Finding::key(&KeyPath::of(&[section]), message));
    }
}

/// The entries without a mistake.
fn whole<T>(table: Table<T>) -> BTreeMap<Name, T> {
    table.into_iter().filter_map(|(name, entry)| Some((name, entry?))).collect()
}
