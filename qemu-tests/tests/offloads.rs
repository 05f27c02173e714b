//! Guests and the host with any mix of offloads talk to each other, and every checksum that somebody looks at is right.
//!
//! `ethtool -K` changes what a kernel leaves to its NIC; device options change what the NIC may be asked for at all.

use qemu_tests::nic::Mode;
use qemu_tests::traffic::{Machine, checksum_errors, finish_all, ping_both};
use qemu_tests::wait::{self, STEP};
use qemu_tests::{Config, Daemon, Flow, Guest, Netns, Nic, Result, Scenario, scenario};

/// Payload per stream and mix.
const BYTES: u64 = 1 << 17;

/// What a mix switches on or off: of each guest, and of the host's TAP interface.
const GUEST: [&str; 6] = ["rx", "tx", "sg", "tso", "gso", "gro"];
const HOST: [&str; 3] = ["tx", "tso", "gro"];

/// Mixes that have every pair of the 15 settings in all four states, in as few rows as can be (Kleitman and Spencer, 1973):
/// all off in the first, then a column per setting with four of six on, each column another.
fn mixes() -> Vec<Vec<bool>> {
    let columns: Vec<u32> = (0..1 << 6).filter(|column: &u32| column.count_ones() == 4).collect();
    let row = |at: u32| columns.iter().map(|column| at > 0 && column >> (at - 1) & 1 == 1).collect();
    (0..=6).map(row).collect()
}

/// Two guests and the host's namespace on one network.
struct Stage {
    a: Guest,
    b: Guest,
    host: Netns,
    daemon: Daemon,
}

impl Stage {
    fn set(s: &Scenario, options: [&str; 2]) -> Result<Stage> {
        let host = s.netns("host")?;
        let config = Config::new(s.dir()).vnic("a", Mode::Server, 1).vnic("b", Mode::Server, 1).tap("host0", "lc0");
        let daemon = Daemon::start(s.dir(), &config.yaml(), Some(&host))?;
        wait::until_true("the TAP interface", STEP, || Ok(host.sh("test -e /sys/class/net/lc0").is_ok()))?;
        host.configure("lc0", "10.9.0.9/24")?;
        let guest = |name: &str, options, address| {
            let nic = Nic::new(&s.path(&format!("{name}.sock"))).options(options);
            Guest::named(name).nic(nic).address(address)
        };
        let [a, b] = s.boot([guest("a", options[0], "10.9.0.1/24"), guest("b", options[1], "10.9.0.2/24")])?;
        ping_both(&a, &b)?;
        ping_both(&a, &host)?;
        Ok(Stage { a, b, host, daemon })
    }

    /// TCP, UDP and long pings between all three, each way.
    fn exchange(&self) -> Result<()> {
        let (a, b, host) = (&self.a, &self.b, &self.host);
        let mut flows = Flow::all(a, b)?;
        flows.extend([Flow::tcp(a, host)?, Flow::tcp(host, a)?, Flow::udp(b, host)?, Flow::udp(host, b)?]);
        finish_all(flows, BYTES)?;
        // One fragment, many, and as many as there can be; ICMP has no offload, so these are checked wherever they go.
        let pings =
            |to: &str| format!("for s in 1400 9000 65000; do ping -q -c 2 -i 0.2 -w 50 -s $s {to} || exit 1; done");
        a.sh(&pings(b.address()))?;
        host.sh(&pings(a.address()))?;
        for machine in [a as &dyn Machine, b, host] {
            assert_eq!(checksum_errors(machine)?, 0, "wrong checksums at {}", machine.name());
        }
        self.daemon.balanced(&["a", "b", "host0"])
    }
}

/// Switches settings on or off. Some are fixed on some devices, and some take others with them: what results is a mix too.
fn apply(machine: &dyn Machine, interface: &str, names: &[&str], mix: &[bool]) -> Result<()> {
    let settings = names.iter().zip(mix).map(|(name, on)| format!("{name} {}", if *on { "on" } else { "off" }));
    let commands = settings.map(|setting| format!("ethtool -K {interface} {setting} || true\n"));
    machine.sh(&commands.collect::<String>()).map(drop)
}

#[test]
fn any_mix_of_settings_talks_to_any_other() -> Result<()> {
    scenario(|s| {
        let stage = Stage::set(s, ["", ""])?;
        for mix in mixes() {
            let (a, rest) = mix.split_at(GUEST.len());
            let (b, host) = rest.split_at(GUEST.len());
            apply(&stage.a, "eth0", &GUEST, a)?;
            apply(&stage.b, "eth0", &GUEST, b)?;
            apply(&stage.host, "lc0", &HOST, host)?;
            stage.exchange()?;
        }
        Ok(())
    })
}

#[test]
fn mixes_have_every_pair_in_every_state() {
    let mixes = mixes();
    let settings = 2 * GUEST.len() + HOST.len();
    assert!(mixes.iter().all(|mix| mix.len() == settings));
    for one in 0..settings {
        for other in 0..one {
            for state in [(false, false), (false, true), (true, false), (true, true)] {
                assert!(mixes.iter().any(|mix| (mix[one], mix[other]) == state), "{one} and {other} as {state:?}");
            }
        }
    }
}

#[test]
fn devices_without_an_offload_talk_to_devices_with_it() -> Result<()> {
    scenario(|s| Stage::set(s, ["csum=off,guest_csum=off", ""])?.exchange())
}

#[test]
fn devices_that_cannot_take_long_frames_talk_to_devices_without_mergeable_buffers() -> Result<()> {
    scenario(|s| Stage::set(s, ["guest_tso4=off,guest_tso6=off,guest_ecn=off", "mrg_rxbuf=off"])?.exchange())
}

#[test]
fn devices_that_send_only_short_frames_talk_to_devices_that_check_all() -> Result<()> {
    let short = "host_tso4=off,host_tso6=off,host_ecn=off,mrg_rxbuf=off,guest_tso4=off,guest_tso6=off,guest_ecn=off";
    scenario(|s| Stage::set(s, [short, "guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off"])?.exchange())
}

#[test]
fn segments_of_a_guest_that_cannot_send_long_frames_reach_one_that_takes_them_merged() -> Result<()> {
    scenario(|s| {
        let stage = Stage::set(s, ["host_tso4=off,host_tso6=off,host_ecn=off", ""])?;
        // How many come at once is up to the guest's CPU, so one exchange need not be enough.
        wait::until_true("segments to be merged", STEP, || {
            stage.exchange()?;
            Ok(stage.daemon.counter("b", "tx_merged")? > 0)
        })?;
        assert_eq!(stage.daemon.counter("b", "tx_segmented")?, 0);
        Ok(())
    })
}
