//! A memory file that keeps whoever maps or unmaps it waiting: the kernel holds the list of a file's mappings while it punches a
//! hole into it, and that takes long if there are very many mappings and the puncher hardly ever runs. Whoever waits for it
//! holds the process's table of mappings, so that no thread maps anything, or is started, meanwhile.

#![allow(unsafe_code)] // A file that is mapped over and over.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::frontend::daemon::{Daemon, Manager, port as more_port};
use super::frontend::doorbell::Doorbell;
use super::frontend::nic::{Nic, NicConfig};
use super::frontend::ram::{GuestRam, Region, memfd};
use super::frontend::ring::Ring;
use super::frontend::session::feature;
use super::frontend::witness::Witness;
use super::frontend::{DEADLINE, eventually};
use super::stalls::{Hog, Wait, schedule, step_back, waits};

/// Bytes of the file, all of which is in each of its mappings.
const LEN: u64 = 128 << 10;

/// How often it is mapped: a third of what the kernel lets a process have.
const MAPPINGS: usize = 20_000;

/// How many of them the tests here have at once, of the 65,530 that this process can have (vm.max_map_count).
const MOST_MAPPINGS: usize = 60_000;
static ROOM: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// Ports that a front end can be hostile at: each is barred after the first time.
const BAD: [&str; 6] = ["bad-1", "bad-2", "bad-3", "bad-4", "bad-5", "bad-6"];

/// A file of which there are very many mappings.
pub(super) struct Crowd {
    file: Arc<File>,
    /// Its length, and of its beginning that of each mapping.
    len: u64,
    start: *mut std::ffi::c_void,
    bytes: usize,
}

impl Crowd {
    pub(super) fn new() -> Self {
        Self::of(LEN, MAPPINGS)
    }

    /// The file, and how much of it there is.
    pub(super) fn file(&self) -> (Arc<File>, u64) {
        (self.file.clone(), self.len)
    }

    /// So many mappings of the beginning of a file of that length, once there is room for them.
    fn of(bytes_of_file: u64, mappings: usize) -> Self {
        let taken = ROOM.0.lock().unwrap();
        *ROOM.1.wait_while(taken, |taken| *taken + mappings > MOST_MAPPINGS).unwrap() += mappings;
        let file = memfd(bytes_of_file);
        let len = LEN as usize;
        // SAFETY: new mappings at a place that the kernel chooses, and others in their place, of which nobody knows.
        let start = unsafe {
            let how = MapFlags::PRIVATE | MapFlags::NORESERVE;
            let start = mmap_anonymous(ptr::null_mut(), len * mappings, ProtFlags::empty(), how).unwrap();
            let how = MapFlags::SHARED | MapFlags::FIXED;
            let how = if bytes_of_file == LEN { how | MapFlags::POPULATE } else { how };
            for at in 0..mappings {
                mmap(start.byte_add(at * len), len, ProtFlags::READ | ProtFlags::WRITE, how, &file, 0).unwrap();
            }
            start
        };
        Self { file, len: bytes_of_file, start, bytes: len * mappings }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // SAFETY: what `new` has mapped, which nobody accesses.
        unsafe { munmap(self.start, self.bytes).unwrap() };
        *ROOM.0.lock().unwrap() -= self.bytes / LEN as usize;
        ROOM.1.notify_all();
    }
}

/// A hole that is being punched, for as long as the hog runs and then a moment.
pub(super) struct Hole {
    puncher: JoinHandle<()>,
    thread: libc::pid_t,
    hog: Hog,
}

impl Hole {
    fn begin(file: &Arc<File>) -> Self {
        let hog = Hog::start();
        let file = Arc::clone(file);
        let (begun, begins) = std::sync::mpsc::channel();
        let puncher = std::thread::spawn(move || {
            step_back(true);
            begun.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            rustix::fs::fallocate(&*file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, LEN).unwrap();
        });
        let hole = Self { puncher, thread: begins.recv().unwrap(), hog };
        // It is at it for certain once it has run for a while: it does nothing else.
        let before = hole.ran();
        eventually("the hole has begun", || {
            (hole.puncher.is_finished() || hole.ran() > before + Duration::from_millis(1)).then_some(())
        });
        hole
    }

    /// For how long the puncher has run (proc_pid_schedstat, first field).
    fn ran(&self) -> Duration {
        let text = std::fs::read_to_string(format!("/proc/self/task/{}/schedstat", self.thread)).unwrap_or_default();
        Duration::from_nanos(text.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or(0))
    }

