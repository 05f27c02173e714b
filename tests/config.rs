//! Configurations and what is said about them: every kind of mistake has a file in `data/config` with the expected text
//! beside it, and text that nobody would write must not bring the reader down.
//!
//! `LINECARD_REWRITE=1 cargo test --test config` writes the expected texts anew; read the difference before keeping it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use linecard::config::{
    CpuChoice, Idle, KindPlan, Offloads, Plan, SocketMode, StormRate, StormRates, check, check_port,
};
use linecard::ident::{Affinity, Compat, LatencySensitivity};
use proptest::prelude::*;
use serde_json::json;

/// Every key of the format, each once.
const EVERYTHING: &str = r#"
version: 1
daemon:
  { api: /run/l/api.sock, api-group: linecard, api-mode: "0600", state-dir: /run/l/state, metrics: "[::1]:9477", log: debug }
shards: { cpus: "2-3,8", exclusive: 5, idle: never, realtime: 50 }
networks: { lan: {}, dmz: { mac-age: 500ms, mac-limit: 10 }, spare: }
profiles:
  base: { network: dmz, mtu: 9000, limits: { macs: 7 }, offloads: { tso: false, uso: true },
    storm: { broadcast: 0, multicast: off }, labels: { a: base, b: base } }
  fast:
    { inherit: base, latency-sensitivity: high, affinity: vm, compat: "2026.11-no-offload", storm: off, labels: { b: fast } }
  both: { inherit: [fast, base], mtu: 1500 }
ports:
  u:
    vhost-user:
      { socket: /run/l/u.sock, mode: server, queues: 4, owner: 107, group: kvm, permissions: "0666", memory: 4096MiB }
    mac: 52:54:00:12:34:56
    profile: both
    network: lan
    offloads: { uso: false }
    storm: { unknown-unicast: 70 }
    labels: { c: u }
  c: { vhost-user: { socket: /run/l/c.sock, mode: client }, network: lan }
  t: { tap: { interface: tap0 }, profile: fast, mac: "52:54:00:12:34:56" }
  l: { loopback: {}, network: lan, latency-sensitivity: low }
  n: { null: , network: lan }
  r: { replay: { file: /f.pcap, interval: 2ms, loop: true }, network: lan }
  f: { faulty: { drop-every: 3, flip-every: 5, seed: 7 }, network: lan }
"#;

fn plan(text: &str) -> Plan {
    check("test.yaml", text).unwrap_or_else(|wrong| panic!("{}", wrong.render(false)))
}

#[test]
fn floods_of_a_tap_are_bounded_while_there_is_a_loop() {
    let tap = |more: &str| {
        let text = format!(
            "version: 1\nnetworks: {{ lan: }}\nports: {{ t: {{ tap: {{ interface: t }}, network: lan{more} }} }}\n"
        );
        let storm = plan(&text).ports["t"].storm;
        [false, true].map(|in_loop| storm.in_force(in_loop)).map(|s| [s.broadcast, s.multicast, s.unknown_unicast])
    };
    let guests = [Some(1000), Some(10_000), Some(5000)];
    assert_eq!(tap(""), [[None; 3], guests]);
    assert_eq!(tap(", storm: auto"), [[None; 3], guests]);
    assert_eq!(tap(", storm: off"), [[None; 3]; 2]);
    let mixed = tap(", storm: { broadcast: 7, multicast: off }");
    assert_eq!(mixed, [[Some(7), None, None], [Some(7), None, Some(5000)]]);
}

#[test]
fn each_kind_of_mistake_is_told_as_expected() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/config");
    let rewrite = std::env::var_os("LINECARD_REWRITE").is_some();
    let mut seen = 0;
    let mut wrong = String::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap();
        let told = match check(name, &fs::read_to_string(&path).unwrap()) {
            Ok(plan) => panic!("{name} is accepted: {plan:#?}"),
            Err(diagnostics) => diagnostics.render(false),
        };
        let golden = path.with_extension("stderr");
        if rewrite {
            fs::write(&golden, &told).unwrap();
        }
        let expected = fs::read_to_string(&golden).unwrap_or_default();
        if told != expected {
            wrong.push_str(&format!("\n{name}:\n{}", difference(&expected, &told)));
        }
        seen += 1;
    }
    assert!(seen >= 20, "only {seen} files in {}", folder.display());
    assert!(wrong.is_empty(), "told otherwise than expected (- expected, + told):{wrong}");
}

