//! `generator bench`: every row that docs/performance.md shows, Linecard and its peers taking turns, written as JSON, tables
//! and plots.
//!
//! Machines that this runs on are noisy. What is compared is therefore measured in turns (A B A B ...), and a ratio is that
//! of one round's two figures; medians and the spread of all rounds are shown.

mod control;
mod guests;
mod machine;
mod quiet;
mod traffic;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub use machine::Machine;

use crate::frames::Sizes;
use crate::measure::{Kind, MeasureError, Scenario};
use crate::nic::Settings;
use crate::ring::Habit;
use crate::switch::{LinecardSetup, Wiring};

/// The rows of a group.
type Measure = fn(&Plan, &mut dyn FnMut(&str)) -> Result<Vec<Row>, MeasureError>;

/// Every group but latency, whose rows are of another kind.
const GROUPS: [(Group, Measure); 9] = [
    (Group::Forwarding, traffic::forwarding),
    (Group::Rings, traffic::rings),
    (Group::Ports, traffic::ports),
    (Group::Addresses, traffic::addresses),
    (Group::Shards, traffic::shards),
    (Group::Idle, control::idle),
    (Group::Start, control::start),
    (Group::Restart, control::restart),
    (Group::Guests, guests::tcp),
];

/// Rows that are measured together and make a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// VM to VM, by size.
    Forwarding,
    /// Forms of ring and habits of drivers.
    Rings,
    /// Busy ports on one CPU.
    Ports,
    /// Addresses in the forwarding table.
    Addresses,
    /// CPUs.
    Shards,
    /// Guests that do nothing.
    Idle,
    /// Start, and a reload.
    Start,
    /// Killed under load.
    Restart,
    /// TCP between real guests.
    Guests,
    /// Round trips.
    Latency,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.to_possible_value().as_ref().map_or("", |value| value.get_name()))
    }
}

/// How much to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Rounds of each row.
    pub rounds: usize,
    /// Seconds of each turn.
    pub span: Duration,
    /// Fewer ports and addresses.
    pub short: bool,
    /// CPU of the switch.
    pub switch_cpu: usize,
    /// CPU of the generator.
    pub generator_cpu: usize,
    /// Where linecardd and linecard are.
    pub bin_dir: PathBuf,
    /// Only these groups; all if empty.
    pub only: Vec<Group>,
}

/// One quantity of one piece of work, by every switch that does it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Row {
    /// Where it belongs.
    pub group: Group,
    /// The work.
    pub name: String,
    /// Where it stands on a plot's axis.
    pub at: f64,
    /// What the numbers are.
    pub unit: String,
    /// What is asked of Linecard, for the reader.
    pub target: Option<String>,
    /// Each switch's figures, one for each round.
    pub turns: BTreeMap<Kind, Vec<f64>>,
    /// What stands behind them.
    pub detail: BTreeMap<Kind, Vec<Detail>>,
    /// Why there are none, or what to know about them.
    pub note: Option<String>,
}

/// What stands behind a figure of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Detail {
    /// Gbit/s of frames.
    pub gbps: f64,
    /// The switch's cycles per frame while it had work.
    pub cycles_per_frame: Option<f64>,
    /// The share of time the switch had work, in percent.
    pub busy_percent: Option<f64>,
    /// The generator's own cycles per frame.
    pub generator_cycles: f64,
    /// And its share of time, in percent.
    pub generator_busy_percent: f64,
    /// Frames taken and not brought, in percent.
    pub lost_percent: f64,
}

/// Round trips through one switch, as it is set up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TripRow {
    /// What goes on: `in flight`, `1 kHz`, `1 kHz under load`, `1 kHz, interrupts`.
    pub work: String,
    /// The switch and its level.
    pub who: String,
    /// Which switch.
    pub kind: Kind,
    /// Round trips that were timed.
    pub count: usize,
    /// Frames that did not come back.
    pub lost: u64,
    /// Microseconds: median, p99, p99.9, longest.
    pub median: f64,
    /// See `median`.
    pub p99: f64,
    /// See `median`.
    pub p999: f64,
    /// See `median`.
    pub max: f64,
    /// For a plot: the range of each of sixty spans of time, as lowest, median, highest, in microseconds.
    pub jitter: Vec<[f64; 3]>,
}

