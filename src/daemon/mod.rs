//! `linecardd`: puts the parts together, in an order in which each failure is told before anything was disturbed, and
//! ends them in the opposite one.
//!
//! Configuration, state directory, shards, sockets, and only then ports: a second daemon on the same sockets ends before
//! it has touched a port of the first. A port that cannot be had does not keep the daemon from starting.
//!
//! Everything here runs on tokio's two threads and those of `control/pool.rs`; none of them runs on a shard's CPU
//! as long as there is another, nor ever on an exclusive one. All of them are there from the start, and so is some memory
//! (`sys/heap.rs`): a front end can have the kernel keep whoever starts a thread or asks for memory waiting.
//!
//! The thread that hears signals and feeds the service manager's watchdog waits for nothing else: changes and upkeep have threads
//! of their own (`duties`), and an end that takes too long is cut short.

mod descriptors;
mod directories;
mod duties;
mod logging;
mod service;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::clock::Clock;
use crate::config::{self, Diagnostics, Idle, Plan, ShardsPlan};
use crate::control::events::Event;
use crate::control::http::{self, ApiSocket, Routes, SocketError};
use crate::control::store::{Store, StoreError};
use crate::control::{ControlError, Controller};
use crate::host;
use crate::host::cpu::{CpuError, Cpus};
use crate::host::cpu_plan::Choice;
use crate::observe::metrics;
use crate::port::vnic::relay;
use crate::shard::{IdlePolicy, Policy, ShardError, Shards};
use crate::sys::arguments;
use crate::sys::heap;
use crate::sys::regular_file::{self, FileError, Symlinks};
use crate::sys::signal;
use crate::sys::socket_file::SocketFile;
use crate::sys::threads;
use duties::{Changes, Closing, Upkeep};
pub use logging::say;
use service::Manager;

