//! Memory that holds up whoever touches it: the kernel lets nobody in while it punches a hole into a file, and takes as long
//! for that as the puncher has little of a CPU.

#![allow(unsafe_code)] // SCHED_IDLE, which rustix has no call for.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::FallocateFlags;

use super::frontend::daemon::{Daemon, allowed_cpus};
use super::frontend::eventually;
use super::frontend::frame::frame;
use super::frontend::nic::{Nic, exchange, meet};
use super::frontend::ram::{Region, memfd};
use super::frontend::ring::Desc;
use super::{MIB, Scene};

/// Bytes of the file that is punched.
pub(super) const LEN: u64 = 256 * MIB;

/// Puts the calling thread on the last CPU, which is not the shard's where there are two, to run when nobody else wants to.
pub(super) fn step_back(idle: bool) {
    let mut cpus = rustix::thread::CpuSet::new();
    cpus.set(*allowed_cpus().last().unwrap());
    rustix::thread::sched_setaffinity(None, &cpus).unwrap();
    if idle {
        assert!(schedule(0, libc::SCHED_IDLE));
    }
}

/// Has thread `thread` run by this policy; 0 is the calling one. `false` if it is gone.
pub(super) fn schedule(thread: libc::pid_t, policy: libc::c_int) -> bool {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure lives through the call, which reads it and nothing else.
    unsafe { libc::sched_setscheduler(thread, policy, &parameters) == 0 }
}

/// A hole that is being punched, slowly while the hog runs.
pub(super) struct Punch {
    puncher: JoinHandle<()>,
    hog: Hog,
}

/// Takes the CPU from the puncher until it goes.
pub(super) struct Hog {
    thread: Option<JoinHandle<()>>,
    hogs: Arc<AtomicBool>,
}

