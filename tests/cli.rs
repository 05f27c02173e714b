//! What `linecard` and `linecardd` print and how they end.

#![allow(clippy::unwrap_used)]

mod daemon;

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use daemon::{Daemon, text};
use rustix::fs::{CWD, FileType, Mode, mknodat};

/// How long anything may take before a test gives up. Far more than it takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn linecard(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_linecard")).args(arguments).output().unwrap()
}

#[test]
fn without_a_daemon_it_says_so_and_how_to_get_one() {
    let output = linecard(&["--api", "/nonexistent/api.sock", "status"]);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3));
    assert!(
        error.starts_with("linecard: linecardd does not answer on /nonexistent/api.sock: is it running?"),
        "{error}"
    );
    assert_eq!(error.lines().count(), 1);
}

#[test]
fn files_are_checked_without_a_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("x.yaml");
    let path = file.to_str().unwrap();
    fs::write(&file, "version: 1\nnetworks: { lan: {} }\nports:\n  a: { \"null\": {}, network: lan }\n").unwrap();
    let output = linecard(&["check", path]);
    assert_eq!(text(&output.stdout), format!("{path} is good: 1 network, 1 port\n"));
    let plan = linecard(&["cpu", "plan", path]);
    let plan = text(&plan.stdout);
    assert!(plan.contains("shards.cpus is auto: ") && plan.contains("a (1 queue)"), "{plan}");
    let daemon =
        |file| Command::new(env!("CARGO_BIN_EXE_linecardd")).args(["--check", "--config", file]).output().unwrap();
    assert!(daemon(path).status.success());

    fs::write(&file, "version: 1\nnetworks: { lan: {} }\nports:\n  a: { \"null\": {}, netwerk: lan }\n").unwrap();
    for output in [linecard(&["check", path]), daemon(path)] {
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1));
        assert!(error.contains(":4:") && error.contains("did you mean `network`?"), "{error}");
        assert!(error.contains("netwerk: lan }"), "the line is shown: {error}");
    }
    let output = linecard(&["-o", "json", "check", path]);
    let list: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((list[0]["line"].as_u64(), output.status.code()), (Some(4), Some(1)));

    let output = linecard(&["check", "/nonexistent.yaml"]);
    assert!(text(&output.stderr).starts_with("linecard: cannot read /nonexistent.yaml: No such file"));
}

/// `linecard` with these words, little memory, and `input` to read; it must end.
fn limited(arguments: &[&str], input: &[u8]) -> Output {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 400000; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_linecard")]).args(arguments);
    let streams = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = streams.spawn().unwrap();
    // It may end without having read.
    let _ = child.stdin.take().unwrap().write_all(input);
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{arguments:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

#[test]
fn what_is_no_regular_file_or_has_no_end_is_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let pipe = pipe.to_str().unwrap();
    for command in [&["check"][..], &["cpu", "plan"]] {
        let told = |file| {
            let output = limited(&[command, &[file]].concat(), b"");
            assert_eq!(output.status.code(), Some(1), "{command:?} {file}: {}", text(&output.stderr));
            text(&output.stderr)
        };
        assert_eq!(told("/dev/zero"), "linecard: cannot read /dev/zero: it is a device, not a regular file\n");
        assert_eq!(told(pipe), format!("linecard: cannot read {pipe}: it is a pipe, not a regular file\n"));
    }
    let long = vec![b' '; (4 << 20) + 1];
    let port = ["--api", "/nonexistent/api.sock", "port", "add", "a"];
    for command in [&["check", "-"][..], &port] {
        let output = limited(command, &long);
        assert_eq!(output.status.code(), Some(1), "{command:?}: {}", text(&output.stderr));
        let told = "linecard: cannot read standard input: it is longer than 4194304 bytes, the most that is read\n";
        assert_eq!(text(&output.stderr), told);
    }
    let good = b"version: 1\n";
    assert_eq!(text(&limited(&["check", "-"], good).stdout), "standard input is good: 0 networks, 0 ports\n");
}

#[test]
fn every_shell_gets_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = linecard(&["completion", shell]);
        assert!(output.status.success());
        let script = text(&output.stdout);
        assert!(script.contains("latency-sensitivity") && script.contains("drops"), "{shell}");
    }
}

