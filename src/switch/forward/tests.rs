//! Each rule of forwarding by itself, then whole batches against a model that looks every frame up.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::frame;
use crate::ident::MacAddr;
use crate::mem::Span;
use crate::switch::fdb::model::Model;
use crate::switch::{FLAP_MOVES, IncidentKind, Learned, NetworkRow, PortRow};
use crate::wire::ethernet;

const A: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 0xa]);
const B: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 0xb]);
const C: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 0xc]);
const NOBODY: MacAddr = MacAddr([0; 6]);
const MULTICAST: MacAddr = MacAddr([0x33, 0x33, 0, 0, 0, 1]);
const LLDP: MacAddr = MacAddr([0x01, 0x80, 0xc2, 0, 0, 0x0e]);

/// A frame as a test says it.
#[derive(Debug, Clone, Copy)]
struct Sent {
    destination: MacAddr,
    source: MacAddr,
    tags: usize,
    payload: usize,
    dropped: bool,
}

fn sent(destination: MacAddr, source: MacAddr) -> Sent {
    Sent { destination, source, tags: 0, payload: 46, dropped: false }
}

impl Sent {
    fn len(&self) -> usize {
        ethernet::HEADER_BYTES + ethernet::TAG_BYTES * self.tags + self.payload
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [self.destination.0, self.source.0].concat();
        for tag in 0..self.tags {
            bytes.extend([0x81, 0x00, 0x20, tag as u8]);
        }
        bytes.extend([0x08, 0x00]);
        bytes.resize(self.len(), 0x5a);
        bytes
    }
}

/// Ports 0, 1 and 2 are in network 0, port 4 is alone in network 1, port 3 does not exist, port 5's network does not.
fn tables() -> Tables {
    let port = |network| Some(PortRow { network: NetworkIndex(network), mtu: None, macs: 100, storm: Arc::default() });
    let network = |members: &[u16]| {
        let members = members.iter().copied().map(PortIndex).collect();
        Some(NetworkRow { members, mac_age: Duration::from_secs(60), mac_limit: 1000 })
    };
    Tables {
        ports: Box::new([port(0), port(0), port(0), None, port(1), port(7)]),
        networks: Box::new([network(&[0, 1, 2]), network(&[4])]),
        fdb: Arc::new(Fdb::with_capacity(0, [3, 4])),
    }
}

fn run(tables: &Tables, ingress: u16, now: u32, frames: &[Sent]) -> Vec<Verdict> {
    let mut bytes: Vec<Vec<u8>> = frames.iter().map(Sent::bytes).collect();
    let mut heads = frame::heads();
    let mut batch = Batch::new(&mut heads, 0);
    for (frame, bytes) in frames.iter().zip(&mut bytes) {
        if frame.dropped {
            batch.push_dropped(bytes.len(), DropReason::HeaderTruncated);
        } else {
            batch.push(bytes.len(), &[Span::from_buffer(bytes)]);
        }
    }
    process(tables, PortIndex(ingress), &mut batch, Tick(now));
    batch.frames().iter().map(|frame| frame.verdict).collect()
}

fn one(tables: &Tables, ingress: u16, frame: Sent) -> Verdict {
    run(tables, ingress, 0, &[frame])[0]
}

const fn dropped(reason: DropReason) -> Verdict {
    Verdict::Drop(reason)
}

const fn deliver(port: u16) -> Verdict {
    Verdict::Deliver(PortIndex(port))
}

#[test]
fn an_unknown_station_is_flooded_to_until_it_answers() {
    let tables = tables();
    assert_eq!(one(&tables, 0, sent(B, A)), Verdict::Flood);
    assert_eq!(one(&tables, 1, sent(A, B)), deliver(0));
    assert_eq!(run(&tables, 0, 0, &[sent(B, A), sent(B, A), sent(C, A)]), [deliver(1), deliver(1), Verdict::Flood]);
}

#[test]
fn groups_are_flooded_and_never_learned() {
    let tables = tables();
    assert_eq!(run(&tables, 0, 0, &[sent(MacAddr::BROADCAST, A), sent(MULTICAST, A)]), [Verdict::Flood; 2]);
    let bad = [sent(A, MULTICAST), sent(A, MacAddr::BROADCAST), sent(A, NOBODY), sent(NOBODY, NOBODY)];
    assert_eq!(run(&tables, 1, 0, &bad), [dropped(DropReason::SourceInvalid); 4]);
    assert_eq!(tables.fdb.len(), 1);
}

