//! Points 4, 5 and 8: memory tables that lie, files that shrink, memory that goes while it is used.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, prlimit};

use super::frontend::child;
use super::frontend::daemon::Daemon;
use super::frontend::frame::{BROADCAST, frame};
use super::frontend::nic::{Nic, NicConfig, carry, exchange, meet};
use super::frontend::ram::{GuestRam, Region, huge_memfd, memfd};
use super::frontend::ring::Desc;
use super::frontend::session::{feature, is_closed, is_nack, mem_table, request, vring_addr, vring_state};
use super::frontend::vmm::Kind;
use super::{MIB, Scene, answered, event, fds, refused, session};

/// Both ways to share a region; each must refuse it.
fn share(scene: &Scene, region: &Region, what: &str) {
    refused(scene.session().add_mem_reg(region, true), what);
    refused(scene.session().set_mem_table(std::slice::from_ref(region), true), what);
}

#[test]
fn point_04_sums_that_overflow() {
    let scene = Scene::new();
    let good = Region::new(0, 0x7000_0000_0000, MIB);
    let page = 4096u64;
    for len in [0, u64::MAX, u64::MAX - page + 1, 1 << 63, (1 << 63) - page] {
        share(&scene, &Region { len, ..good.clone() }, &format!("a region of {len:#x} bytes"));
    }
    for at in [u64::MAX, u64::MAX - page + 1, u64::MAX - MIB + 1 + page] {
        share(&scene, &Region { gpa: at, ..good.clone() }, &format!("a region at {at:#x}"));
        share(&scene, &Region { uva: at, ..good.clone() }, &format!("a region at {at:#x} of the VMM"));
        share(&scene, &Region { offset: at, ..good.clone() }, &format!("a region at {at:#x} of its file"));
    }
    share(&scene, &Region { offset: 1, ..good.clone() }, "an offset within a page");
    let many = vec![good.clone(); 8];
    let mut table = mem_table(&many);
    table[0] = 200;
    let result = scene.session().tell(request::SET_MEM_TABLE, &table, &fds(&*good.file, 8), true);
    refused(result, "a table of 200 regions with 8 entries");
    scene.finish();
}

#[test]
fn point_05_regions_beyond_the_end_of_their_files() {
    let mut scene = Scene::new();
    let good = Region::new(0, 0x7000_0000_0000, MIB);
    share(&scene, &Region { len: 2 * MIB, ..good.clone() }, "a region longer than its file");
    share(&scene, &Region { offset: 4096, ..good.clone() }, "a region that ends behind its file");
    share(&scene, &Region { file: memfd(0), ..good.clone() }, "a region of an empty file");
    // The way that killed other daemons: the table goes unanswered, the ring lies behind the end.
    let session = scene.session();
    let long = Region { len: 64 * MIB, ..good.clone() };
    session.set_features(feature::VERSION_1 | feature::PROTOCOL_FEATURES, false).unwrap();
    session.set_mem_table(&[long], false).unwrap();
    for index in [0, 1] {
        let at = 0x7000_0000_0000 + 32 * MIB;
        let _ = session.tell(request::SET_VRING_NUM, &vring_state(index, 256), &[], false);
        let _ = session.tell(request::SET_VRING_ADDR, &vring_addr(index, at, at + 4096, at + 8192), &[], false);
        let _ = session.set_vring_kick(index, &event(), false);
        let _ = session.set_vring_enable(index, true, false);
    }
    let _ = session.get_features();
    drop(session);
    scene.expect_usable("a ring behind the end of its file");
    for file in [File::open("/dev/null"), File::open("/dev/zero"), File::open("/proc/self/maps")] {
        let file = Arc::new(file.unwrap());
        share(&scene, &Region { file, ..good.clone() }, "a region of a file that is no memory");
    }
    let (pipe, _other) = std::io::pipe().unwrap();
    share(&scene, &Region { file: Arc::new(File::from(OwnedFd::from(pipe))), ..good.clone() }, "a region of a pipe");
    let (socket, _other) = UnixStream::pair().unwrap();
    share(
        &scene,
        &Region { file: Arc::new(File::from(OwnedFd::from(socket))), ..good.clone() },
        "a region of a socket",
    );
    let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    share(&scene, &Region { file: Arc::new(File::from(bell)), ..good }, "a region of an eventfd");
    scene.finish();
}

