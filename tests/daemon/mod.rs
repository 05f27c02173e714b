//! A real `linecardd` in a directory of its own, and `linecard` to talk to it. Needs no privileges.

#![allow(clippy::unwrap_used)]
#![allow(dead_code)] // Every test binary uses a part of it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long anything may take before a test gives up. Far more than it takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running daemon; ended and cleaned up when dropped.
pub struct Daemon {
    pub directory: tempfile::TempDir,
    child: Child,
    keys: String,
}

/// What an HTTP request got.
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Answer {
    /// The one that these bytes are.
    pub fn parse(answer: &str) -> Self {
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, body: body.into() }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

impl Daemon {
    /// Starts a daemon with `sections` (networks, profiles, ports) as its configuration and waits until it answers.
    pub fn start(sections: &str) -> Self {
        Self::start_with("", sections)
    }

    /// The same with more keys in its section `daemon:`, each with a comma before it.
    pub fn start_with(keys: &str, sections: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut daemon = Self { child: Self::spawn(&directory, keys, sections), directory, keys: keys.into() };
        daemon.wait();
        daemon
    }

    /// The same with no more than so many file descriptors.
    pub fn start_limited(descriptors: usize, keys: &str, sections: &str) -> Self {
        Self::start_after(&format!("ulimit -n {descriptors}"), keys, sections)
    }

    /// The same, started by a shell that has run `preparation`.
    pub fn start_after(preparation: &str, keys: &str, sections: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("{preparation}; exec \"$@\"")).arg("sh").arg(env!("CARGO_BIN_EXE_linecardd"));
        let child = Self::spawn_by(shell, &directory, keys, sections);
        let mut daemon = Self { child, directory, keys: keys.into() };
        daemon.wait();
        daemon
    }

    /// A daemon that was started on `directory`; waits until it answers.
    pub fn of(directory: tempfile::TempDir, child: Child) -> Self {
        let mut daemon = Self { child, directory, keys: String::new() };
        daemon.wait();
        daemon
    }

    /// Ends the daemon as the service manager does and starts it again on the same directory.
    pub fn restart(&mut self, sections: &str) {
        assert!(self.end().success());
        self.begin(sections);
    }

    /// Starts the daemon again after it has ended.
    pub fn begin(&mut self, sections: &str) {
        self.child = Self::spawn(&self.directory, &self.keys, sections);
        self.wait();
    }

    /// Ends the daemon without a warning.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends SIGTERM and waits for the end.
    pub fn end(&mut self) -> std::process::ExitStatus {
        self.signal(Signal::TERM);
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < PATIENCE, "linecardd does not end at SIGTERM");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        await_written(self.child.id());
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// Writes the configuration file with `sections`.
    pub fn write(&self, sections: &str) {
        fs::write(self.path("linecard.yaml"), configuration(&self.directory, &self.keys, sections)).unwrap();
    }

    /// Runs `linecard` with the words of `line`.
    pub fn cli(&self, line: &str) -> Output {
        self.cli_with(line, "")
    }

    /// The same with `input` as standard input.
    pub fn cli_with(&self, line: &str, input: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_linecard"));
        command.arg("--api").arg(self.path("api.sock")).args(line.split_whitespace());
        let streams = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = streams.spawn().unwrap();
        // It may end without having read.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    }

    /// What `linecard` prints with the words of `line`, which must succeed.
    pub fn prints(&self, line: &str) -> String {
        let output = self.cli(line);
        assert!(output.status.success(), "{line}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// The same as JSON.
    pub fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.prints(&format!("-o json {line}"))).unwrap()
    }

    /// A plain HTTP request to the API.
    pub fn http(&self, method: &str, path: &str, body: &str) -> Answer {
        Self::exchange(UnixStream::connect(self.path("api.sock")).unwrap(), method, path, body)
    }

    /// The same over a connection that is there.
    pub fn exchange(mut stream: impl Read + Write, method: &str, path: &str, body: &str) -> Answer {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        Answer::parse(&answer)
    }

    /// Polls until `done` says so; fails with what the daemon has to show.
    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !done() {
            assert!(begin.elapsed() < PATIENCE, "{what}: {}\n{}", self.prints("port list"), self.prints("drops"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn spawn(directory: &tempfile::TempDir, keys: &str, sections: &str) -> Child {
        Self::spawn_by(Command::new(env!("CARGO_BIN_EXE_linecardd")), directory, keys, sections)
    }

    fn spawn_by(mut command: Command, directory: &tempfile::TempDir, keys: &str, sections: &str) -> Child {
        let file = directory.path().join("linecard.yaml");
        fs::write(&file, configuration(directory, keys, sections)).unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        command.arg("--config").arg(file).stdin(Stdio::null()).stderr(log);
        command.spawn().unwrap()
    }

    /// Returns when the API answers and the configuration has been applied.
    fn wait(&mut self) {
        let begin = Instant::now();
        loop {
            if self.has_begun().unwrap_or(false) {
                return;
            }
            let ended = self.child.try_wait().unwrap();
            let log = fs::read_to_string(self.path("log")).unwrap_or_default();
            assert!(ended.is_none(), "linecardd has ended: {log}");
            assert!(begin.elapsed() < PATIENCE, "linecardd does not answer: {log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether it has applied its configuration. A socket that nobody accepts from any more is not waited for.
    fn has_begun(&self) -> std::io::Result<bool> {
        let mut stream = UnixStream::connect(self.path("api.sock"))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.starts_with("HTTP/1.1 200") && !answer.contains("\"generation\":0,"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.path("log")).unwrap_or_default());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns when the thread of process `pid` that writes the log sleeps, as it does when it has written all; or is gone.
fn await_written(pid: u32) {
    let begin = Instant::now();
    loop {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let mut stats = tasks.map(|task| fs::read_to_string(task.path().join("stat")).unwrap_or_default());
        if !stats.any(|stat| stat.contains(" (log) ") && !stat.contains(" (log) S")) {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "the log is not written");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn configuration(directory: &tempfile::TempDir, keys: &str, sections: &str) -> String {
    let here = directory.path().display();
    format!("version: 1\ndaemon: {{ api: {here}/api.sock, state-dir: {here}/state{keys} }}\n{sections}")
}

/// A capture with these frames (pcap, microseconds, Ethernet).
pub fn capture(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 65_535, 1] {
        file.extend(word.to_le_bytes());
    }
    for frame in frames {
        let len = u32::try_from(frame.len()).unwrap();
        for word in [0, 0, len, len] {
            file.extend(word.to_le_bytes());
        }
        file.extend(frame);
    }
    file
}

/// A frame of 64 bytes from the station that ends in `source` to everybody.
pub fn broadcast(source: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(source);
    frame.extend([0x88, 0xb5]);
    frame.resize(64, 0);
    frame
}
