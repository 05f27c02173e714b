//! The API of a real daemon: every route, who is told what, and what survives.

#![allow(clippy::unwrap_used)]

mod daemon;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use daemon::{Daemon, broadcast, capture, text};
use serde_json::json;

const TWO_PORTS: &str = "networks: { lan: {} }\nports:\n  a: { \"null\": {}, network: lan, mac: \"02:00:00:00:00:0a\" }\n  b: { \"null\": {}, network: lan }\n";

/// Paths of every `.route("…")` in the product.
fn routes() -> BTreeSet<String> {
    let sources = ["src/control/http/routes.rs", "src/control/http/mod.rs", "src/observe/metrics.rs"];
    let mut paths = BTreeSet::new();
    for source in sources {
        let source = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/").to_string() + source).unwrap();
        paths.extend(source.split(".route(\"").skip(1).map(|rest| rest.split('"').next().unwrap().to_string()));
    }
    assert!(paths.remove("/openapi.json"), "the document does not describe itself");
    paths
}

#[test]
fn openapi_lists_every_route_and_every_listed_method_is_served() {
    let daemon = Daemon::start(TWO_PORTS);
    let document = daemon.http("GET", "/openapi.json", "").json();
    let listed = document["paths"].as_object().unwrap();
    assert_eq!(listed.keys().cloned().collect::<BTreeSet<_>>(), routes());
    for (path, methods) in listed {
        for method in methods.as_object().unwrap().keys().map(|method| method.to_uppercase()) {
            let answer = daemon.http(&method, &path.replace("{name}", "nobody"), "");
            assert!(!answer.body.contains("nothing at this path"), "{method} {path}: {}", answer.body);
            assert_ne!(answer.status, 405, "{method} {path}");
        }
        assert_eq!(daemon.http("PATCH", &path.replace("{name}", "a"), "").status, 405, "{path}");
    }
    let answer = daemon.http("GET", "/v1/nothing", "");
    assert_eq!((answer.status, answer.json()["fix"].is_string()), (404, true));
}

