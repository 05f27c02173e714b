//! Latency sensitivity as guests and operators see it: interrupts that are held back and those that are not, counters of
//! both, and levels that change while a guest talks.

#![allow(clippy::unwrap_used)]

mod frontend;

use std::path::Path;
use std::time::Instant;

use frontend::daemon::{Daemon, port_with, preamble, preamble_with, two_cpus};
use frontend::eventually;
use frontend::frame::frame;
use frontend::nic::{LINUX, Nic, NicConfig, carry, exchange, meet};
use frontend::session::feature;

/// Ports `a` and `b` on a network, at these levels.
fn pair(dir: &Path, levels: [&str; 2]) -> String {
    let level = |level| format!(", latency-sensitivity: {level}");
    let ports = [("a", levels[0]), ("b", levels[1])];
    let ports = ports.map(|(name, of)| port_with(dir, name, "lan", "server", &level(of))).concat();
    preamble(dir) + "networks: { lan: {} }\nports:\n" + &ports
}

fn nics(daemon: &Daemon) -> [Nic; 2] {
    let [mut a, mut b] = ["a", "b"].map(|name| Nic::up(&daemon.socket(name), &NicConfig::default()));
    meet(&mut a, &mut b);
    [a, b]
}

/// Counter `name` of ring `ring` of a port.
fn counter(daemon: &Daemon, port: &str, ring: usize, name: &str) -> u64 {
    let port = daemon.port(port).0;
    port["detail"]["queues"][ring][name].as_u64().unwrap_or_else(|| panic!("{name} of ring {ring} in {port}"))
}

/// Frames one by one, each when the one before has been taken, for a guest that sleeps until it is interrupted.
fn trickle(from: &mut Nic, to: &mut Nic, count: u64) {
    for at in 0..count {
        from.send(&frame(to.mac, from.mac, 60, at));
        from.drain();
    }
    assert_eq!(to.receive(count as usize).len(), count as usize);
}

#[test]
fn low_interrupts_a_guest_that_sleeps_for_every_frame() {
    let daemon = Daemon::start(|dir| pair(dir, ["low"; 2]));
    let [mut a, mut b] = nics(&daemon);
    for _ in 0..20 {
        trickle(&mut a, &mut b, 20);
    }
    exchange(&mut a, &mut b, 64);
}

#[test]
fn low_interrupts_a_stream_every_half_millisecond_though_its_shard_sleeps_between_frames() {
    let daemon = Daemon::start(|dir| pair(dir, ["low"; 2]));
    // Without event index a guest wants an interrupt for every frame.
    let config = NicConfig { features: LINUX & !feature::EVENT_IDX, ..NicConfig::default() };
    let [mut a, mut b] = ["a", "b"].map(|name| Nic::up(&daemon.socket(name), &config));
    meet(&mut a, &mut b);
    let before = counter(&daemon, "b", 0, "calls");
    let began = Instant::now();
    trickle(&mut a, &mut b, 200);
    let most = 200 / 64 + began.elapsed().as_micros() as u64 / 500 + 2;
    let calls = counter(&daemon, "b", 0, "calls") - before;
    assert!(calls <= most, "{calls} interrupts for 200 frames in {:?}", began.elapsed());
    assert!(calls > 0);
}

#[test]
fn medium_holds_nothing_back() {
    let daemon = Daemon::start(|dir| pair(dir, ["medium"; 2]));
    let [mut a, mut b] = nics(&daemon);
    for _ in 0..20 {
        trickle(&mut a, &mut b, 50);
    }
    assert_eq!(counter(&daemon, "b", 0, "calls_coalesced"), 0);
    assert!(counter(&daemon, "b", 0, "calls") > 0);
}

