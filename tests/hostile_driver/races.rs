//! Point 1: memory that changes while it is read.

use std::time::Instant;

use super::frontend::daemon::Daemon;
use super::frontend::frame::{frame, mac};
use super::frontend::nic::{Nic, NicConfig, meet};
use super::frontend::random::Random;
use super::frontend::ring::{DESC_LEN, Desc, INDIRECT};
use super::frontend::witness::Witness;
use super::frontend::{DEADLINE, eventually};
use super::{Mutator, Scene, TX};

#[test]
fn point_01_fields_that_change_under_our_eyes() {
    let mut scene = Scene::with(NicConfig { size: 64, ..NicConfig::default() });
    let at = scene.frame_in_ram(400);
    let table = scene.bad.vmm.ram.alloc(16 * 16, 16);
    let ring = scene.ring(TX);
    let good = [
        Desc::readable(at, 400),
        Desc::readable(at, 12).then(1),
        Desc { addr: table, len: 32, flags: INDIRECT, next: 0 },
    ];
    let evil = [
        Desc::readable(at, u32::MAX),
        Desc::readable(u64::MAX - 8, 400),
        Desc::readable(at, 3),
        Desc::writable(at, 400),
        Desc::readable(at, 400).then(60_000),
        Desc::readable(at, 400).then(0),
        Desc { addr: table, len: 1 << 20, flags: INDIRECT, next: 0 },
    ];
    let mut looks = 0;
    for round in 0..60u64 {
        let mut random = Random::new(round + 1);
        let (mutated, ram) = (ring.clone(), scene.bad.vmm.ram.clone());
        let mutator = Mutator::start(move || {
            // Mostly good ones, which differ as well: a round is over with the first evil one that is seen whole.
            let list: &[Desc] = if random.below(8) > 0 { &good } else { &evil };
            let desc = list[random.below(list.len() as u64) as usize];
            mutated.set_desc(0, desc);
            ram.write(table, &desc.to_bytes());
            ram.write(table + DESC_LEN, &good[0].to_bytes());
            mutated.set_desc(1, Desc::readable(at + 12, 388));
        });
        // A stopped ring uses nothing more, and its far end is told: the round is over then. To offer on would only wait,
        // for a whole time slice of the mutator's with each look where CPUs are few.
        let mut stopped = false;
        for _ in 0..500 {
            ring.offer(0);
            scene.bad.vmm.vrings[TX].kick.ring();
            let end = Instant::now() + DEADLINE;
            while ring.used_idx() != ring.avail_idx() && !stopped {
                stopped = scene.bad.vmm.errs[TX].take() > 0;
                assert!(Instant::now() < end, "an entry is not used, and the ring was not stopped");
                std::thread::yield_now();
            }
            if stopped {
                break;
            }
            looks += 1;
        }
        drop(mutator);
        scene.peer.poll();
        scene.expect_alive("descriptors that change");
        scene.bad.vmm.errs[TX].take();
    }
    assert!(looks > 60, "the ring was stopped at once in most rounds: {looks} entries used in 60");
    scene.finish();
}

#[test]
fn point_01_what_is_decided_on_is_what_is_delivered() {
    let daemon = Daemon::with_ports(&["bad", "peer", "third"]);
    let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
    let [mut bad, mut peer, mut third] =
        ["bad", "peer", "third"].map(|port| Nic::up(&daemon.socket(port), &NicConfig::default()));
    // Two addresses that differ in one byte, so that a switch between them is one store.
    (peer.mac, third.mac) = (mac(0x11_0001), mac(0x11_0002));
    meet(&mut bad, &mut peer);
    meet(&mut bad, &mut third);
    meet(&mut bad, &mut peer);
    peer.poll();
    third.poll();
    let ram = bad.vmm.ram.clone();
    let at = ram.alloc(512, 64);
    ram.write(at, &[0; 12]);
    ram.write(at + 12, &frame(peer.mac, bad.mac, 300, 1));
    let (mine, mut last) = (ram.clone(), 0u8);
    let mutator = Mutator::start(move || {
        last ^= 3;
        mine.write(at + 12 + 5, &[1 + last % 2]);
    });
    let mut heard = [0u64; 2];
    for _ in 0..20_000 {
        bad.pairs[0].tx.reclaim();
        if bad.pairs[0].tx.queue.add(&[Desc::readable(at, 312)], false).is_some() {
            bad.pairs[0].tx.queue.publish();
        }
        for (who, nic) in [&mut peer, &mut third].into_iter().enumerate() {
            for (_, got) in nic.poll() {
                assert_eq!(got.frame[..6], nic.mac, "a frame was delivered by an address that it does not carry");
                heard[who] += 1;
            }
        }
    }
    drop(mutator);
    eventually("both have heard something", || {
        for (who, nic) in [&mut peer, &mut third].into_iter().enumerate() {
            heard[who] += nic.poll().len() as u64;
        }
        (heard.iter().sum::<u64>() > 0).then_some(())
    });
    witness.keeps_going();
    assert!(witness.finish() > 0);
}
