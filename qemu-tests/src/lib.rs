//! Real guests under QEMU: what Linecard's end-to-end tests and its demo are written with.
//!
//! A test reads top-down: a [`scenario()`] gives it the machine's one QEMU slot and a directory; in it start a
//! [`Daemon`] and [`Guest`]s, run scripts in the guests through the [`agent`], steer QEMU through [`qmp`], and
//! let [`traffic`] prove that every byte arrived as it was sent. Whatever was started ends with its value.
//!
//! ```text
//! setup.sh ─> kit (kernel, accelerator, lock)     image (initramfs: busybox, tools, guest-init, payload)
//!                      └──────────── guest ────────────┘
//!                 nic (command line)   qmp (control socket)   agent (virtio-serial) <─> bin/guest-init
//!                     migration                           traffic <─> bin/payload   iperf
//! daemon  netns  pair  libvirt  peer/testpmd               pings
//! ```
//!
//! Rules: every wait has a generous deadline and ends early when the process it waits for dies; no time is ever
//! asserted; nothing (process, namespace, file outside the kit) outlives its scenario.

pub mod agent;
pub mod child;
pub mod cpio;
pub mod daemon;
pub mod guest;
pub mod image;
pub mod iperf;
pub mod kit;
pub mod libvirt;
pub mod migration;
pub mod modules;
pub mod netns;
pub mod nic;
pub mod pair;
pub mod payload;
pub mod peer;
pub mod pings;
pub mod qmp;
pub mod scenario;
pub mod traffic;
pub mod wait;

pub use daemon::{Config, Daemon};
pub use guest::Guest;
pub use iperf::Transfer;
pub use migration::Destination;
pub use netns::Netns;
pub use nic::Nic;
pub use pair::Pair;
pub use pings::Pings;
pub use scenario::{Scenario, scenario};
pub use traffic::Flow;

use std::path::PathBuf;
use std::time::Duration;

/// What can go wrong in a scenario. The text alone says what failed; logs are printed by the [`scenario()`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a file, socket or process failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, with the path or program.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Something did not happen within its generous deadline.
    #[error("gave up after {after:?} waiting for {what}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
    },
    /// A process that a step needs has ended.
    #[error("{name} ended ({status}); the end of its log:\n{log}")]
    Ended {
        /// The process, as the scenario names it.
        name: String,
        /// Its exit status.
        status: String,
        /// The last lines of its log.
        log: String,
    },
    /// A script or program ended with a status other than 0.
    #[error("{machine}: status {status} from `{script}`:\n{output}")]
    Script {
        /// Where it ran: a guest's name or the host.
        machine: String,
        /// Its exit status, 128 + signal as in a shell.
        status: i32,
        /// What ran.
        script: String,
        /// Its standard output and error.
        output: String,
    },
    /// QEMU refused a command.
    #[error("{guest}: QMP {command}: {reason}")]
    Qmp {
        /// The guest's name.
        guest: String,
        /// The command's name.
        command: String,
        /// QEMU's description of the error.
        reason: String,
    },
    /// This machine lacks something that `setup.sh` installs, or a binary that cargo builds.
    #[error("{what} is missing at {}: run {fix}", path.display())]
    Missing {
        /// What is missing.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// The command that provides it.
        fix: &'static str,
    },
    /// An answer that should have been understood was not, or a check failed.
    #[error("{0}")]
    Unexpected(String),
}

impl Error {
    /// Says what was being done when the system refused: `.map_err(Error::io("bind /run/x.sock"))`.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        let what = what.into();
        move |source| Error::Io { what, source }
    }
}

/// The result of every step of a scenario.
pub type Result<T, E = Error> = std::result::Result<T, E>;
