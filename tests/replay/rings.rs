//! What drivers write into their rings.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::frontend::daemon::Daemon;
use super::frontend::frame::{BROADCAST, assert_same, frame};
use super::frontend::large::{KINDS, SEGMENT};
use super::frontend::nic::{LINUX, Nic, NicConfig, exchange};
use super::frontend::packed::Packed;
use super::frontend::queue::Queue;
use super::frontend::ram::memfd;
use super::frontend::random::Random;
use super::frontend::ring::{DESC_LEN, Desc, INDIRECT, NEXT, Ring};
use super::frontend::session::{Session, feature};
use super::frontend::vmm::{Kind, Vring};
use super::frontend::witness::Witness;
use super::frontend::{driver, eventually};
use super::{Mutator, RX, Scene, TX};

/// Linux vhost: with IN_ORDER the used index wrapped by one subtraction, wrong for a batch longer than the ring, and the
/// dirty log was written behind its end.
#[test]
fn cve_2026_99686_in_order_batches_longer_than_the_ring_and_the_end_of_the_log() {
    for (form, sizes) in [(0, [2, 8, 32, 64]), (feature::RING_PACKED, [2, 5, 32, 63])] {
        for size in sizes {
            let features = LINUX | feature::IN_ORDER | form;
            let mut scene = Scene::with(NicConfig { features, size, ..NicConfig::default() });
            let end = scene.bad.vmm.ram.regions().iter().map(|region| region.gpa + region.len).max().unwrap();
            let len = end.div_ceil(8 * 4096);
            let log = memfd(len + 8192);
            scene.bad.session().set_log_base(&log, 0, len).unwrap();
            scene.bad.session().set_features(scene.bad.features() | feature::LOG_ALL, true).unwrap();
            for round in 0..8 {
                // More in one batch than there are places; what finds none is dropped, and the driver checks the rest.
                for at in 0..64 {
                    scene.peer.pairs[0].tx.queue_frame(&frame(scene.bad.mac, scene.peer.mac, 60 + at, round));
                    scene.bad.pairs[0].tx.queue_frame(&frame(scene.peer.mac, scene.bad.mac, 60 + at, round));
                }
                scene.peer.pairs[0].tx.queue.publish();
                scene.bad.pairs[0].tx.queue.publish();
                scene.peer.drain();
                scene.bad.drain();
                scene.bad.poll();
                scene.peer.poll();
            }
            exchange(&mut scene.bad, &mut scene.peer, 200);
            assert_eq!(tail(&log, len), 0, "ring of {size}: the log goes on behind its end");
            scene.finish();
        }
    }
}

/// The same: a log that ends within the guest's memory.
#[test]
fn cve_2026_99686_a_log_that_ends_before_the_memory_does() {
    let scene = Scene::with(NicConfig::default());
    let Scene { mut bad, mut peer, daemon: _daemon, witness } = scene;
    // Half a MiB above 4 GiB, which is where rings and buffers lie.
    let len = (4 << 30) / 8 / 4096 + 1;
    let log = memfd(len + 8192);
    let taken = bad.session().set_log_base(&log, 0, len).is_ok();
    if taken {
        bad.session().set_features(bad.features() | feature::LOG_ALL, true).unwrap();
        exchange(&mut bad, &mut peer, 200);
    }
    assert_eq!(tail(&log, len), 0, "the log goes on behind its end");
    assert!(!taken, "a log that ends before the memory does was accepted");
    assert!(witness.finish() > 0);
}

/// Bits that are set behind byte `len`.
fn tail(log: &std::fs::File, len: u64) -> u32 {
    let mut bytes = [0; 8192];
    log.read_exact_at(&mut bytes, len).unwrap();
    bytes.iter().map(|byte| byte.count_ones()).sum()
}

