//! Points 6, 9, 10 and 11: what would block a thread, keep others out, or fill a disk.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::crowd::{Crowd, LONG};
use super::frontend::doorbell::Doorbell;
use super::frontend::eventually;
use super::frontend::frame::{BROADCAST, frame};
use super::frontend::message::{self, VERSION};
use super::frontend::ram::memfd;
use super::frontend::session::{request, vring_state};
use super::{Scene, answered, event, waiters};

#[test]
fn point_06_events_that_are_no_eventfds() {
    let mut scene = Scene::new();
    let (read_end, write_end) = std::io::pipe().unwrap();
    let (socket, other) = UnixStream::pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let memory = memfd(4096);
    let all = [
        read_end.as_fd(),
        write_end.as_fd(),
        socket.as_fd(),
        other.as_fd(),
        null.as_fd(),
        epoll.as_fd(),
        memory.as_fd(),
    ];
    for fd in all {
        for number in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
            let nic = scene.nic();
            answered(nic.session().tell(number, &0u64.to_le_bytes(), &[fd], true), "no eventfd");
            answered(nic.session().tell(number, &1u64.to_le_bytes(), &[fd], true), "no eventfd");
            scene.peer.send(&frame(BROADCAST, scene.peer.mac, 100, 1));
            nic.vmm.vrings[1].kick.ring();
            scene.peer.drain();
        }
    }
    scene.expect_usable("events that are no eventfds");
    scene.finish();
}

