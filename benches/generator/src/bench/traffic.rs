//! Rows whose figure is frames per second, or what one costs.

use super::{Detail, Group, Plan, Row};
use crate::frames::Sizes;
use crate::measure::{Kind, MeasureError, Outcome, Scenario};

const BOTH: [Kind; 2] = [Kind::Linecard, Kind::Ovs];
const ALL: [Kind; 3] = [Kind::Linecard, Kind::Ovs, Kind::Cable];

type Rows = Result<Vec<Row>, MeasureError>;
type Tell<'a> = &'a mut dyn FnMut(&str);

/// VM to VM, by size.
pub(super) fn forwarding(plan: &Plan, tell: Tell<'_>) -> Rows {
    let sizes = [
        (Sizes::Fixed(64), Some("at least 3x OVS, at most 60 cycles")),
        (Sizes::Fixed(128), None),
        (Sizes::Fixed(256), None),
        (Sizes::Fixed(512), Some("at least 1.8x OVS")),
        (Sizes::Fixed(1024), None),
        (Sizes::Fixed(1514), Some("at least 1.6x OVS, not under the cable")),
        (Sizes::Fixed(4096), None),
        (Sizes::Fixed(9000), None),
        (Sizes::Imix, None),
    ];
    let short = [64, 512, 1514].map(Sizes::Fixed);
    let mut rows = Vec::new();
    for (sizes, target) in sizes.into_iter().filter(|(sizes, _)| !plan.short || short.contains(sizes)) {
        let mut scenario = plan.scenario();
        scenario.nic.sizes = sizes;
        scenario.wiring.longest = sizes.longest();
        let name = if sizes == Sizes::Imix { "IMIX".into() } else { format!("{sizes} B") };
        let target = target.map(String::from);
        let row = Row { target, ..Row::new(Group::Forwarding, name, sizes.mean(), "Mpps") };
        rows.push(turns(plan, row, &scenario, &ALL, tell)?);
    }
    Ok(rows)
}

/// Forms of ring and habits of drivers, at 64 B.
pub(super) fn rings(plan: &Plan, tell: Tell<'_>) -> Rows {
    use crate::ring::Habit::{Recycle, Rewrite};
    let forms = [
        ("split, descriptors written again", false, false, true, Rewrite),
        ("split, in order", false, true, true, Recycle),
        ("split, not mergeable", false, false, false, Recycle),
        ("packed", true, false, true, Recycle),
        ("packed, in order", true, true, true, Recycle),
    ];
    let mut rows = Vec::new();
    for (at, (name, packed, in_order, mergeable, habit)) in forms.into_iter().enumerate() {
        let mut scenario = plan.scenario();
        scenario.nic = crate::nic::Settings { packed, in_order, mergeable, habit, ..scenario.nic };
        rows.push(turns(plan, Row::new(Group::Rings, name, at as f64, "Mpps"), &scenario, &BOTH, tell)?);
    }
    Ok(rows)
}

/// Busy ports on one CPU.
pub(super) fn ports(plan: &Plan, tell: Tell<'_>) -> Rows {
    let counts: &[usize] = if plan.short { &[2, 16] } else { &[2, 4, 8, 16, 32, 64] };
    let mut rows = Vec::new();
    for &count in counts {
        let mut scenario = plan.scenario();
        scenario.wiring.ports = count;
        scenario.nic.ring = 256;
        let mut row = Row::new(Group::Ports, format!("{count} ports"), count as f64, "Mpps");
        if count == 64 {
            row = row.target("at most 1.3x the cycles of 2 ports");
        }
        rows.push(turns(plan, row, &scenario, &BOTH, tell)?);
    }
    Ok(rows)
}

