//! Whoever connects, and whatever is at a path: the daemon answers others, starts or says why not, and ends.

#![allow(clippy::unwrap_used)]

mod daemon;

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use daemon::{Answer, Daemon, text};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect, sendmsg, socket_with,
};
use rustix::process::{
    Gid, PidfdFlags, PidfdGetfdFlags, Resource, Rlimit, Uid, getrlimit, pidfd_getfd, pidfd_open, prlimit,
};

const LAN: &str = "networks: { lan: {} }\n";

/// How long anything may take before a test gives up. Far more than it takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn pipe(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

/// How a daemon with the configuration in `file` ends that must not start.
fn refusal(file: &Path) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_linecardd"));
    let mut child = command.arg("--config").arg(file).stderr(Stdio::piped()).spawn().unwrap();
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it neither starts nor says why");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    text(&output.stderr)
}

#[test]
fn pipes_where_files_should_be_are_refused_and_not_waited_for() {
    let mut daemon = Daemon::start(LAN);
    let file = daemon.path("linecard.yaml");
    assert!(daemon.end().success());
    fs::create_dir(daemon.path("state")).unwrap();
    pipe(&daemon.path("state/ports.json"));
    let told = refusal(&file);
    assert!(told.contains("state/ports.json: ports made at run time would be lost"), "{told}");
    assert!(told.ends_with("it is a pipe, not a regular file\n"), "{told}");

    fs::remove_file(&file).unwrap();
    pipe(&file);
    let told = refusal(&file);
    assert!(told.contains("linecard.yaml") && told.ends_with("it is a pipe, not a regular file\n"), "{told}");
}

#[test]
fn what_a_file_says_cannot_write_to_a_terminal_or_forge_a_line() {
    let mut daemon = Daemon::start(LAN);
    assert!(daemon.end().success());
    fs::create_dir(daemon.path("state")).unwrap();
    fs::write(daemon.path("state/ports.json"), r#"{"version":1,"ports":{"\u001b[2J\nERROR forged":{}}}"#).unwrap();
    daemon.begin(LAN);
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains("ports.json.bad")).unwrap();
    assert!(line.contains(r#""\u{1b}[2J\nERROR forged" is not a name"#), "{log}");
    assert!(!log.contains('\u{1b}'), "{log:?}");
    // The same where what is wrong is not a name but a key.
    assert!(daemon.end().success());
    fs::write(daemon.path("state/ports.json"), r#"{"version":1,"\u001b[2J\nERROR forged":{}}"#).unwrap();
    daemon.begin(LAN);
    let log = daemon.log();
    assert!(log.contains(r"\u{1b}[2J\nERROR forged") && !log.contains('\u{1b}'), "{log:?}");
}

/// The daemon's listening socket as a descriptor of this process.
fn listener_of(daemon: &Daemon) -> OwnedFd {
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    let here = daemon.path("api.sock").display().to_string();
    // Flag 00010000: it listens (net/unix/af_unix.c, unix_seq_show).
    let listens = |line: &&str| line.contains(&here) && line.split_whitespace().nth(3) == Some("00010000");
    let inode = table.lines().find(listens).unwrap().split_whitespace().nth(6).unwrap();
    let pid = daemon.pid();
    let own = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).unwrap().flatten();
    let wanted = format!("socket:[{inode}]");
    let mut numbers = own.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.to_str() == Some(&wanted)));
    let number = numbers.next().unwrap().file_name().to_str().unwrap().parse().unwrap();
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    pidfd_getfd(process, number, PidfdGetfdFlags::empty()).unwrap()
}

