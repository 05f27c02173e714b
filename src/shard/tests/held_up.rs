//! Ports whose memory holds a shard up, and what that is to others.

use std::sync::Condvar;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;

use super::*;

mod handed_over;
mod numbers;
mod short_times;
mod toils;

/// A port in whose memory whoever comes is held up while it is `shut`.
#[derive(Default)]
struct Trap {
    feed: Feed,
    shut: Mutex<bool>,
    opened: Condvar,
    caught: AtomicBool,
    /// How often somebody came through.
    passed: AtomicUsize,
    /// It holds up who writes its frames to others, rather than who receives them.
    late: AtomicBool,
    /// It holds up who has its queue rest.
    in_arm: AtomicBool,
    /// What it has whoever is held up do meanwhile, over and over; nothing: wait.
    work: Mutex<Option<fn()>>,
    /// Where the tails of the frames are that it sends.
    tails: Mutex<Vec<usize>>,
    /// What it was told: how often, and whether it is barred.
    told: Mutex<(usize, bool)>,
    /// The most times together that it was barred for.
    often: AtomicUsize,
}

impl Trap {
    fn set(&self, shut: bool) {
        *self.shut.lock().unwrap() = shut;
        self.caught.store(false, Ordering::SeqCst);
        self.opened.notify_all();
    }

    fn pass(&self) {
        let work = *self.work.lock().unwrap();
        while let Some(work) = work.filter(|_| *self.shut.lock().unwrap()) {
            self.caught.store(true, Ordering::SeqCst);
            work();
        }
        let mut shut = self.shut.lock().unwrap();
        while *shut {
            self.caught.store(true, Ordering::SeqCst);
            shut = self.opened.wait(shut).unwrap();
        }
        self.passed.fetch_add(1, Ordering::SeqCst);
    }

    fn wait_for_catch(&self) {
        wait(|| self.caught.load(Ordering::SeqCst));
    }

    fn told(&self) -> (usize, bool) {
        *self.told.lock().unwrap()
    }
}

impl Receive for Trap {
    fn receive(&self, heads: &mut Heads, process: &mut dyn FnMut(&mut Batch<'_>)) -> Received {
        if self.feed.lock().to_receive.is_empty() {
            return Received::Nothing;
        }
        if !self.late.load(Ordering::SeqCst) {
            self.pass();
        }
        self.feed.receive(heads, &mut |batch| {
            *self.tails.lock().unwrap() = addresses(batch);
            process(batch);
        })
    }

    fn arm(&self) -> bool {
        if self.in_arm.load(Ordering::SeqCst) {
            self.pass();
        }
        self.feed.arm()
    }

    fn disarm(&self) {
        self.feed.disarm();
    }

    fn attach(&self, wake: Option<Arc<dyn Wake>>) {
        self.feed.attach(wake);
    }
}

impl Transmit for Trap {
    fn transmit(&self, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        if self.told().1 {
            return outcome.refuse_all(picks, DropReason::ReceiverBusy);
        }
        self.pass();
        self.feed.transmit(batch, picks, outcome);
    }

    fn hold_up(&self, held: Duration, times: u32, bar: bool, again: bool) {
        assert!(held >= Duration::from_millis(20));
        self.often.fetch_max(if bar { times as usize } else { 0 }, Ordering::SeqCst);
        let mut told = self.told.lock().unwrap();
        told.0 += usize::from(!again);
        told.1 |= bar;
    }
}

/// Where the tails of a batch are.
fn addresses(batch: &Batch<'_>) -> Vec<usize> {
    let tails = (0..batch.len()).flat_map(|index| batch.tail(index));
    tails.map(|tail| tail.as_iovec().iov_base.addr()).collect()
}

/// A port that is given frames of a trap and of others, as any port: the trap holds up who reads what still lies there.
struct Neighbour {
    trap: Arc<Trap>,
    feed: Arc<Feed>,
    told: AtomicUsize,
}

impl Transmit for Neighbour {
    fn transmit(&self, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        let theirs = self.trap.tails.lock().unwrap().clone();
        if self.trap.late.load(Ordering::SeqCst) && addresses(batch).iter().any(|tail| theirs.contains(tail)) {
            self.trap.pass();
        }
        self.feed.transmit(batch, picks, outcome);
    }

