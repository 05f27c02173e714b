//! Pings every 10 ms for as long as a scenario does something, and the longest time without a reply.
//! The gap is for reports; a test that judged it would fail on a busy machine.

use std::path::PathBuf;
use std::time::Duration;

use crate::agent::Job;
use crate::traffic::Machine;
use crate::wait::STEP;
use crate::{Error, Result};

/// A ping that runs until finished.
pub struct Pings<'m> {
    from: &'m dyn Machine,
    pid: PathBuf,
    job: Job,
}

/// What came back.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Replies {
    /// Requests sent.
    pub sent: u64,
    /// Replies to them.
    pub received: u64,
    /// The longest time between two replies.
    pub gap: Duration,
}

impl<'m> Pings<'m> {
    /// Starts pinging.
    pub fn start(from: &'m dyn Machine, to: &dyn Machine) -> Result<Pings<'m>> {
        let pid = from.scratch().join(format!("ping-{}.pid", to.address()));
        let script = format!("echo $$ > {}; exec ping -D -n -i 0.01 {}", pid.display(), to.address());
        Ok(Pings { from, pid, job: from.start(&script)? })
    }

    /// Stops; fails when nothing came back.
    pub fn finish(self) -> Result<Replies> {
        self.from.sh(&format!("kill -INT $(cat {})", self.pid.display()))?;
        let text = self.job.output(STEP)?;
        parse(&text).ok_or_else(|| Error::Unexpected(format!("ping said {text:?}")))
    }
}

/// Reads `[SECONDS.MICROS] 64 bytes from ...` lines and the summary.
fn parse(text: &str) -> Option<Replies> {
    let times = text.lines().filter(|line| line.contains(" bytes from "));
    let times: Vec<f64> = times.filter_map(|line| line.strip_prefix('[')?.split(']').next()?.parse().ok()).collect();
    let gap = times.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
    let summary = text.lines().find(|line| line.contains(" packets transmitted, "))?;
    let sent = summary.split(' ').next()?.parse().ok()?;
    let received = summary.split(", ").nth(1)?.split(' ').next()?.parse().ok()?;
    Some(Replies { sent, received, gap: Duration::from_secs_f64(gap.max(0.0)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_found() {
        let text = "PING 10.9.0.1 (10.9.0.1) 56(84) bytes of data.\n\
            [100.000000] 64 bytes from 10.9.0.1: icmp_seq=1 ttl=64 time=0.6 ms\n\
            [100.010000] 64 bytes from 10.9.0.1: icmp_seq=2 ttl=64 time=0.6 ms\n\
            [100.260000] 64 bytes from 10.9.0.1: icmp_seq=27 ttl=64 time=0.6 ms\n\
            [100.270000] 64 bytes from 10.9.0.1: icmp_seq=28 ttl=64 time=0.6 ms\n\n\
            --- 10.9.0.1 ping statistics ---\n\
            28 packets transmitted, 4 received, 85.7143% packet loss, time 280ms\n";
        let replies = parse(text).unwrap_or_default();
        assert_eq!((replies.sent, replies.received), (28, 4));
        assert!((replies.gap.as_secs_f64() - 0.25).abs() < 0.001, "{replies:?}");
        assert_eq!(parse("connect: Network is unreachable"), None);
    }
}