/// Why the daemon did not start, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration file could not be read.
    #[error("cannot read {}: give its path with --config", .0.display())]
    Read(PathBuf, #[source] FileError),
    /// The configuration does not hold together. Shown by [`Diagnostics::render`].
    #[error("the configuration is not good")]
    Config(#[source] Diagnostics),
    /// No CPU for a shard.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// A shard did not start.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The state directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The API's socket.
    #[error(transparent)]
    Api(#[from] SocketError),
    /// The listener for metrics.
    #[error("cannot serve metrics on {0} (daemon.metrics)")]
    Metrics(SocketAddr, #[source] io::Error),
    /// The first configuration could not be carried out.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// tokio or a signal handler.
    #[error("cannot start the control threads")]
    Runtime(#[source] io::Error),
    /// The process that looks at descriptors.
    #[error("cannot start the relay, a process of this program that looks at the descriptors of front ends")]
    Relay(#[source] io::Error),
    /// The API ended by itself.
    #[error("the API has ended")]
    Ended(#[source] io::Error),
}

/// How many threads answer the API.
const CONTROL_THREADS: usize = 2;

/// How long ports and shards have to end. Together with what the API has ([`http::serve`]) far less than a service manager's
/// patience.
const CLOSING: Duration = Duration::from_secs(5);

/// Runs the daemon with the configuration in `file` until it is told to stop. `relay` is the program that is its
/// [relay]: the one that calls this, unless that is a test.
///
/// # Errors
/// It could not start, or the API broke down.
pub fn run(file: &Path, relay: &Path) -> Result<(), DaemonError> {
    heap::reserve();
    // Somebody may want the file to be applied before there is a handler for that: it is applied then as soon as there is. All
    // other signals are let through, whatever this process was started with.
    signal::hold_hangup();
    signal::ignore_file_size();
    let plan = read(file)?;
    let config = fs::canonicalize(file).map_err(|error| DaemonError::Read(file.into(), error.into()))?;
    // Written to its end before this returns.
    let _log = logging::start(plan.daemon.log).map_err(DaemonError::Runtime)?;
    if let Err(error) = arguments::hide() {
        log::debug!("who reads /proc/PID/cmdline of linecardd can keep it from mapping memory meanwhile: {error}");
    }
    descriptors::prepare();
    descriptors::compare(&plan);
    directories::compare(&plan);
    let (store, moved) = Store::open(&plan.daemon.state_dir)?;
    if let Some(corrupt) = moved {
        log::error!("{}", logging::chain(&corrupt));
    }
    let clock = Clock::start();
    let (shards, host, chosen) = start_shards(&plan.shards, clock)?;
    // Off the shards' CPUs, as this thread is.
    relay::start(relay).map_err(DaemonError::Relay)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .on_thread_start(threads::touch_stack)
        .enable_all()
        .build()
        .map_err(DaemonError::Runtime)?;
    let signals = runtime.block_on(async { Signals::catch() })?;
    signal::release_hangup();
    let (listeners, file) = runtime.block_on(Listeners::bind(&plan))?;
    let controller =
        Arc::new(Controller::new(plan, &config, store, shards, clock, host, chosen).map_err(DaemonError::Runtime)?);
    let closing = Closing::start(file).map_err(DaemonError::Runtime)?;
    let manager = Arc::new(Manager::of_environment());
    let ended = serve(&runtime, &controller, listeners, signals, &manager);
    close(controller, closing);
    // Joins no thread: one that ends may be kept waiting as one that starts.
    runtime.shutdown_background();
    manager.catch_up();
    log::info!("linecardd has ended");
    ended
}

/// Ends every port and then the shards, and removes the API's socket, or leaves what does not end in time to the end of the process.
fn close(controller: Arc<Controller>, closing: Closing) {
    if !closing.close(controller, CLOSING) {
        log::error!("ports or shards did not end within {} s: the process ends without them", CLOSING.as_secs());
    }
}

/// Checks the configuration in `file` and does nothing else.
///
/// # Errors
/// It cannot be read or is not good.
pub fn check(file: &Path) -> Result<(), DaemonError> {
    read(file).map(drop)
}

fn read(file: &Path) -> Result<Plan, DaemonError> {
    let text = regular_file::read_text(file, config::TEXT_BYTES, Symlinks::Followed);
    let text = text.map_err(|error| DaemonError::Read(file.into(), error))?;
    config::check(&file.display().to_string(), &text).map_err(DaemonError::Config)
}

/// Starts the shards and keeps all other threads off their CPUs, or at least off exclusive ones. Also says why each
/// CPU was taken that nobody chose.
fn start_shards(plan: &ShardsPlan, clock: Clock) -> Result<(Shards, Cpus, BTreeMap<u16, String>), DaemonError> {
    let host = Cpus::of_this_host()?;
    let choice = Choice::of(plan, &host)?;
    for (cpu, reason) in &choice.reasons {
        log::info!("shards.cpus is auto: one shard on CPU {cpu}, {reason}");
    }
    let idle = match plan.idle {
        Idle::Adaptive => IdlePolicy::Adaptive,
        Idle::Never => IdlePolicy::Never,
    };
    let policy = Policy { idle, realtime: plan.realtime };
    if plan.realtime.is_some() && host::cpu::realtime_is_throttled() {
        log::warn!(
            "shards.realtime: the kernel stops real-time threads for a part of each second: set kernel.sched_rt_runtime_us to -1"
        );
    }
    let shards = Shards::start(&choice.shared, &choice.exclusive, policy, clock)?;
    host.keep_off(&choice.shared, &choice.exclusive);
    Ok((shards, host, choice.reasons))
}

/// What the daemon listens on besides its ports.
struct Listeners {
    api: ApiSocket,
    metrics: Option<TcpListener>,
}

impl Listeners {
    /// Also returns the file of the API's socket.
    async fn bind(plan: &Plan) -> Result<(Self, SocketFile), DaemonError> {
        let daemon = &plan.daemon;
        let (api, file) = ApiSocket::bind(&daemon.api, daemon.api_mode, daemon.api_group.as_deref())?;
        let metrics = match daemon.metrics {
            None => None,
            Some(address) => {
                let failed = |error| DaemonError::Metrics(address, error);
                let listener = TcpListener::bind(address).await.map_err(failed)?;
                log::info!("metrics on http://{}/metrics", listener.local_addr().unwrap_or(address));
                Some(listener)
            }
        };
        log::info!("API on {}", daemon.api.display());
        Ok((Self { api, metrics }, file))
    }
}

/// The signals that mean something here. Caught before anybody can know that the daemon is there.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Returns when one of them says that the daemon is to end.
    async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    fn catch() -> Result<Self, DaemonError> {
        let on = |kind| signal(kind).map_err(DaemonError::Runtime);
        Ok(Self {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            hangup: on(SignalKind::hangup())?,
        })
    }
}

/// Answers and keeps things up until a signal says stop.
fn serve(
    runtime: &Runtime,
    controller: &Arc<Controller>,
    listeners: Listeners,
    mut signals: Signals,
    manager: &Arc<Manager>,
) -> Result<(), DaemonError> {
    let (changes, beginning) = Changes::start(controller, manager).map_err(DaemonError::Runtime)?;
    let begun = runtime.block_on(async {
        tokio::select! {
            begun = beginning => Some(begun),
            () = signals.end() => None,
        }
    });
    match begun {
        None => {
            manager.stopping();
            return Ok(());
        }
        Some(begun) => begun.map_err(|_| DaemonError::Ended(io::Error::other("its thread is gone")))??,
    }
    let _upkeep = Upkeep::start(controller, manager).map_err(DaemonError::Runtime)?;
    let (stop, stopped) = watch::channel(false);
    let _inside = runtime.enter();
    if let Some(listener) = listeners.metrics {
        tokio::spawn(http::serve_everybody(listener, metrics::routes(controller.clone()), stopped.clone()));
    }
    let routes = Routes::of(controller.clone()).and(metrics::routes(controller.clone()));
    let mut api = tokio::spawn(http::serve(listeners.api, routes, stopped));
    runtime.block_on(async {
        let ended = until_told(&changes, &mut api, signals, manager).await;
        // Before anybody is waited for.
        manager.stopping();
        controller.events().record(Event::DaemonStopping);
        controller.events().close();
        stop.send_replace(true);
        if ended.is_ok() {
            let _ = api.await;
        }
        ended
    })
}

/// Returns when SIGTERM or SIGINT says so; SIGHUP has the file applied again.
async fn until_told(
    changes: &Changes,
    api: &mut JoinHandle<()>,
    mut signals: Signals,
    manager: &Manager,
) -> Result<(), DaemonError> {
    let mut second = tokio::time::interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    manager.ready();
    let mut pulse = tokio::spawn(async {});
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => return Ok(()),
            _ = signals.interrupt.recv() => return Ok(()),
            _ = signals.hangup.recv() => changes.request(),
            // The watchdog hears of the threads that answer the API and of this one: no port and no change can keep them.
            _ = second.tick() => {
                manager.catch_up();
                if manager.wants_pulse && pulse.is_finished() {
                    manager.alive();
                    pulse = tokio::spawn(async {});
                }
            },
            ended = &mut *api => {
                let why = ended.err().map_or_else(|| io::Error::other("nobody asked it to"), io::Error::other);
                return Err(DaemonError::Ended(why));
            }
        }
    }
}

#[cfg(test)]
mod tests;
