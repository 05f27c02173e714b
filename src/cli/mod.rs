//! The command line: what can be typed ([`DaemonOptions`], [`Options`]), and what `linecard` does with it ([`run()`]).
//!
//! The definitions here make help, completions and man pages; both binaries parse with them and do nothing else
//! themselves. `linecard` talks to the daemon over its API and shows what it says: it knows nothing that the API does not
//! tell, except for `check` of a file, which needs no daemon.
//!
//! # Exit codes
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | refused or failed; the message says why and what to do |
//! | 2 | the command line was not understood |
//! | 3 | linecardd does not answer |
//! | 4 | a configuration was applied, but some port of it is stopped or not served as asked |

mod client;
mod configuration;
mod events;
mod format;
mod man;
mod port;
mod run;
mod tables;
mod vm;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::ident::{LatencySensitivity, MacAddr};

pub use run::run;

/// Where the API is unless somebody says otherwise.
pub const API_SOCKET: &str = "/run/linecard/api.sock";

/// Where the configuration is unless somebody says otherwise.
pub const CONFIG_FILE: &str = "/etc/linecard/linecard.yaml";

/// A switch for the network interfaces of this host's VMs.
///
/// Runs in the foreground; SIGHUP applies the file again, SIGTERM and SIGINT end it. LINECARD_LOG sets the log level.
#[derive(Debug, Parser)]
#[command(name = "linecardd", version)]
pub struct DaemonOptions {
    /// Configuration file
    #[arg(long, value_name = "PATH", default_value = CONFIG_FILE)]
    pub config: PathBuf,
    /// Checks the configuration, says what is wrong with it and ends
    #[arg(long)]
    pub check: bool,
    /// Looks at the descriptors of front ends for the daemon that started it (ARCHITECTURE.md)
    #[arg(long, hide = true)]
    pub relay: bool,
}

/// Looks at a running linecardd and changes what it does.
///
/// Exit codes: 0 done, 1 refused or failed, 2 not understood, 3 linecardd does not answer, 4 applied but some port is
/// stopped or not served as asked.
#[derive(Debug, Parser)]
#[command(name = "linecard", version)]
pub struct Options {
    /// Socket of the daemon's API
    #[arg(long, global = true, value_name = "SOCKET", default_value = API_SOCKET)]
    pub api: PathBuf,
    /// How to print the answer [default: table; for events: json]
    #[arg(short, long, global = true, value_enum)]
    pub output: Option<Output>,
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

/// How answers are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Table,
    /// As the API says it
    Json,
    /// The same in YAML
    Yaml,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Shows the daemon as a whole
    Status,
    /// Shows, makes and removes ports
    #[command(subcommand)]
    Port(PortVerb),
    /// Shows networks
    #[command(subcommand)]
    Network(NetworkVerb),
    /// Shows and forgets where stations are
    #[command(subcommand)]
    Fdb(FdbVerb),
    /// Shows worker threads
    #[command(subcommand)]
    Shard(ShardVerb),
    /// Shows what goes on which CPU
    #[command(subcommand)]
    Cpu(CpuVerb),
    /// Shows what was dropped, why, and what to do about it
    Drops {
        /// Only at this port
        port: Option<String>,
    },
    /// Prints what happened: one JSON record a line, unless -o says otherwise
    Events {
        /// Goes on with what happens from now on, until the daemon ends
        #[arg(long)]
        follow: bool,
        /// Only what came after the record of this number
        #[arg(long, value_name = "SEQ")]
        since: Option<u64>,
    },
    /// Prints what QEMU needs
    #[command(subcommand)]
    Qemu(QemuVerb),
    /// Prints what libvirt needs
    #[command(subcommand)]
    Libvirt(LibvirtVerb),
    /// Checks a configuration file; needs no daemon
    Check {
        /// The file; - is standard input
        #[arg(default_value = CONFIG_FILE)]
        file: PathBuf,
    },
    /// Shows what applying a configuration would change
    Plan {
        /// The file, - for standard input; the daemon's own file if not given
        file: Option<PathBuf>,
    },
    /// Applies a configuration
    Apply {
        /// The file, - for standard input; the daemon's own file if not given
        file: Option<PathBuf>,
    },
    /// Prints a completion script
    Completion {
        /// For this shell
        shell: Shell,
    },
    /// Writes man pages; for packages
    #[command(hide = true)]
    Man {
        /// Into this folder
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
}

/// What can be done with ports.
#[derive(Debug, Subcommand)]
pub enum PortVerb {
    /// Shows all ports
    List,
    /// Shows one port: its state and why, its far end, its counters and what was dropped
    Show {
        /// The port
        name: String,
    },
    /// Makes a port that outlives the daemon, from options or from YAML or JSON on standard input
    Add {
        /// The port's name
        name: String,
        /// What it is to be
        #[command(flatten)]
        settings: PortSettings,
    },
    /// Removes a port that was made with `port add`
    Del {
        /// The port
        name: String,
    },
}

/// A vNIC in options. Without any of them the port is read from standard input, written as in the file.
#[derive(Debug, Default, Args)]
pub struct PortSettings {
    /// vhost-user socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Who makes the socket: server (linecardd) or client (the VM does) [default: server]
    #[arg(long, requires = "socket", value_parser = ["server", "client"])]
    pub mode: Option<String>,
    /// Most queue pairs that the VM may use
    #[arg(long, requires = "socket")]
    pub queues: Option<u16>,
    /// Network
    #[arg(long)]
    pub network: Option<String>,
    /// Profile
    #[arg(long)]
    pub profile: Option<String>,
    /// The VM's MAC address
    #[arg(long)]
    pub mac: Option<MacAddr>,
    /// low, normal, medium or high
    #[arg(long, value_name = "LEVEL", value_parser = latency_sensitivity)]
    pub latency_sensitivity: Option<LatencySensitivity>,
    /// Largest IP packet, in bytes
    #[arg(long)]
    pub mtu: Option<u16>,
    /// A label; may be given several times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub labels: Vec<(String, String)>,
}

fn latency_sensitivity(text: &str) -> Result<LatencySensitivity, String> {
    serde_json::from_value(text.into()).map_err(|_| "write low, normal, medium or high".into())
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.into(), value.into()))
}

