//! What all files in hugetlbfs have in common: the kernel lets page faults of theirs, and holes, wait for each other by a few mutexes
//! (`hugetlb_fault_mutex_table`). A process that has no socket of ours can hold those, with huge pages of its own that it touches very
//! slowly; whoever then touches huge pages of a VM waits, and the VM is not to blame.

#![allow(unsafe_code)] // A mapping of our own.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::frontend::DEADLINE;
use super::frontend::daemon::Daemon;
use super::frontend::doorbell::Doorbell;
use super::frontend::ram::{GuestRam, Region, huge_memfd};
use super::frontend::ring::Ring;
use super::frontend::session::{Session, feature};
use super::hugepages::Pool;
use super::stalls::{Hog, schedule, step_back, waits};
use super::{MIB, session};

/// Threads that hold such a mutex most of the time, each with a page of its own, and those that keep the CPU from them.
const HOLDERS: u64 = 40;
const HOGS: usize = 2;

/// Huge pages of the VM.
const PAGES: u64 = 8;

/// A wait that would count, beyond what every session may have in a second.
const LONG: Duration = Duration::from_millis(400);

/// Somebody who touches fresh huge pages of his own, and hardly ever runs meanwhile.
struct Stranger {
    stop: Arc<AtomicBool>,
    holders: Vec<(JoinHandle<()>, libc::pid_t)>,
    hogs: Vec<Hog>,
}

impl Stranger {
    fn begin() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let holders = (0..HOLDERS).map(|_| hold(Arc::clone(&stop))).collect();
        Self { stop, holders, hogs: (0..HOGS).map(|_| Hog::start()).collect() }
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.hogs.clear();
        for (holder, thread) in self.holders.drain(..) {
            schedule(thread, libc::SCHED_OTHER);
            holder.join().unwrap();
        }
    }
}

/// A thread that touches a page and gives it back, over and over.
fn hold(stop: Arc<AtomicBool>) -> (JoinHandle<()>, libc::pid_t) {
    let (begun, begins) = std::sync::mpsc::channel();
    let holder = std::thread::spawn(move || {
        let (file, len) = (huge_memfd(2 * MIB, false), 2 * MIB as usize);
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place that the kernel chooses.
        let page = unsafe { mmap(ptr::null_mut(), len, access, MapFlags::SHARED, &*file, 0) }.unwrap().cast::<u8>();
        step_back(true);
        begun.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
        while !stop.load(Ordering::Relaxed) {
            // SAFETY: the mapping's first byte, which nobody else knows of; the file has a page for it, which is reserved.
            unsafe { page.write_volatile(1) };
            rustix::fs::fallocate(&*file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 2 * MIB).unwrap();
        }
        // SAFETY: what was mapped above, which nobody accesses any more.
        unsafe { munmap(page.cast(), len) }.unwrap();
    });
    let thread = begins.recv().unwrap();
    (holder, thread)
}

/// A front end whose rings lie in huge pages, and are started and stopped over and over, and once more after `stop`.
fn restart_rings(session: Session, stop: &AtomicBool) -> std::io::Result<()> {
    let (gpa, len, kick) = (0x1_0000_0000, PAGES * 2 * MIB, Doorbell::new());
    session.set_features(feature::VERSION_1 | feature::PROTOCOL_FEATURES, true)?;
    // They stay, so that it is the mapping that waits, and not who gives the pages back.
    let files = [(); 2].map(|()| huge_memfd(len, false));
    for file in files.iter().cycle() {
        let is_last = stop.load(Ordering::Relaxed);
        session.set_mem_table(&[Region { gpa, uva: gpa, len, offset: 0, file: Arc::clone(file) }], true)?;
        // For its addresses only: what is written there is seen by nobody.
        let ram = GuestRam::new(vec![Region::new(gpa, gpa, len)]);
        for _ in 0..PAGES / 2 {
            let ring = Ring::alloc(&ram, 256);
            ram.alloc(4 * MIB - 64 * 1024, 4096);
            session.set_vring_num(0, 256, true)?;
            session.set_vring_base(0, 0, true)?;
            session.set_vring_addr(0, &ring, true)?;
            session.set_vring_kick(0, &kick, true)?;
            session.get_vring_base(0)?;
        }
        if is_last {
            break;
        }
    }
    Ok(())
}

/// The session of `victim` waits in the kernel for that long at one time.
fn is_kept_waiting(daemon: &Daemon) -> bool {
    let end = Instant::now() + DEADLINE;
    while Instant::now() < end {
        let seen = waits(daemon, "vhost-victim");
        std::thread::sleep(LONG);
        if waits(daemon, "vhost-victim").iter().any(|wait| seen.contains(wait)) {
            return true;
        }
    }
    false
}

#[test]
fn who_waits_for_a_strangers_huge_pages_is_not_barred() {
    let _pool = Pool::reserve_alone(2, HOLDERS + 2 * PAGES);
    let daemon = Daemon::with_ports(&["victim"]);
    let (victim, stop) = (session(&daemon, "victim"), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let restarting = scope.spawn(|| restart_rings(victim, &stop));
        let stranger = Stranger::begin();
        let times = (0..3).filter(|_| is_kept_waiting(&daemon)).count();
        drop(stranger);
        stop.store(true, Ordering::Relaxed);
        let served = restarting.join().unwrap();
        let barred = daemon.events("port-barred");
        assert!(barred.is_empty(), "{barred:?}, after {times} waits");
        served.unwrap();
        assert!(times > 0, "the kernel kept nobody waiting for huge pages of others");
    });
}
