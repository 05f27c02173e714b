//! Files that lose their pages again and again while the switch is in them: guest memory, the dirty log, and the daemon's own
//! records of packed rings. What is lost is the guest's own; the port may be stopped for it, or its connection ended where a
//! hole held a shard up, and nothing else may happen.

#![allow(unsafe_code)] // madvise on a mapping of our own.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::fs::FallocateFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use rustix::process::{Resource, Rlimit, prlimit};

use super::frontend::daemon::Daemon;
use super::frontend::eventually;
use super::frontend::frame::{BROADCAST, frame};
use super::frontend::nic::{LINUX, Nic, NicConfig, carry, exchange, meet};
use super::frontend::ram::{GuestRam, Region, huge_memfd, memfd};
use super::frontend::ring::Desc;
use super::frontend::session::feature;
use super::hugepages::{Pool, SmallHugetlbfs};
use super::{MIB, Scene};

/// Something that is done to a file over and over until this goes.
struct Loop {
    going: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Loop {
    fn begin(mut deed: impl FnMut() + Send + 'static) -> Self {
        let going = Arc::new(AtomicBool::new(true));
        let goes_on = going.clone();
        let thread = std::thread::spawn(move || {
            while goes_on.load(Ordering::Relaxed) {
                deed();
                // The machine has other work as well.
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        });
        Self { going, thread: Some(thread) }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.going.store(false, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// The ways to take pages from a file of `len` bytes.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Holes, by fallocate(2).
    Punch,
    /// The same by way of a mapping.
    Remove,
}

/// Takes all pages of `file` away, again and again.
fn lose(way: Way, file: &Arc<File>, len: u64) -> Loop {
    let file = file.clone();
    match way {
        Way::Punch => Loop::begin(move || punch(&file, len)),
        Way::Remove => {
            let (access, len) = (ProtFlags::READ | ProtFlags::WRITE, len as usize);
            // SAFETY: a new mapping at an address that the kernel chooses; the number keeps it apart from references.
            let at =
                unsafe { mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED | MapFlags::NORESERVE, &*file, 0) };
            let mapping = Mapping { at: at.unwrap() as usize, len };
            Loop::begin(move || mapping.remove())
        }
    }
}

fn punch(file: &File, len: u64) {
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, how, 0, len).unwrap();
}

/// A mapping that nobody looks into.
struct Mapping {
    at: usize,
    len: usize,
}

impl Mapping {
    fn remove(&self) {
        // SAFETY: exactly a mapping of ours, which nobody has a reference into.
        unsafe { madvise(self.at as *mut _, self.len, Advice::LinuxRemove) }.unwrap();
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: as above, and nobody uses it any more.
        unsafe { munmap(self.at as *mut _, self.len) }.unwrap();
    }
}

/// Frames from and to a NIC whose rings and buffers may be gone any moment, and which this process therefore does not believe.
fn talk_blindly(scene: &mut Scene, nic: &Nic, at: u64) {
    let ring = &nic.vmm.vrings[1].ring;
    for round in 0..200 {
        nic.vmm.ram.write(at + 12, &frame(BROADCAST, nic.mac, 1400, round));
        ring.set_desc(0, Desc::readable(at, 1412));
        ring.offer(0);
        nic.vmm.vrings[1].kick.ring();
        scene.peer.send(&frame(nic.mac, scene.peer.mac, 1400, round));
        scene.peer.drain();
        scene.peer.poll();
    }
}

/// What became of port `bad`: it is up, stopped for a ring that was overwritten with zeros, or was sent away because a hole held
/// a shard up.
#[track_caller]
fn expect_own_end(daemon: &Daemon) {
    let port = daemon.port("bad");
    let reason = port.reason().unwrap_or_default();
    let own = ["ring", "held the switch up"].iter().any(|why| reason.contains(why));
    assert!(port.state() == "up" || own, "{}: {reason}", port.state());
}

#[test]
fn point_12_memory_whose_pages_are_taken_all_the_time() {
    let _pool = Pool::reserve(2, 32);
    let mut scene = Scene::new();
    for (huge, way) in [(false, Way::Punch), (false, Way::Remove), (true, Way::Punch), (true, Way::Remove)] {
        let file = if huge { huge_memfd(16 * MIB, false) } else { memfd(16 * MIB) };
        // The buffers and not the rings, then all of it.
        for rings_too in [false, true] {
            let lost = Region { file: file.clone(), ..Region::new(0x8_0000_0000, 0x7777_0000_0000, 16 * MIB) };
            let regions = if rings_too { vec![lost.clone()] } else { vec![Region::new(0, 0x7000_0000_0000, 32 * MIB)] };
            let config = NicConfig { ram: Some(GuestRam::new(regions)), ..NicConfig::default() };
            let mut nic = Nic::up(&scene.daemon.socket("bad"), &config);
            meet(&mut nic, &mut scene.peer);
            if !rings_too {
                nic.plug(lost.clone()).unwrap();
            }
            let at = nic.vmm.ram.alloc_in(lost.gpa, 4096, 4096);
            let taking = lose(way, &file, 16 * MIB);
            talk_blindly(&mut scene, &nic, at);
            scene.witness.keeps_going();
            expect_own_end(&scene.daemon);
            drop((taking, nic));
            scene.peer.poll();
            scene.expect_usable(&format!("{way:?}, huge pages: {huge}, rings too: {rings_too}"));
        }
    }
    scene.finish();
}

#[test]
fn huge_pages_that_run_out_under_traffic_are_named_and_a_pause_of_the_vm_heals_it() {
    let _pool = Pool::reserve(2, 8);
    let mut scene = Scene::new();
    let small = SmallHugetlbfs::new("2M", "16M");
    for from_peer in [false, true] {
        let mut nic = scene.nic();
        // Eight pages, of which there will be two.
        let filler = small.file("filler", 12 * MIB);
        rustix::fs::fallocate(&filler, FallocateFlags::empty(), 0, 12 * MIB).unwrap();
        let file = Arc::new(small.file(&format!("ram-{from_peer}"), 16 * MIB));
        let region = Region { gpa: 0x8_0000_0000, uva: 0x7777_0000_0000, len: 16 * MIB, offset: 0, file };
        nic.session().add_mem_reg(&region, true).unwrap();
        let (sends, receives) = (nic.vmm.vrings[1].ring.clone(), nic.vmm.vrings[0].ring.clone());
        let buffer = |head: u16| region.gpa + u64::from(head % 8) * 2 * MIB;
        (0..256).for_each(|head| match from_peer {
            true => receives.set_desc(head, Desc::writable(buffer(head), 2048)),
            false => sends.set_desc(head, Desc::readable(buffer(head), 1412)),
        });
        let mut touch_all = |nic: &Nic, first: u16| {
            for at in first..first + 40 {
                if from_peer {
                    scene.peer.send(&frame(nic.mac, scene.peer.mac, 1000, at.into()));
                    scene.peer.drain();
                } else {
                    sends.offer(at);
                    nic.vmm.vrings[1].kick.ring();
                }
            }
        };
        touch_all(&nic, 0);
        let port = scene.daemon.port_when("bad", "its memory has no room", |port| port.state() == "stopped");
        assert!(port.reason().is_some_and(|why| why.contains("no memory left")), "{:?}", port.reason());
        scene.witness.keeps_going();
        // There is room again.
        filler.set_len(0).unwrap();
        nic.stop().unwrap();
        nic.cont().unwrap();
        let used = || if from_peer { receives.used_idx() } else { sends.used_idx() };
        let before = used();
        touch_all(&nic, 40);
        eventually("buffers in all pages are used", || (used().wrapping_sub(before) >= 40).then_some(()));
        let port = scene.daemon.port("bad");
        assert_eq!((port.state(), port.reason()), ("up", None));
        nic.disconnect();
        drop((nic, region));
        scene.peer.poll();
        small.empty();
        scene.expect_usable("huge pages that ran out");
    }
    scene.finish();
}

#[test]
fn logs_that_are_punched_and_written_by_others_are_their_owners_matter() {
    let _pool = Pool::reserve(2, 8);
    let mut scene = Scene::new();
    let deeds: [fn(&Arc<File>, u64) -> Loop; 4] = [
        |file, len| lose(Way::Punch, file, len),
        |file, len| lose(Way::Remove, file, len),
        |file, len| {
            let (file, garbage) = (file.clone(), vec![0xa5; len as usize]);
            Loop::begin(move || file.write_all_at(&garbage, 0).unwrap())
        },
        |file, len| {
            let file = file.clone();
            Loop::begin(move || [0, len].iter().for_each(|&len| file.set_len(len).unwrap()))
        },
    ];
    for (number, deed) in deeds.into_iter().enumerate() {
        for huge in [false, true] {
            let mut nic = scene.nic();
            let len = 2 * MIB;
            let file = if huge { huge_memfd(len, false) } else { memfd(len) };
            nic.session().set_log_base(&file, 0, len).unwrap();
            nic.session().set_features(nic.features() | feature::LOG_ALL, true).unwrap();
            carry(&mut scene.peer, &mut nic, 16);
            // write(2) to hugetlbfs is none.
            let deed = if huge && number == 2 { deeds[0] } else { deed };
            let going = deed(&file, len);
            for at in 0..400 {
                scene.peer.send(&frame(nic.mac, scene.peer.mac, 1000, at));
                nic.pairs[0].tx.send(&frame(BROADCAST, nic.mac, 1000, at));
                scene.peer.drain();
                scene.peer.poll();
                nic.poll();
            }
            drop(going);
            scene.witness.keeps_going();
            let port = scene.daemon.port("bad");
            let reason = port.reason().unwrap_or_default().to_owned();
            let lost = number == 3 && reason.contains("cancel the migration");
            assert!(
                port.state() == "up" || lost || reason.contains("held the switch up"),
                "{}: {reason}",
                port.state()
            );
            drop(nic);
            scene.peer.poll();
            scene.expect_usable(&format!("deed {number} to a log, huge pages: {huge}"));
        }
    }
    scene.finish();
}

/// Only who is the daemon's user can do that; it must cost no more than the port whose rings are noted there.
#[test]
fn records_that_are_punched_cut_and_overwritten_harm_their_port_only() {
    let mut scene = Scene::new();
    let config = NicConfig { features: LINUX | feature::RING_PACKED, ..NicConfig::default() };
    for number in 0..4 {
        let mut nic = Nic::up(&scene.daemon.socket("bad"), &config);
        meet(&mut nic, &mut scene.peer);
        let name = scene.daemon.socket("bad").to_str().unwrap().replace('/', "!");
        let path = scene.daemon.dir().join("rings").join(name);
        let file = Arc::new(File::options().read(true).write(true).open(path).unwrap());
        let len = file.metadata().unwrap().len();
        let other = file.clone();
        let going = match number {
            0 => Loop::begin(move || punch(&other, len)),
            1 => Loop::begin(move || other.write_all_at(&[0xa5; 64 * 1024], 4096).unwrap()),
            2 => Loop::begin(move || [0, len].iter().for_each(|&len| other.set_len(len).unwrap())),
            _ => Loop::begin(move || other.set_len(0).unwrap()),
        };
        for at in 0..400 {
            scene.peer.send(&frame(nic.mac, scene.peer.mac, 1000, at));
            scene.peer.drain();
            scene.peer.poll();
        }
        scene.witness.keeps_going();
        drop(going);
        assert!(scene.daemon.is_running());
        if number == 3 {
            eventually("the records are given up", || {
                let said = scene.daemon.port("bad").0["detail"]["ring_records"].clone();
                said.as_str().is_some_and(|said| said.starts_with("none: ")).then_some(())
            });
        }
        drop(nic);
        scene.peer.poll();
        let mut good = Nic::up(&scene.daemon.socket("bad"), &config);
        meet(&mut good, &mut scene.peer);
        exchange(&mut good, &mut scene.peer, 64);
        drop(good);
    }
    scene.finish();
}

/// As where `vm.overcommit_memory` is 2: what stands in for memory that is lost must not be counted ahead, whatever its size.
#[test]
fn memory_that_is_lost_where_the_kernel_does_not_overcommit() {
    let mut scene = Scene::new();
    let status = std::fs::read_to_string(format!("/proc/{}/status", scene.daemon.pid().as_raw_nonzero())).unwrap();
    let used = status.lines().find_map(|line| line.strip_prefix("VmData:")?.trim().strip_suffix(" kB")?.parse().ok());
    // Room for threads of connections and calls, and for nothing of the size of what is lost.
    let limit = Some(used.map(|kib: u64| kib * 1024 + 128 * MIB).unwrap());
    let limit = Rlimit { current: limit, maximum: limit };
    prlimit(Some(scene.daemon.pid()), Resource::Data, limit).unwrap();
    for from_peer in [false, true] {
        let nic = scene.nic();
        let region = Region::new(0x8_0000_0000, 0x7777_0000_0000, 1 << 30);
        nic.session().add_mem_reg(&region, true).unwrap();
        let (sends, receives) = (nic.vmm.vrings[1].ring.clone(), nic.vmm.vrings[0].ring.clone());
        let last = region.gpa + region.len - 4096;
        (0..256).for_each(|head| receives.set_desc(head, Desc::writable(last, 2048)));
        sends.set_desc(0, Desc::readable(last, 1412));
        region.file.set_len(0).unwrap();
        if from_peer {
            scene.peer.send(&frame(nic.mac, scene.peer.mac, 1000, 1));
            scene.peer.drain();
        } else {
            sends.offer(0);
            nic.vmm.vrings[1].kick.ring();
        }
        let port = scene.daemon.port_when("bad", "its memory is gone", |port| port.state() == "stopped");
        assert!(port.reason().is_some_and(|why| why.contains("shrank")), "{:?}", port.reason());
        scene.witness.keeps_going();
        drop(nic);
        scene.peer.poll();
        scene.expect_usable("memory of 1 GiB that was lost");
    }
    scene.finish();
}