    fn hold_up(&self, _: Duration, _: u32, _: bool, _: bool) {
        self.told.fetch_add(1, Ordering::SeqCst);
    }
}

/// Puts a neighbour of the trap in the place of a port made of vectors.
fn neighbour(port: usize, rig: &Rig, trap: &Arc<Trap>) -> Arc<Neighbour> {
    let (trap, feed, told) = (Arc::clone(trap), Arc::clone(&rig.feeds[port]), AtomicUsize::new(0));
    let neighbour = Arc::new(Neighbour { trap, feed, told });
    publish_as(port, rig, Arc::clone(&neighbour) as _);
    neighbour
}

/// The next time that the shard is found to be held up, by both ports.
fn stall(rig: &Rig) -> (PortIndex, Option<PortIndex>) {
    let mut found = None;
    wait_mut(|| {
        found = found.or(rig.shards.stalls.take().into_iter().find(|stall| !stall.over));
        found.is_some()
    });
    found.map(|stall| (stall.port, stall.sender)).unwrap()
}

/// Two ports made of vectors, 0 and 1, and a trap, 2, on one shard.
fn rig() -> (Rig, Arc<Trap>) {
    let rig = Rig::on(1, 3, IdlePolicy::Adaptive);
    let trap = Arc::new(Trap::default());
    publish(&rig, &trap);
    let queues = vec![Arc::clone(&trap) as _];
    rig.shards.attach(PortIndex(2), queues, &LatencySensitivity::Normal.into()).unwrap();
    for (port, feed) in (0..).zip([&*rig.feeds[0], &*rig.feeds[1], &trap.feed]) {
        feed.feed([frame(MacAddr::BROADCAST, mac(port + 1), 64, 0)]);
        wait(|| rig.totals(port).rx_delivered == 1);
    }
    (rig, trap)
}

/// The tables of [`Rig`], with the trap in place of its last port.
fn publish(rig: &Rig, trap: &Arc<Trap>) {
    publish_as(2, rig, Arc::clone(trap) as _);
}

pub(super) fn publish_as(port: usize, rig: &Rig, side: Arc<dyn Transmit>) {
    let old = rig.shards.tables();
    let switch = old.switch.clone();
    let mut transmit: Vec<_> = old.transmit.to_vec();
    transmit[port] = Some(side);
    drop(old);
    rig.shards.publish(Tables { switch, transmit: transmit.into() });
}

/// Frames go between ports 0 and 1.
fn talk(rig: &Rig) {
    for round in 0..20u8 {
        for (from, to) in [(0, 1), (1, 0)] {
            let given = rig.feeds[usize::from(to)].lock().transmitted.len();
            rig.feeds[usize::from(from)].feed([frame(mac(to + 1), mac(from + 1), 64, round)]);
            wait(|| rig.feeds[usize::from(to)].lock().transmitted.len() > given);
        }
    }
}

/// Has `act` done by another thread; fails if that takes for ever.
fn without_waiting(what: &str, act: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let (done, answer) = channel();
        scope.spawn(move || {
            act();
            let _ = done.send(());
        });
        if answer.recv_timeout(Duration::from_secs(60)).is_err() {
            eprintln!("{what} waits for a shard that is held up");
            // The thread is never to be joined.
            std::process::abort();
        }
    });
}

