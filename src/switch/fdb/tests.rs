//! The FDB against its model, at its limits, full, and with several shards at once.

#![allow(clippy::unwrap_used)]

mod share;

use std::time::Duration;

use proptest::prelude::*;

use super::model::Model;
use super::*;
use crate::clock::Tick;

const SEED: [u64; 2] = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];
const NO_LIMITS: Limits = Limits { port: u32::MAX, network: u32::MAX };
const SHARE: u32 = crate::limits::PORT_MACS_SHARE;
const NETWORK: NetworkIndex = NetworkIndex(1);

/// A station's address by number, in the order in which hypervisors give them out.
fn mac(number: u32) -> MacAddr {
    MacAddr::from_bits(0x5254_0000_0000 + u64::from(number))
}

fn learn(fdb: &Fdb, number: u32, port: u16, now: u32) -> Learned {
    fdb.learn(NETWORK, mac(number), PortIndex(port), NO_LIMITS, Tick(now))
}

fn port_of(fdb: &Fdb, number: u32) -> Option<u16> {
    fdb.lookup(NETWORK, mac(number)).map(|port| port.0)
}

#[test]
fn a_station_is_found_in_its_own_network_only() {
    let fdb = Fdb::with_capacity(0, SEED);
    assert_eq!(fdb.capacity(), Fdb::CAPACITY_MIN);
    assert_eq!(learn(&fdb, 1, 7, 0), Learned::New);
    assert_eq!(port_of(&fdb, 1), Some(7));
    assert_eq!(fdb.lookup(NetworkIndex(2), mac(1)), None);
    assert_eq!(fdb.lookup(NetworkIndex(0), MacAddr([0; 6])), None);
    assert_eq!(fdb.counters(), FdbCounters { learned: 1, ..FdbCounters::default() });
}

#[test]
fn what_is_no_station_is_neither_learned_nor_pinned() {
    let fdb = Fdb::with_capacity(0, SEED);
    for bad in [MacAddr([0; 6]), MacAddr::BROADCAST, MacAddr([1, 0, 0, 0, 0, 1])] {
        assert_eq!(fdb.learn(NetworkIndex(0), bad, PortIndex(0), NO_LIMITS, Tick(0)), Learned::NoStation);
        assert_eq!(fdb.pin(NetworkIndex(0), bad, PortIndex(0)), Err(PinError::NoStation(bad)));
    }
    assert!(fdb.is_empty());
}

#[test]
fn limits_refuse_new_stations_and_moves_and_count_them() {
    let fdb = Fdb::with_capacity(0, SEED);
    let limits = Limits { port: SHARE + 2, network: SHARE + 3 };
    let at = |number, port| fdb.learn(NETWORK, mac(number), PortIndex(port), limits, Tick(0));
    assert!((100..100 + SHARE).all(|number| at(number, 0) == Learned::New));
    assert_eq!([at(0, 0), at(1, 0), at(2, 0)], [Learned::New, Learned::New, Learned::Refused]);
    assert_eq!(
        [at(2, 1), at(2, 0)],
        [Learned::New, Learned::Refused],
        "port 0 is full, so the station stays at port 1"
    );
    assert_eq!(at(0, 1), Learned::Moved);
    assert_eq!((fdb.port_macs(PortIndex(0)), fdb.port_macs(PortIndex(1))), (SHARE + 1, 2));
    assert_eq!((fdb.network_macs(NETWORK), at(3, 0)), (SHARE + 3, Learned::Refused), "the network is full");
    assert_eq!([0, 1].map(|port| fdb.port_refused(PortIndex(port))), [[2, 1, 0, 0], [0; 4]]);
    assert_eq!(fdb.counters().refused, 3);
    fdb.pin(NETWORK, mac(0), PortIndex(1)).unwrap();
    assert_eq!((fdb.port_macs(PortIndex(1)), at(9, 0)), (1, Learned::New), "a pin is not counted");
    fdb.forget_port(PortIndex(0));
    assert_eq!(fdb.port_refused(PortIndex(0)), [0; 4], "the next one of that number begins anew");
}

