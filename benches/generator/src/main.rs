//! `generator`: see `generator --help`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use generator::frames::Sizes;
use generator::measure::{Kind, MeasureError, Outcome, Scenario};
use generator::nic::Settings;
use generator::ring::Habit;
use generator::switch::{LinecardSetup, Wiring};

/// Load for vhost-user switches from virtio-net drivers that recycle their buffers untouched.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts each switch in turn under one load and prints what it forwarded
    Load(LoadArgs),
}

#[derive(Args)]
struct LoadArgs {
    /// Switches, taking turns
    #[arg(short = 'w', long, value_delimiter = ',', default_value = "linecard")]
    switches: Vec<Kind>,
    /// Lengths of frames, without FCS: numbers or imix
    #[arg(short = 'l', long, value_delimiter = ',', default_value = "64")]
    sizes: Vec<Sizes>,
    /// Turns of each
    #[arg(short, long, default_value_t = 1)]
    rounds: usize,
    /// Seconds that are counted
    #[arg(short = 't', long, default_value_t = 2.0)]
    seconds: f64,
    /// Ports; neighbours send to each other
    #[arg(short = 'n', long, default_value_t = 2)]
    ports: usize,
    /// Queue pairs of each port
    #[arg(short, long, default_value_t = 1)]
    queues: usize,
    /// Addresses behind each port; with more than one the driver writes the addresses of every frame
    #[arg(short = 'm', long, default_value_t = 1)]
    stations: u32,
    /// Entries of each ring, a power of two
    #[arg(long, default_value_t = 1024)]
    ring: u16,
    /// Packed rings
    #[arg(long)]
    packed: bool,
    /// Negotiate IN_ORDER
    #[arg(long)]
    in_order: bool,
    /// Do not negotiate MRG_RXBUF
    #[arg(long)]
    no_mergeable: bool,
    /// What the driver does to a buffer that it offers again
    #[arg(long, value_enum, default_value_t = Habit::Recycle)]
    habit: Habit,
    /// CPUs of the switch
    #[arg(short, long, value_delimiter = ',', default_value = "0")]
    cpus: Vec<usize>,
    /// CPU of the generator
    #[arg(short, long, default_value_t = 1)]
    generator_cpu: usize,
    /// Linecard's `shards.idle`
    #[arg(long, default_value = "never")]
    idle: String,
    /// Linecard's `latency-sensitivity` for all ports
    #[arg(long, default_value = "normal")]
    latency: String,
    /// Check every byte of every frame instead of measuring
    #[arg(long)]
    verify: bool,
    /// Where linecardd and linecard are
    #[arg(long, default_value = "target/release")]
    bin_dir: PathBuf,
}

impl LoadArgs {
    fn scenario(&self, sizes: Sizes) -> Scenario {
        Scenario {
            nic: Settings {
                queues: self.queues,
                ring: self.ring,
                packed: self.packed,
                in_order: self.in_order,
                mergeable: !self.no_mergeable,
                habit: self.habit,
                sizes,
            },
            wiring: Wiring {
                ports: self.ports,
                queues: self.queues,
                stations: self.stations,
                cpus: self.cpus.clone(),
                longest: sizes.longest(),
            },
            linecard: LinecardSetup { idle: self.idle.clone(), latency: self.latency.clone() },
            bin_dir: self.bin_dir.clone(),
            cpu: self.generator_cpu,
            warm_up: Duration::from_millis(500),
            span: Duration::from_secs_f64(self.seconds),
        }
    }

    fn verify(&self) -> Result<(), MeasureError> {
        for &sizes in &self.sizes {
            for &kind in &self.switches {
                let (findings, dropped) = self.scenario(sizes).verify(kind)?;
                if !findings.is_clean(dropped) {
                    return Err(MeasureError::Unclean { kind, findings, dropped });
                }
                println!("{sizes} {kind:?}: clean, {findings:?}, dropped for want of room: {dropped:?}");
            }
        }
        Ok(())
    }

    fn run(&self) -> Result<(), MeasureError> {
        if self.verify {
            return self.verify();
        }
        println!(
            "{:<6} {:<9} {:>7} {:>8} {:>8} {:>6}   {:>9} {:>6} {:>7}",
            "bytes", "switch", "Mpps", "Gbit/s", "cycles", "busy", "generator", "busy", "lost"
        );
        for &sizes in &self.sizes {
            for _ in 0..self.rounds {
                for &kind in &self.switches {
                    print_line(sizes, kind, &self.scenario(sizes).run(kind)?);
                }
            }
        }
        Ok(())
    }
}

fn print_line(sizes: Sizes, kind: Kind, outcome: &Outcome) {
    let Outcome { load, switch, huge } = outcome;
    let name = clap::ValueEnum::to_possible_value(&kind).map(|value| value.get_name().to_owned()).unwrap_or_default();
    let (cycles, busy) = match switch {
        Some(sample) => (format!("{:.1}", sample.cycles_per_frame()), format!("{:.0}%", sample.busy_percent())),
        None => ("-".into(), "-".into()),
    };
    println!(
        "{sizes:<6} {name:<9} {:>7.2} {:>8.1} {cycles:>8} {busy:>6}   {:>9.1} {:>5.0}% {:>6.2}%{}",
        load.mpps(),
        load.mpps() * sizes.mean() * 8.0 / 1e3,
        load.cycles_per_frame(),
        load.busy_percent(),
        load.lost_percent(),
        if *huge { "" } else { "  (no huge pages)" },
    );
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = generator::interrupt::watch() {
        eprintln!("generator: cannot catch signals: {error}");
        return ExitCode::FAILURE;
    }
    let result = match cli.command {
        Command::Load(args) => args.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("generator: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}
