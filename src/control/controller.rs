//! The [`Controller`]: everything that changes or looks at the switch goes through it, changes one at a time.
//!
//! A change may take as long as a turn of a shard or a system call takes, so the API makes them on threads that may block. Looking
//! waits for none of them (`inspect`).
//! A change is checked as a whole before any of it is done; what is refused changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use serde_json::Value;

use super::conflicts::Conflicts;
use super::desired::{Desired, Origin, Wish};
use super::diff::{Action, Change, changes, diff};
use super::events::{Event, Events, Links};
use super::kinds::Kinds;
use super::pool::Pool;
use super::report::{PlanReport, Step, StepReport, Subject};
use super::running::Runtime;
use super::store::{Store, StoreError};
use super::upkeep::Samples;
use super::view::{Facts, Shown};
use crate::clock::Clock;
use crate::config::{self, Diagnostics, Plan};
use crate::host::cpu::{CpuError, Cpus};
use crate::host::cpu_plan::Choice;
use crate::ident::{MacAddr, Name, ParseError};
use crate::shard::{ShardError, Shards};
use crate::switch::Fdb;
use crate::sys::regular_file::{self, FileError, Symlinks};

/// How long a change waits for the one before it.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

/// Threads for requests that are there from the start: so many are answered at once while no thread can be started.
const REQUESTS: usize = 6;

/// How often it looks whether that has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Why a request to the controller was refused.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no such port.
    #[error("there is no port {0}", name)]
    NoSuchPort {
        /// The name.
        name: String,
    },
    /// There is no such network.
    #[error("there is no network {0}", name)]
    NoSuchNetwork {
        /// The name.
        name: String,
    },
    /// There is a port of that name already.
    #[error("there is a port {0} already")]
    Exists(Name),
    /// The port belongs to the file.
    #[error("port {name} is one of {}", file.display())]
    FromFile {
        /// The port.
        name: Name,
        /// The configuration file.
        file: PathBuf,
    },
    /// The configuration does not hold together.
    #[error("{}", summary(.0))]
    Invalid(Diagnostics),
    /// A name or an address that is none.
    #[error(transparent)]
    Name(#[from] ParseError),
    /// The port could not be opened.
    #[error("port {name} was not added: {reason}")]
    Open {
        /// The port.
        name: Name,
        /// Why.
        reason: String,
    },
    /// A change before this one has not ended.
    #[error("another change has been going on for more than {} s; nothing was changed", .0.as_secs())]
    Busy(Duration),
    /// No number is left.
    #[error("there are {0} ports already, and that is the limit")]
    Full(usize),
    /// The state directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// CPUs for shards that cannot be had.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// Shards that could not be started.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The configuration file could not be read.
    #[error("cannot read {}", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: FileError,
    },
}

impl ControlError {
    /// What to do about it, where the message does not say.
    pub fn fix(&self) -> Option<String> {
        match self {
            Self::NoSuchPort { .. } => Some("`linecard port list` shows the ports there are".into()),
            Self::NoSuchNetwork { .. } => Some("`linecard network list` shows the networks there are".into()),
            Self::Exists(name) => Some(format!("remove it first with `linecard port del {name}`, or use another name")),
            Self::FromFile { .. } => Some("take it out of the file, then `linecard apply`".into()),
            Self::Busy(_) => {
                Some("it waits for a shard, a port or the kernel; the log of linecardd may say more".into())
            }
            Self::ReadFile { source: FileError::System(_), .. } => {
                Some("give linecardd's user permission to read it".into())
            }
            _ => None,
        }
    }
}

fn summary(wrong: &Diagnostics) -> String {
    match wrong.list() {
        [one] => one.to_string(),
        several => format!("{} mistakes, nothing was changed", several.len()),
    }
}

/// Which FDB entries a request is about: those that match everything given.
#[derive(Debug, Clone, Default)]
pub struct FdbFilter {
    /// Only those of this network.
    pub network: Option<String>,
    /// Only those behind this port.
    pub port: Option<String>,
    /// Only this address.
    pub mac: Option<MacAddr>,
}

/// The control side of a running switch.
pub struct Controller {
    pub(super) clock: Clock,
    pub(super) started: Plan,
    pub(super) file: PathBuf,
    /// This machine's CPUs, as the process found them.
    host: Cpus,
    /// The NUMA nodes that they are on.
    pub(super) nodes: BTreeSet<u16>,
    pub(super) events: Arc<Events>,
    /// What others see without waiting for the lock.
    pub(super) shown: Arc<Shown>,
    /// Held for no longer than it takes to copy a sample.
    samples: Mutex<Samples>,
    /// These are taken by the thread that sees to the daemon's upkeep, and by nobody else.
    pub(super) links: Mutex<Links>,
    pub(super) conflicts: Mutex<Conflicts>,
    /// Threads for requests.
    requests: Pool,
    state: Mutex<State>,
}