/// Numbers of stations that all have the same two lines, eight places.
fn meeting(fdb: &Fdb, count: usize) -> Vec<u32> {
    let lines = |number| fdb.candidates(Key::new(NETWORK, mac(number))).map(|bucket| std::ptr::from_ref(bucket).addr());
    (0..2_000_000).filter(|&number| lines(number) == lines(0)).take(count).collect()
}

#[test]
fn a_flapping_station_goes_home_and_is_counted() {
    let fdb = Fdb::with_capacity(0, SEED);
    learn(&fdb, 1, 0, 0);
    for frame in 0..100 {
        learn(&fdb, 1, 1 - (frame % 2) as u16, 1 + frame / 4);
    }
    // Damped when port 0, its home, saw it once more: then it was there, and the other port was not believed.
    let counters = fdb.counters();
    assert_eq!((counters.moved, counters.damped), (u64::from(FLAP_MOVES) + 1, 47));
    assert_eq!(port_of(&fdb, 1), Some(0));
    let entry = fdb.entries(Tick(26)).next().unwrap();
    assert_eq!((entry.moves, entry.damped, entry.home), (FLAP_MOVES + 1, true, Some(PortIndex(0))));
    assert_eq!([0, 1].map(|port| fdb.port_macs(PortIndex(port))), [1, 0]);
    let (mut incidents, lost) = fdb.take_incidents();
    incidents.sort_unstable_by_key(|incident| (incident.kind, incident.port));
    let told = incidents.iter().map(|i| (i.kind, i.port.0, i.other.0, i.count)).collect::<Vec<_>>();
    assert_eq!(
        told,
        [(IncidentKind::Moved, 0, 1, 3), (IncidentKind::Moved, 1, 0, 3), (IncidentKind::Damped, 1, 0, 47)]
    );
    assert_eq!((lost, incidents[0].network, incidents[0].mac), (0, NETWORK, mac(1)));
    // The sweep does not forget it while it is held down, and does so afterwards.
    let age = |_| Some(Duration::from_secs(300));
    learn(&fdb, 1, 0, 1000);
    fdb.sweep(Tick(1000), age, |_| false);
    assert_eq!(learn(&fdb, 1, 1, 1001), Learned::Damped);
    fdb.sweep(Tick(2201), age, |_| false);
    assert_eq!((fdb.entries(Tick(2201)).next().unwrap().moves, learn(&fdb, 1, 1, 2201)), (0, Learned::Moved));
}

#[test]
fn a_port_that_is_down_keeps_its_stations_for_whoever_sends_to_them_and_from_nobody_who_has_them() {
    let fdb = Fdb::with_capacity(0, SEED);
    learn(&fdb, 1, 0, 0);
    for n in 1..6 {
        learn(&fdb, 1, n % 2, 1);
    }
    fdb.pin(NETWORK, mac(2), PortIndex(1)).unwrap();
    fdb.sweep(Tick(2), |_| Some(Duration::from_secs(300)), |port| port == PortIndex(1));
    assert_eq!((port_of(&fdb, 1), fdb.entries(Tick(2)).filter(|entry| entry.vacant).count()), (Some(1), 1));
    assert_eq!(learn(&fdb, 2, 5, 2), Learned::Pinned, "a pin stands whether its port is up or not");
    assert_eq!((learn(&fdb, 1, 5, 2), port_of(&fdb, 1)), (Learned::Moved, Some(5)));
    let entry = fdb.entries(Tick(2)).find(|entry| !entry.pinned).unwrap();
    assert_eq!((entry.moves, entry.home, entry.vacant), (0, Some(PortIndex(1)), false));
    let fight = [1, 5, 1, 5, 1, 5, 5].map(|port| learn(&fdb, 1, port, 3));
    assert_eq!((fight[0], fight[6]), (Learned::Moved, Learned::Damped), "its owner is back, and stays");
}

