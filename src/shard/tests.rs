//! Shards with ports made of vectors: frames in, frames out, counters exact.

#![allow(clippy::unwrap_used)]

mod floods;

use std::collections::VecDeque;
use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::*;
use crate::frame::{Batch, Flooding, Heads};
use crate::ident::{LatencySensitivity, MacAddr, NetworkIndex};
use crate::limits::BATCH_FRAMES;
use crate::mem::Span;
use crate::port::{Flush, Outcome, Received, Wake};
use crate::switch::{Fdb, NetworkRow, PortRow};

mod held_up;
mod touched;

/// A port whose far end is the test: what it is fed it receives, what it is given it keeps.
#[derive(Default)]
struct Feed {
    inner: Mutex<Inner>,
    /// Frames given to any port of the rig.
    copies: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Inner {
    to_receive: VecDeque<Vec<u8>>,
    flooding: Flooding,
    /// How many frames were given to ports for each batch that came from it.
    visits: Vec<usize>,
    transmitted: Vec<Vec<u8>>,
    /// How many had been given to any port when it was given its last.
    given_at: usize,
    wake: Option<Arc<dyn Wake>>,
    armed: bool,
    full: bool,
    /// Holds its notifications back for so many cycles.
    holds_for: Option<u64>,
    /// And goes on to when the shard has nothing to do.
    patient: bool,
    held: Option<u64>,
    flushed: usize,
    /// Takes so many cycles to be notified.
    slow: u64,
}

impl Feed {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// Feeds frames, and notifies as a guest does: only if it was asked to.
    fn feed(&self, frames: impl IntoIterator<Item = Vec<u8>>) {
        let mut inner = self.lock();
        inner.to_receive.extend(frames);
        if std::mem::take(&mut inner.armed)
            && let Some(wake) = &inner.wake
        {
            wake.wake();
        }
    }

    fn wait_for(&self, count: usize) -> Vec<Vec<u8>> {
        wait(|| self.lock().transmitted.len() >= count);
        std::mem::take(&mut self.lock().transmitted)
    }
}

impl Receive for Feed {
    fn receive(&self, heads: &mut Heads, process: &mut dyn FnMut(&mut Batch<'_>)) -> Received {
        let mut inner = self.lock();
        let count = inner.to_receive.len().min(BATCH_FRAMES);
        let mut frames: Vec<_> = inner.to_receive.drain(..count).collect();
        let flooding = inner.flooding;
        // The port may be its own neighbour's destination: never hold the lock over `process`.
        drop(inner);
        if frames.is_empty() {
            return Received::Nothing;
        }
        let mut batch = Batch::new(heads, 0);
        for frame in &mut frames {
            let len = frame.len();
            batch.push(len, &[Span::from_buffer(frame)]);
        }
        batch.make_divisible(flooding);
        let before = self.copies.load(Ordering::Relaxed);
        process(&mut batch);
        let (dealt_with, flooding) = (batch.dealt_with(), batch.flooding());
        drop(batch);
        let mut inner = self.lock();
        inner.flooding = flooding;
        inner.visits.push(self.copies.load(Ordering::Relaxed) - before);
        frames.drain(dealt_with..).rev().for_each(|frame| inner.to_receive.push_front(frame));
        Received::Frames(dealt_with)
    }

    fn arm(&self) -> bool {
        let mut inner = self.lock();
        inner.armed = true;
        inner.to_receive.is_empty()
    }

    fn disarm(&self) {
        self.lock().armed = false;
    }

    fn attach(&self, wake: Option<Arc<dyn Wake>>) {
        self.lock().wake = wake;
    }
}

impl Transmit for Feed {
    fn transmit(&self, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        let mut inner = self.lock();
        if inner.full {
            return outcome.refuse_all(picks, DropReason::RingFull);
        }
        for &index in picks {
            let frame = &batch.frames()[usize::from(index)];
            let mut bytes = batch.head(usize::from(index)).frame()[..usize::from(frame.head_len)].to_vec();
            for piece in batch.tail(usize::from(index)) {
                let mut more = vec![0; piece.len()];
                piece.read(&mut more);
                bytes.extend(more);
            }
            inner.transmitted.push(bytes);
            outcome.deliver(index);
        }
        let began = crate::sys::cpu::cycles();
        while crate::sys::cpu::cycles() - began < inner.slow {
            std::hint::spin_loop();
        }
        if inner.slow > 0 {
            outcome.excess += crate::sys::cpu::cycles() - began;
        }
        inner.given_at = self.copies.fetch_add(picks.len(), Ordering::Relaxed);
        if let Some(cycles) = inner.holds_for {
            let due = crate::sys::cpu::cycles() + cycles;
            outcome.hold(*inner.held.get_or_insert(due));
        }
    }

