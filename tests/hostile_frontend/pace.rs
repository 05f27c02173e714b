//! Beyond the points: front ends that say too much.

use std::io::Write;
use std::time::{Duration, Instant};

use super::Scene;
use super::frontend::message::{self, NO_FD, VERSION};
use super::frontend::session::{Session, request, vring_state};

/// Sends a message 64 times at once, as often as it takes to send it `count` times, and returns when all were read.
fn flood(session: &Session, number: u32, payload: &[u8], count: usize) {
    let many = message::encode(number, VERSION, payload).repeat(64);
    let mut stream = session.stream();
    for _ in 0..count.div_ceil(64) {
        stream.write_all(&many).unwrap();
    }
    // What was sent is read in order, so the answer says that all of it was.
    session.get_features().unwrap();
}

#[test]
fn a_flood_of_messages_waits_for_itself() {
    let mut scene = Scene::new();
    let nic = scene.nic();
    let begin = Instant::now();
    flood(nic.session(), request::SET_VRING_ENABLE, &vring_state(1, 1), 20_000);
    assert!(begin.elapsed() > Duration::from_secs(2), "20,000 messages in {:?}", begin.elapsed());
    // What may be said at once has been said: whoever comes next waits from the start, whatever it says.
    let mut begin = Instant::now();
    drop(nic);
    for (number, payload) in [
        (request::SET_VRING_ENABLE, vring_state(1, 0)),
        (request::SET_VRING_NUM, vring_state(1, 256)),
        (request::SET_VRING_CALL, NO_FD.to_le_bytes().into()),
        (request::SET_VRING_BASE, vring_state(1, 0)),
        (4711, Vec::new()),
    ] {
        let session = scene.session();
        flood(&session, number, &payload, 2000);
        assert!(begin.elapsed() > Duration::from_secs(1), "2000 of request {number} in {:?}", begin.elapsed());
        begin = Instant::now();
    }
    scene.finish();
}
