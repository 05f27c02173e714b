//! Segments that come one by one reach a guest as one frame, if it takes such: with every byte of payload, whatever its
//! buffers are like, and only then.

#![allow(clippy::unwrap_used)]

mod frontend;

use frontend::daemon::{self, Daemon};
use frontend::driver::{Received, Shape};
use frontend::frame::frame;
use frontend::large::{KINDS, Large, SEGMENT, sum};
use frontend::nic::{LINUX, Nic, NicConfig, meet};
use frontend::session::feature::{self, GUEST_OFFLOADS, HOST_OFFLOADS};

const V4: Large = KINDS[0];
const V6: Large = KINDS[1];

fn config(features: u64) -> NicConfig {
    NicConfig { features, size: 256, tx_buffer: 2048, rx_buffer: 2048, ..NicConfig::default() }
}

/// Has `nic` send `frames` so that the switch finds all of them at once.
fn send_together(nic: &mut Nic, frames: &[([u8; 12], Vec<u8>)]) {
    nic.drain();
    let tx = &mut nic.pairs[0].tx;
    for (header, bytes) in frames {
        assert!(tx.queue_bytes(header, bytes), "the ring holds them");
    }
    tx.queue.publish();
}

/// Checks a merged frame of `kind` and returns its payload.
fn merged(kind: Large, received: &Received) -> Vec<u8> {
    let [start, headers] = [kind.transport() as u16, kind.headers() as u16].map(u16::to_le_bytes);
    let size = (SEGMENT as u16).to_le_bytes();
    let gso = if kind.v6 { 4 } else { 1 };
    let expected = [1, gso, headers[0], headers[1], size[0], size[1], start[0], start[1], 16, 0];
    assert_eq!(received.header[..10], expected);
    assert_eq!(received.num_buffers().unwrap_or(1), received.buffers as u16);
    // As a receiver would that completes checksums.
    let mut bytes = received.frame.clone();
    let at = kind.transport();
    let complete = !(sum(&bytes[at..]) as u16);
    bytes[at + 16..][..2].copy_from_slice(&complete.to_be_bytes());
    kind.payload(&bytes).to_vec()
}

fn payload(segments: &[([u8; 12], Vec<u8>)], kind: Large) -> Vec<u8> {
    segments.iter().flat_map(|(_, bytes)| bytes[kind.headers()..].to_vec()).collect()
}

#[test]
fn segments_arrive_as_one_frame_whatever_the_buffers_are_like() {
    let guest = LINUX | GUEST_OFFLOADS;
    let large = NicConfig { rx_buffer: 65_562, size: 32, ..config(guest & !feature::MRG_RXBUF) };
    let shapes = [
        config(guest),
        config(guest | feature::RING_PACKED),
        NicConfig { rx_buffer: 400, ..config(guest) },
        NicConfig { indirect: true, rx_shape: Shape::Pieces(700), ..config(guest) },
        large.clone(),
        NicConfig { features: large.features | feature::RING_PACKED | feature::IN_ORDER, ..large.clone() },
        // A legacy driver, whose virtio-net header has 10 bytes.
        NicConfig { features: feature::ANY_LAYOUT | GUEST_OFFLOADS, ..large },
    ];
    let daemon = Daemon::with_ports(&["a", "b"]);
    for (turn, shape) in (0..).zip(shapes) {
        let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
        let mut b = Nic::up(&daemon.socket("b"), &shape);
        meet(&mut a, &mut b);
        for (kind, partial) in [(V4, false), (V4, true), (V6, false), (V6, true)] {
            let segments = kind.segments(b.mac, a.mac, 20_000, turn, partial);
            send_together(&mut a, &segments);
            let (_, received) = b.receive(1).remove(0);
            assert!(merged(kind, &received) == payload(&segments, kind), "{kind:?}: payload differs");
        }
        let port = daemon.port_when("b", "all are counted", |port| port.counter("tx_merged") == (turn + 1) * 60);
        assert_eq!(port.all_drops(), 0);
    }
}

