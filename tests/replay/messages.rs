//! What front ends send over the socket.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::frontend::daemon::Daemon;
use super::frontend::doorbell::Doorbell;
use super::frontend::eventually;
use super::frontend::message::{self, NEED_REPLY, VERSION};
use super::frontend::nic::{LINUX, Nic, NicConfig, exchange, meet};
use super::frontend::ram::{GuestRam, Region, memfd};
use super::frontend::session::{
    Session, feature, is_closed, is_nack, mem_table, protocol, request, single_region, vring_addr, vring_state,
};
use super::frontend::vmm::Kind;
use super::frontend::witness::Witness;
use super::{Scene, refused};

const MIB: u64 = 1 << 20;

/// The size of a shared inflight region's description (vhost-user, "Inflight description").
fn inflight(size: u64, offset: u64, queues: u16, entries: u16) -> Vec<u8> {
    let numbers = [queues.to_le_bytes(), entries.to_le_bytes()].concat();
    [size.to_le_bytes().to_vec(), offset.to_le_bytes().to_vec(), numbers].concat()
}

/// A connection to port `bad` that has negotiated `protocol` and nothing else, as soon as there is room for one.
fn session(daemon: &Daemon) -> Session {
    eventually("a connection that stays", || {
        let session = Session::connect(&daemon.socket("bad")).ok()?;
        session.get_features().ok()?;
        session.get_protocol_features().ok()?;
        let wanted = protocol::REPLY_ACK | protocol::MQ | protocol::NET_MTU | protocol::CONFIGURE_MEM_SLOTS;
        session.set_protocol_features(wanted).ok()?;
        session.set_owner(true).ok().map(|()| session)
    })
}

/// DPDK: the size of a ring was changed against the table of what is in flight, while the ring ran.
#[test]
fn cve_2026_86565_a_ring_whose_size_changes() {
    for kind in [Kind::Qemu10, Kind::CloudHypervisor] {
        for form in [0, feature::RING_PACKED] {
            let features = LINUX | form;
            let mut scene = Scene::with(NicConfig { features, ..NicConfig::of(kind) });
            let table = memfd(MIB);
            for size in [1, 2, 128, 512, 32768, u32::from(u16::MAX) + 257] {
                let told = inflight(MIB, 0, 2, size as u16);
                refused(scene.bad.session().tell(request::SET_INFLIGHT_FD, &told, &[table.as_fd()], true), "inflight");
                for index in [0, 1] {
                    let result = scene.bad.session().set_vring_num(index, size, true);
                    refused(result, &format!("{size} entries for a ring that runs with 256"));
                }
                exchange(&mut scene.bad, &mut scene.peer, 16);
            }
            scene.bad.session().set_vring_num(0, 256, true).expect("the size that it has");
            // Stopped, its size may change, before its base or after, and is the one that counts then.
            scene.bad.stop().unwrap();
            for index in [0, 1] {
                let base = scene.bad.vmm.vrings[index as usize].base;
                scene.bad.session().set_vring_num(index, 32768, true).unwrap();
                scene.bad.session().set_vring_base(index, base.into(), true).unwrap();
                scene.bad.session().set_vring_num(index, 256, true).unwrap();
            }
            scene.bad.cont().unwrap();
            exchange(&mut scene.bad, &mut scene.peer, 600);
            scene.finish();
        }
    }
}

