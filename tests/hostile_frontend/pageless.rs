//! A file of huge pages that has not one: whoever maps it waits for the lock of the file itself, which its owner holds for as long as
//! he likes. He punches a hole, which takes that lock and then waits for those who go through a mapping of very much of the file;
//! when they are done the hole's thread has no CPU. It takes neither root nor a pool of huge pages.

#![allow(unsafe_code)] // A mapping of our own.

use std::fs::File;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use super::frontend::DEADLINE;
use super::frontend::daemon::Daemon;
use super::frontend::ram::{Region, huge_memfd};
use super::frontend::session::{Session, feature, is_nack};
use super::frontend::witness::Witness;
use super::mapping::expect_barred;
use super::stalls::{Hog, schedule, step_back};
use super::{MIB, session};

/// Bytes of the file. Going through the tables of as much takes tens of milliseconds, though nothing is in them.
const LEN: usize = 1 << 40;

/// For how long its lock is held.
const HOLD: Duration = Duration::from_millis(600);

/// The file, mapped as a whole.
struct Wide {
    file: Arc<File>,
    at: usize,
}

impl Wide {
    fn new() -> Self {
        let file = huge_memfd(LEN as u64, false);
        let how = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at a place that the kernel chooses, which nobody looks into.
        let at = unsafe { mmap(ptr::null_mut(), LEN, ProtFlags::READ | ProtFlags::WRITE, how, &*file, 0) };
        let wide = Self { file, at: at.unwrap() as usize };
        for part in (0..LEN).step_by(1 << 30) {
            // This makes the tables, and fails then, because there is no page.
            // SAFETY: two megabytes of the mapping.
            let _ = unsafe { madvise((wide.at + part) as *mut _, 2 << 20, Advice::LinuxPopulateRead) };
        }
        wide
    }

    /// Goes through all of it, which keeps a hole waiting.
    fn go_through(&self) {
        // SAFETY: all of the mapping, which is there as long as this is.
        unsafe { madvise(self.at as *mut _, LEN, Advice::LinuxDontNeed) }.unwrap();
    }

    /// Has its lock held by a hole that is no longer kept waiting and does not get a CPU, and calls `meanwhile`, for [`HOLD`] of which
    /// that stays so. If the hole was there too soon, nothing is held.
    fn hold(&self, meanwhile: impl FnOnce()) {
        let (busy, file) = (AtomicBool::new(true), Arc::clone(&self.file));
        std::thread::scope(|scope| {
            let busy = &busy;
            let goers = [(); 2].map(|()| {
                scope.spawn(move || {
                    while busy.load(Ordering::Relaxed) {
                        self.go_through();
                    }
                })
            });
            let (begun, begins) = std::sync::mpsc::channel();
            let puncher = scope.spawn(move || {
                step_back(false);
                begun.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&*file, how, 0, 2 * MIB).unwrap();
            });
            let thread = begins.recv().unwrap();
            while !puncher.is_finished() && !sleeps(thread) {
                std::thread::yield_now();
            }
            schedule(thread, libc::SCHED_IDLE);
            let hogs = [(); 2].map(|()| Hog::start());
            busy.store(false, Ordering::Relaxed);
            let _ = goers.map(|goer| goer.join().unwrap());
            scope.spawn(move || {
                std::thread::sleep(HOLD);
                drop(hogs);
                schedule(thread, libc::SCHED_OTHER);
            });
            meanwhile();
        });
    }
}

impl Drop for Wide {
    fn drop(&mut self) {
        // SAFETY: the mapping, of which nobody knows any more.
        unsafe { munmap(self.at as *mut _, LEN) }.unwrap();
    }
}

/// Whether that thread of this process waits in the kernel for something that no signal ends.
fn sleeps(thread: libc::pid_t) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('D'))
}

/// Has the file mapped while its lock is held, over and over, until that is no longer heard.
fn map_it(session: &Session, wide: &Wide) {
    let file = Arc::clone(&wide.file);
    let region = Region { gpa: 0x8_0000_0000, uva: 0x7777_0000_0000, len: 2 * MIB, offset: 0, file };
    let (end, mut heard) = (Instant::now() + DEADLINE, true);
    while heard {
        assert!(Instant::now() < end, "it may go on for {DEADLINE:?}");
        wide.hold(|| {
            // There is no page for it, so it may be refused as well.
            let added = session.add_mem_reg(&region, true);
            let removed = added.as_ref().map_or(Ok(()), |()| session.rem_mem_reg(&region, true));
            heard = [added, removed].into_iter().all(|told| told.as_ref().err().is_none_or(is_nack));
        });
    }
}

#[test]
fn point_13_a_file_of_huge_pages_without_one_that_keeps_whoever_maps_it_waiting() {
    let daemon = Daemon::with_ports(&["bad"]);
    let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
    let bad = session(&daemon, "bad");
    bad.set_features(feature::VERSION_1 | feature::PROTOCOL_FEATURES, true).unwrap();
    map_it(&bad, &Wide::new());
    expect_barred(&daemon, "bad");
    assert!(witness.finish() > 0);
}