#[test]
fn other_frames_between_segments_arrive_and_flows_stay_in_order() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
    let mut b = Nic::up(&daemon.socket("b"), &config(LINUX | GUEST_OFFLOADS));
    meet(&mut a, &mut b);
    let (four, six) =
        (V4.segments(b.mac, a.mac, 7 * SEGMENT, 1, true), V6.segments(b.mac, a.mac, 7 * SEGMENT, 2, true));
    let plain = frame(b.mac, a.mac, 200, 3);
    let mut mixed = Vec::new();
    for (four, six) in four.iter().zip(&six) {
        mixed.extend([four.clone(), ([0; 12], plain.clone()), six.clone()]);
    }
    // A gap: what follows is a frame of its own, after what came before.
    mixed.remove(9);
    send_together(&mut a, &mixed);
    let got = b.receive(7 + 3).into_iter().map(|(_, received)| received);
    let (others, got): (Vec<Received>, Vec<Received>) = got.partition(|received| received.frame == plain);
    assert_eq!(others.len(), 7);
    let (sixes, fours): (Vec<Received>, Vec<Received>) =
        got.into_iter().partition(|received| received.frame[12] == 0x86);
    assert!(merged(V6, &sixes[0]) == payload(&six, V6));
    assert!(merged(V4, &fours[0]) == payload(&four[..3], V4));
    assert!(merged(V4, &fours[1]) == payload(&four[4..], V4));
}

#[test]
fn what_ends_a_frame_arrives_before_what_follows() {
    let daemon = Daemon::start(|dir| {
        let ports = ["a", "b"].map(|name| daemon::port_with(dir, name, "lan", "server", ""));
        daemon::preamble(dir) + "networks: { lan: {} }\nports:\n" + &ports.concat()
    });
    let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
    let mut b = Nic::up(&daemon.socket("b"), &config(LINUX | GUEST_OFFLOADS));
    meet(&mut a, &mut b);
    let mut segments = V4.segments(b.mac, a.mac, 3 * SEGMENT, 1, true);
    segments[0].1[V4.transport() + 13] |= 8;
    send_together(&mut a, &segments);
    let got = b.receive(2);
    assert!(got[0].1.frame == segments[0].1, "PSH");
    assert!(merged(V4, &got[1].1) == payload(&segments[1..], V4));
}

#[test]
fn segments_beyond_the_mtu_are_dropped_each_for_itself() {
    let daemon = Daemon::start(|dir| {
        let ports =
            [("a", ""), ("b", ", mtu: 1000")].map(|(name, more)| daemon::port_with(dir, name, "lan", "server", more));
        daemon::preamble(dir) + "networks: { lan: {} }\nports:\n" + &ports.concat()
    });
    let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
    let mut b = Nic::up(&daemon.socket("b"), &config(LINUX | GUEST_OFFLOADS));
    meet(&mut a, &mut b);
    let segments = V4.segments(b.mac, a.mac, 3 * SEGMENT, 1, true);
    send_together(&mut a, &segments);
    daemon.port_when("b", "they are dropped", |port| port.counter("tx_dropped") == 3);
    assert_eq!(daemon.port("b").counter("tx_merged"), 0);
    assert_eq!(daemon.port("a").drops("mtu-exceeded"), 3);
}

#[test]
fn frames_that_take_many_small_buffers_find_all_that_there_are() {
    for gro in [true, false] {
        for rx_buffer in [300, 400, 600] {
            let daemon = Daemon::start(|dir| {
                let more = format!(", offloads: {{ gro: {gro} }}");
                let ports = ["a", "b"].map(|name| daemon::port_with(dir, name, "lan", "server", &more));
                daemon::preamble(dir) + "networks: { lan: {} }\nports:\n" + &ports.concat()
            });
            let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
            let small = NicConfig { rx_buffer, size: 1024, ..config(LINUX | GUEST_OFFLOADS) };
            let mut b = Nic::up(&daemon.socket("b"), &small);
            meet(&mut a, &mut b);
            // Four flows that alternate, each as long as a merged frame can be with such buffers, or longer.
            let flows: Vec<_> = (0..4)
                .map(|flow| {
                    let mut segments = V4.segments(b.mac, a.mac, 16 * SEGMENT, flow, true);
                    segments.iter_mut().for_each(|(_, bytes)| bytes[V4.transport()] = flow as u8);
                    segments
                })
                .collect();
            let mixed: Vec<_> = (0..16).flat_map(|at| flows.iter().map(move |flow| flow[at].clone())).collect();
            send_together(&mut a, &mixed);
            let mut left = mixed.len() * SEGMENT;
            while left > 0 {
                left -= b.receive(1).iter().map(|(_, got)| got.frame.len() - V4.headers()).sum::<usize>();
            }
            assert_eq!(daemon.port("a").all_drops(), 0, "gro {gro}, buffers of {rx_buffer}");
        }
    }
}

