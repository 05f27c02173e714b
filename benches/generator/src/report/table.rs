//! Results as Markdown tables, one for each group.

use std::fmt::Write as _;

use crate::bench::{Detail, Group, Results, Row, Spread};
use crate::measure::Kind;

const GROUPS: [(Group, &str); 9] = [
    (Group::Forwarding, "VM to VM, by frame size"),
    (Group::Rings, "Forms of ring, 64 B"),
    (Group::Ports, "Busy ports on one CPU, 64 B"),
    (Group::Addresses, "Addresses in the forwarding table, 64 B"),
    (Group::Shards, "CPUs"),
    (Group::Idle, "Idle"),
    (Group::Start, "Start and reload"),
    (Group::Restart, "Restart under load"),
    (Group::Guests, "TCP between Linux guests, offloads passed whole"),
];

/// All tables, with what they were made on.
pub(super) fn tables(results: &Results) -> String {
    let mut text = String::from("# Measured\n\nMade by `make bench`; results.json beside this has every figure.\n\n");
    text += &machine(results);
    text += "\nMedians, and the range of all rounds. Ratios are Linecard's figure to the peer's in the same round.\n";
    for (group, title) in GROUPS {
        let rows: Vec<_> = results.rows.iter().filter(|row| row.group == group).collect();
        if !rows.is_empty() {
            let _ = write!(text, "\n## {title}\n\n{}", rounds(results, group));
            text += &match group {
                Group::Guests => beside_all(&rows),
                _ if rows[0].unit == "Mpps" => traffic(&rows),
                _ => plain(&rows),
            };
        }
    }
    text += &latency(results);
    for failure in &results.failures {
        let _ = writeln!(text, "\nNot measured: {}: {}", failure.group, failure.why);
    }
    text
}

/// How often a group was measured, and for how long.
fn rounds(results: &Results, group: Group) -> String {
    let run = results.runs.get(&group);
    run.map(|run| format!("Rounds: {}, of {} s each.\n\n", run.rounds, run.seconds)).unwrap_or_default()
}

fn machine(results: &Results) -> String {
    let machine = &results.machine;
    let kind = if machine.is_virtual { "virtual machine" } else { "machine" };
    let mut text = format!(
        "{}; {} CPUs of a {kind}, {:.2} GHz time stamp counter, {} GiB, Linux {}.\n",
        machine.processor, machine.cpus, machine.ghz, machine.memory, machine.kernel
    );
    let busy: Vec<_> = results.runs.iter().filter(|(_, run)| run.was_busy()).collect();
    if !busy.is_empty() {
        let groups: Vec<_> = busy.iter().map(|(group, run)| format!("{group} ({:.1})", run.cpus_in_use)).collect();
        let _ = writeln!(
            text,
            "\n**The machine was busy with other work just before these were measured (CPUs in use), and their figures say little: {}.**\n",
            groups.join(", ")
        );
    }
    for (kind, version) in &machine.versions {
        let _ = writeln!(text, "- {}: {version}", name(*kind));
    }
    text
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Linecard => "Linecard",
        Kind::Ovs => "Open vSwitch with DPDK",
        Kind::Cable => "patch cable (testpmd, io)",
    }
}