/// Puts a descriptor where no process has it and it is open all the same, as that of a process that cannot end: it is under way in
/// a socket that nobody reads.
fn strand(fd: OwnedFd) -> (UnixStream, UnixStream) {
    let (from, to) = UnixStream::pair().unwrap();
    let fds = [fd.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&from, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
    (from, to)
}

#[test]
fn the_socket_of_a_process_that_was_killed_and_cannot_end_is_stale() {
    let mut daemon = Daemon::start(LAN);
    let stranded = strand(listener_of(&daemon));
    let inode = |daemon: &Daemon| {
        fs::metadata(daemon.path("api.sock")).map(|there| std::os::unix::fs::MetadataExt::ino(&there))
    };
    let old = inode(&daemon).unwrap();
    daemon.kill();
    assert!(UnixStream::connect(daemon.path("api.sock")).is_ok(), "connections to it are still made");
    daemon.begin(LAN);
    assert_ne!(inode(&daemon).unwrap(), old);
    assert_eq!(daemon.json("status")["ports-up"], 0);
    drop(stranded);
}

/// Makes the calling thread another user's, of these groups: ids of a thread are its own.
fn become_other(uid: u32, gid: u32, groups: &[u32]) -> rustix::io::Result<()> {
    let groups: Vec<Gid> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
    rustix::thread::set_thread_groups(&groups)?;
    rustix::thread::set_thread_gid(Gid::from_raw(gid))?;
    rustix::thread::set_thread_uid(Uid::from_raw(uid))
}

#[test]
fn the_sockets_group_may_change_things_as_the_supplementary_one_too() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test asks as other users, which only root can be: run it as root"
    );
    let daemon = Daemon::start_with(", api-group: \"4712\", api-mode: \"0666\"", LAN);
    fs::set_permissions(daemon.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // What somebody puts where the socket once was decides nothing.
    let beside = format!("api.sock.{}", daemon.pid().as_raw_nonzero());
    fs::write(daemon.path(&beside), "").unwrap();
    fs::set_permissions(daemon.path(&beside), fs::Permissions::from_mode(0o600)).unwrap();
    let apply_as = |gid: u32, groups: &[u32]| {
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| {
                become_other(4711, gid, groups).unwrap();
                assert_eq!(daemon.http("GET", "/v1/status", "").status, 200);
                daemon.http("POST", "/v1/apply", "")
            });
            asking.join().unwrap()
        })
    };
    assert_eq!(apply_as(4712, &[]).status, 200, "its own group");
    assert_eq!(apply_as(4700, &[1, 4712, 7]).status, 200, "one of its groups");
    let refused = apply_as(4700, &[1, 7]);
    assert_eq!(refused.status, 403);
    let fix = refused.json()["fix"].as_str().unwrap().to_string();
    assert!(fix.contains("daemon.api-group") && !fix.contains("primary"), "{fix}");
}

/// Where the daemon serves metrics over TCP, as its log says.
fn metrics_address(daemon: &Daemon) -> SocketAddr {
    let log = daemon.log();
    let (_, rest) = log.split_once("metrics on http://").unwrap();
    rest.split_once("/metrics").unwrap().0.parse().unwrap()
}