#[test]
fn kicks_are_counted_and_so_are_those_that_polling_spared() {
    let daemon = Daemon::start(|dir| pair(dir, ["normal"; 2]));
    let [mut a, mut b] = nics(&daemon);
    let kicks = || counter(&daemon, "a", 1, "kicks");
    let spared = || counter(&daemon, "a", 1, "kicks_suppressed");
    eventually("a kick after a rest", || {
        let before = kicks();
        carry(&mut a, &mut b, 1);
        (kicks() > before).then_some(())
    });
    eventually("batches without a kick", || {
        let before = spared();
        trickle(&mut a, &mut b, 50);
        (spared() > before).then_some(())
    });
    assert_eq!(counter(&daemon, "a", 0, "kicks"), 0, "nobody waits for buffers");
}

/// The CPU of the exclusive shard: the second that there is.
#[track_caller]
fn spare_cpu() -> usize {
    two_cpus()[1]
}

/// Ports `a` and `b` with profiles of their names at these levels, and one exclusive shard.
fn profiles(dir: &Path, a: &str, b: &str) -> String {
    let ports = ["a", "b"].map(|name| port_with(dir, name, "lan", "server", &format!(", profile: {name}"))).concat();
    let profiles = format!(
        "profiles: {{ a: {{ latency-sensitivity: {a} }}, b: {{ latency-sensitivity: {b} }} }}\nnetworks: {{ lan: {{}} }}"
    );
    let head = preamble_with(dir, &format!(", exclusive: \"{}\"", spare_cpu()));
    format!("{head}{profiles}\nports:\n{ports}")
}

fn write(daemon: &Daemon, a: &str, b: &str) {
    std::fs::write(daemon.dir().join("linecard.yaml"), profiles(daemon.dir(), a, b)).unwrap();
}

fn apply(daemon: &Daemon, a: &str, b: &str) {
    write(daemon, a, b);
    daemon.linecard(&["apply"]).unwrap();
}

fn talk(a: &mut Nic, b: &mut Nic) {
    exchange(a, b, 64);
    carry(b, a, 16);
}

/// Nobody's guest noticed anything.
fn assert_uninterrupted(daemon: &Daemon) {
    for port in ["a", "b"] {
        assert_eq!(daemon.port(port).0["detail"]["connections"], 1, "{port} was interrupted");
        assert!(daemon.port(port).is_conserved());
    }
}

#[test]
fn levels_change_while_guests_talk() {
    let daemon = Daemon::start(|dir| profiles(dir, "normal", "low"));
    let [mut a, mut b] = nics(&daemon);
    for (to_a, to_b) in [("low", "medium"), ("medium", "normal"), ("normal", "low")] {
        apply(&daemon, to_a, to_b);
        assert_eq!(daemon.port("a").0["latency-sensitivity"], to_a);
        assert_eq!(daemon.port("b").reason(), None);
        talk(&mut a, &mut b);
    }
    assert_uninterrupted(&daemon);
}

/// Whether a process like this one may lock `bytes` of memory: with CAP_IPC_LOCK, or below RLIMIT_MEMLOCK.
fn may_lock(bytes: u64) -> bool {
    const CAP_IPC_LOCK: u64 = 1 << 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let caps = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let most = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    u64::from_str_radix(caps.trim(), 16).unwrap() & CAP_IPC_LOCK != 0 || most.is_none_or(|most| bytes <= most)
}

