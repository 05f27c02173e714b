//! Points 1, 2, 3, 7 and beyond: what messages carry, how often and in which order, and messages that are none.

use std::os::fd::AsFd;

use super::frontend::frame::frame;
use super::frontend::message::{self, NEED_REPLY, REPLY, VERSION};
use super::frontend::nic::exchange;
use super::frontend::ram::{GuestRam, Region, memfd};
use super::frontend::random::Random;
use super::frontend::session::{
    Session, feature, is_closed, mem_table, request, single_region, vring_addr, vring_state,
};
use super::{MIB, Scene, answered, event, fds, refused};

#[test]
fn point_01_descriptors_that_nobody_asked_for() {
    let mut scene = Scene::new();
    let (bell, region) = (event(), Region::new(0, 0x1_0000_0000, MIB));
    let one = 0u64.to_le_bytes();
    for count in [1, 2, 8, 32, 33, 253] {
        let cases: [(u32, Vec<u8>); 13] = [
            (request::GET_FEATURES, vec![]),
            (request::SET_OWNER, vec![]),
            (request::SET_FEATURES, one.to_vec()),
            (request::SET_VRING_NUM, vring_state(0, 256)),
            (request::GET_VRING_BASE, vring_state(0, 0)),
            (request::SET_VRING_ENABLE, vring_state(0, 1)),
            (request::NET_SET_MTU, 1500u64.to_le_bytes().to_vec()),
            (request::REM_MEM_REG, single_region(&region)),
            (request::SET_INFLIGHT_FD, vec![0; 20]),
            (request::SET_VRING_KICK, one.to_vec()),
            (request::SET_VRING_CALL, one.to_vec()),
            (request::SET_VRING_ERR, one.to_vec()),
            (4711, vec![1, 2, 3]),
        ];
        for (number, payload) in cases {
            let session = scene.session();
            session.raw(&message::encode(number, VERSION | NEED_REPLY, &payload), &fds(&bell, count)).unwrap();
            // A reply, a NACK or the end: whichever, the descriptors go.
            let answer = session.read().map(|_| ());
            assert!(answer.as_ref().err().is_none_or(is_closed), "request {number}, {count} descriptors: {answer:?}");
        }
    }
    scene.expect_usable("too many descriptors");
    for (regions, count) in [(1, 0), (1, 2), (2, 1), (8, 9), (0, 1)] {
        let table: Vec<_> = (0..regions).map(|at| Region { gpa: at * MIB, uva: at * MIB, ..region.clone() }).collect();
        let files = fds(&*region.file, count);
        let session = scene.session();
        refused(session.tell(request::SET_MEM_TABLE, &mem_table(&table), &files, true), "a wrong number of files");
        let session = scene.session();
        if count != 1 {
            refused(session.tell(request::ADD_MEM_REG, &single_region(&region), &files, true), "a region, wrong files");
        }
    }
    for number in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
        let session = scene.session();
        answered(session.tell(number, &one, &[], true), "an event without descriptor");
    }
    scene.finish();
}

#[test]
fn point_02_messages_that_are_repeated() {
    let mut scene = Scene::new();
    let nic = scene.nic();
    let (session, ring) = (nic.session(), &nic.vmm.vrings[0].ring);
    let round = || {
        answered(session.set_features(nic.features(), true), "SET_FEATURES");
        answered(session.set_owner(true), "SET_OWNER");
        answered(session.set_vring_num(0, 256, true), "SET_VRING_NUM");
        answered(session.set_vring_addr(0, ring, true), "SET_VRING_ADDR");
        answered(session.set_vring_kick(0, &event(), true), "SET_VRING_KICK");
        answered(session.set_vring_call(0, &event(), true), "SET_VRING_CALL");
        answered(session.set_vring_err(0, &event(), true), "SET_VRING_ERR");
        answered(session.set_vring_enable(0, true, true), "SET_VRING_ENABLE");
        answered(session.set_mem_table(&nic.vmm.ram.regions(), true), "SET_MEM_TABLE");
        let extra = Region::new(0x10_0000_0000, 0x7700_0000_0000, MIB);
        answered(session.add_mem_reg(&extra, true), "ADD_MEM_REG");
        answered(session.add_mem_reg(&extra, true), "ADD_MEM_REG");
        answered(session.rem_mem_reg(&extra, true), "REM_MEM_REG");
    };
    (0..10).for_each(|_| round());
    let before = scene.daemon.footprint_at_rest();
    (0..300).for_each(|_| round());
    let after = scene.daemon.expect_given_back(&before, "what repeated messages carried");
    assert!(after.mappings <= before.mappings + 32, "{before:?}, then {after:?}");
    drop(nic);
    scene.finish();
}

