//! What guests say about a frame in its virtio-net header, and what it is like.

use super::frontend::driver::{Shape, header_len};
use super::frontend::frame::frame;
use super::frontend::large::{KINDS, SEGMENT};
use super::frontend::nic::{LINUX, NicConfig};
use super::frontend::random::Random;
use super::frontend::ring::Desc;
use super::frontend::session::feature::{self, GUEST_CSUM, HOST_OFFLOADS};
use super::{Mutator, Scene};

/// A guest that may leave everything to the switch.
fn sender() -> NicConfig {
    NicConfig { features: LINUX | HOST_OFFLOADS, size: 64, tx_buffer: 65_600, ..NicConfig::default() }
}

/// `header` with its field of two bytes at `at` set.
fn with(mut header: [u8; 12], at: usize, value: u16) -> [u8; 12] {
    header[at..at + 2].copy_from_slice(&value.to_le_bytes());
    header
}

const HDR_LEN: usize = 2;
const GSO_SIZE: usize = 4;
const CSUM_START: usize = 6;
const CSUM_OFFSET: usize = 8;

/// Sends `bytes` behind each header and expects all of them to be dropped for `reason`.
#[track_caller]
fn expect_all_dropped(scene: &mut Scene, headers: &[[u8; 12]], bytes: &[u8], reason: &str) {
    let before = scene.daemon.port("bad").drops(reason);
    for header in headers {
        scene.bad.send_behind(header, bytes);
    }
    scene.bad.drain();
    let count = headers.len() as u64;
    scene.daemon.port_when("bad", reason, |port| port.drops(reason) == before + count && port.is_conserved());
    scene.witness.keeps_going();
}

/// DPDK's GSO: headers longer than a segment, or than what the header lengths say, had a length underflow.
#[test]
fn cve_2026_100236_headers_longer_than_segments_and_descriptors() {
    for shape in [Shape::Joined, Shape::Pieces(1000), Shape::HeaderApart] {
        let mut scene = Scene::with(NicConfig { shape, ..sender() });
        // Forty bytes of TCP options: 94 of headers before segments of 48.
        let (header, mut bytes) = KINDS[0].make(scene.peer.mac, scene.bad.mac, 480, 1);
        bytes.splice(54..54, [1; 40]);
        bytes[46] = 0xf0;
        let total = (bytes.len() - 14) as u16;
        bytes[16..18].copy_from_slice(&total.to_be_bytes());
        scene.bad.send_behind(&with(header, GSO_SIZE, 48), &bytes);
        let got = scene.peer.receive(10);
        assert!(got.iter().all(|(_, got)| got.frame.len() == 94 + 48), "segments of 48 behind 94 bytes of headers");
        let payload: Vec<u8> = got.iter().flat_map(|(_, got)| got.frame[94..].to_vec()).collect();
        assert_eq!(payload, bytes[94..], "payload of the segments");
        // hdr_len is a hint, and is not believed whatever it says.
        for hint in [0, 1, 48, 13_000, u16::MAX] {
            scene.bad.send_behind(&with(with(header, GSO_SIZE, 48), HDR_LEN, hint), &bytes);
            assert_eq!(scene.peer.receive(10).len(), 10);
        }
        let len = bytes.len() as u16;
        let beyond = [len - 1, len, len + 1, u16::MAX - 1, u16::MAX];
        expect_all_dropped(
            &mut scene,
            &beyond.map(|start| with(header, CSUM_START, start)),
            &bytes,
            "checksum-invalid",
        );
        // Within the frame, but its transport header does not lie there, or not as a whole.
        let within = [14, 33, 35, 53, len - 20].map(|start| with(header, CSUM_START, start));
        expect_all_dropped(&mut scene, &within, &bytes, "gso-invalid");
        // A TCP header that says to be longer than the frame.
        bytes.truncate(60);
        expect_all_dropped(&mut scene, &[header], &bytes, "gso-invalid");
        scene.finish();
    }
    // Headers over many descriptors, the first of them shorter than the headers of Ethernet and IP.
    let mut scene = Scene::with(NicConfig { shape: Shape::Pieces(40), size: 256, ..sender() });
    let (header, bytes) = KINDS[0].make(scene.peer.mac, scene.bad.mac, 400, 1);
    scene.bad.send_behind(&with(header, GSO_SIZE, 100), &bytes);
    let got = scene.peer.receive(4);
    let payload: Vec<u8> = got.iter().flat_map(|(_, got)| KINDS[0].payload(&got.frame).to_vec()).collect();
    assert_eq!(payload, bytes[54..], "payload of the segments");
    scene.finish();
}

