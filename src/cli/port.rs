//! One port: told in sentences, and written from options.

use serde_json::{Map, Value, json};

use super::PortSettings;
use super::format::{duration, exact, size, table};
use super::tables::{origin, received, state};
use crate::config::{Offloads, StormRate, StormRates};
use crate::control::report::{ConflictReason, ConflictReport, CounterReport, PortReport};
use crate::host::cpu::list;
use crate::printable;
use crate::verdict::DropReason;

/// `linecard port show`.
pub(super) fn show(port: &PortReport) -> String {
    let mut text = headline(port);
    text += &table(&[], &[], facts(port).into_iter().map(|(key, value)| vec![key, value]));
    text += &conflicts(port);
    text += &refused(port);
    text += &traffic(port);
    for (title, drops) in [("from it", &port.counters.drops), ("on the way to it", &port.counters.tx_drops)] {
        if !drops.is_empty() {
            text += &format!("\ndropped {title}:\n");
        }
        for (reason, count) in drops {
            text += &format!("  {} {reason}{}\n", exact(*count), explained(reason));
            text += &mtu_exceeded(port, reason).unwrap_or_default();
            text += &storm_limited(port, reason).unwrap_or_default();
        }
    }
    text += &offences(port.detail.as_ref());
    text + &detail(port.detail.as_ref())
}

/// Addresses that are seen at two ports, one of which is this.
fn conflicts(port: &PortReport) -> String {
    let line = |conflict: &ConflictReport| {
        let ConflictReport { mac, reason, port, stays_at, count, seconds_ago } = conflict;
        let reason = match reason {
            ConflictReason::Damped => DropReason::SourceDamped,
            ConflictReason::Pinned => DropReason::SourcePinned,
        };
        let (times, ago) = (exact(*count), duration(*seconds_ago));
        format!(
            "  {mac} is at port {stays_at} and was seen at port {port}, {times} times, {ago} ago: {}\n",
            reason.name()
        )
    };
    let lines: String = port.conflicts.iter().map(line).collect();
    if lines.is_empty() { lines } else { format!("\naddresses seen at two ports:\n{lines}") }
}

/// Addresses that were not learned, by what kept them from it.
fn refused(port: &PortReport) -> String {
    let line = |(limit, count): (&String, &u64)| {
        let reason = match limit.as_str() {
            "port" => "the port had as many as it may: `limits.macs`",
            "network" => "its network had as many as it may: `mac-limit`, see `linecard network list`",
            "host" => "the host had as many as it may",
            "place" => "the table had not grown yet",
            other => other,
        };
        format!("  {} times, when {reason}\n", exact(*count))
    };
    let lines: String = port.macs_refused.iter().map(line).collect();
    if lines.is_empty() {
        lines
    } else {
        format!("\naddresses that were not learned, so that what is sent to them is flooded:\n{lines}")
    }
}

fn headline(port: &PortReport) -> String {
    let why = port.reason.as_ref().map(|reason| format!(": {}", printable::line(reason))).unwrap_or_default();
    format!("port {} is {}{why}\n\n", port.name, state(port.state))
}

fn facts(port: &PortReport) -> Vec<(String, String)> {
    let mut facts = Vec::new();
    let mut fact = |key: &str, value: Option<String>| facts.extend(value.map(|value| (key.to_string(), value)));
    let kind = port.kind.as_ref().map(|kind| format!("{kind}, made {}", origin(port.origin)));
    fact("kind", kind.or_else(|| Some(format!("unclear, asked for {}", origin(port.origin)))));
    if let Value::Object(settings) = &port.config {
        for (key, value) in settings {
            fact(key, Some(plain(value)));
        }
    }
    fact("network", port.network.clone());
    fact("profile", port.profile.clone());
    fact("MAC", port.mac.clone());
    fact("MTU", port.mtu.map(|mtu| mtu.to_string()));
    fact("latency-sensitivity", Some(port.latency_sensitivity.to_string()));
    fact("affinity", serde_json::to_value(port.affinity).ok().map(|affinity| plain(&affinity)));
    fact("CPU", Some(list(port.cpus.iter().copied())).filter(|cpus| !cpus.is_empty()));
    fact("compat", port.compat.map(|compat| compat.to_string()));
    fact("stations", port.mac_limit.map(|most| format!("{} of {}", exact(port.macs.into()), exact(most.into()))));
    fact("storm", Some(bounds(port.storm, port.in_loop)));
    fact("offloads", Some(left(port.offloads)));
    let labels: Vec<_> = port.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    fact("labels", Some(labels.join(" ")).filter(|labels| !labels.is_empty()));
    facts
}