#[test]
fn ports_become_high_and_cease_to_be_while_guests_talk() {
    let daemon = Daemon::start(|dir| profiles(dir, "normal", "low"));
    let [mut a, mut b] = nics(&daemon);
    // What each port is served by shows in the number of queues of the exclusive shard.
    let exclusive = || {
        let shards = daemon.linecard(&["shard", "list"]).unwrap();
        shards.as_array().unwrap().iter().find(|shard| shard["exclusive"] == true).unwrap()["queues"].as_u64().unwrap()
    };
    let pinned = |port: &str| daemon.port(port).0["detail"]["device"]["memory"]["pinned"].clone();
    let locked: &[&str] = match may_lock(a.vmm.ram.regions().iter().map(|region| region.len).sum()) {
        true => &["whole", "as it comes"],
        false => &["failed"],
    };
    assert_eq!(exclusive(), 0);
    apply(&daemon, "high", "low");
    assert_eq!(exclusive(), 4);
    let cpus = |port| daemon.port(port).0["cpus"][0].as_u64().unwrap() as usize;
    assert_eq!([cpus("b"), cpus("a")], two_cpus());
    talk(&mut a, &mut b);
    daemon.port_when("a", &format!("its memory is pinned: {locked:?}"), |_| {
        pinned("a").as_str().is_some_and(|how| locked.contains(&how))
    });
    write(&daemon, "high", "high");
    daemon.linecard(&["apply"]).unwrap_err();
    let refused = daemon.port("b");
    assert_eq!(refused.state(), "up", "a running port goes on as it was");
    assert!(refused.reason().unwrap().contains("needs 1 CPU of its own, and of the 1 in shards.exclusive 0 are free"));
    talk(&mut a, &mut b);
    apply(&daemon, "medium", "high");
    assert_eq!((exclusive(), daemon.port("b").reason()), (4, None));
    talk(&mut a, &mut b);
    daemon.port_when("a", "its memory is let go", |_| pinned("a").is_null());
    apply(&daemon, "low", "normal");
    assert_eq!(exclusive(), 0);
    talk(&mut a, &mut b);
    assert_uninterrupted(&daemon);
}

#[test]
fn a_port_at_high_keeps_that_before_new_ones_when_exclusive_cpus_move() {
    let [first, spare] = two_cpus();
    // `b` alone at first; `a`, whose name comes first, is new when the two CPUs change places.
    let with = |dir: &Path, [shared, exclusive]: [usize; 2], ports: &[(&str, &str)]| {
        let port = |(name, mode): &(&str, &str)| port_with(dir, name, "lan", mode, ", latency-sensitivity: high");
        let head = preamble_with(dir, &format!(", exclusive: \"{exclusive}\""));
        let head = head.replace(&format!("cpus: \"{first}\""), &format!("cpus: \"{shared}\""));
        head + "networks: { lan: {} }\nports:\n" + &ports.iter().map(port).collect::<String>()
    };
    let daemon = Daemon::start(|dir| with(dir, [first, spare], &[("b", "server")]));
    let mut cpus = [first, spare];
    // The second time `b` is made anew as well.
    for mode in ["server", "client"] {
        cpus.reverse();
        let file = with(daemon.dir(), cpus, &[("a", "server"), ("b", mode)]);
        std::fs::write(daemon.dir().join("linecard.yaml"), file).unwrap();
        daemon.linecard(&["apply"]).unwrap_err();
        let (a, b) = (daemon.port("a"), daemon.port("b"));
        assert_eq!((b.state(), a.state()), ("down", "stopped"), "{mode}: {b:?} {a:?}");
        assert_eq!(b.0["cpus"], serde_json::json!([cpus[1]]));
        let why = a.reason().unwrap();
        assert!(why.contains("needs 1 CPU of its own, and of the 1 in shards.exclusive 0 are free"), "{why}");
    }
}

/// Ports `a` and `b` at `high`, of these VMs; the spare CPU is exclusive.
fn of_vms(dir: &Path, vms: [&str; 2]) -> String {
    let more = |vm| format!(", latency-sensitivity: high, affinity: vm, labels: {{ vm: {vm} }}");
    let ports = [("a", vms[0]), ("b", vms[1])].map(|(name, vm)| port_with(dir, name, "lan", "server", &more(vm)));
    let head = preamble_with(dir, &format!(", exclusive: \"{}\"", spare_cpu()));
    format!("{head}networks: {{ lan: {{}} }}\nports:\n{}", ports.concat())
}

