//! Buckets in virtual time, and what whole batches come to.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::frame::{self, Batch, Needs};
use crate::ident::{NetworkIndex, PortIndex};
use crate::limits::BATCH_FRAMES;
use crate::mem::Span;
use crate::offload::{self, sketch::Sketch};
use crate::switch::{Fdb, NetworkRow, PortRow, Tables, process};
use crate::verdict::{DropReason, Verdict};

const A: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 0xa]);
const B: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 0xb]);
const NOBODY: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 0xc]);
const MULTICAST: MacAddr = MacAddr([0x33, 0x33, 0, 0, 0, 1]);

/// Three ports in one network, the first of them with these bounds; `B` is known to be behind the second.
fn tables(rates: StormRates) -> Tables {
    let row = |rates| {
        let storm = Arc::new(Storm::default());
        storm.set(rates);
        Some(PortRow { network: NetworkIndex(0), mtu: None, macs: 100, storm })
    };
    let members = (0..3).map(PortIndex).collect();
    let network = NetworkRow { members, mac_age: Duration::from_secs(60), mac_limit: 1000 };
    let fdb = Fdb::with_capacity(0, [3, 4]);
    fdb.pin(NetworkIndex(0), B, PortIndex(1)).unwrap();
    Tables {
        ports: [row(rates), row([None; 3]), row([None; 3])].into(),
        networks: [Some(network)].into(),
        fdb: fdb.into(),
    }
}

/// What becomes of frames from `A` on the first port, to these.
fn send(tables: &Tables, now: u32, to: &[MacAddr]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for to in to.chunks(BATCH_FRAMES) {
        let mut bytes: Vec<_> = to.iter().map(|to| [&to.0[..], &A.0, &[0x88, 0xb5], &[0; 50]].concat()).collect();
        let mut heads = frame::heads();
        let mut batch = Batch::new(&mut heads, 0);
        bytes.iter_mut().for_each(|bytes| batch.push(bytes.len(), &[Span::from_buffer(bytes)]));
        process(tables, PortIndex(0), &mut batch, Tick(now));
        verdicts.extend(batch.frames().iter().map(|frame| frame.verdict));
    }
    verdicts
}

/// How many of `count` frames to `to` were flooded; the others were dropped for the reason that this is about.
fn flooded(tables: &Tables, now: u32, to: MacAddr, count: usize) -> usize {
    let verdicts = send(tables, now, &vec![to; count]);
    let flooded = verdicts.iter().filter(|&&verdict| verdict == Verdict::Flood).count();
    let refused = verdicts.iter().filter(|&&verdict| verdict == Verdict::Drop(DropReason::StormLimited)).count();
    assert_eq!(flooded + refused, count);
    flooded
}

fn refused(tables: &Tables) -> [u64; 3] {
    tables.ports[0].as_ref().unwrap().storm.refused()
}

#[test]
fn each_class_has_a_second_up_to_a_ring_or_a_quarter_of_one_at_once_and_then_its_rate() {
    let tables = tables([Some(1000), Some(2000), Some(5000)]);
    for (to, rate, burst) in [(MacAddr::BROADCAST, 1000, 1000), (MULTICAST, 2000, 1024), (NOBODY, 5000, 1250)] {
        assert_eq!(flooded(&tables, 7, to, 2000), burst, "{to}");
        assert_eq!(flooded(&tables, 7, to, 100), 0, "{to}");
        assert_eq!(flooded(&tables, 8, to, 2000), rate / 10, "{to}");
        assert_eq!(flooded(&tables, 100, to, 2000), burst, "{to}: nobody saves up more");
    }
    let drops = |rate: u64, burst: u64| 2000 + 100 + 2000 + 2000 - burst * 2 - rate / 10;
    assert_eq!(refused(&tables), [drops(1000, 1000), drops(2000, 1024), drops(5000, 1250)]);
}

/// The switch takes nothing for a while, and then what has come in a second of it, as far as a ring holds that.
#[test]
fn a_sender_within_its_bound_loses_nothing_when_the_switch_stood_still() {
    let tables = tables([Some(1000), Some(10_000), Some(5000)]);
    for (to, rate) in [(MacAddr::BROADCAST, 1000), (MULTICAST, 10_000), (NOBODY, 5000)] {
        for still in [2, 5, 10, 100] {
            let sent = (rate * still / 10).min(rate.min(1024)) as usize;
            let now = 1000 * still;
            assert_eq!(flooded(&tables, now as u32, to, sent), sent, "{to} after {still} tenths of a second");
        }
    }
    assert_eq!(refused(&tables), [0; 3]);
}