#[test]
fn point_05_regions_that_overlap() {
    let scene = Scene::new();
    let good = Region::new(MIB, 0x7000_0000_0000, MIB);
    let session = scene.session();
    session.add_mem_reg(&good, true).unwrap();
    session.add_mem_reg(&good, true).expect("the very same region again, as QEMU 7.2 sends it");
    drop(session);
    for (gpa, uva) in [(MIB, 0x6000_0000_0000), (2 * MIB - 4096, 0x6000_0000_0000), (8 * MIB, good.uva + 4096)] {
        let other = Region { file: memfd(MIB), gpa, uva, ..good.clone() };
        let session = scene.session();
        session.add_mem_reg(&good, true).unwrap();
        refused(session.add_mem_reg(&other, true), "a region over another");
        drop(session);
        refused(scene.session().set_mem_table(&[good.clone(), other], true), "a table with an overlap");
    }
    scene.finish();
}

#[test]
fn point_05_more_regions_than_anybody_has() {
    let scene = Scene::new();
    let file = memfd(4096);
    let session = scene.session();
    let mut taken = 0;
    for at in 0..5000u64 {
        let region =
            Region { gpa: at * 4096, uva: 0x7000_0000_0000 + at * 4096, len: 4096, offset: 0, file: file.clone() };
        match session.add_mem_reg(&region, true) {
            Ok(()) => taken += 1,
            Err(error) => {
                assert!(is_nack(&error) || is_closed(&error), "{error}");
                break;
            }
        }
    }
    assert!((32..5000).contains(&taken), "{taken} regions were taken");
    drop(session);
    scene.finish();
}

#[test]
fn files_that_nobody_has_so_many_of_leave_descriptors_for_others() {
    let daemon = Daemon::with_ports(&["bad", "other"]);
    // Before it knows any front end; what it has at most is what it finds then.
    let few = Rlimit { current: Some(1024), maximum: Some(1024) };
    prlimit(Some(daemon.pid()), Resource::Nofile, few).unwrap();
    let fill = |port: &str| {
        let session = session(&daemon, port);
        let region = |at: u64| Region::new(at << 21, 0x7000_0000_0000 + (at << 21), 4096);
        let taken = (0..509).find(|at| session.add_mem_reg(&region(*at), true).is_err());
        (session, taken.unwrap_or(509))
    };
    let greedy = ["bad", "other"].map(fill);
    let taken = greedy.each_ref().map(|(_, taken)| *taken);
    assert!(taken.iter().all(|taken| (16..300).contains(taken)), "{taken:?} files were taken");
    daemon.port_when("bad", "it says why", |port| {
        port.reason().is_some_and(|why| why.contains("files") && why.contains("1024 descriptors"))
    });
    // Two VMs start and talk, and whoever asks is answered, which `port_when` did above.
    let [mut one, mut two] = ["well-1", "well-2"].map(|port| Nic::up(&daemon.socket(port), &NicConfig::default()));
    meet(&mut one, &mut two);
    exchange(&mut one, &mut two, 16);
}

/// A NIC on memory of one file of its own, with frames waiting in its TX ring and nothing that reads them here.
fn loaded(scene: &mut Scene) -> (Nic, Arc<GuestRam>) {
    let ram = GuestRam::new(vec![Region::new(0, 0x7000_0000_0000, 16 * MIB)]);
    let config = NicConfig { ram: Some(ram.clone()), ..NicConfig::default() };
    let mut nic = Nic::up(&scene.daemon.socket("bad"), &config);
    meet(&mut nic, &mut scene.peer);
    (nic, ram)
}