#[test]
fn a_port_that_holds_up_who_receives_from_it_holds_up_nobody_else() {
    let (rig, trap) = rig();
    trap.set(true);
    trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
    trap.wait_for_catch();
    talk(&rig);
    without_waiting("the control side", || {
        publish(&rig, &trap);
        let queues = || vec![Arc::clone(&rig.feeds[0]) as _];
        rig.shards.attach(PortIndex(0), queues(), &LatencySensitivity::Low.into()).unwrap();
        rig.shards.detach(PortIndex(1));
        rig.shards
            .attach(PortIndex(1), vec![Arc::clone(&rig.feeds[1]) as _], &LatencySensitivity::Normal.into())
            .unwrap();
        rig.shards.balance(crate::clock::Clock::start().now());
    });
    talk(&rig);
    let report = &rig.shards.report()[0];
    assert_eq!((report.held_up, report.stuck, report.queues), (1, 1, 3));
    wait(|| trap.told().1);
    assert_eq!(trap.told().0, 1, "it is one time, however long it takes");
    // It goes on where it was once it is free, and what it sent is there.
    trap.set(false);
    *trap.told.lock().unwrap() = (0, false);
    wait(|| rig.totals(2).rx_delivered == 2);
    wait(|| rig.shards.report()[0].stuck == 0);
    for round in 0..10 {
        trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
        wait(|| rig.totals(2).rx_delivered == 3 + round);
    }
    for port in 0..3 {
        let totals = rig.totals(port);
        assert_eq!(totals.rx_frames, totals.rx_delivered, "port {port} lost nothing");
    }
}

#[test]
fn a_receiver_that_holds_up_who_writes_to_it_is_barred_the_second_time_and_no_sender_is() {
    let (rig, trap) = rig();
    let senders = [0, 1].map(|port| neighbour(port, &rig, &trap));
    // Another sender does not make it the first time again.
    for (time, sender) in [(1, 0u16), (2, 1)] {
        trap.set(true);
        rig.feeds[usize::from(sender)].feed([frame(mac(3), mac(sender + 1), 200, 0)]);
        trap.wait_for_catch();
        assert_eq!(stall(&rig), (PortIndex(2), Some(PortIndex(sender)).filter(|_| time == 1)));
        if time == 1 {
            // Some more looks of the watchdog.
            std::thread::sleep(Duration::from_millis(200));
            assert_eq!(trap.told(), (0, false), "it may have been the sender");
        } else {
            wait(|| trap.told() == (1, true));
        }
        trap.set(false);
        wait(|| rig.shards.report()[0].stuck == 0);
    }
    assert_eq!(senders.each_ref().map(|sender| sender.told.load(Ordering::SeqCst)), [0; 2]);
    let busy = rig.totals(0).rx_dropped[DropReason::ReceiverBusy.index()];
    rig.feeds[0].feed([frame(mac(3), mac(1), 64, 0)]);
    wait(|| rig.totals(0).rx_dropped[DropReason::ReceiverBusy.index()] == busy + 1);
    talk(&rig);
}

#[test]
fn a_sender_that_holds_up_who_writes_its_frames_has_no_receiver_barred() {
    let (rig, trap) = rig();
    let receivers = [0, 1].map(|port| neighbour(port, &rig, &trap));
    rig.feeds.iter().for_each(|feed| feed.lock().transmitted.clear());
    trap.late.store(true, Ordering::SeqCst);
    trap.set(true);
    trap.feed.feed([frame(mac(1), mac(3), 200, 7)]);
    trap.wait_for_catch();
    assert_eq!(stall(&rig), (PortIndex(0), Some(PortIndex(2))));
    // Some more looks of the watchdog. The receiver goes on sending.
    std::thread::sleep(Duration::from_millis(200));
    for round in 0..10 {
        rig.feeds[0].feed([frame(mac(2), mac(1), 64, round)]);
        rig.feeds[1].wait_for(1);
    }
    trap.set(false);
    wait(|| rig.shards.report()[0].stuck == 0);
    assert_eq!(rig.feeds[0].wait_for(1), [frame(mac(1), mac(3), 200, 7)]);
    // From now on its frames lie elsewhere when they are written, whoever to, and are the same.
    trap.set(true);
    for round in 0..10 {
        let all = [frame(mac(1), mac(3), 200, round), frame(mac(2), mac(3), 1500, round)];
        trap.feed.feed(all.clone());
        trap.feed.feed([frame(MacAddr::BROADCAST, mac(3), 300, round)]);
        for (feed, own) in rig.feeds.iter().zip(all) {
            assert_eq!(feed.wait_for(2), [own, frame(MacAddr::BROADCAST, mac(3), 300, round)]);
        }
    }
    assert!(!trap.caught.load(Ordering::SeqCst));
    // What it holds up now it holds up alone.
    trap.late.store(false, Ordering::SeqCst);
    trap.feed.feed([frame(mac(1), mac(3), 200, 7)]);
    trap.wait_for_catch();
    assert_eq!(stall(&rig), (PortIndex(2), None));
    wait(|| trap.told() == (1, true));
    assert_eq!(receivers.each_ref().map(|receiver| receiver.told.load(Ordering::SeqCst)), [0; 2]);
    trap.set(false);
}

