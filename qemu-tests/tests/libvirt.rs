//! libvirt runs guests on what `linecard libvirt xml` prints, plugs NICs, and moves guests to another libvirtd.

use qemu_tests::libvirt::Libvirt;
use qemu_tests::nic::Mode;
use qemu_tests::traffic::{Machine, advance_all, finish_all, ping_both};
use qemu_tests::wait::{self, STEP};
use qemu_tests::{Config, Daemon, Flow, Pings, Result, scenario};

const BYTES: u64 = 1 << 18;

#[test]
fn a_domain_is_started_gets_a_nic_and_moves_to_another_libvirtd() -> Result<()> {
    scenario(|s| {
        let host = s.netns("host")?;
        let ports = ["a", "away", "second"];
        let config = ports.iter().fold(Config::new(s.dir()), |config, port| config.vnic(port, Mode::Server, 1));
        let daemon = Daemon::start(s.dir(), &config.tap("host0", "lc0").yaml(), Some(&host))?;
        wait::until_true("the TAP interface", STEP, || Ok(host.sh("test -e /sys/class/net/lc0").is_ok()))?;
        host.configure("lc0", "10.9.0.9/24")?;

        let here = Libvirt::start(s, &host, "here")?;
        let domain = here.create(s.kit(), "vm", "10.9.0.1/24", &daemon.cli(&["libvirt", "xml", "a"])?)?;
        ping_both(&domain, &host)?;

        let printed = daemon.cli(&["libvirt", "xml", "second"])?;
        let interface =
            printed.split_once("<interface").map(|(_, rest)| format!("<interface{rest}")).unwrap_or_default();
        let file = here.file("second.xml", &interface)?;
        here.virsh(&["attach-device", "vm", &file, "--live"])?;
        wait::until_true("the guest to see its second NIC", STEP, || domain.has_interface("eth1"))?;
        domain.sh("ip link set eth1 up && ip addr add 10.9.1.1/24 dev eth1")?;
        daemon.wait_state("second", "up")?;
        host.sh("ip addr add 10.9.1.9/24 dev lc0")?;
        domain.sh("ping -q -c 5 -i 0.2 -w 50 -I eth1 10.9.1.9")?;
        // libvirt has given the NIC a MAC address, by which alone it finds it again.
        let file = here.file("second.xml", &interface_with_mac(&here.virsh(&["dumpxml", "vm"])?, "second"))?;
        here.virsh(&["detach-device", "vm", &file, "--live"])?;
        wait::until_true("the guest to lose its second NIC", STEP, || Ok(!domain.has_interface("eth1")?))?;
        wait::until_true("the port to lose its NIC", STEP, || Ok(daemon.port("second")?["state"] != "up"))?;

        let there = Libvirt::start(s, &host, "there")?;
        let flows = Flow::all(&domain, &host)?;
        advance_all(&flows, BYTES)?;
        for (from, to, port, next) in [(&here, &there, "a", "away"), (&there, &here, "away", "a")] {
            let pings = Pings::start(&host, &domain)?;
            from.migrate(&domain, to, &s.path(&format!("{port}.sock")), &s.path(&format!("{next}.sock")))?;
            advance_all(&flows, BYTES)?;
            println!("virsh migrate: {:?}", pings.finish()?);
            daemon.wait_state(next, "up")?;
            assert_eq!(from.virsh(&["list", "--all", "--name"])?.trim(), "", "it is gone from there");
        }
        finish_all(flows, BYTES)?;
        here.virsh(&["destroy", "vm"])?;
        daemon.balanced(&ports)
    })
}

/// The `<interface>` on the socket of `port` in a domain's XML.
fn interface_with_mac(domain: &str, port: &str) -> String {
    let mut interfaces = domain.split("<interface").skip(1).filter_map(|rest| rest.split_once("</interface>"));
    let found = interfaces.find(|(interface, _)| interface.contains(&format!("/{port}.sock")));
    found.map(|(interface, _)| format!("<interface{interface}</interface>")).unwrap_or_default()
}
