//! Beyond the points: front ends that have whoever uses their sockets spend time on it. A socket wakes all who wait for its other
//! end, and one thread moves the messages of all ports.

use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use super::Scene;
use super::crowd::Crowd;
use super::frontend::daemon::{Daemon, port_with, preamble};
use super::frontend::eventually;
use super::frontend::nic::{Nic, NicConfig, exchange, meet};
use super::frontend::session::Session;

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
