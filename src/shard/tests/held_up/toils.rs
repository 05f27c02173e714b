//! Ports whose memory holds a shard up and has it run meanwhile.

use super::*;

/// Touches memory that nobody has touched. Larger than anything that an allocator keeps.
fn touch() {
    std::hint::black_box(vec![1_u8; 64 << 20]);
}

/// Uses a millisecond, without a page fault.
fn spin() {
    let end = Instant::now() + Duration::from_millis(1);
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

/// Has the shard do this in the trap's memory, and the others' frames go on meanwhile.
fn hold_up_with(work: fn()) -> (Rig, Arc<Trap>) {
    let (rig, trap) = rig();
    *trap.work.lock().unwrap() = Some(work);
    trap.set(true);
    trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
    trap.wait_for_catch();
    talk(&rig);
    let report = &rig.shards.report()[0];
    assert_eq!((report.held_up, report.stuck), (1, 1));
    wait(|| trap.told() == (1, true));
    (rig, trap)
}

#[test]
fn a_port_whose_memory_has_to_be_made_page_by_page_holds_up_nobody_else() {
    let (rig, trap) = hold_up_with(touch);
    trap.set(false);
    wait(|| rig.shards.report()[0].stuck == 0);
    talk(&rig);
}

#[test]
fn nor_does_one_where_the_kernel_tries_again_and_again() {
    let (rig, trap) = hold_up_with(spin);
    trap.set(false);
    wait(|| rig.shards.report()[0].stuck == 0);
    talk(&rig);
}

#[test]
fn who_is_interrupted_for_long_is_not_held_up() {
    let (rig, trap) = rig();
    *trap.work.lock().unwrap() = Some(spin);
    for _ in 0..5 {
        let begun = Instant::now();
        trap.set(true);
        trap.feed.feed([frame(mac(1), mac(3), 64, 0)]);
        trap.wait_for_catch();
        std::thread::sleep(Duration::from_millis(150));
        trap.set(false);
        rig.feeds[0].wait_for(1);
        // A machine that lets this wait so long lets it spin as long.
        if begun.elapsed() < Duration::from_millis(900) {
            assert_eq!((rig.shards.report()[0].held_up, trap.told()), (0, (0, false)));
        }
    }
    talk(&rig);
}