    pub(super) fn end(self) {
        drop(self.hog);
        if !self.puncher.is_finished() {
            // It may have that CPU to itself now, or share it with others that are as busy.
            schedule(self.thread, libc::SCHED_OTHER);
        }
        self.puncher.join().unwrap();
    }
}

/// The front end of `port` has the file mapped, or unmapped if it is `leaving`, while a hole is punched into it. Returns the hole
/// and the wait of the port's session, unless the hole was there too soon.
pub(super) fn hold_up(daemon: &Daemon, port: &str, leaving: bool) -> Option<(Crowd, Hole, Wait)> {
    let crowd = Crowd::new();
    let nic = Nic::up(&daemon.socket(port), &NicConfig::default());
    let file = Arc::clone(&crowd.file);
    let region = Region { gpa: 0x8_0000_0000, uva: 0x7777_0000_0000, len: LEN, offset: 0, file };
    // It is not mapped for this driver: that would wait as well, and everybody here with it.
    if leaving {
        nic.session().add_mem_reg(&region, true).unwrap();
    }
    let hole = Hole::begin(&crowd.file);
    if leaving {
        drop(nic);
    } else {
        // Its answer comes when the wait is over, if at all.
        std::thread::spawn(move || nic.session().add_mem_reg(&region, true));
    }
    let thread = format!("vhost-{port}");
    let end = Instant::now() + DEADLINE;
    while !hole.puncher.is_finished() && Instant::now() < end {
        let seen = waits(daemon, &thread);
        std::thread::sleep(Duration::from_millis(150));
        if let Some(wait) = waits(daemon, &thread).into_iter().find(|wait| seen.contains(wait)) {
            return Some((crowd, hole, wait));
        }
    }
    hole.end();
    None
}

/// Port `name` is told everywhere to serve nobody for a minute, for this.
#[track_caller]
pub(super) fn expect_barred(daemon: &Daemon, name: &str) {
    const WHY: &str = "kept the switch from mapping memory";
    let port = daemon.port_when(name, "its reason is shown", |port| {
        port.reason().is_some_and(|reason| reason.contains(WHY) && reason.contains("for 60 s nobody is served here"))
    });
    assert_eq!(port.0["detail"]["barred"], 1);
    let told = eventually("an event says so", || {
        daemon.events("port-barred").into_iter().find(|event| event["port"].as_str() == Some(name))
    });
    assert_eq!(told["seconds"], 60, "{told}");
    assert!(told["reason"].as_str().unwrap().contains(WHY), "{told}");
    assert!(daemon.log().contains(&format!("{name}: waited ")), "the log says for how long");
}

/// Everybody but that session goes on: the healthy pair, those who look, a change of something else, and what feeds the watchdog.
/// Returns whether the session waited to the end of that: else it may be that they have waited for the hole.
fn others_go_on(daemon: &Daemon, witness: &Witness, manager: &Manager, port: &str, wait: &Wait) -> bool {
    witness.keeps_going();
    for args in [&["status"][..], &["port", "list"], &["port", "show", port], &["port", "show", "peer"], &["drops"]] {
        daemon.linecard(args).unwrap();
    }
    assert!(metrics(daemon).contains("linecard_port_barred_total"));
    let file = daemon.dir().join("linecard.yaml");
    let text = std::fs::read_to_string(&file).unwrap() + &more_port(daemon.dir(), &format!("beside-{port}"), "lan");
    std::fs::write(&file, text).unwrap();
    daemon.linecard(&["apply"]).unwrap();
    assert_eq!(daemon.port(&format!("beside-{port}")).state(), "down");
    manager.hears_on();
    witness.keeps_going();
    waits(daemon, &format!("vhost-{port}")).contains(wait)
}

