//! Point 5, the rest of it: what a front end that has lost memory keeps of the daemon, as long as it stays.

use super::frontend::frame::frame;
use super::frontend::nic::{Nic, NicConfig, meet};
use super::frontend::ram::{GuestRam, Region};
use super::{MIB, Scene};

/// Frames that arrive together, so that one visit of the ring finds as many pages missing.
const TOGETHER: u64 = 60;

#[test]
fn a_port_that_was_stopped_over_many_missing_pages_keeps_no_mappings_for_them() {
    let mut scene = Scene::new();
    for round in 0..3 {
        let ram = GuestRam::new(vec![Region::new(0, 0x7000_0000_0000, 16 * MIB)]);
        // Each buffer is in the first half of two pages: no missing page is beside another.
        let config = NicConfig { ram: Some(ram.clone()), rx_buffer: 8192, ..NicConfig::default() };
        let mut bad = Nic::up(&scene.daemon.socket("bad"), &config);
        meet(&mut bad, &mut scene.peer);
        let before = scene.daemon.footprint().mappings;
        let left = bad.pairs[0].rx.buffer_of(0).next_multiple_of(4096);
        ram.regions()[0].file.set_len(left).unwrap();
        for at in 0..TOGETHER {
            let sent = frame(bad.mac, scene.peer.mac, 1000, round * TOGETHER + at);
            assert!(scene.peer.pairs[0].tx.queue_frame(&sent));
        }
        scene.peer.pairs[0].tx.queue.publish();
        scene.peer.vmm.vrings[1].kick.ring();
        let port = scene.daemon.port_when("bad", "its memory is gone", |port| port.state() == "stopped");
        assert!(port.reason().is_some_and(|reason| reason.contains("shrank")), "{:?}", port.reason());
        let after = scene.daemon.footprint().mappings;
        assert!(after < before + 20, "{before} mappings, and {after} while its front end is still there");
        scene.witness.keeps_going();
        drop(bad);
        scene.peer.drain();
        scene.peer.poll();
        scene.expect_usable("a file that shrank by many pages");
    }
    scene.finish();
}