/// Linux vhost: a receiver that merges and has too few buffers had the sender's thread try again at once, for ever.
#[test]
fn cve_2026_74356_a_receiver_with_one_buffer_makes_nobody_spin() {
    let daemon = Daemon::with_ports(&["bad", "peer"]);
    let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
    let large =
        NicConfig { features: LINUX | feature::HOST_OFFLOADS, tx_buffer: 65_600, size: 16, ..NicConfig::default() };
    let mut peer = Nic::up(&daemon.socket("peer"), &large);
    let config = NicConfig { features: LINUX | feature::GUEST_OFFLOADS, rx_buffer: 300, ..NicConfig::default() };
    let mut bad = Nic::prepare(Session::connect(&daemon.socket("bad")).unwrap(), &config).unwrap();
    bad.pairs[0].rx.post(1);
    bad.vmm.probe().unwrap();
    bad.vmm.start().unwrap();
    bad.vmm.settle().unwrap();
    eventually("the peer hears the guest", || {
        bad.send(&frame(BROADCAST, bad.mac, 60, 1));
        peer.poll().iter().any(|(_, got)| got.frame[6..12] == bad.mac).then_some(())
    });
    let (header, bytes) = KINDS[0].make(bad.mac, peer.mac, 40 * SEGMENT, 1);
    for _ in 0..100 {
        peer.send_behind(&header, &bytes);
    }
    peer.drain();
    witness.keeps_going();
    daemon.port_when("peer", "each frame has had its end", |port| port.is_conserved());
    assert!(witness.finish() > 0);
    // Nobody talks now, and so nobody has anything to do.
    let before = daemon.processor_time();
    std::thread::sleep(Duration::from_secs(1));
    let spent = daemon.processor_time() - before;
    assert!(spent < Duration::from_millis(500), "{spent:?} of processor time in a second in which nothing happened");
}

/// Receive buffers with a runt of `len` bytes, by the lengths of their descriptors: alone, before another, before one that has
/// room for the rest, and behind a long one. Guests that merge may have the same in buffers of their own.
fn with_runt(len: u32, header: u32, merging: bool) -> Vec<Vec<Vec<u32>>> {
    let (rest, most) = (header + 60, header + 40);
    let chains = [vec![len], vec![len, 13 - len], vec![len, rest], vec![most, len], vec![most, len, 60]];
    let apart = chains[1..].iter().map(|chain| chain.iter().map(|&len| vec![len]).collect());
    let apart: Vec<_> = apart.filter(|_| merging).collect();
    chains.iter().map(|chain| vec![chain.clone()]).chain(apart).collect()
}

/// DPDK: receive descriptors shorter than a header had the length of the copy underflow, in split and packed rings.
#[test]
fn cve_2026_86566_receive_buffers_shorter_than_a_header() {
    const GAP: u64 = 1024;
    let merging = feature::MRG_RXBUF;
    let modern = feature::VERSION_1 | feature::INDIRECT_DESC;
    let packed = modern | feature::RING_PACKED;
    for features in [feature::ANY_LAYOUT, merging, modern, modern | merging, packed, packed | merging] {
        let mut scene = Scene::with(NicConfig { features, ..NicConfig::default() });
        let header = driver::header_len(scene.bad.features()) as u32;
        let ram = scene.bad.vmm.ram.clone();
        let at = ram.alloc(4 * GAP, 64);
        let merges = features & merging != 0;
        let cases = (0..=13).flat_map(|len| with_runt(len, header, merges)).enumerate();
        for (number, buffers) in cases {
            let what = format!("{features:#x}, buffers of {buffers:?} bytes");
            scene.empty_rx();
            ram.write(at, &[0xa5; 4 * GAP as usize]);
            // Each with a gap behind it.
            let mut places = (at..).step_by(GAP as usize);
            let rx = &mut scene.bad.pairs[0].rx.queue;
            for buffer in &buffers {
                let chain: Vec<_> =
                    buffer.iter().zip(places.by_ref()).map(|(&len, at)| Desc::writable(at, len)).collect();
                rx.add(&chain, false).unwrap();
            }
            rx.publish();
            let sent = frame(scene.bad.mac, scene.peer.mac, 60, number as u64);
            scene.peer.send(&sent);
            scene.peer.drain();
            let lens = buffers.concat();
            let bytes = ram.bytes(at, 4 * GAP as usize);
            let parts: Vec<_> =
                bytes.chunks(GAP as usize).zip(&lens).map(|(part, &len)| part.split_at(len as usize)).collect();
            assert!(parts.iter().all(|(_, gap)| gap.iter().all(|&byte| byte == 0xa5)), "{what}: {parts:x?}");
            let fits = lens.iter().sum::<u32>() >= header + 60;
            let used = scene.bad.pairs[0].rx.queue.collect();
            assert_eq!(used.len(), if fits { buffers.len() } else { 0 }, "{what}");
            if fits {
                let whole: Vec<u8> = parts.iter().flat_map(|(part, _)| part.iter().copied()).collect();
                assert_same(&whole[header as usize..][..60], &sent, &what);
                assert!(
                    !merges || whole[10..12] == (buffers.len() as u16).to_le_bytes(),
                    "{what}: {:x?}",
                    &whole[..12]
                );
            }
        }
        scene.finish();
    }
}

