//! `generator`: see `generator --help`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use generator::bench::{Group, Machine, Plan};
use generator::frames::Sizes;
use generator::latency::{Pings, Trips, Wait};
use generator::measure::{Kind, MeasureError, Outcome, Scenario};
use generator::nic::Settings;
use generator::report;
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
    /// Times round trips of single frames through each switch
    Ping(PingArgs),
    /// Measures every row of docs/performance.md beside its peers, and writes JSON, tables and plots
    Bench(BenchArgs),
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
    /// Addresses behind each port, which the driver writes into every frame; not given, one that stays
    #[arg(short = 'm', long)]
    stations: Option<u32>,
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
                huge: true,
            },
            wiring: Wiring {
                ports: self.ports,
                queues: self.queues,
                stations: self.stations,
                cpus: self.cpus.clone(),
                longest: sizes.longest(),
                offloads: false,
            },
            linecard: LinecardSetup {
                idle: self.idle.clone(),
                latency: self.latency.clone(),
                spare: self.generator_cpu,
            },
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

#[derive(Args)]
struct PingArgs {
    /// Microseconds from one ping to the next; 0: always one in flight
    #[arg(long, default_value_t = 0)]
    gap: u64,
    /// How drivers learn that a frame came
    #[arg(long, value_enum, default_value_t = Wait::Poll)]
    wait: Wait,
    /// Two more ports carry as much as the switch takes
    #[arg(long)]
    loaded: bool,
    #[command(flatten)]
    load: LoadArgs,
}

impl PingArgs {
    fn run(&self) -> Result<(), MeasureError> {
        println!(
            "{:<9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>5}   us",
            "switch", "pings", "median", "p99", "p99.9", "max", "lost"
        );
        for &kind in &self.load.switches {
            let mut scenario = self.load.scenario(self.load.sizes[0]);
            scenario.wiring.ports = if self.loaded { 4 } else { 2 };
            let pings = Pings { gap: Duration::from_micros(self.gap), span: scenario.span };
            let trips = scenario.ping(kind, &pings, self.wait)?;
            let sorted = trips.sorted();
            let [median, p99, p999, max] =
                [0.5, 0.99, 0.999, 1.0].map(|quantile| Trips::quantile(&sorted, quantile).unwrap_or(f64::NAN));
            let count = sorted.len();
            println!(
                "{:<9} {count:>9} {median:>9.2} {p99:>9.2} {p999:>9.2} {max:>9.1} {:>5}",
                kind.to_string(),
                trips.lost
            );
        }
        Ok(())
    }
}

#[derive(Args)]
struct BenchArgs {
    /// A few minutes instead of an hour: one round, fewer sizes, ports and addresses
    #[arg(long)]
    short: bool,
    /// Rounds of each row (5; with --short 1)
    #[arg(short, long)]
    rounds: Option<usize>,
    /// Seconds of each turn (3; with --short 0.5)
    #[arg(short = 't', long)]
    seconds: Option<f64>,
    /// These groups; results of others that are in the output directory stay
    #[arg(long, value_delimiter = ',')]
    only: Vec<Group>,
    /// CPU of the switch
    #[arg(short, long, default_value_t = 0)]
    cpu: usize,
    /// CPU of the generator
    #[arg(short, long, default_value_t = 1)]
    generator_cpu: usize,
    /// Where the results go [default: docs/bench; with --only or --short target/bench]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where linecardd and linecard are
    #[arg(long, default_value = "target/release")]
    bin_dir: PathBuf,
}

impl BenchArgs {
    fn run(&self) -> Result<(), MeasureError> {
        let plan = Plan {
            rounds: self.rounds.unwrap_or(if self.short { 1 } else { 5 }),
            span: Duration::from_secs_f64(self.seconds.unwrap_or(if self.short { 0.5 } else { 3.0 })),
            short: self.short,
            switch_cpu: self.cpu,
            generator_cpu: self.generator_cpu,
            bin_dir: self.bin_dir.clone(),
            only: self.only.clone(),
        };
        let out = self.out();
        let failed = |what| move |source| MeasureError::Machine { what, source };
        // Before anything is measured: nobody wants to hear after half an hour that it cannot be merged.
        let older = match self.only.is_empty() {
            true => None,
            false => report::read(&out, &Machine::look(&self.bin_dir)?)
                .map_err(failed("the results cannot be merged with older ones"))?,
        };
        let mut results = plan.run(&mut |line| eprintln!("{line}"))?;
        let failures: Vec<_> =
            results.failures.iter().map(|failure| format!("{}: {}", failure.group, failure.why)).collect();
        if let Some(older) = older {
            results.merge(older);
        }
        report::write(&results, &out).map_err(failed("cannot write the results"))?;
        eprintln!("written to {}", out.display());
        match failures.is_empty() {
            true => Ok(()),
            false => Err(MeasureError::Incomplete(failures.join("; "))),
        }
    }

    /// What is shown to readers is replaced by a whole run, or where it is named.
    fn out(&self) -> PathBuf {
        let part = self.short || !self.only.is_empty();
        self.out.clone().unwrap_or_else(|| if part { "target/bench" } else { "docs/bench" }.into())
    }
}

fn print_line(sizes: Sizes, kind: Kind, outcome: &Outcome) {
    let Outcome { load, switch, huge } = outcome;
    let name = kind.to_string();
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
        Command::Ping(args) => args.run(),
        Command::Bench(args) => args.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("generator: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out(args: &[&str]) -> PathBuf {
        match Cli::try_parse_from(["generator", "bench"].iter().chain(args)).map(|cli| cli.command) {
            Ok(Command::Bench(args)) => args.out(),
            _ => panic!("{args:?} is not understood"),
        }
    }

    #[test]
    fn a_part_does_not_go_where_a_whole_run_does() {
        assert_eq!(out(&[]), PathBuf::from("docs/bench"));
        assert_eq!(out(&["--short"]), PathBuf::from("target/bench"));
        assert_eq!(out(&["--only", "rings,latency"]), PathBuf::from("target/bench"));
        assert_eq!(out(&["--only", "rings", "--out", "docs/bench"]), PathBuf::from("docs/bench"));
    }

    #[test]
    fn a_group_that_does_not_exist_is_an_error() {
        let error = Cli::try_parse_from(["generator", "bench", "--only", "ring"]).err().map(|error| error.to_string());
        assert!(error.is_some_and(|error| error.contains("rings")), "the groups are named");
    }
}