/// 2048 addresses of a series, in 4096 places, with seeds that were bad ones for a hash of one multiplication: up to half of the
/// stations found no room.
#[test]
#[cfg_attr(miri, ignore = "millions of steps")]
fn no_series_of_addresses_fills_a_table_that_is_half_empty() {
    let series: [fn(u64) -> u64; 6] = [
        |n| n,
        |n| n << 8,
        |n| n << 16,
        |n| (n << 24) & 0xff_ffff_ffff,
        |n| (n << 41 | (n >> 7) << 32) & 0xfcff_ffff_ffff,
        |n| n << 20 | n,
    ];
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for seed in (0..100).map(|_| [next(), next()]) {
        for (index, series) in series.iter().enumerate() {
            let fdb = Fdb::with_capacity(4096, seed);
            for number in 0..2048 {
                let mac = MacAddr::from_bits(0x0200_0000_0000 ^ series(number));
                fdb.learn(NETWORK, mac, PortIndex(0), NO_LIMITS, Tick(0));
            }
            assert_eq!(fdb.counters().full, 0, "series {index}, seed {seed:x?}");
        }
    }
}

#[test]
fn a_table_without_room_where_it_is_needed_is_crowded_however_empty() {
    let fdb = Fdb::with_capacity(256, SEED);
    // Stations that all have the same two lines: eight find room.
    for (tried, &number) in meeting(&fdb, 200).iter().enumerate() {
        assert_eq!(fdb.is_crowded(), tried > 128, "{tried}");
        learn(&fdb, number, 0, 0);
    }
    assert_eq!((fdb.len(), fdb.counters().full), (8, 192));
    let grown = fdb.grown().unwrap();
    assert!(!grown.is_crowded());
    assert_eq!(grown.counters().full, 192);
}

#[test]
fn silent_stations_age_and_pins_do_not() {
    let fdb = Fdb::with_capacity(0, SEED);
    learn(&fdb, 1, 0, 0);
    learn(&fdb, 2, 0, 0);
    fdb.learn(NetworkIndex(2), mac(3), PortIndex(1), NO_LIMITS, Tick(0));
    fdb.pin(NETWORK, mac(4), PortIndex(0)).unwrap();
    learn(&fdb, 2, 0, 5);
    let age = |network| (network == NETWORK).then_some(Duration::from_secs(1));
    assert_eq!(fdb.sweep(Tick(9), age, |_| false), Swept { aged: 1, ..Swept::default() }, "network 2 is gone");
    assert_eq!(fdb.sweep(Tick(10), age, |_| false), Swept { aged: 1, ..Swept::default() });
    assert_eq!([1, 2, 4].map(|number| port_of(&fdb, number)), [None, Some(0), Some(0)]);
    assert_eq!((fdb.counters().aged, fdb.len(), fdb.port_macs(PortIndex(0))), (2, 2, 1));
}

#[test]
fn flush_takes_what_matches_and_leaves_pins_and_forget_port_leaves_nothing() {
    let fdb = Fdb::with_capacity(0, SEED);
    for number in 0..30 {
        learn(&fdb, number, (number % 3) as u16, 0);
    }
    fdb.pin(NETWORK, mac(0), PortIndex(0)).unwrap();
    fdb.pin(NETWORK, mac(50), PortIndex(1)).unwrap();
    let flush = |which| fdb.flush(which);
    assert_eq!(flush(Flush { network: Some(NetworkIndex(9)), ..Flush::default() }), 0);
    assert_eq!(flush(Flush { mac: Some(mac(4)), ..Flush::default() }), 1);
    assert_eq!(flush(Flush { mac: Some(mac(5)), port: Some(PortIndex(0)), ..Flush::default() }), 0);
    assert_eq!(flush(Flush { port: Some(PortIndex(0)), ..Flush::default() }), 9);
    assert_eq!(fdb.forget_port(PortIndex(1)), 10, "nine learned ones and a pin");
    assert_eq!(flush(Flush::default()), 10);
    assert_eq!((fdb.len(), port_of(&fdb, 0)), (1, Some(0)));
    assert!(fdb.unpin(NETWORK, mac(0)) && !fdb.unpin(NETWORK, mac(0)) && fdb.is_empty());
}