#[test]
fn a_vm_with_the_only_exclusive_cpu_can_be_renamed_while_it_talks() {
    let spare = spare_cpu();
    let daemon = Daemon::start(|dir| of_vms(dir, ["old"; 2]));
    let [mut a, mut b] = nics(&daemon);
    let apply = |vms| {
        std::fs::write(daemon.dir().join("linecard.yaml"), of_vms(daemon.dir(), vms)).unwrap();
        daemon.linecard(&["apply"])
    };
    assert_eq!(apply(["new"; 2]).unwrap()["obstacles"], serde_json::json!({}));
    exchange(&mut a, &mut b, 64);
    apply(["new", "other"]).unwrap_err();
    assert!(daemon.port("b").reason().unwrap().starts_with("not served as asked but as before: "));
    exchange(&mut a, &mut b, 64);
    assert_eq!(apply(["other"; 2]).unwrap()["obstacles"], serde_json::json!({}));
    for port in ["a", "b"] {
        let port = daemon.port(port);
        assert_eq!((&port.0["cpus"], &port.0["detail"]["connections"]), (&serde_json::json!([spare]), &1.into()));
        assert!(port.reason().is_none() && port.is_conserved());
    }
}

#[test]
fn everything_but_shards_leaves_a_cpu_that_becomes_exclusive() {
    let spare = spare_cpu();
    let daemon = Daemon::start(|dir| pair(dir, ["normal"; 2]));
    let _nics = nics(&daemon);
    let pid = daemon.linecard(&["status"]).unwrap()["pid"].clone();
    // The names of those that may run there.
    let on_it = || -> Vec<String> {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let status = threads.filter_map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).ok());
        let value = |status: &str, key: &str| {
            status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_string()
        };
        // Words of 32 CPUs, the lowest last.
        let word = |mask: &str| u32::from_str_radix(mask.rsplit(',').nth(spare / 32).unwrap(), 16).unwrap();
        status
            .filter(|status| word(&value(status, "Cpus_allowed:")) >> (spare % 32) & 1 == 1)
            .map(|status| value(&status, "Name:"))
            .collect()
    };
    assert!(on_it().len() > 1);
    let shared = pair(daemon.dir(), ["normal"; 2]);
    let exclusive = shared.replace("idle: adaptive", &format!("idle: adaptive, exclusive: \"{spare}\""));
    std::fs::write(daemon.dir().join("linecard.yaml"), exclusive).unwrap();
    daemon.linecard(&["apply"]).unwrap();
    // The one that serves, and those that are there to stand in for it.
    let there = on_it();
    assert!(there.len() > 1 && there.iter().all(|name| *name == format!("shard-{spare}")), "{there:?}");
}

#[test]
fn shards_come_and_go_while_guests_talk() {
    let [first, second] = two_cpus().map(|cpu| cpu.to_string());
    let both = format!("{first},{second}");
    let was = format!("cpus: \"{first}\"");
    let on = |dir: &Path, cpus: &str| pair(dir, ["normal"; 2]).replace(&was, &format!("cpus: \"{cpus}\""));
    let daemon = Daemon::start(|dir| on(dir, &first));
    let [mut a, mut b] = nics(&daemon);
    let file = daemon.dir().join("linecard.yaml");
    for (cpus, expected) in [(&both, 2), (&second, 1), (&first, 1)] {
        std::fs::write(&file, on(daemon.dir(), cpus)).unwrap();
        let plan = daemon.linecard(&["plan"]).unwrap();
        assert!(
            plan["steps"][0]["subject"] == "shards" && plan["restart-needed"].as_array().unwrap().is_empty(),
            "{plan}"
        );
        daemon.linecard(&["apply"]).unwrap();
        exchange(&mut a, &mut b, 64);
        assert_eq!(daemon.linecard(&["shard", "list"]).unwrap().as_array().unwrap().len(), expected);
    }
    std::fs::write(&file, on(daemon.dir(), &format!("{first},8191"))).unwrap();
    let refused = daemon.linecard(&["apply"]).unwrap_err();
    assert!(refused.contains("shards.cpus names CPU 8191"), "{refused}");
    exchange(&mut a, &mut b, 64);
    for port in ["a", "b"] {
        assert!(daemon.port(port).is_conserved() && daemon.port(port).0["detail"]["connections"] == 1);
    }
    assert_eq!(daemon.linecard(&["shard", "moves"]).unwrap(), serde_json::json!([]));
}
