//! Guests with different offloads on one network: whatever one leaves undone, each other gets what it can take, with every
//! byte of payload and every checksum right. Checksums and segments are verified by code of this file's own.

#![allow(clippy::unwrap_used)]

mod frontend;

use frontend::daemon::{self, Daemon};
use frontend::driver::Received;
use frontend::frame::{BROADCAST, frame};
use frontend::large::{KINDS, Large, SEGMENT, sum};
use frontend::nic::{LINUX, Nic, NicConfig, meet};
use frontend::session::Session;
use frontend::session::feature::{self, GUEST_OFFLOADS, HOST_OFFLOADS};

fn config(features: u64) -> NicConfig {
    NicConfig { features, size: 256, tx_buffer: 65_600, rx_buffer: 2048, ..NicConfig::default() }
}

/// Receives segments until all of `payload` has come.
fn receive_segments(nic: &mut Nic, kind: Large, payload: &[u8]) {
    let mut got = Vec::<u8>::new();
    while got.len() < payload.len() {
        for (_, received) in nic.receive(1) {
            assert_eq!(received.header[..10], [0; 10], "nothing is left to a guest that can do nothing");
            assert!(received.frame.len() <= kind.headers() + SEGMENT);
            got.extend(kind.payload(&received.frame));
        }
    }
    assert!(got == payload, "{kind:?}: payload differs");
}

/// Receives one whole frame with its header as it was sent.
fn receive_whole(nic: &mut Nic, kind: Large, sent: &([u8; 12], Vec<u8>)) {
    let (_, received) = nic.receive(1).remove(0);
    assert!(received.frame == sent.1, "{kind:?} differs");
    let mut expected = sent.0;
    expected[2..4].copy_from_slice(&(kind.headers() as u16).to_le_bytes());
    assert_eq!(received.header[..10], expected[..10]);
    assert_eq!(received.num_buffers(), Some(received.buffers as u16));
}

#[test]
fn each_receiver_of_a_flood_gets_what_it_can_take() {
    let daemon = Daemon::with_ports(&["sender", "all", "csum", "none", "legacy", "packed"]);
    let mut sender = Nic::up(&daemon.socket("sender"), &config(LINUX | HOST_OFFLOADS));
    let mut all = Nic::up(&daemon.socket("all"), &config(LINUX | GUEST_OFFLOADS));
    let mut csum = Nic::up(&daemon.socket("csum"), &config(LINUX | feature::GUEST_CSUM));
    let mut none = Nic::up(&daemon.socket("none"), &config(LINUX));
    let mut legacy = Nic::up(&daemon.socket("legacy"), &config(feature::ANY_LAYOUT));
    let mut packed = Nic::up(&daemon.socket("packed"), &config(LINUX | feature::RING_PACKED | feature::IN_ORDER));
    for (seed, kind) in (0..).zip(KINDS) {
        let sent = kind.make(BROADCAST, sender.mac, 50_000, seed);
        let payload = &sent.1[kind.headers()..];
        sender.send_behind(&sent.0, &sent.1);
        receive_whole(&mut all, kind, &sent);
        receive_segments(&mut none, kind, payload);
        receive_segments(&mut legacy, kind, payload);
        receive_segments(&mut packed, kind, payload);
        let mut got = Vec::<u8>::new();
        for (_, received) in csum.receive(50_000usize.div_ceil(SEGMENT)) {
            assert_eq!((received.header[0], received.header[1]), (1, 0), "checksums are left to a guest that can");
            let (start, offset) = (usize::from(received.header[6]), usize::from(received.header[8]));
            let mut bytes = received.frame;
            let sum = !(sum(&bytes[start..]) as u16);
            bytes[start + offset..][..2].copy_from_slice(&sum.to_be_bytes());
            got.extend(kind.payload(&bytes));
        }
        assert!(got == payload);
    }
    sender.drain();
    let port = daemon.port_when("sender", "all are counted", |port| port.counter("rx_gso") == 4);
    assert!(port.is_conserved() && port.all_drops() == 0);
    let counted = |name| ["tx_gso", "tx_segmented", "tx_completed"].map(|counter| daemon.port(name).counter(counter));
    assert_eq!(["all", "csum", "none", "legacy"].map(counted), [[4, 0, 0], [0, 4, 0], [0, 4, 0], [0, 4, 0]]);
}