#[test]
fn a_pin_replaces_what_was_there_and_holds() {
    let fdb = Fdb::with_capacity(0, SEED);
    learn(&fdb, 1, 0, 0);
    fdb.pin(NETWORK, mac(1), PortIndex(5)).unwrap();
    fdb.pin(NETWORK, mac(1), PortIndex(6)).unwrap();
    fdb.pin(NETWORK, mac(1), PortIndex(6)).unwrap();
    assert_eq!(
        (learn(&fdb, 1, 0, 1), learn(&fdb, 1, 6, 1), port_of(&fdb, 1)),
        (Learned::Pinned, Learned::Known, Some(6))
    );
    assert_eq!((fdb.len(), fdb.port_macs(PortIndex(0)), fdb.port_macs(PortIndex(6))), (1, 0, 0));
    let entry = fdb.entries(Tick(9)).next().unwrap();
    assert!(entry.pinned && entry.age.is_none());
}

#[test]
fn a_full_table_refuses_counts_and_still_takes_pins() {
    let fdb = Fdb::with_capacity(0, SEED);
    let mut number = 0;
    while fdb.counters().full < 100 {
        learn(&fdb, number, 0, 0);
        number += 1;
    }
    let filled = fdb.len();
    assert!(filled >= fdb.capacity() * 95 / 100, "{filled} of {}", fdb.capacity());
    assert_eq!(fdb.port_macs(PortIndex(0)) as usize, filled);
    assert_eq!((0..number).filter(|&n| port_of(&fdb, n) == Some(0)).count(), filled);
    for n in 0..20 {
        fdb.pin(NETWORK, mac(1 << 20 | n), PortIndex(1)).unwrap();
        assert_eq!(port_of(&fdb, 1 << 20 | n), Some(1));
    }
    assert_eq!(fdb.port_macs(PortIndex(0)) as usize, fdb.len() - 20);
    let mut pinned = 20;
    while fdb.pin(NETWORK, mac(2 << 20 | pinned), PortIndex(1)).is_ok() {
        pinned += 1;
    }
    assert!(pinned as usize > fdb.capacity() / 2);
}

#[test]
fn a_grown_table_has_everything() {
    let fdb = Fdb::with_capacity(256, SEED);
    for number in 0..=128 {
        assert!(!fdb.is_crowded());
        learn(&fdb, number, 3, number);
    }
    fdb.pin(NETWORK, mac(7), PortIndex(4)).unwrap();
    learn(&fdb, 8, 5, 400);
    assert!(fdb.is_crowded());
    let grown = fdb.grown().unwrap();
    assert!(grown.capacity() == 512 && !grown.is_crowded());
    let listed = |fdb: &Fdb| {
        let mut all: Vec<_> = fdb.entries(Tick(500)).collect();
        all.sort_unstable_by_key(|entry| entry.mac);
        all
    };
    assert_eq!(listed(&fdb), listed(&grown));
    assert_eq!((fdb.len(), fdb.counters()), (grown.len(), grown.counters()));
    assert_eq!([3, 5].map(|p| grown.port_macs(PortIndex(p))), [127, 1]);
}

#[test]
#[cfg_attr(miri, ignore = "millions of steps")]
fn a_million_entries_fill_four_fifths_of_a_table() {
    let fdb = Fdb::with_capacity(1 << 20, SEED);
    let (half, wanted) = ((1 << 20) / 2, (1 << 20) * 4 / 5);
    for number in 0..wanted {
        assert!(number != half || fdb.counters().full == 0, "no refusal as long as the table is not crowded");
        learn(&fdb, number, (number % 4096) as u16, 0);
    }
    let refused = fdb.counters().full;
    assert!(refused <= u64::from(wanted) / 1000, "{refused} of {wanted} found no room");
    assert_eq!(fdb.len() as u64 + refused, u64::from(wanted));
    let found = (0..wanted).filter(|&number| port_of(&fdb, number) == Some((number % 4096) as u16)).count();
    assert_eq!(found, fdb.len());
}

