//! Points 9 to 16: buffers, rings and events that are legal one by one and harmful together.

use std::time::{Duration, Instant};

use super::frontend::eventually;
use super::frontend::frame::{BROADCAST, frame};
use super::frontend::nic::{LINUX, NicConfig, exchange};
use super::frontend::random::Random;
use super::frontend::ring::{Desc, Ring, WRITE};
use super::frontend::session::feature;
use super::{Mutator, RX, Scene, TX, fill_with_entry};

#[test]
fn point_09_receive_buffers_that_hold_nothing() {
    for features in [LINUX, feature::VERSION_1, feature::ANY_LAYOUT] {
        let mut scene = Scene::with(NicConfig { features, ..NicConfig::default() });
        let ram = scene.bad.vmm.ram.clone();
        let at = ram.alloc(4096, 64);
        for len in [0, 1, 9, 10, 11, 12, 13] {
            scene.empty_rx();
            let ring = scene.ring(RX);
            for head in 0..ring.size {
                ring.set_desc(head, Desc::writable(at, len));
                ring.offer(head);
            }
            scene.bad.vmm.vrings[RX].kick.ring();
            let before = scene.daemon.port("peer").counter("rx_dropped");
            for seed in 0..20 {
                scene.peer.send(&frame(scene.bad.mac, scene.peer.mac, 1500, seed));
            }
            scene.peer.drain();
            scene.daemon.port_when("peer", "all are dropped", |port| {
                port.counter("rx_dropped") == before + 20 && port.is_conserved()
            });
            scene.expect_alive(&format!("RX buffers of {len} bytes"));
        }
        scene.finish();
    }
}

#[test]
fn point_10_half_a_frame_is_never_published() {
    let mut scene = Scene::new();
    let at = scene.bad.vmm.ram.alloc(4096, 64);
    for (count, broken) in [(3u16, false), (6, true)] {
        scene.empty_rx();
        let ring = scene.ring(RX);
        for head in 0..count {
            ring.set_desc(head, Desc::writable(at + 100 * u64::from(head), 100));
        }
        if broken {
            ring.set_desc(count - 1, Desc::writable(0xdead_0000_0000, 100));
        }
        for head in 0..count {
            ring.offer(head);
        }
        scene.bad.vmm.vrings[RX].kick.ring();
        let before = scene.daemon.port("peer").counter("rx_dropped");
        for seed in 0..5 {
            scene.peer.send(&frame(scene.bad.mac, scene.peer.mac, 1500, seed));
        }
        scene.peer.drain();
        scene.daemon.port_when("peer", "all are dropped", |port| port.counter("rx_dropped") == before + 5);
        assert_eq!(ring.used_idx(), 0, "part of a frame was published");
        if broken {
            scene.expect_stopped("a broken buffer in the middle of a frame");
            continue;
        }
        // The three buffers are still there, and hold a frame that fits them.
        scene.peer.send(&frame(scene.bad.mac, scene.peer.mac, 250, 1));
        eventually("a frame that fits", || (ring.used_idx() == 3).then_some(()));
        assert_eq!(scene.bad.vmm.ram.bytes(at + 10, 2), [3, 0], "num_buffers");
        scene.reset();
    }
    scene.finish();
}

#[test]
fn point_11_a_used_ring_that_the_guest_scribbles_over() {
    let mut scene = Scene::new();
    for index in [TX, RX] {
        if index == RX {
            scene.empty_rx();
        }
        let (ring, mut random) = (scene.ring(index), Random::new(7));
        let mutator = Mutator::start(move || {
            ring.set_used_idx(random.next() as u16);
            ring.set_used_entry(random.next() as u16, random.next() as u32, random.next() as u32);
            ring.ram.store_u16(ring.used, random.next() as u16);
        });
        let at = scene.frame_in_ram(300);
        let ring = scene.ring(index);
        let flags = if index == RX { WRITE } else { 0 };
        ring.set_desc(0, Desc { addr: at, len: 300, flags, next: 0 });
        for _ in 0..200 {
            scene.offer(index, 0);
            std::thread::yield_now();
        }
        drop(mutator);
        scene.peer.poll();
        scene.expect_alive("a used ring that is scribbled over");
    }
    scene.finish();
}

#[test]
fn point_12_a_ring_that_never_rests() {
    let mut scene = Scene::with(NicConfig { size: 32768, ..NicConfig::default() });
    let ram = scene.bad.vmm.ram.clone();
    let at = ram.alloc(70_000, 64);
    ram.write(at, &[0; 12]);
    ram.write(at + 12, &frame(BROADCAST, scene.bad.mac, 9000, 1));
    // Frames that cost most: broadcasts of 9000 bytes; 250 pieces each; nothing but empty descriptors.
    for (pieces, len) in [(1u16, 9012u32), (250, 36), (30_000, 0)] {
        scene.reset();
        let ring = scene.ring(TX);
        for slot in 0..ring.size {
            let desc = Desc::readable(at, len);
            let last = slot % pieces == pieces - 1 || slot == ring.size - 1;
            ring.set_desc(slot, if last { desc } else { desc.then(slot + 1) });
        }
        let (kick, begin) = (scene.bad.vmm.vrings[TX].kick.clone(), Instant::now());
        let heads = ring.size / pieces;
        let mut idx = ring.avail_idx();
        while begin.elapsed() < Duration::from_secs(2) {
            // Always as full as it goes.
            let until = ring.used_idx().wrapping_add(ring.size);
            while idx != until {
                ring.set_avail_entry(idx, idx % heads.max(1) * pieces);
                idx = idx.wrapping_add(1);
            }
            ring.set_avail_idx(idx);
            kick.ring();
            scene.peer.poll();
        }
        scene.witness.keeps_going();
        scene.expect_alive("a ring that never rests");
    }
    scene.finish();
}

