//! The same harm in packed rings, where it lies elsewhere: in descriptors that both sides write and in the words that
//! suppress events.

use super::frontend::nic::{LINUX, NicConfig};
use super::frontend::packed::{AVAIL, Packed, USED};
use super::frontend::random::Random;
use super::frontend::ring::{DESC_LEN, Desc, INDIRECT, NEXT, WRITE};
use super::frontend::session::feature;
use super::{Mutator, RX, Scene, TX};

const SIZE: u16 = 100;

fn scene(features: u64) -> Scene {
    Scene::with(NicConfig { features: features | feature::RING_PACKED, size: SIZE, ..NicConfig::default() })
}

impl Scene {
    /// Makes a chain available where the device looks next on ring `index`, and has it look. One of all slots never ends.
    fn offer_packed(&mut self, index: usize, chain: &[Desc]) {
        if index == RX {
            self.empty_rx();
        }
        let pair = &self.bad.pairs[0];
        let queue = if index == RX { &pair.rx.queue } else { &pair.tx.queue };
        let mut packed = Packed::new();
        packed.next = queue.place().expect("a packed ring");
        let ring = self.ring(index);
        let last = packed.next.on(chain.len() - 1, SIZE);
        packed.add(&ring, chain, 7);
        if chain.len() == usize::from(SIZE) {
            // The whole ring, and on from there.
            ring.set_slot_flags(last.slot, chain[0].flags | NEXT | last.available());
        }
        packed.publish(&ring);
        self.stir(index);
    }
}

#[test]
fn points_03_to_06_in_a_packed_ring() {
    let mut scene = scene(LINUX);
    let at = scene.frame_in_ram(300);
    let ram = scene.bad.vmm.ram.clone();
    let table = ram.alloc(70_000 * DESC_LEN, 16);
    for index in [TX, RX] {
        let flags = if index == RX { WRITE } else { 0 };
        let good = Desc { addr: at, len: 30, flags, next: 0 };
        let wrong = Desc { flags: flags ^ WRITE, ..good };
        let indirect = |len: u32, flags: u16| Desc { addr: table, len, flags: INDIRECT | flags, next: 0 };
        let entry = |desc: Desc| ram.write(table, &desc.to_packed_entry());
        let cases: [(&str, Desc, Vec<Desc>); 12] = [
            ("a chain of more slots than there are", good, vec![good; SIZE.into()]),
            ("a buffer of the wrong direction", good, vec![wrong]),
            ("a buffer of the wrong direction in a chain", good, vec![good, wrong]),
            ("an address outside of memory", good, vec![Desc { addr: 0xdead_0000_0000, ..good }]),
            ("an address that wraps around", good, vec![good, Desc { addr: u64::MAX - 3, ..good }]),
            ("a length that no memory has", good, vec![Desc { len: u32::MAX, ..good }]),
            ("an empty table", good, vec![indirect(0, 0)]),
            ("a table of odd length", good, vec![indirect(17, 0)]),
            ("a table longer than any", good, vec![indirect(70_000 * 16, 0)]),
            ("a table outside of memory", good, vec![Desc { addr: 0xdead_0000_0000, ..indirect(16, 0) }]),
            ("a table within a table", indirect(16, 0), vec![indirect(16, 0)]),
            ("a table with a buffer of the wrong direction", wrong, vec![indirect(16, 0)]),
        ];
        // What a table says of the direction counts only where we would write: DPDK's driver says it wrongly elsewhere.
        let count = if index == RX { cases.len() } else { cases.len() - 1 };
        for (what, first, chain) in cases.into_iter().take(count) {
            entry(first);
            scene.offer_packed(index, &chain);
            scene.expect_stopped(&format!("{what}, ring {index}"));
        }
    }
    scene.finish();
}

#[test]
fn point_04_a_table_that_was_not_negotiated_in_a_packed_ring() {
    let mut scene = scene(LINUX & !feature::INDIRECT_DESC);
    let at = scene.frame_in_ram(300);
    let table = scene.bad.vmm.ram.alloc(64, 16);
    scene.bad.vmm.ram.write(table, &Desc::readable(at, 300).to_packed_entry());
    scene.offer_packed(TX, &[Desc { addr: table, len: 16, flags: INDIRECT, next: 0 }]);
    scene.expect_stopped("a table without the feature");
    scene.finish();
}

#[test]
fn point_11_a_packed_ring_that_the_guest_scribbles_over() {
    for features in [LINUX, LINUX | feature::IN_ORDER] {
        let mut scene = scene(features);
        let at = scene.frame_in_ram(300);
        for index in [TX, RX] {
            for seed in 1..6 {
                let (ring, mut random) = (scene.ring(index), Random::new(seed));
                let flags = if index == RX { WRITE } else { 0 };
                let mutator = Mutator::start(move || {
                    let slot = random.below(SIZE.into()) as u16;
                    let more = [0, 0, 0, 0, NEXT, INDIRECT, WRITE][random.below(7) as usize];
                    let bits = [AVAIL, USED, AVAIL, USED, 0, AVAIL | USED][random.below(6) as usize];
                    let len = [300, 300, 300, 40, 0, u32::MAX][random.below(6) as usize];
                    let place = ring.desc + DESC_LEN * u64::from(slot);
                    ring.ram.write(place, &at.to_le_bytes());
                    ring.ram.write(place + 8, &len.to_le_bytes());
                    ring.ram.store_u16(place + 12, random.next() as u16);
                    ring.set_slot_flags(slot, flags ^ more | bits);
                    // What suppresses events, on both sides.
                    for word in [ring.avail, ring.avail + 2, ring.used, ring.used + 2] {
                        ring.ram.store_u16(word, random.next() as u16);
                    }
                });
                for _ in 0..50 {
                    scene.stir(index);
                    std::thread::yield_now();
                }
                drop(mutator);
                scene.peer.poll();
                scene.expect_alive("a packed ring that is scribbled over");
            }
        }
        scene.finish();
    }
}
