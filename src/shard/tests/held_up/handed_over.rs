//! What a thread that is held up leaves to the one that stands in for it.

use super::*;

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