#[test]
fn point_12_a_broken_ring_costs_nothing() {
    let mut scene = Scene::new();
    let (ring, kick) = (scene.ring(TX), scene.bad.vmm.vrings[TX].kick.clone());
    ring.set_avail_idx(ring.used_idx().wrapping_add(5000));
    scene.stir(TX);
    scene.daemon.port_when("bad", "it is stopped", |port| port.state() == "stopped");
    let mutator = Mutator::start(move || {
        ring.set_avail_idx(ring.avail_idx().wrapping_add(1));
        kick.ring();
    });
    for _ in 0..20 {
        scene.witness.keeps_going();
    }
    drop(mutator);
    scene.finish();
}

#[test]
fn point_13_storms_of_kicks_and_interrupts() {
    let mut scene = Scene::with(NicConfig { features: LINUX & !feature::EVENT_IDX, ..NicConfig::default() });
    let kicks: Vec<_> = scene.bad.vmm.vrings.iter().map(|vring| vring.kick.clone()).collect();
    let mutator = Mutator::start(move || kicks.iter().for_each(|kick| kick.ring()));
    for _ in 0..20 {
        scene.witness.keeps_going();
        exchange(&mut scene.bad, &mut scene.peer, 64);
    }
    drop(mutator);
    scene.finish();
}

#[test]
fn point_14_event_indices_that_mean_nothing() {
    let mut scene = Scene::new();
    let (tx, rx, mut random) = (scene.ring(TX), scene.ring(RX), Random::new(3));
    let mutator = Mutator::start(move || {
        for ring in [&tx, &rx] {
            ring.set_used_event(random.next() as u16);
            ring.set_avail_flags(random.next() as u16);
            // The device's own field.
            ring.ram.store_u16(ring.used + 4 + 8 * u64::from(ring.size), random.next() as u16);
        }
    });
    for seed in 0..500 {
        let sent = frame(scene.peer.mac, scene.bad.mac, 100, seed);
        assert!(scene.bad.pairs[0].tx.queue_frame(&sent));
        scene.bad.pairs[0].tx.queue.publish();
        // Its own wish for kicks is scribbled over, so the guest kicks always.
        scene.bad.vmm.vrings[TX].kick.ring();
        assert_eq!(scene.peer.receive(1)[0].1.frame, sent);
    }
    drop(mutator);
    scene.finish();
}

#[test]
fn point_15_rings_full_of_random_bytes() {
    let mut scene = Scene::new();
    for seed in 1..=60u64 {
        let mut random = Random::new(seed * 0x9e37_79b9);
        for index in [TX, RX] {
            let ring = scene.ring(index);
            let regions = ring.ram.regions();
            for slot in 0..ring.size {
                let home = &regions[random.below(regions.len() as u64) as usize];
                let wild = random.below(8) == 0;
                let desc = Desc {
                    addr: if wild { random.next() } else { home.gpa + random.below(home.len) },
                    len: random.next() as u32 >> random.below(32),
                    flags: random.next() as u16 & 7 >> random.below(3),
                    next: random.next() as u16 % if wild { u16::MAX } else { ring.size },
                };
                ring.set_desc(slot, desc);
                ring.set_avail_entry(slot, random.next() as u16 % if wild { u16::MAX } else { ring.size });
            }
            ring.set_avail_idx(ring.used_idx().wrapping_add(random.below(260) as u16));
            scene.stir(index);
        }
        scene.peer.poll();
        scene.expect_alive(&format!("random bytes, seed {seed}"));
    }
    scene.finish();
}

#[test]
fn point_16_areas_and_buffers_on_top_of_each_other() {
    let mut scene = Scene::new();
    let ram = scene.bad.vmm.ram.clone();
    for index in [TX, RX] {
        let flags = if index == RX { WRITE } else { 0 };
        // Buffers that are the ring itself.
        for area in [0, 1, 2] {
            let ring = scene.ring(index);
            let addr = [ring.desc, ring.avail, ring.used][area];
            for slot in 0..ring.size {
                ring.set_desc(slot, Desc { addr, len: 500, flags, next: 0 });
            }
            fill_with_entry(&ring, 0);
            scene.stir(index);
            scene.expect_alive("a buffer that is its ring");
        }
        // All areas at one place.
        scene.bad.stop().unwrap();
        let good = scene.ring(index);
        let at = ram.alloc(64 * 1024, 4096);
        for (desc, avail, used) in [(at, at, at), (at, at + 16, at + 32), (at, at + 4096, at + 4096)] {
            let ring = Ring { desc, avail, used, ..good.clone() };
            let mut random = Random::new(at);
            for word in 0..1024 {
                ram.write(at + 8 * word, &(random.next() & 0x0000_00ff_0000_01ff).to_le_bytes());
            }
            scene.bad.vmm.vrings[index].ring = ring.clone();
            scene.bad.vmm.vrings[index].base = ring.avail_idx();
            scene.bad.cont().unwrap();
            for _ in 0..50 {
                ring.set_avail_idx(ring.avail_idx().wrapping_add(1));
                scene.stir(index);
            }
            scene.bad.stop().unwrap();
            scene.witness.keeps_going();
        }
        scene.bad.vmm.vrings[index].ring = good;
        scene.expect_alive("areas on top of each other");
    }
    scene.finish();
}
