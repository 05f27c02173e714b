//! What each port has of the FDB whatever others have filled.

use super::*;

/// Ports that fill their network, or the host, all that they may: one that comes afterwards has its share, and no more.
#[test]
fn no_port_takes_what_is_another_ports_share() {
    for (network, host) in [(1000, usize::MAX), (u32::MAX, 1000)] {
        let fdb = Fdb { most: host, ..Fdb::with_capacity(4096, SEED) };
        let limits = Limits { port: 250, network };
        let at = |number, port| fdb.learn(NETWORK, mac(number), PortIndex(port), limits, Tick(0));
        for port in 0..4 {
            assert!((0..250).all(|n| at(u32::from(port) << 16 | n, port) == Learned::New));
        }
        let refused = if host == usize::MAX { Learned::Refused } else { Learned::Full };
        for port in 4..6 {
            let mut stations = (0..300).map(|n| at(u32::from(port) << 16 | n, port));
            assert!(stations.by_ref().take(SHARE as usize).all(|learned| learned == Learned::New), "port {port}");
            assert!(stations.all(|learned| learned == refused), "port {port}");
            assert_eq!(fdb.port_macs(PortIndex(port)), SHARE);
        }
        assert_eq!((fdb.len() as u32, fdb.network_macs(NETWORK)), (1000 + 2 * SHARE, 1000 + 2 * SHARE));
        let limit = if host == usize::MAX { MacLimit::Network } else { MacLimit::Host };
        assert_eq!(fdb.port_refused(PortIndex(4))[limit as usize], u64::from(300 - SHARE));
        // A station that moves has its place, wherever it goes; the one that it leaves is its port's again.
        assert_eq!(
            [at(4 << 16, 3), at(4 << 16, 5)],
            [Learned::Refused, Learned::Moved],
            "port 3 is full, port 5 is not"
        );
        assert_eq!([at(4 << 16 | 900, 4), at(4 << 16 | 901, 4)], [Learned::New, refused]);
        // The host has a larger table, and the bound is the same.
        let grown = fdb.grown().unwrap();
        assert_eq!(grown.learn(NETWORK, mac(4 << 16 | 901), PortIndex(4), limits, Tick(0)), refused);
        // A port's own limit is below its share, if it is.
        let own = Limits { port: 3, ..limits };
        let learned = [0, 1, 2, 3].map(|n| fdb.learn(NETWORK, mac(9 << 16 | n), PortIndex(9), own, Tick(0)));
        assert_eq!(learned, [Learned::New, Learned::New, Learned::New, Learned::Refused]);
    }
}

/// One port teaches its share again and again, and another one takes that over, which no limit refuses.
#[test]
fn ports_that_hand_stations_over_fill_no_network_and_no_host_beyond_all_shares() {
    for (network, host) in [(100, usize::MAX), (u32::MAX, 100)] {
        let fdb = Fdb { most: host, ..Fdb::with_capacity(1 << 18, SEED) };
        let limits = Limits { port: 1 << 18, network };
        let at = |number, port| fdb.learn(NETWORK, mac(number), PortIndex(port), limits, Tick(1));
        assert!((0..80).all(|number| at(1 << 24 | number, 2) == Learned::New));
        let (most, rounds) = match host {
            usize::MAX => (100 + 3 * SHARE, 100),
            _ => (100 + SHARE * crate::limits::PORTS as u32, crate::limits::PORTS as u32 + 100),
        };
        for number in (0..rounds * SHARE).step_by(SHARE as usize) {
            assert!((number..number + SHARE).all(|n| at(n, 0) == Learned::New));
            assert!((number..number + SHARE).all(|n| at(n, 1) == Learned::Moved));
        }
        let of_network = |number| (number == NETWORK).then_some(network as usize + 3 * SHARE as usize);
        assert_eq!(fdb.trim(of_network), (80 + rounds * SHARE - most) as usize);
        assert_eq!((fdb.network_macs(NETWORK), fdb.len() as u32), (most, most));
        assert_eq!((fdb.port_macs(PortIndex(2)), fdb.trim(of_network)), (80, 0), "what did not move stays");
        assert!((0..SHARE).all(|number| at(2 << 24 | number, 0) == Learned::New));
    }
}