#[test]
fn no_frame_goes_back_where_it_came_from() {
    let tables = tables();
    let frames = [sent(A, A), sent(B, A), sent(A, B), sent(B, A)];
    let same = dropped(DropReason::SamePort);
    assert_eq!(run(&tables, 0, 0, &frames), [same, Verdict::Flood, same, same]);
}

#[test]
fn link_local_groups_end_here_and_teach_nothing() {
    let tables = tables();
    for last in 0..=0x10 {
        let group = MacAddr([0x01, 0x80, 0xc2, 0, 0, last]);
        let want = if last < 0x10 { dropped(DropReason::LinkLocalGroup) } else { Verdict::Flood };
        assert_eq!(one(&tables, 0, sent(group, A)), want, "{group}");
        assert_eq!(tables.fdb.is_empty(), last < 0x10);
    }
}

#[test]
fn the_mtu_is_about_the_payload_and_tags_do_not_count() {
    let mut tables = tables();
    if let Some(row) = &mut tables.ports[0] {
        row.mtu = Some(1500);
    }
    let verdict = |tags, payload| one(&tables, 0, Sent { tags, payload, ..sent(B, A) });
    for tags in 0..=2 {
        assert_eq!(verdict(tags, 1501), dropped(DropReason::MtuExceeded), "{tags} tags");
        assert!(tables.fdb.is_empty(), "{tags} tags: a frame that is dropped for its length teaches nothing");
        assert_eq!(verdict(tags, 1500), Verdict::Flood, "{tags} tags");
        tables.fdb.flush(crate::switch::Flush::default());
    }
    assert_eq!(verdict(3, 1496), Verdict::Flood);
    assert_eq!(verdict(3, 1497), dropped(DropReason::MtuExceeded), "the third tag is payload");
    let long = Sent { payload: 9000, ..sent(B, MULTICAST) };
    assert_eq!(one(&tables, 0, long), dropped(DropReason::SourceInvalid), "an invalid source comes first");
    let long = Sent { payload: 9000, ..sent(LLDP, A) };
    assert_eq!(one(&tables, 0, long), dropped(DropReason::MtuExceeded), "and the link's own groups after it");
    assert_eq!(one(&tables, 1, Sent { payload: 65_535, ..sent(MULTICAST, B) }), Verdict::Flood, "port 1 has no MTU");
}

#[test]
fn a_lonely_port_and_a_port_without_a_row_reach_nobody() {
    let tables = tables();
    let nobody = dropped(DropReason::NoDestination);
    assert_eq!(run(&tables, 4, 0, &[sent(MacAddr::BROADCAST, A), sent(B, A)]), [nobody; 2]);
    for ingress in [3, 5, 6, 4095, u16::MAX] {
        let earlier = Sent { dropped: true, ..sent(B, A) };
        let verdicts = run(&tables, ingress, 0, &[sent(B, A), earlier]);
        assert_eq!(verdicts, [nobody, dropped(DropReason::HeaderTruncated)], "port {ingress}");
    }
}

#[test]
fn no_frame_leaves_its_network_whatever_the_fdb_says() {
    let tables = tables();
    tables.fdb.pin(NetworkIndex(0), B, PortIndex(4)).unwrap();
    tables.fdb.pin(NetworkIndex(0), C, PortIndex(3)).unwrap();
    assert_eq!(run(&tables, 0, 0, &[sent(B, A), sent(C, A)]), [dropped(DropReason::NoDestination); 2]);
    // The same address in another network is another station.
    run(&tables, 4, 0, &[sent(MacAddr::BROADCAST, A)]);
    tables.fdb.unpin(NetworkIndex(0), B);
    assert_eq!(one(&tables, 1, sent(A, B)), deliver(0));
}

#[test]
fn dropped_frames_stay_dropped_and_do_not_disturb_their_neighbours() {
    let tables = tables();
    one(&tables, 1, sent(A, B));
    let earlier = Sent { dropped: true, ..sent(C, C) };
    let frames = [earlier, sent(B, A), earlier, sent(B, A), sent(C, NOBODY), sent(B, A)];
    let truncated = dropped(DropReason::HeaderTruncated);
    let want = [truncated, deliver(1), truncated, deliver(1), dropped(DropReason::SourceInvalid), deliver(1)];
    assert_eq!(run(&tables, 0, 0, &frames), want);
    assert_eq!(tables.fdb.len(), 2);
}