/// What a scrape of the API's socket gets.
pub(super) fn metrics(daemon: &Daemon) -> String {
    let mut stream = UnixStream::connect(daemon.dir().join("api.sock")).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn point_13_a_file_that_keeps_whoever_maps_it_waiting() {
    let ports: Vec<&str> = BAD.into_iter().chain(["peer"]).collect();
    let mut daemon = Daemon::with_ports(&ports);
    let manager = daemon.manager();
    assert!(daemon.terminate().success());
    daemon.restart();
    let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
    let mut gone_on = [false; 2];
    for (at, port) in BAD.into_iter().enumerate() {
        let leaving = at % 2 == 1;
        if let Some((_crowd, hole, wait)) = hold_up(&daemon, port, leaving) {
            gone_on[usize::from(leaving)] |= others_go_on(&daemon, &witness, &manager, port, &wait);
            hole.end();
            expect_barred(&daemon, port);
        }
    }
    assert_eq!(
        gone_on, [true; 2],
        "others were served while a session waited to map the file, and while one waited to unmap it: else they waited as well, or \
         the kernel keeps nobody waiting for a file that is mapped {MAPPINGS} times"
    );
    assert!(witness.finish() > 0);
}

/// Sessions of three front ends that start a ring on pages which nobody has touched, over and over, while holes are punched into
/// their file: a page fault that the kernel has tried twice waits with the process's table of mappings held.
struct Faults {
    _crowd: Crowd,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Faults {
    fn begin(daemon: &Daemon, ports: [&str; 3]) -> Self {
        let crowd = Crowd::of(256 << 20, 50_000);
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for port in ports {
            let session = super::session(daemon, port);
            session.set_features(feature::VERSION_1 | feature::PROTOCOL_FEATURES, true).unwrap();
            let (gpa, file) = (0x1_0000_0000, Arc::clone(&crowd.file));
            session.set_mem_table(&[Region { gpa, uva: gpa, len: crowd.len, offset: 0, file }], true).unwrap();
            let (stop, len) = (Arc::clone(&stop), crowd.len);
            threads.push(std::thread::spawn(move || {
                // For its addresses only: what is written there is seen by nobody.
                let ram = GuestRam::new(vec![Region::new(gpa, gpa, len)]);
                let kick = Doorbell::new();
                for _ in (0..8000).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    ram.alloc(8192, 8192);
                    let ring = Ring::alloc(&ram, 256);
                    let started = (session.set_vring_num(0, 256, true))
                        .and_then(|()| session.set_vring_base(0, 0, true))
                        .and_then(|()| session.set_vring_addr(0, &ring, true))
                        .and_then(|()| session.set_vring_kick(0, &kick, true))
                        .and_then(|()| session.get_vring_base(0));
                    // It may be sent away for it.
                    if started.is_err() {
                        break;
                    }
                }
            }));
        }
        let (file, stopped, len) = (Arc::clone(&crowd.file), Arc::clone(&stop), crowd.len);
        threads.push(std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                rustix::fs::fallocate(&*file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, len).unwrap();
            }
        }));
        Self { _crowd: crowd, stop, threads }
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

#[test]
fn who_has_a_page_fault_wait_is_barred_and_who_waits_behind_it_is_not() {
    let daemon = Daemon::with_ports(&["bad-1", "bad-2", "bad-3", "victim"]);
    let faults = Faults::begin(&daemon, ["bad-1", "bad-2", "bad-3"]);
    let (thread, began) = ("vhost-victim", Instant::now());
    let mut waited = 0;
    // How long a hole takes is the machine's affair.
    let too_short = || daemon.events("port-barred").is_empty() && began.elapsed() < DEADLINE;
    while began.elapsed() < Duration::from_secs(8) || too_short() {
        let victim = Nic::up(&daemon.socket("victim"), &NicConfig::default());
        waited += waits(&daemon, thread).len();
        drop(victim);
        waited += waits(&daemon, thread).len();
    }
    faults.end();
    let barred = daemon.events("port-barred");
    assert!(!barred.iter().any(|event| event["port"].as_str() == Some("victim")), "{waited} waits seen: {barred:?}");
    assert!(!barred.is_empty(), "{waited} waits seen");
}

#[test]
fn point_14_sigterm_while_a_session_waits_for_its_file() {
    let daemon = Daemon::with_ports(&BAD);
    let heard = || daemon.log().contains("linecardd has ended");
    let waited = BAD.into_iter().enumerate().any(|(at, port)| {
        let Some((_crowd, hole, wait)) = hold_up(&daemon, port, at % 2 == 0) else { return false };
        rustix::process::kill_process(daemon.pid(), rustix::process::Signal::TERM).unwrap();
        eventually("SIGTERM is heard", || heard().then_some(()));
        let waits = waits(&daemon, &format!("vhost-{port}")).contains(&wait);
        hole.end();
        assert!(waits, "it was heard when the hole was there");
        waits
    });
    assert!(waited, "the kernel kept no session waiting for a file that is mapped {MAPPINGS} times");
}
