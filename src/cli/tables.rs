//! The lists: one table for each.

use super::format::{count, duration, exact, several, size, table};
use crate::control::desired::Origin;
use crate::control::report::{
    Direction, DropReport, FdbReport, LogReport, LoopReport, MoveReport, NetworkReport, PortReport, PortState,
    ShardReport, StatusReport,
};
use crate::host::cpu_plan::{CpuPlan, CpuUse, Role};

/// `linecard status`.
pub(super) fn status(status: &StatusReport) -> String {
    let frames = &status.frames;
    let mut text = format!("linecardd {} runs since {}", status.version, duration(status.uptime_seconds));
    text += &format!(" (pid {}), configured by {}\n\n", status.pid, status.config);
    let stopped = status.ports_stopped.len();
    let rows = [
        ("ports", format!("{} up, {} down, {stopped} stopped", status.ports_up, status.ports_down)),
        ("networks", format!("{}, {} known", status.networks, several(status.fdb.entries, "station"))),
        ("shards", status.shards.to_string()),
        ("received", received(frames.rx_frames, frames.rx_delivered, frames.rx_dropped)),
        ("given", format!("{} frames, {} dropped on the way", exact(frames.tx_frames), exact(frames.tx_dropped))),
    ];
    text += &table(&[], &[], rows.into_iter().map(|(key, value)| vec![key.into(), value]));
    if stopped > 0 {
        text += &format!("\nstopped: {}; `linecard port show NAME` says why\n", status.ports_stopped.join(", "));
    }
    if let Some(refused) = &status.refused {
        text += &format!("\nthe last configuration was refused: {refused}\n");
    }
    for LoopReport { network, ports, stations } in &status.loops {
        let (ports, stations) =
            (ports.join(" and "), several(usize::try_from(*stations).unwrap_or(usize::MAX), "station"));
        text += &format!(
            "\nnetwork {network}: ports {ports} seem to be connected to each other ({stations} seen at both)\n"
        );
    }
    let LogReport { lines_lost, stuck } = status.log;
    if stuck || lines_lost > 0 {
        let reads = if stuck { "reads" } else { "read" };
        text += &format!(
            "\nnobody {reads} the log: {} lost so far\n",
            several(lines_lost.try_into().unwrap_or(usize::MAX), "line")
        );
    }
    for change in &status.restart_needed {
        text += &format!("\n{} has changed in the file: restart linecardd for it\n", change.key);
    }
    text
}

/// Received frames as the sum they are.
pub(super) fn received(frames: u64, delivered: u64, dropped: u64) -> String {
    format!("{} frames = {} delivered + {} dropped", exact(frames), exact(delivered), exact(dropped))
}

/// `linecard port list`.
pub(super) fn ports(ports: &[PortReport]) -> String {
    let header =
        ["NAME", "KIND", "NETWORK", "STATE", "RX FRAMES", "RX BYTES", "DROPPED", "TX FRAMES", "TX BYTES", "WHY"];
    let row = |port: &PortReport| {
        let counters = &port.counters;
        vec![
            port.name.clone(),
            port.kind.clone().unwrap_or_else(|| "-".into()),
            port.network.clone().unwrap_or_else(|| "-".into()),
            state(port.state).into(),
            count(counters.rx_frames),
            size(counters.rx_bytes),
            count(counters.rx_dropped + counters.tx_dropped),
            count(counters.tx_frames),
            size(counters.tx_bytes),
            port.reason.clone().unwrap_or_default(),
        ]
    };
    or("no ports", ports.len(), || table(&header, &[4, 5, 6, 7, 8], ports.iter().map(row)))
}

/// A state in a word.
pub(super) fn state(state: PortState) -> &'static str {
    match state {
        PortState::Up => "up",
        PortState::Down => "down",
        PortState::Stopped => "stopped",
    }
}

/// Who asked for a port, after "made".
pub(super) fn origin(origin: Origin) -> &'static str {
    match origin {
        Origin::File => "by the configuration file",
        Origin::RunTime => "at run time",
    }
}

/// `linecard network list`.
pub(super) fn networks(networks: &[NetworkReport]) -> String {
    let row = |network: &NetworkReport| {
        let stations = format!("{} of {}", network.fdb_entries, network.mac_limit);
        let refused = count(network.macs_refused.values().sum());
        vec![network.name.clone(), stations, refused, duration(network.mac_age_seconds), network.ports.join(" ")]
    };
    or("no networks", networks.len(), || {
        table(&["NAME", "STATIONS", "REFUSED", "MAC AGE", "PORTS"], &[1, 2], networks.iter().map(row))
    })
}

