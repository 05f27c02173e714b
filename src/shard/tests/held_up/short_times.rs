//! Ports that hold a shard up for less than is told by itself, again and again.

use super::*;

/// Has the trap hold up who comes for a moment, again and again, for as long as `goes_on` says and at most some minutes. What holds
/// the thread up for longer than that is the machine, and is told as such.
fn for_moments(trap: &Trap, feed: impl Fn(), mut goes_on: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + Duration::from_secs(180);
    while goes_on() && std::time::Instant::now() < end {
        trap.set(true);
        feed();
        // Once it is found out, nobody may come any more.
        wait_mut(|| trap.caught.load(Ordering::SeqCst) || !goes_on());
        let passed = trap.passed.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(6));
        trap.set(false);
        wait_mut(|| trap.passed.load(Ordering::SeqCst) > passed || !goes_on());
    }
}

#[test]
fn a_port_that_holds_up_for_moments_again_and_again_is_barred_for_all_of_them() {
    let (rig, trap) = rig();
    let feed = || trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
    let mut stalls = Vec::new();
    for_moments(&trap, feed, || {
        stalls.extend(rig.shards.stalls.take());
        trap.often.load(Ordering::SeqCst) <= 1
    });
    stalls.extend(rig.shards.stalls.take());
    let many = stalls.iter().find(|stall| stall.times > 1).expect("it was never told");
    assert_eq!((many.port, many.sender, many.over), (PortIndex(2), None, true));
    assert!(many.held > Duration::from_millis(200), "{many:?}");
    wait(|| trap.told().1);
    talk(&rig);
}

/// A sender that does so where it may be the receiver, until both are watched. Returns whether that was for many times together.
fn watched_for_moments() -> bool {
    let (rig, trap) = rig();
    let neighbours = [0, 1].map(|port| neighbour(port, &rig, &trap));
    trap.late.store(true, Ordering::SeqCst);
    let next = std::cell::Cell::new(0_u16);
    let feed = || {
        next.set(next.get() + 1);
        trap.feed.feed([frame(mac(1 + next.get() % 2), mac(3), 200, 0)]);
    };
    let probation = &rig.shards.alarm.probation;
    for_moments(&trap, feed, || !probation.has(PortIndex(2)));
    assert!(probation.has(PortIndex(2)), "nothing came of it");
    let told = neighbours.each_ref().map(|port| port.told.load(Ordering::SeqCst));
    assert_eq!((trap.told(), told), ((0, false), [0; 2]), "it may have been another one");
    talk(&rig);
    let stalls = rig.shards.stalls.take();
    assert!(stalls.iter().all(|stall| stall.sender == Some(PortIndex(2))), "{stalls:?}");
    stalls.iter().any(|stall| stall.times > 1)
}

#[test]
fn who_does_so_where_it_may_be_another_one_has_both_watched() {
    // The machine may hold it up for longer, and then that is what both are watched for.
    assert!((0..30).any(|_| watched_for_moments()), "both were watched for single times only");
}