#[test]
fn only_guests_that_take_large_frames_get_them_and_only_while_the_port_lets_them() {
    let configuration = |dir: &std::path::Path, more: &str| {
        let ports = [("a", ""), ("b", more)].map(|(name, more)| daemon::port_with(dir, name, "lan", "server", more));
        daemon::preamble(dir) + "networks: { lan: {} }\nports:\n" + &ports.concat()
    };
    let daemon = Daemon::start(|dir| configuration(dir, ""));
    let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
    let expect = |a: &mut Nic, b: &mut Nic, count: usize| {
        let segments = V4.segments(b.mac, a.mac, 5 * SEGMENT, 1, false);
        send_together(a, &segments);
        let got = b.receive(count);
        if count == 1 {
            assert!(merged(V4, &got[0].1) == payload(&segments, V4));
        } else {
            for ((_, received), (_, sent)) in got.iter().zip(&segments) {
                assert!(received.header[..10] == [0; 10] && received.frame == *sent);
            }
        }
    };
    for features in [LINUX, LINUX | feature::GUEST_CSUM, LINUX | feature::GUEST_CSUM | feature::GUEST_TSO6] {
        let mut b = Nic::up(&daemon.socket("b"), &config(features));
        meet(&mut a, &mut b);
        expect(&mut a, &mut b, 5);
    }
    let mut b = Nic::up(&daemon.socket("b"), &config(LINUX | feature::GUEST_CSUM | feature::GUEST_TSO4));
    meet(&mut a, &mut b);
    for (more, count) in [("", 1), (", offloads: { gro: false }", 5), (", offloads: { tso: false }", 5), ("", 1)] {
        std::fs::write(daemon.dir().join("linecard.yaml"), configuration(daemon.dir(), more)).unwrap();
        daemon.linecard(&["apply"]).unwrap();
        expect(&mut a, &mut b, count);
    }
}

#[test]
fn what_is_damaged_or_finds_no_room_arrives_as_it_came() {
    for form in [0, feature::RING_PACKED] {
        let daemon = Daemon::with_ports(&["a", "b"]);
        let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
        let mut b = Nic::up(&daemon.socket("b"), &NicConfig { size: 4, ..config(LINUX | GUEST_OFFLOADS | form) });
        meet(&mut a, &mut b);
        let mut segments = V4.segments(b.mac, a.mac, 3 * SEGMENT, 1, false);
        segments[1].1[700] ^= 1;
        send_together(&mut a, &segments);
        for ((_, received), (_, sent)) in b.receive(3).iter().zip(&segments) {
            assert!(received.header[..10] == [0; 10] && received.frame == *sent);
        }
        // Six segments take five buffers, of which there are four.
        let segments = V4.segments(b.mac, a.mac, 6 * SEGMENT, 2, true);
        send_together(&mut a, &segments);
        daemon.port_when("a", "two are dropped", |port| port.drops("ring-full") == 2);
        for ((_, received), (header, sent)) in b.receive(4).iter().zip(&segments) {
            assert!(received.header[..10] == header[..10] && received.frame == *sent);
        }
        assert_eq!(daemon.port("b").counter("tx_merged"), 0);
        let port = daemon.port_when("a", "the books are closed", |port| port.is_conserved());
        assert_eq!(port.all_drops(), 2);
    }
}
