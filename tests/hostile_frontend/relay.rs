//! Beyond the points: front ends that have whoever uses their sockets spend time on it. A socket wakes all who wait for its other
//! end, and one thread moves the messages of all ports.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, Signal, kill_process, prlimit};

use super::crowd::Crowd;
use super::frontend::daemon::{Daemon, port_with, preamble};
use super::frontend::eventually;
use super::frontend::message;
use super::frontend::nic::{Nic, NicConfig, exchange, meet};
use super::frontend::session::{Session, request};
use super::fuse::Fuse;
use super::{Scene, event, fds, session};

/// Answers that a front end gets at most until its port is found out: some are under way.
const ANSWERS: usize = 64;

const WHY: &str = "its socket take milliseconds to use";

#[test]
fn a_socket_that_a_crowd_waits_for_costs_its_own_port_only() {
    let mut scene = Scene::new();
    // Four messages in a row that take too long, and one that is too much by itself.
    for (barred, least) in [(1, 5), (2, 25)] {
        let session = scene.session();
        let crowd = Crowd::at_the_end_of(session.stream(), Duration::from_millis(least));
        let storm = std::thread::spawn(move || {
            let answers = (0..4 * ANSWERS).take_while(|_| session.get_features().is_ok()).count();
            (answers, session)
        });
        // Others come, are served and go on.
        let mut others = 0;
        while others < 3 || !storm.is_finished() {
            let mut other = Nic::up(&scene.daemon.socket("other"), &NicConfig::default());
            meet(&mut other, &mut scene.peer);
            exchange(&mut other, &mut scene.peer, 16);
            drop(other);
            scene.daemon.port_when("other", "it has left", |port| port.state() == "down");
            others += 1;
        }
        let (answers, session) = storm.join().unwrap();
        assert!(answers <= ANSWERS, "{answers} answers, each of which took {least} ms or more");
        let port = scene.daemon.port_when("bad", "it says why", |port| port.reason().is_some_and(|r| r.contains(WHY)));
        assert_eq!(port.0["detail"]["barred"], barred, "{port:?}");
        scene.expect_barred(WHY);
        scene.witness.keeps_going();
        drop((crowd, session));
        scene.expect_usable("a socket that a crowd waited for");
    }
    // One that is never served is closed, which wakes the crowd as well.
    let nic = scene.nic();
    let second = Session::connect(&scene.daemon.socket("bad")).unwrap();
    let crowd = Crowd::at_the_end_of(second.stream(), Duration::from_millis(25));
    assert!(second.get_features().is_err());
    drop((crowd, second, nic));
    scene.finish();
}

#[test]
fn a_vm_whose_listening_socket_a_crowd_waits_for_is_not_looked_for() {
    let mut waited_for = None;
    let daemon = Daemon::start(|dir| {
        let listener = UnixListener::bind(dir.join("bad.sock")).unwrap();
        let crowd = Crowd::around(&listener, Duration::from_millis(25), || {
            drop((UnixStream::connect(dir.join("bad.sock")).unwrap(), listener.accept().unwrap()));
        });
        waited_for = Some((listener, crowd));
        let dialling = |name| port_with(dir, name, "lan", "client", "");
        preamble(dir) + "networks: { lan: {} }\nports:\n" + &dialling("bad") + &dialling("good")
    });
    let (listener, crowd) = waited_for.unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut came = 0;
    let mut count = || {
        came += std::iter::from_fn(|| listener.accept().ok()).count();
        came
    };
    let told = eventually("it is told", || {
        count();
        daemon.events("port-barred").into_iter().next()
    });
    assert!(told["port"] == "bad" && told["reason"].as_str().unwrap().contains(WHY), "{told}");
    // As a rule once; four times is what anybody may take a millisecond (`sys/toll.rs`).
    assert!(count() <= 4, "{} times", count());
    let port = daemon.port("bad");
    assert!(port.reason().is_some_and(|reason| reason.contains("not looking for the VM")), "{port:?}");
    // Others are found.
    let good = UnixListener::bind(daemon.socket("good")).unwrap();
    let _good = Nic::start(Session::new(good.accept().unwrap().0).unwrap(), &NicConfig::default()).unwrap();
    daemon.port_when("good", "it is served", |port| port.state() == "up");
    // And so is this one when it is what it should be.
    drop(crowd);
    listener.set_nonblocking(false).unwrap();
    let _nic = Nic::start(Session::new(listener.accept().unwrap().0).unwrap(), &NicConfig::default()).unwrap();
    daemon.port_when("bad", "it is served", |port| port.state() == "up");
}