/// QEMU's libvhost-user: numbers of messages that were taken for indices and lengths. Every one of ours at its limits.
#[test]
fn qemu_4403_every_index_and_size_of_every_message_at_its_limits() {
    let daemon = Daemon::with_ports(&["bad", "peer"]);
    let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
    let limits = [0u64, 1, 7, 8, 9, 255, 256, 257, 0x7fff, 0x8000, 0xffff, 0x1_0000, 0x7fff_ffff, 0x8000_0000];
    let limits: Vec<u64> =
        limits.into_iter().chain([u64::from(u32::MAX), 1 << 32, i64::MAX as u64, u64::MAX]).collect();
    let (bell, region) = (Doorbell::new(), Region::new(0, 0x7000_0000_0000, MIB));
    let state = [request::SET_VRING_NUM, request::SET_VRING_BASE, request::GET_VRING_BASE, request::SET_VRING_ENABLE];
    let events = [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR];
    for &value in &limits {
        for number in state {
            for payload in [vring_state(value as u32, 1), vring_state(0, value as u32)] {
                tell(&daemon, number, &payload, &[], value as u32 > 7 && payload == vring_state(value as u32, 1));
            }
        }
        for number in events {
            // The low byte is the index, bit 8 says that no descriptor comes; the rest is reserved.
            tell(&daemon, number, &value.to_le_bytes(), &[bell.as_fd()], value & 0xff > 7);
        }
        for field in 0..4 {
            let mut fields = [0, region.uva, region.uva, region.uva];
            fields[field] = value;
            let [index, desc, used, avail] = fields;
            tell(&daemon, request::SET_VRING_ADDR, &vring_addr(index as u32, desc, used, avail), &[], index as u32 > 7);
            let mut wrong = region.clone();
            *[&mut wrong.gpa, &mut wrong.len, &mut wrong.uva, &mut wrong.offset][field] = value;
            let beyond = field == 1 && (value == 0 || value > MIB);
            tell(&daemon, request::ADD_MEM_REG, &single_region(&wrong), &[wrong.file.as_fd()], beyond);
            tell(&daemon, request::REM_MEM_REG, &single_region(&wrong), &[], false);
            tell(&daemon, request::SET_MEM_TABLE, &mem_table(&[wrong.clone()]), &[wrong.file.as_fd()], beyond);
        }
        let mut table = mem_table(std::slice::from_ref(&region));
        table[..4].copy_from_slice(&(value as u32).to_le_bytes());
        tell(&daemon, request::SET_MEM_TABLE, &table, &[region.file.as_fd()], value as u32 != 1);
        for payload in [[value, 0], [4096, value]] {
            let payload: Vec<u8> = payload.iter().flat_map(|word| word.to_le_bytes()).collect();
            tell(&daemon, request::SET_LOG_BASE, &payload, &[region.file.as_fd()], false);
        }
        for number in [request::SET_FEATURES, request::SET_PROTOCOL_FEATURES, request::NET_SET_MTU, request::SEND_RARP]
        {
            tell(&daemon, number, &value.to_le_bytes(), &[], false);
        }
        // The size of the message itself, with as many bytes or fewer.
        for sent in [0, 8, 40, 4096] {
            let session = session(&daemon);
            let bytes =
                message::encode_with_size(request::SET_FEATURES, VERSION | NEED_REPLY, value as u32, &vec![0; sent]);
            let _ = session.raw(&bytes, &[]);
        }
        witness.keeps_going();
    }
    let mut good = Nic::up(&daemon.socket("bad"), &NicConfig::default());
    let mut peer = Nic::up(&daemon.socket("peer"), &NicConfig::default());
    meet(&mut good, &mut peer);
    exchange(&mut good, &mut peer, 16);
    assert!(witness.finish() > 0);
}

