//! An idle daemon costs nothing: 32 connected vNICs at `normal` use under 1 % of a core.
//!
//! What is measured is the processor time that the daemon used, not how long anything took, so a busy machine does not
//! change it.

#![allow(clippy::unwrap_used)]

mod frontend;

use std::time::{Duration, Instant};

use frontend::daemon::{Daemon, port, preamble};
use frontend::eventually;
use frontend::frame::{BROADCAST, frame};
use frontend::nic::{Nic, NicConfig};

const VNICS: usize = 32;

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
    let all = || daemon.processor_time() + Daemon::processor_time_of(daemon.relay());
    let (began, before) = (Instant::now(), all());
    std::thread::sleep(Duration::from_secs(5));
    let (used, passed) = (all() - before, began.elapsed());
    println!("{VNICS} idle vNICs: {used:?} of processor time in {passed:?}");
    assert!(used < passed / 100, "{used:?} of processor time in {passed:?}");
}
