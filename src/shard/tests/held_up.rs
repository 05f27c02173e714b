//! Ports whose memory holds a shard up, and what that is to others.

use std::sync::Condvar;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;

use super::*;

/// A port in whose memory whoever comes is held up while it is `shut`.
#[derive(Default)]
struct Trap {
    feed: Feed,
    shut: Mutex<bool>,
    opened: Condvar,
    caught: AtomicBool,
    /// What it was told: how often, and whether it is barred.
    told: Mutex<(usize, bool)>,
}

impl Trap {
    fn set(&self, shut: bool) {
        *self.shut.lock().unwrap() = shut;
        self.caught.store(false, Ordering::SeqCst);
        self.opened.notify_all();
    }

    fn pass(&self) {
        let mut shut = self.shut.lock().unwrap();
        while *shut {
            self.caught.store(true, Ordering::SeqCst);
            shut = self.opened.wait(shut).unwrap();
        }
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
        self.pass();
        self.feed.receive(heads, process)
    }

    fn arm(&self) -> bool {
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

    fn hold_up(&self, held: Duration, bar: bool, again: bool) {
        assert!(held >= Duration::from_millis(20));
        let mut told = self.told.lock().unwrap();
        told.0 += usize::from(!again);
        told.1 |= bar;
    }
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
    publish_as(2, rig, trap);
}

fn publish_as(port: usize, rig: &Rig, trap: &Arc<Trap>) {
    let old = rig.shards.tables();
    let switch = old.switch.clone();
    let mut transmit: Vec<_> = old.transmit.to_vec();
    transmit[port] = Some(Arc::clone(trap) as _);
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
fn a_port_that_holds_up_who_sends_to_it_is_barred_the_second_time() {
    let (rig, trap) = rig();
    for time in 1..=2 {
        trap.set(true);
        rig.feeds[0].feed([frame(mac(3), mac(1), 64, 0)]);
        trap.wait_for_catch();
        talk_to_oneself(&rig);
        wait(|| trap.told() == (time, time == 2));
        trap.set(false);
        wait(|| rig.shards.report()[0].stuck == 0);
    }
    rig.feeds[0].feed([frame(mac(3), mac(1), 64, 0)]);
    wait(|| rig.totals(0).rx_dropped[DropReason::ReceiverBusy.index()] == 1);
    talk(&rig);
}

#[test]
fn a_first_time_is_forgiven_where_no_thread_can_stand_in() {
    let (rig, trap) = rig();
    let other = Arc::new(Trap::default());
    publish_as(1, &rig, &other);
    // The one thread that may be held up, and then the one that serves instead of it.
    for (trap, to) in [(&trap, 3), (&other, 2)] {
        trap.set(true);
        rig.feeds[0].feed([frame(mac(to), mac(1), 64, 0)]);
        trap.wait_for_catch();
        wait(|| trap.told().0 == 1);
    }
    // Some more looks of the watchdog.
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!((trap.told(), other.told()), ((1, false), (1, false)));
    trap.set(false);
    other.set(false);
    wait(|| rig.shards.report()[0].stuck == 0);
    talk_to_oneself(&rig);
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
    wait(|| crew.blocks().len() == 3);
    // Who sleeps keeps no tables from going.
    let tables = Arc::downgrade(&rig.shards.tables());
    publish(&rig, &trap);
    assert!(tables.upgrade().is_none());
}

/// Port 1 sends to nobody, and has its frames back: the sender that was caught as well cannot be talked to.
fn talk_to_oneself(rig: &Rig) {
    let before = rig.totals(1).rx_frames;
    rig.feeds[1].feed([frame(mac(2), mac(2), 64, 0)]);
    wait(|| rig.totals(1).rx_frames > before);
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
