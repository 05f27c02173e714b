//! Proof that frames get through, whole: pings, and [`Flow`]s of checksummed payload between two [`Machine`]s that run
//! while a scenario does something to the switch or the guests.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};

use crate::agent::Job;
use crate::payload::Report;
use crate::wait::{self, BOOT, STEP};
use crate::{Error, Result};

/// Something with a shell and an address: a guest or a network namespace of the host.
pub trait Machine {
    /// The name used in errors.
    fn name(&self) -> &str;
    /// Its IPv4 address on the network under test.
    fn address(&self) -> &str;
    /// A directory for a test's files.
    fn scratch(&self) -> &Path;
    /// Starts a shell script.
    fn start(&self, script: &str) -> Result<Job>;

    /// Runs a shell script and gives its output; a status other than 0 is an error.
    fn sh(&self, script: &str) -> Result<String> {
        self.start(script)?.output(STEP)
    }
}

/// Pings until five replies have come back.
pub fn ping(from: &dyn Machine, to: &dyn Machine) -> Result<()> {
    from.sh(&format!("ping -q -c 5 -i 0.2 -w 50 {}", to.address())).map(drop)
}

/// Pings until five replies have come back, both ways.
pub fn ping_both(a: &dyn Machine, b: &dyn Machine) -> Result<()> {
    ping(a, b)?;
    ping(b, a)
}

/// A stream of checksummed payload that runs until finished.
pub struct Flow<'m> {
    sender: &'m dyn Machine,
    receiver: &'m dyn Machine,
    what: String,
    stop: PathBuf,
    progress: PathBuf,
    sending: Job,
    receiving: Job,
}

impl<'m> Flow<'m> {
    /// Starts a TCP stream.
    pub fn tcp(sender: &'m dyn Machine, receiver: &'m dyn Machine) -> Result<Flow<'m>> {
        Flow::start("tcp", sender, receiver)
    }

    /// Starts a stream of UDP datagrams, 2000 per second at most.
    pub fn udp(sender: &'m dyn Machine, receiver: &'m dyn Machine) -> Result<Flow<'m>> {
        Flow::start("udp", sender, receiver)
    }

    /// Starts TCP and UDP streams in both directions.
    pub fn all(a: &'m dyn Machine, b: &'m dyn Machine) -> Result<Vec<Flow<'m>>> {
        Ok(vec![Flow::tcp(a, b)?, Flow::tcp(b, a)?, Flow::udp(a, b)?, Flow::udp(b, a)?])
    }

    fn start(protocol: &str, sender: &'m dyn Machine, receiver: &'m dyn Machine) -> Result<Flow<'m>> {
        // A port per flow of this process; guests and namespaces are its own, so nobody else is on them.
        static PORT: AtomicU16 = AtomicU16::new(5001);
        let port = PORT.fetch_add(1, Ordering::Relaxed);
        let stop = sender.scratch().join(format!("flow-{port}.stop"));
        let progress = receiver.scratch().join(format!("flow-{port}.progress"));
        let receiving = receiver.start(&format!("payload receive {protocol} {port} {}", progress.display()))?;
        let address = receiver.address();
        let sending = sender.start(&format!("payload send {protocol} {address}:{port} {}", stop.display()))?;
        let what = format!("{protocol} from {} to {}", sender.name(), receiver.name());
        Ok(Flow { sender, receiver, what, stop, progress, sending, receiving })
    }

    /// Bytes that the receiver has seen so far.
    pub fn received(&self) -> Result<u64> {
        let text = self.receiver.sh(&format!("cat {} 2>/dev/null || true", self.progress.display()))?;
        // The receiver may be rewriting the file right now.
        Ok(text.trim().parse().unwrap_or(0))
    }

    /// Waits until `bytes` more than now have arrived: traffic flows (again).
    pub fn advance(&self, bytes: u64) -> Result<()> {
        let goal = self.received()? + bytes;
        wait::until_true(&format!("{}, up to byte {goal}", self.what), BOOT, || Ok(self.received()? >= goal))
    }

    /// Ends the stream; fails unless something arrived and every byte of it was right.
    pub fn finish(self) -> Result<Report> {
        self.sender.sh(&format!("touch {}", self.stop.display()))?;
        self.sending.output(BOOT)?;
        let text = self.receiving.output(BOOT)?;
        let what = &self.what;
        match Report::from_json(&text) {
            Some(report) if report.corrupt == 0 && report.bytes > 0 => Ok(report),
            Some(report) => Err(Error::Unexpected(format!("{what}: {report:?}"))),
            None => Err(Error::Unexpected(format!("{what}: the receiver said {text:?}"))),
        }
    }
}

/// Lets every flow advance by `bytes`, then finishes them all.
pub fn finish_all(flows: Vec<Flow<'_>>, bytes: u64) -> Result<()> {
    flows.iter().try_for_each(|flow| flow.advance(bytes))?;
    flows.into_iter().try_for_each(|flow| flow.finish().map(drop))
}