/// DPDK: the length of an indirect table was read twice.
#[test]
fn cve_2026_93683_indirect_tables_whose_length_changes() {
    let mut scene = Scene::with(NicConfig { size: 64, ..NicConfig::default() });
    let ram = scene.bad.vmm.ram.clone();
    let sent = frame(scene.peer.mac, scene.bad.mac, 300, 1);
    let at = ram.alloc(512, 64);
    ram.write(at, &[0; 12]);
    ram.write(at + 12, &sent);
    // Two entries, and behind them what must never be taken for a third.
    let (table, secret) = (ram.alloc(8 * DESC_LEN, 16), ram.alloc(64, 64));
    ram.write(secret, &[0x5e; 64]);
    for slot in 2..8 {
        ram.write(table + slot * DESC_LEN, &Desc::readable(secret, 64).to_bytes());
    }
    let ring = scene.bad.vmm.vrings[TX].ring.clone();
    for next in [2, 5, 7, u16::MAX] {
        ram.write(table, &Desc::readable(at, 312).then(next).to_bytes());
        ring.set_desc(0, Desc { addr: table, len: 2 * DESC_LEN as u32, flags: INDIRECT, next: 0 });
        ring.offer(0);
        scene.bad.vmm.vrings[TX].kick.ring();
        scene.daemon.port_when("bad", "an entry behind its table", |port| port.state() == "stopped");
        scene.recover();
    }
    for round in 1..20 {
        let (ring, mut random) = (ring.clone(), Random::new(round));
        ram.write(table, &Desc::readable(at, 12).then(1).to_bytes());
        ram.write(table + DESC_LEN, &Desc::readable(at + 12, 300).to_bytes());
        let changed = ring.clone();
        let mutator = Mutator::start(move || {
            let len = [32, 32, 32, 16, 0, 17, 16 * 1024, !15][random.below(8) as usize];
            changed.set_desc(0, Desc { addr: table, len, flags: INDIRECT, next: 0 });
        });
        for _ in 0..50 {
            ring.offer(0);
            scene.bad.vmm.vrings[TX].kick.ring();
            std::thread::yield_now();
        }
        drop(mutator);
        scene.witness.keeps_going();
        for (_, got) in scene.peer.poll() {
            let stray = got.frame.windows(16).any(|bytes| bytes == [0x5e; 16]);
            assert!(!stray, "bytes from behind the table: {:x?}", got.frame);
        }
        scene.recover();
    }
    scene.finish();
}