/// The lines of both texts; those at their common begin and end are left out.
fn difference(expected: &str, told: &str) -> String {
    let (a, b): (Vec<_>, Vec<_>) = (expected.lines().collect(), told.lines().collect());
    let begin = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    let end = a[begin..].iter().rev().zip(b[begin..].iter().rev()).take_while(|(a, b)| a == b).count();
    let lines = |sign: char, lines: &[&str]| lines.iter().map(|line| format!("{sign}{line}\n")).collect::<String>();
    lines('-', &a[begin..a.len() - end]) + &lines('+', &b[begin..b.len() - end])
}

#[test]
fn defaults_are_filled_in() {
    let plan = plan("version: 1\nnetworks: { lan: }\nports:\n  a: { vhost-user: { socket: /a }, network: lan }\n");
    let expected = json!({
        "daemon": { "api": "/run/linecard/api.sock", "api-mode": "0660", "state-dir": "/var/lib/linecard", "log": "info" },
        "shards": { "cpus": "auto", "exclusive": [], "idle": "adaptive" },
        "networks": { "lan": { "mac-age": "5m", "mac-limit": 65536 } },
        "profiles": {},
        "ports": { "a": {
            "kind": { "vhost-user": { "socket": "/a", "mode": "server", "queues": 1, "permissions": "0660" } },
            "network": "lan",
            "latency-sensitivity": "normal",
            "affinity": "auto",
            "macs": 4096,
            "storm": { "broadcast": 1000, "multicast": 10000, "unknown-unicast": 5000 },
            "offloads": { "csum": true, "tso": true, "ecn": true, "uso": true, "gro": true },
            "compat": "2026.11",
        } },
    });
    assert_eq!(serde_json::to_value(&plan).unwrap(), expected);
}

#[test]
fn every_key_arrives() {
    let plan = plan(EVERYTHING);
    assert_eq!(plan.daemon.api_mode, 0o600);
    assert_eq!(plan.daemon.metrics, Some("[::1]:9477".parse().unwrap()));
    assert_eq!(plan.shards.cpus, CpuChoice::List(vec![2, 3, 8]));
    assert_eq!((plan.shards.exclusive.as_slice(), plan.shards.idle), ([5].as_slice(), Idle::Never));
    assert_eq!(plan.shards.realtime, Some(50));
    assert_eq!(plan.profiles["both"].affinity, Some(Affinity::Vm), "inherited");
    assert_eq!((plan.ports["t"].affinity, plan.ports["l"].affinity), (Affinity::Vm, Affinity::Auto));
    assert_eq!(plan.networks["dmz"].mac_age, Duration::from_millis(500));
    assert_eq!(plan.networks["spare"].mac_limit, 65536);
    let KindPlan::VhostUser(vnic) = &plan.ports["u"].kind else { panic!("{:?}", plan.ports["u"]) };
    assert_eq!((vnic.queues, vnic.owner.as_deref(), vnic.permissions), (4, Some("107"), 0o666));
    assert_eq!((vnic.memory, serde_json::to_value(vnic).unwrap()["memory"].as_str()), (Some(4 << 30), Some("4GiB")));
    let KindPlan::VhostUser(client) = &plan.ports["c"].kind else { panic!("{:?}", plan.ports["c"]) };
    assert_eq!(client.mode, SocketMode::Client);
    assert_eq!((&plan.ports["l"].kind, &plan.ports["n"].kind), (&KindPlan::Loopback, &KindPlan::Null));
    let KindPlan::Replay(replay) = &plan.ports["r"].kind else { panic!("{:?}", plan.ports["r"]) };
    assert!(replay.repeat && replay.interval == Duration::from_millis(2));
    let KindPlan::Faulty(faulty) = &plan.ports["f"].kind else { panic!("{:?}", plan.ports["f"]) };
    assert_eq!((faulty.drop_every, faulty.flip_every, faulty.seed), (Some(3), Some(5), 7));
    assert_eq!((faulty.truncate_every, faulty.duplicate_every), (None, None));
}

