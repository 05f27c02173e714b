//! Rings in all their forms: split and packed, every combination of header, merging, indirect tables, event index and order, with
//! frames of every interesting length, flooded and to one port. Whatever is received is delivered or dropped for a reason.

#![allow(clippy::unwrap_used)]

mod frontend;

use frontend::daemon::Daemon;
use frontend::driver::{Received, Shape};
use frontend::frame::{BROADCAST, assert_same, frame, mac};
use frontend::nic::{LINUX, Nic, NicConfig, carry, exchange, meet};
use frontend::ram::{GuestRam, Region};
use frontend::ring::Desc;
use frontend::session::feature;
use frontend::vmm::Kind;

/// Around the sizes at which something changes: Ethernet's least, a cache line with and without the header, a copied
/// head, MTU 1500 with and without tag, a page, MTU 9000.
const LENGTHS: [usize; 20] =
    [14, 15, 52, 53, 59, 60, 61, 63, 64, 65, 76, 77, 127, 128, 1513, 1514, 1518, 4096, 9013, 9014];

const HEADER_FORMS: [u64; 4] = [0, feature::MRG_RXBUF, feature::VERSION_1, feature::MRG_RXBUF | feature::VERSION_1];

/// A configuration that takes frames of 9014 bytes: in one buffer, or merged from small ones.
fn jumbo(features: u64, shape: Shape) -> NicConfig {
    let merges = features & feature::MRG_RXBUF != 0;
    NicConfig {
        features: features | feature::ANY_LAYOUT,
        indirect: true,
        shape,
        rx_shape: shape,
        size: 128,
        tx_buffer: 9216,
        rx_buffer: if merges { 1536 } else { 9216 },
        ..NicConfig::default()
    }
}

/// What a port has received, delivered and dropped.
fn counts(daemon: &Daemon, port: &str) -> [u64; 3] {
    let port = daemon.port(port);
    ["rx_frames", "rx_delivered", "rx_dropped"].map(|name| port.counter(name))
}

/// Checks the virtio-net header of a frame without offloads: zero but for `num_buffers`.
#[track_caller]
fn check_header(got: &Received) {
    assert_eq!(got.header[..10], [0; 10], "no offload was negotiated");
    if let Some(count) = got.num_buffers() {
        assert_eq!(usize::from(count), got.buffers, "num_buffers is set in every form that has it");
    }
}

#[test]
fn every_combination_carries_every_frame() {
    let daemon = Daemon::with_ports(&["a", "b", "c"]);
    for header in HEADER_FORMS {
        // A packed ring always goes with VERSION_1.
        let forms = if header & feature::VERSION_1 != 0 { 16 } else { 8u64 };
        for bits in 0..forms {
            let option = |bit: u64, feature: u64| if bits & bit != 0 { feature } else { 0 };
            let features = header
                | option(1, feature::INDIRECT_DESC)
                | option(2, feature::EVENT_IDX)
                | option(4, feature::IN_ORDER)
                | option(8, feature::RING_PACKED);
            for shape in [Shape::Joined, Shape::HeaderApart, Shape::Pieces(700)] {
                flood_then_unicast(&daemon, &jumbo(features, shape));
            }
        }
    }
}

/// Each length from `a`, first to an address that nobody has, so that `b` and `c` get it, then to `b` alone.
fn flood_then_unicast(daemon: &Daemon, config: &NicConfig) {
    let what = format!("features {:#x}, {:?}", config.features, config.shape);
    let [mut a, mut b, mut c] = ["a", "b", "c"].map(|port| Nic::up(&daemon.socket(port), config));
    meet(&mut a, &mut c);
    meet(&mut a, &mut b);
    c.poll();
    let before = counts(daemon, "a");
    for (seed, len) in LENGTHS.into_iter().enumerate() {
        let to_nobody = frame(mac(0x00de_ad00), a.mac, len, seed as u64);
        a.send(&to_nobody);
        for nic in [&mut b, &mut c] {
            let got = &nic.receive(1)[0].1;
            assert_same(&got.frame, &to_nobody, &what);
            check_header(got);
        }
    }
    for (seed, len) in LENGTHS.into_iter().enumerate() {
        let to_b = frame(b.mac, a.mac, len, seed as u64);
        a.send(&to_b);
        let got = &b.receive(1)[0].1;
        assert_same(&got.frame, &to_b, &what);
        check_header(got);
    }
    let last = frame(BROADCAST, a.mac, 60, 0);
    a.send(&last);
    assert_same(&c.receive(1)[0].1.frame, &last, "c hears nothing that is for b");
    a.drain();
    let sent = 2 * LENGTHS.len() as u64 + 1;
    let expected = [before[0] + sent, before[1] + sent, before[2]];
    daemon.port_when("a", &format!("{what}: {sent} frames are accounted for"), |port| {
        ["rx_frames", "rx_delivered", "rx_dropped"].map(|name| port.counter(name)) == expected && port.is_conserved()
    });
}