#[test]
fn known_stations_are_not_counted_and_hear_on() {
    let tables = tables([Some(0), Some(0), Some(0)]);
    assert_eq!(send(&tables, 0, &[B; 200]), [Verdict::Deliver(PortIndex(1)); 200]);
    let limited = Verdict::Drop(DropReason::StormLimited);
    let deliver = Verdict::Deliver(PortIndex(1));
    assert_eq!(
        send(&tables, 9, &[MULTICAST, B, NOBODY, B, MacAddr::BROADCAST]),
        [limited, deliver, limited, deliver, limited]
    );
    assert_eq!(refused(&tables), [1, 1, 1]);
}

#[test]
fn no_bound_is_no_bound_and_bounds_change_while_frames_come() {
    let tables = tables([None; 3]);
    assert_eq!(flooded(&tables, 0, MacAddr::BROADCAST, 5000), 5000);
    let set = |rates| tables.ports[0].as_ref().unwrap().storm.set(rates);
    set([Some(1000), None, None]);
    assert_eq!(flooded(&tables, 0, MacAddr::BROADCAST, 5000), 1000);
    set([Some(0), None, None]);
    assert_eq!(flooded(&tables, 50, MacAddr::BROADCAST, 5000), 0);
    set([Some(8000), None, None]);
    assert_eq!((flooded(&tables, 53, MacAddr::BROADCAST, 5000), flooded(&tables, 53, MULTICAST, 5000)), (2000, 5000));
    assert_eq!(refused(&tables), [4000 + 5000 + 3000, 0, 0]);
}

#[test]
fn a_guest_boots_however_low_its_bound_is() {
    let tables = tables([Some(1), Some(1), Some(1)]);
    for to in [MacAddr::BROADCAST, MULTICAST] {
        assert_eq!(flooded(&tables, 0, to, 100), STORM_BURST_MIN as usize);
        let later = (1..=100).map(|tick| flooded(&tables, tick, to, 3)).sum::<usize>();
        assert_eq!(later, 10, "one in a second");
    }
}

#[test]
fn a_frame_that_is_several_counts_as_them_and_is_not_cut() {
    let tables = tables([None, None, Some(1000)]);
    let sketch = Sketch { payload: vec![0; 48 * 1000], gso_size: 48, ..Sketch::default() };
    let (mut heads, mut made) = (frame::heads(), sketch.make());
    let mut verdict = |tick| {
        let mut batch = Batch::new(&mut heads, 0);
        let pieces = [Span::from_buffer(&mut made.bytes)];
        offload::admit(&mut batch, pieces[0].len(), &pieces, &made.header.to_bytes(), Needs::ALL);
        assert_eq!(batch.frames()[0].wire_frames(batch.head(0)), 1000);
        process(&tables, PortIndex(0), &mut batch, Tick(tick));
        batch.frames()[0].verdict
    };
    assert_eq!((verdict(0), verdict(1)), (Verdict::Flood, Verdict::Flood), "100 are there, and it is 1000");
    let passed: Vec<u32> = (1..31).filter(|&tick| verdict(tick) == Verdict::Flood).collect();
    assert_eq!(passed, [11, 21], "900 are owed, and each costs a second");
}

#[test]
fn shards_share_one_bucket() {
    let tables = tables([Some(1000), None, None]);
    let storm = &tables.ports[0].as_ref().unwrap().storm;
    let take = || (0..10_000).filter(|_| storm.0[0].take(1, Tick(0))).count();
    let passed: usize = std::thread::scope(|scope| {
        let shards: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
        shards.into_iter().map(|shard| shard.join().unwrap()).sum()
    });
    assert_eq!(passed, 1000);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 256 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever comes when, seen by shards whose clocks differ: never more than the bound, and as much if that is there.
    #[test]
    fn what_passes_is_the_bound(
        rate in prop_oneof![1..40u32, 1000..1010u32, Just(STORM_RATE_MOST)],
        start in prop_oneof![Just(0u32), Just(u32::MAX - 20), any::<u32>()],
        offers in prop::collection::vec((0..4u32, 0..3u32, 0..400u32), 1..60),
    ) {
        let storm = Storm::default();
        storm.set([Some(rate), None, None]);
        storm.0[0].bucket.store(Level { tick: Tick(start), left: i32::MAX }.word(), Ordering::Relaxed);
        let (mut now, mut passed, mut short) = (0, 0u64, false);
        for (wait, behind, count) in offers {
            now += wait;
            let clock = Tick(start.wrapping_add(now).wrapping_sub(behind.min(now)));
            let taken = (0..count).filter(|_| storm.0[0].take(1, clock)).count() as u32;
            passed += u64::from(taken);
            short |= taken < count;
        }
        let most = burst(rate) as u64 / 10 + u64::from(rate) * u64::from(now) / 10 + 1;
        prop_assert!(passed <= most, "{passed} of {most}");
        prop_assert!(!short || passed >= u64::from(STORM_BURST_MIN), "{passed}");
    }
}

const STORM_RATE_MOST: u32 = crate::limits::STORM_RATE;
