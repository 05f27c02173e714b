//! What the daemon and a service manager have to do with each other: what it is told (sd_notify(3)), that it may be slow to hear
//! it, and the signals that it sends.

#![allow(clippy::unwrap_used)]

mod daemon;

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use daemon::{Daemon, text};
use rustix::process::Signal;

/// How long anything may take before a test gives up. Far more than it takes.
const PATIENCE: Duration = Duration::from_secs(60);

const LAN: &str = "networks: { lan: {} }\n";
const LAN_AND_PORT: &str = "networks: { lan: {} }\nports: { n: { \"null\": {}, network: lan } }\n";

/// A daemon whose manager listens at `name`; `starter` may be a program that starts it.
fn start(directory: tempfile::TempDir, name: &str, starter: &[&str]) -> Daemon {
    let (here, file) = (directory.path().display(), directory.path().join("linecard.yaml"));
    fs::write(&file, format!("version: 1\ndaemon: {{ api: {here}/api.sock, state-dir: {here}/state }}\n{LAN}"))
        .unwrap();
    let words: Vec<&str> = starter.iter().copied().chain([env!("CARGO_BIN_EXE_linecardd")]).collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env("NOTIFY_SOCKET", name).env("WATCHDOG_USEC", "30000000");
    let log = fs::File::create(directory.path().join("log")).unwrap();
    let child = command.arg("--config").arg(&file).stderr(log).spawn().unwrap();
    Daemon::of(directory, child)
}

/// A manager that listens in a directory, and the socket's path.
fn manager(directory: &tempfile::TempDir) -> (UnixDatagram, String) {
    let path = directory.path().join("notify").display().to_string();
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    (manager, path)
}

/// The next thing that the manager is told.
fn told(manager: &UnixDatagram) -> String {
    let mut message = [0; 1000];
    let length = manager.recv(&mut message).unwrap();
    text(&message[..length])
}

/// Reads on until the manager was told each of these lines, in whatever order.
fn expect(manager: &UnixDatagram, lines: &[&str]) {
    let mut wanted = lines.to_vec();
    let begin = Instant::now();
    while !wanted.is_empty() {
        for line in told(manager).lines() {
            let found = wanted.iter().position(|wanted| *wanted == line);
            found.map(|at| wanted.remove(at));
        }
        assert!(begin.elapsed() < PATIENCE, "nothing was said of {wanted:?}");
    }
}

/// Fills what the manager at `path` has not read, so that nobody can tell it anything.
fn fill(path: &str) {
    let sender = UnixDatagram::unbound().unwrap();
    sender.set_nonblocking(true).unwrap();
    while sender.send_to(b"FILL=1", path).is_ok() {}
}

#[test]
fn the_manager_hears_that_the_daemon_is_ready_and_alive() {
    let directory = tempfile::tempdir().unwrap();
    let (manager, path) = manager(&directory);
    let daemon = start(directory, &path, &[]);
    expect(&manager, &["READY=1", "STATUS=ports: 0 up, 0 down, 0 stopped", "WATCHDOG=1", "WATCHDOG=1"]);
    daemon.write(LAN_AND_PORT);
    daemon.signal(Signal::HUP);
    expect(&manager, &["STATUS=ports: 1 up, 0 down, 0 stopped"]);
    drop(daemon);
}

