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

/// How many frames a machine has thrown away because a checksum of IP, ICMP, TCP or UDP was wrong.
pub fn checksum_errors(machine: &dyn Machine) -> Result<u64> {
    // A line of names and a line of numbers per protocol in the one file, a name and a number per line in the other.
    let text = machine.sh("cat /proc/net/snmp /proc/net/snmp6 2>/dev/null; true")?;
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let wrong = |name: &str| name.ends_with("InCsumErrors");
    let in_columns = lines.windows(2).filter(|pair| pair[0].first() == pair[1].first()).filter_map(|pair| {
        let at = pair[0].iter().position(|name| wrong(name))?;
        pair[1].get(at)?.parse::<u64>().ok()
    });
    let in_lines = lines.iter().filter(|line| wrong(line[0])).filter_map(|line| line.get(1)?.parse::<u64>().ok());
    Ok(in_columns.sum::<u64>() + in_lines.sum::<u64>())
}

/// A stream of checksummed payload that runs until finished.
pub struct Flow<'m> {
    sender: &'m dyn Machine,
    receiver: &'m dyn Machine,
    what: String,
    port: u16,
    stop: PathBuf,
    progress: PathBuf,
    hold: PathBuf,
    sending: Job,
    receiving: Job,
}

impl<'m> Flow<'m> {
    /// Starts a TCP stream.
    pub fn tcp(sender: &'m dyn Machine, receiver: &'m dyn Machine) -> Result<Flow<'m>> {
        Flow::start("tcp", sender, receiver, false)
    }

    /// Starts a stream of UDP datagrams, 2000 per second at most.
    pub fn udp(sender: &'m dyn Machine, receiver: &'m dyn Machine) -> Result<Flow<'m>> {
        Flow::start("udp", sender, receiver, false)
    }

    /// Starts a stream (`tcp` or `udp`) that the receiver does not read before [`Flow::release`]: what has arrived stays
    /// where the NIC has put it, in memory that no CPU writes. The receiver's sockets get room for megabytes by default.
    pub fn held(protocol: &str, sender: &'m dyn Machine, receiver: &'m dyn Machine) -> Result<Flow<'m>> {
        Flow::start(protocol, sender, receiver, true)
    }

    /// Starts TCP and UDP streams in both directions.
    pub fn all(a: &'m dyn Machine, b: &'m dyn Machine) -> Result<Vec<Flow<'m>>> {
        Ok(vec![Flow::tcp(a, b)?, Flow::tcp(b, a)?, Flow::udp(a, b)?, Flow::udp(b, a)?])
    }

    fn start(protocol: &str, sender: &'m dyn Machine, receiver: &'m dyn Machine, held: bool) -> Result<Flow<'m>> {
        // A port per flow of this process; guests and namespaces are its own, so nobody else is on them.
        static PORT: AtomicU16 = AtomicU16::new(5001);
        let port = PORT.fetch_add(1, Ordering::Relaxed);
        let stop = sender.scratch().join(format!("flow-{port}.stop"));
        let progress = receiver.scratch().join(format!("flow-{port}.progress"));
        let hold = receiver.scratch().join(format!("flow-{port}.hold"));
        if held {
            let room = "echo 33554432 >/proc/sys/net/core/rmem_default; \
                        echo 4096 8388608 16777216 >/proc/sys/net/ipv4/tcp_rmem";
            receiver.sh(&format!("touch {}; {room}", hold.display()))?;
        }
        let files = format!("{} {}", progress.display(), hold.display());
        let receiving = receiver.start(&format!("payload receive {protocol} {port} {files}"))?;
        let address = receiver.address();
        let sending = sender.start(&format!("payload send {protocol} {address}:{port} {}", stop.display()))?;
        let what = format!("{protocol} from {} to {}", sender.name(), receiver.name());
        Ok(Flow { sender, receiver, what, port, stop, progress, hold, sending, receiving })
    }

    /// Bytes that have arrived and wait for the receiver to read them, as the kernel counts them.
    pub fn waiting(&self) -> Result<u64> {
        let sockets = self.receiver.sh("cat /proc/net/tcp /proc/net/udp")?;
        let local = format!(":{:04X}", self.port);
        // "sl local_address rem_address st tx_queue:rx_queue ...", numbers in hexadecimal
        let queues = sockets.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let queue = fields.get(1)?.ends_with(&local).then(|| fields.get(4)?.split(':').nth(1))??;
            u64::from_str_radix(queue, 16).ok()
        });
        Ok(queues.sum())
    }

    /// Lets the receiver of a held stream read.
    pub fn release(&self) -> Result<()> {
        self.receiver.sh(&format!("rm -f {}", self.hold.display())).map(drop)
    }

    /// Waits until `bytes` more than now have arrived: traffic flows (again).
    pub fn advance(&self, bytes: u64) -> Result<()> {
        advance_all(std::slice::from_ref(self), bytes)
    }

    /// Ends the stream; fails unless something arrived and every byte of it was right.
    pub fn finish(self) -> Result<Report> {
        self.stop()?;
        self.collect()
    }

    fn stop(&self) -> Result<()> {
        self.sender.sh(&format!("touch {}", self.stop.display())).map(drop)
    }

    fn collect(self) -> Result<Report> {
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

/// Waits until `bytes` more than now have arrived on every flow.
pub fn advance_all(flows: &[Flow<'_>], bytes: u64) -> Result<()> {
    let goals: Vec<u64> = received(flows)?.into_iter().map(|now| now + bytes).collect();
    let mut seen = Vec::new();
    let arrived = wait::until_true("all flows to advance", BOOT, || {
        seen = received(flows)?;
        Ok(seen.iter().zip(&goals).all(|(now, goal)| now >= goal))
    });
    arrived.map_err(|error| {
        let state = flows.iter().zip(seen.iter().zip(&goals));
        let state = state.map(|(flow, (now, goal))| format!("\n{}: {now} of {goal} bytes", flow.what));
        Error::Unexpected(format!("{error}{}", state.collect::<String>()))
    })
}

/// Bytes that each flow's receiver has seen so far. One script per machine: under load, starting one takes an emulated
/// guest longer than the bytes do.
fn received(flows: &[Flow<'_>]) -> Result<Vec<u64>> {
    let mut seen = vec![0; flows.len()];
    let mut receivers: Vec<&dyn Machine> = flows.iter().map(|flow| flow.receiver).collect();
    receivers.sort_by_key(|receiver| receiver.name().to_owned());
    receivers.dedup_by_key(|receiver| receiver.name().to_owned());
    for receiver in receivers {
        let here = || flows.iter().enumerate().filter(|(_, flow)| flow.receiver.name() == receiver.name());
        let files: Vec<String> = here().map(|(_, flow)| flow.progress.display().to_string()).collect();
        let script = format!("for f in {}; do n=0; [ ! -e $f ] || read n <$f; echo $n; done", files.join(" "));
        let counts = receiver.sh(&script)?;
        for ((at, _), count) in here().zip(counts.lines()) {
            // The receiver may be rewriting the file right now.
            seen[at] = count.trim().parse().unwrap_or(0);
        }
    }
    Ok(seen)
}

/// Lets every flow advance by `bytes`, then finishes them all.
pub fn finish_all(flows: Vec<Flow<'_>>, bytes: u64) -> Result<()> {
    advance_all(&flows, bytes)?;
    flows.iter().try_for_each(Flow::stop)?;
    flows.into_iter().try_for_each(|flow| flow.collect().map(drop))
}
