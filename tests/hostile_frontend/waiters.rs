//! Point 6 once more: whoever rings an eventfd wakes all who wait for it, and a front end can have its own waited for in any
//! number: by epoll sets ([`Crowd`]), by polls of io_uring and by polls of aio. And the eventfd that it kicks with, which
//! nobody on our side rings or reads, but whose lock is taken by whoever begins or ends to wait for it.

#![allow(unsafe_code)] // io_uring(7) and io_submit(2), which rustix has no calls for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::Scene;
use super::crowd::{Crowd, LONG, ringing};
use super::frontend::daemon::two_cpus;
use super::frontend::doorbell::Doorbell;
use super::frontend::eventually;
use super::frontend::frame::frame;
use super::frontend::nic::{Nic, exchange, meet};

/// What a system call came to.
fn outcome(result: libc::c_long) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Numbers of linux/io_uring.h.
mod uring {
    pub(super) const ENTRIES: u32 = 4096;
    pub(super) const SINGLE_ISSUER: u32 = 1 << 12;
    pub(super) const DEFER_TASKRUN: u32 = 1 << 13;
    pub(super) const POLL_ADD: u32 = 6;
    pub(super) const MULTISHOT: u32 = 1;
    /// Words of `struct io_uring_params`, and where in it lie the flags and the offsets of tail and array.
    pub(super) const PARAMETERS: usize = 30;
    pub(super) const FLAGS: usize = 2;
    pub(super) const TAIL: usize = 11;
    pub(super) const ARRAY: usize = 16;
    /// What can be mapped of a ring, and words of `struct io_uring_sqe`.
    pub(super) const SUBMISSIONS: u64 = 0;
    pub(super) const OPERATIONS: u64 = 0x1000_0000;
    pub(super) const WORDS: usize = 16;
}

/// Polls of an eventfd that last: what they find is never asked for, so each is woken again and again.
struct Polls {
    ring: OwnedFd,
    queue: *mut u32,
    operations: *mut u32,
    queue_bytes: usize,
    tail: usize,
}

impl Polls {
    /// Room for them, or why this kernel has none.
    fn new() -> io::Result<Self> {
        let mut parameters = [0u32; uring::PARAMETERS];
        parameters[uring::FLAGS] = uring::SINGLE_ISSUER | uring::DEFER_TASKRUN;
        // SAFETY: the parameters have the size of the kernel's structure and live through the call.
        let made = unsafe { libc::syscall(libc::SYS_io_uring_setup, uring::ENTRIES, parameters.as_mut_ptr()) };
        // SAFETY: the kernel gave the descriptor to us just now.
        let ring = unsafe { OwnedFd::from_raw_fd(outcome(made)? as i32) };
        let (tail, array) = (parameters[uring::TAIL] as usize / 4, parameters[uring::ARRAY] as usize);
        let queue_bytes = array + 4 * uring::ENTRIES as usize;
        let map = |len, offset| {
            let (access, how) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
            // SAFETY: a new mapping at an address that the kernel chooses.
            unsafe { mmap(std::ptr::null_mut(), len, access, how, &ring, offset) }.unwrap().cast::<u32>()
        };
        let queue = map(queue_bytes, uring::SUBMISSIONS);
        let operations = map(4 * uring::WORDS * uring::ENTRIES as usize, uring::OPERATIONS);
        for at in 0..uring::ENTRIES {
            // SAFETY: the array has so many words, and the mapping holds all of it.
            unsafe { queue.byte_add(array).add(at as usize).write(at) };
        }
        Ok(Self { ring, queue, operations, queue_bytes, tail })
    }