#[test]
fn what_is_not_understood_is_told_with_the_usage() {
    let output = linecard(&["port", "lst"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("'list'"), "{}", text(&output.stderr));
    assert_eq!(linecard(&["port", "add", "x", "--latency-sensitivity", "highest"]).status.code(), Some(2));
}

#[test]
fn a_vm_is_told_what_the_port_expects() {
    let sockets = tempfile::tempdir().unwrap();
    let here = sockets.path().display();
    let daemon = Daemon::start(&format!(
        "networks: {{ lan: {{}} }}\nports:\n  vm: {{ vhost-user: {{ socket: {here}/vm.sock, queues: 2 }}, network: lan, mtu: 9000, mac: \"52:54:00:12:34:56\" }}\n  n: {{ \"null\": {{}}, network: lan }}\n  c: {{ vhost-user: {{ socket: {here}/c.sock, mode: client }}, network: lan }}\n"
    ));
    assert_eq!(
        daemon.prints("qemu args vm --memory 2G"),
        format!(
            "-m 2G \\\n-object memory-backend-memfd,id=mem0,size=2G,share=on \\\n-machine memory-backend=mem0 \\\n\
             -chardev socket,id=char-vm,path={here}/vm.sock,reconnect-ms=1000 \\\n\
             -netdev vhost-user,id=net-vm,chardev=char-vm,queues=2 \\\n\
             -device virtio-net-pci,netdev=net-vm,mac=52:54:00:12:34:56,mq=on,vectors=6,host_mtu=9000\n"
        )
    );
    assert!(daemon.prints("qemu args c").contains(",server=on"));
    let xml = daemon.prints("libvirt xml vm");
    assert!(xml.contains(&format!("<source type='unix' path='{here}/vm.sock' mode='client'>")), "{xml}");
    let output = daemon.cli("qemu args n");
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()));
}

#[test]
fn lists_are_tables_for_people_and_data_for_programs() {
    let loopback = "  b: { loopback: {}, network: lan, affinity: vnic, offloads: { uso: false } }\n";
    let daemon = Daemon::start(&format!(
        "networks: {{ lan: {{}} }}\nports:\n  a: {{ \"null\": {{}}, network: lan }}\n{loopback}"
    ));
    let table = daemon.prints("port list");
    let [header, row, _] = table.lines().collect::<Vec<_>>()[..] else { panic!("{table}") };
    assert!(
        header.starts_with("NAME  KIND      NETWORK  STATE") && row.starts_with("a     null      lan      up"),
        "{table}"
    );
    assert!(table.is_ascii());
    assert!(daemon.prints("-o yaml port list").starts_with("- affinity: auto\n"));
    assert_eq!(daemon.json("port list")[0]["latency-sensitivity"], "normal");
    let shown = daemon.prints("port show b");
    let facts: Vec<_> = shown.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let cpu = &daemon.json("shard list")[0]["cpu"];
    for fact in ["affinity vnic", &format!("CPU {cpu}"), "offloads csum tso ecn gro"] {
        assert!(facts.iter().any(|line| line == fact), "{fact} in {shown}");
    }
    assert_eq!(daemon.prints("drops"), "nothing was dropped\n");
    assert!(daemon.prints("shard list").starts_with("CPU  SERVES  QUEUES"));
    assert!(daemon.prints("status").contains("2 up, 0 down, 0 stopped"));
}

#[test]
fn a_port_that_cannot_be_served_as_asked_is_told_before_and_after() {
    let sections = |level: &str| {
        format!(
            "networks: {{ lan: {{}} }}\nports:\n  a: {{ \"null\": {{}}, network: lan, latency-sensitivity: {level} }}\n"
        )
    };
    let reason =
        "latency-sensitivity high needs a CPU of its own and none is configured: name one in shards.exclusive\n";
    let daemon = Daemon::start(&sections("normal"));
    daemon.write(&sections("high"));
    let file = daemon.path("linecard.yaml");
    let checked = linecard(&["check", file.to_str().unwrap()]);
    assert!(checked.status.success() && text(&checked.stdout).ends_with(" is good: 1 network, 1 port\n"));
    assert_eq!(text(&checked.stderr), format!("port a would not be served as asked: {reason}"));
    let planned = daemon.prints("plan");
    assert!(planned.ends_with(&format!("\n! port a is not served as asked: {reason}")), "{planned}");

    for _ in 0..2 {
        let applied = daemon.cli("apply");
        assert_eq!(applied.status.code(), Some(4));
        let told = text(&applied.stdout);
        assert!(told.ends_with(&format!("\n! port a is not served as asked but as before: {reason}")), "{told}");
    }
    assert!(daemon.prints("port show a").contains("port a is up: not served as asked but as before: "));
    daemon.write(&sections("normal"));
    assert_eq!(daemon.json("apply")["obstacles"], serde_json::json!({}));
    assert_eq!(daemon.json("port show a")["reason"], serde_json::Value::Null);
}
