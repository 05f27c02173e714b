//! A log that nobody reads: a pipe that is full, at the daemon's stderr. Nobody waits for it, the API tells of it, and whoever reads it
//! again sees what is missing.

#![allow(clippy::unwrap_used)]

mod daemon;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use daemon::Daemon;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::pipe::PipeFlags;
use rustix::process::Signal;

/// How long anything may take before a test gives up. Far more than it takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whoever reads a log, and gives up if there is nothing for too long.
struct Reader(File);

impl Read for Reader {
    fn read(&mut self, text: &mut [u8]) -> std::io::Result<usize> {
        let patience = Timespec::try_from(PATIENCE).unwrap();
        let ready = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&patience))?;
        if ready == 0 { Err(ErrorKind::TimedOut.into()) } else { self.0.read(text) }
    }
}

/// A pipe that takes no more, and whoever does not read it.
fn full_pipe() -> (BufReader<Reader>, File) {
    let (end, begin) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    fcntl_setfl(&begin, OFlags::NONBLOCK).unwrap();
    let mut begin = File::from(begin);
    // To the last byte.
    for size in [4096, 1] {
        while begin.write(&vec![b'x'; size]).is_ok() {}
    }
    begin.write_all(b"\n").unwrap_err();
    fcntl_setfl(&begin, OFlags::empty()).unwrap();
    (BufReader::new(Reader(File::from(end))), begin)
}

/// A daemon on the configuration in `directory` that logs to `log`.
fn spawn(directory: &tempfile::TempDir, log: File) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_linecardd"));
    command.arg("--config").arg(directory.path().join("linecard.yaml")).stderr(Stdio::from(log)).spawn().unwrap()
}

fn write(directory: &tempfile::TempDir, sections: &str) {
    let (here, file) = (directory.path().display(), directory.path().join("linecard.yaml"));
    let daemon = format!("daemon: {{ api: {here}/api.sock, state-dir: {here}/state }}");
    fs::write(file, format!("version: 1\n{daemon}\nnetworks: {{ lan: {{}} }}\nports:\n{sections}")).unwrap();
}

/// So many ports for front ends.
fn ports(directory: &tempfile::TempDir, count: usize) -> String {
    let here = directory.path().display();
    let port = |n| format!("  p{n}: {{ vhost-user: {{ socket: {here}/p{n}.sock }}, network: lan }}\n");
    (0..count).map(port).collect()
}

/// Connects to a port as a front end does, is answered, and goes again.
fn connect(daemon: &Daemon, port: usize) {
    let mut front_end = UnixStream::connect(daemon.path(&format!("p{port}.sock"))).unwrap();
    front_end.set_read_timeout(Some(PATIENCE)).unwrap();
    // GET_FEATURES, version 1, no payload.
    front_end.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    front_end.read_exact(&mut [0; 20]).unwrap();
}

/// Has `daemon` log a hundred lines of 10 kB: more than may wait, but not twice as much.
fn overflow(daemon: &Daemon) {
    let (before, long) = (lost(daemon), "x".repeat(5000));
    let mistakes: String =
        (0..100).map(|n| format!("  m{n}: {{ \"null\": {{}}, network: lan, ? {long} : 1 }}\n")).collect();
    write(&daemon.directory, &mistakes);
    daemon.signal(Signal::HUP);
    daemon.until("no line is lost", || lost(daemon) > before);
}

fn lost(daemon: &Daemon) -> u64 {
    daemon.json("status")["log"]["lines-lost"].as_u64().unwrap()
}

/// The next line with `text` in it, and all before it.
fn read_to(log: &mut BufReader<Reader>, text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    while !lines.last().unwrap().contains(text) {
        let mut line = String::new();
        let read = log.read_line(&mut line);
        assert!(read.as_ref().is_ok_and(|bytes| *bytes > 0), "{read:?}, no {text} in {lines:?}");
        lines.push(line);
    }
    lines
}

