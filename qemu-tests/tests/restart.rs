//! One side of the socket dies, and another takes its place.

use qemu_tests::nic::Mode;
use qemu_tests::traffic::{advance_all, finish_all, ping_both};
use qemu_tests::wait::{self, STEP};
use qemu_tests::{Flow, Guest, Nic, Pair, Result, scenario};

const BYTES: u64 = 1 << 18;

/// Streams survive daemons that are killed and daemons that are asked to end.
fn daemon_restarts(mode: Mode, options: &str) -> Result<()> {
    scenario(|s| {
        let mut pair = Pair::boot(s, |_, nic| nic.mode(mode).queues(2).options(options), |_, guest| guest)?;
        let flows = Flow::all(&pair.a, &pair.b)?;
        let advance = || advance_all(&flows, BYTES);
        advance()?;
        for _ in 0..3 {
            pair.daemon.kill();
            pair.daemon.restart()?;
            advance()?;
        }
        pair.daemon.terminate()?;
        pair.daemon.restart()?;
        finish_all(flows, BYTES)?;
        pair.ping()?;
        pair.balanced()
    })
}

#[test]
fn streams_survive_daemon_restarts_when_the_daemon_listens() -> Result<()> {
    daemon_restarts(Mode::Server, "")
}

#[test]
fn streams_survive_daemon_restarts_when_the_daemon_dials() -> Result<()> {
    daemon_restarts(Mode::Client, "")
}

/// Where a packed ring stands is in no guest's memory: a daemon that is killed leaves it in a file, and the next one goes on
/// from there.
#[test]
fn streams_on_packed_rings_survive_daemon_restarts_when_the_daemon_listens() -> Result<()> {
    daemon_restarts(Mode::Server, "packed=on")
}

#[test]
fn streams_on_packed_rings_survive_daemon_restarts_when_the_daemon_dials() -> Result<()> {
    daemon_restarts(Mode::Client, "packed=on")
}

#[test]
fn another_qemu_takes_the_place_of_a_killed_one() -> Result<()> {
    scenario(|s| {
        let Pair { mut a, b, daemon } = Pair::plain(s)?;
        for round in 0..2 {
            let flows = [Flow::udp(&a, &b)?, Flow::udp(&b, &a)?];
            advance_all(&flows, BYTES)?;
            a.kill();
            wait::until_true("port a to lose its guest", STEP, || Ok(daemon.port("a")?["state"] != "up"))?;
            assert_eq!(daemon.port("b")?["state"], "up", "the other port does not notice");

            let next = Guest::named(&format!("a{round}")).nic(Nic::new(&s.path("a.sock"))).address("10.9.0.1/24");
            [a] = s.boot([next])?;
            ping_both(&a, &b)?;
        }
        finish_all(Flow::all(&a, &b)?, BYTES)
    })
}