#[test]
fn second_entries_are_swept_and_the_first_one_holds() {
    let fdb = Fdb::with_capacity(0, SEED);
    let key = Key::new(NETWORK, mac(1));
    for port in 0..3 {
        let value = Value::learned(PortIndex(port), Tick(0));
        assert!(fdb.place(key, value));
        fdb.counts.entered(key, value);
    }
    assert_eq!(port_of(&fdb, 1), Some(0));
    let age = |_| Some(Duration::from_secs(300));
    assert_eq!(fdb.sweep(Tick(0), age, |_| false), Swept { duplicates: 2, ..Swept::default() });
    assert_eq!((port_of(&fdb, 1), fdb.len(), fdb.port_macs(PortIndex(0))), (Some(0), 1, 1));
    // A pin that a shard entered another place for, too: the pin holds, wherever it stands.
    assert!(fdb.place(key, Value::pinned(PortIndex(9))));
    fdb.counts.entered(key, Value::pinned(PortIndex(9)));
    assert_eq!(fdb.sweep(Tick(0), age, |_| false), Swept { duplicates: 1, ..Swept::default() });
    assert_eq!((port_of(&fdb, 1), fdb.len(), fdb.port_macs(PortIndex(0))), (Some(9), 1, 0));
}

/// Four shards learn, move and look up a few hundred stations in a table that is too small for all of them, while the
/// control side pins, flushes and sweeps. Whatever the interleaving, a station is never found where it never was, and
/// the counts are exact in the end.
#[test]
fn shards_and_the_control_side_at_once() {
    let (shards, stations, rounds) = if cfg!(miri) { (2, 24, 3) } else { (4, 400, 300) };
    let fdb = Fdb::with_capacity(0, SEED);
    let age = |_| Some(Duration::from_secs(2));
    std::thread::scope(|scope| {
        for shard in 0..shards {
            let fdb = &fdb;
            scope.spawn(move || {
                for round in 0..rounds {
                    for number in 0..stations {
                        // Station n is only ever seen at the ports n * 8 to n * 8 + 3.
                        let port = (number * 8 % 4096 + (round + shard) % 4) as u16;
                        learn(fdb, number, port, round);
                        let found = port_of(fdb, (number * 7 + shard) % stations);
                        assert!(found.is_none_or(|p| u32::from(p / 8) == (number * 7 + shard) % stations % 512));
                    }
                }
            });
        }
        for round in 0..rounds {
            fdb.pin(NETWORK, mac(round % stations), PortIndex((round % stations * 8 % 4096) as u16)).unwrap_or(());
            fdb.sweep(Tick(round), age, |port| u32::from(port.0 % 8) == round % 8);
            fdb.flush(Flush { mac: Some(mac((round + 3) % stations)), ..Flush::default() });
            fdb.unpin(NETWORK, mac((round + stations - 5) % stations));
        }
    });
    fdb.sweep(Tick(rounds), age, |_| false);
    let all: Vec<_> = fdb.entries(Tick(rounds)).collect();
    let mut ports = vec![0; crate::limits::PORTS];
    all.iter().filter(|entry| !entry.pinned).for_each(|entry| ports[entry.port.index()] += 1);
    assert_eq!(fdb.len(), all.len());
    assert_eq!(fdb.network_macs(NETWORK), ports.iter().sum::<u32>());
    for (port, learned) in ports.into_iter().enumerate() {
        assert_eq!(fdb.port_macs(PortIndex(port as u16)), learned, "port {port}");
    }
    let mut macs: Vec<_> = all.iter().map(|e| e.mac).collect();
    macs.sort_unstable();
    macs.dedup();
    assert_eq!(macs.len(), all.len(), "the last sweep left no second entries");
}

#[derive(Debug, Clone)]
enum Op {
    Learn { network: u16, number: u32, port: u16, limits: Limits },
    Pin { network: u16, number: u32, port: u16 },
    Unpin { network: u16, number: u32 },
    Flush { network: u16, port: Option<u16> },
    ForgetPort { port: u16 },
    Down { port: Option<u16> },
    Sweep,
    Wait { ticks: u32 },
    Grow,
}