#[test]
fn own_keys_win_over_profiles_and_later_profiles_over_earlier_ones() {
    let plan = plan(EVERYTHING);
    let port = &plan.ports["u"];
    assert_eq!(port.network.as_str(), "lan", "its own, not base's");
    assert_eq!(port.mtu, Some(1500), "its profile's own");
    assert_eq!(port.latency, LatencySensitivity::High, "through two generations");
    assert_eq!(port.macs, 7);
    assert_eq!(
        port.offloads,
        Offloads { csum: true, tso: false, ecn: true, uso: false, gro: true },
        "switch by switch"
    );
    assert_eq!((port.compat, plan.ports["c"].compat), (Compat::V2026_11NoOffload, Compat::V2026_11));
    let storm = |broadcast, multicast, unknown_unicast| StormRates { broadcast, multicast, unknown_unicast };
    let (off, rate) = (StormRate::Off, StormRate::PerSecond);
    assert_eq!(
        port.storm,
        storm(rate(0), off, rate(70)),
        "`base` comes after `fast`, which switches all off, in `both`"
    );
    assert_eq!(
        plan.ports["c"].storm,
        storm(rate(1000), rate(10_000), rate(5000)),
        "a guest's, unless somebody says otherwise"
    );
    assert_eq!((plan.ports["t"].storm, plan.ports["l"].storm), (storm(off, off, off), storm(off, off, off)));
    let labels: Vec<_> = port.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(labels, [("a", "base"), ("b", "base"), ("c", "u")], "`base` comes after `fast` in `both`");
    assert_eq!(plan.ports["t"].labels["b"], "fast");
}

#[test]
fn the_label_vm_matters_to_the_shards_only_where_affinity_reads_it() {
    let service = |affinity: &str, vm: &str| {
        let text = format!(
            "version: 1\nnetworks: {{ lan: {{}} }}\nports:\n  a: {{ \"null\": {{}}, network: lan, affinity: {affinity}, labels: {{ vm: {vm} }} }}\n"
        );
        plan(&text).ports["a"].service()
    };
    for affinity in ["auto", "vnic", "queue"] {
        assert_eq!(service(affinity, "one"), service(affinity, "two"), "{affinity}");
    }
    assert_eq!(service("vm", "one").vm.as_deref(), Some("one"));
    assert_ne!(service("vm", "one"), service("vm", "two"));
}

#[test]
fn a_port_from_elsewhere_is_checked_against_the_plan() {
    let mut plan = plan(EVERYTHING);
    let value = json!({ "vhost-user": { "socket": "/run/l/x.sock" }, "profile": "fast" });
    let port = check_port("x", value.clone(), &plan).unwrap();
    assert_eq!((port.network.as_str(), port.mtu), ("dmz", Some(9000)));
    plan.profiles.get_mut("fast").unwrap().mtu = Some(1280);
    assert_eq!(check_port("x", value, &plan).unwrap().mtu, Some(1280), "the same value after a reload");

    let itself = json!({ "tap": { "interface": "tap0" }, "network": "lan" });
    assert!(check_port("t", itself.clone(), &plan).is_ok(), "a port may be replaced by one with the same interface");
    for (name, value, says) in [
        ("x", itself, "port `t` has the interface tap0 already"),
        ("x", json!({ "vhost-user": { "socket": "/run/l/api.sock" }, "network": "lan" }), "API"),
        ("x", json!({ "null": {}, "network": "lan", "mac": "52:54:00:12:34:56" }), "port `u` has the address"),
        (
            "x",
            json!({ "null": {}, "network": "lna" }),
            "ports.x.network: there is no network `lna` (did you mean `lan`?)",
        ),
        ("x", json!({ "null": {}, "profile": "fats" }), "did you mean `fast`?"),
        (
            "x",
            json!({ "null": {}, "netwrok": "lan" }),
            "ports.x.netwrok: unknown key `netwrok` (did you mean `network`?)",
        ),
        ("x", json!({ "null": {} }), "in no network"),
        ("x", json!("null"), "expected a mapping"),
        ("../x", json!({ "null": {}, "network": "lan" }), "is not a name"),
    ] {
        let wrong = check_port(name, value, &plan).unwrap_err();
        assert!(wrong.to_string().contains(says), "{says}: {wrong}");
        assert_eq!(wrong.list()[0].place, None);
        assert!(wrong.render(true).contains("error"));
    }
}

#[test]
fn diagnostics_are_data() {
    let wrong = check("a.yaml", "version: 1\nnetworks: { lan: {}, lan: {} }\nprots: {}\n").unwrap_err();
    let expected = json!([
        {
            "file": "a.yaml", "line": 2, "column": 22, "length": 3, "path": "networks.lan",
            "message": "this key is written twice",
            "related": [{ "file": "a.yaml", "line": 2, "column": 13, "length": 3, "message": "first written here" }],
        },
        {
            "file": "a.yaml", "line": 3, "column": 1, "length": 5, "path": "prots",
            "message": "unknown key `prots`", "help": "did you mean `ports`?",
        },
    ]);
    assert_eq!(serde_json::to_value(&wrong).unwrap(), expected);
    assert_eq!(wrong.to_string().lines().count(), 2);
}

