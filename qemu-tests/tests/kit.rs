//! The harness itself, proven without Linecard: two guests on DPDK's vhost-user back end.

use std::time::Duration;

use qemu_tests::nic::Mode;
use qemu_tests::peer::testpmd::Testpmd;
use qemu_tests::traffic::{Machine, finish_all, ping_both};
use qemu_tests::{Flow, Guest, Nic, Result, scenario};

#[test]
fn guests_exchange_pings_and_payload_through_testpmd() -> Result<()> {
    scenario(|s| {
        let sockets = [s.path("a.sock"), s.path("b.sock")];
        let mut switch = Testpmd::start(s.dir(), &sockets, Mode::Server, 1)?;
        let [a, b] = s.boot([
            Guest::named("a").nic(Nic::new(&sockets[0])).address("10.9.0.1/24"),
            Guest::named("b").nic(Nic::new(&sockets[1])).address("10.9.0.2/24"),
        ])?;
        ping_both(&a, &b)?;
        finish_all(Flow::all(&a, &b)?, 100_000)?;
        switch.running()
    })
}

#[test]
fn a_guest_runs_scripts_side_by_side_and_reboots() -> Result<()> {
    scenario(|s| {
        let [guest] = s.boot([Guest::named("a").reboots()])?;
        let slow = guest.start("sleep 1; echo slow")?;
        assert_eq!(guest.sh("echo fast; uname -s")?, "fast\nLinux\n");
        assert_eq!(slow.output(Duration::from_secs(60))?, "slow\n");
        assert!(guest.sh("echo trouble; exit 3").is_err_and(|e| e.to_string().contains("trouble")));
        guest.sh("touch /tmp/mark")?;
        guest.reset()?;
        guest.sh("test ! -e /tmp/mark").map(drop)
    })
}
