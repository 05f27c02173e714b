//! What of a vNIC outlives its connections: [`Nic`], its configuration, its queues and its limits on noise.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use super::offence::Docket;
use super::queue::Queue;
use super::ring_records::RingRecords;
use crate::ident::{Compat, LatencySensitivity, MacAddr, Name};
use crate::limits::{MEMORY_CHANGES, MEMORY_CHANGES_PER_SECOND, MESSAGES, MESSAGES_PER_SECOND};
use crate::port::rate_limit::{Pace, RateLimit, log_limited};
use crate::sys::eventfd::EventFd;
use crate::sys::mapping_turn;

/// Log lines that one port's far end can cause in ten seconds.
const LOG_LINES: u32 = 10;
const LOG_PERIOD: Duration = Duration::from_secs(10);

/// Announcements of one port in a second. QEMU sends five.
const ANNOUNCEMENTS: u32 = 16;

/// Who of the two sides of a vhost-user socket waits for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// We listen, the VM connects.
    #[default]
    Server,
    /// The VM listens, we connect, again and again.
    Client,
}

/// How a vNIC is set up.
#[derive(Debug, Clone)]
pub struct VnicConfig {
    /// The port's name.
    pub name: Name,
    /// Path of the vhost-user socket.
    pub socket: PathBuf,
    /// Who makes the socket.
    pub mode: Mode,
    /// Queue pairs that the port has, 1 to [`crate::limits::QUEUE_PAIRS`].
    pub queue_pairs: u16,
    /// Largest MTU in bytes that the guest may be told by its VM; any if `None`.
    pub mtu: Option<u16>,
    /// User that owns the socket file in server mode; this process's if `None`.
    pub owner: Option<u32>,
    /// Group of the socket file in server mode; this process's if `None`.
    pub group: Option<u32>,
    /// Permission bits of the socket file in server mode, such as `0o660`.
    pub permissions: u32,
    /// Most bytes of memory that the VM may share; as many as this host has if `None`.
    pub memory: Option<u64>,
    /// The address that the VM's configuration gives to the guest, if it is known here.
    pub mac: Option<MacAddr>,
    /// Which features are offered.
    pub compat: Compat,
    /// Directory, best on tmpfs, for where packed rings stand, which must survive this process; they are lost with it if
    /// there is none.
    pub records: Option<PathBuf>,
}

/// The lasting half of a vNIC.
pub(super) struct Nic {
    pub(super) config: VnicConfig,
    /// Guest memory is to be pinned.
    pins: AtomicBool,
    /// The MTU in force, which may have changed since `config`; 0 for any.
    mtu: AtomicU16,
    /// By ring index: 2i is guest RX (the switch transmits to it), 2i+1 guest TX (the switch receives from it).
    pub(super) queues: Vec<Arc<Queue>>,
    /// Signalled when a shard stops a ring, and when guest memory fails.
    pub(super) attention: Arc<EventFd>,
    /// What its front ends have done.
    pub(super) docket: Arc<Docket>,
    /// For log lines that the far end can cause.
    pub(super) log: RateLimit,
    /// For frames that SEND_RARP makes.
    pub(super) announcements: RateLimit,
    /// For what is mapped and unmapped, whichever connection asks for it.
    pub(super) mappings: Pace,
    /// For messages of every kind, whichever connection they come by.
    pub(super) messages: Pace,
    /// Where packed rings stand.
    pub(super) records: RingRecords,
}

impl Nic {
    pub(super) fn new(config: VnicConfig) -> io::Result<Self> {
        let attention = Arc::new(EventFd::new()?);
        let docket = Arc::new(Docket::new(Arc::clone(&attention)));
        let queue = |_| {
            let queue = Queue::new(Arc::clone(&docket));
            queue.set_mtu(config.mtu);
            Arc::new(queue)
        };
        Ok(Self {
            queues: (0..2 * config.queue_pairs).map(queue).collect(),
            pins: AtomicBool::new(false),
            mtu: AtomicU16::new(config.mtu.unwrap_or(0)),
            config,
            attention,
            docket,
            log: RateLimit::new(LOG_LINES, LOG_PERIOD),
            announcements: RateLimit::new(ANNOUNCEMENTS, Duration::from_secs(1)),
            mappings: Pace::new(MEMORY_CHANGES, MEMORY_CHANGES_PER_SECOND),
            messages: Pace::new(MESSAGES, MESSAGES_PER_SECOND),
            records: RingRecords::default(),
        })
    }

    /// Takes over how much the port minds delay. Memory is pinned by the session's thread, which may take a second.
    pub(super) fn set_latency(&self, latency: LatencySensitivity) {
        self.queues.iter().for_each(|queue| queue.set_latency(latency));
        self.pins.store(latency == LatencySensitivity::High, Ordering::Relaxed);
        self.attention.signal();
    }

    /// Whether the kernel has kept this thread, the session's, waiting for files of the front end for longer than is put up with.
    pub(super) fn was_kept_waiting(&self) -> bool {
        let waited = mapping_turn::take_wait();
        let too_long = self.docket.kept_waiting(waited);
        if too_long {
            let (name, millis) = (&self.config.name, waited.as_millis());
            log_limited!(self.log, log::Level::Warn, "{name}: waited {millis} ms for the VM's memory file");
        }
        too_long
    }

    /// Whether guest memory is to be pinned.
    pub(super) fn pins(&self) -> bool {
        self.pins.load(Ordering::Relaxed)
    }

    /// The largest MTU that the VM may announce, in bytes; `None` for any.
    pub(super) fn mtu(&self) -> Option<u16> {
        Some(self.mtu.load(Ordering::Relaxed)).filter(|&mtu| mtu != 0)
    }

    /// Changes it for the announcements to come, and for the frames that the guest is given.
    pub(super) fn set_mtu(&self, mtu: Option<u16>) {
        self.mtu.store(mtu.unwrap_or(0), Ordering::Relaxed);
        self.queues.iter().for_each(|queue| queue.set_mtu(mtu));
    }
}
