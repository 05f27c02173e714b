//! A memory file that keeps whoever maps or unmaps it waiting: the kernel holds the list of a file's mappings while it punches a
//! hole into it, and that takes long if there are very many mappings and the puncher hardly ever runs. Whoever waits for it
//! holds the process's table of mappings, so that no thread maps anything, or is started, meanwhile.

#![allow(unsafe_code)] // A file that is mapped over and over.

use std::fs::File;
use std::ptr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::FallocateFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::frontend::daemon::Daemon;
use super::frontend::eventually;
use super::frontend::nic::{Nic, NicConfig};
use super::frontend::ram::{Region, memfd};
use super::frontend::witness::Witness;
use super::stalls::{Hog, Wait, schedule, step_back, waits};

/// Bytes of the file, all of which is in each of its mappings.
const LEN: u64 = 128 << 10;

/// How often it is mapped: a third of what the kernel lets a process have.
const MAPPINGS: usize = 20_000;

/// Ports that a front end can be hostile at: each is barred after the first time.
const BAD: [&str; 4] = ["bad-1", "bad-2", "bad-3", "bad-4"];

/// A file of which there are very many mappings.
struct Crowd {
    file: Arc<File>,
    start: *mut std::ffi::c_void,
}

impl Crowd {
    fn new() -> Self {
        let file = memfd(LEN);
        let len = LEN as usize;
        // SAFETY: new mappings at a place that the kernel chooses, and others in their place, of which nobody knows.
        let start = unsafe {
            let how = MapFlags::PRIVATE | MapFlags::NORESERVE;
            let start = mmap_anonymous(ptr::null_mut(), len * MAPPINGS, ProtFlags::empty(), how).unwrap();
            let how = MapFlags::SHARED | MapFlags::FIXED | MapFlags::POPULATE;
            for at in 0..MAPPINGS {
                mmap(start.byte_add(at * len), len, ProtFlags::READ | ProtFlags::WRITE, how, &file, 0).unwrap();
            }
            start
        };
        Self { file, start }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // SAFETY: what `new` has mapped, which nobody accesses.
        unsafe { munmap(self.start, LEN as usize * MAPPINGS).unwrap() };
    }
}

/// A hole that is being punched, for as long as the hog runs and then a moment.
struct Hole {
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
        Self { puncher, thread: begins.recv().unwrap(), hog }
    }

    fn end(self) {
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
fn hold_up(daemon: &Daemon, port: &str, leaving: bool) -> Option<(Crowd, Hole, Wait)> {
    let crowd = Crowd::new();
    let nic = Nic::up(&daemon.socket(port), &NicConfig::default());
    let file = Arc::clone(&crowd.file);
    let region = Region { gpa: 0x8_0000_0000, uva: 0x7777_0000_0000, len: LEN, offset: 0, file };
    // It is not mapped for this driver: that would wait as well, and everybody here with it.
    if leaving {
        nic.session().add_mem_reg(&region, true).unwrap();
    }
    let hole = Hole::begin(&crowd.file);
    // The hole has begun before the session comes to the file, or else there is nothing to wait for.
    std::thread::sleep(Duration::from_millis(50));
    if leaving {
        drop(nic);
    } else {
        // Its answer comes when the wait is over, if at all.
        std::thread::spawn(move || nic.session().add_mem_reg(&region, true));
    }
    let thread = format!("vhost-{port}");
    while !hole.puncher.is_finished() {
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
fn expect_barred(daemon: &Daemon, name: &str) {
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

#[test]
fn point_13_a_file_that_keeps_whoever_maps_it_waiting() {
    let ports: Vec<&str> = BAD.into_iter().chain(["peer"]).collect();
    let daemon = Daemon::with_ports(&ports);
    let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
    let mut seen = [false; 2];
    for (at, port) in BAD.into_iter().enumerate() {
        let leaving = at % 2 == 1;
        if let Some((_crowd, hole, _wait)) = hold_up(&daemon, port, leaving) {
            witness.keeps_going();
            hole.end();
            expect_barred(&daemon, port);
            seen[usize::from(leaving)] = true;
        }
    }
    assert_eq!(seen, [true; 2], "the kernel kept no session waiting for a file that is mapped {MAPPINGS} times");
    assert!(witness.finish() > 0);
}
