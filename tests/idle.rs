//! An idle daemon costs nothing: 32 connected vNICs at `normal` use under 1 % of a core.
//!
//! What is counted is how often something of it is woken, which the machine's speed does not change, as the processor time for that
//! would.

#![allow(clippy::unwrap_used)]

mod frontend;

use std::time::{Duration, Instant};

use frontend::daemon::{Daemon, port, preamble};
use frontend::eventually;
use frontend::frame::{BROADCAST, frame};
use frontend::nic::{Nic, NicConfig};

const VNICS: usize = 32;

/// How often threads may be woken in a second: 250 us for each is 1 % of a core. It is a dozen times.
const WAKES: u64 = 40;

#[test]
fn thirty_two_idle_vnics_use_under_one_percent_of_a_core() {
    let names: Vec<_> = (0..VNICS).map(|at| format!("p{at}")).collect();
    let daemon = Daemon::start(|dir| {
        preamble(dir)
            + "networks: { lan: {} }\nports:\n"
            + &names.iter().map(|name| port(dir, name, "lan")).collect::<String>()
    });
    let config = NicConfig { size: 64, ..NicConfig::default() };
    let mut nics: Vec<_> = names.iter().map(|name| Nic::up(&daemon.socket(name), &config)).collect();
    // Each has spoken, so that every queue has been awake.
    for (seed, nic) in (0..).zip(&mut nics) {
        nic.send(&frame(BROADCAST, nic.mac, 60, seed));
        nic.drain();
    }
    eventually("all queues at rest", || {
        let shards = daemon.linecard(&["shard", "list"]).ok()?;
        shards.as_array()?.iter().all(|shard| shard["queues"] == shard["resting"]).then_some(())
    });
    let both = [daemon.pid(), daemon.relay()];
    let used = || both.map(Daemon::processor_time_of).iter().sum::<Duration>();
    let waits = || both.map(Daemon::waits_of).iter().sum::<u64>();
    // What the last frames have woken is at rest again half a second later.
    let (used, waits, passed) = eventually("a second in which hardly anything is woken", || {
        let (began, used_before, waits_before) = (Instant::now(), used(), waits());
        std::thread::sleep(Duration::from_secs(1));
        let (used, waits) = (used() - used_before, waits() - waits_before);
        (waits <= WAKES).then(|| (used, waits, began.elapsed()))
    });
    println!("{VNICS} idle vNICs: {used:?} of processor time in {passed:?}, woken {waits} times");
    assert!(used < passed / 4, "{used:?} of processor time in {passed:?}");
}
