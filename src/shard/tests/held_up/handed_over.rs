//! What a thread that is held up leaves to the one that stands in for it, and that it is found at all.

use super::*;

#[test]
fn what_a_thread_that_is_held_up_was_to_send_is_sent_by_who_stands_in() {
    let (rig, trap) = rig();
    let held_back = |port: &Feed| port.lock().held.is_some();
    (rig.feeds[1].lock().holds_for, rig.feeds[1].lock().patient) = (Some(u64::MAX / 4), true);
    rig.feeds[0].feed([frame(mac(2), mac(1), 64, 0)]);
    wait(|| held_back(&rig.feeds[1]));
    trap.set(true);
    trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
    trap.wait_for_catch();
    wait(|| !held_back(&rig.feeds[1]));
    assert_eq!(rig.shards.report()[0].stuck, 1);
    trap.set(false);
}

#[test]
fn what_a_thread_that_is_held_up_was_told_counts_as_done_once_another_one_serves() {
    let (rig, trap) = rig();
    let (bell, _) = rig.shards.shards[0].crew.server();
    trap.set(true);
    trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
    trap.wait_for_catch();
    without_waiting("who gave an order to a thread that does not read it any more", || bell.refresh());
    wait(|| rig.shards.report()[0].stuck == 1);
    without_waiting("who gives an order to a thread that is not the shard's any more", || bell.detach(PortIndex(0)));
    trap.set(false);
}

#[test]
fn a_shard_that_falls_into_a_trap_after_a_long_sleep_is_found() {
    let (rig, trap) = rig();
    for _ in 0..2 {
        wait(|| !rig.shards.alarm.is_looking());
        trap.set(true);
        trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
        trap.wait_for_catch();
        talk(&rig);
        trap.set(false);
        wait(|| rig.shards.report()[0].stuck == 0);
    }
}

/// Starting a thread parks the one that starts it, so that a wake-up alone is lost on that.
#[test]
fn shards_end_though_another_stand_in_is_just_being_started() {
    for _ in 0..20 {
        let (rig, trap) = rig();
        trap.set(true);
        trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
        trap.wait_for_catch();
        wait(|| rig.shards.report()[0].stuck == 1);
        trap.set(false);
        let Rig { shards, .. } = rig;
        without_waiting("the end", || shards.stop());
    }
}