#[test]
fn a_checksum_is_completed_for_whom_cannot() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
    let mut b = Nic::up(&daemon.socket("b"), &config(LINUX));
    for (seed, kind) in (0..).zip(KINDS) {
        for payload in [0, 1, 10, 1000] {
            let (mut header, bytes) = kind.make(b.mac, a.mac, payload, seed);
            header[1..6].fill(0);
            a.send_behind(&header, &bytes);
            let (_, received) = b.receive(1).remove(0);
            assert_eq!(
                (kind.payload(&received.frame), &received.header[..10]),
                (&bytes[kind.headers()..], &[0; 10][..])
            );
        }
    }
}

/// What the guest takes of `sent`, a large frame of which its buffers hold `fit` segments: the first ones, complete.
fn take_leading(nic: &mut Nic, kind: Large, sent: &[u8], fit: usize) {
    let expected = &sent[kind.headers()..];
    let got: Vec<_> = nic.pairs[0].rx.take().into_iter().map(|received| complete(kind, received)).collect();
    let payload: Vec<u8> = got.iter().flat_map(|frame| kind.payload(frame).to_vec()).collect();
    assert_eq!((got.len(), payload.len()), (fit, expected.len().min(fit * SEGMENT)), "{kind:?}");
    assert!(payload == expected[..payload.len()], "{kind:?}: payload differs");
    nic.pairs[0].rx.post(fit);
}

/// A received frame with its checksum completed if that was left to the guest.
fn complete(kind: Large, received: Received) -> Vec<u8> {
    let mut bytes = received.frame;
    assert_eq!(received.header[1], 0, "{kind:?}: it is no large frame");
    if received.header[0] == 1 {
        let sum = !(sum(&bytes[kind.transport()..]) as u16);
        bytes[kind.transport() + usize::from(received.header[8])..][..2].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}

/// Brings up a NIC whose driver posts `buffers` buffers and no more, as a firmware's does.
fn few_buffers(daemon: &Daemon, port: &str, config: &NicConfig, buffers: usize) -> Nic {
    let mut nic = Nic::prepare(Session::connect(&daemon.socket(port)).unwrap(), config).unwrap();
    nic.pairs[0].rx.post(buffers);
    nic.vmm.probe().unwrap();
    nic.vmm.start().unwrap();
    nic.vmm.settle().unwrap();
    daemon.port_when(port, "its ring runs", |port| port.state() == "up");
    nic
}

/// Sends large frames of several lengths to a guest that posts eight buffers with room for a segment each.
fn eight_buffers(features: u64) {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
    let mut b = few_buffers(&daemon, "b", &config(features), 8);
    let (mut frames, mut cut) = (0, 0);
    for (seed, kind) in (0..).zip(KINDS) {
        for segments in [1, 5, 8, 9, 20, 44] {
            let (header, bytes) = kind.make(b.mac, a.mac, segments * SEGMENT, seed);
            a.send_behind(&header, &bytes);
            frames += 1;
            cut += segments.saturating_sub(8) as u64;
            let port = daemon.port_when("a", "the frame has its end", |port| {
                port.is_conserved() && port.counter("rx_frames") == frames
            });
            assert_eq!(port.counter("rx_delivered"), frames, "{kind:?} of {segments} segments: {}", port.0["counters"]);
            take_leading(&mut b, kind, &bytes, segments.min(8));
            let port = daemon.port("b");
            let counted = ["tx_frames", "tx_segments_dropped", "tx_dropped"].map(|name| port.counter(name));
            assert_eq!(counted, [frames, cut, 0]);
        }
    }
    // Without a buffer it is none that was delivered.
    let (header, bytes) = KINDS[0].make(b.mac, a.mac, 8 * SEGMENT, 7);
    (0..2).for_each(|_| a.send_behind(&header, &bytes));
    daemon.port_when("a", "one is dropped", |port| port.drops("ring-full") == 1 && port.is_conserved());
    assert_eq!(daemon.port("b").counter("tx_segments_dropped"), cut);
}

#[test]
fn a_guest_with_few_buffers_gets_the_segments_that_fit() {
    for form in [0, feature::IN_ORDER, feature::RING_PACKED, feature::RING_PACKED | feature::IN_ORDER] {
        eight_buffers(feature::VERSION_1 | form);
    }
    eight_buffers(feature::VERSION_1 | feature::MRG_RXBUF);
}

#[test]
fn a_guest_that_takes_large_frames_gets_segments_where_its_buffers_are_too_few() {
    for form in [0, feature::RING_PACKED] {
        let daemon = Daemon::with_ports(&["a", "b"]);
        let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
        let mut b = few_buffers(&daemon, "b", &config(LINUX | GUEST_OFFLOADS | form), 8);
        for (seed, kind) in (0..).zip(KINDS) {
            let [fits, too_long] = [9, 20].map(|segments| kind.make(b.mac, a.mac, segments * SEGMENT, seed));
            a.send_behind(&fits.0, &fits.1);
            daemon.port_when("b", "it has it", |port| port.counter("tx_gso") == seed + 1);
            let got = b.pairs[0].rx.take().remove(0);
            assert!(got.header[1] != 0 && got.frame == fits.1, "{kind:?}: it is there whole");
            b.pairs[0].rx.post(got.buffers);
            a.send_behind(&too_long.0, &too_long.1);
            let cut = |segments| move |port: &daemon::PortView| port.counter("tx_segments_dropped") == segments;
            daemon.port_when("b", "it has the beginning", cut(12 * (seed + 1)));
            take_leading(&mut b, kind, &too_long.1, 8);
        }
        assert!(daemon.port("a").is_conserved() && daemon.port("a").all_drops() == 0);
    }
}

#[test]
fn a_guest_that_takes_large_frames_gets_segments_where_its_buffers_are_too_small() {
    for form in [0, feature::RING_PACKED] {
        let daemon = Daemon::with_ports(&["a", "b"]);
        let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
        let features = LINUX & !feature::MRG_RXBUF | GUEST_OFFLOADS | form;
        let mut b = few_buffers(&daemon, "b", &config(features), 40);
        for (seed, kind) in (0..).zip(KINDS) {
            for (segments, fit) in [(40, 40), (44, 40)] {
                let (header, bytes) = kind.make(b.mac, a.mac, segments * SEGMENT, seed);
                a.send_behind(&header, &bytes);
                let sent = 2 * seed + if segments == 40 { 1 } else { 2 };
                daemon.port_when("a", "it is delivered", |port| port.counter("rx_delivered") == sent);
                take_leading(&mut b, kind, &bytes, fit);
            }
        }
        assert_eq!(daemon.port("b").counter("tx_segments_dropped"), 4 * 4);
    }
}

#[test]
fn a_guest_whose_ring_is_shorter_than_a_frame_has_segments_gets_those_that_fit() {
    for form in [0, feature::RING_PACKED] {
        let daemon = Daemon::with_ports(&["a", "b"]);
        let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS | form));
        let mut b = Nic::up(&daemon.socket("b"), &NicConfig { size: 32, ..config(LINUX | form) });
        meet(&mut a, &mut b);
        let kind = KINDS[0];
        for turn in 1..4 {
            let (header, bytes) = kind.make(b.mac, a.mac, 33 * SEGMENT, turn);
            a.send_behind(&header, &bytes);
            daemon.port_when("b", "it is cut", |port| port.counter("tx_segments_dropped") == turn);
            take_leading(&mut b, kind, &bytes, 32);
            let (header, bytes) = kind.make(b.mac, a.mac, 32 * SEGMENT, turn);
            a.send_behind(&header, &bytes);
            receive_segments(&mut b, kind, &bytes[kind.headers()..]);
        }
    }
}