#[test]
fn ports_with_different_headers_understand_each_other() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    for first in HEADER_FORMS {
        for second in HEADER_FORMS {
            let mut a = Nic::up(&daemon.socket("a"), &jumbo(first, Shape::Joined));
            let mut b = Nic::up(&daemon.socket("b"), &jumbo(second, Shape::Pieces(333)));
            meet(&mut a, &mut b);
            for (seed, len) in LENGTHS.into_iter().enumerate() {
                let there = frame(b.mac, a.mac, len, seed as u64);
                a.send(&there);
                assert_same(&b.receive(1)[0].1.frame, &there, "there");
                let back = frame(a.mac, b.mac, len, !seed as u64);
                b.send(&back);
                assert_same(&a.receive(1)[0].1.frame, &back, "and back");
            }
        }
    }
}

#[test]
fn rings_of_every_size_wrap() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let split = [1, 2, 4, 64, 256, 1024, 4096, 32768].map(|size| (size, LINUX));
    let packed = [1, 2, 3, 5, 64, 255, 300, 1024, 9999, 32768].map(|size| (size, LINUX | feature::RING_PACKED));
    for (size, features) in split.into_iter().chain(packed) {
        let config = NicConfig { size, features, tx_buffer: 2048, rx_buffer: 2048, ..NicConfig::default() };
        let mut a = Nic::up(&daemon.socket("a"), &config);
        let mut b = Nic::up(&daemon.socket("b"), &config);
        meet(&mut a, &mut b);
        exchange(&mut a, &mut b, (3 * usize::from(size)).min(2000));
    }
}

#[test]
fn the_sixteen_bit_indices_wrap() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    for features in [LINUX, LINUX | feature::IN_ORDER, feature::ANY_LAYOUT] {
        let config = NicConfig { size: 1024, features, ..NicConfig::default() };
        let mut a = Nic::up(&daemon.socket("a"), &config);
        let mut b = Nic::up(&daemon.socket("b"), &config);
        meet(&mut a, &mut b);
        for round in 0..70_000u64 / 100 {
            let sent: Vec<_> = (0..100).map(|at| frame(b.mac, a.mac, 60, round * 100 + at)).collect();
            for frame in &sent {
                assert!(a.pairs[0].tx.queue_frame(frame));
            }
            a.pairs[0].tx.queue.publish();
            for ((_, got), sent) in b.receive(sent.len()).iter().zip(&sent) {
                assert_same(&got.frame, sent, "around a wrap");
            }
        }
        assert!(a.pairs[0].tx.queue.ring.avail_idx() < 20_000, "the index has wrapped");
    }
}

#[test]
fn packed_and_split_rings_understand_each_other() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let mut a = Nic::up(&daemon.socket("a"), &jumbo(LINUX | feature::RING_PACKED, Shape::Pieces(333)));
    let mut b = Nic::up(&daemon.socket("b"), &jumbo(LINUX, Shape::Joined));
    meet(&mut a, &mut b);
    exchange(&mut a, &mut b, 500);
}