/// Addresses in the forwarding table; the driver writes those of every frame, for two as well.
pub(super) fn addresses(plan: &Plan, tell: Tell<'_>) -> Rows {
    let counts: &[u32] = if plan.short { &[2, 1 << 12] } else { &[2, 1 << 8, 1 << 12, 1 << 16, 1 << 20] };
    let mut rows = Vec::new();
    for &count in counts {
        let mut scenario = plan.scenario();
        scenario.wiring.stations = Some(count / 2);
        let name = if count >= 1 << 20 { "1 M addresses".into() } else { format!("{count} addresses") };
        let mut row = Row::new(Group::Addresses, name, f64::from(count), "Mpps");
        let mut kinds = BOTH.to_vec();
        if count == 1 << 20 {
            row = row.target("at most 2x the cycles of 2 addresses");
        }
        if count > 1 << 16 {
            // It sends each new pair of addresses to its slow path, some 50 us a piece, and keeps 200,000 flows.
            kinds.retain(|&kind| kind != Kind::Ovs);
            row.note = Some("Open vSwitch keeps at most 200,000 flows: not run".into());
        }
        rows.push(turns(plan, row, &scenario, &kinds, tell)?);
    }
    Ok(rows)
}

/// Two CPUs for the switch beside one, where the generator has one of its own as well.
pub(super) fn shards(plan: &Plan, tell: Tell<'_>) -> Rows {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let others: Vec<_> = (0..cpus).filter(|&cpu| cpu != plan.switch_cpu && cpu != plan.generator_cpu).collect();
    let mut rows = Vec::new();
    for count in [1, 2] {
        let mut scenario = plan.scenario();
        scenario.wiring.ports = 8;
        scenario.nic.ring = 256;
        let mut row = Row::new(Group::Shards, format!("8 ports, {count} CPU"), count as f64, "Mpps");
        if count == 2 {
            row = row.target("at least 1.8x one CPU");
            let Some(&second) = others.first() else {
                row.note = Some(format!("not measured: this machine has {cpus} CPUs, and the generator needs one"));
                rows.push(row);
                continue;
            };
            scenario.wiring.cpus.push(second);
        }
        rows.push(turns(plan, row, &scenario, &BOTH, tell)?);
    }
    Ok(rows)
}

/// All switches in turn, round by round. One that cannot do the work is left out, with a note.
fn turns(plan: &Plan, mut row: Row, scenario: &Scenario, kinds: &[Kind], tell: Tell<'_>) -> Result<Row, MeasureError> {
    let mut out = Vec::new();
    for round in 1..=plan.rounds {
        for &kind in kinds {
            if out.contains(&kind) {
                continue;
            }
            match scenario.run(kind) {
                Ok(outcome) => {
                    row.turns.entry(kind).or_default().push(outcome.load.mpps());
                    row.detail.entry(kind).or_default().push(detail(&outcome, scenario.nic.sizes));
                    tell(&line(&row, round, kind, &outcome));
                }
                Err(error) if error.is_features() || kind != Kind::Linecard => {
                    if matches!(error, MeasureError::Interrupted) {
                        return Err(error);
                    }
                    out.push(kind);
                    let why = if error.is_features() { "does not offer it".into() } else { error.chain() };
                    tell(&format!("{} {}, {kind}: {why}", row.group, row.name));
                    row.note = Some(format!("{kind} {why}"));
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(row)
}

fn line(row: &Row, round: usize, kind: Kind, outcome: &Outcome) -> String {
    let cycles = outcome.switch.map(|sample| format!(", {:.1} cycles", sample.cycles_per_frame()));
    format!(
        "{} {}, round {round}, {kind}: {:.2} Mpps{}",
        row.group,
        row.name,
        outcome.load.mpps(),
        cycles.unwrap_or_default()
    )
}

fn detail(outcome: &Outcome, sizes: Sizes) -> Detail {
    Detail {
        gbps: outcome.load.mpps() * sizes.mean() * 8.0 / 1e3,
        cycles_per_frame: outcome.switch.map(|sample| sample.cycles_per_frame()),
        busy_percent: outcome.switch.map(|sample| sample.busy_percent()),
        generator_cycles: outcome.load.cycles_per_frame(),
        generator_busy_percent: outcome.load.busy_percent(),
        lost_percent: outcome.load.lost_percent(),
    }
}
