//! The kinds of events, each with what it is about: [`Event`]. And how one looks outside: [`EventRecord`].
//!
//! These types are a part of the API: a kind or a field is added when it is needed and never renamed.

use std::fmt;

use log::Level;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One thing that happened, with its number and time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventRecord {
    /// Its number: ascending since the daemon started, from 1. A number that is left out was of a record that had to make
    /// room for later ones.
    pub seq: u64,
    /// When it was noted, in UTC (RFC 3339).
    pub time: String,
    /// What it was.
    #[serde(flatten)]
    pub event: Event,
}

/// What kinds of traffic are bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Traffic {
    /// To everybody.
    Broadcast,
    /// To a group.
    Multicast,
    /// To a station that nobody knows.
    UnknownUnicast,
}

/// What keeps addresses from being learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AddressLimit {
    /// `limits.macs` of the port.
    Port,
    /// `mac-limit` of its network.
    Network,
    /// What the host has for all networks.
    Host,
}

/// What happened. `event` names the kind; a `port` is the one that caused it or that it happened to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum Event {
    /// The daemon started.
    DaemonStarted {
        /// Its version.
        version: String,
    },
    /// The daemon was told to end.
    DaemonStopping,
    /// A configuration was carried out.
    ConfigurationApplied {
        /// How many have been, this one included.
        generation: u64,
        /// Steps that it took.
        steps: usize,
    },
    /// A configuration was refused; nothing changed.
    ConfigurationRefused {
        /// Why.
        reason: String,
    },
    /// A port carries frames.
    PortUp {
        /// The port.
        port: String,
    },
    /// A port that carried frames waits for its far end, or is gone.
    PortDown {
        /// The port.
        port: String,
        /// Why.
        reason: String,
    },
    /// Something is wrong with a port.
    PortStopped {
        /// The port.
        port: String,
        /// What.
        reason: String,
    },
    /// A port serves nobody for a while because of what its far end did.
    PortBarred {
        /// The port.
        port: String,
        /// What it did.
        reason: String,
        /// For so long.
        seconds: u64,
    },
    /// A station's address was seen at another port than before.
    AddressMoved {
        /// Its network.
        network: String,
        /// The address.
        mac: String,
        /// Where it is now.
        port: String,
        /// Where it was.
        other_port: String,
        /// How often it moved since the last such record, this one included.
        count: u64,
    },
    /// A station's address was seen at two ports in turn, too often: it stays at one of them, and what comes with it from the
    /// other is dropped.
    AddressDamped {
        /// Its network.
        network: String,
        /// The address.
        mac: String,
        /// Where it was seen, too.
        port: String,
        /// Where it stays.
        other_port: String,
        /// At how many more ports it was seen within 10 s: then several machines have it, or a loop brings it there.
        #[serde(default, skip_serializing_if = "is_zero")]
        more_ports: u64,
        /// How many moves were not followed since the last such record.
        count: u64,
    },
    /// A station's address was seen at another port than the one that it is configured for (`mac`); what comes with it from
    /// there is dropped.
    AddressPinned {
        /// Its network.
        network: String,
        /// The address.
        mac: String,
        /// Where it was seen.
        port: String,
        /// Whose it is.
        other_port: String,
        /// How often since the last such record.
        count: u64,
    },
    /// More addresses moved, or were seen where they are not, than are told one by one.
    AddressesUntold {
        /// How many times since the last such record, which is a minute ago at least.
        count: u64,
    },
    /// Addresses that a port sends from were not learned because a limit is reached: what is sent to them goes to all ports of the
    /// network, as far as `storm` lets it.
    AddressesRefused {
        /// The network.
        network: String,
        /// The port.
        port: String,
        /// Which limit.
        limit: AddressLimit,
        /// How many addresses it lets be learned.
        most: u64,
        /// How often since the last such record. Frames that follow each other with one source count once.
        count: u64,
    },
    /// Frames with the same addresses, of stations of other ports among them, come in at two ports: their far ends are connected to
    /// each other.
    LoopSuspected {
        /// The network.
        network: String,
        /// One of the ports.
        port: String,
        /// The other one.
        other_port: String,
        /// How many addresses.
        count: u64,
    },
    /// A worker thread is held up in the memory of a port's far end, or was; one that is told before it is over is told again
    /// then.
    ShardStalled {
        /// The thread's CPU.
        cpu: u16,
        /// The port.
        port: String,
        /// The port whose frames were being written into that memory, where it may be in its memory as well.
        #[serde(skip_serializing_if = "Option::is_none")]
        sender: Option<String>,
        /// For so long.
        milliseconds: u64,
        /// In so many times that are too short to be told by themselves, of which the last was on that CPU.
        #[serde(skip_serializing_if = "Option::is_none")]
        short_times: Option<u32>,
    },
    /// A port sends more of a kind of traffic than its bound lets through.
    StormBegan {
        /// The port.
        port: String,
        /// Which.
        traffic: Traffic,
        /// Frames in a second that are let through.
        limit: u64,
    },
    /// It no longer does.
    StormEnded {
        /// The port.
        port: String,
        /// Which.
        traffic: Traffic,
        /// Frames that were dropped.
        dropped: u64,
    },
}

