//! Lies in the virtio-net header, from a guest that negotiated every offload: points 2 to 5 of "Packet header".

use super::frontend::frame::frame;
use super::frontend::nic::{LINUX, NicConfig};
use super::frontend::random::Random;
use super::frontend::session::feature::HOST_OFFLOADS;
use super::{Mutator, Scene};

const LARGE: usize = 65_000;

fn scene() -> Scene {
    Scene::with(NicConfig { features: LINUX | HOST_OFFLOADS, size: 64, tx_buffer: 65_600, ..NicConfig::default() })
}

/// The virtio-net header that a driver would write before [`tcp`].
fn header(gso_size: u16) -> [u8; 12] {
    let [low, high] = gso_size.to_le_bytes();
    [1, 1, 54, 0, low, high, 34, 0, 16, 0, 0, 0]
}

/// A large TCP frame over IPv4.
fn tcp(scene: &Scene, payload: usize) -> Vec<u8> {
    let mut bytes = frame(scene.peer.mac, scene.bad.mac, 54 + payload, 1);
    let total = (40 + payload) as u16;
    bytes[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
    bytes[16..18].copy_from_slice(&total.to_be_bytes());
    bytes[18..26].copy_from_slice(&[0, 1, 0x40, 0, 64, 6, 0, 0]);
    bytes[46..48].copy_from_slice(&[0x50, 0x10]);
    bytes
}

/// Sends `bytes` behind each header and expects all of them to be dropped for `reason`.
fn expect_all_dropped(scene: &mut Scene, headers: &[[u8; 12]], bytes: &[u8], reason: &str) {
    let before = scene.daemon.port("bad").drops(reason);
    for header in headers {
        scene.bad.send_behind(header, bytes);
    }
    scene.bad.drain();
    scene.expect_drops(reason, before, headers.len() as u64);
}

fn with(mut header: [u8; 12], changes: &[(usize, u8)]) -> [u8; 12] {
    for &(at, byte) in changes {
        header[at] = byte;
    }
    header
}

#[test]
fn checksums_that_do_not_lie_within_the_frame() {
    let mut scene = scene();
    let sent = tcp(&scene, 1000);
    let plain = with(header(0), &[(1, 0)]);
    let headers = [
        with(plain, &[(6, 0)]),
        with(plain, &[(6, 13)]),
        with(plain, &[(6, 0xff), (7, 0xff)]),
        with(plain, &[(8, 0xff), (9, 0xff)]),
        with(plain, &[(6, 0xff), (7, 0xff), (8, 0xff), (9, 0xff)]),
        with(header(1400), &[(7, 0x80)]),
    ];
    expect_all_dropped(&mut scene, &headers, &sent, "checksum-invalid");
    scene.finish();
}

#[test]
fn segments_that_cannot_be() {
    let mut scene = scene();
    let sent = tcp(&scene, LARGE);
    let good = header(1400);
    let headers = [
        header(0),
        header(1),
        header(47),
        with(good, &[(0, 0)]),
        with(good, &[(1, 4)]),
        with(good, &[(1, 5)]),
        with(good, &[(1, 0x80)]),
        with(good, &[(6, 35)]),
        with(good, &[(8, 6)]),
    ];
    expect_all_dropped(&mut scene, &headers, &sent, "gso-invalid");
    let unknown = [with(good, &[(1, 3)]), with(good, &[(1, 2)]), with(good, &[(1, 0x7f)])];
    expect_all_dropped(&mut scene, &unknown, &sent, "offload-not-negotiated");
    for (at, byte) in [(14, 0x65), (14, 0x44), (20, 0x20), (23, 17), (46, 0x40), (46, 0xf0)] {
        let mut wrong = sent.clone();
        wrong[at] = byte;
        wrong.truncate(if byte == 0xf0 { 80 } else { LARGE });
        expect_all_dropped(&mut scene, &[good], &wrong, "gso-invalid");
    }
    scene.finish();
}

#[test]
fn the_smallest_segments_of_the_largest_frames_harm_nobody() {
    let mut scene = scene();
    let sent = tcp(&scene, LARGE);
    for _ in 0..200 {
        // 1355 segments for a ring of 64: the peer gets the first ones or none, and must not lose a buffer.
        scene.bad.send_behind(&header(48), &sent);
        scene.peer.poll();
    }
    scene.bad.drain();
    let port =
        scene.daemon.port_when("bad", "each has its end", |port| port.counter("rx_gso") == 200 && port.is_conserved());
    assert_eq!(port.drops("ring-full"), port.all_drops());
    let cut = scene.daemon.port("peer").counter("tx_segments_dropped");
    assert!(cut > 1355 - 64, "{cut} segments dropped of the frames of which some were delivered");
    scene.witness.keeps_going();
    scene.finish();
}

#[test]
fn headers_that_change_while_they_are_read() {
    let mut scene = scene();
    let (ram, bytes) = (scene.bad.vmm.ram.clone(), tcp(&scene, LARGE));
    let buffers: Vec<u64> = (0..64).map(|head| scene.bad.pairs[0].tx.buffer_of(head)).collect();
    let mut random = Random::new(5);
    let mutator = Mutator::start(move || {
        // Any byte of the virtio-net header or of the headers behind it, in any of the frames.
        let (buffer, at) = (buffers[random.next() as usize % 64], random.next() % 80);
        ram.write(buffer + at, &[random.next() as u8]);
    });
    for _ in 0..1000 {
        scene.bad.send_behind(&header(1400), &bytes);
        for (_, received) in scene.peer.poll() {
            assert_eq!(received.header[..10], [0; 10], "nothing is left to a guest that can do nothing");
        }
    }
    drop(mutator);
    scene.bad.drain();
    scene.peer.poll();
    scene.expect_alive("headers that change");
    scene.finish();
}
