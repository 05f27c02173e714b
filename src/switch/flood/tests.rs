//! Visits of a queue as a shard makes them: whatever comes, each is bounded, and every port gets every frame once.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use crate::clock::Tick;
use crate::frame::{self, Batch, Flooding, Needs};
use crate::ident::{MacAddr, NetworkIndex, PortIndex};
use crate::limits::{BATCH_FRAMES, VISIT_PORT_WORK, VISIT_WORK};
use crate::mem::Span;
use crate::offload::{self, sketch::Sketch};
use crate::switch::{Fdb, NetworkRow, PortRow, Storm, StormRates, Tables, process};
use crate::verdict::{DropReason, Verdict};

const A: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 0xa]);
const B: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 0xb]);

/// `members` ports in one network, of which the second has `B` and the first sends with these bounds.
fn tables(members: u16, rates: StormRates) -> Tables {
    let row = |port| {
        let storm = Arc::new(Storm::default());
        storm.set(if port == 0 { rates } else { [None; 3] });
        Some(PortRow { network: NetworkIndex(0), mtu: None, macs: 100, storm })
    };
    let members: Box<[_]> = (0..members).map(PortIndex).collect();
    let ports = members.iter().map(|port| row(port.0)).collect();
    let network = NetworkRow { members, mac_age: Duration::from_secs(60), mac_limit: 1000 };
    let fdb = Fdb::with_capacity(0, [3, 4]);
    fdb.pin(NetworkIndex(0), B, PortIndex(1)).unwrap();
    Tables { ports, networks: [Some(network)].into(), fdb: fdb.into() }
}

/// A frame on its way: whom it is for, how long it is, and the payload of its segments if it is to be segmented.
#[derive(Debug, Clone, Copy)]
struct Sent {
    to: MacAddr,
    len: usize,
    segment: Option<u16>,
}

fn plain(to: MacAddr, len: usize) -> Sent {
    Sent { to, len, segment: None }
}

/// What one visit came to.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Visit {
    /// Frames that were in the batch and were dealt with.
    dealt_with: usize,
    /// To how many ports each frame in the batch went.
    ports: Vec<usize>,
    work: u32,
    dropped: usize,
}

/// The sender's queue.
struct Queue {
    tables: Tables,
    frames: VecDeque<(Vec<u8>, [u8; 12], Needs)>,
    flooding: Flooding,
}

impl Queue {
    fn new(tables: Tables, sent: &[Sent]) -> Self {
        let frame = |sent: &Sent| match sent.segment {
            None => {
                let bytes = [&sent.to.0[..], &A.0, &[0x88, 0xb5], &vec![7; sent.len - 14]].concat();
                (bytes, [0; 12], Needs::NONE)
            }
            Some(gso_size) => {
                let made = Sketch { payload: vec![7; sent.len], gso_size, ..Sketch::default() }.make();
                let mut bytes = made.bytes;
                bytes[..6].copy_from_slice(&sent.to.0);
                bytes[6..12].copy_from_slice(&A.0);
                (bytes, made.header.to_bytes(), Needs::ALL)
            }
        };
        Self { tables, frames: sent.iter().map(frame).collect(), flooding: Flooding::default() }
    }

    /// One visit, up to and with what the shard does: `None` if there is nothing.
    fn visit(&mut self, now: u32) -> Option<Visit> {
        let (mut heads, members) = (frame::heads(), self.tables.networks[0].as_ref().unwrap().members.len());
        let mut batch = Batch::new(&mut heads, 0);
        for (bytes, header, may) in self.frames.iter_mut().take(BATCH_FRAMES) {
            offload::admit(&mut batch, bytes.len(), &[Span::from_buffer(bytes)], header, *may);
        }
        batch.make_divisible(self.flooding);
        if batch.is_empty() {
            return None;
        }
        process(&self.tables, PortIndex(0), &mut batch, Tick(now));
        let ports = |(index, frame): (usize, &frame::Frame<'_>)| match frame.verdict {
            // The sender is the first of them.
            Verdict::Flood => batch.flood_range(index, members).filter(|&port| port != 0).count(),
            Verdict::Deliver(_) => 1,
            _ => 0,
        };
        let ports: Vec<usize> = batch.frames().iter().enumerate().map(ports).collect();
        let limited = Verdict::Drop(DropReason::StormLimited);
        let dropped = batch.frames().iter().filter(|frame| frame.verdict == limited).count();
        assert_eq!(batch.bytes(), batch.frames().iter().map(|frame| u64::from(frame.len)).sum::<u64>());
        assert_eq!(batch.gso_frames() as usize, batch.frames().iter().filter(|frame| frame.needs.is_gso()).count());
        if batch.takes_several_visits() {
            batch.note_flooded(true);
        }
        let (dealt_with, work) = (batch.dealt_with(), batch.work());
        self.flooding = batch.flooding();
        drop(batch);
        self.frames.drain(..dealt_with);
        Some(Visit { dealt_with, ports, work, dropped })
    }
}