#[test]
fn point_03_ring_numbers_that_do_not_fit() {
    let scene = Scene::new();
    for index in [8u32, 255, 256, 257, 0x100, 0xffff, 0x1_0000, 0x8000_0000, u32::MAX] {
        for number in [request::SET_VRING_NUM, request::SET_VRING_BASE, request::SET_VRING_ENABLE] {
            refused(scene.session().tell(number, &vring_state(index, 1), &[], true), "a ring that is not there");
        }
        let addresses = vring_addr(index, 0, 0, 0);
        refused(scene.session().tell(request::SET_VRING_ADDR, &addresses, &[], true), "a ring that is not there");
        // It has a reply of its own, which cannot say no: any answer will do.
        let _ = scene.session().get_vring_base(index);
    }
    for index in [8u64, 255, 0x200, 0xff00, !message::NO_FD] {
        for number in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
            let bell = event();
            let result = scene.session().tell(number, &index.to_le_bytes(), &[bell.as_fd()], true);
            // The index is the low byte; higher bits are reserved, so ring 0 may be meant.
            if index & 0xff > 7 { refused(result, "a ring that is not there") } else { answered(result, "bits") }
        }
    }
    for size in [0u32, 3, 255, 32769, 65535, 65536, u32::MAX] {
        refused(scene.session().set_vring_num(0, size, true), &format!("a ring of {size}"));
    }
    for value in [2, u32::MAX] {
        answered(
            scene.session().tell(request::SET_VRING_ENABLE, &vring_state(0, value), &[], true),
            "neither on nor off",
        );
    }
    answered(scene.session().set_features(u64::MAX, true), "features that nobody offered");
    answered(scene.session().set_vring_base(0, u32::MAX, true), "a base that no ring has");
    scene.finish();
}

/// One message of a start-up, with its acknowledgement.
type Step<'a> = &'a dyn Fn(&Session) -> std::io::Result<()>;

#[test]
fn point_07_messages_out_of_order() {
    let mut scene = Scene::new();
    let region = Region::new(0, 0x7000_0000_0000, MIB);
    let at = region.uva;
    // A ring before its memory, in every position; what counts is that it is answered and that it starts or says why.
    let steps: [(&str, Step); 6] = [
        ("features", &|s| s.set_features(feature::VERSION_1 | feature::PROTOCOL_FEATURES, true)),
        ("memory", &|s| s.add_mem_reg(&region, true)),
        ("size", &|s| s.set_vring_num(1, 256, true)),
        ("base", &|s| s.set_vring_base(1, 0, true)),
        ("addresses", &|s| s.tell(request::SET_VRING_ADDR, &vring_addr(1, at, at + 0x2000, at + 0x4000), &[], true)),
        ("kick", &|s| s.set_vring_kick(1, &event(), true)),
    ];
    for shift in 0..steps.len() {
        for reverse in [false, true] {
            let session = scene.session();
            for step in 0..steps.len() {
                let step = if reverse { steps.len() - 1 - step } else { step };
                let (what, act) = &steps[(step + shift) % steps.len()];
                answered(act(&session), what);
            }
            for (what, act) in &steps {
                answered(act(&session), what);
            }
            let _ = session.get_vring_base(1);
        }
    }
    scene.expect_usable("messages out of order");

    let mut nic = scene.nic();
    let session = nic.session();
    answered(session.set_vring_base(1, 12345, true), "the base of a running ring");
    answered(session.set_vring_num(1, 64, true), "the size of a running ring");
    answered(
        session.set_features(feature::VERSION_1 | feature::PROTOCOL_FEATURES, true),
        "features of a running device",
    );
    answered(session.set_features(0, true), "no features");
    let ring = nic.vmm.vrings[0].ring.clone();
    answered(session.set_vring_addr(1, &ring, true), "the addresses of a running ring");
    exchange(&mut nic, &mut scene.peer, 32);
    let session = nic.session();
    for region in nic.vmm.ram.regions() {
        answered(session.rem_mem_reg(&region, true), "memory under running rings");
    }
    nic.vmm.vrings[1].kick.ring();
    scene.peer.send(&frame(nic.mac, scene.peer.mac, 100, 1));
    scene.peer.drain();
    answered(session.tell(request::RESET_OWNER, &[], &[], true), "RESET_OWNER");
    answered(session.tell(request::RESET_DEVICE, &[], &[], true), "RESET_DEVICE");
    drop(nic);
    scene.expect_usable("changes under running rings");
    scene.finish();
}

#[test]
fn point_07_features_do_not_change_what_runs() {
    let mut scene = Scene::new();
    let mut nic = scene.nic();
    for bits in
        [0, feature::PROTOCOL_FEATURES, nic.features() ^ feature::EVENT_IDX, nic.features() ^ feature::MRG_RXBUF]
    {
        refused(nic.session().set_features(bits, true), "other features while rings run");
        exchange(&mut nic, &mut scene.peer, 32);
    }
    drop(nic);
    scene.finish();
}