#[test]
fn stations_move_age_and_flap_in_virtual_time() {
    let tables = tables();
    one(&tables, 0, sent(MULTICAST, A));
    run(&tables, 2, 10, &[sent(MULTICAST, A)]);
    assert_eq!(run(&tables, 1, 10, &[sent(A, B)]), [deliver(2)]);
    assert_eq!((tables.sweep(Tick(609), |_| false).aged, tables.sweep(Tick(610), |_| false).aged), (0, 2));
    assert_eq!(run(&tables, 1, 610, &[sent(A, B)]), [Verdict::Flood]);
    // Seen at port 0, and then in turn there and at port 1, which has it four times before it is damped and goes home.
    let verdicts: Vec<_> = (0..12).map(|n| run(&tables, n % 2, 700, &[sent(MULTICAST, C)])[0]).collect();
    let damped = dropped(DropReason::SourceDamped);
    let flooded = verdicts.iter().take_while(|verdict| **verdict == Verdict::Flood).count();
    assert_eq!(flooded, 2 + usize::from(FLAP_MOVES));
    assert_eq!(verdicts[flooded..], [damped, Verdict::Flood, damped, Verdict::Flood, damped]);
    let counters = tables.fdb.counters();
    assert_eq!((counters.moved, counters.damped), (2 + u64::from(FLAP_MOVES), 3));
    assert_eq!(run(&tables, 2, 700, &[sent(C, A)]), [deliver(0)]);
}

/// A frame of C with the addresses that a loop of ports 1 and 2 brings back.
#[test]
fn a_loop_ends_and_takes_nothing_from_whom_it_is_about() {
    let tables = tables();
    // The copies of one broadcast come in at the port that its last copy was not from, as long as they are flooded.
    one(&tables, 0, sent(MULTICAST, C));
    let mut copies = std::collections::VecDeque::from([1u16, 2]);
    let mut rounds = 0;
    while let Some(port) = copies.pop_front() {
        rounds += 1;
        if one(&tables, port, sent(MULTICAST, C)) == Verdict::Flood {
            copies.push_back(3 - port);
        }
        assert!(rounds < 20, "it goes round for ever");
    }
    // C is where it was, and every frame of its own is good, also when copies come between two of them.
    for _ in 0..5 {
        assert_eq!(one(&tables, 1, sent(B, C)), dropped(DropReason::SourceDamped));
        assert_eq!(one(&tables, 0, sent(MULTICAST, C)), Verdict::Flood);
        assert_eq!(one(&tables, 2, sent(C, B)), deliver(0));
    }
    let (incidents, lost) = tables.fdb.take_incidents();
    let kind = |port| incidents.iter().any(|i| (i.kind, i.port.0, i.other.0) == (IncidentKind::Damped, port, 0));
    assert!(kind(1) && kind(2) && lost == 0, "{incidents:?}");
}

#[test]
fn a_pinned_address_is_good_at_its_own_port_only() {
    let tables = tables();
    tables.fdb.pin(NetworkIndex(0), C, PortIndex(0)).unwrap();
    let pinned = dropped(DropReason::SourcePinned);
    let frames = [sent(B, C), sent(B, A), sent(B, C), sent(A, C), sent(MULTICAST, C)];
    assert_eq!(run(&tables, 1, 0, &frames), [pinned, Verdict::Flood, pinned, pinned, pinned]);
    assert_eq!(one(&tables, 0, sent(A, C)), deliver(1));
    let (incidents, _) = tables.fdb.take_incidents();
    let told: Vec<_> = incidents.iter().map(|i| (i.kind, i.mac, i.port.0, i.other.0)).collect();
    assert_eq!(told, [(IncidentKind::Pinned, C, 1, 0)]);
}