/// The same in packed rings, where nothing but its length ends a table.
#[test]
fn cve_2026_93683_packed_rings_whose_tables_change() {
    let features = LINUX | feature::RING_PACKED;
    let mut scene = Scene::with(NicConfig { features, size: 64, ..NicConfig::default() });
    let ram = scene.bad.vmm.ram.clone();
    let sent = frame(scene.peer.mac, scene.bad.mac, 300, 1);
    let (at, table, secret) = (ram.alloc(512, 64), ram.alloc(8 * DESC_LEN, 16), ram.alloc(64, 64));
    ram.write(at, &[0; 12]);
    ram.write(at + 12, &sent);
    ram.write(secret, &[0x5e; 64]);
    let ring = scene.bad.vmm.vrings[TX].ring.clone();
    for round in 0..20 {
        let entries = [Desc::readable(at, 12), Desc::readable(at + 12, 300)].into_iter();
        for (slot, entry) in entries.chain([Desc::readable(secret, 64); 6]).enumerate() {
            ram.write(table + slot as u64 * DESC_LEN, &entry.to_packed_entry());
        }
        let (changed, mut random) = (ring.clone(), Random::new(round));
        let scribble = move || {
            let lens = [32, 32, 32, 16, 0, 17, 16 * 1025, !15u32];
            let (slot, len) = (random.below(64), lens[random.below(8) as usize]);
            changed.ram.write(changed.desc + slot * DESC_LEN + 8, &len.to_le_bytes());
            let len = [300, 300, 60, 0, u32::MAX][random.below(5) as usize];
            changed.ram.write(table + DESC_LEN + 8, &len.to_le_bytes());
        };
        // The first time nobody does.
        let mutator = (round > 0).then(|| Mutator::start(scribble));
        let mut tx = Packed::new();
        tx.next = scene.bad.pairs[0].tx.queue.place().unwrap();
        for id in 0..50 {
            tx.add(&ring, &[Desc { addr: table, len: 2 * DESC_LEN as u32, flags: INDIRECT, next: 0 }], id);
            tx.publish(&ring);
            scene.bad.vmm.vrings[TX].kick.ring();
            std::thread::yield_now();
        }
        if round == 0 {
            scene.peer.receive(50).iter().for_each(|(_, got)| assert_same(&got.frame, &sent, "out of a table of two"));
        }
        drop(mutator);
        scene.witness.keeps_going();
        for (_, got) in scene.peer.poll() {
            let stray = got.frame.windows(16).any(|bytes| bytes == [0x5e; 16]);
            assert!(!stray, "bytes from behind the table: {:x?}", got.frame);
        }
        scene.recover();
    }
    scene.finish();
}

/// A port whose front end leaves the control queue to us: its first pair, and the command ring as ring 2 (cloud-hypervisor's
/// does). `command` is where a command of three descriptors lies: two to read, one to write.
struct Commanded {
    nic: Nic,
    ring: Ring,
    command: u64,
}

impl Commanded {
    fn start(daemon: &Daemon) -> Self {
        let session = Session::connect(&daemon.socket("bad")).unwrap();
        let features = (LINUX & !feature::MQ) | feature::CTRL_VQ;
        let mut nic = Nic::prepare(session, &NicConfig { features, ..NicConfig::of(Kind::CloudHypervisor) }).unwrap();
        let ram = nic.vmm.ram.clone();
        let queue = Queue::new(Ring::alloc(&ram, 64), nic.features(), false);
        let command = ram.alloc(64, 64);
        let ring = queue.ring.clone();
        nic.vmm.vrings.push(Vring { ring: ring.clone(), kick: queue.kick.clone(), call: queue.call.clone(), base: 0 });
        nic.vmm.enabled_pairs = 2;
        nic.pairs[0].rx.fill();
        Self { nic, ring, command }
    }