#[test]
fn requests_that_never_end_keep_nobody_out() {
    // So many descriptors that what is held here would take them all.
    let daemon = Daemon::start_limited(400, ", metrics: \"127.0.0.1:0\"", LAN);
    let address = metrics_address(&daemon);
    let mut held: Vec<Box<dyn Write>> = Vec::new();
    for _ in 0..450 {
        // What is one too many is closed, at this end or at the other.
        held.extend(UnixStream::connect(daemon.path("api.sock")).map(|stream| Box::new(stream) as _));
        held.extend(TcpStream::connect(address).map(|stream| Box::new(stream) as _));
        for stream in held.iter_mut().rev().take(2) {
            let _ = stream.write_all(b"GET /v1/status HTT");
        }
    }
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("# EOF\n"), "{answer}");
    let mut stream = UnixStream::connect(daemon.path("api.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(Daemon::exchange(&mut stream, "GET", "/v1/status", "").status, 200);
}

#[test]
fn who_connects_in_a_loop_keeps_nobody_out() {
    let daemon = Daemon::start_with(", api-mode: \"0666\"", LAN);
    fs::set_permissions(daemon.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let address = SocketAddrUnix::new(daemon.path("api.sock")).unwrap();
    let over = AtomicBool::new(false);
    let (answers, connections) = std::thread::scope(|scope| {
        // Another user, who may only look.
        let flood = || {
            let become_other = become_other(4711, 4711, &[]);
            let mut made = 0;
            while become_other.is_ok() && !over.load(Ordering::Relaxed) {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
                made += u32::from(socket.is_ok_and(|socket| connect(&socket, &address).is_ok()));
            }
            made
        };
        let flooding: Vec<_> = (0..4).map(|_| scope.spawn(flood)).collect();
        let answers: Vec<_> = (0..10).map(|_| daemon.cli("status")).collect();
        over.store(true, Ordering::Relaxed);
        let connections: u32 = flooding.into_iter().map(|flooding| flooding.join().unwrap()).sum();
        (answers, connections)
    });
    let refused: Vec<_> = answers.iter().filter(|answer| !answer.status.success()).collect();
    assert!(connections > 0, "this test becomes another user, so run it as root");
    assert!(refused.is_empty(), "{} of 10 beside {connections}: {}", refused.len(), text(&refused[0].stderr));
}

/// The process that looks at descriptors for the daemon.
fn relay_of(daemon: &Daemon) -> i32 {
    let is_it =
        |child: &i32| fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|name| name == "linecard-relay\n");
    let mut found = None;
    daemon.until("the daemon has a relay", || {
        let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid().as_raw_nonzero())).unwrap().flatten();
        let children: String =
            tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default()).collect();
        found = children.split_whitespace().map(|child| child.parse().unwrap()).find(is_it);
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn it_has_all_descriptors_that_it_may_and_hands_none_of_them_on() {
    // What is left to programs by default, and a descriptor that somebody has left open.
    let daemon = Daemon::start_after("ulimit -S -n 256; exec 7</proc/version", "", LAN);
    let has_it = |pid: i32| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        open.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|to| to == Path::new("/proc/version"))
    };
    let limits = |pid: i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
        let [soft, hard] = [0, 1].map(|at| line.split_whitespace().nth(at).unwrap().to_string());
        (soft, hard)
    };
    let (own, relay) = (daemon.pid().as_raw_nonzero().get(), relay_of(&daemon));
    for pid in [own, relay] {
        let (soft, hard) = limits(pid);
        assert_eq!(soft, hard, "process {pid}");
        assert_ne!(soft, "256", "this host's hard limit is no more than what this test begins with");
    }
    assert!(has_it(own), "it was not left open");
    assert!(!has_it(relay), "the relay has it as well");
}

#[test]
fn too_few_descriptors_for_its_ports_are_told_when_it_starts() {
    let ports = |count: usize| -> String {
        let port =
            |n| format!("  p{n}: {{ vhost-user: {{ socket: /nowhere/p{n}.sock, queues: 128 }}, network: lan }}\n");
        format!("{LAN}ports:\n") + &(0..count).map(port).collect::<String>()
    };
    let told = |daemon: &Daemon| {
        let log = daemon.log();
        log.lines().find(|line| line.contains("linecardd may have")).map(String::from)
    };
    assert_eq!(told(&Daemon::start_limited(4096, "", &ports(2))), None);
    let line = told(&Daemon::start_limited(4096, "", &ports(3))).unwrap();
    assert!(line.contains("may have 4096 descriptors, too few for what 3 ports can need"), "{line}");
    assert!(line.contains("raise LimitNOFILE= of its unit (ulimit -Hn) to 5846,"), "{line}");
}