/// `linecard fdb list`.
pub(super) fn fdb(entries: &[FdbReport]) -> String {
    let row = |entry: &FdbReport| {
        let idle = entry.idle_seconds.map_or_else(|| "pinned".into(), duration);
        vec![entry.network.clone(), entry.mac.clone(), entry.port.clone(), idle, entry.also_at.join(" ")]
    };
    or("no stations are known", entries.len(), || {
        table(&["NETWORK", "MAC", "PORT", "SILENT FOR", "SEEN AT"], &[], entries.iter().map(row))
    })
}

/// `linecard shard list`.
pub(super) fn shards(shards: &[ShardReport]) -> String {
    let header = ["CPU", "SERVES", "QUEUES", "BUSY %", "IDLE %", "POLLING %", "FRAMES", "FRAMES/BATCH", "CYCLES/FRAME"];
    let shared = if shards.iter().any(|shard| shard.exclusive) { "all but high" } else { "all" };
    let row = |shard: &ShardReport| {
        vec![
            shard.cpu.to_string(),
            if shard.exclusive { "high only" } else { shared }.into(),
            shard.queues.to_string(),
            format!("{:.1}", shard.busy_percent),
            format!("{:.1}", shard.idle_percent),
            format!("{:.1}", shard.poll_percent),
            count(shard.frames),
            format!("{:.1}", shard.frames_per_batch),
            format!("{:.0}", shard.cycles_per_frame),
        ]
    };
    let mut text = table(&header, &[0, 2, 3, 4, 5, 6, 7, 8], shards.iter().map(row));
    for shard in shards {
        let (cpu, times, stuck) = (shard.cpu, shard.held_up, shard.stuck);
        if times > 0 {
            text += &format!("\nCPU {cpu}: a VM's memory held the shard up {times} times, and {stuck} threads now\n");
        }
        if let Some(reason) = &shard.chosen {
            text += &format!("\nshards.cpus is auto: CPU {} is {reason}\n", shard.cpu);
        }
    }
    text
}

/// `linecard shard moves`.
pub(super) fn moves(moves: &[MoveReport]) -> String {
    let header = ["AGO", "PORT", "QUEUES", "FROM CPU", "TO CPU", "FRAMES WAITED"];
    let row = |moved: &MoveReport| {
        vec![
            duration(moved.seconds_ago),
            moved.port.clone(),
            moved.queues.to_string(),
            moved.from.to_string(),
            moved.to.to_string(),
            format!("{} us", moved.delay_micros),
        ]
    };
    or("nothing was moved", moves.len(), || table(&header, &[2, 3, 4, 5], moves.iter().map(row)))
}

/// `linecard cpu plan`.
pub(super) fn cpus(plan: &CpuPlan) -> String {
    let row = |cpu: &CpuUse| {
        let role = match cpu.role {
            Role::Shared => "shard",
            Role::Exclusive => "shard for high",
            Role::Others => "guests, host",
            Role::Barred => "-",
        };
        let queues = |(port, queues): (&String, &usize)| format!("{port} ({})", several(*queues, "queue"));
        let ports = cpu.ports.iter().map(queues).collect::<Vec<_>>().join(", ");
        vec![cpu.cpu.to_string(), cpu.node.to_string(), cpu.siblings.clone(), role.into(), ports, cpu.why.clone()]
    };
    let header = ["CPU", "NODE", "SAME CORE", "FOR", "PORTS", "WHY"];
    let mut text = table(&header, &[0, 1], plan.cpus.iter().map(row));
    text += "\nas seen from this shell; ports made at run time are not in the file\n";
    for remark in &plan.remarks {
        text += &format!("\n! {remark}\n");
    }
    text
}

/// `linecard drops`.
pub(super) fn drops(drops: &[DropReport]) -> String {
    let row =
        |drop: &DropReport| vec![exact(drop.count), drop.port.clone(), way(drop.direction).into(), drop.reason.clone()];
    if drops.is_empty() {
        return "nothing was dropped\n".into();
    }
    let mut text = table(&["FRAMES", "PORT", "WAY", "REASON"], &[0], drops.iter().map(row));
    let mut told: Vec<&str> = Vec::new();
    for drop in drops {
        if !told.contains(&drop.reason.as_str()) {
            told.push(&drop.reason);
            text += &format!("\n{}: {}\n  {}\n", drop.reason, drop.meaning, drop.advice);
        }
    }
    text
}

fn way(direction: Direction) -> &'static str {
    match direction {
        Direction::Rx => "from it",
        Direction::Tx => "to it",
    }
}

fn or(nothing: &str, count: usize, text: impl FnOnce() -> String) -> String {
    if count == 0 { format!("{nothing}\n") } else { text() }
}
