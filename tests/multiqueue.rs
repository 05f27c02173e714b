//! Guests with several queue pairs: flows spread over the pairs in use, keep their order, and come back on the pair that
//! the guest last sent them on.

#![allow(clippy::unwrap_used)]

mod frontend;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use frontend::daemon::{self, Daemon};
use frontend::nic::{Nic, NicConfig, meet};

const FLOWS: u16 = 64;

/// A UDP datagram over IPv4, without checksums, whose flow is named by `flow` and which carries `number`.
fn datagram(to: [u8; 6], from: [u8; 6], flow: u16, reply: bool, number: u32) -> Vec<u8> {
    let (here, there) = (([10, 0, 0, 1], 1000 + flow), ([10, 0, 0, 2], 53));
    let (source, destination) = if reply { (there, here) } else { (here, there) };
    let mut bytes = [to, from].concat();
    bytes.extend([0x08, 0, 0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0]);
    bytes.extend([source.0, destination.0].concat());
    bytes.extend([source.1.to_be_bytes(), destination.1.to_be_bytes(), [0, 12], [0, 0]].concat());
    bytes.extend(number.to_be_bytes());
    bytes
}

/// Flow and number of a datagram that [`datagram`] made, in the direction that is no reply.
fn parse(frame: &[u8]) -> (u16, u32) {
    (u16::from_be_bytes([frame[34], frame[35]]) - 1000, u32::from_be_bytes(frame[42..46].try_into().unwrap()))
}

/// Sends `count` datagrams of each flow from `a` and returns the pair of `b` that each flow came in on.
fn send(a: &mut Nic, b: &mut Nic, count: u32) -> BTreeMap<u16, usize> {
    let (mut pairs, mut next) = (BTreeMap::new(), BTreeMap::<u16, u32>::new());
    for number in 0..count {
        for flow in 0..FLOWS {
            a.send(&datagram(b.mac, a.mac, flow, false, number));
        }
        for (pair, got) in b.receive(usize::from(FLOWS)) {
            let (flow, number) = parse(&got.frame);
            assert_eq!(*pairs.entry(flow).or_insert(pair), pair, "flow {flow} has changed pairs");
            assert_eq!(number, *next.entry(flow).and_modify(|next| *next += 1).or_insert(0), "order of flow {flow}");
        }
    }
    pairs
}

fn pair(daemon: &Daemon, pairs: usize) -> (Nic, Nic) {
    let config = NicConfig { pairs, enabled_pairs: pairs, ..NicConfig::default() };
    let (mut a, mut b) = (Nic::up(&daemon.socket("a"), &config), Nic::up(&daemon.socket("b"), &config));
    meet(&mut a, &mut b);
    (a, b)
}

#[test]
fn flows_spread_over_the_pairs_in_use_and_keep_their_order() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let (mut a, mut b) = pair(&daemon, 4);
    for pairs in [4, 2, 3, 1, 4] {
        b.set_pairs(pairs).unwrap();
        let used: BTreeSet<_> = send(&mut a, &mut b, 5).into_values().collect();
        assert_eq!(used, (0..pairs).collect(), "64 flows over {pairs} pairs");
    }
}

#[test]
fn answers_come_in_on_the_pair_that_the_guest_asked_on() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let (mut a, mut b) = pair(&daemon, 4);
    for turn in 0..3 {
        for flow in 0..FLOWS {
            let request = datagram(a.mac, b.mac, flow, true, 0);
            b.send_on((usize::from(flow) + turn) % 4, &request);
        }
        a.receive(usize::from(FLOWS));
        let pairs = send(&mut a, &mut b, 3);
        let astray = pairs.iter().filter(|&(&flow, &pair)| pair != (usize::from(flow) + turn) % 4).count();
        // Flows that share a place of the table share a pair: one couple of 64 flows in half of all cases, five never.
        assert!(astray < 10, "{astray} of 64 flows came in elsewhere: {pairs:?}");
    }
}

/// The hash that flows had when its constants were in the source, for UDP over IPv4.
fn known_hash(source: ([u8; 4], u16), destination: ([u8; 4], u16)) -> u32 {
    let mix = |x: u64| {
        let wide = u128::from(x ^ 0x243f_6a88_85a3_08d3) * 0x1319_8a2e_0370_7345;
        wide as u64 ^ (wide >> 64) as u64
    };
    let end = |(address, port): ([u8; 4], u16)| mix(u64::from(u32::from_be_bytes(address)) << 16 | u64::from(port));
    let hash = mix(end(source).wrapping_add(end(destination)) ^ 17);
    (hash ^ hash >> 32) as u32
}

/// A UDP datagram between these.
fn udp(to: [u8; 6], from: [u8; 6], source: ([u8; 4], u16), destination: ([u8; 4], u16)) -> Vec<u8> {
    let mut bytes = [to, from].concat();
    bytes.extend([0x08, 0, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0]);
    bytes.extend([source.0, destination.0].concat());
    bytes.extend([source.1.to_be_bytes(), destination.1.to_be_bytes(), [0, 8], [0, 0]].concat());
    bytes
}