    /// VIRTIO_NET_CTRL_RX, PROMISC, off, in as many places as the ring has.
    fn write(&self, lens: [u32; 3]) {
        self.nic.vmm.ram.write(self.command, &[1, 0, 0]);
        self.nic.vmm.ram.write(self.command + 32, &[0xaa]);
        let [head, data, ack] = [0, 2, 32].map(|offset| self.command + offset);
        self.ring.set_desc(0, Desc::readable(head, lens[0]).then(1));
        self.ring.set_desc(1, Desc::readable(data, lens[1]).then(2));
        self.ring.set_desc(2, Desc::writable(ack, lens[2]));
        for _ in 0..8 {
            self.ring.offer(0);
        }
    }

    /// Frames of many flows, so that some go to every queue that is taken for a receive queue.
    fn flows(&self, peer: &mut Nic) {
        for flow in 0..64u8 {
            let (_, mut bytes) = KINDS[2].make(self.nic.mac, peer.mac, 64, flow.into());
            bytes[29] = flow;
            peer.send(&bytes);
        }
        peer.drain();
    }
}

fn command_scene() -> (Witness, Daemon, Nic) {
    let daemon = Daemon::with_ports(&["bad", "peer"]);
    let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
    let peer = Nic::up(&daemon.socket("peer"), &NicConfig::default());
    (witness, daemon, peer)
}

/// DPDK's VDUSE: a command of the control queue was read twice, and its length was not asked. We do not serve that queue;
/// what holds is that nothing of it is ever written to but what a reply may be, and that it harms its own port only.
#[test]
fn cve_2026_86562_and_86564_commands_that_change_and_end_early() {
    let (witness, daemon, mut peer) = command_scene();
    for lens in [[2, 1, 1], [1, 0, 0], [0, 0, 1], [2, 0xffff, 1], [u32::MAX, 1, 1]] {
        let mut bad = Commanded::start(&daemon);
        bad.write(lens);
        let started = bad.nic.vmm.start();
        if let Err(error) = started {
            super::refused::<()>(Err(error), "a ring for commands");
        }
        let (ring, address, mut random) = (bad.ring.clone(), bad.command, Random::new(1));
        let mutator = Mutator::start(move || {
            let len = [0, 1, 2, 64, u32::MAX][random.below(5) as usize];
            ring.set_desc(0, Desc::readable(address, len).then(1));
        });
        for _ in 0..10 {
            bad.nic.vmm.vrings[2].kick.ring();
            bad.flows(&mut peer);
        }
        drop(mutator);
        witness.keeps_going();
        let ram = &bad.nic.vmm.ram;
        assert_eq!(ram.bytes(bad.command, 3), [1, 0, 0], "the command was written to");
        assert!([0xaa, 0, 1].contains(&ram.bytes(bad.command + 32, 1)[0]), "an answer that is none");
        drop(bad);
        daemon.port_when("bad", "it has left", |port| port.state() == "down");
    }
    assert!(witness.finish() > 0);
}

/// DPDK: chains of the control queue that lead back to themselves.
#[test]
fn dpdk_6ec1778134_loops_in_the_control_queue() {
    let (witness, daemon, mut peer) = command_scene();
    for links in [[0, 2], [1, 0], [1, 1], [63, 2], [2, 64]] {
        let mut bad = Commanded::start(&daemon);
        for (flags, write) in [(NEXT, 0), (NEXT, 2)] {
            bad.write([2, 1, 1]);
            let desc = |next| Desc { addr: bad.command + 8, len: 4, flags: flags | write, next };
            bad.ring.set_desc(0, desc(links[0]));
            bad.ring.set_desc(1, desc(links[1]));
            bad.ring.set_desc(63, desc(0));
        }
        let _ = bad.nic.vmm.start();
        for _ in 0..4 {
            bad.nic.vmm.vrings[2].kick.ring();
            bad.flows(&mut peer);
        }
        witness.keeps_going();
        drop(bad);
        daemon.port_when("bad", "it has left", |port| port.state() == "down");
    }
    assert!(witness.finish() > 0);
}

