//! Floods to many ports: each visit is bounded, everybody gets everything once, and others are served in between.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::limits::{VISIT_PORT_WORK, VISIT_WORK};

/// Ports of the large network.
const MANY: u16 = 600;

fn broadcasts(count: u8) -> impl Iterator<Item = Vec<u8>> {
    (0..count).map(|n| frame(MacAddr::BROADCAST, mac(1), 64, n))
}

#[test]
fn each_visit_of_a_flood_is_bounded_and_everybody_gets_every_frame_once_and_in_order() {
    let rig = Rig::on(1, MANY, IdlePolicy::Adaptive);
    rig.feeds[0].feed(broadcasts(64));
    let want: Vec<_> = broadcasts(64).collect();
    for feed in &rig.feeds[1..] {
        assert!(feed.wait_for(64) == want);
    }
    wait(|| rig.totals(0).rx_frames == 64);
    let totals = rig.totals(0);
    assert_eq!((totals.rx_delivered, totals.rx_dropped.iter().sum::<u64>(), totals.tx_frames), (64, 0, 0));
    assert_eq!((1..MANY).map(|port| rig.totals(port).tx_frames).sum::<u64>(), 64 * (u64::from(MANY) - 1));
    let most = (VISIT_WORK / (VISIT_PORT_WORK + 1)) as usize;
    let visits = std::mem::take(&mut rig.feeds[0].lock().visits);
    assert!(visits.iter().all(|&copies| copies <= most), "more than {most} copies in a visit: {visits:?}");
    // A shard counts what its ports sent, not how often it had to look.
    wait(|| rig.shards.report()[0].frames == 64);
}

#[test]
fn a_flooded_frame_is_counted_once_by_what_became_of_it_in_all_its_visits() {
    let rig = Rig::on(1, MANY, IdlePolicy::Adaptive);
    rig.feeds[2..].iter().for_each(|feed| feed.lock().full = true);
    rig.feeds[0].feed(broadcasts(3));
    assert_eq!(rig.feeds[1].wait_for(3).len(), 3);
    wait(|| rig.totals(0).rx_frames == 3);
    assert_eq!(rig.totals(0).rx_delivered, 3, "the first port took them, those of later visits did not");
    rig.feeds[1].lock().full = true;
    rig.feeds[0].feed(broadcasts(2));
    wait(|| rig.totals(0).rx_frames == 5);
    let totals = rig.totals(0);
    assert_eq!((totals.rx_delivered, totals.rx_dropped[DropReason::RingFull.index()]), (3, 2));
    assert_eq!(rig.totals(MANY - 1).tx_dropped[DropReason::RingFull.index()], 5);
}

#[test]
fn a_pair_beside_a_flood_waits_for_a_few_visits_and_not_for_the_flood() {
    let rig = Rig::in_networks(1, &[MANY, 2], IdlePolicy::Adaptive);
    let [from, to] = [0, 1].map(|port| &rig.feeds[usize::from(MANY) + port]);
    // Each would be 38,000 copies in one visit.
    let more = || rig.feeds[0].feed((0..4).flat_map(|_| broadcasts(64)));
    more();
    let mut waits = Vec::new();
    for round in 0..40 {
        let pending = rig.feeds[0].lock().to_receive.len();
        if pending < 128 {
            more();
        }
        let before = rig.feeds[0].copies.load(Ordering::Relaxed);
        from.feed([frame(mac(8), mac(9), 64, round)]);
        wait(|| !to.lock().transmitted.is_empty());
        let mut to = to.lock();
        to.transmitted.clear();
        waits.push(to.given_at - before);
        drop(to);
        rig.feeds.iter().for_each(|feed| feed.lock().transmitted.clear());
    }
    // Some of them also waited for this thread, which the kernel may have taken the CPU from before it fed its frame.
    waits.sort_unstable();
    assert!(waits[20] <= 8 * VISIT_WORK as usize, "copies to others before the pair's frame was delivered: {waits:?}");
}

/// A port that feeds another one, which rests, once it is asked to and the shard is in the middle of a flood.
struct Ringer {
    feed: Arc<Feed>,
    other: Arc<Feed>,
    asked: AtomicBool,
    /// How many frames had been given to any port then.
    fed_at: AtomicUsize,
}

impl Transmit for Ringer {
    fn transmit(&self, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        if self.asked.load(Ordering::SeqCst) && self.other.lock().armed {
            self.asked.store(false, Ordering::SeqCst);
            self.fed_at.store(self.feed.copies.load(Ordering::Relaxed), Ordering::SeqCst);
            self.other.feed([frame(mac(9), mac(8), 64, 0)]);
        }
        self.feed.transmit(batch, picks, outcome);
    }
}

#[test]
fn a_port_that_floods_alone_from_many_queues_has_the_shard_look_after_each_visits_work() {
    let rig = Rig::in_networks(1, &[MANY, 2], IdlePolicy::Adaptive);
    let [from, to] = [0, 1].map(|port| Arc::clone(&rig.feeds[usize::from(MANY) + port]));
    let (asked, fed_at) = Default::default();
    let ringer = Arc::new(Ringer { feed: Arc::clone(&rig.feeds[1]), other: Arc::clone(&from), asked, fed_at });
    held_up::publish_as(1, &rig, Arc::clone(&ringer) as _);
    let queue = || Feed { copies: Arc::clone(&rig.feeds[0].copies), ..Feed::default() };
    let queues: Vec<_> = (0..8).map(|_| Arc::new(queue())).collect();
    queues.iter().for_each(|queue| queue.feed(broadcasts(64)));
    let all = queues.iter().map(|queue| Arc::clone(queue) as _).collect();
    rig.shards.attach(PortIndex(0), all, &LatencySensitivity::Normal.into()).unwrap();
    // One visit may have begun when it is fed, and another one before it has its turn.
    let most = 4 * (VISIT_WORK / (VISIT_PORT_WORK + 1)) as usize;
    let mut waits = Vec::new();
    for _ in 0..20 {
        ringer.asked.store(true, Ordering::SeqCst);
        wait(|| {
            rig.feeds[..usize::from(MANY)].iter().for_each(|feed| feed.lock().transmitted.clear());
            queues
                .iter()
                .filter(|queue| queue.lock().to_receive.len() < 4)
                .for_each(|queue| queue.feed(broadcasts(64)));
            !to.lock().transmitted.is_empty()
        });
        to.lock().transmitted.clear();
        waits.push(to.lock().given_at - ringer.fed_at.load(Ordering::SeqCst));
    }
    // Looks are some microseconds apart, in which a quick machine makes more visits now and then.
    waits.sort_unstable();
    assert!(waits[waits.len() / 2] <= most, "copies to others before the port's frame was delivered: {waits:?}");
}