#[test]
fn a_packed_ring_goes_on_where_it_was_stopped() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    for kind in [Kind::Qemu72, Kind::Qemu10, Kind::Dpdk] {
        for features in [LINUX | feature::RING_PACKED, LINUX | feature::RING_PACKED | feature::IN_ORDER] {
            let config = NicConfig { size: 128, features, ..NicConfig::of(kind) };
            let mut a = Nic::up(&daemon.socket("a"), &config);
            let mut b = Nic::up(&daemon.socket("b"), &config);
            meet(&mut a, &mut b);
            for count in [1, 37, 127, 128, 200] {
                exchange(&mut a, &mut b, count);
                a.stop().unwrap();
                let next = a.pairs[0].tx.queue.place().unwrap().word();
                assert_eq!(a.vmm.vrings[1].base, next, "all that was sent was taken");
                a.cont().unwrap();
            }
            // A guest that binds its driver anew begins at the first slot, and may take the other form.
            a.rebind(features ^ feature::RING_PACKED).unwrap();
            meet(&mut a, &mut b);
            exchange(&mut a, &mut b, 10);
            a.rebind(features).unwrap();
            meet(&mut a, &mut b);
            exchange(&mut a, &mut b, 110);
        }
    }
}

/// Two regions side by side in guest-physical addresses, in files of their own and far apart in the VMM.
fn split_ram() -> (std::sync::Arc<GuestRam>, u64) {
    const HALF: u64 = 16 << 20;
    let low = Region::new(0x10_0000, 0x7000_0000_0000, HALF);
    let high = Region::new(0x10_0000 + HALF, 0x6000_0000_0000, HALF);
    let ram = GuestRam::new(vec![low, high]);
    let seam = ram.alloc_in(0x10_0000 + HALF, 4096, 4096);
    (ram, seam)
}

#[test]
fn buffers_may_cross_from_one_region_into_the_next() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let (ram_a, seam_a) = split_ram();
    let (ram_b, seam_b) = split_ram();
    let config = |ram| NicConfig { ram: Some(ram), ..NicConfig::default() };
    let mut a = Nic::up(&daemon.socket("a"), &config(ram_a.clone()));
    let mut b = Nic::up(&daemon.socket("b"), &config(ram_b.clone()));
    meet(&mut a, &mut b);
    // An empty RX ring for b, whose only buffer at any time is one on the seam.
    b.stop().unwrap();
    b.pairs[0].rx.reset(LINUX);
    b.vmm.vrings[0].base = 0;
    b.cont().unwrap();
    for before in [1, 5, 11, 12, 13, 26, 76, 500, 511] {
        let sent = frame(b.mac, a.mac, 500, before);
        let at = seam_a - before;
        ram_a.write(at, &[0; 12]);
        ram_a.write(at + 12, &sent);
        let into = seam_b - before;
        b.pairs[0].rx.queue.add(&[Desc::writable(into, 2048)], false).unwrap();
        b.pairs[0].rx.queue.publish();
        a.pairs[0].tx.queue.add(&[Desc::readable(at, 512)], false).unwrap();
        a.pairs[0].tx.queue.publish();
        let used = frontend::eventually("the buffer on the seam is used", || b.pairs[0].rx.queue.collect().pop());
        assert_eq!(used.len, Some(512));
        assert_same(&ram_b.bytes(into + 12, 500), &sent, "across the seam");
        a.drain();
    }
}

#[test]
fn direct_descriptors_may_be_followed_by_an_indirect_one() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let mut a = Nic::up(&daemon.socket("a"), &NicConfig::default());
    let mut b = Nic::up(&daemon.socket("b"), &NicConfig::default());
    meet(&mut a, &mut b);
    let sent = frame(b.mac, a.mac, 300, 1);
    let ram = a.vmm.ram.clone();
    let (buffer, table) = (ram.alloc(512, 64), ram.alloc(64, 16));
    ram.write(buffer, &[0; 12]);
    ram.write(buffer + 12, &sent);
    ram.write(table, &Desc::readable(buffer + 12, 100).then(1).to_bytes());
    ram.write(table + 16, &Desc::readable(buffer + 112, 200).to_bytes());
    let indirect = Desc { addr: table, len: 32, flags: frontend::ring::INDIRECT, next: 0 };
    a.pairs[0].tx.queue.add(&[Desc::readable(buffer, 12), indirect], false).unwrap();
    a.pairs[0].tx.queue.publish();
    assert_same(&b.receive(1)[0].1.frame, &sent, "direct, then indirect (virtio 1.2, 2.7.5.3.2)");
    exchange(&mut a, &mut b, 16);
}