/// How a group was measured; groups of one file need not be of one run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Run {
    /// Rounds of each row.
    pub rounds: usize,
    /// Seconds of each turn.
    pub seconds: f64,
    /// How many CPUs were in use in the second before, by others. Older results have the load average instead.
    #[serde(alias = "load-average")]
    pub cpus_in_use: f64,
}

/// CPUs in use from which figures are of other work as well.
const BUSY: f64 = 0.25;

impl Run {
    /// Whether others were at work.
    pub fn was_busy(&self) -> bool {
        self.cpus_in_use > BUSY
    }
}

/// A group that could not be measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Failure {
    /// Which.
    pub group: Group,
    /// And why not.
    pub why: String,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Results {
    /// Where and with what.
    pub machine: Machine,
    /// How each group was measured.
    pub runs: BTreeMap<Group, Run>,
    /// All but latency.
    pub rows: Vec<Row>,
    /// Latency.
    pub trips: Vec<TripRow>,
    /// Groups that could not be measured, and why.
    pub failures: Vec<Failure>,
}

impl Results {
    /// Takes what `older` has of groups that were not measured now.
    pub fn merge(&mut self, older: Self) {
        let kept = |group: &Group| !self.runs.contains_key(group);
        let rows = older.rows.into_iter().filter(|row| kept(&row.group));
        let failures = older.failures.into_iter().filter(|failure| kept(&failure.group));
        let trips = if kept(&Group::Latency) { older.trips } else { Vec::new() };
        let runs: Vec<_> = older.runs.into_iter().filter(|(group, _)| kept(group)).collect();
        self.rows.extend(rows);
        self.rows.sort_by_key(|row| row.group);
        self.trips.extend(trips);
        self.failures.extend(failures);
        self.failures.sort_by_key(|failure| failure.group);
        self.runs.extend(runs);
    }

