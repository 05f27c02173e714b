//! What the API says: plain data, written by the daemon and read by the command line, so both agree by construction.
//!
//! "rx" is what the switch received from a port, "tx" what it gave to it. These types are the API: a field is added when
//! it is needed and never renamed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::desired::Origin;
use super::diff::Change;
use crate::config::{Offloads, StormRate, StormRates};
use crate::ident::{Affinity, Compat, LatencySensitivity};

/// The daemon as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct StatusReport {
    /// Version of the daemon.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// The configuration file.
    pub config: String,
    /// How often a configuration has been applied, the first time included.
    pub generation: u64,
    /// Why the last configuration was refused; nothing if it was applied.
    pub refused: Option<String>,
    /// Settings that the applied file has and the daemon takes up only when it is started again.
    pub restart_needed: Vec<Change>,
    /// Networks.
    pub networks: usize,
    /// Ports that carry frames.
    pub ports_up: usize,
    /// Ports that wait for their far end.
    pub ports_down: usize,
    /// Ports that were stopped, by name.
    pub ports_stopped: Vec<String>,
    /// Worker threads.
    pub shards: usize,
    /// The FDB.
    pub fdb: FdbTotals,
    /// Ports that seem to be connected to each other.
    #[serde(default)]
    pub loops: Vec<LoopReport>,
    /// Frames of all ports together.
    pub frames: FrameTotals,
    /// The log.
    #[serde(default)]
    pub log: LogReport,
}

/// What became of what the daemon had to say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct LogReport {
    /// Lines that were lost because nobody read the log.
    pub lines_lost: u64,
    /// Whether it is stuck: lines wait, and none was written for more than a second.
    pub stuck: bool,
}

/// Sums over ports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FrameTotals {
    /// Frames received: those delivered and those dropped.
    pub rx_frames: u64,
    /// Received frames that reached at least one port.
    pub rx_delivered: u64,
    /// Received frames that reached none.
    pub rx_dropped: u64,
    /// Frames given to ports.
    pub tx_frames: u64,
    /// Copies that were meant for a port and did not reach it.
    pub tx_dropped: u64,
}

/// What happened in the FDB since the daemon started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FdbTotals {
    /// Entries now, learned and pinned.
    pub entries: usize,
    /// Stations learned.
    pub learned: u64,
    /// Stations forgotten because they were silent for too long.
    pub aged: u64,
    /// Moves of a station from one port to another.
    pub moved: u64,
    /// Moves not followed because the station had moved too often.
    pub damped: u64,
    /// Stations not learned because of a port's or a network's limit.
    pub refused: u64,
    /// Stations not learned for want of room.
    pub full: u64,
}

/// Two ports that seem to be connected to each other by their far ends: what goes out at one comes in at the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct LoopReport {
    /// The network.
    pub network: String,
    /// The ports.
    pub ports: Vec<String>,
    /// How many stations were seen at both.
    pub stations: u64,
}

/// Why frames of a station are dropped where they come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ConflictReason {
    /// Its address was seen at several ports in turn too often.
    Damped,
    /// Its address is configured for another port.
    Pinned,
}

/// A station whose address is seen at a port where it is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ConflictReport {
    /// The address.
    pub mac: String,
    /// Why it is not believed to be there.
    pub reason: ConflictReason,
    /// Where it is seen.
    pub port: String,
    /// Where it stays.
    pub stays_at: String,
    /// How often it was seen where it is not. Frames that follow each other with one source count once.
    pub count: u64,
    /// Seconds since the last time.
    pub seconds_ago: u64,
}

/// What a port has of `up`, `down` and `stopped`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PortState {
    /// It carries frames.
    Up,
    /// It waits for its far end.
    Down,
    /// Something is wrong with it.
    Stopped,
}