#[test]
fn a_receiver_without_buffers_costs_frames_and_nothing_else() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let packed = LINUX | feature::RING_PACKED;
    for features in [LINUX, feature::ANY_LAYOUT, LINUX | feature::IN_ORDER, packed, packed | feature::IN_ORDER] {
        let config = NicConfig { size: 64, features, ..NicConfig::default() };
        let mut a = Nic::up(&daemon.socket("a"), &config);
        let mut b = Nic::up(&daemon.socket("b"), &config);
        meet(&mut a, &mut b);
        let (before, full) = (counts(&daemon, "a"), daemon.port("a").drops("ring-full"));
        for at in 0..300 {
            a.send(&frame(b.mac, a.mac, 60, at));
        }
        a.drain();
        let port = daemon.port_when("a", "300 frames have had their end", |port| {
            port.counter("rx_frames") == before[0] + 300 && port.is_conserved()
        });
        assert_eq!(port.counter("rx_delivered"), before[1] + 64, "as many as there were buffers");
        assert_eq!(port.drops("ring-full"), full + 300 - 64);
        for (at, (_, got)) in b.receive(64).iter().enumerate() {
            assert_same(&got.frame, &frame(b.mac, a.mac, 60, at as u64), "the first ones made it");
        }
        exchange(&mut a, &mut b, 32);
    }
}

#[test]
fn a_frame_that_does_not_fit_is_dropped_for_that_reason() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let sender = NicConfig { tx_buffer: 9216, ..NicConfig::default() };
    let receiver = NicConfig { features: feature::VERSION_1, rx_buffer: 1526, ..NicConfig::default() };
    let mut a = Nic::up(&daemon.socket("a"), &sender);
    let mut b = Nic::up(&daemon.socket("b"), &receiver);
    meet(&mut a, &mut b);
    for at in 0..10 {
        a.send(&frame(b.mac, a.mac, 1515, at));
        let fits = frame(b.mac, a.mac, 1514, at);
        a.send(&fits);
        assert_same(&b.receive(1)[0].1.frame, &fits, "a frame that fills its buffer");
    }
    let port = daemon.port_when("a", "the drops are counted", |port| port.drops("buffer-too-small") == 10);
    assert!(port.is_conserved());
}

#[test]
fn nobody_to_deliver_to_is_a_reason_too() {
    let daemon = Daemon::with_ports(&["a"]);
    let mut a = Nic::up(&daemon.socket("a"), &NicConfig::default());
    for at in 0..10 {
        a.send(&frame(mac(0x00de_ad00), a.mac, 60, at));
    }
    a.drain();
    daemon.port_when("a", "the drops are counted", |port| port.drops("no-destination") == 10 && port.is_conserved());
}

#[test]
fn interrupts_stay_away_when_asked_and_come_back() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let packed = LINUX | feature::RING_PACKED;
    for features in [LINUX, LINUX & !feature::EVENT_IDX, packed, packed & !feature::EVENT_IDX] {
        let config = NicConfig { features, ..NicConfig::default() };
        let mut a = Nic::up(&daemon.socket("a"), &config);
        let mut b = Nic::up(&daemon.socket("b"), &config);
        meet(&mut a, &mut b);
        a.pairs[0].tx.queue.set_quiet(true);
        b.pairs[0].rx.queue.set_quiet(true);
        // The first ones are for what was under way, or unconditional after a start.
        carry(&mut a, &mut b, 32);
        let before = [a.pairs[0].tx.queue.take_calls(), b.pairs[0].rx.queue.take_calls()];
        carry(&mut a, &mut b, 500);
        let after = [a.pairs[0].tx.queue.take_calls(), b.pairs[0].rx.queue.take_calls()];
        assert_eq!(after, before, "interrupts that were not wanted, features {features:#x}");
        a.pairs[0].tx.queue.set_quiet(false);
        b.pairs[0].rx.queue.set_quiet(false);
        carry(&mut a, &mut b, 32);
        assert!(b.pairs[0].rx.queue.take_calls() > before[1]);
    }
}