    /// Measures a group; one that fails does not take hours of others with it.
    fn note_failure(
        &mut self,
        group: Group,
        measure: impl FnOnce(&mut Self) -> Result<(), MeasureError>,
    ) -> Result<(), MeasureError> {
        match measure(self) {
            Err(MeasureError::Interrupted) => Err(MeasureError::Interrupted),
            Err(error) => {
                self.failures.push(Failure { group, why: error.chain() });
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// Middle and ends of some figures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of `figures`; `None` if there are none.
    pub fn of(figures: &[f64]) -> Option<Self> {
        let mut sorted = figures.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Some(Self { median: (low + high) / 2.0, min, max })
    }
}

impl Row {
    /// A row without figures yet.
    pub(crate) fn new(group: Group, name: impl Into<String>, at: f64, unit: &str) -> Self {
        Self {
            group,
            name: name.into(),
            at,
            unit: unit.into(),
            target: None,
            turns: BTreeMap::new(),
            detail: BTreeMap::new(),
            note: None,
        }
    }

    fn target(self, target: &str) -> Self {
        Self { target: Some(target.into()), ..self }
    }

    /// The spread of `kind`'s figures.
    pub fn spread(&self, kind: Kind) -> Option<Spread> {
        Spread::of(self.turns.get(&kind)?)
    }

    /// Linecard's figure to `peer`'s, round by round.
    pub fn ratio(&self, peer: Kind) -> Option<Spread> {
        let (ours, theirs) = (self.turns.get(&Kind::Linecard)?, self.turns.get(&peer)?);
        Spread::of(&ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>())
    }
}

impl Plan {
    /// Measures all of it; `tell` hears what is being done.
    pub fn run(&self, tell: &mut dyn FnMut(&str)) -> Result<Results, MeasureError> {
        let mut results = Results {
            machine: Machine::look(&self.bin_dir)?,
            runs: BTreeMap::new(),
            rows: Vec::new(),
            trips: Vec::new(),
            failures: Vec::new(),
        };
        for (group, measure) in GROUPS {
            if self.wants(group) {
                results.runs.insert(group, self.begin(group, tell));
                results.note_failure(group, |results| {
                    results.rows.extend(measure(self, tell)?);
                    Ok(())
                })?;
            }
        }
        if self.wants(Group::Latency) {
            results.runs.insert(Group::Latency, self.begin(Group::Latency, tell));
            results.note_failure(Group::Latency, |results| {
                results.trips = quiet::trips(self, tell)?;
                Ok(())
            })?;
        }
        Ok(results)
    }

    /// How `group` is going to be measured, and beside what; to be called while nothing of ours runs.
    fn begin(&self, group: Group, tell: &mut dyn FnMut(&str)) -> Run {
        let cpus_in_use = machine::cpus_in_use();
        let run = Run { rounds: self.rounds, seconds: self.span.as_secs_f64(), cpus_in_use };
        if run.was_busy() {
            tell(&format!("{group}: others use {cpus_in_use} CPUs, so its figures will say little"));
        }
        run
    }

    fn wants(&self, group: Group) -> bool {
        self.only.is_empty() || self.only.contains(&group)
    }

    /// Two ports, one queue, split rings of 1024, 64 B: what rows differ from.
    fn scenario(&self) -> Scenario {
        Scenario {
            nic: Settings {
                queues: 1,
                ring: 1024,
                packed: false,
                in_order: false,
                mergeable: true,
                habit: Habit::Recycle,
                sizes: Sizes::Fixed(64),
                huge: true,
            },
            wiring: Wiring {
                ports: 2,
                queues: 1,
                stations: None,
                cpus: vec![self.switch_cpu],
                longest: 1518,
                offloads: false,
            },
            linecard: LinecardSetup { spare: self.generator_cpu, ..LinecardSetup::default() },
            bin_dir: self.bin_dir.clone(),
            cpu: self.generator_cpu,
            warm_up: self.span.mul_f64(0.25).max(Duration::from_millis(300)),
            span: self.span,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_rounds() {
        let mut row = Row::new(Group::Rings, "n", 0.0, "u");
        assert_eq!(row.ratio(Kind::Ovs), None);
        row.turns.insert(Kind::Linecard, vec![10.0, 1.0, 6.0]);
        row.turns.insert(Kind::Ovs, vec![5.0, 1.0, 2.0]);
        assert_eq!(row.ratio(Kind::Ovs), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(row.spread(Kind::Linecard), Some(Spread { median: 6.0, min: 1.0, max: 10.0 }));
        assert_eq!(Spread::of(&[1.0, 2.0]), Some(Spread { median: 1.5, min: 1.0, max: 2.0 }));
    }

    #[test]
    fn groups_that_were_measured_now_replace_the_older_ones() {
        let results = |groups: &[Group], rounds| Results {
            machine: Machine::default(),
            runs: groups.iter().map(|&group| (group, Run { rounds, seconds: 1.0, cpus_in_use: 0.0 })).collect(),
            rows: groups.iter().map(|&group| Row::new(group, format!("{rounds}"), 0.0, "u")).collect(),
            trips: Vec::new(),
            failures: groups.iter().map(|&group| Failure { group, why: format!("{rounds}") }).collect(),
        };
        let mut now = results(&[Group::Rings, Group::Idle], 1);
        now.merge(results(&[Group::Forwarding, Group::Rings, Group::Latency], 5));
        let expected = [(Group::Forwarding, 5), (Group::Rings, 1), (Group::Idle, 1), (Group::Latency, 5)];
        let rows: Vec<_> = now.rows.iter().map(|row| (row.group, row.name.parse().unwrap_or(0))).collect();
        let failures: Vec<_> = now.failures.iter().map(|row| (row.group, row.why.parse().unwrap_or(0))).collect();
        let runs: Vec<_> = now.runs.iter().map(|(&group, run)| (group, run.rounds)).collect();
        assert_eq!((rows.as_slice(), failures.as_slice()), (&expected[..], &expected[..]));
        assert_eq!(runs, expected);
    }
}
