//! Beyond the points: front ends that say too much.

use std::io::Write;
use std::time::{Duration, Instant};

use super::Scene;
use super::frontend::message::{self, VERSION};
use super::frontend::session::{request, vring_state};

#[test]
fn a_flood_of_messages_waits_for_itself() {
    let mut scene = Scene::new();
    let nic = scene.nic();
    let one = message::encode(request::SET_VRING_ENABLE, VERSION, &vring_state(1, 1));
    let (begin, many) = (Instant::now(), one.repeat(64));
    for _ in 0..(20_000 / 64) {
        (&mut nic.session().stream()).write_all(&many).unwrap();
    }
    // What was sent is read in order, so the answer says that all of it was.
    nic.session().get_features().unwrap();
    assert!(begin.elapsed() > Duration::from_secs(2), "20,000 messages in {:?}", begin.elapsed());
    drop(nic);
    scene.finish();
}