#[test]
fn point_05_files_that_shrink_under_running_rings() {
    let mut scene = Scene::new();
    // All of it; the buffers but not the ring that has them, which lies before them; both from either side.
    for (rings_stay, from_peer) in [(false, false), (true, false), (false, true), (true, true)] {
        let (mut nic, ram) = loaded(&mut scene);
        let pair = &nic.pairs[0];
        let first = if from_peer { pair.rx.buffer_of(0) } else { pair.tx.buffer_of(0) };
        let left = if rings_stay { first.next_multiple_of(4096) } else { 0 };
        for at in 0..50 {
            assert!(nic.pairs[0].tx.queue_frame(&frame(BROADCAST, nic.mac, 1500, at)));
        }
        nic.pairs[0].tx.queue.ring.set_avail_idx(nic.pairs[0].tx.queue.ring.avail_idx().wrapping_add(50));
        ram.regions()[0].file.set_len(left).unwrap();
        // From here on nobody may touch that memory in this process.
        if from_peer {
            for at in 0..20 {
                scene.peer.send(&frame(nic.mac, scene.peer.mac, 1500, at));
            }
            scene.peer.drain();
        }
        nic.vmm.vrings[1].kick.ring();
        let port = scene.daemon.port_when("bad", "its memory is gone", |port| port.state() == "stopped");
        assert!(port.reason().is_some_and(|reason| reason.contains(' ')), "{:?}", port.reason());
        scene.witness.keeps_going();
        drop(nic);
        scene.peer.poll();
        scene.expect_usable("a file that shrank");
    }
    scene.finish();
}

#[test]
fn point_05_rings_in_memory_that_is_not_shared() {
    let scene = Scene::new();
    let region = Region::new(0, 0x7000_0000_0000, MIB);
    let end = region.uva + region.len;
    let start = |desc, used, avail| {
        let session = scene.session();
        session.set_features(feature::VERSION_1 | feature::PROTOCOL_FEATURES, true).unwrap();
        session.add_mem_reg(&region, true).unwrap();
        session.set_vring_num(1, 256, true).unwrap();
        let placed = session.tell(request::SET_VRING_ADDR, &vring_addr(1, desc, used, avail), &[], true);
        // Refused here, or when the ring is to start.
        placed.and_then(|()| session.set_vring_kick(1, &event(), true))
    };
    let at = region.uva;
    start(at, at + 0x2000, at + 0x4000).expect("a ring that is well placed");
    for wild in [0, 1, at - 4096, end, end - 16, end - 8, u64::MAX, u64::MAX - 15, 0xdead_0000_0000] {
        refused(start(wild, at + 0x2000, at + 0x4000), &format!("descriptors at {wild:#x}"));
        refused(start(at, wild, at + 0x4000), &format!("a used ring at {wild:#x}"));
        refused(start(at, at + 0x2000, wild), &format!("an available ring at {wild:#x}"));
    }
    refused(start(at + 8, at + 0x2000, at + 0x4000), "descriptors that are not aligned");
    refused(start(at, at + 0x2002, at + 0x4000), "a used ring that is not aligned");
    refused(start(at, at + 0x2000, at + 0x4001), "an available ring that is not aligned");
    scene.finish();
}

#[test]
fn point_08_memory_that_goes_while_it_is_used() {
    let mut scene = Scene::new();
    for kind in [Kind::Qemu10, Kind::Qemu72] {
        let mut nic = Nic::up(&scene.daemon.socket("bad"), &NicConfig::of(kind));
        meet(&mut nic, &mut scene.peer);
        let extra = Region::new(0x8_0000_0000, 0x7777_0000_0000, 4 * MIB);
        for round in 0..100 {
            nic.plug(extra.clone()).unwrap();
            let at = nic.vmm.ram.alloc_in(extra.gpa, 64 * 1024, 4096);
            nic.vmm.ram.write(at, &[0; 12]);
            nic.vmm.ram.write(at + 12, &frame(BROADCAST, nic.mac, 1400, round));
            let ring = nic.vmm.vrings[1].ring.clone();
            for head in 0..64 {
                ring.set_desc(head, Desc::readable(at, 1412));
                ring.offer(head);
            }
            nic.vmm.vrings[1].kick.ring();
            // In the middle of it.
            nic.unplug(extra.gpa).unwrap();
            scene.peer.poll();
            nic.rebind(nic.features()).unwrap();
            scene.witness.keeps_going();
        }
        drop(nic);
        scene.expect_usable("memory that went while it was used");
    }
    scene.finish();
}