#[test]
fn a_log_that_nobody_reads_holds_up_nobody() {
    let (_unread, log) = full_pipe();
    let directory = tempfile::tempdir().unwrap();
    write(&directory, &ports(&directory, 8));
    let child = spawn(&directory, log);
    let mut daemon = Daemon::of(directory, child);
    for round in 0..3 {
        (0..8).for_each(|port| connect(&daemon, port));
        assert!(daemon.prints("port list").contains("p7"), "{round}");
    }
    daemon.until("it is not told", || daemon.prints("status").contains("nobody reads the log: 0 lines lost so far"));
    overflow(&daemon);
    // Whoever has been refused is heard again.
    write(&daemon.directory, &ports(&daemon.directory, 9));
    daemon.prints("apply");
    connect(&daemon, 8);
    let status = daemon.json("status");
    assert_eq!(status["log"]["stuck"], true, "{status}");
    let metrics = daemon.http("GET", "/metrics", "").body;
    let line = |name: &str| metrics.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{metrics}"));
    let value = |name| line(name).rsplit(' ').next().unwrap().to_string();
    assert_eq!(value("linecard_log_stuck"), "1");
    assert_eq!(value("linecard_log_lines_lost_total"), lost(&daemon).to_string());
    assert!(daemon.end().success());
}

#[test]
fn whoever_reads_the_log_again_sees_how_much_is_missing_and_where() {
    let (mut unread, log) = full_pipe();
    let directory = tempfile::tempdir().unwrap();
    write(&directory, &ports(&directory, 8));
    let child = spawn(&directory, log);
    let mut daemon = Daemon::of(directory, child);
    overflow(&daemon);
    // Lost as well.
    write(&daemon.directory, &ports(&daemon.directory, 1));
    daemon.prints("apply");
    let lines = read_to(&mut unread, "lines were lost, because nobody reads the log");
    let (gap, lines) = lines.split_last().unwrap();
    let missing = gap.split_once("ERROR] ").unwrap().1.split_once(' ').unwrap().0;
    assert!(lines.iter().any(|line| line.contains("configuration 1: ")), "{gap}");
    let mistakes = lines.iter().filter_map(|line| line.split_once(": ports.m")?.1.split_once('.')?.0.parse().ok());
    let mistakes: Vec<usize> = mistakes.collect();
    assert!(mistakes.len() > 10 && mistakes.is_sorted() && mistakes.len() < 100, "{mistakes:?}");
    assert_eq!(missing.parse(), Ok(lost(&daemon)), "{gap}");
    // What comes now is all there, in order, and only once.
    let applied = |ports: usize| {
        write(&daemon.directory, &self::ports(&daemon.directory, ports));
        daemon.prints("apply");
    };
    (2..29).for_each(applied);
    let more = read_to(&mut unread, "port p27: open").join("");
    let at = |n: usize| more.find(&format!("port p{n}: open")).unwrap_or_else(|| panic!("{n}: {more}"));
    assert!((1..27).all(|n| at(n) < at(n + 1)), "{more}");
    assert!(!more.contains("were lost"), "{more}");
    let status = daemon.prints("status");
    assert!(status.contains(&format!("nobody read the log: {missing} lines lost so far")), "{status}");
    // And so is what it says last.
    assert!(daemon.end().success());
    read_to(&mut unread, "linecardd has ended");
}

#[test]
fn a_daemon_that_cannot_go_on_ends_though_nobody_reads_why() {
    let first = Daemon::start("networks: { lan: {} }\n");
    let (_unread, log) = full_pipe();
    let directory = tempfile::tempdir().unwrap();
    // The socket of another one.
    let api = first.path("api.sock").display().to_string();
    let state = directory.path().display();
    let text = format!("version: 1\ndaemon: {{ api: {api}, state-dir: {state}/state }}\n");
    fs::write(directory.path().join("linecard.yaml"), text).unwrap();
    let mut second = spawn(&directory, log);
    let end = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = second.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > end {
            second.kill().unwrap();
            panic!("it waits for somebody to read why it ends");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(!status.success() && status.code().is_some(), "{status}");
}

#[test]
fn a_log_that_may_not_grow_does_not_end_the_daemon() {
    // In blocks of 512 bytes.
    let mut daemon = Daemon::start_after("ulimit -f 8", "", "networks: { lan: {} }\n");
    let log = || fs::metadata(daemon.path("log")).unwrap().len();
    let text = "version: 1\nports: { n: { nul: {} } }\n";
    fs::write(daemon.path("linecard.yaml"), text).unwrap();
    daemon.until("the log does not grow", || {
        daemon.signal(Signal::HUP);
        daemon.json("status")["pid"].is_number() && log() == 4096
    });
    for _ in 0..10 {
        daemon.signal(Signal::HUP);
        daemon.prints("status");
    }
    assert!(daemon.end().success());
}
