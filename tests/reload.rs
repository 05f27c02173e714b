//! Changes of a running daemon touch what they concern and nothing else.

#![allow(clippy::unwrap_used)]

mod daemon;

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use daemon::{Daemon, broadcast, capture, text};
use rustix::process::Signal;
use serde_json::{Value, json};

/// A port that sends for ever, and two that take.
fn sections(directory: &std::path::Path, rest: &str) -> String {
    let file = directory.join("frames.pcap");
    fs::write(&file, capture(&[broadcast([2, 0, 0, 0, 0, 1])])).unwrap();
    format!(
        "networks: {{ lan: {{}}, dmz: {{}} }}\nports:\n  r: {{ replay: {{ file: {}, interval: 1ms, loop: true }}, network: lan }}\n{rest}",
        file.display()
    )
}

fn rx(port: &Value) -> u64 {
    port["counters"]["rx_frames"].as_u64().unwrap()
}

#[test]
fn a_change_touches_only_its_port_and_the_counters_of_others_go_on() {
    let files = tempfile::tempdir().unwrap();
    let a = "  a: { \"null\": {}, network: lan }\n";
    let daemon = Daemon::start(&sections(files.path(), &format!("{a}  b: {{ \"null\": {{}}, network: lan }}\n")));
    daemon.until("frames", || rx(&daemon.json("port show r")) > 50);

    daemon.write(&sections(files.path(), &format!("{a}  b: {{ loopback: {{}}, network: lan }}\n")));
    let before = daemon.json("port show r");
    assert_eq!(
        daemon.prints("plan"),
        "~ port b (made anew, its link goes down for a moment)\n    kind: null -> loopback\n"
    );
    assert_eq!(daemon.json("port show b")["kind"], "null", "planning changes nothing");
    let done = daemon.json("apply");
    assert_eq!(done["steps"].as_array().unwrap().len(), 1, "{done}");
    let after = daemon.json("port show r");
    assert!(rx(&after) >= rx(&before), "the counters went on");
    daemon.until("more frames", || rx(&daemon.json("port show r")) > rx(&after) + 50);
    assert_eq!(daemon.prints("plan"), "nothing changes\n");
}

#[test]
fn a_port_moves_to_another_network_without_being_made_anew() {
    let files = tempfile::tempdir().unwrap();
    let daemon =
        Daemon::start(&sections(files.path(), "  a: { \"null\": {}, network: lan, mac: \"02:00:00:00:00:0a\" }\n"));
    daemon.until("frames at a", || daemon.json("port show a")["counters"]["tx_frames"].as_u64().unwrap() > 10);
    daemon.write(&sections(
        files.path(),
        "  a: { \"null\": {}, network: dmz, mac: \"02:00:00:00:00:0b\", labels: { x: y } }\n",
    ));
    let text = daemon.prints("apply");
    assert_eq!(
        text,
        "~ port a\n    labels: not set -> {\"x\":\"y\"}\n    mac: 02:00:00:00:00:0a -> 02:00:00:00:00:0b\n    network: lan -> dmz\n"
    );
    let at_rest = daemon.json("port show a")["counters"]["tx_frames"].clone();
    assert!(at_rest.as_u64().unwrap() > 10, "its counters stayed");
    let pins = daemon.json("fdb list --port a");
    assert_eq!(pins[0]["mac"], "02:00:00:00:00:0b");
    assert_eq!((pins.as_array().unwrap().len(), &pins[0]["network"]), (1, &json!("dmz")));
    let sent = rx(&daemon.json("port show r"));
    daemon.until("more frames", || rx(&daemon.json("port show r")) > sent + 20);
    assert_eq!(daemon.json("port show a")["counters"]["tx_frames"], at_rest, "nothing of lan reaches it any more");
    assert!(daemon.json("port show r")["counters"]["drops"]["no-destination"].as_u64().unwrap() > 0);
}

/// Runs `ip` where the daemon's interfaces are.
fn ip(daemon: &Daemon, arguments: &str) {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/proc/{}/ns/net", daemon.pid().as_raw_nonzero())).arg("ip");
    let output = command.args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", text(&output.stderr));
}