/// Rows in Mpps, with cycles and shares.
fn traffic(rows: &[&Row]) -> String {
    let cable = rows.iter().any(|row| row.turns.contains_key(&Kind::Cable));
    let mut text =
        String::from("| work | Linecard Mpps | Gbit/s | cycles | busy | Open vSwitch Mpps | cycles | to OVS |");
    text += if cable { " cable Mpps | to the cable |" } else { "" };
    text += " generator | target |\n|---|---|---|---|---|---|---|---|---|---|";
    text += if cable { "---|---|\n" } else { "\n" };
    for row in rows {
        let middle = |kind: Kind, of: fn(&Detail) -> Option<f64>| {
            let figures: Vec<_> = row.detail.get(&kind).into_iter().flatten().filter_map(of).collect();
            Spread::of(&figures).map(|spread| spread.median)
        };
        let mut cells = vec![
            row.name.clone(),
            range(row.spread(Kind::Linecard), 2),
            number(middle(Kind::Linecard, |detail| Some(detail.gbps)), 1),
            number(middle(Kind::Linecard, |detail| detail.cycles_per_frame), 0),
            percent(middle(Kind::Linecard, |detail| detail.busy_percent)),
            range(row.spread(Kind::Ovs), 2),
            number(middle(Kind::Ovs, |detail| detail.cycles_per_frame), 0),
            range(row.ratio(Kind::Ovs), 2),
        ];
        if cable {
            cells.extend([range(row.spread(Kind::Cable), 2), range(row.ratio(Kind::Cable), 2)]);
        }
        let generator = middle(Kind::Linecard, |detail| Some(detail.generator_cycles));
        let share = middle(Kind::Linecard, |detail| Some(detail.generator_busy_percent));
        cells.push(format!("{} cycles, {}", number(generator, 1), percent(share)));
        cells.push(row.target.clone().unwrap_or_default());
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text + &notes(rows)
}

/// Rows of anything else.
fn plain(rows: &[&Row]) -> String {
    let mut text = String::from("| work | unit | Linecard | Open vSwitch | target |\n|---|---|---|---|---|\n");
    for row in rows {
        let digits = if row.unit == "ms" { 1 } else { 2 };
        let (ours, theirs) = (range(row.spread(Kind::Linecard), digits), range(row.spread(Kind::Ovs), digits));
        let target = row.target.as_deref().unwrap_or_default();
        let _ = writeln!(text, "| {} | {} | {ours} | {theirs} | {target} |", row.name, row.unit);
    }
    text + &notes(rows)
}

/// Rows of guests, which every switch connects.
fn beside_all(rows: &[&Row]) -> String {
    let mut text = String::from(
        "| work | unit | Linecard | Open vSwitch | to OVS | cable | to the cable | target |\n|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let [ours, ovs, cable] = [Kind::Linecard, Kind::Ovs, Kind::Cable].map(|kind| range(row.spread(kind), 0));
        let [to_ovs, to_cable] = [Kind::Ovs, Kind::Cable].map(|peer| range(row.ratio(peer), 2));
        let target = row.target.as_deref().unwrap_or_default();
        let cells = [&row.name, &row.unit, &ours, &ovs, &to_ovs, &cable, &to_cable, target];
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text + &notes(rows)
}

fn notes(rows: &[&Row]) -> String {
    let notes = rows.iter().filter_map(|row| Some(format!("\n{}: {}.\n", row.name, row.note.as_ref()?)));
    notes.collect()
}

fn latency(results: &Results) -> String {
    let mut text = String::new();
    let mut works: Vec<_> = results.trips.iter().map(|row| row.work.as_str()).collect();
    works.dedup();
    for work in works {
        let _ = write!(
            text,
            "\n## Round trip A to B to A: {work}\n\n{}| switch | median us | p99 | p99.9 | max | round trips | lost |\n\
             |---|---|---|---|---|---|---|\n",
            rounds(results, Group::Latency)
        );
        for row in results.trips.iter().filter(|row| row.work == work) {
            let _ = writeln!(
                text,
                "| {} | {:.2} | {:.2} | {:.2} | {:.1} | {} | {} |",
                row.who, row.median, row.p99, row.p999, row.max, row.count, row.lost
            );
        }
    }
    text
}

fn range(spread: Option<Spread>, digits: usize) -> String {
    match spread {
        Some(Spread { median, min, max }) if min == max => format!("{median:.digits$}"),
        Some(Spread { median, min, max }) => format!("**{median:.digits$}** ({min:.digits$}–{max:.digits$})"),
        None => "–".into(),
    }
}

fn number(figure: Option<f64>, digits: usize) -> String {
    figure.map_or("–".into(), |figure| format!("{figure:.digits$}"))
}

fn percent(figure: Option<f64>) -> String {
    figure.map_or("–".into(), |figure| format!("{figure:.0} %"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_shown_where_there_is_one() {
        let spread = |min, max| Some(Spread { median: 2.0, min, max });
        assert_eq!(range(spread(1.0, 3.0), 1), "**2.0** (1.0–3.0)");
        assert_eq!(range(spread(2.0, 2.0), 0), "2");
        assert_eq!(range(None, 0), "–");
    }
}
