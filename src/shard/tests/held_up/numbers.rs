//! Ports that get the number of one that held a shard up.

use super::*;

/// The trap's port ends, and another trap gets its number.
fn succeed(rig: &Rig) -> Arc<Trap> {
    let port = PortIndex(2);
    rig.shards.detach(port);
    wait(|| !rig.shards.absent().is_any());
    rig.shards.clear_port(port);
    let trap = Arc::new(Trap::default());
    publish(rig, &trap);
    rig.shards.attach(port, vec![Arc::clone(&trap) as _], &LatencySensitivity::Normal.into()).unwrap();
    trap
}

/// Has the trap hold a shard up, for some short time; returns what it was told.
fn hold_up(trap: &Trap) -> (usize, bool) {
    trap.set(true);
    trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
    trap.wait_for_catch();
    wait(|| trap.told().0 == 1);
    let told = trap.told();
    trap.set(false);
    told
}

#[test]
fn what_a_port_did_is_not_held_against_the_next_one_with_its_number() {
    let (rig, mut trap) = rig();
    // Where the machine is slow, a short time may become a long one.
    let forgiven = (0..20).any(|_| {
        hold_up(&trap);
        let other = succeed(&rig);
        let told = hold_up(&other);
        trap = succeed(&rig);
        told == (1, false)
    });
    assert!(forgiven, "its first time was held against it, each time");
}

#[test]
fn who_is_held_up_is_absent_until_he_is_gone() {
    let (rig, trap) = rig();
    assert!(!rig.shards.absent().is_any());
    trap.set(true);
    trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
    trap.wait_for_catch();
    wait(|| rig.shards.report()[0].stuck == 1);
    let absent = rig.shards.absent();
    rig.shards.detach(PortIndex(2));
    assert!(absent.is_any());
    trap.set(false);
    wait(|| !absent.is_any());
}

#[test]
fn a_port_with_the_number_of_one_on_probation_is_not_on_probation() {
    let (rig, trap) = rig();
    neighbour(0, &rig, &trap);
    trap.late.store(true, Ordering::SeqCst);
    trap.set(true);
    trap.feed.feed([frame(mac(1), mac(3), 200, 7)]);
    trap.wait_for_catch();
    wait(|| rig.shards.alarm.probation.has(PortIndex(2)));
    trap.set(false);
    succeed(&rig);
    // The watchdog looks when a shard is awake.
    wait(|| {
        rig.feeds[0].feed([frame(mac(2), mac(1), 64, 0)]);
        !rig.shards.alarm.probation.has(PortIndex(2))
    });
    assert!(rig.shards.alarm.probation.has(PortIndex(0)), "its own probation goes on");
}
