//! What the switch's decision costs, in nanoseconds per frame: batches of 64 minimum-size frames of one pair of
//! addresses, of one sender and 64 receivers, of 64 pairs, and of random pairs out of FDBs of several sizes.
//!
//! `cargo bench --bench switch`. The batches are built outside of the measured time; criterion's figures are per frame.

#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use linecard::clock::Tick;
use linecard::frame::{self, Batch, Heads};
use linecard::ident::{MacAddr, NetworkIndex, PortIndex};
use linecard::limits::BATCH_FRAMES;
use linecard::mem::Span;
use linecard::switch::{Fdb, Limits, NetworkRow, PortRow, Tables, process};
use linecard::verdict::Verdict;

const NETWORK: NetworkIndex = NetworkIndex(0);
/// Sets of 64 addresses that the batches take turns with, so that a large FDB is not measured in the cache of one batch.
const SETS: usize = 1024;

/// Addresses without any order, the same in every run.
fn mac(number: usize) -> MacAddr {
    let mixed = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 18;
    MacAddr::from_bits(mixed & 0x00ff_ffff_ffff | 0x5200_0000_0000)
}

/// A network of two ports with `stations` known, half of them at each: even ones at port 0, odd ones at port 1.
fn tables(stations: usize) -> Tables {
    let fdb = Fdb::with_capacity(stations * 2, [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210]);
    let limits = Limits { port: u32::MAX, network: u32::MAX };
    for number in 0..stations {
        fdb.learn(NETWORK, mac(number), PortIndex((number % 2) as u16), limits, Tick(0));
    }
    let port = || Some(PortRow { network: NETWORK, mtu: Some(1500), macs: u32::MAX, storm: Arc::default() });
    let members = [PortIndex(0), PortIndex(1)].into();
    let network = NetworkRow { members, mac_age: Duration::from_secs(300), mac_limit: u32::MAX };
    Tables { ports: [port(), port()].into(), networks: [Some(network)].into(), fdb: Arc::new(fdb) }
}

/// The frames of one batch, as the sender's memory has them.
fn frames(pairs: impl Iterator<Item = (usize, usize)>) -> Vec<[u8; 64]> {
    let frame = |(source, destination)| {
        let mut bytes = [0; 64];
        bytes[..6].copy_from_slice(&mac(destination).0);
        bytes[6..12].copy_from_slice(&mac(source).0);
        bytes[12..14].copy_from_slice(&[0x08, 0x00]);
        bytes
    };
    pairs.take(BATCH_FRAMES).map(frame).collect()
}

/// The time for `count` frames, taken over decisions alone: heads are copied before the clock starts, as a receive queue
/// does it. Every batch has to be delivered whole.
fn decide(tables: &Tables, sets: &mut [Vec<[u8; 64]>], heads: &mut Heads, count: u64) -> Duration {
    let mut total = Duration::ZERO;
    for n in 0..count as usize {
        let set_count = sets.len();
        let mut batch = Batch::new(heads, 0);
        for bytes in &mut sets[n % set_count] {
            batch.push(bytes.len(), &[Span::from_buffer(bytes)]);
        }
        let start = Instant::now();
        process(black_box(tables), PortIndex(0), black_box(&mut batch), Tick(0));
        total += start.elapsed();
        assert!(batch.frames().iter().all(|frame| frame.verdict == Verdict::Deliver(PortIndex(1))));
    }
    total
}

fn switch(c: &mut Criterion) {
    let mut heads = frame::heads();
    let mut group = c.benchmark_group("switch");
    group.throughput(Throughput::Elements(BATCH_FRAMES as u64));
    group.bench_function("same pair", |b| {
        let tables = tables(2);
        let mut sets = vec![frames(std::iter::repeat((0, 1)))];
        b.iter_custom(|count| decide(&tables, &mut sets, &mut heads, count));
    });
    group.bench_function("64 pairs", |b| {
        let tables = tables(128);
        let mut sets = vec![frames((0..64).map(|n| (2 * n, 127 - 2 * n)))];
        b.iter_custom(|count| decide(&tables, &mut sets, &mut heads, count));
    });
    group.bench_function("64 destinations", |b| {
        let tables = tables(128);
        let mut sets = vec![frames((0..64).map(|n| (0, 127 - 2 * n)))];
        b.iter_custom(|count| decide(&tables, &mut sets, &mut heads, count));
    });
    for stations in [2usize, 64 << 10, 1 << 20] {
        let tables = tables(stations);
        // A walk in an order that no prefetcher knows, always from a station at port 0 to one at port 1.
        let mut at = 0usize;
        let mut pairs = std::iter::repeat_with(|| {
            at = at.wrapping_add(0x5851_f42d);
            let (source, destination) = (at.wrapping_mul(31) % stations, at.wrapping_mul(17) % stations);
            (source & !1, destination | 1)
        });
        let mut sets: Vec<_> = (0..SETS).map(|_| frames(pairs.by_ref())).collect();
        group.bench_function(BenchmarkId::new("fdb", stations), |b| {
            b.iter_custom(|count| decide(&tables, &mut sets, &mut heads, count));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(50);
    targets = switch
}
criterion_main!(benches);