    /// Has [`uring::ENTRIES`] more wait for `bell`.
    fn add(&mut self, bell: &Doorbell) {
        for at in 0..uring::ENTRIES as usize {
            let mut operation = [0u32; uring::WORDS];
            operation[0] = uring::POLL_ADD;
            operation[1] = bell.as_fd().as_raw_fd() as u32;
            operation[6] = uring::MULTISHOT;
            operation[7] = libc::POLLIN as u32;
            // SAFETY: there are so many operations, each of so many words, and the kernel reads none of them now.
            unsafe { self.operations.add(at * uring::WORDS).cast::<[u32; uring::WORDS]>().write(operation) };
        }
        // SAFETY: the tail is a word of the mapping, aligned, which the kernel only reads.
        unsafe { AtomicU32::from_ptr(self.queue.add(self.tail)) }.fetch_add(uring::ENTRIES, Ordering::Release);
        let (number, nothing) = (libc::SYS_io_uring_enter, 0usize);
        // SAFETY: a system call without pointers of ours.
        let taken = unsafe { libc::syscall(number, self.ring.as_raw_fd(), uring::ENTRIES, 0, 0, nothing, 0usize) };
        assert_eq!(outcome(taken).expect("polls"), uring::ENTRIES as usize);
    }
}

impl Drop for Polls {
    fn drop(&mut self) {
        // SAFETY: what `new` has mapped, and nobody has a pointer into it any more.
        unsafe {
            munmap(self.queue.cast(), self.queue_bytes).unwrap();
            munmap(self.operations.cast(), 4 * uring::WORDS * uring::ENTRIES as usize).unwrap();
        }
    }
}

/// Polls of an eventfd each of which ends when it rings, inside of the ring: half of what a host allows in all by default
/// (fs.aio-max-nr).
struct Requests {
    context: libc::c_ulong,
    blocks: Vec<[u64; 8]>,
}

impl Requests {
    const COUNT: usize = 32 << 10;
    const POLL: u64 = 5;