#[test]
fn a_small_network_has_its_broadcasts_in_whole_batches() {
    let mut queue = Queue::new(tables(5, [None; 3]), &[plain(MacAddr::BROADCAST, 64); 64]);
    let visit = queue.visit(0).unwrap();
    assert_eq!((visit.dealt_with, visit.ports), (64, vec![4; 64]));
    assert_eq!(visit.work, 5 * (VISIT_PORT_WORK + 64));
}

#[test]
fn a_broadcast_to_a_thousand_ports_takes_several_visits_and_each_port_has_it_once() {
    let mut queue = Queue::new(tables(1001, [None; 3]), &[plain(MacAddr::BROADCAST, 64); 3]);
    let each = (VISIT_WORK / (VISIT_PORT_WORK + 1)) as usize;
    for _ in 0..3 {
        let mut reached = 0;
        loop {
            let visit = queue.visit(0).unwrap();
            assert!(visit.work <= VISIT_WORK && visit.ports.len() == 1 && visit.ports[0] <= each, "{visit:?}");
            reached += visit.ports[0];
            if visit.dealt_with == 1 {
                break;
            }
        }
        assert_eq!(reached, 1000);
    }
    assert_eq!((queue.visit(0), queue.flooding), (None, Flooding::default()));
}

/// What others wait for is some 0.15 ms: [`VISIT_WORK`] has the figures. A tenth of that costs ten times the visits, and ten times
/// that are lost interrupts.
#[test]
fn a_broadcast_to_a_thousand_ports_is_neither_one_visit_nor_a_hundred() {
    let mut queue = Queue::new(tables(1001, [None; 3]), &[plain(MacAddr::BROADCAST, 64)]);
    let visits = std::iter::from_fn(|| queue.visit(0)).count();
    assert!((3..=30).contains(&visits), "{visits}");
}

#[test]
fn what_waits_behind_a_large_flood_is_not_cut_with_it() {
    let mut sent = vec![plain(B, 64); 10];
    sent.push(plain(MacAddr::BROADCAST, 64));
    sent.extend([plain(B, 64); 60]);
    let mut queue = Queue::new(tables(300, [None; 3]), &sent);
    assert_eq!(queue.visit(0).unwrap().ports, [1; 10], "the broadcast does not fit behind anything");
    assert_eq!((0..2).map(|_| queue.visit(0).unwrap().dealt_with).collect::<Vec<_>>(), [0, 0]);
    let visit = queue.visit(0).unwrap();
    assert!(visit.ports[0] < 113 && visit.ports[1..] == [1; 60], "{visit:?}");
}

#[test]
fn another_frame_in_the_place_of_one_that_was_begun_begins_anew() {
    let large = Sent { to: MacAddr::BROADCAST, len: 65_000, segment: Some(48) };
    for (replaced, reached) in [(plain(B, 64), 1), (plain(MacAddr([1; 6]), 64), 299), (large, 299)] {
        let mut queue = Queue::new(tables(300, [Some(25), None, None]), &[plain(MacAddr::BROADCAST, 64)]);
        assert_eq!(queue.visit(0).unwrap().dealt_with, 0);
        queue.frames = Queue::new(tables(2, [None; 3]), &[replaced]).frames;
        let visits: Vec<Visit> = std::iter::from_fn(|| queue.visit(0)).collect();
        assert_eq!(visits.iter().map(|visit| visit.ports[0]).sum::<usize>(), reached, "{replaced:?}");
        // And is held against the bounds as what it is: 25 may go at once, of which two did, or 1355 are owed.
        queue.frames = Queue::new(tables(2, [None; 3]), &[plain(MacAddr::BROADCAST, 64); 40]).frames;
        let dropped: usize = std::iter::from_fn(|| queue.visit(0)).map(|visit| visit.dropped).sum();
        assert_eq!(dropped, if replaced.segment.is_some() { 40 } else { 16 }, "{replaced:?}");
    }
    let mut queue = Queue::new(tables(300, [None; 3]), &[plain(MacAddr::BROADCAST, 64)]);
    queue.visit(0);
    queue.tables.ports[0] = None;
    assert_eq!((queue.visit(0).unwrap().ports, queue.flooding), (vec![0], Flooding::default()), "its port went");
}