#[test]
fn a_tap_that_was_deleted_is_made_again_by_apply() {
    let files = tempfile::tempdir().unwrap();
    // In a network namespace of its own, which takes root and iproute2.
    let own = "set -- unshare --net \"$@\"";
    let daemon =
        Daemon::start_after(own, "", &sections(files.path(), "  t: { tap: { interface: lc0 }, network: lan }\n"));
    let is = |state: &str| daemon.json("port show t")["state"] == state;
    let sent = || daemon.json("port show t")["counters"]["tx_frames"].as_u64().unwrap();
    let goes_on = |before: u64| daemon.until("frames reach the host", || sent() > before + 20);
    daemon.until("the TAP is up", || is("up"));
    goes_on(0);
    for _ in 0..2 {
        ip(&daemon, "link del lc0");
        daemon.until("its interface is gone", || is("stopped"));
        let reason = daemon.json("port show t")["reason"].to_string();
        assert!(reason.contains("interface lc0 was deleted; `linecard apply` makes it again"), "{reason}");
        assert_eq!(daemon.prints("plan"), "~ port t (was stopped, is tried again)\n");
        daemon.prints("apply");
        daemon.until("the TAP is there again", || is("up"));
        ip(&daemon, "link show lc0");
        goes_on(sent());
    }
    assert_eq!(daemon.prints("plan"), "nothing changes\n");
}

#[test]
fn ports_may_swap_sockets_and_addresses() {
    let sockets = tempfile::tempdir().unwrap();
    let port = |name: &str, socket: &str, mac: &str| {
        let socket = sockets.path().join(socket);
        format!(
            "  {name}: {{ vhost-user: {{ socket: {} }}, network: lan, mac: \"02:00:00:00:00:{mac}\" }}\n",
            socket.display()
        )
    };
    let lan = "networks: { lan: {} }\nports:\n";
    let daemon = Daemon::start(&format!("{lan}{}{}", port("a", "1", "01"), port("b", "2", "02")));
    daemon.write(&format!("{lan}{}{}", port("a", "2", "02"), port("b", "1", "01")));
    assert_eq!(daemon.json("apply")["stopped"], json!({}));
    for (name, mac) in [("a", "02:00:00:00:00:02"), ("b", "02:00:00:00:00:01")] {
        let pins = daemon.json(&format!("fdb list --port {name}"));
        assert_eq!((pins.as_array().unwrap().len(), pins[0]["mac"].as_str().unwrap()), (1, mac));
    }
}

#[test]
fn networks_come_and_go() {
    let daemon = Daemon::start("networks: { one: {} }\nports:\n  a: { \"null\": {}, network: one }\n");
    daemon.write("networks: { two: { mac-age: 10m } }\nports:\n  a: { \"null\": {}, network: two }\n");
    assert_eq!(daemon.prints("apply"), "+ network two\n~ port a\n    network: one -> two\n- network one\n");
    let networks = daemon.json("network list");
    assert_eq!(networks.as_array().unwrap().len(), 1);
    assert_eq!((&networks[0]["name"], &networks[0]["ports"]), (&json!("two"), &json!(["a"])));
    assert_eq!(networks[0]["mac-age-seconds"], 600);
}

#[test]
fn hangup_applies_the_file_and_a_bad_file_changes_nothing() {
    let daemon = Daemon::start("networks: { lan: {} }\n");
    daemon.write("networks: { lan: {} }\nports:\n  a: { \"null\": {}, network: lan }\n");
    daemon.signal(Signal::HUP);
    daemon.until("port a", || daemon.json("port list").as_array().unwrap().len() == 1);

    daemon.write("networks: { lan: {} }\nports:\n  a: { \"null\": {}, network: lam }\n");
    daemon.signal(Signal::HUP);
    daemon.until("the refusal", || daemon.json("status")["refused"].is_string());
    assert_eq!(daemon.json("port show a")["network"], "lan");
    let log = daemon.log();
    assert!(log.contains("linecard.yaml:5:"), "{log}");
    assert_eq!(daemon.cli("apply").status.code(), Some(1));
    assert!(daemon.prints("status").contains("the last configuration was refused"));
}

