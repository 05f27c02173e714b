//! Points 2 to 8: indices, chains, tables, addresses and lengths that no driver may write.

use super::frontend::frame::frame;
use super::frontend::nic::{LINUX, NicConfig};
use super::frontend::ring::{DESC_LEN, Desc, INDIRECT, NEXT, WRITE};
use super::frontend::session::feature;
use super::frontend::{DEADLINE, eventually};
use super::{RX, Scene, TX, fill_with_entry};

#[test]
fn point_02_available_index_that_jumps() {
    let mut scene = Scene::new();
    for index in [TX, RX] {
        for jump in [257, 0x8000, u16::MAX - 256] {
            if index == RX {
                // With buffers at hand the switch does not look at the index.
                scene.empty_rx();
            }
            let ring = scene.ring(index);
            ring.set_avail_idx(ring.used_idx().wrapping_add(jump));
            scene.stir(index);
            scene.expect_stopped("a jump of the available index");
            let told = scene.bad.vmm.errs[index].wait(DEADLINE) && scene.bad.vmm.errs[index].take() > 0;
            assert!(told, "the front end is told by the error eventfd");
        }
    }
    scene.finish();
}

#[test]
fn point_03_heads_and_links_beyond_the_ring_and_loops() {
    let mut scene = Scene::new();
    let at = scene.frame_in_ram(300);
    for index in [TX, RX] {
        for head in [256, 257, 0x7fff, u16::MAX] {
            fill_with_entry(&scene.ring(index), head);
            scene.stir(index);
            scene.expect_stopped("a head beyond the ring");
        }
        let flags = if index == RX { WRITE } else { 0 };
        let links: [&[u16]; 4] = [&[256], &[u16::MAX], &[0], &[1, 2, 0]];
        for next in links {
            let ring = scene.ring(index);
            for (at_desc, next) in next.iter().enumerate() {
                let desc = Desc { addr: at, len: 1, flags: flags | NEXT, next: *next };
                ring.set_desc(at_desc as u16, desc);
            }
            fill_with_entry(&ring, 0);
            scene.stir(index);
            scene.expect_stopped("a chain that leads nowhere");
        }
    }
    scene.finish();
}

#[test]
fn point_04_indirect_tables_that_are_not_allowed() {
    let mut scene = Scene::new();
    let at = scene.frame_in_ram(300);
    for index in [TX, RX] {
        let flags = if index == RX { WRITE } else { 0 };
        let ram = scene.bad.vmm.ram.clone();
        let table = ram.alloc(70_000 * DESC_LEN, 16);
        let indirect = |len: u32, more: u16| Desc { addr: table, len, flags: INDIRECT | more, next: 1 };
        let entry = Desc { addr: at, len: 300, flags, next: 0 };
        let cases = [
            ("nested", indirect(16, 0), Desc { addr: table, len: 16, flags: INDIRECT, next: 0 }),
            ("with NEXT", indirect(16, NEXT), entry),
            ("empty", indirect(0, 0), entry),
            ("of odd length", indirect(17, 0), entry),
            ("half an entry", indirect(8, 0), entry),
            ("longer than any", indirect(70_000 * 16, 0), Desc { flags: flags | NEXT, next: 1, ..entry }),
            ("of absurd length", indirect(!15, 0), entry),
            ("that links beyond itself", indirect(32, 0), Desc { flags: flags | NEXT, next: 2, ..entry }),
            ("that loops", indirect(32, 0), Desc { flags: flags | NEXT, next: 0, ..entry }),
            ("outside of memory", Desc { addr: 0xdead_0000_0000, ..indirect(16, 0) }, entry),
            ("that wraps around", Desc { addr: u64::MAX - 7, ..indirect(32, 0) }, entry),
        ];
        for (what, desc, first) in cases {
            for slot in 0..16 {
                ram.write(table + slot * DESC_LEN, &first.to_bytes());
            }
            let ring = scene.ring(index);
            ring.set_desc(0, desc);
            ring.set_desc(1, entry);
            fill_with_entry(&ring, 0);
            scene.stir(index);
            scene.expect_stopped(&format!("a table {what}"));
        }
    }
    scene.finish();
}

#[test]
fn point_04_indirect_tables_that_were_not_negotiated() {
    let features = LINUX & !feature::INDIRECT_DESC;
    let mut scene = Scene::with(NicConfig { features, ..NicConfig::default() });
    let at = scene.frame_in_ram(300);
    let table = scene.bad.vmm.ram.alloc(64, 16);
    scene.bad.vmm.ram.write(table, &Desc::readable(at, 300).to_bytes());
    scene.ring(TX).set_desc(0, Desc { addr: table, len: 16, flags: INDIRECT, next: 0 });
    scene.offer(TX, 0);
    scene.expect_stopped("a table without the feature");
    scene.finish();
}

#[test]
fn point_05_buffers_of_the_wrong_direction() {
    let mut scene = Scene::new();
    let at = scene.frame_in_ram(300);
    let (read, write) = (Desc::readable(at, 100), Desc::writable(at, 100));
    let cases: [(usize, &[Desc]); 5] =
        [(TX, &[write]), (TX, &[read, write]), (TX, &[write, read]), (RX, &[read]), (RX, &[write, read])];
    for (index, descs) in cases {
        let ring = scene.ring(index);
        for (slot, desc) in descs.iter().enumerate() {
            let last = slot + 1 == descs.len();
            ring.set_desc(slot as u16, if last { *desc } else { desc.then(slot as u16 + 1) });
        }
        fill_with_entry(&ring, 0);
        scene.stir(index);
        scene.expect_alive("a buffer of the wrong direction");
    }
    // Nothing of it went through: what the peer hears next is a good frame.
    scene.peer.poll();
    scene.finish();
}