#[test]
fn large_frames_find_all_the_small_buffers_that_there_are() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
    let mut b = Nic::up(&daemon.socket("b"), &NicConfig { rx_buffer: 1536, ..config(LINUX | GUEST_OFFLOADS) });
    meet(&mut a, &mut b);
    // Each takes 42 of 256 buffers, and all come at once.
    let sent: Vec<_> = (0..4).map(|seed| KINDS[0].make(b.mac, a.mac, 64_000, seed)).collect();
    a.drain();
    for (header, bytes) in &sent {
        assert!(a.pairs[0].tx.queue_bytes(header, bytes), "the ring holds them");
    }
    a.pairs[0].tx.queue.publish();
    let got = b.receive(4);
    assert!(got.iter().map(|(_, received)| &received.frame).eq(sent.iter().map(|(_, bytes)| bytes)));
    assert_eq!(daemon.port("a").all_drops(), 0);
}

#[test]
fn the_mtu_is_that_of_the_segments() {
    let daemon = Daemon::start(|dir| two(dir, "").replacen("network: lan }", "network: lan, mtu: 1440 }", 1));
    let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
    let mut b = Nic::up(&daemon.socket("b"), &config(LINUX | GUEST_OFFLOADS));
    let sent = KINDS[0].make(b.mac, a.mac, 20_000, 1);
    a.send_behind(&sent.0, &sent.1);
    receive_whole(&mut b, KINDS[0], &sent);
    let mut longer = sent.clone();
    longer.0[4..6].copy_from_slice(&(SEGMENT as u16 + 1).to_le_bytes());
    a.send_behind(&longer.0, &longer.1);
    let port = daemon.port_when("a", "it is dropped", |port| port.drops("mtu-exceeded") == 1);
    assert_eq!(port.counter("mtu_exceeded_bytes"), 54 + 1401);
    for (turn, more) in [60, 20].into_iter().enumerate() {
        longer.0[4..6].copy_from_slice(&(SEGMENT as u16 + more).to_le_bytes());
        a.send_behind(&longer.0, &longer.1);
        let port = daemon.port_when("a", "it is dropped", |port| port.drops("mtu-exceeded") == turn as u64 + 2);
        assert_eq!(port.counter("mtu_exceeded_bytes"), 54 + 1460, "the largest one");
    }
    // The same the other way: what the port is given, a frame and segments.
    b.send(&frame(a.mac, b.mac, 1454, 1));
    b.send(&frame(a.mac, b.mac, 1455, 2));
    b.send(&frame(a.mac, b.mac, 60, 3));
    assert_eq!(a.receive(2).iter().map(|(_, got)| got.frame.len()).collect::<Vec<_>>(), [1454, 60]);
    let port = daemon.port_when("a", "it is dropped", |port| port.counter("tx_dropped") == 1);
    assert_eq!(port.counter("mtu_exceeded_bytes"), 54 + 1460, "still the largest one");
    assert_eq!(daemon.port("b").drops("mtu-exceeded"), 1);
}