/// What the lock guards.
pub(super) struct State {
    /// What was applied last.
    pub(super) plan: Plan,
    pub(super) runtime: Runtime,
    pub(super) store: Store,
    pub(super) generation: u64,
    pub(super) refused: Option<String>,
    /// Why each shard is on its CPU, if the host chose it.
    pub(super) chosen: BTreeMap<u16, String>,
}

impl Controller {
    /// A controller of `shards`, started from `plan`, which was read from `file`; nothing of it is carried out yet.
    /// They are on CPUs of `host`; `chosen` says of each that nobody chose why it was taken.
    ///
    /// # Errors
    /// The kernel has no thread or descriptor left for waiting for VMs.
    pub fn new(
        plan: Plan,
        file: &Path,
        store: Store,
        shards: Shards,
        clock: Clock,
        host: Cpus,
        chosen: BTreeMap<u16, String>,
    ) -> io::Result<Self> {
        // A RandomState is keyed with random numbers from the kernel.
        let random = || RandomState::new().hash_one(0);
        let fdb = Fdb::with_capacity(Fdb::CAPACITY_START, [random(), random()]);
        let shown = Arc::new(Shown::new(shards.readings())?);
        let kinds = Kinds::start(plan.daemon.api.parent())?;
        let state = State {
            plan: plan.clone(),
            runtime: Runtime::new(shards, kinds, fdb, Arc::clone(&shown)),
            store,
            generation: 0,
            refused: None,
            chosen,
        };
        let nodes = host.online.iter().map(|&cpu| host.node(cpu)).collect();
        let events = Arc::default();
        let (samples, links, conflicts, state) =
            (Mutex::default(), Mutex::default(), Mutex::default(), Mutex::new(state));
        let file = file.into();
        let requests = Pool::start("requests", REQUESTS)?;
        Ok(Self { clock, started: plan, file, host, nodes, events, shown, samples, links, conflicts, requests, state })
    }

    /// Threads on which requests are to be made: they may wait there.
    pub fn requests(&self) -> &Pool {
        &self.requests
    }

    /// What happened, to be read, followed and added to.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// Carries out the plan that the controller was started with. The first thing to do.
    ///
    /// # Errors
    /// The state directory cannot be written.
    pub fn begin(&self) -> Result<PlanReport, ControlError> {
        self.events.record(Event::DaemonStarted { version: env!("CARGO_PKG_VERSION").into() });
        let mut state = self.lock();
        self.carry_out(&mut state, self.started.clone(), Vec::new())
    }

    /// Checks a configuration without looking at what runs: `text`, called `name`, or else the file as it is now.
    ///
    /// # Errors
    /// The configuration cannot be read or does not hold together.
    pub fn check(&self, text: Option<(&str, &str)>) -> Result<(), ControlError> {
        self.read(text).map(drop)
    }

    /// What applying would do: with `text`, called `name`, as the configuration, or else the file as it is now.
    ///
    /// # Errors
    /// The configuration cannot be read or does not hold together.
    pub fn plan(&self, text: Option<(&str, &str)>) -> Result<PlanReport, ControlError> {
        let plan = self.read(text)?;
        let gone = self.gone();
        let state = self.change()?;
        let next = Desired::new(&plan, state.store.ports());
        let mut again = state.runtime.stopped();
        again.extend(gone);
        let actions = diff(&state.runtime.desired, &next, &again);
        Choice::of(&plan.shards, &self.host)?;
        let wanted = next.ports.iter().filter_map(|(name, wish)| Some((name, wish.plan.as_ref().ok()?)));
        let told = |(name, error): (&Name, ShardError)| (name.to_string(), format!("not served as asked: {error}"));
        let obstacles = config::unserved(&plan.shards, wanted).into_iter().map(told).collect();
        Ok(PlanReport { obstacles, ..self.report(&state.plan, &plan, &actions) })
    }

    /// Carries out a configuration: `text`, called `name`, or else the file as it is now.
    ///
    /// # Errors
    /// The configuration cannot be read or does not hold together; nothing changed.
    pub fn apply(&self, text: Option<(&str, &str)>) -> Result<PlanReport, ControlError> {
        let read = self.read(text);
        let gone = self.gone();
        let mut state = self.change()?;
        state.refused = read.as_ref().err().map(|error| super::chain(error));
        self.show(&state);
        if let Some(reason) = state.refused.clone() {
            self.events.record(Event::ConfigurationRefused { reason });
        }
        self.carry_out(&mut state, read?, gone)
    }