    fn flush(&self, which: Flush) -> Option<u64> {
        let mut inner = self.lock();
        let due = inner.held?;
        let waits = match which {
            Flush::Due(now) => now < due,
            Flush::Idle(now) => inner.patient && now < due,
            Flush::All => false,
        };
        if waits {
            return Some(due);
        }
        inner.held = None;
        inner.flushed += 1;
        None
    }
}

fn wait(done: impl Fn() -> bool) {
    wait_mut(done);
}

fn wait_mut(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "it did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn mac(n: u16) -> MacAddr {
    let [a, b] = n.to_be_bytes();
    MacAddr([2, 0, 0, 0, a, b])
}

fn frame(to: MacAddr, from: MacAddr, len: usize, fill: u8) -> Vec<u8> {
    let mut bytes = [to.0, from.0].concat();
    bytes.extend([0x88, 0xb5]);
    bytes.resize(len, fill);
    bytes
}

/// So many CPUs, of those that this process may use; there must be as many.
#[track_caller]
fn allowed(count: usize) -> Vec<u16> {
    let allowed = rustix::thread::sched_getaffinity(None).unwrap();
    let cpus: Vec<u16> = (0..1024).filter(|&cpu| allowed.is_set(usize::from(cpu))).take(count).collect();
    assert_eq!(cpus.len(), count, "these tests need {count} CPUs, and this process may use {cpus:?} only");
    cpus
}

/// `count` feeds in one network, on shards on the CPUs this process may use.
struct Rig {
    shards: Shards,
    feeds: Vec<Arc<Feed>>,
}

impl Rig {
    fn new(count: u16, policy: IdlePolicy) -> Self {
        Self::on(2, count, policy)
    }

    /// On so many shards.
    fn on(shards: usize, count: u16, policy: IdlePolicy) -> Self {
        Self::in_networks(shards, &[count], policy)
    }

    /// So many in each network.
    fn in_networks(shards: usize, counts: &[u16], policy: IdlePolicy) -> Self {
        let shards = Shards::start(&allowed(shards), &[], policy.into(), Clock::start()).unwrap();
        let copies = Arc::new(AtomicUsize::new(0));
        let feed = || Arc::new(Feed { copies: Arc::clone(&copies), ..Feed::default() });
        let feeds: Vec<_> = (0..counts.iter().sum()).map(|_| feed()).collect();
        let (mut ports, mut networks) = (Vec::new(), Vec::new());
        for (network, &count) in (0..).map(NetworkIndex).zip(counts) {
            let members = (0..count).map(|port| PortIndex(ports.len() as u16 + port)).collect();
            networks.push(Some(NetworkRow { members, mac_age: Duration::from_secs(300), mac_limit: 1000 }));
            let row = PortRow { network, mtu: None, macs: 100, storm: Arc::default() };
            ports.extend(vec![Some(row); usize::from(count)]);
        }
        let switch = switch::Tables {
            ports: ports.into(),
            networks: networks.into(),
            fdb: Arc::new(Fdb::with_capacity(1000, [1, 2])),
        };
        let transmit = feeds.iter().map(|feed| Some(Arc::clone(feed) as Arc<dyn Transmit>)).collect();
        shards.publish(Tables { switch, transmit });
        for (index, feed) in (0..).zip(&feeds) {
            shards.attach(PortIndex(index), vec![Arc::clone(feed) as _], &LatencySensitivity::Normal.into()).unwrap();
        }
        Self { shards, feeds }
    }