/// Descriptors that the relay may have: four times what one port may have in hand, and some more.
const FEW: u64 = 2048;

/// Most descriptors that the kernel lets come at once (SCM_MAX_FD).
const MOST_AT_ONCE: usize = 253;

/// Connects again and again, and sends a header in pieces with as many descriptors as it can of a file that nobody can close.
fn pile_up(daemon: &Daemon, fuse: &Fuse, stop: &AtomicBool) {
    let header = message::encode(request::SET_MEM_TABLE, message::VERSION, &[0; 8]);
    while !stop.load(Ordering::SeqCst) {
        for port in ["bad", "bad-2"] {
            let (Ok(stream), file) = (UnixStream::connect(daemon.socket(port)), fuse.open()) else { continue };
            // Nobody may read it; and it may have been closed already.
            stream.set_nonblocking(true).unwrap();
            for piece in header[..5].chunks(1) {
                let _ = message::send(&stream, piece, &fds(&file, MOST_AT_ONCE));
            }
            drop((file, stream));
            std::thread::sleep(Duration::from_millis(3));
        }
    }
}

/// Ends the attack when this goes. Whoever waits for a place at a port that takes nobody gets one then.
struct Stop<'a>(&'a AtomicBool, &'a Fuse);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
        self.1.release();
    }
}

#[test]
fn descriptors_that_pile_up_at_one_port_leave_room_for_others() {
    let daemon = Daemon::with_ports(&["bad", "bad-2", "victim"]);
    // The next relay has as many as the daemon.
    let few = Rlimit { current: Some(FEW), maximum: Some(FEW) };
    prlimit(Some(daemon.pid()), Resource::Nofile, few).unwrap();
    kill_process(daemon.relay(), Signal::KILL).unwrap();
    eventually("it is started again", || daemon.log().contains("the relay has ended").then_some(()));
    let relay = daemon.relay();
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", relay.as_raw_nonzero())).unwrap().count();
    // A relay that has only been started has not all of its own yet.
    drop(Nic::up(&daemon.socket("victim"), &NicConfig::default()));
    daemon.port_when("victim", "it has left", |port| port.state() == "down");
    let at_rest = descriptors();
    let fuse = Fuse::mount();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| pile_up(&daemon, &fuse, &stop));
        let _stopped = Stop(&stop, &fuse);
        eventually("two are waited for", || (fuse.held() >= 2).then_some(()));
        // Some time before the daemon is told that something is held up, and some after.
        let begun = Instant::now();
        let mut most = 0;
        while begun.elapsed() < Duration::from_secs(8) {
            drop(Nic::up(&daemon.socket("victim"), &NicConfig::default()));
            daemon.port_when("victim", "it has left", |port| port.state() == "down");
            most = most.max(descriptors());
        }
        assert!(most < FEW as usize / 2, "{most} descriptors");
        daemon.port_when("bad", "it says why", |port| {
            port.reason().is_some_and(|reason| reason.contains("no connections"))
        });
    });
    eventually("all are let go of", || (descriptors() <= at_rest).then_some(()));
    drop(Nic::up(&daemon.socket("bad"), &NicConfig::default()));
}

/// Of so many, those of one message leave next to no room for any others.
const LEAST: u64 = 384;

#[test]
fn who_is_not_read_for_what_others_have_sent_is_told_so() {
    let daemon = Daemon::with_ports(&["bad", "victim"]);
    let least = Rlimit { current: Some(LEAST), maximum: Some(LEAST) };
    prlimit(Some(daemon.pid()), Resource::Nofile, least).unwrap();
    kill_process(daemon.relay(), Signal::KILL).unwrap();
    eventually("it is started again", || daemon.log().contains("the relay has ended").then_some(()));
    let session = session(&daemon, "bad");
    for ring in 0..2u64 {
        for number in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
            session.tell(number, &ring.to_le_bytes(), &[event().as_fd()], false).unwrap();
        }
    }
    // Theirs are kept for as long as the connection is, so nothing more is read.
    std::thread::sleep(Duration::from_secs(1));
    let victim = Session::connect(&daemon.socket("victim")).unwrap();
    assert!(victim.get_features().is_err(), "it was served");
    daemon.port_when("victim", "it says why", |port| {
        port.reason().is_some_and(|reason| reason.contains("descriptors of other ports fill the relay"))
    });
    drop(session);
}