#[test]
fn an_interrupt_covers_a_burst() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let mut a = Nic::up(&daemon.socket("a"), &NicConfig::default());
    let mut b = Nic::up(&daemon.socket("b"), &NicConfig::default());
    meet(&mut a, &mut b);
    let before = b.pairs[0].rx.queue.take_calls();
    let bursts = 50;
    for burst in 0..bursts {
        let sent: Vec<_> = (0..32).map(|at| frame(b.mac, a.mac, 60, burst * 32 + at)).collect();
        for frame in &sent {
            assert!(a.pairs[0].tx.queue_frame(frame));
        }
        a.pairs[0].tx.queue.publish();
        for ((_, got), sent) in b.receive(sent.len()).iter().zip(&sent) {
            assert_same(&got.frame, sent, "a burst");
        }
    }
    let calls = b.pairs[0].rx.queue.take_calls() - before;
    assert!(calls < bursts * 32 / 4, "{calls} interrupts for {} frames in {bursts} bursts", bursts * 32);
}

#[test]
fn many_senders_on_many_queues_lose_nothing_to_a_receiver_with_room() {
    let daemon = Daemon::with_ports(&["a", "b", "c"]);
    let config = NicConfig { pairs: 4, enabled_pairs: 4, size: 1024, ..NicConfig::of(Kind::Qemu72) };
    let [mut a, mut b, mut c] = ["a", "b", "c"].map(|port| Nic::up(&daemon.socket(port), &config));
    meet(&mut a, &mut c);
    meet(&mut b, &mut c);
    for round in 0..100 {
        let mut sent = Vec::new();
        for pair in 0..4 {
            for at in 0..16 {
                let seed = (round * 4 + pair as u64) * 16 + at;
                sent.push(frame(c.mac, a.mac, 60 + 10 * pair, seed));
                a.send_on(pair, sent.last().unwrap());
                sent.push(frame(c.mac, b.mac, 60 + 10 * pair, seed));
                b.send_on(pair, sent.last().unwrap());
            }
        }
        let mut got: Vec<_> = c.receive(sent.len()).into_iter().map(|(_, got)| got.frame).collect();
        got.sort();
        sent.sort();
        assert!(got == sent, "round {round}: the same frames, each once");
    }
    for port in ["a", "b", "c"] {
        daemon.port_when(port, "every frame has had its end", |port| port.is_conserved());
    }
}

/// The longest rings, full of the longest chains that a frame may be, in tables: more than once round, so that indexes wrap.
#[test]
fn rings_of_32768_full_of_indirect_chains_go_round() {
    const SIZE: u16 = 32768;
    let daemon = Daemon::with_ports(&["a", "b"]);
    for form in [0, feature::RING_PACKED] {
        let small =
            NicConfig { features: LINUX | form, size: SIZE, tx_buffer: 128, rx_buffer: 128, ..NicConfig::default() };
        let config = |shape, rx_shape| {
            let ram = Some(GuestRam::qemu(256 << 20));
            NicConfig { indirect: true, shape, rx_shape, ram, ..small.clone() }
        };
        let mut a = Nic::up(&daemon.socket("a"), &config(Shape::Pieces(20), Shape::Joined));
        let mut b = Nic::up(&daemon.socket("b"), &config(Shape::Joined, Shape::Pieces(70)));
        meet(&mut a, &mut b);
        for round in 0..4u64 {
            let sent: Vec<_> = (0..u64::from(SIZE) / 2).map(|at| frame(b.mac, a.mac, 60, round << 32 | at)).collect();
            for frame in &sent {
                assert!(a.pairs[0].tx.queue_frame(frame), "room for half a ring");
            }
            a.pairs[0].tx.queue.publish();
            let got = b.receive(sent.len());
            assert!(got.iter().zip(&sent).all(|((_, got), sent)| got.frame == *sent), "form {form:#x}, round {round}");
            a.drain();
        }
        assert_eq!(daemon.port("a").all_drops(), 0);
    }
}
