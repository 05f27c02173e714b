//! Guests and the host through TAP ports, in a network namespace of its own. Needs root.

use qemu_tests::traffic::{Machine, finish_all, ping_both};
use qemu_tests::wait::{self, STEP};
use qemu_tests::{Config, Daemon, Error, Flow, Guest, Nic, Result, nic::Mode, scenario};

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

/// The host joins two TAPs, so that what goes out at one comes in at the other, and what its own station sends goes round for ever.
#[test]
fn guests_beside_two_taps_that_the_host_joins_keep_their_frames() -> Result<()> {
    scenario(|s| {
        let host = s.netns("host")?;
        let vnics = Config::new(s.dir()).vnic("a", Mode::Server, 1).vnic("b", Mode::Server, 1);
        let daemon = Daemon::start(s.dir(), &vnics.tap("host0", "lc0").tap("host1", "lc1").yaml(), Some(&host))?;
        let is_there = || Ok(host.sh("test -e /sys/class/net/lc0 && test -e /sys/class/net/lc1").is_ok());
        wait::until_true("the TAP interfaces", STEP, is_there)?;
        let guest =
            |name: &str, address| Guest::named(name).nic(Nic::new(&s.path(&format!("{name}.sock")))).address(address);
        let [a, b] = s.boot([guest("a", "10.9.0.1/24"), guest("b", "10.9.0.2/24")])?;
        ping_both(&a, &b)?;

        host.sh("ip link add br0 type bridge && ip link set lc0 up master br0 && ip link set lc1 up master br0")?;
        host.configure("br0", "10.9.0.9/24")?;
        // Nobody has these addresses, so a guest and the host go on asking everybody for them.
        let _of_guest = b.start("ping -q -c 100 -i 0.3 10.9.0.77 || true")?;
        let _of_host = host.start("ping -q -c 100 -i 0.3 10.9.0.78 || true")?;
        for port in ["host0", "host1"] {
            wait::until_true("the loop to be seen", STEP, || Ok(daemon.port(port)?["in-loop"] == true))?;
        }
        let limited = |port: &str| Ok::<_, Error>(daemon.port(port)?["counters"]["drops"]["storm-limited"].as_u64());
        wait::until_true("the loop to be bounded", STEP, || Ok(limited("host0")?.max(limited("host1")?) > Some(0)))?;

        let text = a.sh("ping -q -c 200 -i 0.02 10.9.0.2 || true")?;
        let received = text.split(", ").nth(1).and_then(|part| part.split(' ').next()?.parse::<u32>().ok());
        if received < Some(150) {
            return Err(Error::Unexpected(format!("a bystander's ping beside the loop said {text:?}")));
        }
        Ok(())
    })
}