#[test]
fn a_request_that_never_ends_is_given_up() {
    let daemon = Daemon::start_with(", metrics: \"127.0.0.1:0\"", LAN);
    let address = metrics_address(&daemon);
    // The one ends in the middle, and the other is the last of its connection.
    let requests = [&b"GET /metrics HTTP/1.1\r\nHo"[..], b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"];
    let api = requests.map(|request| {
        let mut stream = UnixStream::connect(daemon.path("api.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request).unwrap();
        stream
    });
    let metrics = requests.map(|request| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request).unwrap();
        stream
    });
    for mut stream in api {
        stream.read_to_end(&mut Vec::new()).unwrap();
    }
    for mut stream in metrics {
        stream.read_to_end(&mut Vec::new()).unwrap();
    }
}

#[test]
fn an_answer_that_nobody_reads_is_given_up() {
    let daemon = Daemon::start(LAN);
    let mut stream = UnixStream::connect(daemon.path("api.sock")).unwrap();
    // Many answers wait for their reader, more than the two ends buffer.
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(100);
    while stream.write_all(&request).is_ok() {}
    let peer_is_gone = |stream: &UnixStream| {
        let mut fds = [rustix::event::PollFd::new(stream, rustix::event::PollFlags::RDHUP)];
        let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&none)).unwrap() > 0
    };
    let begin = Instant::now();
    while !peer_is_gone(&stream) {
        assert!(begin.elapsed() < PATIENCE, "descriptor {} is still served", stream.as_raw_fd());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A daemon that has begun and may have no thread more, with a vNIC port.
fn without_threads() -> Daemon {
    let directory = tempfile::tempdir().unwrap();
    let (here, file) = (directory.path().display(), directory.path().join("linecard.yaml"));
    let daemon = format!("daemon: {{ api: {here}/api.sock, state-dir: {here}/state }}");
    fs::write(&file, format!("version: 1\n{daemon}\n{LAN}{}", vnic(directory.path()))).unwrap();
    // As a user whose processes can be counted, which root's are not (setrlimit(2), RLIMIT_NPROC).
    let program = directory.path().join("linecardd");
    fs::copy(env!("CARGO_BIN_EXE_linecardd"), &program).unwrap();
    let user = std::os::unix::fs::chown(directory.path(), Some(4711), None);
    user.expect("this test becomes another user, so run it as root");
    let log = fs::File::create(directory.path().join("log")).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=4711", "--regid=4711", "--clear-groups"]).arg(&program).arg("--config").arg(&file);
    let daemon = Daemon::of(directory, command.stderr(log).spawn().unwrap());
    let (pid, limit) = (daemon.pid(), getrlimit(Resource::Nproc));
    let one = Rlimit { current: Some(1), ..limit };
    // Only that user may set it. Ids of a thread are its own.
    let set = std::thread::spawn(move || {
        become_other(4711, 4711, &[]).unwrap();
        prlimit(Some(pid), Resource::Nproc, one)
    });
    set.join().unwrap().unwrap();
    daemon
}

fn vnic(here: &Path) -> String {
    format!("ports: {{ vm: {{ vhost-user: {{ socket: {}/vm.sock }}, network: lan }} }}\n", here.display())
}

#[test]
fn it_ends_in_order_where_no_thread_is_to_be_had() {
    let mut daemon = without_threads();
    assert!(daemon.end().success());
    let log = daemon.log();
    assert!(log.contains("linecardd has ended") && !log.contains("did not end"), "{log}");
}

#[test]
fn it_answers_and_makes_changes_where_no_thread_is_to_be_had() {
    let daemon = without_threads();
    // What was started while it began, and only stays for more work, has ended (`control/pool.rs`, IDLE).
    std::thread::sleep(Duration::from_secs(7));
    // There really is none to be had.
    let _front_end = UnixStream::connect(daemon.path("vm.sock")).unwrap();
    daemon.until("a front end has no thread", || {
        daemon.json("port show vm")["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("no thread for the front end"))
    });
    std::thread::scope(|scope| {
        // More than there are threads for requests.
        for what in ["/v1/status", "/v1/ports", "/v1/fdb", "/v1/events", "/metrics"].repeat(8) {
            let daemon = &daemon;
            scope.spawn(move || {
                let mut stream = UnixStream::connect(daemon.path("api.sock")).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                assert_eq!(Daemon::exchange(&mut stream, "GET", what, "").status, 200, "{what}");
            });
        }
    });
    let file = fs::read_to_string(daemon.path("linecard.yaml")).unwrap();
    fs::write(daemon.path("linecard.yaml"), file.replace(" } }\n", " }, other: { loopback: {}, network: lan } }\n"))
        .unwrap();
    assert!(daemon.prints("apply").contains("other"));
    assert!(daemon.cli_with("port add more", "null: {}\nnetwork: lan\n").status.success());
    daemon.prints("port del more");
    assert_eq!(daemon.json("port show other")["state"], "up");
}

#[test]
fn a_text_that_never_arrives_whole_is_given_up_and_others_get_their_turn() {
    let daemon = Daemon::start(LAN);
    let held: Vec<UnixStream> = (0..2)
        .map(|_| {
            let mut stream = UnixStream::connect(daemon.path("api.sock")).unwrap();
            stream.write_all(b"POST /v1/check HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\nversion: 1\n").unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream
        })
        .collect();
    let begin = Instant::now();
    while daemon.http("POST", "/v1/check", "version: 1\n").status != 204 {
        assert!(begin.elapsed() < PATIENCE, "nobody else gets a turn");
    }
    for mut stream in held {
        stream.read_to_end(&mut Vec::new()).unwrap();
    }
}

/// MiB of the daemon's memory, by a line of proc_pid_status(5).
fn memory(daemon: &Daemon, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid().as_raw_nonzero())).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

/// What `act` makes as a user who may look only.
fn as_reader<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    let reader = || {
        become_other(4711, 4711, &[]).expect("this test becomes another user, so run it as root");
        act()
    };
    std::thread::scope(|scope| scope.spawn(reader).join().unwrap())
}