/// What a port may have flooded in a second.
fn bounds(storm: StormRates<StormRate>, in_loop: bool) -> String {
    let StormRates { broadcast, multicast, unknown_unicast } = storm.in_force(in_loop);
    let classes = [("broadcast", broadcast), ("multicast", multicast), ("unknown-unicast", unknown_unicast)];
    let bounded: Vec<String> =
        classes.iter().filter_map(|(class, rate)| Some(format!("{class} {}/s", (*rate)?))).collect();
    let bounds = if bounded.is_empty() { "off".into() } else { bounded.join(", ") };
    match (storm.minds_loops(), in_loop) {
        (false, _) => bounds,
        (true, false) => bounds + " (auto: no loop is suspected)",
        (true, true) => bounds + " (auto: a loop is suspected)",
    }
}

/// The offloads that a far end is left with: there is none without `csum`, and no `ecn` or `gro` without `tso`.
fn left(Offloads { csum, tso, ecn, uso, gro }: Offloads<bool>) -> String {
    let tcp = csum && tso;
    let switches = [("csum", csum), ("tso", tcp), ("ecn", tcp && ecn), ("uso", csum && uso), ("gro", tcp && gro)];
    let on: Vec<&str> = switches.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    if on.is_empty() { "none".into() } else { on.join(" ") }
}

fn traffic(port: &PortReport) -> String {
    let counters = &port.counters;
    let far = match port.kind.as_deref() {
        Some("vhost-user") => "the VM",
        Some("tap") => "the host",
        _ => "it",
    };
    let rx = received(counters.rx_frames, counters.rx_delivered, counters.rx_dropped);
    format!(
        "\nfrom {far}: {rx}, {}\nto {far}: {} frames given, {} dropped, {}\n",
        size(counters.rx_bytes),
        exact(counters.tx_frames),
        exact(counters.tx_dropped),
        size(counters.tx_bytes)
    ) + &offloads(counters)
}

/// How long the largest frame was that exceeded the MTU.
fn mtu_exceeded(port: &PortReport, reason: &str) -> Option<String> {
    let (mtu, bytes) = (port.mtu?, port.counters.mtu_exceeded_bytes);
    let known = reason == DropReason::MtuExceeded.name() && bytes > 0;
    known.then(|| {
        format!("    The largest one had {bytes} bytes with its Ethernet header; the limit is {mtu} without it.\n")
    })
}

/// Which frames were dropped for being too many.
fn storm_limited(port: &PortReport, reason: &str) -> Option<String> {
    let drops = &port.counters.storm_drops;
    let of: Vec<String> = drops.iter().map(|(class, count)| format!("{} {class}", exact(*count))).collect();
    let known = reason == DropReason::StormLimited.name() && !of.is_empty();
    known.then(|| format!("    By class: {}.\n", of.join(", ")))
}

/// What was done about offloads, if anything.
fn offloads(counters: &CounterReport) -> String {
    let mut text = String::new();
    if counters.rx_gso + counters.tx_gso + counters.tx_segmented > 0 {
        let [from, whole, cut] = [counters.rx_gso, counters.tx_gso, counters.tx_segmented].map(exact);
        text += &format!("large frames: {from} from it, {whole} to it whole, {cut} to it as segments\n");
    }
    if counters.tx_segments_dropped > 0 {
        text += &format!(
            "large frames cut short for it, for want of buffers: {} segments dropped\n",
            exact(counters.tx_segments_dropped)
        );
    }
    if counters.tx_merged > 0 {
        text += &format!("segments merged into large frames for it: {}\n", exact(counters.tx_merged));
    }
    if counters.tx_completed > 0 {
        text += &format!("checksums completed for it: {}\n", exact(counters.tx_completed));
    }
    text
}

/// What a reason means and what to do about it. A daemon that is newer than this command may have reasons unknown here.
fn explained(name: &str) -> String {
    let known = DropReason::ALL.iter().find(|reason| reason.name() == name);
    known.map(|reason| format!(": {}\n    {}", reason.meaning(), reason.advice())).unwrap_or_default()
}

