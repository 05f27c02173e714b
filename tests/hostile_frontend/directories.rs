//! Beyond the points: sockets in directories of others. Who may read a directory can hold its lock for as long as he likes: the
//! kernel copies names to him with it (fs/readdir.c: iterate_dir), and when somebody waits to change the directory, everybody who
//! looks for a name there waits behind him (fs/namei.c: walk_component), beyond SIGKILL.

#![allow(unsafe_code)] // getdents64(2) into memory that is not there.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use tempfile::TempDir;

use super::frontend::daemon::{Daemon, port, preamble};
use super::frontend::eventually;
use super::frontend::footprint::CONNECTIONS;
use super::frontend::nic::{Nic, NicConfig, exchange, meet};
use super::frontend::session::Session;
use super::held_page::{HeldPage, PAGE};

/// A directory in which nobody finds, makes or removes anything until this goes.
struct HeldDirectory {
    page: Option<HeldPage>,
    /// Whom the others wait behind.
    maker: Option<JoinHandle<()>>,
}

impl HeldDirectory {
    fn new(path: &Path) -> Self {
        let directory = File::open(path).unwrap();
        let page = HeldPage::holding(move |page| {
            // SAFETY: the kernel writes at most a page, which is this thread's alone.
            unsafe { libc::syscall(libc::SYS_getdents64, directory.as_raw_fd(), page, PAGE) };
        });
        let file = path.join("made-by-the-maker");
        let (sent, thread) = std::sync::mpsc::channel();
        let maker = std::thread::spawn(move || {
            sent.send(rustix::thread::gettid()).unwrap();
            let made = File::create(&file).and_then(|_| fs::remove_file(&file));
            made.unwrap();
        });
        let thread = thread.recv().unwrap();
        eventually("somebody waits to change the directory", || {
            is_held(Path::new("/proc/self"), thread.as_raw_nonzero().get()).then_some(())
        });
        Self { page: Some(page), maker: Some(maker) }
    }
}

impl Drop for HeldDirectory {
    fn drop(&mut self) {
        self.page = None;
        self.maker.take().map(JoinHandle::join);
    }
}

/// Whether that thread of a process waits where no signal reaches it.
fn is_held(process: &Path, thread: i32) -> bool {
    let status = process.join(format!("task/{thread}/stat"));
    let stat = fs::read_to_string(status).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, fields)| fields.starts_with(" D"))
}

/// A line for a port in client mode whose VM makes its socket at that path.
fn dialling(name: &str, socket: &Path) -> String {
    let socket = socket.display();
    format!("  {name}: {{ vhost-user: {{ socket: {socket}, mode: client, queues: 4 }}, network: lan }}\n")
}

/// A daemon with two ports in server mode, and `bad` and `good` in client mode with sockets below `place`, or its own directory.
fn daemon(place: Option<&Path>) -> (Daemon, PathBuf, PathBuf) {
    let socket = |place: &Path, name: &str| place.join(name).join("vm.sock");
    let daemon = Daemon::start(|dir| {
        let place = place.unwrap_or(dir);
        ["bad", "good"].iter().for_each(|name| fs::create_dir(place.join(name)).unwrap());
        let clients = ["bad", "good"].map(|name| dialling(name, &socket(place, name))).concat();
        preamble(dir) + "networks: { lan: {} }\nports:\n" + &port(dir, "a", "lan") + &port(dir, "b", "lan") + &clients
    });
    let [bad, good] = ["bad", "good"].map(|name| socket(place.unwrap_or(daemon.dir()), name));
    (daemon, bad, good)
}

/// Waits until a thread of the daemon waits where no signal reaches it.
fn wait_until_held(daemon: &Daemon) {
    let process = PathBuf::from(format!("/proc/{}", daemon.pid().as_raw_nonzero()));
    eventually("the kernel keeps a thread of the daemon", || {
        let threads = fs::read_dir(process.join("task")).ok()?.flatten();
        let mut threads = threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok());
        threads.any(|thread| is_held(&process, thread)).then_some(())
    });
}

/// A VM at that path.
fn vm(socket: &Path) -> Nic {
    let listener = UnixListener::bind(socket).unwrap();
    Nic::start(Session::new(listener.accept().unwrap().0).unwrap(), &NicConfig::default()).unwrap()
}