#[test]
fn a_file_that_cannot_be_read_is_refused_with_the_cause() {
    let daemon = Daemon::start("networks: { lan: {} }\n");
    fs::remove_file(daemon.path("linecard.yaml")).unwrap();
    daemon.signal(Signal::HUP);
    daemon.until("the refusal", || daemon.json("status")["refused"].is_string());
    let cause = "linecard.yaml: No such file or directory";
    let refused = daemon.json("status")["refused"].to_string();
    assert!(refused.contains(cause), "{refused}");
    daemon.until("the event", || daemon.prints("events").contains("configuration-refused"));
    assert!(daemon.prints("events").contains(cause), "{}", daemon.prints("events"));
}

#[test]
fn hangups_while_it_starts_are_obeyed_when_it_has() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("linecard.yaml");
    let here = directory.path().display();
    // A comment that takes a while to read, so that there is a start to interrupt.
    let comment = "# x\n".repeat(1 << 19);
    let written = format!("version: 1\ndaemon: {{ api: {here}/api.sock, state-dir: {here}/state }}\n");
    fs::write(&file, format!("{written}{comment}")).unwrap();
    let log = fs::File::create(directory.path().join("log")).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_linecardd")).arg("--config").arg(&file).stderr(log).spawn().unwrap();
    // It has read the file, so `main` has begun.
    let read = || {
        let io = fs::read_to_string(format!("/proc/{}/io", child.id())).unwrap_or_default();
        io.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse::<usize>().ok()).unwrap_or(0)
    };
    let begin = Instant::now();
    while read() < comment.len() {
        assert!(begin.elapsed() < Duration::from_secs(60), "the file is not read");
    }
    for _ in 0..20 {
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::HUP).unwrap();
    }
    let mut daemon = Daemon::of(directory, child);
    daemon.until("the second time", || daemon.json("status")["generation"] == 2);
    assert!(daemon.end().success());
}

#[test]
fn another_file_lasts_until_the_next_start_and_says_so() {
    let daemon = Daemon::start("networks: { lan: {} }\n");
    let same = fs::read_to_string(daemon.path("linecard.yaml")).unwrap();
    fs::write(daemon.path("other.yaml"), format!("{same}ports:\n  a: {{ \"null\": {{}}, network: lan }}\n")).unwrap();
    let output = daemon.cli(&format!("apply {}", daemon.path("other.yaml").display()));
    assert_eq!(text(&output.stdout), "+ port a\n");
    assert!(text(&output.stderr).contains("its own file is"), "{}", text(&output.stderr));
    assert_eq!(daemon.prints("plan"), "- port a\n");
}

#[test]
fn settings_of_the_daemon_itself_wait_for_a_restart() {
    let daemon = Daemon::start("networks: { lan: {} }\n");
    daemon.write("networks: { lan: {} }\nshards: { idle: never }\n");
    let text = daemon.prints("plan");
    assert_eq!(text, "nothing changes\n! shards.idle: adaptive -> never: only after a restart of linecardd\n");
}