#[test]
#[cfg_attr(miri, ignore = "millions of steps")]
fn a_station_within_its_ports_share_takes_the_place_of_one_beyond_anothers() {
    let fdb = Fdb::with_capacity(0, SEED);
    let numbers = meeting(&fdb, 20);
    let at = |index: usize, port| learn(&fdb, numbers[index], port, 0);
    // Port 0 has its share elsewhere, so that what meets is beyond it; one station of it has moved there.
    let elsewhere = (3_000_000..).filter(|&number| learn(&fdb, number, 0, 0) == Learned::New);
    assert_eq!(elsewhere.take(2 * SHARE as usize).count(), 2 * SHARE as usize);
    assert_eq!([at(0, 1), at(0, 0)], [Learned::New, Learned::Moved]);
    let mut index = 1;
    while at(index, 0) == Learned::New {
        index += 1;
    }
    assert!(index <= 8, "{index}");
    let (before, full) = (fdb.len(), fdb.counters().full);
    let known = |port| numbers.iter().filter(|&&number| port_of(&fdb, number) == Some(port)).count();
    let places = known(0);
    // All but the one that moved go first, and that one last. When all have gone there is nobody who has more than his share.
    for n in 0..places {
        assert_eq!(at(10 + n, 7), Learned::New, "{n}");
        assert_eq!((known(0), known(7), fdb.len()), (places - 1 - n, n + 1, before));
        assert_eq!(port_of(&fdb, numbers[0]), (n + 1 < places).then_some(0));
    }
    assert_eq!((at(19, 7), at(1, 0)), (Learned::Full, Learned::Full));
    assert_eq!(fdb.counters().full, full + 2);
    assert_eq!([7, 0].map(|port| fdb.port_refused(PortIndex(port))[MacLimit::Place as usize]), [1, full + 1]);
    let listed = fdb.entries(Tick(0)).filter(|entry| entry.port == PortIndex(0)).count();
    assert_eq!(fdb.port_macs(PortIndex(0)) as usize, listed);
}

/// Shards enter stations of many ports at once in a network and a host that are full, and in a table that has hardly room: each port
/// gets its share, nobody more, and the counts are exact.
#[test]
fn shards_that_enter_stations_at_once_give_each_port_its_share() {
    let (shards, ports, rounds) = if cfg!(miri) { (2, 2, 2) } else { (4, 3, 100) };
    for round in 0..rounds {
        let fdb = Fdb { most: 200, ..Fdb::with_capacity(0, SEED) };
        let limits = Limits { port: 250, network: 200 };
        let at = |number, port| fdb.learn(NETWORK, mac(number), PortIndex(port), limits, Tick(0));
        let mut crowd = 0..250;
        assert!(crowd.all(|number| matches!(at(number, 0), Learned::New | Learned::Refused)));
        let gate = std::sync::Barrier::new(shards);
        std::thread::scope(|scope| {
            for shard in 0..shards as u32 {
                let (gate, at) = (&gate, &at);
                scope.spawn(move || {
                    gate.wait();
                    for n in 0..SHARE {
                        for port in 1..=ports {
                            at(1000 + (round << 16) + (u32::from(port) << 8) + n * 4 + shard, port);
                            at(n, 0);
                        }
                    }
                });
            }
        });
        for port in 1..=ports {
            assert_eq!(fdb.port_macs(PortIndex(port)), SHARE, "port {port}");
        }
        let mut counts = vec![0; usize::from(ports) + 1];
        fdb.entries(Tick(0)).for_each(|entry| counts[entry.port.index()] += 1);
        for (port, count) in counts.iter().enumerate() {
            assert_eq!(fdb.port_macs(PortIndex(port as u16)), *count, "port {port}");
        }
        assert_eq!((fdb.len() as u32, fdb.network_macs(NETWORK)), (counts.iter().sum(), counts.iter().sum()));
        assert!(fdb.len() as u32 <= 200 + (u32::from(ports) + 1) * SHARE);
    }
}