#[test]
fn half_messages_and_headers_that_lie() {
    let mut scene = Scene::new();
    let ram = GuestRam::qemu(32 * MIB);
    let table = message::encode(request::SET_MEM_TABLE, VERSION | NEED_REPLY, &mem_table(&ram.regions()));
    let regions = ram.regions();
    let files: Vec<_> = regions.iter().map(|region| region.file.as_fd()).collect();
    for cut in [1, 4, 8, 11, 12, 13, 20, 51, table.len() - 1] {
        let session = scene.session();
        session.raw(&table[..cut], &files).unwrap();
        drop(session);
        // The same, and the other half later. No VMM does that to a message with descriptors; it has to have an answer.
        let session = scene.session();
        session.raw(&table[..cut], &files).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5));
        if session.raw(&table[cut..], &[]).is_ok() {
            let answer = session.read().map(|_| ());
            assert!(answer.as_ref().err().is_none_or(is_closed), "a table in two halves, cut at {cut}: {answer:?}");
        }
    }
    scene.expect_usable("half messages");
    let lies: [(u32, u32, u32, usize); 10] = [
        (request::GET_FEATURES, VERSION, u32::MAX, 0),
        (request::GET_FEATURES, VERSION, 1 << 20, 5000),
        (request::SET_FEATURES, VERSION | NEED_REPLY, 4, 4),
        (request::SET_FEATURES, VERSION | NEED_REPLY, 9, 9),
        (request::SET_FEATURES, VERSION | NEED_REPLY, 0, 0),
        (request::SET_VRING_ADDR, VERSION | NEED_REPLY, 8, 8),
        (request::SET_MEM_TABLE, VERSION | NEED_REPLY, 4096, 4096),
        (request::GET_FEATURES, 0, 0, 0),
        (request::GET_FEATURES, 2, 0, 0),
        (request::GET_FEATURES, VERSION | REPLY, 0, 0),
    ];
    for (number, flags, size, payload) in lies {
        let session = scene.session();
        let bytes = message::encode_with_size(number, flags, size, &vec![0xff; payload]);
        let sent = session.raw(&bytes, &[]);
        drop(sent);
        drop(session);
        scene.witness.keeps_going();
    }
    scene.expect_usable("headers that lie");
    scene.finish();
}

#[test]
fn random_messages_on_a_running_nic() {
    let mut scene = Scene::new();
    let (bell, file) = (event(), memfd(MIB));
    let mut random = Random::new(1);
    for round in 0..40 {
        let nic = scene.nic();
        for _ in 0..100 {
            let number = random.below(44) as u32;
            let mut payload = Vec::new();
            for _ in 0..random.below(6) {
                payload.extend((random.next() >> random.below(64)).to_le_bytes());
            }
            if random.below(4) == 0 {
                payload.truncate(payload.len().saturating_sub(random.below(8) as usize));
            }
            let files = match random.below(4) {
                0 => fds(&bell, 1 + random.below(3) as usize),
                1 => fds(&*file, 1 + random.below(3) as usize),
                _ => vec![],
            };
            if nic.session().raw(&message::encode(number, VERSION, &payload), &files).is_err() {
                break;
            }
        }
        nic.vmm.vrings[1].kick.ring();
        drop(nic);
        scene.peer.poll();
        scene.expect_usable(&format!("random messages, round {round}"));
    }
    scene.finish();
}

#[test]
fn announcements_and_mtus_that_are_malformed() {
    let mut scene = Scene::new();
    let mut nic = scene.nic();
    let body = |bytes: &[u8]| bytes.to_vec();
    let wrong = [
        // Bodies of another length; no station: nobody, a group, everybody.
        (request::SEND_RARP, body(&[])),
        (request::SEND_RARP, body(&nic.mac)),
        (request::SEND_RARP, [&nic.mac[..], &[0; 3]].concat()),
        (request::SEND_RARP, vec![2; 4096]),
        (request::SEND_RARP, body(&[0; 8])),
        (request::SEND_RARP, body(&[1, 0, 0x5e, 0, 0, 1, 0, 0])),
        (request::SEND_RARP, body(&[0xff; 8])),
        (request::NET_SET_MTU, body(&[])),
        (request::NET_SET_MTU, body(&1500u32.to_le_bytes())),
        (request::NET_SET_MTU, [0xdc, 5].repeat(6)),
        (request::NET_SET_MTU, body(&67u64.to_le_bytes())),
        (request::NET_SET_MTU, body(&65_536u64.to_le_bytes())),
        (request::NET_SET_MTU, body(&(1500u64 | 1 << 32).to_le_bytes())),
        (request::NET_SET_MTU, body(&u64::MAX.to_le_bytes())),
    ];
    scene.peer.poll();
    for (number, body) in &wrong {
        refused(nic.session().tell(*number, body, &[], true), &format!("request {number} with {body:x?}"));
    }
    exchange(&mut nic, &mut scene.peer, 16);
    let heard = scene.peer.poll();
    assert!(heard.is_empty(), "somebody was announced: {heard:x?}");
    // The last two bytes of the address's eight mean nothing.
    let told = [&nic.mac[..], &[0xff; 2]].concat();
    answered(nic.session().tell(request::SEND_RARP, &told, &[], true), "an announcement");
    drop(nic);
    scene.finish();
}