/// A large frame whose headers are as long as the rest says, and its virtio-net header. Nothing here checks checksums.
#[derive(Clone, Copy, Debug)]
struct LongHeaders {
    v6: bool,
    udp: bool,
    tags: usize,
    /// Bytes of IPv4 options, or of an IPv6 extension header.
    options: usize,
    /// Bytes of TCP's header.
    tcp: usize,
}

impl LongHeaders {
    /// Bytes before the payload, without tags.
    fn len(self) -> usize {
        14 + if self.v6 { 40 } else { 20 } + self.options + if self.udp { 8 } else { self.tcp }
    }

    fn make(self, to: [u8; 6], from: [u8; 6], payload: usize, size: usize) -> ([u8; 12], Vec<u8>) {
        let Self { v6, udp, tags, options, tcp } = self;
        let protocol = if udp { 17 } else { 6 };
        let mut bytes = [to, from].concat();
        bytes.extend([0x81, 0, 0, 5].repeat(tags));
        let total = (self.len() - 14 + payload) as u16;
        if v6 {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend((total - 40).to_be_bytes());
            bytes.extend([if options > 0 { 60 } else { protocol }, 64]);
            bytes.extend(1..=32);
            if options > 0 {
                bytes.extend([protocol, (options / 8 - 1) as u8]);
                bytes.extend(vec![0; options - 2]);
            }
        } else {
            bytes.extend([8, 0, 0x45 + options as u8 / 4, 0]);
            bytes.extend(total.to_be_bytes());
            bytes.extend([0, 7, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            bytes.extend(vec![1; options]);
        }
        let start = bytes.len();
        bytes.extend([0x9c, 0x40, 0, 53]);
        if udp {
            bytes.extend([0; 4]);
        } else {
            bytes.extend([0, 0, 0, 0, 0, 0, 0, 1, (tcp as u8 / 4) << 4, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
            bytes.extend(vec![1; tcp - 20]);
        }
        bytes.resize(bytes.len() + payload, 0x55);
        let kind = match (udp, v6) {
            (true, _) => 5,
            (_, false) => 1,
            (_, true) => 4,
        };
        let [size, start] = [size as u16, start as u16].map(u16::to_le_bytes);
        ([1, kind, 0, 0, size[0], size[1], start[0], start[1], if udp { 6 } else { 16 }, 0, 0, 0], bytes)
    }
}

#[test]
fn the_mtu_counts_every_byte_of_long_headers() {
    let long = |v6, udp, tags, options, tcp| LongHeaders { v6, udp, tags, options, tcp };
    let kinds = [
        long(false, false, 0, 0, 20),
        long(false, false, 0, 40, 60),
        long(false, false, 2, 40, 60),
        long(false, true, 1, 40, 0),
        long(true, false, 0, 0, 60),
        long(true, false, 0, 64, 60),
        long(true, false, 2, 128, 60),
        long(true, true, 0, 192, 0),
    ];
    // Who has the MTU: the sender, or the receiver.
    for bounded in ["a", "b"] {
        let daemon = Daemon::start(|dir| {
            let more = |name| if name == bounded { ", mtu: 1500" } else { "" };
            let ports = ["a", "b"].map(|name| daemon::port_with(dir, name, "lan", "server", more(name)));
            daemon::preamble(dir) + "networks: { lan: {} }\nports:\n" + &ports.concat()
        });
        let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
        let mut b = Nic::up(&daemon.socket("b"), &config(LINUX));
        meet(&mut a, &mut b);
        let mut refused = 0;
        for kind in kinds {
            let longest = 1514 - kind.len();
            let (header, bytes) = kind.make(b.mac, a.mac, 3 * longest, longest);
            a.send_behind(&header, &bytes);
            let got: Vec<_> = b.receive(3).iter().map(|(_, got)| got.frame.len()).collect();
            assert_eq!(got, [1514 + 4 * kind.tags; 3], "{kind:?}, MTU of {bounded}");
            for over in [1, 40] {
                let (header, bytes) = kind.make(b.mac, a.mac, 3 * longest, longest + over);
                a.send_behind(&header, &bytes);
                a.drain();
                refused += 1;
                let port = daemon.port_when("a", "the frame has its end", |port| {
                    port.counter("rx_frames") == port.counter("rx_delivered") + port.counter("rx_dropped")
                });
                assert_eq!(port.drops("mtu-exceeded"), refused, "{kind:?}, {over} over the MTU of {bounded}");
                assert_eq!(b.poll().len(), 0);
            }
        }
    }
}

/// A configuration of `a` and `b` on one network, `b` with `more` keys.
fn two(dir: &std::path::Path, more: &str) -> String {
    let ports = [("a", ""), ("b", more)].map(|(name, more)| daemon::port_with(dir, name, "lan", "server", more));
    daemon::preamble(dir) + "networks: { lan: {} }\nports:\n" + &ports.concat()
}

#[test]
fn what_a_guest_is_left_with_changes_while_it_runs() {
    let daemon = Daemon::start(|dir| two(dir, ""));
    let mut a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS));
    let mut b = Nic::up(&daemon.socket("b"), &config(LINUX | GUEST_OFFLOADS));
    let kind = KINDS[0];
    let sent = kind.make(b.mac, a.mac, 20_000, 1);
    a.send_behind(&sent.0, &sent.1);
    receive_whole(&mut b, kind, &sent);
    std::fs::write(daemon.dir().join("linecard.yaml"), two(daemon.dir(), ", offloads: { csum: false }")).unwrap();
    daemon.linecard(&["apply"]).unwrap();
    a.send_behind(&sent.0, &sent.1);
    receive_segments(&mut b, kind, &sent.1[kind.headers()..]);
    std::fs::write(daemon.dir().join("linecard.yaml"), two(daemon.dir(), ", offloads: { uso: false }")).unwrap();
    daemon.linecard(&["apply"]).unwrap();
    a.send_behind(&sent.0, &sent.1);
    receive_whole(&mut b, kind, &sent);
    assert_eq!(daemon.port("b").state(), "up");
}

#[test]
fn what_is_offered_follows_from_the_named_set_alone() {
    let daemon = Daemon::start(|dir| two(dir, ", compat: \"2026.11-no-offload\", offloads: { csum: true }"));
    let a = Nic::up(&daemon.socket("a"), &config(LINUX | HOST_OFFLOADS | GUEST_OFFLOADS));
    let b = Nic::up(&daemon.socket("b"), &config(LINUX | HOST_OFFLOADS | GUEST_OFFLOADS));
    assert_eq!(a.vmm.offered & !b.vmm.offered, HOST_OFFLOADS | GUEST_OFFLOADS);
    assert_eq!(b.vmm.offered & (HOST_OFFLOADS | GUEST_OFFLOADS), 0);
    let offer = |name| {
        let port = daemon.port(name).0;
        (port["compat"].clone(), port["detail"]["offered"]["features"].clone())
    };
    let told = |set: &str, bits: u64| (set.into(), format!("{bits:#x}").into());
    let offers = [told("2026.11", a.vmm.offered), told("2026.11-no-offload", b.vmm.offered)];
    assert_eq!([offer("a"), offer("b")], offers);
    drop((a, b));
    for name in ["a", "b"] {
        daemon.port_when(name, "its VM is gone", |port| port.state() == "down");
    }
    assert_eq!([offer("a"), offer("b")], offers, "it is told without a VM, too");
}