#[test]
fn a_directory_that_is_held_keeps_its_own_port_only_from_its_vm() {
    // What is not there is looked for each time on a tmpfs; other file systems know it by heart.
    let place = TempDir::new_in("/dev/shm").unwrap();
    let (daemon, bad, good) = daemon(Some(place.path()));
    let held = HeldDirectory::new(bad.parent().unwrap());
    wait_until_held(&daemon);
    let mut a = Nic::up(&daemon.socket("a"), &NicConfig::default());
    let mut b = Nic::up(&daemon.socket("b"), &NicConfig::default());
    meet(&mut a, &mut b);
    let mut found = vm(&good);
    meet(&mut found, &mut a);
    exchange(&mut a, &mut b, 16);
    let why = daemon.port_when("bad", "it says what keeps it", |port| {
        port.reason().is_some_and(|reason| reason.contains("the kernel has not found it for"))
    });
    assert_eq!(why.state(), "down", "{why:?}");
    drop(held);
    let mut found = vm(&bad);
    meet(&mut found, &mut a);
    // One that is removed meanwhile ends all the same, and leaves nothing behind.
    drop(found);
    fs::remove_file(&bad).unwrap();
    let threads = || daemon.footprint().threads.get(CONNECTIONS).copied().unwrap_or(0);
    let before = threads();
    let held = HeldDirectory::new(bad.parent().unwrap());
    wait_until_held(&daemon);
    let text = fs::read_to_string(daemon.dir().join("linecard.yaml")).unwrap();
    let without: String =
        text.lines().filter(|line| !line.starts_with("  bad:")).map(|line| format!("{line}\n")).collect();
    let file = daemon.dir().join("without.yaml");
    fs::write(&file, without).unwrap();
    daemon.linecard(&["apply", file.to_str().unwrap()]).unwrap();
    assert!(daemon.linecard(&["port", "show", "bad"]).is_err());
    drop(held);
    eventually("its thread is gone", || (threads() < before).then_some(()));
}

#[test]
fn the_daemon_ends_although_the_directory_of_its_sockets_is_held() {
    let (daemon, ..) = daemon(None);
    let held = HeldDirectory::new(daemon.dir());
    kill_process(daemon.pid(), Signal::TERM).unwrap();
    eventually("no thread of it runs any more", || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid().as_raw_nonzero())).unwrap();
        stat.rsplit_once(')').unwrap().1.starts_with(" Z").then_some(())
    });
    drop(held);
}

#[test]
fn a_directory_that_everybody_may_read_is_told() {
    let told = |mode| {
        let mut daemon = Daemon::start(|dir| {
            fs::set_permissions(dir, fs::Permissions::from_mode(mode)).unwrap();
            preamble(dir) + "networks: { lan: {} }\nports:\n" + &port(dir, "a", "lan")
        });
        assert!(daemon.terminate().success());
        daemon.log().matches("every user of this host may read").count()
    };
    assert_eq!((told(0o755), told(0o711)), (1, 0));
}

#[test]
fn the_daemon_does_not_come_to_itself_by_way_of_a_link() {
    let (daemon, bad, _) = daemon(None);
    symlink(daemon.socket("a"), &bad).unwrap();
    daemon.port_when("bad", "it says why not", |port| {
        port.reason().is_some_and(|reason| reason.contains("it is a symbolic link"))
    });
    // Long enough for some attempts.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(daemon.port("a").0["detail"]["connections"], 0, "{:?}", daemon.port("a"));
    // The same without a link: what is there is the victim's very socket.
    fs::remove_file(&bad).unwrap();
    fs::hard_link(daemon.socket("a"), &bad).unwrap();
    daemon.port_when("bad", "it says why not", |port| {
        port.reason().is_some_and(|reason| reason.contains("linecardd itself listens there"))
    });
    let mut a = Nic::up(&daemon.socket("a"), &NicConfig::default());
    let mut b = Nic::up(&daemon.socket("b"), &NicConfig::default());
    meet(&mut a, &mut b);
    // A VM in its place is found.
    fs::remove_file(&bad).unwrap();
    let mut found = vm(&bad);
    meet(&mut found, &mut a);
}