    /// Makes a port that is not in the file, from what would be under its name there; it outlives the daemon.
    ///
    /// # Errors
    /// It exists, does not hold together, cannot be opened or cannot be stored; nothing changed.
    pub fn add_port(&self, name: &str, written: Value) -> Result<(), ControlError> {
        let name: Name = name.parse()?;
        let mut state = self.change()?;
        let State { plan, runtime, store, .. } = &mut *state;
        if runtime.desired.ports.contains_key(&name) {
            return Err(ControlError::Exists(name));
        }
        let mut seen = plan.clone();
        let others =
            runtime.desired.ports.iter().filter_map(|(name, wish)| Some((name.clone(), wish.plan.clone().ok()?)));
        seen.ports.extend(others);
        let port = config::check_port(name.as_str(), written.clone(), &seen).map_err(ControlError::Invalid)?;
        runtime.perform(&[Action::AddPort(name.clone(), Wish { origin: Origin::RunTime, plan: Ok(port) })]);
        let opened = match runtime.ports.get(&name).map(|running| &running.port) {
            None => return Err(ControlError::Full(crate::limits::PORTS)),
            Some(Err(reason)) => Err(ControlError::Open { name: name.clone(), reason: reason.clone() }),
            Some(Ok(_)) => store.put(&name, written).map_err(ControlError::Store),
        };
        if opened.is_err() {
            runtime.perform(&[Action::RemovePort(name)]);
        }
        opened
    }

    /// Removes a port that was made at run time.
    ///
    /// # Errors
    /// There is none of that name, it is one of the file's, or the state directory cannot be written; nothing changed.
    pub fn remove_port(&self, name: &str) -> Result<(), ControlError> {
        let mut state = self.change()?;
        let State { runtime, store, .. } = &mut *state;
        let Some((name, wish)) = runtime.desired.ports.get_key_value(name) else {
            return Err(ControlError::NoSuchPort { name: name.into() });
        };
        let name = name.clone();
        if wish.origin == Origin::File {
            return Err(ControlError::FromFile { name, file: self.file.clone() });
        }
        store.remove(&name)?;
        runtime.perform(&[Action::RemovePort(name)]);
        Ok(())
    }

    /// Ends every port: guests see their link go and the sockets' files are removed. Nothing may be asked afterwards.
    pub fn close(&self) {
        let mut state = self.lock();
        let actions = diff(&state.runtime.desired, &Desired::default(), &Default::default());
        state.runtime.perform(&actions);
    }

    /// Stops the shards. The last thing to do.
    pub fn stop(self) {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.runtime.shards.stop();
    }

    /// A controller of one shard with the configuration `text`, whose ports `stand_in` opens.
    #[cfg(test)]
    #[allow(clippy::unwrap_used)]
    pub(crate) fn for_test(file: &Path, stand_in: super::kinds::StandIn) -> Self {
        let text = std::fs::read_to_string(file).unwrap();
        let plan = config::check("test.yaml", &text).unwrap();
        let (store, _) = Store::open(&plan.daemon.state_dir).unwrap();
        let (clock, host) = (Clock::start(), Cpus::of_this_host().unwrap());
        let cpus: Vec<u16> = Choice::of(&plan.shards, &host).unwrap().shared.clone();
        let shards = Shards::start(&cpus, &[], crate::shard::IdlePolicy::Adaptive.into(), clock).unwrap();
        let controller = Self::new(plan, file, store, shards, clock, host, BTreeMap::new()).unwrap();
        controller.lock().runtime.stand_in(stand_in);
        controller
    }

    /// Who holds this has the kernel keep TAP ports waiting.
    #[cfg(test)]
    pub(crate) fn kernel_of_taps(&self) -> Arc<Mutex<()>> {
        self.lock().runtime.kernel_of_taps()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change leaves the state whole between two of its statements, so a panic elsewhere must not end the API.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, unless it is being changed.
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The state, to be changed, when the change before has ended.
    ///
    /// # Errors
    /// It does not end.
    pub(super) fn change(&self) -> Result<MutexGuard<'_, State>, ControlError> {
        let begin = std::time::Instant::now();
        loop {
            match self.try_lock() {
                Some(state) => return Ok(state),
                None if begin.elapsed() > PATIENCE => return Err(ControlError::Busy(PATIENCE)),
                None => std::thread::sleep(LOOK_AGAIN),
            }
        }
    }

    pub(super) fn samples(&self) -> MutexGuard<'_, Samples> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names of the ports that were opened and whose ground is gone since.
    fn gone(&self) -> Vec<Name> {
        self.shown.ports.load().gone(&self.shown.calls)
    }

    /// Shows what is known of the configuration.
    fn show(&self, state: &State) {
        self.shown.facts.store(Arc::new(Facts {
            generation: state.generation,
            refused: state.refused.clone(),
            restart_needed: self.restart_needed(&state.plan),
            chosen: state.chosen.clone(),
        }));
    }

