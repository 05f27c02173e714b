//! Every file in `configs/` is a configuration that loads and means what its comments say.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use linecard::config::{CpuChoice, KindPlan, Plan, SocketMode, check};
use linecard::ident::LatencySensitivity;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")
}

fn load(name: &str) -> Plan {
    let text = fs::read_to_string(folder().join(name)).unwrap();
    check(name, &text).unwrap_or_else(|wrong| panic!("{}", wrong.render(false)))
}

#[test]
fn every_file_loads() {
    let mut names: Vec<String> =
        fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    for name in &names {
        assert!(name.ends_with(".yaml"), "{name} is no example");
        load(name);
    }
    assert_eq!(names, ["client-mode.yaml", "host-tap.yaml", "latency.yaml", "linecard.yaml", "quickstart.yaml"]);
}

#[test]
fn quickstart_is_two_vms_on_one_network_below_run() {
    let plan = load("quickstart.yaml");
    assert_eq!(plan.daemon.api, Path::new("/run/linecard/api.sock"));
    assert_eq!(plan.daemon.state_dir, Path::new("/run/linecard/state"));
    let names: Vec<&str> = plan.ports.keys().map(|name| name.as_str()).collect();
    assert_eq!(names, ["vm1-eth0", "vm2-eth0"]);
    for (name, port) in &plan.ports {
        let KindPlan::VhostUser(vnic) = &port.kind else { panic!("{port:?}") };
        assert_eq!(vnic.socket, Path::new(&format!("/run/linecard/{name}.sock")));
        assert_eq!(port.network.as_str(), "lan");
    }
}

/// The shipped file writes the defaults down: as they are, and behind `#` those that need a name to hang on.
#[test]
fn the_shipped_file_says_the_defaults() {
    assert_eq!(load("linecard.yaml"), check("x", "version: 1").unwrap());

    let text = fs::read_to_string(folder().join("linecard.yaml")).unwrap();
    let examples: String = text
        .lines()
        .map(|line| {
            line.strip_prefix("  # ").map_or_else(|| line.replace(": {}", ":"), |example| format!("  {example}"))
        })
        .filter(|line| !line.trim_start().starts_with(['#', '`']) && !line.contains("For tests there are"))
        .map(|line| line + "\n")
        .collect();
    let examples =
        check("linecard.yaml with its examples", &examples).unwrap_or_else(|wrong| panic!("{}", wrong.render(false)));
    let short = "version: 1
daemon: { api-group: linecard, metrics: '127.0.0.1:9477' }
shards: { realtime: 50 }
networks: { lan: {} }
profiles:
  server: { network: lan, mtu: 1500, labels: { rack: '17' } }
  database: { inherit: server, latency-sensitivity: medium }
ports:
  vm1-eth0:
    vhost-user: { socket: /run/linecard/vm1-eth0.sock, owner: libvirt-qemu, group: kvm, memory: 64GiB }
    mac: 52:54:00:12:34:56
    profile: server
  to-the-host: { tap: { interface: tap0 }, network: lan }
";
    let short = check("short", short).unwrap();
    assert_eq!((&examples.daemon, &examples.shards), (&short.daemon, &short.shards));
    assert_eq!((&examples.networks, &examples.ports), (&short.networks, &short.ports));
    assert_eq!(examples.profiles["database"].latency, short.profiles["database"].latency);
    assert_eq!(examples.profiles["database"].mtu, short.profiles["server"].mtu);
}

#[test]
fn the_latency_example_has_all_levels_but_one() {
    let plan = load("latency.yaml");
    assert_eq!(plan.shards.cpus, CpuChoice::List(vec![2, 3]));
    assert_eq!(plan.shards.exclusive, [4]);
    assert_eq!(plan.ports["engine-eth0"].latency, LatencySensitivity::High);
    assert_eq!(plan.ports["feed-eth0"].latency, LatencySensitivity::Medium);
    assert_eq!(plan.ports["desk1-eth0"].latency, LatencySensitivity::Low);
}

#[test]
fn the_other_examples_are_what_they_are_called() {
    for (name, port) in &load("client-mode.yaml").ports {
        let KindPlan::VhostUser(vnic) = &port.kind else { panic!("{name}: {port:?}") };
        assert_eq!(vnic.mode, SocketMode::Client, "{name}");
    }
    let KindPlan::Tap(tap) = &load("host-tap.yaml").ports["host"].kind else { panic!("no tap") };
    assert_eq!(tap.interface, "linecard0");
}