#[test]
fn point_08_the_rings_own_memory_goes() {
    let mut scene = Scene::new();
    for _ in 0..20 {
        let (mut nic, ram) = loaded(&mut scene);
        for at in 0..50 {
            nic.pairs[0].tx.queue_frame(&frame(BROADCAST, nic.mac, 1500, at));
        }
        nic.pairs[0].tx.queue.publish();
        answered(nic.session().rem_mem_reg(&ram.regions()[0], true), "REM_MEM_REG under running rings");
        nic.vmm.vrings[1].kick.ring();
        scene.peer.send(&frame(nic.mac, scene.peer.mac, 100, 1));
        scene.peer.drain();
        scene.witness.keeps_going();
        drop(nic);
        scene.peer.poll();
    }
    scene.finish();
}

/// Part of a huge page, in a file that the host may have no page for.
const LOG_BYTES: u64 = 256 * 1024;

#[test]
fn logs_in_a_part_of_a_huge_page_kill_nobody() {
    let mut scene = Scene::new();
    for giant in [false, true] {
        let mut bad = scene.nic();
        let log = huge_memfd(1 << 30, giant);
        answered(bad.session().set_log_base(&log, 0, LOG_BYTES), "a log in a huge page");
        // Every ring is marked at once: these are the first stores into the log.
        let logged = bad.session().set_features(bad.features() | feature::LOG_ALL, true);
        answered(logged, "LOG_ALL with it");
        for at in 0..20 {
            scene.peer.send(&frame(bad.mac, scene.peer.mac, 1000, at));
        }
        scene.peer.drain();
        bad.poll();
        drop(bad);
        scene.peer.poll();
        scene.expect_usable("a log in a part of a huge page");
    }
    scene.finish();
}

#[test]
fn logs_in_huge_pages_leave_no_mapping_behind() {
    let mut scene = Scene::new();
    let before = scene.daemon.footprint().mappings;
    for giant in [false, true] {
        let bad = scene.nic();
        let log = huge_memfd(1 << 30, giant);
        for _ in 0..200 {
            bad.session().set_log_base(&log, 0, LOG_BYTES).expect("a log that its file holds");
        }
        drop(bad);
        scene.expect_usable("logs in huge pages");
    }
    scene.daemon.port_when("bad", "it has left", |port| port.state() == "down");
    let after = scene.daemon.footprint().mappings;
    assert!(after < before + 100, "{before} mappings, and {after} after 400 logs");
    scene.finish();
}

/// A tmpfs of its own, in a mount namespace that lasts as long as this.
struct SmallTmpfs {
    holder: std::process::Child,
    path: std::path::PathBuf,
}

