//! Points 17 and on: frames that are in order one by one and too many together, because the switch copies them to everybody.

use std::time::{Duration, Instant};

use super::Scene;
use super::frontend::frame::{BROADCAST, frame};
use super::frontend::nic::exchange;

/// A station that is nowhere.
const NOBODY: [u8; 6] = [0x52, 0x54, 0, 0xee, 0xee, 0xee];

/// What a vNIC may have flooded at once and in a second, unless its configuration says otherwise.
const BROADCASTS: (u64, u64) = (250, 1000);
const UNKNOWN: (u64, u64) = (1250, 5000);

/// Has the bad guest send to `to` as fast as it can, until that was three times what it may have flooded meanwhile. Returns
/// how many frames those were.
fn flood(scene: &mut Scene, to: [u8; 6], (burst, rate): (u64, u64)) -> u64 {
    let (bytes, begin, mut sent) = (frame(to, scene.bad.mac, 64, 1), Instant::now(), 0);
    let allowed = |elapsed: Duration| burst + rate * (elapsed.as_millis() as u64 + 100) / 1000;
    while sent < 3 * allowed(begin.elapsed()) {
        assert!(begin.elapsed() < Duration::from_secs(120), "this machine sends {sent} frames in two minutes");
        let tx = &mut scene.bad.pairs[0].tx;
        tx.reclaim();
        while tx.queue_frame(&bytes) {
            sent += 1;
        }
        tx.queue.publish();
        scene.bad.vmm.vrings[super::TX].kick.ring();
        scene.peer.poll();
    }
    scene.bad.drain();
    scene.peer.poll();
    let elapsed = begin.elapsed();
    let dropped = scene.daemon.port_when("bad", "every frame has had its end", |port| port.is_conserved());
    let passed = sent - dropped.drops("storm-limited");
    assert!(passed <= allowed(elapsed), "{passed} of {sent} frames were flooded in {elapsed:?}");
    assert!(passed >= burst / 2, "{passed} frames are fewer than a guest may send at once");
    sent
}

#[test]
fn point_17_a_flood_to_nobody_leaves_its_network_alone() {
    let mut scene = Scene::new();
    let before = scene.daemon.port("peer").counter("tx_frames");
    let sent = flood(&mut scene, NOBODY, UNKNOWN);
    let after = scene.daemon.port("bad");
    let to_peer = scene.daemon.port("peer").counter("tx_frames") + scene.daemon.port("peer").counter("tx_dropped");
    assert_eq!(to_peer - before, sent - after.drops("storm-limited"), "what was not dropped was copied");
    assert_eq!(after.0["counters"]["storm_drops"]["unknown-unicast"], after.drops("storm-limited"));
    // It is still heard, by one station and by all.
    exchange(&mut scene.bad, &mut scene.peer, 64);
    let call = frame(BROADCAST, scene.bad.mac, 64, 2);
    scene.bad.send(&call);
    assert_eq!(scene.peer.receive(1)[0].1.frame, call, "each class has a bound of its own");
    scene.finish();
}

#[test]
fn point_18_a_storm_of_broadcasts() {
    let mut scene = Scene::new();
    flood(&mut scene, BROADCAST, BROADCASTS);
    let port = scene.daemon.port("bad");
    assert_eq!(port.0["counters"]["storm_drops"]["broadcast"], port.drops("storm-limited"));
    exchange(&mut scene.bad, &mut scene.peer, 64);
    scene.finish();
}