/// One port.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PortReport {
    /// Its name.
    pub name: String,
    /// What is at its far end, by its key in the file; nothing if what was asked for does not hold together.
    pub kind: Option<String>,
    /// Its network.
    pub network: Option<String>,
    /// The profile it names.
    pub profile: Option<String>,
    /// How much it minds delay.
    #[schema(value_type = String)]
    pub latency_sensitivity: LatencySensitivity,
    /// Which of its queues stay together on a shard.
    #[serde(default)]
    #[schema(value_type = String)]
    pub affinity: Affinity,
    /// The CPUs of the shards that serve its receive queues, ascending.
    #[serde(default)]
    pub cpus: Vec<u16>,
    /// The set of features that it offers, if its kind has features to offer.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub compat: Option<Compat>,
    /// How many frames in a second it may have flooded, by class; `off` for as many as it sends, `auto` for as many as it sends
    /// while it is not `in_loop`.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub storm: StormRates<StormRate>,
    /// Which offloads its far end is left with.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub offloads: Offloads<bool>,
    /// Largest IP packet, in bytes.
    pub mtu: Option<u16>,
    /// The station address behind it.
    pub mac: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Who asked for it.
    pub origin: Origin,
    /// Whether it carries frames.
    pub state: PortState,
    /// Why not.
    pub reason: Option<String>,
    /// Most addresses that are learned here (`limits.macs`).
    #[serde(default)]
    pub mac_limit: Option<u32>,
    /// How many there are.
    #[serde(default)]
    pub macs: u32,
    /// How often an address was not learned here, by what kept it from that: `port`, `network` or `host` for their limits, `place`
    /// until the FDB had grown. What did not occur is left out.
    #[serde(default)]
    pub macs_refused: BTreeMap<String, u64>,
    /// Addresses that are seen here and are another port's, and those of this one that are seen elsewhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conflicts: Vec<ConflictReport>,
    /// Whether it seems to be connected to another port of its network.
    #[serde(default)]
    pub in_loop: bool,
    /// What went through it since it was added.
    pub counters: CounterReport,
    /// The settings of its kind, as in the file.
    pub config: serde_json::Value,
    /// What its kind has to tell. Only for a single port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<serde_json::Value>,
}

/// What went through a port. At rest `rx_frames = rx_delivered + rx_dropped`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CounterReport {
    /// Frames received from the port.
    pub rx_frames: u64,
    /// Their bytes, without FCS.
    pub rx_bytes: u64,
    /// Those that reached at least one other port.
    pub rx_delivered: u64,
    /// Those that reached none.
    pub rx_dropped: u64,
    /// Frames received from the port that were several, to be segmented.
    #[serde(default)]
    pub rx_gso: u64,
    /// Bytes, without FCS, of the largest frame that exceeded the MTU, as long as it is on the wire; 0 if none did.
    #[serde(default)]
    pub mtu_exceeded_bytes: u64,
    /// Frames given to the port.
    pub tx_frames: u64,
    /// Their bytes, without FCS.
    pub tx_bytes: u64,
    /// Frames given to the port that were several and stayed so.
    #[serde(default)]
    pub tx_gso: u64,
    /// Frames given to the port as several, because it does not segment.
    #[serde(default)]
    pub tx_segmented: u64,
    /// Segments of those that found no buffer, while earlier ones of their frame did.
    #[serde(default)]
    pub tx_segments_dropped: u64,
    /// Frames given to the port with a checksum that was completed for it.
    #[serde(default)]
    pub tx_completed: u64,
    /// Frames given to the port as parts of larger ones.
    #[serde(default)]
    pub tx_merged: u64,
    /// Copies that were meant for the port and did not reach it.
    pub tx_dropped: u64,
    /// `rx_dropped` by reason; reasons that did not occur are left out.
    pub drops: BTreeMap<String, u64>,
    /// `tx_dropped` by reason.
    pub tx_drops: BTreeMap<String, u64>,
    /// Those of `drops` that came of `storm`, by class.
    #[serde(default)]
    pub storm_drops: BTreeMap<String, u64>,
}

/// One network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct NetworkReport {
    /// Its name.
    pub name: String,
    /// Seconds that a learned address lives without being heard.
    pub mac_age_seconds: u64,
    /// Most learned FDB entries, but for the first 16 of each port, which are learned in any case.
    pub mac_limit: u32,
    /// FDB entries now.
    pub fdb_entries: usize,
    /// How often an address was not learned at its ports, by what kept it from that, as `macs-refused` of ports.
    #[serde(default)]
    pub macs_refused: BTreeMap<String, u64>,
    /// Its ports, by name.
    pub ports: Vec<String>,
}