/// Whoever reads it has the process's table of mappings held, and everybody may.
#[test]
fn nobody_is_told_the_command_line() {
    let directory = tempfile::tempdir().unwrap();
    let (manager, path) = manager(&directory);
    let daemon = start(directory, &path, &[]);
    expect(&manager, &["READY=1"]);
    let of = |pid: &str, what: &str| fs::read_to_string(format!("/proc/{pid}/{what}")).unwrap();
    let pid = daemon.pid().as_raw_nonzero().to_string();
    let relays = of(&pid, &format!("task/{pid}/children"));
    assert_eq!((of(&pid, "cmdline").as_str(), of(&pid, "comm").trim()), ("", "linecardd"));
    let relay = relays.split_whitespace().next().unwrap();
    let end = Instant::now() + PATIENCE;
    while !of(relay, "cmdline").is_empty() {
        assert!(Instant::now() < end, "the relay's is told");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_manager_with_an_abstract_name_hears_it_too() {
    let directory = tempfile::tempdir().unwrap();
    let name = format!("linecard-test/{}/notify", std::process::id());
    let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let daemon = start(directory, &format!("@{name}"), &[]);
    expect(&manager, &["READY=1", "WATCHDOG=1"]);
    drop(daemon);
}

#[test]
fn a_manager_that_reads_nothing_holds_up_nothing_and_hears_later_what_it_has_to_know() {
    let directory = tempfile::tempdir().unwrap();
    let (manager, path) = manager(&directory);
    fill(&path);
    let mut daemon = start(directory, &path, &[]);
    // The signal is heard, the change made, and what happens every second goes on.
    daemon.write(LAN_AND_PORT);
    daemon.signal(Signal::HUP);
    daemon.until("SIGHUP is not heard", || daemon.json("port list").as_array().unwrap().len() == 1);
    daemon.until("nobody looks after ports", || daemon.prints("events").contains("port-up"));
    // It reads again.
    let begin = Instant::now();
    let mut heard = Vec::new();
    while !heard.iter().any(|line: &String| line.starts_with("STATUS=")) {
        heard.extend(told(&manager).lines().filter(|line| *line != "FILL=1").map(String::from));
        assert!(begin.elapsed() < PATIENCE, "{heard:?}");
    }
    let at =
        |wanted: &str| heard.iter().position(|line| line.starts_with(wanted)).unwrap_or_else(|| panic!("{heard:?}"));
    assert!(at("RELOADING=1") < at("READY=1") && at("MONOTONIC_USEC=") < at("READY=1"), "{heard:?}");
    assert_eq!(heard.iter().filter(|line| *line == "READY=1").count(), 1, "{heard:?}");
    // And not any more when it stops the daemon.
    fill(&path);
    assert!(daemon.end().success());
}

#[test]
fn the_manager_hears_of_the_end_before_anybody_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let (manager, path) = manager(&directory);
    let mut daemon = start(directory, &path, &[]);
    // Its text does not arrive, so the API's end takes a while.
    let mut slow = UnixStream::connect(daemon.path("api.sock")).unwrap();
    slow.write_all(b"POST /v1/check HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\nversion: 1\n").unwrap();
    let mut follower = UnixStream::connect(daemon.path("api.sock")).unwrap();
    follower.set_read_timeout(Some(PATIENCE)).unwrap();
    follower.write_all(b"GET /v1/events?follow=true HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut lines = BufReader::new(follower).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("daemon-started")));
    daemon.signal(Signal::TERM);
    assert!(lines.any(|line| line.contains("daemon-stopping")));
    // It was told before that event could be read.
    manager.set_nonblocking(true).unwrap();
    let mut heard = Vec::new();
    let mut message = [0; 1000];
    let end = loop {
        match manager.recv(&mut message) {
            Ok(length) => heard.push(text(&message[..length])),
            Err(error) => break error,
        }
    };
    assert_eq!(end.kind(), ErrorKind::WouldBlock);
    assert!(heard.iter().any(|told| told.lines().any(|line| line == "STOPPING=1")), "{heard:?}");
    assert!(daemon.end().success());
}

#[test]
fn signals_that_were_blocked_when_it_was_started_are_heard() {
    let directory = tempfile::tempdir().unwrap();
    let (_manager, path) = manager(&directory);
    // SIGURG and SIGBUS are what keeps front ends from holding up threads and from killing the process.
    let mut daemon = start(directory, &path, &["env", "--block-signal=TERM,HUP,INT,URG,BUS"]);
    for task in fs::read_dir(format!("/proc/{}/task", daemon.pid().as_raw_nonzero())).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
        let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("0").trim();
        let blocked = u64::from_str_radix(field("SigBlk:"), 16).unwrap();
        // Bit 0 is SIGHUP, which those do not take that were started before there was a handler.
        assert_eq!(blocked & !1, 0, "{} has {blocked:x} blocked", field("Name:"));
    }
    daemon.write(LAN_AND_PORT);
    daemon.signal(Signal::HUP);
    daemon.until("SIGHUP is not heard", || daemon.json("port list").as_array().unwrap().len() == 1);
    assert!(daemon.end().success());
}