/// What `process` has to decide, frame by frame, without a memo.
fn expected(model: &mut Model, tables: &Tables, ingress: u16, now: u32, frame: &Sent) -> Verdict {
    let port = PortIndex(ingress);
    if frame.dropped {
        return dropped(DropReason::HeaderTruncated);
    }
    let row = tables.port(port).and_then(|row| tables.network(row.network).map(|network| (row, network)));
    let Some((row, network)) = row else { return dropped(DropReason::NoDestination) };
    if !frame.source.is_station() {
        return dropped(DropReason::SourceInvalid);
    }
    let longest = row.mtu.map(|mtu| usize::from(mtu) + 14 + 4 * frame.tags.min(2));
    if longest.is_some_and(|longest| frame.len() > longest) {
        return dropped(DropReason::MtuExceeded);
    }
    if frame.destination.0[..5] == LLDP.0[..5] && frame.destination.0[5] < 16 {
        return dropped(DropReason::LinkLocalGroup);
    }
    let limits = Limits { port: row.macs, network: network.mac_limit };
    match model.learn(row.network, frame.source, port, limits, Tick(now)) {
        Learned::Damped => return dropped(DropReason::SourceDamped),
        Learned::Pinned => return dropped(DropReason::SourcePinned),
        _ => {}
    }
    let known = model.lookup(row.network, frame.destination).filter(|_| !frame.destination.is_group());
    let in_network = |port| tables.port(port).is_some_and(|other| other.network == row.network);
    match known {
        Some(known) if known == port => dropped(DropReason::SamePort),
        Some(known) if in_network(known) => Verdict::Deliver(known),
        None if network.members.iter().any(|&member| member != port) => Verdict::Flood,
        _ => dropped(DropReason::NoDestination),
    }
}

fn any_mac() -> impl Strategy<Value = MacAddr> {
    let station = (0..6u8).prop_map(|last| MacAddr([0x52, 0x54, 0, 0, 0, last]));
    prop_oneof![12 => station, 1 => Just(MacAddr::BROADCAST), 1 => Just(MULTICAST), 1 => Just(LLDP), 1 => Just(NOBODY)]
}

fn any_frame() -> impl Strategy<Value = Sent> {
    let payload = prop_oneof![8 => Just(46usize), 1 => 90..112usize];
    (any_mac(), any_mac(), 0..4usize, payload, prop::bool::weighted(0.05))
        .prop_map(|(destination, source, tags, payload, dropped)| Sent { destination, source, tags, payload, dropped })
}

/// Runs of equal frames, as they come, so that the memo has something to do; 64 frames at most.
fn any_batch() -> impl Strategy<Value = (u16, u32, Vec<Sent>)> {
    let runs = prop::collection::vec((any_frame(), 1..5usize), 1..16);
    let frames = runs.prop_map(|runs| runs.into_iter().flat_map(|(frame, n)| std::iter::repeat_n(frame, n)).collect());
    (0..7u16, 0..40u32, frames)
}

prop_compose! {
    fn any_tables()(
        ports in prop::collection::vec(
            prop::option::weighted(0.9, (0..3u16, prop::option::of(100..104u16), 0..6u32)), 6),
        limits in prop::collection::vec(prop::option::weighted(0.9, 0..8u32), 3),
        pins in prop::collection::vec((0..3u16, 0..6u8, 0..7u16), 0..3),
    ) -> (Tables, Model) {
        let ports: Box<[_]> = ports
            .into_iter()
            .map(|row| {
                let storm = Arc::default();
                row.map(|(network, mtu, macs)| PortRow { network: NetworkIndex(network), mtu, macs, storm })
            })
            .collect();
        let members = |network: usize| {
            let is_member = |port: &PortIndex| ports[port.index()].as_ref().is_some_and(|p| p.network.index() == network);
            (0..6).map(PortIndex).filter(is_member).collect()
        };
        let networks = limits.into_iter().enumerate().map(|(network, limit)| {
            limit.map(|mac_limit| NetworkRow { members: members(network), mac_age: Duration::from_secs(9), mac_limit })
        });
        let networks = networks.collect();
        let (fdb, mut model) = (Fdb::with_capacity(0, [5, 6]), Model::default());
        for (network, last, port) in pins {
            let (network, mac, port) = (NetworkIndex(network), MacAddr([0x52, 0x54, 0, 0, 0, last]), PortIndex(port));
            fdb.pin(network, mac, port).unwrap();
            model.pin(network, mac, port);
        }
        (Tables { ports, networks, fdb: Arc::new(fdb) }, model)
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 256 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_verdict_is_the_one_without_a_memo(
        (tables, mut model) in any_tables(),
        batches in prop::collection::vec(any_batch(), 1..12),
    ) {
        let mut now = 0;
        for (ingress, wait, frames) in batches {
            now += wait;
            let age = |network| tables.network(network).map(|row| row.mac_age);
            prop_assert_eq!(tables.sweep(Tick(now), |_| false).aged, model.sweep(Tick(now), age, |_| false));
            let want: Vec<Verdict> =
                frames.iter().map(|frame| expected(&mut model, &tables, ingress, now, frame)).collect();
            prop_assert_eq!(run(&tables, ingress, now, &frames), want);
            model.assert_same(&tables.fdb, Tick(now));
        }
    }
}
