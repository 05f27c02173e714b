//! Beyond the points: eventfds whose last descriptor nobody can close, since its front end holds the lock of an epoll set that they
//! are in. Neither a session nor the end of the daemon waits for that.

use std::os::fd::AsFd;

use rustix::process::{Signal, kill_process};

use super::descriptors::negotiated;
use super::frontend::child::none_starts;
use super::frontend::daemon::Daemon;
use super::frontend::doorbell::Doorbell;
use super::frontend::message::{self, VERSION};
use super::frontend::nic::{Nic, NicConfig};
use super::frontend::session::{Session, request};
use super::frontend::{DEADLINE, eventually};
use super::held_set::HeldSet;
use super::{Scene, event};

/// So many that nobody is likely to have kept the ones before them.
const MANY: usize = 100;

/// Sends an eventfd for ring 0 that is in a held set, and others for ring 1 after it. No descriptor of it is left here.
fn send_held(session: &Session, request: u32) -> HeldSet {
    let _none_starts = none_starts();
    let (bell, plain) = (event(), event());
    let held = HeldSet::around(&bell);
    session.tell(request, &0u64.to_le_bytes(), &[bell.as_fd()], false).unwrap();
    for _ in 0..MANY {
        session.tell(request::SET_VRING_CALL, &1u64.to_le_bytes(), &[plain.as_fd()], false).unwrap();
    }
    held
}

/// Changes the configuration and applies it.
fn apply(daemon: &Daemon, change: impl FnOnce(String) -> String) {
    let file = daemon.dir().join("linecard.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, change(text)).unwrap();
    daemon.linecard(&["apply"]).unwrap();
}

#[test]
fn an_eventfd_that_cannot_be_closed_holds_up_no_session() {
    let mut scene = Scene::new();
    for number in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
        // Another one takes its place.
        let session = negotiated(&scene.daemon);
        let held = send_held(&session, number);
        session.get_features().unwrap();
        session.tell(number, &0u64.to_le_bytes(), &[event().as_fd()], false).unwrap();
        session.get_features().unwrap_or_else(|error| panic!("request {number}: the session hangs: {error}"));
        drop(session);
        scene.expect_usable("an eventfd that was replaced");
        drop(held);
        // The connection ends.
        let session = negotiated(&scene.daemon);
        let held = send_held(&session, number);
        session.get_features().unwrap();
        drop(session);
        scene.expect_usable("an eventfd of a connection that has ended");
        drop(held);
    }
    // A message that takes none. The relay closes it at once, and ends the connection because that takes too long.
    let session = negotiated(&scene.daemon);
    let held = send_held(&session, request::SET_VRING_ENABLE);
    assert!(session.closes_within(DEADLINE), "the connection goes on");
    drop(session);
    scene.expect_usable("an eventfd that nobody asked for");
    drop(held);
    scene.finish();
}

#[test]
fn a_port_is_removed_although_an_eventfd_of_its_ring_cannot_be_closed() {
    let scene = Scene::new();
    let nic = Nic::up(&scene.daemon.socket("bad"), &NicConfig::default());
    let held = send_held(nic.session(), request::SET_VRING_KICK);
    nic.session().get_features().unwrap();
    let port = "\n  bad:";
    apply(&scene.daemon, |text| text.replace(port, "\n  renamed:"));
    assert!(nic.session().closes_within(DEADLINE));
    drop(nic);
    eventually("its thread is gone", || {
        let sessions = |threads: &std::collections::BTreeMap<String, usize>| threads.get("vhost-PORT").copied();
        (sessions(&scene.daemon.footprint().threads) == sessions(&scene.at_rest.threads)).then_some(())
    });
    let log = scene.daemon.log();
    assert!(!log.contains("keeps its connection from being closed"), "{log}");
    apply(&scene.daemon, |text| text.replace("\n  renamed:", port));
    scene.witness.keeps_going();
    let nic = Nic::up(&scene.daemon.socket("bad"), &NicConfig::default());
    drop((nic, held));
    scene.finish();
}

#[test]
fn the_daemon_ends_although_an_eventfd_cannot_be_closed() {
    let mut daemon = Daemon::with_ports(&["bad", "other"]);
    let mut all_held = Vec::new();
    let up = |daemon: &Daemon, port| {
        let nic = Nic::up(&daemon.socket(port), &NicConfig::default());
        daemon.port_when(port, "it is served", |port| port.state() == "up");
        nic
    };
    // Of a ring that runs; in a message that nobody has read.
    for unread in [false, true] {
        let (bad, other) = (up(&daemon, "bad"), up(&daemon, "other"));
        if unread {
            kill_process(daemon.pid(), Signal::STOP).unwrap();
        }
        all_held.push(send_held(bad.session(), request::SET_VRING_KICK));
        if unread {
            // The relay passes it on.
            std::thread::sleep(std::time::Duration::from_millis(500));
        } else {
            bad.session().get_features().unwrap();
        }
        kill_process(daemon.pid(), Signal::KILL).unwrap();
        eventually("SIGKILL ends the daemon", || (!daemon.is_running()).then_some(()));
        assert!(bad.session().closes_within(DEADLINE) && other.session().closes_within(DEADLINE));
        daemon.restart();
    }
    let bad = up(&daemon, "bad");
    all_held.push(send_held(bad.session(), request::SET_VRING_KICK));
    bad.session().get_features().unwrap();
    assert!(daemon.terminate().success());
    assert!(bad.session().closes_within(DEADLINE));
}

#[test]
fn a_front_end_may_replace_eventfds_as_often_as_it_likes() {
    let scene = Scene::new();
    let session = negotiated(&scene.daemon);
    let descriptors = |relay: rustix::process::Pid| {
        std::fs::read_dir(format!("/proc/{}/fd", relay.as_raw_nonzero())).unwrap().count()
    };
    let relay = scene.daemon.relay();
    let before = descriptors(relay);
    for _ in 0..100 {
        for number in
            [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR, request::SET_VRING_CALL]
        {
            session.raw(&message::encode(number, VERSION, &0u64.to_le_bytes()), &[Doorbell::new().as_fd()]).unwrap();
        }
        session.get_features().unwrap();
    }
    eventually("few are left", || (descriptors(relay) < before + MANY).then_some(()));
    drop(session);
    eventually("none is left", || (descriptors(relay) < before).then_some(()));
    scene.finish();
}