#[test]
fn a_time_is_told_once_where_no_thread_can_stand_in() {
    let (rig, trap) = rig();
    let other = Arc::new(Trap::default());
    publish_as(1, &rig, Arc::clone(&other) as _);
    rig.shards.attach(PortIndex(1), vec![Arc::clone(&other) as _], &LatencySensitivity::Normal.into()).unwrap();
    // The one thread that may be held up, and then the one that serves instead of it.
    trap.set(true);
    rig.feeds[0].feed([frame(mac(3), mac(1), 64, 0)]);
    trap.wait_for_catch();
    assert_eq!(stall(&rig), (PortIndex(2), Some(PortIndex(0))));
    other.set(true);
    other.feed.feed([frame(mac(1), mac(2), 64, 0)]);
    other.wait_for_catch();
    assert_eq!(stall(&rig), (PortIndex(1), None));
    wait(|| other.told().1);
    // Some more looks of the watchdog.
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!((trap.told(), other.told()), ((0, false), (1, true)));
    trap.set(false);
    other.set(false);
    wait(|| rig.shards.report()[0].stuck == 0);
}

/// The threads of this process.
fn threads() -> Vec<i32> {
    let numbers = std::fs::read_dir("/proc/self/task").unwrap();
    numbers.map(|thread| thread.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
}

#[test]
fn whoever_stands_in_and_counts_was_there_before() {
    let (rig, trap) = rig();
    let crew = &rig.shards.shards[0].crew;
    // Starting a thread waits for whoever has the memory map of the process changed.
    let (before, blocks) = (threads(), crew.blocks());
    let before_count = blocks.len();
    for round in 0..4 {
        trap.set(true);
        trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
        trap.wait_for_catch();
        talk(&rig);
        if round == 0 {
            let serves = crew.server().1.thread().unwrap();
            assert!(before.contains(&serves), "{serves} was started for it, and is not of {before:?}");
            assert!(blocks.iter().any(|block| Arc::ptr_eq(block, &crew.blocks()[0])), "it counts in a new block");
        }
        trap.set(false);
        *trap.told.lock().unwrap() = (0, false);
        wait(|| rig.shards.report()[0].stuck == 0);
    }
    assert_eq!(rig.shards.report()[0].held_up, 4);
    // The thread that serves, those that may have to, and the one that was held up.
    wait(|| crew.blocks().len() == before_count + 1);
    // Who sleeps keeps no tables from going.
    let tables = Arc::downgrade(&rig.shards.tables());
    publish(&rig, &trap);
    assert!(tables.upgrade().is_none());
}

#[test]
fn shards_that_are_held_up_do_not_keep_the_process_from_ending() {
    let (rig, trap) = rig();
    trap.set(true);
    trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
    trap.wait_for_catch();
    let Rig { shards, .. } = rig;
    without_waiting("the end", || shards.stop());
    trap.set(false);
}

#[test]
fn a_thread_that_was_held_up_while_its_last_queue_went_to_rest_ends_like_any() {
    let (rig, trap) = rig();
    trap.late.store(true, Ordering::SeqCst);
    trap.in_arm.store(true, Ordering::SeqCst);
    trap.set(true);
    trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
    trap.wait_for_catch();
    wait(|| rig.shards.report()[0].stuck == 1);
    // Until it is let go its own queue is the only one that it has not put to rest.
    std::thread::sleep(Duration::from_millis(300));
    trap.set(false);
    wait(|| rig.shards.report()[0].stuck == 0);
}