    fn read(&self, text: Option<(&str, &str)>) -> Result<Plan, ControlError> {
        let checked = match text {
            Some((name, text)) => config::check(name, text),
            None => {
                let text = regular_file::read_text(&self.file, config::TEXT_BYTES, Symlinks::Followed);
                let text = text.map_err(|source| ControlError::ReadFile { path: self.file.clone(), source })?;
                config::check(&self.file.display().to_string(), &text)
            }
        };
        checked.map_err(ControlError::Invalid)
    }

    /// Carries out `plan`. Ports in `gone` are tried again, as those are that could not be had.
    fn carry_out(&self, state: &mut State, plan: Plan, gone: Vec<Name>) -> Result<PlanReport, ControlError> {
        let choice = Choice::of(&plan.shards, &self.host)?;
        // New shards are there before the ports that need them; old ones go after the ports that can do without them.
        state.runtime.grow_shards(&choice)?;
        if state.plan.shards != plan.shards {
            self.host.keep_off(&choice.shared, &choice.exclusive);
        }
        let adopted: Vec<_> =
            state.store.ports().keys().filter(|name| plan.ports.contains_key(*name)).cloned().collect();
        for name in adopted {
            log::info!("port {name}: was made at run time and is now in {}", self.file.display());
            state.store.remove(&name)?;
        }
        let next = Desired::new(&plan, state.store.ports());
        let mut again = state.runtime.stopped();
        again.extend(gone);
        let actions = diff(&state.runtime.desired, &next, &again);
        state.runtime.perform(&actions);
        state.runtime.shrink_shards();
        state.runtime.show();
        state.chosen = choice.reasons;
        state.generation += 1;
        let mut report = self.report(&state.plan, &plan, &actions);
        let ports = state.runtime.ports.iter();
        report.stopped =
            ports.filter_map(|(name, port)| Some((name.to_string(), port.port.as_ref().err()?.clone()))).collect();
        report.obstacles = state.runtime.obstacles();
        let (generation, steps) = (state.generation, report.steps.len());
        self.events.record(Event::ConfigurationApplied { generation, steps });
        state.plan = plan;
        self.show(state);
        Ok(report)
    }

    /// What `actions`, and what else is to be done, lead from `before` to `plan` by.
    fn report(&self, before: &Plan, plan: &Plan, actions: &[Action]) -> PlanReport {
        let shards: Vec<Change> = changes(&before.shards, &plan.shards).into_iter().filter(is_live).collect();
        let shards = (!shards.is_empty()).then_some(StepReport {
            step: Step::Change,
            subject: Subject::Shards,
            name: String::new(),
            changes: shards,
        });
        let steps = shards.into_iter().chain(actions.iter().map(StepReport::from)).collect();
        PlanReport { steps, restart_needed: self.restart_needed(plan), ..PlanReport::default() }
    }

    /// What `plan` says otherwise than the one that the daemon was started with, of what cannot change while it runs.
    pub(super) fn restart_needed(&self, plan: &Plan) -> Vec<Change> {
        let daemon = changes(&self.started.daemon, &plan.daemon).into_iter().map(|change| ("daemon", change));
        let shards = changes(&self.started.shards, &plan.shards).into_iter().filter(|change| !is_live(change));
        let shards = shards.map(|change| ("shards", change));
        let under = |(section, change): (&str, Change)| Change { key: format!("{section}.{}", change.key), ..change };
        daemon.chain(shards).map(under).collect()
    }
}

/// Whether a change of `shards:` is carried out while they run.
fn is_live(change: &Change) -> bool {
    ["cpus", "exclusive"].iter().any(|key| change.key.starts_with(key))
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("file", &self.file).finish_non_exhaustive()
    }
}

impl From<&Action> for StepReport {
    fn from(action: &Action) -> Self {
        let (step, subject, name, changes) = match action {
            Action::AddNetwork(name, _) => (Step::Add, Subject::Network, name, None),
            Action::ChangeNetwork(name, _, changes) => (Step::Change, Subject::Network, name, Some(changes)),
            Action::RemoveNetwork(name) => (Step::Remove, Subject::Network, name, None),
            Action::AddPort(name, _) => (Step::Add, Subject::Port, name, None),
            Action::ChangePort(name, _, changes) => (Step::Change, Subject::Port, name, Some(changes)),
            Action::RemakePort(name, _, changes) => (Step::Remake, Subject::Port, name, Some(changes)),
            Action::RetryPort(name) => (Step::Retry, Subject::Port, name, None),
            Action::RemovePort(name) => (Step::Remove, Subject::Port, name, None),
        };
        Self { step, subject, name: name.to_string(), changes: changes.cloned().unwrap_or_default() }
    }
}