#[test]
fn large_inputs_are_bounded() {
    let long = format!("version: 1\n#{}", "x".repeat(linecard::config::TEXT_BYTES));
    assert!(check("long.yaml", &long).unwrap_err().render(false).contains("at most"));

    let list = format!("version: 1\nports: [{}]\n", "1,".repeat(2_000_000));
    assert!(check("list.yaml", &list).unwrap_err().to_string().contains("keys and values"));

    let wrong: String = (0..500).map(|n| format!("  p{n}: {{ nul: {{}}, network: {n} }}\n")).collect();
    let wrong = check("wrong.yaml", &format!("version: 1\nports:\n{wrong}")).unwrap_err();
    assert_eq!(wrong.list().len(), 100);
    assert!(wrong.render(false).ends_with("100 errors, and perhaps more\n"));

    let many: String = (0..5000).map(|n| format!("  p{n}: {{ null: {{}}, network: lan }}\n")).collect();
    let many = check("many.yaml", &format!("version: 1\nnetworks: {{ lan: {{}} }}\nports:\n{many}")).unwrap_err();
    assert_eq!(many.list().len(), 1);
    assert!(many.to_string().contains("a host has at most 4096"), "{many}");

    let chain = |length: usize| {
        let heirs: String = (1..length).map(|n| format!("  p{n}: {{ inherit: p{} }}\n", n - 1)).collect();
        format!("version: 1\nnetworks: {{ lan: {{}} }}\nprofiles:\n  p0: {{ network: lan }}\n{heirs}")
    };
    assert_eq!(plan(&chain(1024)).profiles["p1023"].network.as_ref().unwrap().as_str(), "lan");
    let many = check("chain.yaml", &chain(1025)).unwrap_err();
    assert!(many.to_string().contains("1025 profiles are too many"), "{many}");
}

#[test]
fn places_are_right_behind_wide_characters_and_windows_line_ends() {
    let text =
        "version: 1\r\nnetworks: { lan: {} }\r\nports: { a: { labels: { ä: 'x' }, null: {}, netwrok: lan } }\r\n";
    let wrong = check("wide.yaml", text).unwrap_err();
    let places: Vec<_> = wrong.list().iter().map(|d| (d.place.as_ref().unwrap().column, d.path.as_str())).collect();
    assert_eq!(places, [(25, "ports.a.labels.\"ä\""), (45, "ports.a.netwrok")]);
    assert!(wrong.render(false).contains("^^^^^^^"));
}

/// Words and signs that configurations are made of, thrown together.
fn scraps() -> impl Strategy<Value = String> {
    let scrap = prop::sample::select(vec![
        "version",
        "1",
        "ports",
        "networks",
        "profiles",
        "inherit",
        "lan",
        "a",
        "vhost-user",
        "socket",
        "null",
        "mac",
        ":",
        ": ",
        "- ",
        "? ",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "\n",
        "\n  ",
        "\n    ",
        "\t",
        "\"",
        "'",
        "#",
        "&x ",
        "*x",
        "!t ",
        "---",
        "...",
        "|",
        ">",
        "%YAML 1.2\n",
        "<<",
        "~",
        "\u{feff}",
        "\u{0}",
        "ä",
        "\u{85}",
        "\u{2028}",
        "0x7f",
        "-1",
        "1e999",
        ".nan",
        "99999999999999999999999",
    ]);
    prop::collection::vec(scrap, 0..60).prop_map(|scraps| scraps.concat())
}

/// Never panics, and what it says can be shown in every form.
fn survives(text: &str) {
    if let Err(wrong) = check("x.yaml", text) {
        assert!(!wrong.list().is_empty());
        wrong.render(false);
        wrong.render(true);
        serde_json::to_string(&wrong).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_is_survived(text in ".*") {
        survives(&text);
    }

    #[test]
    fn scraps_of_yaml_are_survived(text in scraps()) {
        survives(&text);
        survives(&format!("version: 1\nports:\n  {text}"));
    }

    #[test]
    fn damaged_configurations_are_survived(
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..12, scraps()), 1..4),
    ) {
        let mut text: Vec<char> = EVERYTHING.chars().collect();
        for (at, length, scrap) in edits {
            let at = at.index(text.len());
            let end = (at + length).min(text.len());
            text.splice(at..end, scrap.chars().take(6));
        }
        survives(&text.into_iter().collect::<String>());
    }

    #[test]
    fn any_value_is_survived_as_a_port(name in ".{0,8}", key in scraps(), value in scraps()) {
        static PLAN: LazyLock<Plan> = LazyLock::new(|| plan(EVERYTHING));
        for value in [json!({ &key: value }), json!({ "vhost-user": { &key: [value] } }), json!([[value]])] {
            if let Err(wrong) = check_port(&name, value, &PLAN) {
                wrong.render(true);
            }
        }
    }
}