fn op() -> impl Strategy<Value = Op> {
    // Ports reach their share and beyond.
    let (network, number, port) = (0..3u16, 0..40u32, 0..4u16);
    let limits = (5..60u32, 0..40u32).prop_map(|(port, network)| Limits { port, network });
    prop_oneof![
        60 => (network.clone(), number.clone(), port.clone(), limits)
            .prop_map(|(network, number, port, limits)| Op::Learn { network, number, port, limits }),
        2 => (network.clone(), number.clone(), port.clone())
            .prop_map(|(network, number, port)| Op::Pin { network, number, port }),
        2 => (network.clone(), number).prop_map(|(network, number)| Op::Unpin { network, number }),
        1 => (network, prop::option::of(port.clone())).prop_map(|(network, port)| Op::Flush { network, port }),
        1 => port.clone().prop_map(|port| Op::ForgetPort { port }),
        1 => prop::option::of(port).prop_map(|port| Op::Down { port }),
        3 => Just(Op::Sweep),
        10 => (0..120u32).prop_map(|ticks| Op::Wait { ticks }),
        1 => Just(Op::Grow),
    ]
}

/// The FDB and its model, kept in step.
struct Pair {
    fdb: Fdb,
    model: Model,
    now: Tick,
    swept: Tick,
    /// The port that is down, if one is.
    down: Option<PortIndex>,
}

impl Pair {
    fn apply(&mut self, op: Op) {
        let Self { fdb, model, now, .. } = self;
        match op {
            Op::Learn { network, number, port, limits } => {
                let (network, mac, port) = (NetworkIndex(network), mac(number), PortIndex(port));
                let want = model.learn(network, mac, port, limits, *now);
                assert_eq!(fdb.learn(network, mac, port, limits, *now), want);
                assert_eq!(fdb.lookup(network, mac), model.lookup(network, mac));
            }
            Op::Pin { network, number, port } => {
                let (network, mac, port) = (NetworkIndex(network), mac(number), PortIndex(port));
                model.pin(network, mac, port);
                assert_eq!(fdb.pin(network, mac, port), Ok(()));
            }
            Op::Unpin { network, number } => {
                let (network, mac) = (NetworkIndex(network), mac(number));
                assert_eq!(fdb.unpin(network, mac), model.unpin(network, mac));
            }
            Op::Flush { network, port } => {
                let which = Flush { network: Some(NetworkIndex(network)), port: port.map(PortIndex), mac: None };
                assert_eq!(fdb.flush(which), model.flush(which));
            }
            Op::Down { port } => self.down = port.map(PortIndex),
            Op::ForgetPort { port } => {
                assert_eq!(fdb.forget_port(PortIndex(port)), model.forget_port(PortIndex(port)));
            }
            Op::Sweep => {
                let age = |network: NetworkIndex| {
                    (network.0 < 2).then(|| Duration::from_secs(60 + u64::from(network.0) * 100))
                };
                let is_down = |port| self.down == Some(port);
                let want = Swept { aged: model.sweep(*now, age, is_down), ..Swept::default() };
                assert_eq!(fdb.sweep(*now, age, is_down), want);
                self.swept = *now;
            }
            Op::Wait { ticks } => {
                self.now = Tick(now.0 + ticks);
                // The sweep must come at least every 60 s, or 11 bits of a tick go round unnoticed.
                if self.now.since(self.swept) > Duration::from_secs(60) {
                    self.apply(Op::Sweep);
                }
            }
            Op::Grow => {
                if let Some(grown) = fdb.grown().filter(|grown| grown.capacity() <= 1024) {
                    *fdb = grown;
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 256 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn it_does_what_the_model_does(
        ops in prop::collection::vec(op(), 1..400),
        seed in any::<[u64; 2]>(),
        start in 0..u32::MAX / 2,
    ) {
        let (fdb, now) = (Fdb::with_capacity(0, seed), Tick(start));
        let mut pair = Pair { fdb, model: Model::default(), now, swept: now, down: None };
        for op in ops {
            pair.apply(op);
        }
        pair.model.assert_same(&pair.fdb, pair.now);
    }
}