impl SmallTmpfs {
    fn new(size: &str) -> Self {
        let script = format!("mount -t tmpfs -o size={size} linecard-test /mnt && echo mounted && exec cat");
        let mut unshare = std::process::Command::new("unshare");
        // Who is not root is so in a user namespace of its own.
        if !rustix::process::geteuid().is_root() {
            unshare.args(["--user", "--map-root-user"]);
        }
        let pipes = (std::process::Stdio::piped(), std::process::Stdio::piped());
        unshare.args(["--mount", "sh", "-c", &script]).stdin(pipes.0).stdout(pipes.1);
        let mut holder = child::spawn(&mut unshare);
        let mut said = [0; 8];
        let told = std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut said);
        told.expect("a tmpfs, which takes root or user namespaces");
        let path = format!("/proc/{}/root/mnt", holder.id()).into();
        Self { holder, path }
    }

    fn file(&self, name: &str) -> File {
        File::options().create(true).truncate(false).read(true).write(true).open(self.path.join(name)).unwrap()
    }

    /// Leaves no room; what takes it is in the file that this returns.
    fn fill(&self) -> File {
        use std::io::Write;
        let mut filler = self.file("filler");
        while filler.write(&[1; 4096]).is_ok_and(|written| written > 0) {}
        filler
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        // The end of its input ends it, and the namespace with it.
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

#[test]
fn a_host_without_room_for_the_memory_file_is_named_and_a_pause_of_the_vm_heals_it() {
    let mut scene = Scene::new();
    let tmpfs = SmallTmpfs::new("32m");
    for packed in [0, feature::RING_PACKED] {
        let file = tmpfs.file("ram");
        file.set_len(0).unwrap();
        file.set_len(64 * MIB).unwrap();
        let ram = GuestRam::new(vec![Region { file: Arc::new(file), ..Region::new(0, 0x7000_0000_0000, 64 * MIB) }]);
        let features = NicConfig::default().features | packed;
        let config = NicConfig { ram: Some(ram), features, rx_buffer: 8192, ..NicConfig::default() };
        let mut bad = Nic::up(&scene.daemon.socket("bad"), &config);
        meet(&mut bad, &mut scene.peer);
        let filler = tmpfs.fill();
        // Into buffers that have no page yet, and that this process must not look at either.
        for at in 0..40 {
            scene.peer.send(&frame(bad.mac, scene.peer.mac, 1000, at));
        }
        let port = scene.daemon.port_when("bad", "its memory has no room", |port| port.state() == "stopped");
        let reason = port.reason().unwrap_or_default();
        assert!(reason.contains("no memory left") && !reason.contains("shrank"), "{reason}");
        super::frontend::eventually("memory that is lost is told", || {
            let stopped = scene.daemon.events("port-stopped");
            stopped.iter().any(|event| event["reason"] == *reason && event["port"] == "bad").then_some(())
        });
        scene.witness.keeps_going();
        filler.set_len(0).unwrap();
        bad.stop().unwrap();
        bad.cont().unwrap();
        let port = scene.daemon.port("bad");
        assert_eq!((port.state(), port.reason()), ("up", None));
        scene.peer.drain();
        scene.peer.poll();
        carry(&mut bad, &mut scene.peer, 300);
        // What was received without room is lost: its buffers come back with nothing in them, which the harness's driver
        // does not forgive. It begins anew.
        bad.rebind(features).unwrap();
        meet(&mut bad, &mut scene.peer);
        exchange(&mut bad, &mut scene.peer, 300);
        drop(bad);
        scene.expect_usable("memory without room");
    }
    scene.finish();
}

#[test]
fn huge_pages_that_the_host_does_not_have_are_named() {
    let mut scene = Scene::new();
    let bad = scene.nic();
    // More than any host that runs tests has in its pool.
    let len = 1 << 44;
    let file = huge_memfd(len, true);
    let region = Region { gpa: 0x40_0000_0000, uva: 0x6666_0000_0000, len: 1 << 30, offset: len - (1 << 30), file };
    let (gpa, shared) = (region.gpa, bad.session().add_mem_reg(&region, true));
    shared.expect("a region in huge pages");
    let ring = bad.vmm.vrings[1].ring.clone();
    ring.set_desc(0, Desc::readable(gpa + 4096, 100));
    ring.offer(0);
    bad.vmm.vrings[1].kick.ring();
    // A host that has one to give has given it, and all is well.
    let port = scene.daemon.port_when("bad", "it is settled", |port| port.state() != "down");
    assert!(
        port.state() == "up" || port.reason().is_some_and(|why| why.contains("no memory left")),
        "{:?}",
        port.reason()
    );
    scene.witness.keeps_going();
    drop(bad);
    scene.peer.poll();
    scene.expect_usable("huge pages that are not there");
    scene.finish();
}
