//! One measurement: a switch is started, loaded, asked what it counted in the middle of it, and stopped.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::hugepages::HugePages;
use crate::interrupt;
use crate::latency::{Pinger, Pings, Trips, Wait};
use crate::load::{Figures, Load};
use crate::memory::HUGE_PAGE;
use crate::nic::{Door, Meeting, Nic, NicError, Settings};
use crate::switch::{Linecard, LinecardSetup, OpenVswitch, Sample, Switch, SwitchError, Testpmd, Wiring};
use crate::verify::{Findings, Verifier};

/// How long a switch may take until it answers pings.
const PATIENCE: Duration = Duration::from_secs(10);

/// Which switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Linecard.
    Linecard,
    /// Open vSwitch with DPDK.
    Ovs,
    /// testpmd as a patch cable.
    Cable,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Linecard => "linecard",
            Self::Ovs => "ovs",
            Self::Cable => "cable",
        })
    }
}

/// What is measured, and where.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The devices.
    pub nic: Settings,
    /// The switch's side.
    pub wiring: Wiring,
    /// Linecard's own settings.
    pub linecard: LinecardSetup,
    /// Directory of `linecardd` and `linecard`.
    pub bin_dir: PathBuf,
    /// The CPU of the generator.
    pub cpu: usize,
    /// Load before anything is counted.
    pub warm_up: Duration,
    /// How long it is counted.
    pub span: Duration,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// The generator's side.
    pub load: Figures,
    /// The switch's side, if it counts its cycles.
    pub switch: Option<Sample>,
    /// Whether the generator's memory was on huge pages.
    pub huge: bool,
}

/// Why a measurement failed.
#[derive(Debug, Error)]
pub enum MeasureError {
    /// The switch.
    #[error(transparent)]
    Switch(#[from] SwitchError),
    /// The generator's devices.
    #[error("port {port} did not come up; the switch's log ends with {log:?}")]
    Nic {
        /// Its number.
        port: usize,
        /// What the switch said last.
        log: String,
        /// Why not.
        source: NicError,
    },
    /// Guests under QEMU.
    #[error("guests")]
    Guests(#[from] qemu_tests::Error),
    /// The machine.
    #[error("{what}")]
    Machine {
        /// What it could not do.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Somebody pressed Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// A switch did something to frames that no switch may.
    #[error("{kind:?} is not clean: {findings:?}, and it counts {dropped:?} frames dropped for want of room")]
    Unclean {
        /// The switch.
        kind: Kind,
        /// What was found.
        findings: Findings,
        /// What it counted.
        dropped: Option<u64>,
    },
    /// No ping was ever answered.
    #[error("no ping came back")]
    NoAnswer,
    /// Some groups of a bench could not be measured.
    #[error("not everything was measured: {0}")]
    Incomplete(String),
    /// The load ended early.
    #[error("the load ended before it was measured")]
    NoLoad,
}

impl MeasureError {
    /// The whole story on one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text += &format!(": {error}");
            cause = error.source();
        }
        text
    }

    /// Whether the switch lacks a feature that the work needs.
    pub fn is_features(&self) -> bool {
        matches!(self, Self::Nic { source: NicError::Features { .. }, .. })
    }
}

impl Scenario {
    /// Huge pages for the generator and for what `kind` takes itself.
    pub fn pages(&self, kind: Kind) -> Result<HugePages, MeasureError> {
        let own = match kind {
            Kind::Linecard => 0,
            Kind::Ovs => OpenVswitch::PAGES,
            Kind::Cable => Testpmd::PAGES,
        };
        let each = if self.nic.huge { self.nic.memory().next_multiple_of(HUGE_PAGE) } else { 0 };
        if each + own == 0 {
            return Ok(HugePages::none());
        }
        HugePages::reserve(each * self.wiring.ports, own + 16)
            .map_err(|source| MeasureError::Machine { what: "no huge pages", source })
    }

    /// Starts the switch.
    pub fn start(&self, kind: Kind) -> Result<Box<dyn Switch>, MeasureError> {
        Ok(match kind {
            Kind::Linecard => Box::new(Linecard::start(&self.bin_dir, &self.wiring, &self.linecard)?),
            Kind::Ovs => Box::new(OpenVswitch::start(&self.wiring)?),
            Kind::Cable => Box::new(Testpmd::start(&self.wiring)?),
        })
    }

    /// Opens the doors of `switch`.
    pub fn meetings(&self, switch: &dyn Switch) -> Result<Vec<Meeting>, MeasureError> {
        let open = |(port, door): (usize, &Door)| door.open().map_err(failed(switch, port));
        switch.doors().iter().enumerate().map(open).collect()
    }

    /// Connects every device to `switch`.
    pub fn connect(&self, switch: &dyn Switch) -> Result<Vec<Nic>, MeasureError> {
        // All are opened first: a switch that connects to us finds them at its first attempt, or a second later.
        let meetings = self.meetings(switch)?;
        meetings
            .iter()
            .enumerate()
            .map(|(port, meeting)| Nic::connect(port, port ^ 1, meeting, &self.nic).map_err(failed(switch, port)))
            .collect()
    }