    fn totals(&self, port: u16) -> PortTotals {
        self.shards.port_totals(PortIndex(port))
    }
}

#[test]
fn frames_flood_until_their_destination_is_known_and_every_byte_arrives() {
    let rig = Rig::new(3, IdlePolicy::Adaptive);
    let [a, b, c] = [0, 1, 2].map(|port| &rig.feeds[port]);
    a.feed([frame(MacAddr::BROADCAST, mac(1), 60, 7)]);
    assert_eq!(b.wait_for(1), [frame(MacAddr::BROADCAST, mac(1), 60, 7)]);
    assert_eq!(c.wait_for(1).len(), 1);
    b.feed((0..200).map(|n| frame(mac(1), mac(2), 60 + usize::from(n) * 7, n)));
    let got = a.wait_for(200);
    assert_eq!(got, (0..200).map(|n| frame(mac(1), mac(2), 60 + usize::from(n) * 7, n)).collect::<Vec<_>>());
    assert!(c.lock().transmitted.is_empty(), "known stations are not flooded");
    wait(|| rig.totals(1).rx_frames == 200);
    let totals = rig.totals(1);
    assert_eq!((totals.rx_delivered, totals.tx_frames), (200, 1));
    assert_eq!(totals.rx_dropped.iter().sum::<u64>(), 0);
}

#[test]
fn what_nobody_takes_is_counted_at_both_ends() {
    let rig = Rig::new(2, IdlePolicy::Adaptive);
    rig.feeds[1].lock().full = true;
    rig.feeds[0].feed((0..100).map(|_| frame(mac(2), mac(1), 64, 0)));
    rig.feeds[0].feed([frame(mac(2), MacAddr::BROADCAST, 64, 0), vec![0; 5]]);
    wait(|| rig.totals(0).rx_frames == 102);
    let (from, to) = (rig.totals(0), rig.totals(1));
    assert_eq!(from.rx_delivered, 0);
    assert_eq!(from.rx_dropped[DropReason::RingFull.index()], 100);
    assert_eq!(from.rx_dropped[DropReason::SourceInvalid.index()], 1);
    assert_eq!(from.rx_dropped[DropReason::FrameTooShort.index()], 1);
    assert_eq!(to.tx_dropped[DropReason::RingFull.index()], 100);
    assert_eq!(to.tx_frames, 0);
}

#[test]
fn queues_rest_when_idle_and_wake_when_fed() {
    let rig = Rig::new(2, IdlePolicy::Adaptive);
    let resting = || rig.shards.report().iter().map(|shard| shard.resting).sum::<usize>();
    for round in 0..50u8 {
        wait(|| resting() == 2);
        rig.feeds[0].feed([frame(mac(2), mac(1), 64, round)]);
        assert_eq!(rig.feeds[1].wait_for(1), [frame(mac(2), mac(1), 64, round)]);
    }
    assert!(rig.shards.report().iter().any(|shard| shard.sleeps > 0));
}

#[test]
fn a_shard_that_never_idles_never_sleeps() {
    let rig = Rig::new(2, IdlePolicy::Never);
    rig.feeds[0].feed([frame(mac(2), mac(1), 64, 0)]);
    rig.feeds[1].wait_for(1);
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.shards.report().iter().all(|shard| shard.resting == 0));
}

#[test]
fn a_detached_port_is_let_go_at_once() {
    let rig = Rig::new(2, IdlePolicy::Adaptive);
    rig.feeds[0].feed([frame(mac(2), mac(1), 64, 0)]);
    rig.feeds[1].wait_for(1);
    rig.shards.detach(PortIndex(0));
    assert!(rig.feeds[0].lock().wake.is_none());
    assert_eq!(Arc::strong_count(&rig.feeds[0]), 2, "the rig and the tables hold it, no shard does");
    rig.shards.publish(Tables::empty());
    assert_eq!(Arc::strong_count(&rig.feeds[0]), 1);
    assert_eq!(rig.shards.report().iter().map(|shard| shard.queues).sum::<usize>(), 1);
}

#[test]
fn shards_say_what_cannot_be() {
    let start = |cpus: &[u16]| Shards::start(cpus, &[], Policy::default(), Clock::start()).err().unwrap().to_string();
    assert!(start(&[]).starts_with("0 shards were asked for"));
    assert!(start(&[1023]).contains("CPU 1023"));
    let rig = Rig::new(1, IdlePolicy::Adaptive);
    let high = rig.shards.attach(PortIndex(0), vec![Arc::clone(&rig.feeds[0]) as _], &LatencySensitivity::High.into());
    assert!(high.unwrap_err().to_string().contains("shards.exclusive"));
}

/// A queue that always has a full batch, to somewhere and from somebody.
struct Flood(MacAddr, MacAddr);

impl Flood {
    /// To an address that nobody has.
    fn all() -> Arc<Self> {
        Arc::new(Self(mac(9), mac(1)))
    }
}

impl Receive for Flood {
    fn receive(&self, heads: &mut Heads, process: &mut dyn FnMut(&mut Batch<'_>)) -> Received {
        let mut frames = vec![frame(self.0, self.1, 64, 0); BATCH_FRAMES];
        let mut batch = Batch::new(heads, 0);
        for frame in &mut frames {
            let len = frame.len();
            batch.push(len, &[Span::from_buffer(frame)]);
        }
        process(&mut batch);
        Received::Frames(BATCH_FRAMES)
    }

    fn arm(&self) -> bool {
        false
    }

    fn disarm(&self) {}

    fn attach(&self, _: Option<Arc<dyn Wake>>) {}
}

#[test]
fn a_port_that_floods_from_many_queues_gets_half_of_a_shard_that_two_want() {
    let rig = Rig::on(1, 2, IdlePolicy::Adaptive);
    rig.shards
        .attach(PortIndex(1), (0..32).map(|_| Flood::all() as _).collect(), &LatencySensitivity::Normal.into())
        .unwrap();
    wait(|| rig.totals(1).rx_frames > 0);
    let before = rig.totals(1).rx_frames;
    rig.shards.attach(PortIndex(0), vec![Flood::all()], &LatencySensitivity::Normal.into()).unwrap();
    wait(|| rig.totals(0).rx_frames > 50_000);
    let (few, many) = (rig.totals(0).rx_frames, rig.totals(1).rx_frames - before);
    // By queues it would be 1 to 32. The slack is for what the kernel took of the CPU, and for the time until the second.
    assert!(many < 4 * few, "one queue moved {few} frames while 32 moved {many}");
}

#[test]
fn what_it_takes_to_notify_a_port_is_not_charged_to_who_sends_to_it() {
    let rig = Rig::on(1, 3, IdlePolicy::Adaptive);
    for port in 0..3 {
        rig.feeds[usize::from(port)].feed([frame(MacAddr::BROADCAST, mac(port + 1), 64, 0)]);
        wait(|| rig.totals(port).rx_frames == 1);
    }
    // A full batch takes a hundredth of that.
    rig.feeds[2].lock().slow = crate::sys::cpu::cycles_per_second() / 50;
    let normal = LatencySensitivity::Normal.into();
    rig.shards.attach(PortIndex(0), vec![Arc::new(Flood(mac(3), mac(1)))], &normal).unwrap();
    rig.shards.attach(PortIndex(1), vec![Arc::new(Flood(mac(1), mac(2)))], &normal).unwrap();
    wait(|| rig.totals(0).rx_frames > 40 * BATCH_FRAMES as u64);
    let (to_slow, to_quick) = (rig.totals(0).rx_frames, rig.totals(1).rx_frames);
    assert!(to_quick < 5 * to_slow, "{to_slow} frames to the port that takes long, {to_quick} to another");
}

#[test]
fn what_is_held_back_goes_out_when_the_shard_has_nothing_to_do() {
    let rig = Rig::new(2, IdlePolicy::Adaptive);
    rig.feeds[1].lock().holds_for = Some(u64::MAX / 4);
    for round in 1..20 {
        rig.feeds[0].feed([frame(mac(2), mac(1), 64, 0)]);
        wait(|| rig.feeds[1].lock().flushed == round);
    }
    assert_eq!(rig.feeds[1].lock().transmitted.len(), 19);
}

#[test]
fn what_is_held_back_patiently_goes_out_when_it_is_due_though_the_shard_sleeps() {
    let rig = Rig::on(1, 2, IdlePolicy::Adaptive);
    let hold = crate::sys::cpu::cycles_per_second() / 100;
    (rig.feeds[1].lock().holds_for, rig.feeds[1].lock().patient) = (Some(hold), true);
    for round in 1..20 {
        let before = crate::sys::cpu::cycles();
        rig.feeds[0].feed([frame(mac(2), mac(1), 64, 0)]);
        wait(|| rig.feeds[1].lock().flushed == round);
        assert!(crate::sys::cpu::cycles() - before >= hold, "round {round}: not before it was due");
    }
    let slept = rig.shards.report()[0].sleep_cycles;
    assert!(slept > 10 * hold, "it slept for {slept} cycles of {}", 19 * hold);
}

#[test]
fn what_is_held_back_goes_out_when_it_is_due_however_busy_the_shard_is() {
    let rig = Rig::on(1, 3, IdlePolicy::Adaptive);
    rig.feeds[1].lock().holds_for = Some(crate::sys::cpu::cycles_per_second() / 10_000);
    rig.feeds[1].feed([frame(MacAddr::BROADCAST, mac(2), 64, 0)]);
    wait(|| rig.totals(1).rx_frames == 1);
    // It floods what nobody has: each batch goes to the port that holds back, so no turn is ever empty.
    rig.shards.attach(PortIndex(2), vec![Flood::all()], &LatencySensitivity::Normal.into()).unwrap();
    wait(|| rig.feeds[1].lock().flushed >= 10);
    rig.shards.detach(PortIndex(2));
    wait(|| rig.feeds[1].lock().held.is_none());
}

#[test]
fn shards_come_and_go_and_ports_and_counters_stay() {
    let mut rig = Rig::on(1, 3, IdlePolicy::Adaptive);
    let cpus = allowed(2);
    let talk = |rig: &Rig, round: u8| {
        let before = rig.totals(0).rx_frames;
        rig.feeds[0].feed((0..100).map(|_| frame(MacAddr::BROADCAST, mac(1), 64, round)));
        assert_eq!(rig.feeds[1].wait_for(100).len(), 100);
        rig.feeds[2].wait_for(100);
        wait(|| rig.totals(0).rx_frames == before + 100);
    };
    talk(&rig, 1);
    rig.shards.grow(&cpus, &[]).unwrap();
    assert_eq!(rig.shards.shrink().len(), 0);
    assert_eq!(rig.shards.report().len(), cpus.len());
    talk(&rig, 2);
    // The first shard ends; its ports go to the other.
    rig.shards.grow(&cpus[1..], &[]).unwrap();
    assert_eq!(rig.shards.shrink().len(), 0);
    assert_eq!(rig.shards.report().iter().map(|shard| (shard.cpu, shard.queues)).collect::<Vec<_>>(), [(cpus[1], 3)]);
    talk(&rig, 3);
    assert_eq!(rig.totals(0).rx_frames, 300, "what the shard that ended had counted");
    assert!(rig.shards.grow(&[], &[]).is_err() && rig.shards.grow(&[1023], &[]).is_err());
    talk(&rig, 4);
    // It becomes an exclusive one, and the only shared one is elsewhere.
    rig.shards.grow(&cpus[..1], &cpus[1..]).unwrap();
    assert_eq!(rig.shards.shrink().len(), 0);
    rig.shards.attach(PortIndex(2), vec![Arc::clone(&rig.feeds[2]) as _], &LatencySensitivity::High.into()).unwrap();
    talk(&rig, 5);
    rig.shards.grow(&cpus[..1], &[]).unwrap();
    let refused = rig.shards.shrink();
    assert!(refused.len() == 1 && refused[0].0 == PortIndex(2), "{refused:?}");
    assert_eq!(rig.totals(0).rx_frames, 500);
}

#[test]
fn queues_follow_the_memory_of_their_guest_if_their_level_asks_for_it() {
    let mut rig = Rig::on(2, 3, IdlePolicy::Adaptive);
    // Made up: the CPUs of most machines that tests run on are all on one node.
    rig.shards.shards[0].node = 0;
    rig.shards.shards[1].node = 1;
    let on = |rig: &Rig, port| rig.shards.nodes_of(PortIndex(port)).into_iter().collect::<Vec<_>>();
    let talk = |rig: &Rig| {
        rig.feeds[0].feed((0..100).map(|n| frame(MacAddr::BROADCAST, mac(1), 64, n)));
        assert_eq!(rig.feeds[1].wait_for(100).len(), 100);
    };
    let attach = |rig: &Rig, latency: LatencySensitivity| {
        rig.shards.attach(PortIndex(0), vec![Arc::clone(&rig.feeds[0]) as _], &latency.into()).unwrap();
    };
    let start = on(&rig, 0)[0];
    let other = 1 - start;
    assert!(!rig.shards.settle(PortIndex(0), Some(other)), "normal does not mind");
    attach(&rig, LatencySensitivity::Medium);
    let start = on(&rig, 0)[0];
    let other = 1 - start;
    talk(&rig);
    assert!(!rig.shards.settle(PortIndex(0), Some(start)) && !rig.shards.settle(PortIndex(0), None));
    assert!(!rig.shards.settle(PortIndex(0), Some(7)), "nobody is there");
    assert!(rig.shards.settle(PortIndex(0), Some(other)));
    assert_eq!(on(&rig, 0), [other]);
    assert!(!rig.shards.settle(PortIndex(0), Some(other)), "once is enough");
    talk(&rig);
    // A shard that comes later on a nearer node is found, too.
    rig.shards.shards.iter_mut().for_each(|shard| shard.node = 0);
    assert!(!rig.shards.settle(PortIndex(0), Some(1)));
    let away = rig.shards.shards.iter().position(|shard| rig.shards.cpus_of(PortIndex(0)) != [shard.cpu]).unwrap();
    rig.shards.shards[away].node = 1;
    assert!(rig.shards.settle(PortIndex(0), Some(1)));
    talk(&rig);
    assert!(!rig.shards.settle(PortIndex(9), Some(1)), "there is no such port");
}

#[test]
fn a_port_that_waits_for_floods_is_moved_away_from_them_and_once_only() {
    let mut rig = Rig::on(1, 3, IdlePolicy::Adaptive);
    for port in [0, 1] {
        rig.shards.attach(PortIndex(port), vec![Flood::all()], &LatencySensitivity::Normal.into()).unwrap();
    }
    rig.shards.grow(&allowed(2), &[]).unwrap();
    let mut now = crate::clock::Instant(0);
    wait_mut(|| {
        now = now.after(Duration::from_secs(1));
        // What a batch of the test's own ports takes makes each wait for the other for long enough.
        std::thread::sleep(Duration::from_millis(20));
        !rig.shards.balance(now).is_empty()
    });
    let moves = rig.shards.moves();
    assert!(moves.len() == 1 && moves[0].queues == 1 && moves[0].from != moves[0].to, "{moves:?}");
    assert!(moves[0].delay_micros >= 50);
    assert_ne!(rig.shards.cpus_of(PortIndex(0)), rig.shards.cpus_of(PortIndex(1)));
    let before = [0, 1].map(|port| rig.totals(port).rx_frames);
    wait(|| [0, 1].iter().all(|&port| rig.totals(port).rx_frames > before[usize::from(port)]));
}
