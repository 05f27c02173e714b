//! A guest and the host through a TAP port, in a network namespace of its own. Needs root.

use qemu_tests::traffic::{Machine, finish_all, ping_both};
use qemu_tests::wait::{self, STEP};
use qemu_tests::{Config, Daemon, Flow, Guest, Nic, Result, nic::Mode, scenario};

#[test]
fn guest_and_host_exchange_payload() -> Result<()> {
    scenario(|s| {
        let host = s.netns("host")?;
        let config = Config::new(s.dir()).vnic("a", Mode::Server, 1).tap("host0", "lc0");
        let daemon = Daemon::start(s.dir(), &config.yaml(), Some(&host))?;
        wait::until_true("the TAP interface", STEP, || Ok(host.sh("test -e /sys/class/net/lc0").is_ok()))?;
        host.configure("lc0", "10.9.0.9/24")?;
        let [guest] = s.boot([Guest::named("a").nic(Nic::new(&s.path("a.sock"))).address("10.9.0.1/24")])?;
        ping_both(&guest, &host)?;
        finish_all(Flow::all(&guest, &host)?, 1 << 20)?;
        daemon.wait_state("host0", "up")
    })
}