impl Event {
    /// The kind's name, as in the record's `event`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::DaemonStarted { .. } => "daemon-started",
            Self::DaemonStopping => "daemon-stopping",
            Self::ConfigurationApplied { .. } => "configuration-applied",
            Self::ConfigurationRefused { .. } => "configuration-refused",
            Self::PortUp { .. } => "port-up",
            Self::PortDown { .. } => "port-down",
            Self::PortStopped { .. } => "port-stopped",
            Self::PortBarred { .. } => "port-barred",
            Self::AddressMoved { .. } => "address-moved",
            Self::AddressDamped { .. } => "address-damped",
            Self::AddressPinned { .. } => "address-pinned",
            Self::AddressesUntold { .. } => "addresses-untold",
            Self::AddressesRefused { .. } => "addresses-refused",
            Self::LoopSuspected { .. } => "loop-suspected",
            Self::ShardStalled { .. } => "shard-stalled",
            Self::StormBegan { .. } => "storm-began",
            Self::StormEnded { .. } => "storm-ended",
        }
    }

    /// The port that caused it or that it happened to, if it is about one.
    pub fn port(&self) -> Option<&str> {
        match self {
            Self::DaemonStarted { .. }
            | Self::DaemonStopping
            | Self::ConfigurationApplied { .. }
            | Self::ConfigurationRefused { .. }
            | Self::AddressesUntold { .. } => None,
            Self::PortUp { port }
            | Self::PortDown { port, .. }
            | Self::PortStopped { port, .. }
            | Self::PortBarred { port, .. }
            | Self::AddressMoved { port, .. }
            | Self::AddressDamped { port, .. }
            | Self::AddressPinned { port, .. }
            | Self::AddressesRefused { port, .. }
            | Self::LoopSuspected { port, .. }
            | Self::ShardStalled { port, .. }
            | Self::StormBegan { port, .. }
            | Self::StormEnded { port, .. } => Some(port),
        }
    }

    /// The text in it that somebody else may have chosen.
    pub(super) fn reason_mut(&mut self) -> Option<&mut String> {
        match self {
            Self::ConfigurationRefused { reason }
            | Self::PortDown { reason, .. }
            | Self::PortStopped { reason, .. }
            | Self::PortBarred { reason, .. } => Some(reason),
            _ => None,
        }
    }

    /// How much an operator should mind.
    pub(super) fn level(&self) -> Level {
        match self {
            Self::DaemonStarted { .. }
            | Self::DaemonStopping
            | Self::ConfigurationApplied { .. }
            | Self::PortUp { .. }
            | Self::PortDown { .. }
            | Self::AddressMoved { .. }
            | Self::AddressesUntold { .. }
            | Self::StormEnded { .. } => Level::Info,
            Self::ConfigurationRefused { .. } | Self::PortStopped { .. } => Level::Error,
            Self::PortBarred { .. }
            | Self::AddressDamped { .. }
            | Self::AddressPinned { .. }
            | Self::AddressesRefused { .. }
            | Self::LoopSuspected { .. }
            | Self::ShardStalled { .. }
            | Self::StormBegan { .. } => Level::Warn,
        }
    }
}