/// Linux and DPDK: a checksum field behind the end of the frame was written to.
#[test]
fn cve_2024_11614_a_checksum_behind_the_frame() {
    let mut scene = Scene::with(sender());
    let (header, bytes) = KINDS[0].make(scene.peer.mac, scene.bad.mac, 400, 1);
    let mut plain = header;
    plain[1..6].fill(0);
    let len = bytes.len() as u16;
    let offsets = [len - 34 - 1, len - 34, len, 0x7fff, u16::MAX - 33, u16::MAX - 1, u16::MAX];
    for header in [header, plain] {
        let headers = offsets.map(|offset| with(header, CSUM_OFFSET, offset));
        expect_all_dropped(&mut scene, &headers, &bytes, "checksum-invalid");
    }
    scene.finish();
}

/// DPDK: `csum_start` was checked and then read from the guest's memory once more.
#[test]
fn dpdk_285e6b8b18_a_checksum_start_that_changes() {
    let receiver = NicConfig { features: LINUX | GUEST_CSUM, ..NicConfig::default() };
    let mut scene = Scene::of(sender(), receiver);
    let (header, bytes) = KINDS[0].make(scene.peer.mac, scene.bad.mac, 400, 1);
    let mut plain = header;
    plain[1..6].fill(0);
    let ram = scene.bad.vmm.ram.clone();
    let buffers: Vec<u64> = (0..64).map(|head| scene.bad.pairs[0].tx.buffer_of(head)).collect();
    let mut random = Random::new(1);
    let mutator = Mutator::start(move || {
        let start: u16 = [34, 34, 34, 0, 13, 452, 0x7fff, u16::MAX][random.below(8) as usize];
        ram.write(buffers[random.below(64) as usize] + CSUM_START as u64, &start.to_le_bytes());
    });
    let mut asked = 0;
    for _ in 0..3000 {
        scene.bad.send_behind(&plain, &bytes);
        for (_, got) in scene.peer.poll() {
            let field = |at: usize| usize::from(u16::from_le_bytes([got.header[at], got.header[at + 1]]));
            if got.header[0] & 1 != 0 {
                let (start, offset) = (field(CSUM_START), field(CSUM_OFFSET));
                let within = start >= 14 && start + offset + 2 <= got.frame.len();
                assert!(within, "a receiver is told of a checksum at {start} + {offset} of {}", got.frame.len());
                asked += 1;
            }
        }
    }
    drop(mutator);
    scene.bad.drain();
    scene.witness.keeps_going();
    assert!(asked > 0, "no frame with an unfinished checksum got through");
    scene.finish();
}

/// DPDK: a chain that was no longer than the header had the length of the frame underflow.
#[test]
fn dpdk_e31b57e732_chains_no_longer_than_the_header() {
    for features in [feature::ANY_LAYOUT, LINUX, LINUX | feature::RING_PACKED] {
        let mut scene = Scene::with(NicConfig { features, ..NicConfig::default() });
        let header = header_len(scene.bad.features()) as u32;
        let at = scene.bad.vmm.ram.alloc(64, 64);
        for piece in [header, 5, 1] {
            let before = scene.daemon.port("bad").drops("header-truncated");
            for len in 1..=header {
                let cut = |from: u32| Desc::readable(at + u64::from(from), piece.min(len - from));
                let chain: Vec<_> = (0..len).step_by(piece as usize).map(cut).collect();
                scene.bad.pairs[0].tx.queue.add(&chain, false).unwrap();
                scene.bad.pairs[0].tx.queue.publish();
            }
            scene.bad.drain();
            let count = before + u64::from(header);
            scene.daemon.port_when("bad", "all are dropped", |port| port.drops("header-truncated") == count);
            assert_eq!(scene.peer.poll().len(), 0, "a frame of no bytes was delivered");
        }
        scene.finish();
    }
}

/// DPDK: segments of no bytes, by which it divided.
#[test]
fn dpdk_7023f3e532_segments_of_no_bytes() {
    for features in [LINUX, LINUX | feature::GUEST_OFFLOADS] {
        let mut scene = Scene::of(sender(), NicConfig { features, ..NicConfig::default() });
        for kind in KINDS {
            // With payload, with none, and with headers alone.
            for payload in [10 * SEGMENT, 1, 0] {
                let (header, bytes) = kind.make(scene.peer.mac, scene.bad.mac, payload, 1);
                expect_all_dropped(&mut scene, &[with(header, GSO_SIZE, 0)], &bytes, "gso-invalid");
            }
        }
        // Without payload even a good size has nothing to divide.
        let (header, bytes) = KINDS[0].make(scene.peer.mac, scene.bad.mac, 0, 1);
        scene.bad.send_behind(&header, &bytes);
        scene.bad.drain();
        assert_eq!(scene.peer.receive(1)[0].1.frame.len(), bytes.len());
        scene.bad.send_behind(&[0; 12], &frame(scene.peer.mac, scene.bad.mac, 60, 1));
        assert_eq!(scene.peer.receive(1)[0].1.frame.len(), 60);
        scene.finish();
    }
}
