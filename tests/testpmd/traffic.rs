//! What NICs negotiate and send: every mode, number of queues, length of rings and of frames; and ports that their
//! driver stops, starts and changes while the other side keeps sending.

use serde_json::Value;

use super::console::Nics;
use super::frontend::daemon::PortView;
use super::{PORTS, Scene, connections, rings, running_rings};

const SIZES: [&str; 3] = ["64", "512", "1514"];

/// 9000 bytes as testpmd builds them: no segment longer than its buffers.
const JUMBO: &str = "2000,2000,2000,2000,1000";

/// All sizes through every number of queues and length of rings, with the features of `mode`.
#[track_caller]
fn every_shape(mode: Nics) {
    // DPDK's vectorized packed path wants a power of two; the others take any size.
    let odd = if mode.packed && !mode.vectorized { 255 } else { 256 };
    let shapes = [(1, 256), (1, 1024), (2, odd), (8, 256)];
    let all = shapes.map(|(queues, queue_size)| Nics { queues, queue_size, ..mode });
    for nics in all {
        let mut scene = Scene::new(nics);
        if !mode.packed {
            // Of packed rings DPDK says only which form they have; it vectorizes them where the CPU has AVX512.
            let vectorized = scene.testpmd.log().contains("using vectorized Rx path");
            assert_eq!(vectorized, mode.vectorized, "the receive path that DPDK chose for {nics:?}");
        }
        let features =
            scene.ports().map(|port| port.0["detail"]["device"]["features"].to_string().contains("RING_PACKED"));
        assert_eq!(features, [mode.packed; 2], "the form of ring of {nics:?}");
        for size in SIZES {
            scene.bounce(size);
            scene.rest_and_compare();
        }
        // testpmd sends many flows, so each queue has had some of them.
        let served = scene.ports().map(|port| rings(&port).iter().filter(|ring| is_served(ring)).count());
        assert_eq!(served, [2 * usize::from(nics.queues); 2], "rings that frames went through, of {nics:?}");
    }
}

/// Whether the ring has given anything back to its driver.
fn is_served(ring: &Value) -> bool {
    ["calls", "calls_suppressed"].iter().any(|name| ring[name].as_u64() > Some(0))
}

#[test]
fn plain() {
    every_shape(Nics { mrg_rxbuf: [false; 2], in_order: false, ..Nics::default() });
}

#[test]
fn vectorized() {
    every_shape(Nics { mrg_rxbuf: [false; 2], in_order: false, vectorized: true, ..Nics::default() });
}

#[test]
fn in_order() {
    every_shape(Nics { mrg_rxbuf: [false; 2], in_order: true, ..Nics::default() });
}

#[test]
fn mergeable() {
    every_shape(Nics { in_order: false, ..Nics::default() });
}

#[test]
fn mergeable_and_in_order() {
    every_shape(Nics::default());
}

#[test]
fn packed() {
    every_shape(Nics { packed: true, mrg_rxbuf: [false; 2], in_order: false, ..Nics::default() });
}

#[test]
fn packed_and_in_order() {
    every_shape(Nics { packed: true, mrg_rxbuf: [false; 2], ..Nics::default() });
}

#[test]
fn packed_and_vectorized() {
    every_shape(Nics { packed: true, mrg_rxbuf: [false; 2], vectorized: true, ..Nics::default() });
}

#[test]
fn packed_and_mergeable() {
    every_shape(Nics { packed: true, in_order: false, ..Nics::default() });
}

#[test]
fn packed_and_mergeable_and_in_order() {
    every_shape(Nics { packed: true, ..Nics::default() });
}

#[test]
fn frames_of_9000_bytes_fill_several_buffers() {
    let split = [(true, 1, 256), (false, 2, 256), (true, 8, 256), (false, 1, 1024)].map(|shape| (false, shape));
    let packed = [(true, 1, 255), (false, 2, 256)].map(|shape| (true, shape));
    for (packed, (in_order, queues, queue_size)) in split.into_iter().chain(packed) {
        let mut scene = Scene::new(Nics { packed, in_order, queues, queue_size, ..Nics::default() });
        for size in [JUMBO, "64", "2000,2000"] {
            scene.bounce(size);
            scene.rest_and_compare();
        }
    }
}

#[test]
fn a_receiver_without_mergeable_buffers_gets_what_fits() {
    let mut scene = Scene::new(Nics { mrg_rxbuf: [true, false], ..Nics::default() });
    scene.bounce("64");
    let [before, _] = scene.rest_and_compare();
    scene.testpmd.say(&format!("set txpkts {JUMBO}"));
    scene.testpmd.say("start tx_first 4");
    let dropped = |port: &PortView| port.drops("buffer-too-small");
    // What bounces goes round one way, out of b and into a, and leaves by b; a's own first frames end at the switch.
    scene.daemon.port_when("a", "what does not fit is dropped", |port| dropped(port) >= dropped(&before) + 32);
    let [_, b] = scene.rest_and_compare();
    assert_eq!(dropped(&b), 0, "a can take all that b sends: {}", b.0);
    scene.bounce("1514");
    scene.rest_and_compare();
}

#[test]
fn a_port_that_goes_and_comes_while_it_is_sent_to() {
    for (packed, in_order) in [(false, true), (false, false), (true, true)] {
        let mut scene = Scene::new(Nics { packed, in_order, queues: 2, ..Nics::default() });
        scene.bounce("64");
        scene.rest();
        scene.testpmd.say("set fwd txonly");
        let attach = format!("port attach {}", scene.nics.vdev(0, &scene.daemon.socket("a")));
        for round in 0..10 {
            // A new port is among those that forward, and testpmd would not let it go again.
            for line in ["set portlist 1", "start"] {
                scene.testpmd.say(line);
            }
            // A mere `port stop` of virtio-user says nothing to its device; a NIC that goes and comes does.
            for line in ["port stop 0", "port detach 0"] {
                scene.testpmd.say(line);
            }
            let stopped = scene.daemon.port_when("a", "its rings are stopped", |port| running_rings(port) == 0);
            for line in [attach.as_str(), "port start 0"] {
                scene.testpmd.say(line);
            }
            scene.expect_up();
            // Nobody reads them, so the fresh buffers of this start are all that it can get.
            let before = stopped.counter("tx_frames");
            let what = format!("frames into the new rings of round {round}");
            scene.daemon.port_when("a", &what, |port| port.counter("tx_frames") >= before + 200);
            scene.rest();
        }
        for line in ["set fwd mac", "set portlist 0,1"] {
            scene.testpmd.say(line);
        }
        scene.bounce("512");
        scene.rest();
    }
}

#[test]
fn ports_that_change_their_queues_on_one_connection() {
    let mut scene = Scene::new(Nics { queues: 8, ..Nics::default() });
    for queues in [8, 1, 4, 2, 8] {
        scene.testpmd.say("port stop all");
        for line in ["rxq", "txq"] {
            scene.testpmd.say(&format!("port config all {line} {queues}"));
        }
        for port in 0..PORTS.len() {
            scene
                .testpmd
                .say(&format!("port config {port} rx_offload vlan_strip {}", if queues > 2 { "on" } else { "off" }));
        }
        scene.testpmd.say("port start all");
        scene.nics.queues = queues;
        scene.expect_up();
        scene.bounce("64");
        scene.rest();
    }
    let seen = scene.ports().map(|port| connections(&port));
    assert_eq!(seen, [1, 1], "all of it on the first connection");
}