#[test]
fn what_a_port_may_have_flooded_changes_while_it_floods() {
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("frames.pcap");
    fs::write(&file, capture(&[broadcast([2, 0, 0, 0, 0, 1])])).unwrap();
    let sections = |storm: &str| {
        let replay = format!("replay: {{ file: {}, interval: 1ms, loop: true }}", file.display());
        format!(
            "networks: {{ lan: {{}} }}\nports:\n  r: {{ {replay}, network: lan{storm} }}\n  a: {{ \"null\": {{}}, network: lan }}\n"
        )
    };
    let daemon = Daemon::start(&sections(""));
    let given = || daemon.json("port show a")["counters"]["tx_frames"].as_u64().unwrap();
    let dropped = || daemon.json("port show r")["counters"]["drops"]["storm-limited"].as_u64().unwrap_or(0);
    daemon.until("more than a guest may", || given() > 1200);
    assert_eq!(dropped(), 0, "only guests are bounded unless somebody says so");

    daemon.write(&sections(", storm: { broadcast: 0 }"));
    assert_eq!(daemon.prints("apply"), "~ port r\n    storm.broadcast: off -> 0\n");
    let before = given();
    daemon.until("frames that are dropped", || dropped() > 50);
    assert_eq!(given(), before);
    let text = daemon.prints("port show r");
    assert!(text.contains("broadcast 0/s") && text.contains("By class: "), "{text}");
    let metrics = daemon.http("GET", "/metrics", "").body;
    assert!(metrics.contains("linecard_port_storm_drops_total{port=\"r\",class=\"broadcast\"}"), "{metrics}");
    let began = || {
        let events: Vec<Value> =
            daemon.prints("events").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let began = events.iter().find(|event| event["event"] == "storm-began")?;
        Some(["port", "traffic", "limit"].map(|key| began[key].clone()))
    };
    daemon.until("an event", || began().is_some());
    assert_eq!(began().unwrap(), [json!("r"), json!("broadcast"), json!(0)]);

    daemon.write(&sections(", storm: off"));
    assert_eq!(daemon.prints("apply"), "~ port r\n    storm.broadcast: 0 -> off\n");
    daemon.until("more frames", || given() > before + 50);
    let counters = daemon.json("port show r")["counters"].clone();
    assert_eq!(counters["drops"]["storm-limited"], counters["storm_drops"]["broadcast"], "{counters}");
}

/// What is not learned is told by port and limit wherever an operator looks, and is learned when the limit is raised.
#[test]
fn what_a_limit_keeps_from_being_learned_is_shown_and_told() {
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("frames.pcap");
    fs::write(&file, capture(&[1, 2, 3].map(|last| broadcast([2, 0, 0, 0, 0, last])))).unwrap();
    let sections = |macs: u32| {
        let replay = format!("replay: {{ file: {}, interval: 1ms, loop: true }}", file.display());
        format!(
            "networks: {{ lan: {{}} }}\nports:\n  r: {{ {replay}, network: lan, limits: {{ macs: {macs} }} }}\n  a: {{ \"null\": {{}}, \
             network: lan }}\n"
        )
    };
    let daemon = Daemon::start(&sections(2));
    daemon.until("a refusal", || daemon.json("port show r")["macs-refused"]["port"].as_u64() > Some(0));
    let text = daemon.prints("port show r");
    assert!(
        text.contains("2 of 2") && text.contains("times, when the port had as many as it may: `limits.macs`"),
        "{text}"
    );
    let port = daemon.json("port show r");
    assert_eq!((&port["macs"], &port["mac-limit"]), (&json!(2), &json!(2)), "{port}");
    assert!(daemon.json("network list")[0]["macs-refused"]["port"].as_u64() > Some(0));
    let list = daemon.prints("network list");
    assert!(list.contains("REFUSED") && list.contains("2 of 65536"), "{list}");
    let metrics = daemon.http("GET", "/metrics", "").body;
    for line in [
        "linecard_port_stations{port=\"r\"} 2\n",
        "linecard_port_stations_limit{port=\"r\"} 2\n",
        "linecard_port_stations_refused_total{port=\"r\",limit=\"port\"} ",
        "linecard_network_stations{network=\"lan\"} 2\n",
        "linecard_network_stations_limit{network=\"lan\"} 65536\n",
    ] {
        assert!(metrics.contains(line), "{line}{metrics}");
    }
    let told = || {
        let events = daemon.prints("events");
        let mut events = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.find(|event| event["event"] == "addresses-refused")
    };
    daemon.until("an event", || told().is_some());
    let told = ["network", "port", "limit", "most"].map(|key| told().unwrap()[key].clone());
    assert_eq!(told, [json!("lan"), json!("r"), json!("port"), json!(2)]);

    daemon.write(&sections(3));
    assert_eq!(daemon.prints("apply"), "~ port r\n    macs: 2 -> 3\n");
    daemon.until("the third one is learned", || daemon.json("port show r")["macs"] == 3);
}