#[test]
fn segments_are_counted_for_whoever_gets_them() {
    // What Linux sends: four of these are all that a batch may have.
    let usual = Sent { to: B, len: 65_000, segment: Some(1448) };
    assert_eq!(Queue::new(tables(2, [None; 3]), &[usual; 4]).visit(0).unwrap().dealt_with, 4);
    // The smallest segments: one frame is more than a visit may come to, and is one all the same.
    let small = Sent { to: B, len: 65_000, segment: Some(48) };
    let mut queue = Queue::new(tables(2, [None; 3]), &[small; 4]);
    let visits: Vec<Visit> = std::iter::from_fn(|| queue.visit(0)).collect();
    assert_eq!(visits.iter().map(|visit| visit.dealt_with).collect::<Vec<_>>(), [1; 4]);
    assert!(visits.iter().all(|visit| (1355..1763).contains(&visit.work)), "{visits:?}");
    // Flooded, each port has a visit of its own.
    let mut queue = Queue::new(tables(5, [None; 3]), &[Sent { to: MacAddr::BROADCAST, ..small }]);
    let visits: Vec<Visit> = std::iter::from_fn(|| queue.visit(0)).collect();
    assert!(visits.iter().all(|visit| visit.ports[0] <= 1 && visit.work < 1763), "{visits:?}");
    assert_eq!(visits.iter().map(|visit| visit.ports[0]).sum::<usize>(), 4);
}

#[test]
fn a_frame_is_held_against_the_ports_bounds_once_however_many_visits_it_takes() {
    let mut queue = Queue::new(tables(1001, [Some(16), None, None]), &[plain(MacAddr::BROADCAST, 64); 100]);
    let visits: Vec<Visit> = std::iter::from_fn(|| queue.visit(0)).collect();
    let reached: usize = visits.iter().flat_map(|visit| &visit.ports).sum();
    assert_eq!(reached, 16 * 1000, "16 at once");
    assert_eq!(visits.iter().map(|visit| visit.dropped).sum::<usize>(), 84);
    assert!(visits.len() < 16 * 10 + 5, "what is dropped anyway costs no visits: {}", visits.len());
    assert_eq!(queue.tables.ports[0].as_ref().unwrap().storm.refused(), [84, 0, 0]);
}

fn any_frame() -> impl Strategy<Value = Sent> {
    let to = prop_oneof![Just(B), Just(MacAddr::BROADCAST), Just(MacAddr([0x33, 0x33, 0, 0, 0, 1]))];
    let segment = prop::option::weighted(0.2, prop_oneof![48..60u16, 500..1500u16]);
    (to, 60..9000usize, segment).prop_map(|(to, len, segment)| Sent { to, len, segment })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 64 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_visit_is_bounded_and_every_port_gets_every_frame_once(
        members in prop_oneof![2..20u16, 100..140u16, 900..1100u16],
        sent in prop::collection::vec(any_frame(), 1..100),
    ) {
        let mut queue = Queue::new(tables(members, [None; 3]), &sent);
        let (mut at, mut reached, mut visits) = (0, 0, 0);
        while let Some(visit) = queue.visit(0) {
            let alone = visit.ports.len() == 1 && visit.ports[0] <= 1;
            prop_assert!(visit.work <= VISIT_WORK || alone, "{visit:?}");
            for (index, ports) in visit.ports.iter().enumerate() {
                reached += ports;
                if index < visit.dealt_with {
                    prop_assert_eq!(reached, if sent[at].to == B { 1 } else { usize::from(members) - 1 });
                    (at, reached) = (at + 1, 0);
                }
            }
            visits += 1;
            prop_assert!(visits <= sent.len() * usize::from(members), "it does not end");
        }
        prop_assert_eq!(at, sent.len());
    }
}