/// DPDK's vhost-crypto: a head beyond the ring, and a chain that goes on where nothing was written.
#[test]
fn cve_2026_86846_and_86847_heads_and_links_that_nobody_wrote() {
    let mut scene = Scene::with(NicConfig { size: 64, ..NicConfig::default() });
    let ram = scene.bad.vmm.ram.clone();
    let at = ram.alloc(512, 64);
    ram.write(at, &[0; 12]);
    ram.write(at + 12, &frame(scene.peer.mac, scene.bad.mac, 300, 1));
    let ring = scene.bad.vmm.vrings[TX].ring.clone();
    for head in [64, 65, 128, 0x7fff, u16::MAX] {
        ring.ram.zero(ring.desc, DESC_LEN * u64::from(ring.size));
        // What a masked head would lead to.
        ring.set_desc(head % 64, Desc::readable(at, 312));
        ring.offer(head);
        scene.bad.vmm.vrings[TX].kick.ring();
        scene.daemon.port_when("bad", "a head beyond the ring", |port| port.state() == "stopped");
        scene.peer.poll();
        scene.recover();
    }
    for next in [64, 127, u16::MAX] {
        ring.ram.zero(ring.desc, DESC_LEN * u64::from(ring.size));
        ring.set_desc(next % 64, Desc::readable(at + 12, 300));
        ring.set_desc(0, Desc::readable(at, 12).then(next));
        ring.offer(0);
        scene.bad.vmm.vrings[TX].kick.ring();
        scene.daemon.port_when("bad", "a link beyond the ring", |port| port.state() == "stopped");
        scene.recover();
    }
    // Zeros: a descriptor of no bytes at address 0, which ends the chain.
    ring.ram.zero(ring.desc, DESC_LEN * u64::from(ring.size));
    ring.set_desc(0, Desc::readable(at, 12).then(9));
    ring.offer(0);
    scene.bad.vmm.vrings[TX].kick.ring();
    scene.recover();
    scene.finish();
}

/// DPDK: addresses that came after GET_VRING_BASE were used though the ring had stopped.
#[test]
fn dpdk_1846fe767f_addresses_after_the_ring_has_stopped() {
    let mut scene = Scene::with(NicConfig::default());
    let ram = scene.bad.vmm.ram.clone();
    let memory = || ram.regions().iter().map(|region| ram.bytes(region.gpa, region.len as usize)).collect::<Vec<_>>();
    scene.bad.stop().unwrap();
    let before = memory();
    let ring = scene.bad.vmm.vrings[RX].ring.clone();
    for index in [0, 1] {
        let ring = &scene.bad.vmm.vrings[index as usize].ring;
        scene.bad.session().set_vring_addr(index, ring, true).unwrap();
    }
    for at in 0..100 {
        scene.peer.send(&frame(scene.bad.mac, scene.peer.mac, 300, at));
    }
    scene.peer.drain();
    assert!(memory() == before, "a ring that has stopped was written to");
    // Its memory goes, and its addresses come again.
    for region in ram.regions() {
        scene.bad.session().rem_mem_reg(&region, true).unwrap();
    }
    let placed = scene.bad.session().set_vring_addr(0, &ring, true);
    let started = placed.and_then(|()| scene.bad.session().set_vring_kick(0, &scene.bad.vmm.vrings[RX].kick, true));
    let port = scene.daemon.port("bad");
    assert!(started.is_err() || port.state() != "up", "a ring runs in memory that is gone: {port:?}");
    scene.peer.send(&frame(scene.bad.mac, scene.peer.mac, 300, 1));
    scene.peer.drain();
    scene.witness.keeps_going();
    assert!(memory() == before, "a ring was written to whose memory had been taken back");
    for region in ram.regions() {
        scene.bad.session().add_mem_reg(&region, true).unwrap();
    }
    scene.bad.cont().unwrap();
    scene.finish();
}