#[test]
fn refusals_say_what_is_wrong_and_what_to_do() {
    let daemon = Daemon::start(TWO_PORTS);
    let post = |body: &str| daemon.http("POST", "/v1/ports", body);
    let cases = [
        (post(r#"{"name":"a","port":{"null":{},"network":"lan"}}"#), 409, "there is a port a already"),
        (post(r#"{"name":"c","port":{"null":{},"network":"lam"}}"#), 422, "`lan`"),
        (post(r#"{"name":"../c","port":{"null":{},"network":"lan"}}"#), 422, "is not a name"),
        (post("{"), 422, "not what this path takes"),
        (daemon.http("DELETE", "/v1/ports/a", ""), 409, "is one of "),
        (daemon.http("DELETE", "/v1/ports/c", ""), 404, "there is no port c"),
        (daemon.http("GET", "/v1/drops?port=c", ""), 404, "there is no port c"),
        (daemon.http("GET", "/v1/fdb?network=wan", ""), 404, "there is no network wan"),
        (daemon.http("GET", "/v1/fdb?mac=zz", ""), 400, "MAC"),
        (daemon.http("POST", "/v1/apply", "version: 1\nport: {}\n"), 422, "port"),
    ];
    for (answer, status, part) in cases {
        assert_eq!(answer.status, status, "{}", answer.body);
        assert!(answer.json()["error"].as_str().unwrap().contains(part), "{part}: {}", answer.body);
    }
    let refused = daemon.http("POST", "/v1/plan?file=x.yaml", "version: 1\nport: {}\n").json();
    assert_eq!(refused["diagnostics"][0]["file"], "x.yaml");
    assert_eq!(refused["diagnostics"][0]["line"], 2);
}

#[test]
fn a_long_list_of_stations_comes_in_pieces_and_whole() {
    const EACH: u16 = 3000;
    let captures = tempfile::tempdir().unwrap();
    let mut ports = String::new();
    for port in 1..=2u8 {
        let file = captures.path().join(format!("{port}.pcap"));
        let frames: Vec<_> = (0..EACH).map(|n| broadcast([2, 0, 0, port, (n >> 8) as u8, n as u8])).collect();
        fs::write(&file, capture(&frames)).unwrap();
        ports += &format!(
            "  r{port}: {{ replay: {{ file: {}, interval: 1ms, loop: true }}, network: n{port} }}\n",
            file.display()
        );
    }
    let daemon = Daemon::start(&format!("networks: {{ n1: {{}}, n2: {{}} }}\nports:\n{ports}"));
    daemon.until("all stations", || daemon.json("status")["fdb"]["entries"] == 2 * EACH);

    let wanted: Vec<_> = (1..=2u8)
        .flat_map(|port| (0..EACH).map(move |n| (port, n)))
        .map(|(port, n)| (format!("n{port}"), format!("02:00:00:{port:02x}:{:02x}:{:02x}", n >> 8, n & 0xff)))
        .collect();
    let stations = |list: &serde_json::Value| -> Vec<_> {
        let word = |entry: &serde_json::Value, key| entry[key].as_str().unwrap().to_string();
        list.as_array().unwrap().iter().map(|entry| (word(entry, "network"), word(entry, "mac"))).collect()
    };
    assert!(stations(&daemon.json("fdb list")) == wanted, "not all of them, or not in their order");
    assert!(stations(&daemon.json("fdb list --network n2")) == wanted[usize::from(EACH)..], "not all of one network");
    assert_eq!(daemon.json("fdb list --mac 02:00:00:02:00:07").as_array().unwrap().len(), 1);

    // A long one is not made before somebody takes it, a short one has its length.
    let length = |path: &str| {
        let mut stream = UnixStream::connect(daemon.path("api.sock")).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap().0.to_lowercase().contains("content-length:")
    };
    assert!(!length("/v1/fdb") && length("/v1/fdb?mac=02:00:00:02:00:07"));
}

#[test]
fn received_is_delivered_plus_dropped_and_drops_are_explained() {
    let captures = tempfile::tempdir().unwrap();
    let file = captures.path().join("frames.pcap");
    // Three good frames, two from an address that nobody may send from.
    let good = broadcast([2, 0, 0, 0, 0, 1]);
    let bad = broadcast([1, 0, 0, 0, 0, 1]);
    fs::write(&file, capture(&[good.clone(), bad.clone(), good.clone(), bad, good])).unwrap();
    let replay = format!("  r: {{ replay: {{ file: {} }}, network: lan }}\n", file.display());
    let daemon = Daemon::start(&format!("{TWO_PORTS}{replay}"));
    daemon.until("five frames", || daemon.json("port show r")["counters"]["rx_frames"] == 5);

    let counters = &daemon.json("port show r")["counters"];
    assert_eq!((&counters["rx_delivered"], &counters["rx_dropped"]), (&json!(3), &json!(2)));
    assert_eq!(counters["drops"], json!({ "source-invalid": 2 }));
    assert_eq!(counters["rx_bytes"], 5 * 64);
    for port in ["a", "b"] {
        assert_eq!(daemon.json(&format!("port show {port}"))["counters"]["tx_frames"], 3, "{port}");
    }
    let shown = daemon.prints("port show r");
    assert!(shown.contains("5 frames = 3 delivered + 2 dropped"), "{shown}");
    assert!(shown.contains("2 source-invalid: The source address is a group address"), "{shown}");
    let drops = daemon.prints("drops");
    assert!(drops.contains("No station may send from such an address"), "{drops}");
    assert_eq!(daemon.json("status")["frames"]["rx_dropped"], 2);

    let learned = daemon.json("fdb list --port r");
    assert_eq!((&learned[0]["mac"], &learned[0]["pinned"]), (&json!("02:00:00:00:00:01"), &json!(false)));
    assert_eq!(daemon.json("fdb list --port a")[0]["pinned"], true);
    assert_eq!(daemon.json("fdb flush")["flushed"], 1, "pins stay");
    assert_eq!(daemon.json("fdb list").as_array().unwrap().len(), 1);

    let metrics = daemon.http("GET", "/metrics", "").body;
    for line in [
        "linecard_port_rx_packets_total{port=\"r\"} 5\n",
        "linecard_port_drops_total{port=\"r\",direction=\"rx\",reason=\"source-invalid\"} 2\n",
        "linecard_port_tx_bytes_total{port=\"a\"} 192\n",
        "linecard_port_rx_gso_total{port=\"r\"} 0\n",
        "linecard_port_tx_gso_total{port=\"a\"} 0\n",
        "linecard_port_address_conflicts{port=\"a\"} 0\n",
        "linecard_loops_suspected{} 0\n",
        "linecard_port_held_up_total{port=\"a\"} 0\n",
        "linecard_port_barred_total{port=\"a\"} 0\n",
        "# TYPE linecard_queue_kicks counter\n",
        "# TYPE linecard_shard_busy_seconds counter\n",
        "# EOF\n",
    ] {
        assert!(metrics.contains(line), "{line}{metrics}");
    }
    let shards = daemon.json("shard list");
    assert_eq!(shards.as_array().unwrap().iter().map(|shard| shard["frames"].as_u64().unwrap()).sum::<u64>(), 5);
}

#[test]
fn ports_made_at_run_time_outlive_the_daemon() {
    let mut daemon = Daemon::start(TWO_PORTS);
    let socket = daemon.path("vm.sock");
    daemon.prints(&format!("port add vm --socket {} --network lan --queues 2 --label vm=one", socket.display()));
    assert!(daemon.cli_with("port add tmp", "null: {}\nnetwork: lan\n").status.success());
    assert!(socket.exists());
    let metrics = daemon.http("GET", "/metrics", "").body;
    for (ring, direction) in [(0, "tx"), (1, "rx"), (3, "rx")] {
        let line = format!("linecard_queue_kicks_total{{port=\"vm\",ring=\"{ring}\",direction=\"{direction}\"}} 0\n");
        assert!(metrics.contains(&line), "{line}{metrics}");
    }
    daemon.prints("port del tmp");

    daemon.restart(TWO_PORTS);
    let vm = daemon.json("port show vm");
    assert_eq!(
        (&vm["origin"], &vm["config"]["queues"], &vm["labels"]["vm"]),
        (&json!("run-time"), &json!(2), &json!("one"))
    );
    assert!(socket.exists());
    assert!(!daemon.cli("port show tmp").status.success());

    // A file that no longer has its network leaves the port there, stopped, with the reason.
    daemon.restart("networks: { wan: {} }\n");
    let vm = daemon.json("port show vm");
    assert_eq!(vm["state"], "stopped");
    assert!(vm["reason"].as_str().unwrap().contains("lan"), "{vm}");
    assert!(!socket.exists());

    // A file that has the port itself takes it over.
    daemon.restart(&format!("{TWO_PORTS}  vm: {{ \"null\": {{}}, network: lan }}\n"));
    assert_eq!(daemon.json("port show vm")["origin"], "file");
    daemon.restart(TWO_PORTS);
    assert!(!daemon.cli("port show vm").status.success());
}

#[test]
fn a_broken_state_file_is_kept_aside_and_the_daemon_starts() {
    let mut daemon = Daemon::start(TWO_PORTS);
    assert!(daemon.cli_with("port add tmp", r#"{"null": {}, "network": "lan"}"#).status.success());
    fs::write(daemon.path("state/ports.json"), "{ torn").unwrap();
    daemon.restart(TWO_PORTS);
    assert_eq!(fs::read_to_string(daemon.path("state/ports.json.bad")).unwrap(), "{ torn");
    assert!(daemon.log().contains("ports.json.bad"));
    assert_eq!(daemon.json("port list").as_array().unwrap().len(), 2);
}

#[test]
fn the_socket_is_private_and_goes_with_the_daemon() {
    let mut daemon = Daemon::start(TWO_PORTS);
    let socket = daemon.path("api.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o007, 0);
    assert!(daemon.end().success());
    assert!(!socket.exists());
}

#[test]
fn sockets_of_others_are_left_alone() {
    let mut daemon = Daemon::start(TWO_PORTS);
    let another = |file: &Path| {
        let output = Command::new(env!("CARGO_BIN_EXE_linecardd")).arg("--config").arg(file).output().unwrap();
        assert!(!output.status.success());
        text(&output.stderr)
    };
    let error = another(&daemon.path("linecard.yaml"));
    assert!(error.contains("another process answers on"), "{error}");
    assert_eq!(daemon.json("status")["ports-up"], 2, "the first daemon did not notice");

    // Killed: its socket is stale and taken over.
    daemon.kill();
    assert!(daemon.path("api.sock").exists());
    daemon.begin(TWO_PORTS);
    assert_eq!(daemon.json("status")["ports-up"], 2);

    assert!(daemon.end().success());
    fs::write(daemon.path("api.sock"), "somebody's").unwrap();
    assert!(another(&daemon.path("linecard.yaml")).contains("is not a socket"));
    assert_eq!(fs::read_to_string(daemon.path("api.sock")).unwrap(), "somebody's");
}

#[test]
fn a_port_that_cannot_be_had_does_not_take_others_down() {
    let blocked = tempfile::tempdir().unwrap();
    let socket = blocked.path().join("vm.sock");
    fs::write(&socket, "in the way").unwrap();
    let vm = format!("  vm: {{ vhost-user: {{ socket: {} }}, network: lan }}\n", socket.display());
    let daemon = Daemon::start(&format!("{TWO_PORTS}{vm}"));
    assert_eq!(daemon.json("port show vm")["state"], "stopped");
    assert_eq!(daemon.json("port show a")["state"], "up");
    let output = daemon.cli("apply");
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stdout));
    assert!(text(&output.stdout).contains("port vm is stopped"));
    assert_eq!(fs::read_to_string(&socket).unwrap(), "in the way");

    fs::remove_file(&socket).unwrap();
    let output = daemon.cli("apply");
    assert_eq!(text(&output.stdout), "~ port vm (was stopped, is tried again)\n");
    assert_eq!(daemon.json("port show vm")["state"], "down");
}

/// The records that `line` prints, which are JSON, one a line.
fn records(printed: &str) -> Vec<serde_json::Value> {
    printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn events_are_listed_followed_and_end_with_the_daemon() {
    let mut daemon = Daemon::start(TWO_PORTS);
    daemon.until("the ports are told", || daemon.prints("events").matches("\"port-up\"").count() == 2);
    let list = records(&daemon.prints("events"));
    let kinds: Vec<_> = list.iter().map(|record| record["event"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["daemon-started", "configuration-applied", "port-up", "port-up"]);
    assert_eq!((&list[0]["seq"], &list[0]["version"]), (&json!(1), &daemon.json("status")["version"]));
    assert!(list[0]["time"].as_str().unwrap().ends_with('Z'), "{}", list[0]);
    let table = daemon.prints("-o table events --since 1");
    assert!(table.starts_with("SEQ  TIME"), "{table}");
    assert!(table.contains("  configuration-applied  configuration 1: 3 steps\n"), "{table}");
    assert!(daemon.prints("-o yaml events").starts_with("---\nevent: daemon-started\nseq: 1\n"));
    assert!(daemon.log().contains("configuration 1: 3 steps"));

    let mut follower = Command::new(env!("CARGO_BIN_EXE_linecard"));
    let follower = follower.arg("--api").arg(daemon.path("api.sock")).args(["events", "--follow", "--since", "4"]);
    let mut follower = follower.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(follower.stdout.take().unwrap()));
    let mut next = || serde_json::from_str::<serde_json::Value>(&lines.next().unwrap().unwrap()).unwrap();
    daemon.write("nonsense\n");
    assert!(!daemon.http("POST", "/v1/apply", "").body.is_empty());
    let refused = next();
    assert_eq!((&refused["seq"], &refused["event"]), (&json!(5), &json!("configuration-refused")));
    daemon.write("networks: { lan: {} }\nports:\n  a: { \"null\": {}, network: lan }\n");
    daemon.prints("apply");
    let (applied, gone) = (next(), next());
    assert_eq!((&applied["event"], &applied["generation"]), (&json!("configuration-applied"), &json!(2)));
    assert_eq!((&gone["event"], &gone["port"]), (&json!("port-down"), &json!("b")));
    assert!(daemon.end().success());
    assert_eq!(next()["event"], "daemon-stopping");
    assert!(lines.next().is_none());
    assert!(follower.wait().unwrap().success());
}

#[test]
fn followers_have_places_and_a_place_is_free_when_its_connection_is() {
    use std::io::{Read, Write};
    let daemon = Daemon::start(TWO_PORTS);
    let follow = || {
        let mut stream = std::os::unix::net::UnixStream::connect(daemon.path("api.sock")).unwrap();
        stream.write_all(b"GET /v1/events?follow=true HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        (stream, text(&head))
    };
    let followers: Vec<_> = (0..linecard::limits::EVENT_FOLLOWERS).map(|_| follow()).collect();
    assert!(followers.iter().all(|(_, head)| head == "HTTP/1.1 200"));
    let refused = daemon.http("GET", "/v1/events?follow=true", "");
    assert_eq!(refused.status, 503, "{}", refused.body);
    drop(followers);
    daemon.until("a place is free", || follow().1 == "HTTP/1.1 200");
}
