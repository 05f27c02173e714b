//! Rings that somebody is in, for a moment or for good.

use std::sync::Barrier;
use std::sync::mpsc::channel;

use super::interrupts::Rig;
use super::*;
use crate::frame::Needs;
use crate::port::batch_lock::WAIT_MICROS;
use crate::port::testing::{Shard, transmit};
use crate::port::{Flush, Outcome};
use crate::sys::cpu;
use crate::verdict::DropReason;

/// Has `act` done by another thread; returns what came of it, or fails if nothing does.
fn within_reach<T: Send + 'static>(what: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, answer) = channel();
    std::thread::spawn(move || done.send(act()));
    answer.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("{what} waits for who is in the ring"))
}

fn refusals(outcome: &Outcome, frames: usize) -> Vec<DropReason> {
    let lost = (0..frames).filter(|frame| outcome.delivered & 1 << frame == 0);
    lost.map(|frame| outcome.reasons[frame]).collect()
}

#[test]
fn nobody_but_its_own_front_end_waits_for_a_ring_that_somebody_is_held_up_in() {
    let rig = Rig::new(LatencySensitivity::Normal);
    assert!(!rig.give());
    let nic = rig.port.attachment.nic();
    let held: Vec<_> = nic.queues.iter().map(|queue| queue.lock()).collect();
    // What shards do.
    let side = rig.port.transmit_side();
    let lost = within_reach("transmit", move || refusals(&transmit(&*side, &[vec![7; 60], vec![7; 1400]]), 2));
    assert_eq!(lost, [DropReason::ReceiverBusy; 2]);
    nic.queues[0].note_held(true);
    let side = rig.port.transmit_side();
    let later = within_reach("flush", move || side.flush(Flush::Due(cpu::cycles())));
    assert!(later.is_some(), "the interrupt that is held back is not forgotten");
    for queue in rig.port.receive_queues() {
        let (shard, other) = (Shard::new(), Shard::new());
        let rests = within_reach("a queue's shard", move || {
            queue.attach(Some(shard));
            queue.disarm();
            queue.attach(Some(other));
            queue.arm()
        });
        assert!(!rests, "it is polled until somebody can ask the guest to kick");
    }
    // What the control side does.
    let port = Arc::clone(&rig.port);
    let calls = within_reach("the control side", move || {
        port.set_latency(LatencySensitivity::High);
        port.set_mtu(Some(1000));
        port.set_offloads(Needs::NONE);
        port.link();
        assert_eq!(port.detail()["queues"][0]["started"], true);
        port.notifications()[0].calls
    });
    assert_eq!(calls, 1);
    drop(held);
    // What was set meanwhile is in force.
    assert!(!rig.flush(Flush::Due(cpu::cycles())));
    let outcome = transmit(&*rig.port.transmit_side(), &[vec![7; 1014], vec![7; 1015]]);
    assert_eq!(refusals(&outcome, 2), [DropReason::MtuExceeded]);
}

/// Front ends repeat SET_VRING_ENABLE as often as they like, and each that is waited for could take the ring from its shard.
#[test]
fn who_enables_a_ring_that_is_enabled_leaves_it_to_who_is_in_it() {
    let mut rig = Rig::new(LatencySensitivity::Normal);
    let nic = rig.port.attachment.nic();
    let held = nic.queues[0].lock();
    let enable = move || (rig.qemu.done(Req::SET_VRING_ENABLE, &state(0, 1), &[]), rig.qemu);
    let (done, _qemu) = within_reach("SET_VRING_ENABLE", enable);
    drop(held);
    assert!(done);
    assert!(nic.queues[0].report().enabled);
}

/// The host may take the CPU away from a shard that is in a ring. That costs others some time and no frames.
#[test]
fn who_is_in_a_ring_and_would_go_on_is_waited_for() {
    let rig = Rig::new(LatencySensitivity::Medium);
    rig.post_again();
    let queue = Arc::clone(&rig.port.attachment.nic().queues[0]);
    let (tell, told) = channel();
    let busy = std::thread::spawn(move || {
        let state = queue.lock();
        tell.send(()).unwrap();
        let began = cpu::cycles();
        while cpu::cycles().wrapping_sub(began) < cpu::cycles_per_second() / 1_000_000 * 100 * WAIT_MICROS {
            std::hint::spin_loop();
        }
        drop(state);
    });
    told.recv().unwrap();
    let outcome = transmit(&*rig.port.transmit_side(), &[vec![7; 60]]);
    assert_eq!(refusals(&outcome, 1), []);
    busy.join().unwrap();
}

/// How long a shard waits for a ring that another thread is in, and is held up in: a shard with a batch of so many bytes, or else a
/// session. In counts of [`cpu::cycles`].
fn wait_for(rig: &Rig, bytes: Option<u64>) -> u64 {
    let queue = Arc::clone(&rig.port.attachment.nic().queues[0]);
    let ((tell, told), (end, ended)) = (channel(), channel::<()>());
    let holder = std::thread::spawn(move || {
        let state = bytes.map_or_else(|| Some(queue.lock()), |bytes| queue.enter(bytes));
        tell.send(state.is_some()).unwrap();
        let _ = ended.recv();
    });
    assert!(told.recv().unwrap());
    let began = cpu::cycles();
    let outcome = transmit(&*rig.port.transmit_side(), &[vec![7; 60]]);
    let waited = cpu::cycles().wrapping_sub(began);
    assert_eq!(refusals(&outcome, 1), [DropReason::ReceiverBusy]);
    drop(end);
    holder.join().unwrap();
    waited
}

#[test]
fn who_copies_much_into_a_ring_is_waited_for_as_much_longer_and_nobody_after_it_is() {
    let rig = Rig::new(LatencySensitivity::Medium);
    rig.post_again();
    let long = cpu::cycles_per_second() / 1_000_000 * 20 * WAIT_MICROS;
    for _ in 0..20 {
        let waited = wait_for(&rig, Some(20 * WAIT_MICROS * 1000));
        assert!(waited >= long, "{waited} of {long}");
    }
    // Once at least the host does not take the CPU away in the middle of it.
    assert!((0..100).any(|_| wait_for(&rig, None) < long));
}

#[test]
fn shards_that_meet_in_a_ring_wait_for_each_other_and_lose_nothing() {
    let rig = Rig::new(LatencySensitivity::Medium);
    let meeting = Barrier::new(2);
    let mut rounds_without_loss = 0;
    for _ in 0..200 {
        // Both batches fit what is posted.
        rig.post_again();
        let shard = || {
            let side = rig.port.transmit_side();
            let frames = vec![vec![7; 1400]; 64];
            meeting.wait();
            let began = cpu::cycles();
            let outcome = transmit(&*side, &frames);
            (refusals(&outcome, 64), cpu::cycles().wrapping_sub(began))
        };
        let (a, b) = std::thread::scope(|scope| {
            let other = scope.spawn(shard);
            (shard(), other.join().unwrap())
        });
        let wait = cpu::cycles_per_second() / 1_000_000 * WAIT_MICROS;
        for ((lost, _), (_, others)) in [(&a, &b), (&b, &a)] {
            assert!(lost.iter().all(|&reason| reason == DropReason::ReceiverBusy), "{lost:?}");
            // Unless the machine took the CPU away from the other one in the middle of it.
            assert!(lost.is_empty() || *others > wait, "lost after less than {WAIT_MICROS} us");
        }
        rounds_without_loss += usize::from(a.0.is_empty() && b.0.is_empty());
    }
    assert!(rounds_without_loss > 0);
}