/// 4096 flows that would fill each place of the victim's table with its first queue if nobody had chosen another key.
fn chosen_flows(from: [u8; 4], to: [u8; 4]) -> Vec<(u16, u16)> {
    let mut taken = vec![false; 4096];
    let ports = (1..u16::MAX).flat_map(|destination| (1..u16::MAX).map(move |source| (source, destination)));
    let fills = ports.filter(|&(source, destination)| {
        let hash = known_hash((from, source), (to, destination));
        hash.is_multiple_of(4) && !std::mem::replace(&mut taken[(hash >> 12) as usize % 4096], true)
    });
    fills.take(4096).collect()
}

#[test]
fn nobody_chooses_the_queues_of_others() {
    let daemon = Daemon::with_ports(&["victim", "bad", "client"]);
    let mut victim =
        Nic::up(&daemon.socket("victim"), &NicConfig { pairs: 4, enabled_pairs: 4, ..NicConfig::default() });
    let [mut bad, mut client] = ["bad", "client"].map(|port| Nic::up(&daemon.socket(port), &NicConfig::default()));
    meet(&mut victim, &mut bad);
    meet(&mut victim, &mut client);
    let (own, theirs) = ([10, 0, 0, 1], [10, 0, 0, 255]);
    for (source, destination) in chosen_flows(theirs, own) {
        bad.send(&udp(victim.mac, bad.mac, (theirs, source), (own, destination)));
        victim.receive(1);
    }
    let mut on = [0; 4];
    for flow in 0..1000u32 {
        let [_, a, b, c] = flow.to_be_bytes();
        let source = ([11, a, b, c], 1024 + flow as u16);
        client.send(&udp(victim.mac, client.mac, source, (own, 443)));
        let (pair, _) = victim.receive(1).remove(0);
        on[pair] += 1;
    }
    // 250 each, give or take 14.
    assert!(on.iter().all(|&flows| flows > 150), "new flows of another guest, by queue: {on:?}");
}

/// What front ends send is a set of rings, not a number of pairs: any of 128, on and off while frames come.
#[test]
fn any_pairs_of_128_may_be_enabled() {
    const PAIRS: usize = 128;
    let daemon = Daemon::start(|dir| {
        let ports = daemon::port(dir, "a", "lan") + &daemon::port(dir, "b", "lan");
        let head = daemon::preamble(dir) + "networks: { lan: {} }\nports:\n";
        head + &ports.replace("queues: 4", &format!("queues: {PAIRS}"))
    });
    let few = NicConfig { size: 64, ..NicConfig::default() };
    let many = NicConfig { pairs: PAIRS, enabled_pairs: PAIRS, ..few.clone() };
    let (mut a, mut b) = (Nic::up(&daemon.socket("a"), &few), Nic::up(&daemon.socket("b"), &many));
    meet(&mut a, &mut b);
    let all = send(&mut a, &mut b, 2).into_values().collect::<BTreeSet<_>>();
    assert!(all.len() > 16, "64 flows over 128 pairs: {all:?}");
    let patterns: [fn(usize) -> bool; 6] = [
        |pair| pair % 2 == 0,
        |pair| pair >= 64,
        |pair| pair == PAIRS - 1,
        |_| false,
        |pair| pair * 7919 % 5 < 2,
        |_| true,
    ];
    for (number, pattern) in patterns.into_iter().enumerate() {
        let before = daemon.port_when("a", "its books are closed", |port| port.is_conserved());
        for pair in 0..PAIRS {
            for ring in [2 * pair, 2 * pair + 1] {
                b.session().set_vring_enable(ring as u32, pattern(pair), true).unwrap();
            }
        }
        for flow in 0..FLOWS {
            a.send(&datagram(b.mac, a.mac, flow, false, number as u32));
        }
        a.drain();
        let after = daemon.port_when("a", "each frame has had its end", |port| port.is_conserved());
        let dropped = after.all_drops() - before.all_drops();
        let heard = b.gather(usize::from(FLOWS) - dropped as usize, Instant::now() + frontend::DEADLINE);
        assert_eq!(heard.len() as u64 + dropped, u64::from(FLOWS), "pattern {number}");
        let astray: Vec<_> = heard.iter().map(|(pair, _)| *pair).filter(|&pair| !pattern(pair)).collect();
        assert!(astray.is_empty(), "pattern {number}: frames on pairs {astray:?}, which are off");
        // Some rings on the guest's other end: it sends on each that is on, and is heard.
        for pair in (0..PAIRS).filter(|&pair| pattern(pair)).take(8) {
            b.send_on(pair, &datagram(a.mac, b.mac, 1, true, pair as u32));
            assert_eq!(a.receive(1).len(), 1, "pattern {number}, pair {pair}");
        }
    }
    send(&mut a, &mut b, 2);
}
