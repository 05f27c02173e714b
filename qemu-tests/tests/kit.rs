//! The harness itself, proven without Linecard: two guests on DPDK's vhost-user back end.

use std::process::Stdio;
use std::time::Duration;

use qemu_tests::child::Child;
use qemu_tests::nic::Mode;
use qemu_tests::peer::testpmd::Testpmd;
use qemu_tests::traffic::{Machine, finish_all, ping_both};
use qemu_tests::wait::{self, BOOT};
use qemu_tests::{Flow, Guest, Nic, Result, scenario};

#[test]
fn guests_exchange_pings_and_payload_through_testpmd() -> Result<()> {
    scenario(|s| {
        let sockets = [s.path("a.sock"), s.path("b.sock")];
        let _switch = Testpmd::start(s.dir(), &sockets, Mode::Server, 1)?;
        let [a, b] = s.boot([
            Guest::named("a").nic(Nic::new(&sockets[0])).address("10.9.0.1/24"),
            Guest::named("b").nic(Nic::new(&sockets[1])).address("10.9.0.2/24"),
        ])?;
        ping_both(&a, &b)?;
        finish_all(Flow::all(&a, &b)?, 100_000)
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

#[test]
fn a_wait_ends_with_the_child_that_dies_under_it() -> Result<()> {
    scenario(|s| {
        let command = ["sh", "-c", "echo last words; exit 7"].map(str::to_owned);
        let _child = Child::start("mortal", &command, &s.path("mortal.log"), Stdio::null())?;
        let error = wait::until_true("never", BOOT, || Ok(false)).map_or_else(|e| e.to_string(), |()| String::new());
        assert!(error.contains("mortal") && error.contains("status 7") && error.contains("last words"), "{error}");
        Ok(())
    })
}

#[test]
fn a_network_namespace_is_a_machine_too() -> Result<()> {
    scenario(|s| {
        let host = s.netns("host")?;
        host.configure("lo", "10.9.0.9/24")?;
        assert_eq!(host.sh("ls /sys/class/net")?, "lo\n", "interfaces of the machine itself do not show");
        ping_both(&host, &host)?;
        finish_all(Flow::all(&host, &host)?, 1 << 20)
    })
}