    /// Runs the whole of it.
    pub fn run(&self, kind: Kind) -> Result<Outcome, MeasureError> {
        let _pages = self.pages(kind)?;
        let mut switch = self.start(kind)?;
        let nics = self.connect(&*switch)?;
        self.load(nics, &mut *switch)
    }

    /// The same with every frame checked; what was found, and what the switch says it dropped for want of room.
    pub fn verify(&self, kind: Kind) -> Result<(Findings, Option<u64>), MeasureError> {
        let _pages = self.pages(kind)?;
        let mut switch = self.start(kind)?;
        let nics = self.connect(&*switch)?;
        let own = |source| MeasureError::Machine { what: "cannot use the generator's CPU", source };
        let (sizes, cpu, span) = (self.nic.sizes, self.cpu, self.span);
        let thread = std::thread::spawn(move || {
            pin(cpu)?;
            Ok(Verifier::new(nics, sizes).run(span, interrupt::came))
        });
        let findings = thread.join().map_err(|_| MeasureError::NoLoad)?.map_err(own)?;
        let dropped = switch.sample()?.filter(|_| kind == Kind::Linecard).map(|sample| sample.not_taken);
        if interrupt::came() { Err(MeasureError::Interrupted) } else { Ok((findings, dropped)) }
    }

    /// Round trips between the first two ports; the others, if there are any, carry a load meanwhile.
    pub fn ping(&self, kind: Kind, pings: &Pings, wait: Wait) -> Result<Trips, MeasureError> {
        let _pages = self.pages(kind)?;
        let switch = self.start(kind)?;
        let mut nics = self.connect(&*switch)?;
        let (cpu, warm_up, stations, pings) = (self.cpu, self.warm_up, self.wiring.stations, *pings);
        let thread = std::thread::spawn(move || {
            pin(cpu)?;
            let others = nics.split_off(2);
            let Ok(mut nics) = <[Nic; 2]>::try_from(nics) else { return Ok(Trips::default()) };
            let mut load = (!others.is_empty()).then(|| Load::new(others, stations));
            let mut pinger = Pinger::new(&mut nics, load.as_mut(), wait);
            // Until addresses are learned, caches warm, and a switch that sets itself up behind our back is done.
            let end = Instant::now() + PATIENCE;
            let warm = Pings { span: warm_up, ..pings };
            while pinger.run(&warm, interrupt::came).nanoseconds.is_empty() && Instant::now() < end {}
            Ok(pinger.run(&pings, interrupt::came))
        });
        let trips = thread.join().map_err(|_| MeasureError::NoLoad)?;
        let trips = trips.map_err(|source| MeasureError::Machine { what: "cannot use the generator's CPU", source })?;
        match () {
            () if interrupt::came() => Err(MeasureError::Interrupted),
            () if trips.nanoseconds.is_empty() => Err(MeasureError::NoAnswer),
            () => Ok(trips),
        }
    }

    /// The load runs in a thread on its own CPU, while this one asks the switch at both ends of the span.
    fn load(&self, nics: Vec<Nic>, switch: &mut dyn Switch) -> Result<Outcome, MeasureError> {
        let warm = mpsc::channel();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stop = &stop;
            let thread = scope.spawn(move || {
                pin(self.cpu)?;
                let mut load = Load::new(nics, self.wiring.stations);
                let told = || stop.load(Ordering::Relaxed) || interrupt::came();
                // Twice all stations: the first time they are learned.
                let learned = 2 * load.stations() * self.wiring.ports as u64;
                load.run(self.warm_up, learned, told);
                let _ = warm.0.send(());
                let figures = load.run(self.span, 0, told);
                Ok((figures, load.is_huge()))
            });
            let asked = self.ask(switch, &warm.1);
            if asked.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            let done = thread.join().map_err(|_| MeasureError::NoLoad)?;
            let (load, huge) =
                done.map_err(|source| MeasureError::Machine { what: "cannot use the generator's CPU", source })?;
            let switch = asked?;
            if interrupt::came() { Err(MeasureError::Interrupted) } else { Ok(Outcome { load, switch, huge }) }
        })
    }

    /// The switch's counters over most of the span.
    fn ask(&self, switch: &mut dyn Switch, warm: &mpsc::Receiver<()>) -> Result<Option<Sample>, MeasureError> {
        warm.recv().map_err(|_| MeasureError::NoLoad)?;
        let before = switch.sample()?;
        interrupt::sleep(self.span.mul_f64(0.8));
        let after = switch.sample()?;
        Ok(before.zip(after).map(|(before, after)| after.since(before)))
    }
}

/// A port's failure, with what the switch said.
pub fn failed(switch: &dyn Switch, port: usize) -> impl Fn(NicError) -> MeasureError + '_ {
    move |source| MeasureError::Nic { port, log: switch.last_words(), source }
}

/// Puts the calling thread on `cpu`.
pub fn pin(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}