/// One FDB entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FdbReport {
    /// Its network.
    pub network: String,
    /// The station's address.
    pub mac: String,
    /// The port that leads there.
    pub port: String,
    /// Whether it was written in the configuration; else it was learned from frames.
    pub pinned: bool,
    /// Seconds since a frame came from the address; nothing for a pinned one.
    pub idle_seconds: Option<u64>,
    /// Whether it was seen at several ports in turn too often, so that its frames are dropped at others than `port`.
    #[serde(default)]
    pub damped: bool,
    /// The port where it was before it began to move, if it has lately.
    #[serde(default)]
    pub home: Option<String>,
    /// Other ports where it was seen lately.
    #[serde(default)]
    pub also_at: Vec<String>,
}

/// One worker thread. Shares of time are over the last seconds, the rest since the daemon started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ShardReport {
    /// The CPU it runs on.
    pub cpu: u16,
    /// Why this CPU, if nobody chose it.
    pub chosen: Option<String>,
    /// Whether it serves only ports of latency sensitivity `high`.
    pub exclusive: bool,
    /// Receive queues that it serves.
    pub queues: usize,
    /// Those of them that rest: their far end notifies the shard.
    pub resting: usize,
    /// Percent of the time in which it moved frames.
    pub busy_percent: f64,
    /// Percent of the time in which it did not: it polled in vain or slept.
    pub idle_percent: f64,
    /// Percent of the time in which it polled in vain.
    pub poll_percent: f64,
    /// Percent of the time in which it slept.
    pub sleep_percent: f64,
    /// Frames it received.
    pub frames: u64,
    /// In this many batches.
    pub batches: u64,
    /// How often it slept.
    pub sleeps: u64,
    /// How often it was held up in a VM's memory, so that another thread took its ports over.
    pub held_up: u64,
    /// Threads of it that are held up now.
    pub stuck: usize,
    /// Cycles in turns that moved frames.
    pub busy_cycles: u64,
    /// Cycles in turns that found nothing.
    pub poll_cycles: u64,
    /// Cycles asleep.
    pub sleep_cycles: u64,
    /// Frames in a batch, on average.
    pub frames_per_batch: f64,
    /// Cycles per frame while it moved frames, on average.
    pub cycles_per_frame: f64,
}

/// Queues of a port that were moved to another shard because frames waited for too long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MoveReport {
    /// Seconds since then.
    pub seconds_ago: u64,
    /// The port.
    pub port: String,
    /// How many of its queues.
    pub queues: usize,
    /// The CPU of the shard that had them.
    pub from: u16,
    /// The CPU of the shard that got them.
    pub to: u16,
    /// How long frames waited on the old shard, in microseconds.
    pub delay_micros: u64,
}

/// Which way a dropped frame was going.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// It came from the port and reached no other.
    Rx,
    /// It was meant for the port and did not reach it.
    Tx,
}

/// Frames of one port that were dropped for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DropReport {
    /// The port.
    pub port: String,
    /// Which way they were going.
    pub direction: Direction,
    /// Why they were dropped.
    pub reason: String,
    /// How many.
    pub count: u64,
    /// What the reason means.
    pub meaning: String,
    /// What can be done about it.
    pub advice: String,
}

/// What a configuration changes, or changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PlanReport {
    /// The steps, in their order.
    pub steps: Vec<StepReport>,
    /// Settings that are taken up only when the daemon is started again.
    pub restart_needed: Vec<Change>,
    /// Ports that are stopped now, with the reason. Empty before anything was done.
    pub stopped: BTreeMap<String, String>,
    /// Ports that the shards do not serve as they ask, with the reason; before anything was done, those that would not be.
    #[serde(default)]
    pub obstacles: BTreeMap<String, String>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct StepReport {
    /// What is done.
    pub step: Step,
    /// To what.
    pub subject: Subject,
    /// Its name.
    pub name: String,
    /// What is different.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<Change>,
}

/// What is done in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// It comes.
    Add,
    /// It changes; nothing is interrupted.
    Change,
    /// It is ended and made anew.
    Remake,
    /// It was stopped and is tried again.
    Retry,
    /// It goes.
    Remove,
}

/// What a step is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// A broadcast domain.
    Network,
    /// A port.
    Port,
    /// The worker threads.
    Shards,
}

/// A request to make a port.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewPort {
    /// Its name.
    pub name: String,
    /// What would be under the name in the file.
    pub port: serde_json::Value,
}

/// How many FDB entries were forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Flushed {
    /// How many.
    pub flushed: usize,
}

/// Why a request was refused.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Refusal {
    /// What is wrong, in a sentence.
    pub error: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
    /// Every mistake in a configuration, with its place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub diagnostics: Vec<serde_json::Value>,
}