impl Hog {
    pub(super) fn start() -> Self {
        let hogs = Arc::new(AtomicBool::new(true));
        let going = hogs.clone();
        let thread = std::thread::spawn(move || {
            step_back(false);
            while going.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        Self { thread: Some(thread), hogs }
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        self.hogs.store(false, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Punch {
    fn begin(file: &Arc<File>) -> Self {
        let hog = Hog::start();
        let file = file.clone();
        let puncher = std::thread::spawn(move || {
            step_back(true);
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&*file, how, 0, LEN).unwrap();
        });
        Self { puncher, hog }
    }

    fn is_over(&self) -> bool {
        self.puncher.is_finished()
    }

    pub(super) fn end(self) {
        drop(self.hog);
        self.puncher.join().unwrap();
    }
}

/// Threads of shards that are held up now.
fn stuck(daemon: &Daemon) -> u64 {
    let shards = daemon.linecard(&["shard", "list"]).unwrap();
    shards.as_array().unwrap().iter().map(|shard| shard["stuck"].as_u64().unwrap()).sum()
}

/// A wait in the kernel that nothing ends, of one of the daemon's threads. One that goes on has the same number.
#[derive(Debug, PartialEq)]
pub(super) struct Wait {
    thread: PathBuf,
    number: u64,
}

/// Waits of threads whose names begin like this, as the kernel tells them, whatever the daemon makes of them.
pub(super) fn waits(daemon: &Daemon, of: &str) -> Vec<Wait> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", daemon.pid().as_raw_nonzero())).unwrap();
    let wait = |thread: PathBuf| {
        let status = std::fs::read_to_string(thread.join("status")).ok()?;
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        let held = field("Name")?.starts_with(of) && field("State")?.starts_with('D');
        held.then(|| field("voluntary_ctxt_switches")?.parse().ok()).flatten().map(|number| Wait { thread, number })
    };
    threads.filter_map(|thread| wait(thread.ok()?.path())).collect()
}

/// Has the guest of `bad` send out of a file that is being punched until a shard is held up there; returns the hole and the
/// shard's wait.
pub(super) fn hold_up(daemon: &Daemon, bad: &mut Nic, file: &Arc<File>, at: u64) -> (Punch, Wait) {
    let before = waits(daemon, "shard-");
    let ring = bad.vmm.vrings[1].ring.clone();
    ring.set_desc(0, Desc::readable(at, 1412));
    for _ in 0..50 {
        let filler = vec![1; MIB as usize];
        (0..LEN / MIB).for_each(|at| file.write_all_at(&filler, at * MIB).unwrap());
        let punch = Punch::begin(file);
        while !punch.is_over() {
            ring.offer(0);
            bad.vmm.vrings[1].kick.ring();
            // A fault that waits for something else, a lock or a page, does not do so for long.
            let seen = waits(daemon, "shard-");
            std::thread::sleep(Duration::from_millis(10));
            let held = |wait: &Wait| seen.contains(wait) && !before.contains(wait);
            if let Some(wait) = waits(daemon, "shard-").into_iter().find(held) {
                return (punch, wait);
            }
        }
        punch.end();
    }
    panic!("no shard was ever held up");
}

/// Holds a shard up and has everybody else do what they do. Returns whether it was held up to the end of that: else it may be
/// that they have waited for it.
fn others_go_on(scene: &mut Scene, other: &mut Nic) -> bool {
    let mut bad = scene.nic();
    let file = memfd(LEN);
    let region = Region { gpa: 0x8_0000_0000, uva: 0x7777_0000_0000, len: 2 * MIB, offset: 0, file: file.clone() };
    bad.plug(region.clone()).unwrap();
    let at = bad.vmm.ram.alloc_in(region.gpa, 4096, 4096);
    let (punch, wait) = hold_up(&scene.daemon, &mut bad, &file, at);
    // Another network, the same network, and the control side.
    scene.witness.keeps_going();
    exchange(other, &mut scene.peer, 32);
    scene.peer.send(&frame(bad.mac, scene.peer.mac, 100, 1));
    for args in [&["status"][..], &["drops"], &["port", "list"], &["port", "show", "bad"]] {
        scene.daemon.linecard(args).unwrap();
    }
    scene.witness.keeps_going();
    // The longer the machine takes for all that, the longer the hole takes, as a rule.
    let held = || waits(&scene.daemon, "shard-").contains(&wait);
    let to_the_end = held();
    assert!(stuck(&scene.daemon) > 0 || !held(), "`shard list` does not have it");
    punch.end();
    to_the_end
}

#[test]
fn point_12_a_hole_that_is_punched_under_a_frame() {
    let mut scene = Scene::new();
    let mut other = Nic::up(&scene.daemon.socket("other"), &super::NicConfig::default());
    meet(&mut other, &mut scene.peer);
    let held = (0..8).any(|_| others_go_on(&mut scene, &mut other));
    assert!(held, "the others were served only once the hole was there, each time");
    eventually("its connection is ended", || {
        let port = scene.daemon.port("bad");
        port.reason().is_some_and(|reason| reason.contains("held the switch up in the VM's memory")).then_some(())
    });
    assert!(scene.daemon.port("bad").0["detail"]["held_up"].as_u64() >= Some(1));
    scene.expect_barred("held the switch up in the VM's memory");
    let cpu = allowed_cpus()[0] as u64;
    let stall = eventually("the stall is told", || scene.daemon.events("shard-stalled").pop());
    assert_eq!((&stall["port"], stall["cpu"].as_u64()), (&"bad".into(), Some(cpu)), "{stall}");
    assert!(stall["milliseconds"].as_u64() >= Some(20), "{stall}");
    drop(other);
    scene.peer.poll();
    eventually("all threads are back", || (stuck(&scene.daemon) == 0).then_some(()));
    scene.expect_usable("a hole under a frame");
    scene.finish();
}

/// Frames, or buffers, of a guest that lie in a file of which holes are punched.
struct Holes {
    file: Arc<File>,
    region: Region,
}

/// How many frames or buffers there are, each on a page of its own.
const PAGES: u16 = 64;

impl Holes {
    fn new() -> Self {
        let file = memfd(LEN);
        let region = Region { gpa: 0x8_0000_0000, uva: 0x7777_0000_0000, len: 2 * MIB, offset: 0, file: file.clone() };
        Self { file, region }
    }

    /// Where the one with this number is: across the end of a page, so that it is looked at before it is copied.
    fn at(&self, number: u16) -> u64 {
        self.region.gpa + 8192 * u64::from(number) + 4096 - 700
    }

    /// Punches one hole after the other while `work` is done again and again, until a port is barred or `most` holes were
    /// punched; returns whether a port is.
    fn punch(&self, daemon: &Daemon, most: usize, mut work: impl FnMut()) -> bool {
        let before = daemon.events("port-barred").len();
        for _ in 0..most {
            let filler = vec![1; MIB as usize];
            (0..LEN / MIB).for_each(|at| self.file.write_all_at(&filler, at * MIB).unwrap());
            work();
            // Long enough by itself, and not for ever on a busy machine.
            let file = self.file.clone();
            let puncher = std::thread::spawn(move || {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&*file, how, 0, LEN).unwrap();
            });
            while !puncher.is_finished() {
                work();
            }
            puncher.join().unwrap();
            if daemon.events("port-barred").len() > before {
                return true;
            }
        }
        false
    }
}

/// Nobody but `bad` was barred or lost its connection.
#[track_caller]
fn expect_nobody_else_barred(daemon: &Daemon) {
    let barred = daemon.events("port-barred");
    assert!(barred.iter().all(|event| event["port"] == "bad"), "{barred:?}");
    let of_peer = |event: &&serde_json::Value| event["port"] == "peer";
    let peer = daemon.port("peer").0;
    assert_eq!(peer["detail"]["connections"], 1, "{:?}", daemon.events("shard-stalled").iter().find(of_peer));
    assert_eq!(peer["detail"]["barred"], 0, "{peer}");
}

#[test]
fn point_12_holes_under_frames_that_are_being_written() {
    let mut scene = Scene::new();
    let holes = Holes::new();
    for _ in 0..2 {
        let mut bad = scene.nic();
        bad.plug(holes.region.clone()).unwrap();
        let (ring, ram) = (bad.vmm.vrings[1].ring.clone(), bad.vmm.ram.clone());
        let head = ram.alloc(4096, 4096);
        ram.write(head, &[&[0; 12], &frame(scene.peer.mac, bad.mac, 64, 1)[..]].concat());
        for number in 0..PAGES {
            ring.set_desc(2 * number, Desc::readable(head, 76).then(2 * number + 1));
            ring.set_desc(2 * number + 1, Desc::readable(holes.at(number), 1400));
        }
        let barred = holes.punch(&scene.daemon, 200, || {
            if ring.used_idx() == ring.avail_idx() {
                (0..PAGES).for_each(|number| ring.offer(2 * number));
                bad.vmm.vrings[1].kick.ring();
            }
            scene.peer.poll();
        });
        assert!(barred, "no shard was ever held up: {:?}", scene.daemon.events("shard-stalled"));
        expect_nobody_else_barred(&scene.daemon);
        drop(bad);
        // What was held up there has its end before the next time.
        eventually("all threads are back", || (stuck(&scene.daemon) == 0).then_some(()));
    }
    scene.expect_barred("held the switch up in the VM's memory");
    let stalls = scene.daemon.events("shard-stalled");
    assert!(stalls.iter().all(|stall| stall["port"] == "bad" || stall["sender"] == "bad"), "{stalls:?}");
    scene.peer.poll();
    scene.finish();
}

#[test]
fn point_12_holes_under_buffers() {
    let mut scene = Scene::new();
    let mut other = Nic::up(&scene.daemon.socket("other"), &super::NicConfig::default());
    meet(&mut other, &mut scene.peer);
    let holes = Holes::new();
    let mut bad = scene.nic();
    bad.plug(holes.region.clone()).unwrap();
    let ring = bad.vmm.vrings[0].ring.clone();
    for number in 0..256 {
        ring.set_desc(number, Desc::writable(holes.at(number % PAGES), 2048));
    }
    let (mut taken, mut round) = (ring.used_idx(), 0);
    let barred = holes.punch(&scene.daemon, 200, || {
        // Several send to it, one after the other.
        round += 1;
        let sender = if round % 2 == 0 { &mut scene.peer } else { &mut other };
        sender.send(&frame(bad.mac, sender.mac, 1400, 1));
        std::thread::sleep(Duration::from_millis(1));
        while taken != ring.used_idx() {
            ring.offer(ring.used_entry(taken).0 as u16);
            taken = taken.wrapping_add(1);
        }
    });
    assert!(barred, "no shard was ever held up: {:?}", scene.daemon.events("shard-stalled"));
    expect_nobody_else_barred(&scene.daemon);
    let stalls = scene.daemon.events("shard-stalled");
    assert!(stalls.iter().all(|stall| stall["port"] == "bad"), "{stalls:?}");
    scene.expect_barred("held the switch up in the VM's memory");
    drop(bad);
    eventually("all threads are back", || (stuck(&scene.daemon) == 0).then_some(()));
    exchange(&mut other, &mut scene.peer, 32);
    drop(other);
    scene.peer.poll();
    scene.finish();
}