/// What its far end has done to others.
fn offences(detail: Option<&Value>) -> String {
    let count = |key: &str| detail.and_then(|detail| detail[key].as_u64()).filter(|&count| count > 0);
    let line = |key: &str, what: &str| count(key).map(|count| format!("{what} {}\n", times(count))).unwrap_or_default();
    let lines =
        line("held_up", "held a shard up in its VM's memory") + &line("barred", "served nobody for what its VM did");
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

fn times(count: u64) -> String {
    if count == 1 { "once".into() } else { format!("{} times", exact(count)) }
}

/// What the port's kind has to tell, as an outline; queues as a table.
fn detail(detail: Option<&Value>) -> String {
    let Some(Value::Object(detail)) = detail else { return String::new() };
    let mut rest = detail.clone();
    let queues = rest.remove("queues");
    // The configuration and `offences` have told these already.
    for key in ["socket", "mode", "mac", "mtu", "interface", "held_up", "barred"] {
        rest.remove(key);
    }
    let mut text = String::new();
    if !rest.is_empty() {
        text += "\n";
        outline(&rest, "", &mut text);
    }
    if let Some(Value::Array(queues)) = queues {
        text += &rows(&queues);
    }
    text
}

fn outline(tree: &Map<String, Value>, indent: &str, text: &mut String) {
    for (key, value) in tree.iter().filter(|(_, value)| !value.is_null()) {
        let key = key.replace('_', " ");
        match value {
            Value::Object(inner) => {
                *text += &format!("{indent}{key}:\n");
                outline(inner, &format!("{indent}  "), text);
            }
            other => *text += &format!("{indent}{key}: {}\n", plain(other)),
        }
    }
}

/// A list of objects as a table, with a column for each key that one of them has.
fn rows(list: &[Value]) -> String {
    let mut keys: Vec<&String> = Vec::new();
    for key in list.iter().filter_map(Value::as_object).flat_map(|row| row.iter().filter(|(_, v)| !v.is_null())) {
        if !keys.contains(&key.0) {
            keys.push(key.0);
        }
    }
    if keys.is_empty() {
        return String::new();
    }
    // What tells rows apart comes first; the rest is in the order of the alphabet.
    let rank = |key: &str| ["index", "direction", "enabled", "started", "size"].iter().position(|first| *first == key);
    keys.sort_by_key(|key| rank(key).unwrap_or(usize::MAX));
    let header: Vec<String> = keys.iter().map(|key| key.replace('_', " ").to_uppercase()).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let cell = |row: &Value, key: &str| row.get(key).map(plain).unwrap_or_default();
    format!("\n{}", table(&header, &[], list.iter().map(|row| keys.iter().map(|key| cell(row, key)).collect())))
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.into(),
        Value::String(text) => printable::line(text).into_owned(),
        Value::Array(list) if list.iter().all(|item| !item.is_object() && !item.is_array()) => {
            list.iter().map(plain).collect::<Vec<_>>().join(" ")
        }
        other => other.to_string(),
    }
}

impl PortSettings {
    /// The port as it would stand in the file; `None` if no option was given.
    pub(super) fn written(&self) -> Option<Value> {
        let mut vhost_user = Map::new();
        let mut port = Map::new();
        let set = |under: &mut Map<_, _>, key: &str, value: Option<Value>| {
            if let Some(value) = value {
                under.insert(key.to_string(), value);
            }
        };
        set(&mut vhost_user, "socket", self.socket.as_ref().map(|path| json!(path)));
        set(&mut vhost_user, "mode", self.mode.as_ref().map(|mode| json!(mode)));
        set(&mut vhost_user, "queues", self.queues.map(|queues| json!(queues)));
        set(&mut port, "vhost-user", Some(Value::Object(vhost_user)).filter(|_| self.socket.is_some()));
        set(&mut port, "network", self.network.as_ref().map(|network| json!(network)));
        set(&mut port, "profile", self.profile.as_ref().map(|profile| json!(profile)));
        set(&mut port, "mac", self.mac.map(|mac| json!(mac)));
        set(&mut port, "latency-sensitivity", self.latency_sensitivity.map(|level| json!(level)));
        set(&mut port, "mtu", self.mtu.map(|mtu| json!(mtu)));
        let labels: Map<_, _> = self.labels.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        set(&mut port, "labels", Some(Value::Object(labels)).filter(|_| !self.labels.is_empty()));
        Some(Value::Object(port)).filter(|port| *port != json!({}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_that_stand_on_others_go_with_them() {
        let all = Offloads { csum: true, tso: true, ecn: true, uso: true, gro: true };
        assert_eq!(left(all), "csum tso ecn uso gro");
        assert_eq!(left(Offloads { tso: false, ..all }), "csum uso");
        assert_eq!(left(Offloads { csum: false, ..all }), "none");
    }

    #[test]
    fn bounds_are_told_class_by_class_and_what_has_none_is_left_out() {
        let off = StormRates::default();
        assert_eq!(bounds(off, false), "off");
        assert_eq!(bounds(off, true), "off");
        let some =
            StormRates { broadcast: StormRate::PerSecond(0), unknown_unicast: StormRate::PerSecond(5000), ..off };
        assert_eq!(bounds(some, true), "broadcast 0/s, unknown-unicast 5000/s");
        let auto = StormRates { multicast: StormRate::Auto, ..some };
        assert_eq!(bounds(auto, false), "broadcast 0/s, unknown-unicast 5000/s (auto: no loop is suspected)");
        let all = "broadcast 0/s, multicast 10000/s, unknown-unicast 5000/s (auto: a loop is suspected)";
        assert_eq!(bounds(auto, true), all);
    }
    #[test]
    fn what_a_vm_did_to_others_is_told_if_it_did_something() {
        let told = |held_up: u64, barred: u64| {
            let port = json!({ "held_up": held_up, "barred": barred, "connections": 3 });
            offences(Some(&port)) + &detail(Some(&port))
        };
        assert_eq!(told(0, 0), "\nconnections: 3\n");
        let both = "\nheld a shard up in its VM's memory 1,200 times\nserved nobody for what its VM did once\n";
        assert_eq!(told(1200, 1), format!("{both}\nconnections: 3\n"));
        assert_eq!(offences(None), "");
    }
}
