//! Points 17 and on: frames that are in order one by one and too many together, because the switch copies them to everybody.

use std::time::{Duration, Instant};

use super::Scene;
use super::frontend::daemon::{Daemon, port, port_with, preamble};
use super::frontend::frame::{BROADCAST, frame};
use super::frontend::nic::{LINUX, Nic, NicConfig, exchange};
use super::frontend::session::feature;

/// A station that is nowhere.
const NOBODY: [u8; 6] = [0x52, 0x54, 0, 0xee, 0xee, 0xee];

/// What a vNIC may have flooded at once and in a second: of broadcasts unless its configuration says otherwise, and of frames to
/// nobody where it does, as the 5000 that it may have otherwise are more than a busy machine sends.
const BROADCASTS: (u64, u64) = (1000, 1000);
const UNKNOWN: (u64, u64) = (500, 500);

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
    let file = scene.daemon.dir().join("linecard.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    let bound = format!("\n  bad: {{ storm: {{ unknown-unicast: {} }}, ", UNKNOWN.1);
    std::fs::write(&file, text.replace("\n  bad: { ", &bound)).unwrap();
    scene.daemon.linecard(&["apply"]).unwrap();
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

/// What receivers have segmented for them.
#[derive(Clone, Copy, Debug)]
enum Whole {
    /// Datagrams of a byte each behind 254 bytes of headers.
    Datagrams,
    /// TCP segments of 48 bytes each behind 250.
    Segments,
}

impl Whole {
    /// Bytes of options before the transport header, of that header, and of each piece's payload.
    fn layout(self) -> [usize; 3] {
        match self {
            Self::Datagrams => [192, 8, 1],
            Self::Segments => [136, 60, 48],
        }
    }

    /// Bytes of each frame that comes of it.
    fn piece(self) -> usize {
        14 + 40 + self.layout().iter().sum::<usize>()
    }

    /// A broadcast that becomes so many frames, and its virtio-net header.
    fn make(self, from: [u8; 6], pieces: usize) -> ([u8; 12], Vec<u8>) {
        let [options, transport, piece] = self.layout();
        let (kind, protocol, checksum) = match self {
            Self::Datagrams => (5, 17, 6),
            Self::Segments => (4, 6, 16),
        };
        let len = options + transport + piece * pieces;
        let mut frame = [BROADCAST, from].concat();
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, (len >> 8) as u8, len as u8, 60, 64]);
        frame.extend((0..32).map(|byte| byte + 1));
        frame.extend([protocol, (options / 8 - 1) as u8]);
        frame.resize(14 + 40 + options, 0);
        let start = (frame.len() as u16).to_le_bytes();
        match self {
            Self::Datagrams => frame.extend([0x9c, 0x40, 0, 53, 0, (8 + pieces) as u8, 0, 0]),
            // Options that do nothing.
            Self::Segments => {
                frame.extend([0x9c, 0x40, 0, 53, 0, 0, 0, 1, 0, 0, 0, 1, 0xf0, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
                frame.extend([1; 40]);
            }
        }
        frame.resize(frame.len() + piece * pieces, 0x55);
        ([1, kind, 0, 0, piece as u8, 0, start[0], start[1], checksum, 0, 0, 0], frame)
    }
}

/// How many batches the shards had.
fn batches(daemon: &Daemon) -> u64 {
    let shards = daemon.linecard(&["shard", "list"]).unwrap();
    shards.as_array().unwrap().iter().map(|shard| shard["batches"].as_u64().unwrap()).sum()
}

#[test]
fn point_19_frames_that_become_very_many_are_flooded_in_several_visits() {
    const FRAMES: u64 = 64;
    const PIECES: usize = 128;
    let cases = [0, feature::RING_PACKED].map(|form| [Whole::Datagrams, Whole::Segments].map(|whole| (form, whole)));
    for (form, whole) in cases.into_iter().flatten() {
        let features = LINUX | feature::HOST_OFFLOADS | form;
        let names: Vec<String> = (0..8).map(|n| format!("r{n}")).collect();
        let daemon = Daemon::start(|dir| {
            let receivers: String = names.iter().map(|name| port(dir, name, "lan")).collect();
            preamble(dir)
                + "networks: { lan: {} }\nports:\n"
                + &port_with(dir, "bad", "lan", "server", ", storm: off")
                + &receivers
        });
        let mut bad = Nic::up(&daemon.socket("bad"), &NicConfig { features, tx_buffer: 8192, ..NicConfig::default() });
        let buffers = NicConfig { size: 16384, rx_buffer: 512, tx_buffer: 128, ..NicConfig::default() };
        let mut receivers: Vec<Nic> = names.iter().map(|name| Nic::up(&daemon.socket(name), &buffers)).collect();
        let (header, frame) = whole.make(bad.mac, PIECES);
        let before = batches(&daemon);
        for _ in 0..FRAMES {
            assert!(bad.pairs[0].tx.queue_bytes(&header, &frame));
        }
        bad.pairs[0].tx.queue.publish();
        bad.vmm.vrings[super::TX].kick.ring();
        bad.drain();
        let sent = daemon.port_when("bad", "every frame has had its end", |port| port.is_conserved());
        assert_eq!((sent.counter("rx_frames"), sent.counter("rx_delivered")), (FRAMES, FRAMES));
        for (name, receiver) in names.iter().zip(&mut receivers) {
            // All of a frame's segments or none, and no frame twice.
            let port = daemon.port(name);
            assert_eq!(port.counter("tx_frames") + port.counter("tx_dropped"), FRAMES, "{name}");
            let got = receiver.receive(port.counter("tx_frames") as usize * PIECES);
            assert!(got.iter().all(|(_, got)| got.frame.len() == whole.piece()), "{name}, {whole:?}");
            assert_eq!(receiver.poll().len(), 0, "{name}");
        }
        // 128 segments and 32 KiB each, or more; six ports of the eight are as much as one visit may come to.
        let visits = batches(&daemon) - before;
        assert!(
            visits >= 2 * FRAMES,
            "{whole:?}: {FRAMES} frames became {} segments in {visits} visits",
            8 * FRAMES * PIECES as u64
        );
    }
}