    /// Room for them, or why this kernel has none.
    fn new(bell: &Doorbell) -> io::Result<Self> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: the word lives through the call, which writes it.
        outcome(unsafe { libc::syscall(libc::SYS_io_setup, Self::COUNT, &raw mut context) })?;
        // `struct iocb` (linux/aio_abi.h): what to do and on which descriptor in the third word, the events in the fourth.
        let descriptor = bell.as_fd().as_raw_fd() as u64;
        let block = [0, 0, descriptor << 32 | Self::POLL, libc::POLLIN as u64, 0, 0, 0, 0];
        Ok(Self { context, blocks: vec![block; Self::COUNT] })
    }

    /// Has all of them wait that do not.
    fn add(&mut self) {
        let mut done = vec![[0u64; 4]; Self::COUNT];
        let pointers: Vec<_> = self.blocks.iter().map(|block| block.as_ptr()).collect();
        // SAFETY: there is room for so many events of four words; the blocks and the pointers to them live through the calls
        // and are only read.
        unsafe {
            let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            let (count, none) = (Self::COUNT, 0usize);
            libc::syscall(libc::SYS_io_getevents, self.context, none, count, done.as_mut_ptr(), &raw const now);
            let mut taken = 0;
            while taken < count {
                let from = pointers.as_ptr().add(taken);
                match libc::syscall(libc::SYS_io_submit, self.context, count - taken, from) {
                    more if more > 0 => taken += more as usize,
                    // All that there is room for wait.
                    _ => break,
                }
            }
        }
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        // SAFETY: a system call without pointers of ours, on a context that `new` has made.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

/// Has frames sent to `nic`, whose interrupt takes long, `before` each, until its connection is ended for that.
pub(super) fn expect_end(scene: &mut Scene, nic: &Nic, mut before: impl FnMut()) {
    let Scene { daemon, peer, .. } = &mut *scene;
    eventually("its connection is ended", || {
        before();
        peer.send(&frame(nic.mac, peer.mac, 100, 1));
        peer.drain();
        let rx = &nic.pairs[0].rx.queue.ring;
        rx.set_used_event(rx.used_idx());
        let port = daemon.port("bad");
        let told = port.reason().is_some_and(|reason| reason.contains("interrupts take milliseconds"));
        (told && port.state() == "stopped").then_some(())
    });
    scene.expect_barred("interrupts take milliseconds");
    scene.witness.keeps_going();
}

/// Kicks in a loop, with so long a break between two, while there is one of these.
struct Kicker(Arc<AtomicBool>, Option<std::thread::JoinHandle<()>>);

impl Kicker {
    fn start(bell: Doorbell, pause: Duration) -> Self {
        let going = Arc::new(AtomicBool::new(true));
        let goes_on = going.clone();
        let mut cpus = rustix::thread::CpuSet::new();
        cpus.set(two_cpus()[0]);
        let kick = move || {
            // The shard's: sessions have the other one, and wait for a kick's lock only while somebody else runs that has it.
            rustix::thread::sched_setaffinity(None, &cpus).unwrap();
            while goes_on.load(Ordering::Relaxed) {
                bell.ring();
                std::thread::sleep(pause);
            }
        };
        Self(going, Some(std::thread::spawn(kick)))
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
        let _ = self.1.take().map(|thread| thread.join());
    }
}

/// Nobody here rings what a guest kicks with. Its lock is another matter: whoever kicks holds it while all who wait are woken, and
/// whoever begins or ends to wait, as the switch does where a ring starts, fails and stops, has to wait for that.
#[test]
fn point_06_kicks_that_many_wait_for() {
    let mut scene = Scene::new();
    let mut nic = scene.nic();
    let kick = nic.vmm.vrings[1].kick.clone();
    let crowd = Crowd::around_bell(&kick, Duration::from_millis(1));
    // Who kicks has interrupts off as well, and other tests run beside this one.
    let kicker = Kicker::start(kick.clone(), Duration::from_millis(5));
    for _ in 0..10 {
        exchange(&mut nic, &mut scene.peer, 16);
        nic.session().set_vring_kick(1, &kick, true).unwrap();
        let tx = &nic.pairs[0].tx.queue;
        tx.ring.set_avail_idx(tx.ring.avail_idx().wrapping_add(0x7fff));
        scene.daemon.port_when("bad", "it has its fault", |port| port.state() == "stopped");
        scene.witness.keeps_going();
        nic.rebind(nic.features()).unwrap();
        meet(&mut nic, &mut scene.peer);
        assert_eq!(scene.daemon.port("bad").state(), "up");
    }
    drop((kicker, crowd, nic));
    scene.expect_usable("kicks that many waited for");
    scene.finish();
}

/// Who changes what a shard waits for has the lock of the shard's epoll set while the kick's is waited for.
#[test]
fn point_06_kicks_that_are_changed_while_many_wait_for_them() {
    let mut scene = Scene::new();
    let nic = scene.nic();
    let kick = nic.vmm.vrings[1].kick.clone();
    let crowd = Crowd::around_bell(&kick, Duration::from_millis(20));
    let kicker = Kicker::start(kick.clone(), Duration::ZERO);
    let change = |heard| nic.session().set_vring_kick(1, &kick, heard);
    eventually("its connection is ended", || (0..64).try_for_each(|number| change(number == 63)).err());
    drop(kicker);
    scene.expect_barred("kicks take long to wait for");
    scene.witness.keeps_going();
    drop((crowd, nic));
    scene.expect_usable("kicks that were changed while many waited for them");
    scene.finish();
}

#[test]
fn point_06_interrupts_that_io_uring_waits_for() {
    let mut scene = Scene::new();
    let nic = scene.nic();
    let bell = nic.vmm.vrings[0].call.clone();
    let mut polls =
        Polls::new().expect("io_uring, of Linux 6.1 or newer and not switched off by kernel.io_uring_disabled");
    while ringing(&bell) < LONG {
        bell.take();
        polls.add(&bell);
        bell.ring();
    }
    expect_end(&mut scene, &nic, || {});
    drop((polls, nic));
    scene.expect_usable("interrupts that io_uring waited for");
    scene.finish();
}

#[test]
fn point_06_interrupts_that_aio_waits_for() {
    let mut scene = Scene::new();
    let nic = scene.nic();
    let bell = nic.vmm.vrings[0].call.clone();
    let mut requests = Requests::new(&bell).expect("aio, and half of fs.aio-max-nr");
    expect_end(&mut scene, &nic, || {
        bell.take();
        requests.add();
    });
    drop((requests, nic));
    scene.expect_usable("interrupts that aio waited for");
    scene.finish();
}
