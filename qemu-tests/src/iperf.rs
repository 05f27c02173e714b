//! How fast TCP gets through: iperf3 between two [`Machine`]s. Its payload is the same buffer again and again, so that what
//! is timed is the network's work: an emulated CPU makes and checks the blocks of a [`Flow`](crate::Flow) at a fraction
//! of what a switch brings it. That what arrives is right is a `Flow`'s to say.

use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::agent::Job;
use crate::traffic::Machine;
use crate::wait::BOOT;
use crate::{Error, Result};

/// Seconds at the start that are not counted: windows grow, addresses are learned.
const SLOW_START: u64 = 1;

/// What the receiver got.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Throughput {
    /// Payload in Mbit/s, all streams together.
    pub mbps: f64,
    /// Segments that the sender sent again.
    pub retransmits: u64,
}

/// Streams under way, for a number of seconds.
pub struct Transfer {
    what: String,
    span: Duration,
    sending: Job,
}

impl Transfer {
    /// Starts `streams` TCP streams that end by themselves after `span`, in whole seconds and one at least.
    pub fn tcp(sender: &dyn Machine, receiver: &dyn Machine, streams: u16, span: Duration) -> Result<Transfer> {
        // A port of its own, as a server of before may still be ending.
        static PORT: AtomicU16 = AtomicU16::new(5201);
        let port = PORT.fetch_add(1, Ordering::Relaxed);
        let listening = format!("{port:04X} 0");
        let listening = format!("until cat /proc/net/tcp /proc/net/tcp6 | grep -q ':{listening}'; do sleep 0.05; done");
        receiver.sh(&format!("iperf3 -s -1 -p {port} >/dev/null 2>&1 & {listening}"))?;
        let (seconds, address) = (span.as_secs().max(1), receiver.address());
        let script = format!("iperf3 -J -c {address} -p {port} -P {streams} -t {seconds} -O {SLOW_START}");
        let what = format!("{streams} TCP streams from {} to {}", sender.name(), receiver.name());
        Ok(Transfer { what, span: Duration::from_secs(seconds), sending: sender.start(&script)? })
    }

    /// How long until it is counted, and then how long that takes.
    pub fn spans(&self) -> (Duration, Duration) {
        (Duration::from_secs(SLOW_START), self.span)
    }

    /// Waits for the end.
    pub fn finish(self) -> Result<Throughput> {
        let said = self.sending.output(BOOT + self.span)?;
        read(&said).ok_or_else(|| Error::Unexpected(format!("{}: iperf3 said {said}", self.what)))
    }
}

/// The result in what `iperf3 -J` prints.
fn read(said: &str) -> Option<Throughput> {
    let value: Value = serde_json::from_str(said).ok()?;
    let rate = value["end"]["sum_received"]["bits_per_second"].as_f64()?;
    let retransmits = value["end"]["sum_sent"]["retransmits"].as_u64()?;
    Some(Throughput { mbps: rate / 1e6, retransmits })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receivers_rate_counts() {
        let said = r#"{ "end": { "sum_sent": { "bits_per_second": 9e8, "retransmits": 3 },
                                 "sum_received": { "bits_per_second": 8.5e8 } } }"#;
        assert_eq!(read(said), Some(Throughput { mbps: 850.0, retransmits: 3 }));
        assert_eq!(read(r#"{ "error": "unable to connect to server" }"#), None);
    }
}