/// Sends one message over a connection of its own. It is answered or ends the connection; where it `must` be refused, it is.
#[track_caller]
fn tell(daemon: &Daemon, number: u32, payload: &[u8], files: &[std::os::fd::BorrowedFd<'_>], must: bool) {
    let session = session(daemon);
    if matches!(number, request::GET_VRING_BASE | request::SET_LOG_BASE) {
        // These have replies of their own, which cannot say no.
        session.raw(&message::encode(number, VERSION, payload), files).unwrap();
        let answer = session.read().map(drop);
        assert!(answer.as_ref().err().is_none_or(is_closed), "request {number} with {payload:x?}: {answer:?}");
        return;
    }
    if matches!(number, request::SET_FEATURES | request::SET_PROTOCOL_FEATURES) {
        // These decide whether anything is acknowledged.
        let answer = session.tell(number, payload, files, false).and_then(|()| session.get_features());
        assert!(answer.as_ref().err().is_none_or(is_closed), "request {number} with {payload:x?}: {answer:?}");
        return;
    }
    match session.tell(number, payload, files, true) {
        Ok(()) => assert!(!must, "request {number} with {payload:x?} was accepted"),
        Err(error) => assert!(is_nack(&error) || is_closed(&error), "request {number} with {payload:x?}: {error}"),
    }
}

/// QEMU: several conditions on the inflight region that did not agree. We keep none, and say so.
#[test]
fn qemu_3974_inflight_regions_are_neither_offered_nor_taken() {
    const INFLIGHT_SHMFD: u64 = 1 << 12;
    let scene = Scene::with(NicConfig::default());
    let offered = scene.bad.session().get_protocol_features().unwrap();
    assert_eq!(offered & INFLIGHT_SHMFD, 0, "INFLIGHT_SHMFD is offered: {offered:#x}");
    let (daemon, witness) = (scene.daemon, scene.witness);
    drop(scene.bad);
    refused(
        session(&daemon).tell(
            request::SET_PROTOCOL_FEATURES,
            &(protocol::REPLY_ACK | INFLIGHT_SHMFD).to_le_bytes(),
            &[],
            true,
        ),
        "INFLIGHT_SHMFD",
    );
    let file = memfd(MIB);
    for (queues, entries) in [(0, 0), (0, 256), (2, 0), (2, 256), (u16::MAX, u16::MAX)] {
        for (size, offset) in [(0, 0), (MIB, 0), (MIB, u64::MAX), (u64::MAX, 1)] {
            let payload = inflight(size, offset, queues, entries);
            for number in [request::GET_INFLIGHT_FD, request::SET_INFLIGHT_FD] {
                refused(session(&daemon).tell(number, &payload, &[file.as_fd()], true), "an inflight region");
                refused(session(&daemon).tell(number, &payload, &[], true), "an inflight region without a file");
            }
        }
    }
    witness.keeps_going();
    assert!(witness.finish() > 0);
}

/// DPDK: the dirty log was mapped without its offset in the file, or with one that overflows.
#[test]
fn dpdk_bdd96d8ac7_a_log_at_an_offset_of_its_file() {
    let mut scene = Scene::with(NicConfig::default());
    let end = scene.bad.vmm.ram.regions().iter().map(|region| region.gpa + region.len).max().unwrap();
    let (offset, len) = (8192, end.div_ceil(8 * 4096));
    let file = memfd(offset + len + 4096);
    scene.bad.session().set_log_base(&file, offset, len).unwrap();
    scene.bad.session().set_features(scene.bad.features() | feature::LOG_ALL, true).unwrap();
    exchange(&mut scene.bad, &mut scene.peer, 64);
    let marked = |at: u64, len: u64| {
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes.iter().map(|byte| byte.count_ones()).sum::<u32>()
    };
    // The byte of a page that was written, and where it would be without the offset.
    let byte = scene.bad.vmm.vrings[0].ring.used / 4096 / 8;
    assert!(marked(offset + byte, 1) > 0, "a page that was written is not marked");
    assert_eq!(marked(byte, 1), 0, "it is marked without the offset");
    assert_eq!(marked(0, offset), 0, "before the log");
    assert_eq!(marked(offset + len, 4096), 0, "behind the log");
    assert!(marked(offset, len) > 3, "in the log");
    scene.bad.session().set_features(scene.bad.features(), true).unwrap();
    exchange(&mut scene.bad, &mut scene.peer, 16);
    let Scene { daemon, witness, peer: _peer, bad } = scene;
    drop(bad);
    let wrong =
        [(1, len), (offset + 4096 + 1, len), (1 << 40, len), (u64::MAX, 1), (u64::MAX - 4095, 4096), (4096, u64::MAX)];
    for (offset, len) in wrong {
        refused(session(&daemon).set_log_base(&file, offset, len), &format!("{len} bytes at {offset} of a file"));
    }
    witness.keeps_going();
    assert!(witness.finish() > 0);
}

/// DPDK: the thread that serves sockets went on after what it serves was freed. SIGTERM, while a thousand front ends come.
#[test]
fn dpdk_73ea44370d_and_21d9fb6bad_sigterm_under_a_thousand_connects() {
    const DOORS: usize = 16;
    let doors: Vec<_> = (0..DOORS).map(|at| format!("door-{at}")).collect();
    let names: Vec<_> = doors.iter().map(String::as_str).collect();
    let mut daemon = Daemon::with_ports(&names);
    let rams: Vec<_> = (0..4).map(|_| GuestRam::qemu(4 * MIB)).collect();
    for round in 0..3 {
        let sockets: Vec<PathBuf> = doors.iter().map(|door| daemon.socket(door)).collect();
        let (over, connects) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            let end = End(&over);
            for (worker, ram) in rams.iter().enumerate() {
                let (sockets, over, connects) = (&sockets, &over, &connects);
                scope.spawn(move || {
                    for at in worker.. {
                        if over.load(Ordering::Relaxed) {
                            break;
                        }
                        let came = come_and_go(&sockets[at % DOORS], ram, at);
                        connects.fetch_add(came.into(), Ordering::Relaxed);
                    }
                });
            }
            eventually("a thousand front ends came", || (connects.load(Ordering::Relaxed) >= 1000).then_some(()));
            let status = daemon.terminate();
            drop(end);
            assert!(status.success(), "round {round}: linecardd ended with {status}");
        });
        let left: Vec<_> = sockets.iter().filter(|socket| socket.exists()).collect();
        assert!(left.is_empty(), "round {round}: {left:?} were left behind");
        // It ends after a while even if not all of it does, and says so.
        let log = daemon.log();
        assert!(!log.contains("panicked") && !log.contains("did not end within"), "round {round}: {log}");
        daemon.restart();
    }
}

/// Ends the front ends, also when the daemon does not end.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A front end that gets as far as `at` says: it connects, or shares memory, or has rings run; `true` if it was let in.
fn come_and_go(socket: &std::path::Path, ram: &std::sync::Arc<GuestRam>, at: usize) -> bool {
    if !at.is_multiple_of(8) {
        let Ok(stream) = UnixStream::connect(socket) else { return false };
        let Ok(session) = Session::new(stream) else { return false };
        let _ = session.raw(&message::encode(request::GET_FEATURES, VERSION, &[]), &[]);
        if at % 8 > 3 {
            let _ = session.set_mem_table(&ram.regions(), false);
        }
        return true;
    }
    ram.rewind();
    let config = NicConfig { size: 64, ram: Some(ram.clone()), ..NicConfig::default() };
    Session::connect(socket).and_then(|session| Nic::start(session, &config)).is_ok()
}