impl fmt::Display for Event {
    /// A sentence: the log's line, and what `linecard events` shows people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DaemonStarted { version } => write!(f, "linecardd {version} started"),
            Self::DaemonStopping => f.write_str("linecardd was told to end"),
            Self::ConfigurationApplied { generation, steps } => write!(f, "configuration {generation}: {steps} steps"),
            Self::ConfigurationRefused { reason } => write!(f, "configuration refused, nothing changed: {reason}"),
            Self::PortUp { port } => write!(f, "port {port}: up"),
            Self::PortDown { port, reason } => write!(f, "port {port}: down: {reason}"),
            Self::PortStopped { port, reason } => write!(f, "port {port}: stopped: {reason}"),
            Self::PortBarred { port, reason, seconds } => {
                write!(f, "port {port}: serves nobody for {seconds} s: {reason}")
            }
            Self::AddressMoved { network, mac, port, other_port, count } => {
                write!(f, "network {network}: {mac} moved from port {other_port} to port {port}{}", times(*count))
            }
            Self::AddressDamped { network, mac, port, other_port, more_ports, count } => {
                write!(f, "network {network}: {mac} is at ports {other_port} and {port} in turn")?;
                if *more_ports > 0 {
                    write!(f, ", and at {more_ports} more")?;
                }
                write!(f, ": it stays at {other_port}, and {count} times {port} was not believed")
            }
            Self::AddressPinned { network, mac, port, other_port, count } => write!(
                f,
                "network {network}: {mac} is the address of port {other_port} and was seen at port {port} {count} times: what \
                 comes with it from there is dropped"
            ),
            Self::AddressesUntold { count } => write!(
                f,
                "addresses moved, or were seen at ports where they are not, {count} times more: too many at once to be told one \
                 by one"
            ),
            Self::AddressesRefused { network, port, limit, most, count } => {
                let (whose, remedy) = limit.words();
                write!(
                    f,
                    "network {network}: port {port} sent {count} times from addresses that were not learned, for {whose} {most}, \
                     which is the limit, and what is sent to them is flooded: {remedy}"
                )
            }
            Self::LoopSuspected { network, port, other_port, count } => write!(
                f,
                "network {network}: ports {port} and {other_port} seem to be connected to each other: frames with the \
                 addresses of {count} stations come in at both"
            ),
            Self::ShardStalled { cpu, port, sender, milliseconds, short_times } => {
                write!(f, "port {port}: the shard on CPU {cpu} was held up there for {milliseconds} ms")?;
                if let Some(times) = short_times {
                    write!(f, " in {times} short times, counting other shards")?;
                }
                match sender {
                    Some(sender) => write!(f, ", or by port {sender}, whose frames it was giving it"),
                    None => Ok(()),
                }
            }
            Self::StormBegan { port, traffic, limit } => {
                write!(
                    f,
                    "port {port}: sends more {traffic} in a second, or at once, than its bound of {limit} frames/s lets through; the \
                     rest is dropped"
                )
            }
            Self::StormEnded { port, traffic, dropped } => {
                write!(f, "port {port}: no longer sends too much {traffic}; {dropped} frames were dropped")
            }
        }
    }
}

impl AddressLimit {
    /// Who has as many addresses as he may, and what helps.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Port => ("the port has", "raise its `limits.macs` if they are all wanted"),
            Self::Network => {
                ("the network has", "raise its `mac-limit`, or lower `limits.macs` of ports that have most")
            }
            Self::Host => ("the host has", "lower `mac-limit` of networks or `limits.macs` of ports that have most"),
        }
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Broadcast => "broadcast",
            Self::Multicast => "multicast",
            Self::UnknownUnicast => "unknown unicast",
        })
    }
}

/// Whether a number says nothing.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn times(count: u64) -> String {
    if count > 1 { format!(", {count} times") } else { String::new() }
}