#[test]
fn point_06_addresses_outside_of_memory() {
    let mut scene = Scene::new();
    let ram = scene.bad.vmm.ram.clone();
    let end = ram.regions().iter().map(|region| region.gpa + region.len).max().unwrap();
    let addresses = [
        (end, 100),
        (end - 50, 100),
        (end - 1, u32::MAX),
        (0xc_0000 - 10, 100),
        (u64::MAX, 1),
        (u64::MAX - 10, 100),
        (u64::MAX - u64::from(u32::MAX) + 1, u32::MAX),
        (1 << 63, 100),
    ];
    for index in [TX, RX] {
        let flags = if index == RX { WRITE } else { 0 };
        for (addr, len) in addresses {
            scene.ring(index).set_desc(0, Desc { addr, len, flags, next: 0 });
            fill_with_entry(&scene.ring(index), 0);
            scene.stir(index);
            scene.expect_stopped(&format!("{len} bytes at {addr:#x}"));
        }
    }
    scene.finish();
}

#[test]
fn point_06_buffers_of_no_bytes() {
    let mut scene = Scene::new();
    let at = scene.frame_in_ram(300);
    for index in [TX, RX] {
        let flags = if index == RX { WRITE } else { 0 };
        for addr in [at, 0xdead_0000_0000, u64::MAX, 0] {
            let ring = scene.ring(index);
            ring.set_desc(0, Desc { addr, len: 0, flags: flags | NEXT, next: 1 });
            ring.set_desc(1, Desc { addr: at, len: 300, flags: flags | NEXT, next: 2 });
            ring.set_desc(2, Desc { addr, len: 0, flags, next: 0 });
            fill_with_entry(&ring, 0);
            scene.stir(index);
            scene.expect_alive("a descriptor of no bytes in a chain");
            scene.ring(index).set_desc(0, Desc { addr, len: 0, flags, next: 0 });
            fill_with_entry(&scene.ring(index), 0);
            scene.stir(index);
            scene.expect_alive("a chain of no bytes");
        }
    }
    scene.finish();
}

#[test]
fn point_07_chains_that_are_too_long() {
    let mut scene = Scene::with(NicConfig { size: 1024, ..NicConfig::default() });
    let start = scene.bad.vmm.ram.regions().iter().map(|region| (region.len, region.gpa)).max().unwrap();
    let (len, gpa) = (start.0 as u32, start.1);
    let ring = scene.ring(TX);
    // More than 4 GiB in one chain, and just more than the longest frame.
    for (count, each) in [(250u16, len), (2, 40_000), (1, 65_535 + 14 + 8 + 12 + 1)] {
        let before = scene.daemon.port("bad").drops("frame-too-long");
        let idx = ring.avail_idx();
        for slot in 0..count {
            let desc = Desc::readable(gpa, each);
            ring.set_desc(slot, if slot + 1 < count { desc.then(slot + 1) } else { desc });
        }
        scene.offer(TX, 0);
        eventually("the chain is given back", || (ring.used_idx() == idx.wrapping_add(1)).then_some(()));
        scene.daemon.port_when("bad", "it is counted", |port| port.drops("frame-too-long") == before + 1);
        scene.reset();
    }
    let before = scene.daemon.port("bad").drops("too-many-segments");
    for slot in 0..1000 {
        let desc = Desc::readable(gpa, 4);
        ring.set_desc(slot, if slot < 999 { desc.then(slot + 1) } else { desc });
    }
    scene.offer(TX, 0);
    scene.daemon.port_when("bad", "it is counted", |port| port.drops("too-many-segments") == before + 1);
    scene.finish();
}

#[test]
fn point_08_chains_that_are_too_short() {
    let mut scene = Scene::new();
    for (reason, lens) in [("header-truncated", [1usize, 5, 11, 12]), ("frame-too-short", [13, 14, 24, 25])] {
        let before = scene.daemon.port("bad").drops(reason);
        for len in lens {
            assert!(scene.bad.pairs[0].tx.queue_bytes(&[], &vec![0; len]));
            scene.bad.pairs[0].tx.queue.publish();
        }
        scene.bad.drain();
        scene.expect_drops(reason, before, lens.len() as u64);
    }
    // The header may be split over any number of descriptors (CVE-2022-2132), even a byte each.
    let at = scene.frame_in_ram(300);
    let sent = scene.bad.vmm.ram.bytes(at + 12, 288);
    let mut pieces: Vec<_> = (0..26).map(|byte| Desc::readable(at + byte, 1)).collect();
    pieces.push(Desc::readable(at + 26, 274));
    scene.bad.pairs[0].tx.queue.add(&pieces, false).unwrap();
    scene.bad.pairs[0].tx.queue.publish();
    assert_eq!(scene.peer.receive(1)[0].1.frame, sent);
    scene.bad.drain();
    scene.finish();
}

#[test]
fn point_08_headers_that_ask_for_what_was_not_negotiated() {
    let mut scene = Scene::new();
    let before = scene.daemon.port("bad").drops("offload-not-negotiated");
    // NEEDS_CSUM with fields of all sizes; GSO of each type.
    let headers: [[u8; 12]; 5] = [
        [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0],
        [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0],
        [0, 4, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ];
    let sent = frame(scene.peer.mac, scene.bad.mac, 600, 1);
    for header in &headers {
        assert!(scene.bad.pairs[0].tx.queue_bytes(header, &sent));
        scene.bad.pairs[0].tx.queue.publish();
    }
    scene.bad.drain();
    scene.expect_drops("offload-not-negotiated", before, headers.len() as u64);
    scene.finish();
}