/// What a text of so many bytes gets, of which not all need be read.
fn answer_to(daemon: &Daemon, path: &str, bytes: usize) -> Answer {
    let mut stream = UnixStream::connect(daemon.path("api.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_write_timeout(Some(PATIENCE))).unwrap();
    let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {bytes}\r\n\r\n");
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&vec![b'#'; bytes]));
    let mut answer = String::new();
    // What was not read makes an error of the end.
    let _ = stream.read_to_string(&mut answer);
    Answer::parse(&answer)
}

#[test]
fn texts_that_are_held_back_cost_no_memory_and_nobody_who_may_change_something_waits_for_them() {
    const MOST: usize = 4 << 20;
    let daemon = Daemon::start_with(", api-mode: \"0666\"", LAN);
    fs::set_permissions(daemon.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let before = memory(&daemon, "VmRSS");
    let held = || -> Vec<UnixStream> {
        let hold = |_| {
            let mut stream = UnixStream::connect(daemon.path("api.sock")).unwrap();
            stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
            let head = format!("POST /v1/check HTTP/1.1\r\nHost: x\r\nContent-Length: {MOST}\r\n\r\n");
            stream.write_all(head.as_bytes()).unwrap();
            // All but a byte, or as much as is taken.
            let _ = stream.write_all(&vec![b'#'; MOST - 1]);
            stream
        };
        (0..20).map(hold).collect()
    };
    let held = as_reader(held);
    let most = memory(&daemon, "VmHWM");
    assert!(most < before + 40, "{before} MiB became {most} for 20 texts of 4 MiB that are not read");
    assert_eq!(daemon.http("POST", "/v1/check", "version: 1\n").status, 204, "root has a turn of its own");
    drop(held);
    // One byte too many, for whoever may look and whoever may do more.
    assert_eq!(as_reader(|| answer_to(&daemon, "/v1/check", MOST + 1).status), 413);
    assert_eq!(answer_to(&daemon, "/v1/check", MOST + 1).status, 413);
    assert_eq!(answer_to(&daemon, "/v1/ports", (64 << 10) + 1).status, 413);
    assert_eq!(as_reader(|| answer_to(&daemon, "/v1/ports", 64 << 10).status), 403);
    assert_eq!(answer_to(&daemon, "/v1/check", MOST).status, 422, "it is no configuration, and is read");
}

#[test]
fn what_a_text_makes_of_memory_is_bounded_and_given_back() {
    let daemon = Daemon::start(LAN);
    let labels: String = (0..64).map(|n| format!("label-{n:02}: {:0>40}x, ", n)).collect();
    // Each inherits all labels; a file without a bound on profiles becomes 64 labels for each of its lines.
    let mut text = format!("version: 1\nprofiles:\n  p0: {{ labels: {{ {labels} }} }}\n");
    for n in 1..20_000 {
        text += &format!("  p{n}: {{ inherit: p{} }}\n", n - 1);
    }
    let answers: Vec<_> = std::thread::scope(|scope| {
        let ask = || daemon.http("POST", "/v1/check", &text);
        let asking: Vec<_> = (0..2).map(|_| scope.spawn(ask)).collect();
        asking.into_iter().map(|asking| asking.join().unwrap()).collect()
    });
    let [most, stay] = ["VmHWM", "VmRSS"].map(|key| memory(&daemon, key));
    assert!(most < 200, "{most} MiB at most");
    assert!(stay < 100, "{stay} MiB stay");
    let refused =
        answers.iter().filter(|answer| answer.status == 422 && answer.body.contains("20000 profiles are too many"));
    assert!(refused.count() > 0, "{:?}", answers.iter().map(|answer| &answer.body).collect::<Vec<_>>());
}