#[test]
fn point_06_interrupts_that_would_block() {
    let mut scene = Scene::new();
    // A full pipe, and an eventfd one step before its end, both blocking.
    let (_read_end, mut write_end) = std::io::pipe().unwrap();
    rustix::fs::fcntl_setfl(&write_end, rustix::fs::OFlags::NONBLOCK).unwrap();
    while write_end.write(&[0; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&write_end, rustix::fs::OFlags::empty()).unwrap();
    let full = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    for call in [write_end.as_fd(), full.as_fd()] {
        let mut nic = scene.nic();
        for index in [0u64, 1] {
            answered(nic.session().tell(request::SET_VRING_CALL, &index.to_le_bytes(), &[call], true), "a full one");
        }
        for at in 0..50 {
            nic.pairs[0].tx.queue_frame(&frame(BROADCAST, nic.mac, 100, at));
            nic.pairs[0].tx.queue.publish();
            scene.peer.send(&frame(BROADCAST, scene.peer.mac, 100, at));
            scene.peer.drain();
            scene.peer.poll();
        }
        scene.witness.keeps_going();
        drop(nic);
        scene.expect_usable("an interrupt that would block");
    }
    scene.finish();
}

/// Makes an eventfd block that somebody was given as one that does not, with its counter full.
fn jam(bell: &Doorbell) {
    // As long as somebody else rings it, its counter is not the zero that this takes.
    while rustix::io::write(bell, &(u64::MAX - 1).to_ne_bytes()).is_err() {
        bell.take();
    }
    rustix::fs::fcntl_setfl(bell, rustix::fs::OFlags::empty()).unwrap();
}

#[test]
fn point_06_interrupts_that_come_to_block() {
    let mut scene = Scene::new();
    let nic = scene.nic();
    jam(&nic.vmm.vrings[0].call);
    // Until the guest has asked for an interrupt there is none, so it is sent frames until one blocked.
    let Scene { daemon, peer, .. } = &mut scene;
    eventually("its connection is ended", || {
        peer.send(&frame(nic.mac, peer.mac, 100, 1));
        peer.drain();
        let rx = &nic.pairs[0].rx.queue.ring;
        rx.set_used_event(rx.used_idx());
        let port = daemon.port("bad");
        let told = port.reason().is_some_and(|reason| reason.contains("an interrupt block the switch"));
        (told && port.state() == "stopped").then_some(())
    });
    scene.expect_barred("an interrupt block the switch");
    scene.witness.keeps_going();
    // Who comes while the port keeps everybody out is served afterwards.
    drop(nic);
    scene.expect_usable("an interrupt that blocked");

    // The interrupt of a message blocks the thread of its own connection, and what it holds.
    let nic = scene.nic();
    let call = event();
    jam(&call);
    let session = nic.session();
    for _ in 0..20 {
        // The descriptor is made non-blocking when it is taken, and blocks again soon after.
        let _ = session.set_vring_call(0, &call, false);
        rustix::fs::fcntl_setfl(&call, rustix::fs::OFlags::empty()).unwrap();
        scene.peer.send(&frame(nic.mac, scene.peer.mac, 100, 1));
        scene.peer.drain();
    }
    scene.witness.keeps_going();
    drop(nic);
    scene.expect_usable("interrupts that block now and then");
    scene.finish();
}

#[test]
fn point_06_interrupts_that_take_long() {
    let mut scene = Scene::new();
    let nic = scene.nic();
    let crowd = Crowd::around_bell(&nic.vmm.vrings[0].call, LONG);
    waiters::expect_end(&mut scene, &nic, || {});
    drop((crowd, nic));
    scene.expect_usable("interrupts that took long");

    // The same by messages, each of which has the new interrupt rung once.
    let nic = scene.nic();
    let call = event();
    let crowd = Crowd::around_bell(&call, LONG);
    eventually("its connection is ended", || {
        let _ = nic.session().set_vring_call(0, &call, false);
        let port = scene.daemon.port("bad");
        port.reason().is_some_and(|reason| reason.contains("interrupts take milliseconds")).then_some(())
    });
    scene.witness.keeps_going();
    drop((crowd, nic));
    scene.expect_usable("messages about interrupts that took long");
    scene.finish();
}

#[test]
fn point_06_an_error_event_that_blocks() {
    let mut scene = Scene::new();
    let mut nic = scene.nic();
    let error = event();
    nic.session().set_vring_err(1, &error, true).unwrap();
    jam(&error);
    let tx = &mut nic.pairs[0].tx.queue;
    tx.ring.set_avail_idx(tx.ring.avail_idx().wrapping_add(0x7fff));
    nic.vmm.vrings[1].kick.ring();
    scene.daemon.port_when("bad", "it has its fault", |port| port.state() == "stopped");
    assert!(nic.session().get_features().is_ok(), "the session was stuck in the error event");
    drop(nic);
    scene.expect_usable("an error event that blocks");
    scene.finish();
}

#[test]
fn point_09_the_socket_is_for_its_group_and_one_front_end() {
    let mut scene = Scene::new();
    let mode = std::fs::metadata(scene.daemon.socket("bad")).unwrap().permissions().mode();
    assert_eq!(mode & 0o007, 0, "mode {mode:o}: anybody on the host may connect");
    // A crowd that never says a word keeps nobody out for longer than it stays.
    let crowd: Vec<_> = (0..100).filter_map(|_| UnixStream::connect(scene.daemon.socket("bad")).ok()).collect();
    scene.witness.keeps_going();
    drop(crowd);
    scene.expect_usable("a silent crowd");
    scene.finish();
}

#[test]
fn point_10_a_front_end_that_never_reads() {
    let mut scene = Scene::new();
    let session = scene.session();
    session.stream().set_nonblocking(true).unwrap();
    let question = message::encode(request::GET_FEATURES, VERSION, &[]);
    // Questions until neither side has room; a daemon may also have hung up by then.
    let mut stuck = 0;
    while stuck < 100 {
        match (&mut session.stream()).write(&question) {
            Ok(_) => stuck = 0,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                stuck += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(_) => break,
        }
    }
    scene.witness.keeps_going();
    assert!(scene.daemon.linecard(&["port", "list"]).is_ok(), "the API answers");
    scene.daemon.port("bad");
    drop(session);
    scene.expect_usable("a front end that never reads");
    scene.finish();
}

#[test]
fn point_11_a_flood_of_mistakes_is_not_a_flood_of_log() {
    let scene = Scene::new();
    let before = scene.daemon.log().len();
    for _ in 0..20 {
        let session = scene.session();
        for at in 0..1000u32 {
            let bad = message::encode(request::SET_VRING_NUM, VERSION, &vring_state(at % 7, 3));
            let unknown = message::encode(5000 + at, VERSION, &[0; 8]);
            if session.raw(&bad, &[]).and_then(|()| session.raw(&unknown, &[])).is_err() {
                break;
            }
        }
        let _ = session.get_features();
    }
    for _ in 0..100 {
        let _ = UnixStream::connect(scene.daemon.socket("bad"));
    }
    let grown = scene.daemon.log().len() - before;
    assert!(grown < 256 * 1024, "40000 mistakes and 100 connections made {grown} bytes of log");
    scene.finish();
}