/// What can be done with networks.
#[derive(Debug, Subcommand)]
pub enum NetworkVerb {
    /// Shows all networks
    List,
}

/// What can be done with the FDB.
#[derive(Debug, Subcommand)]
pub enum FdbVerb {
    /// Shows entries
    List(FdbSelection),
    /// Forgets learned entries
    Flush(FdbSelection),
}

/// Which FDB entries: those that match everything given.
#[derive(Debug, Args)]
pub struct FdbSelection {
    /// Only of this network
    #[arg(long)]
    pub network: Option<String>,
    /// Only behind this port
    #[arg(long)]
    pub port: Option<String>,
    /// Only this address
    #[arg(long)]
    pub mac: Option<MacAddr>,
}

/// What can be done with shards.
#[derive(Debug, Subcommand)]
pub enum ShardVerb {
    /// Shows all shards; shares of time are of the last seconds
    List,
    /// Shows the queues that were moved to another shard lately, and why
    Moves,
}

/// What can be done with CPUs.
#[derive(Debug, Subcommand)]
pub enum CpuVerb {
    /// Explains which CPU a configuration uses for what on this host, and what could be better; needs no daemon
    Plan {
        /// The file; - is standard input
        #[arg(default_value = CONFIG_FILE)]
        file: PathBuf,
    },
}

/// What QEMU can be told.
#[derive(Debug, Subcommand)]
pub enum QemuVerb {
    /// Prints the options for a port's VM (QEMU 9.2 or newer)
    Args {
        /// The port
        port: String,
        /// Memory of the VM
        #[arg(long, value_name = "SIZE", default_value = "4G")]
        memory: String,
    },
}

/// What libvirt can be told.
#[derive(Debug, Subcommand)]
pub enum LibvirtVerb {
    /// Prints the elements for a port's domain
    Xml {
        /// The port
        port: String,
    },
}
