//! Beyond the points: descriptors that are no file of ours to wait for. Whoever closes the last descriptor of a TCP socket that
//! lingers waits for its data to leave; whoever closes any descriptor of a file on a FUSE file system waits for its server. Both
//! can be the front end's, and neither ever answers.

use std::collections::BTreeMap;
use std::io::{IoSlice, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sockopt};
use rustix::process::{Signal, kill_process, test_kill_process};

use super::frontend::child::{self, NoneStarts, none_starts};
use super::frontend::daemon::Daemon;
use super::frontend::message::{self, VERSION};
use super::frontend::nic::{Nic, NicConfig, meet};
use super::frontend::ram::Region;
use super::frontend::session::{Session, feature, request, single_region};
use super::frontend::witness::Witness;
use super::frontend::{DEADLINE, eventually};
use super::fuse::Fuse;
use super::held_set::HeldSet;
use super::{MIB, Scene, event, fds};

/// A socket that takes ten minutes to close for whoever has the last descriptor of it. That may be this test: what it has sent is
/// closed at the other end at any time. So it is closed by a thread that may wait, and is closed here when this is gone unless
/// it does. Nor may it be a child process that has just been started.
struct Lingering {
    stream: Option<TcpStream>,
    _none_starts: NoneStarts,
}

impl AsFd for Lingering {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_ref().unwrap().as_fd()
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let stream = self.stream.take();
        let closing = std::thread::spawn(move || drop(stream));
        let end = Instant::now() + Duration::from_secs(2);
        while !closing.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Such a socket. The other end, which must not go, is second.
fn lingering() -> (Lingering, TcpStream) {
    let _none_starts = none_starts();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    sockopt::set_socket_linger(&ours, Some(Duration::from_secs(600))).unwrap();
    ours.set_nonblocking(true).unwrap();
    // Until the other end takes no more, and some time after that, as its window may still grow.
    for _ in 0..4 {
        while (&ours).write(&[0; 65536]).is_ok() {}
        std::thread::sleep(Duration::from_millis(50));
    }
    (Lingering { stream: Some(ours), _none_starts }, theirs)
}

/// Sends a message whose descriptor is `file`'s last: it comes with the first part of the message, and is closed here before
/// the rest of it follows.
fn send_last(session: &Session, request: u32, payload: &[u8], file: impl AsFd) {
    let bytes = message::encode(request, VERSION, payload);
    session.raw(&bytes[..12], &[file.as_fd()]).unwrap();
    drop(file);
    session.raw(&bytes[12..], &[]).unwrap();
}

/// The session of a front end that has asked for nothing yet, once nobody else is at the port.
pub fn negotiated(daemon: &Daemon) -> Session {
    eventually("a connection that stays", || {
        let session = Session::connect(&daemon.socket("bad")).ok()?;
        session.get_features().ok()?;
        session.set_features(feature::VERSION_1 | feature::PROTOCOL_FEATURES, false).ok()?;
        session.get_features().ok().map(|_| session)
    })
}

/// The control side answers, whatever is asked.
#[track_caller]
fn expect_answers(daemon: &Daemon) {
    for args in [
        &["status"][..],
        &["port", "list"],
        &["port", "show", "bad"],
        &["port", "show", "well-1"],
        &["shard", "list"],
        &["drops"],
        &["apply"],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_linecard"));
        command.arg("--api").arg(daemon.dir().join("api.sock")).args(args);
        let mut child = child::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()));
        let begin = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if begin.elapsed() > DEADLINE {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("no answer to {args:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn a_socket_that_lingers_holds_up_nobody() {
    let mut scene = Scene::new();
    for number in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR, 4711] {
        let session = negotiated(&scene.daemon);
        let (socket, _other) = lingering();
        send_last(&session, number, &0u64.to_le_bytes(), socket);
        expect_answers(&scene.daemon);
        // The connection is gone before its next message is read, or it is read after all; either way the port is free again.
        drop(session);
        scene.expect_usable("a socket that lingers");
    }
    let session = negotiated(&scene.daemon);
    let (socket, _other) = lingering();
    send_last(&session, request::SET_VRING_KICK, &0u64.to_le_bytes(), socket);
    let Scene { witness, mut daemon, .. } = scene;
    assert!(witness.finish() > 0);
    assert!(daemon.terminate().success());
}

#[test]
fn connections_that_are_refused_hold_up_nobody() {
    let mut scene = Scene::new();
    let nic = scene.nic();
    // A second front end, which is closed before anything of it is read.
    let (socket, _other) = lingering();
    let second = UnixStream::connect(scene.daemon.socket("bad")).unwrap();
    // Fails if it has been refused already, which is as well.
    let _ = message::send(&second, &[0; 12], &[socket.as_fd()]);
    drop(socket);
    eventually("it is closed", || {
        let mut fds = [rustix::event::PollFd::new(&second, rustix::event::PollFlags::RDHUP)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
        (!fds[0].revents().is_empty()).then_some(())
    });
    // Other ports take connections.
    drop(nic);
    scene.finish();
}

/// What comes of `make`, which the relay sees at once and not bit by bit.
fn at_once<T>(daemon: &Daemon, make: impl FnOnce() -> T) -> T {
    let relay = daemon.relay();
    kill_process(relay, Signal::STOP).unwrap();
    let made = make();
    kill_process(relay, Signal::CONT).unwrap();
    made
}

#[test]
fn a_file_that_cannot_be_closed_in_a_connection_that_is_refused_holds_up_nobody() {
    let mut scene = Scene::new();
    let connection = |scene: &Scene, file: Option<&Fuse>| {
        let stream = UnixStream::connect(scene.daemon.socket("bad")).unwrap();
        file.into_iter().for_each(|file| message::send(&stream, &[0; 12], &[file.open().as_fd()]).unwrap());
        stream
    };
    let expect_others_served = |scene: &mut Scene, file: &Fuse| {
        eventually("somebody waits for the file system", || (file.held() > 0).then_some(()));
        for _ in 0..2 {
            let mut other = Nic::up(&scene.daemon.socket("other"), &NicConfig::default());
            meet(&mut other, &mut scene.peer);
            drop(other);
            scene.daemon.port_when("other", "it has left", |port| port.state() == "down");
        }
        expect_answers(&scene.daemon);
        scene.witness.keeps_going();
    };
    // A second front end, which is closed before anything of it is read.
    let nic = scene.nic();
    let fuse = Fuse::mount();
    let second = at_once(&scene.daemon, || connection(&scene, Some(&fuse)));
    expect_others_served(&mut scene, &fuse);
    fuse.release();
    drop((nic, second));
    scene.finish();
}

/// Sends a byte out of band with `file`'s last descriptor. The kernel throws such a byte away, unless it is asked not to, and with
/// it what came with it.
fn send_last_out_of_band(stream: &UnixStream, file: impl AsFd) {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [file.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    let flags = SendFlags::OOB | SendFlags::NOSIGNAL;
    // Fails if the connection has been closed already, which is as well.
    let _ = rustix::net::sendmsg(stream, &[IoSlice::new(&[1])], &mut ancillary, flags);
}

#[test]
fn what_comes_out_of_band_holds_up_nobody() {
    let mut scene = Scene::new();
    let served = |scene: &mut Scene| {
        let mut other = Nic::up(&scene.daemon.socket("other"), &NicConfig::default());
        meet(&mut other, &mut scene.peer);
    };
    // In a connection that is served, and that is asked for more.
    let session = negotiated(&scene.daemon);
    let (socket, _other) = lingering();
    send_last_out_of_band(session.stream(), socket);
    let _ = session.raw(&message::encode(request::GET_FEATURES, VERSION, &[]), &[]);
    served(&mut scene);
    drop(session);
    scene.expect_usable("a descriptor out of band");
    // And in one that is closed before anything of it is read.
    let nic = scene.nic();
    let (socket, _other) = lingering();
    let second = UnixStream::connect(scene.daemon.socket("bad")).unwrap();
    send_last_out_of_band(&second, socket);
    served(&mut scene);
    drop((second, nic));
    scene.finish();
}

#[test]
fn a_file_that_cannot_be_closed_does_not_outlive_the_daemon() {
    let mut daemon = Daemon::with_ports(&["bad"]);
    // Goes first, so that whoever waits is free to go.
    let fuse = Fuse::mount();
    let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
    let session = negotiated(&daemon);
    send_last(&session, request::SET_VRING_KICK, &0u64.to_le_bytes(), fuse.open());
    eventually("somebody waits for the file system", || (fuse.held() > 0).then_some(()));
    expect_answers(&daemon);
    witness.keeps_going();
    drop(session);
    assert!(witness.finish() > 0);
    // Nothing of it is left that another one would have to wait for.
    kill_process(daemon.pid(), Signal::KILL).unwrap();
    eventually("SIGKILL ends the daemon", || (!daemon.is_running()).then_some(()));
    let manager = daemon.manager();
    daemon.restart();
    let nic = Nic::up(&daemon.socket("bad"), &NicConfig::default());
    daemon.port_when("bad", "it is served again", |port| port.state() == "up");
    drop(nic);
    // The next one is told to end.
    let session = negotiated(&daemon);
    let held = fuse.held();
    send_last(&session, request::SET_VRING_CALL, &0u64.to_le_bytes(), fuse.open());
    eventually("somebody waits again", || (fuse.held() > held).then_some(()));
    manager.hears_on();
    assert!(daemon.terminate().success());
}

#[test]
fn descriptors_that_are_held_up_are_counted_and_bounded() {
    let scene = Scene::new();
    let fuse = Fuse::mount();
    let region = Region::new(0, 0x1_0000_0000, MIB);
    let cases = [(request::SET_VRING_ERR, 0u64.to_le_bytes().to_vec()), (request::ADD_MEM_REG, single_region(&region))];
    for (number, payload) in cases {
        let session = negotiated(&scene.daemon);
        send_last(&session, number, &payload, fuse.open());
        assert!(session.closes_within(DEADLINE), "request {number}: the connection goes on");
        scene.witness.keeps_going();
    }
    // As many as a port may have: it takes nobody any more, and says why.
    let waiting = UnixStream::connect(scene.daemon.socket("bad")).unwrap();
    let port = scene.daemon.port_when("bad", "it takes nobody", |port| {
        port.reason().is_some_and(|reason| reason.contains("no connections: 2 descriptors"))
    });
    assert_eq!(port.state(), "down");
    expect_answers(&scene.daemon);
    let sessions = |threads: &BTreeMap<String, usize>| threads.get("vhost-PORT").copied();
    assert_eq!(sessions(&scene.daemon.footprint().threads), sessions(&scene.at_rest.threads));
    scene.witness.keeps_going();
    // Others are served, and so is this one once they are let go of.
    drop(waiting);
    fuse.release();
    scene.finish();
}

#[test]
fn what_came_with_a_message_that_was_never_whole_is_counted_as_well() {
    let scene = Scene::new();
    let fuse = Fuse::mount();
    for held in 1..=2 {
        let session = negotiated(&scene.daemon);
        // With an answer that nobody reads, a connection does not end but is reset.
        session.raw(&message::encode(request::GET_FEATURES, VERSION, &[]), &[]).unwrap();
        poll(&mut [PollFd::new(session.stream(), PollFlags::IN)], None).unwrap();
        let relay = scene.daemon.relay();
        kill_process(relay, Signal::STOP).unwrap();
        let head = &message::encode(request::SET_VRING_ERR, VERSION, &[0; 8])[..12];
        session.raw(head, &[fuse.open().as_fd()]).unwrap();
        drop(session);
        kill_process(relay, Signal::CONT).unwrap();
        eventually("somebody waits for the file system", || (fuse.held() >= held).then_some(()));
    }
    // That is known some seconds later, and told when the next one comes.
    eventually("it takes nobody", || {
        let _next = UnixStream::connect(scene.daemon.socket("bad")).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        let port = scene.daemon.port("bad");
        port.reason().is_some_and(|reason| reason.contains("no connections: 2 descriptors")).then_some(())
    });
    fuse.release();
    scene.finish();
}

#[test]
fn an_eventfd_that_cannot_be_closed_holds_up_nobody() {
    let mut scene = Scene::new();
    let session = negotiated(&scene.daemon);
    let none_starts = none_starts();
    let (bell, plain) = (event(), event());
    let held = HeldSet::around(&bell);
    // More than the session is given: the relay has the last descriptor of this one.
    let mut many = fds(&plain, 40);
    many.push(bell.as_fd());
    let relay = scene.daemon.relay();
    kill_process(relay, Signal::STOP).unwrap();
    session.raw(&message::encode(request::SET_VRING_CALL, VERSION, &[0; 8]), &many).unwrap();
    drop((bell, none_starts));
    kill_process(relay, Signal::CONT).unwrap();
    // Others are served, and the port says why it may not be.
    for _ in 0..3 {
        let mut other = Nic::up(&scene.daemon.socket("other"), &NicConfig::default());
        meet(&mut other, &mut scene.peer);
        drop(other);
        scene.daemon.port_when("other", "it has left", |port| port.state() == "down");
    }
    assert!(session.closes_within(DEADLINE), "the connection goes on");
    expect_answers(&scene.daemon);
    scene.witness.keeps_going();
    drop((session, held));
    scene.expect_usable("an eventfd that could not be closed");
    scene.finish();
}

#[test]
fn relays_that_end_leave_nothing_behind() {
    let mut daemon = Daemon::with_ports(&["bad"]);
    for at in 1..=20 {
        let relay = daemon.relay();
        let session = Session::connect(&daemon.socket("bad")).unwrap();
        // In the middle of something.
        let _ = session.raw(&message::encode(request::GET_FEATURES, VERSION, &[]).repeat(100), &[]);
        kill_process(relay, Signal::KILL).unwrap();
        eventually("it is gone for good", || (test_kill_process(relay) == Err(Errno::SRCH)).then_some(()));
        assert_ne!(daemon.relay(), relay, "{at}");
    }
    assert_eq!(daemon.children().len(), 1, "the relay that serves");
    // One that is told to end together with its daemon has not ended by itself.
    assert_eq!(daemon.log().matches("the relay has ended").count(), 20, "{}", daemon.log());
    let errors = daemon.log().matches("ERROR").count();
    kill_process(daemon.relay(), Signal::TERM).unwrap();
    kill_process(daemon.relay(), Signal::INT).unwrap();
    assert!(daemon.terminate().success());
    assert_eq!(daemon.log().matches("ERROR").count(), errors, "{}", daemon.log());
}

#[test]
fn a_relay_that_ends_is_started_again_and_front_ends_come_back() {
    let mut scene = Scene::new();
    let nic = scene.nic();
    let relay = scene.daemon.relay();
    assert!(scene.witness.finish() > 0);
    kill_process(relay, Signal::KILL).unwrap();
    assert!(nic.session().closes_within(DEADLINE), "its connections end with it");
    assert_ne!(scene.daemon.relay(), relay);
    drop(nic);
    let good = Nic::up(&scene.daemon.socket("bad"), &NicConfig::default());
    scene.daemon.port_when("bad", "it is served again", |port| port.state() == "up");
    assert!(scene.daemon.log().contains("the relay has ended (signal: 9 (SIGKILL))"), "{}", scene.daemon.log());
    // And it goes with its daemon, whatever ends that.
    let relay = scene.daemon.relay();
    scene.daemon.kill();
    drop(good);
    eventually("the relay is gone", || test_kill_process(relay).is_err().then_some(()));
}
