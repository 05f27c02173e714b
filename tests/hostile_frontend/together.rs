//! Front ends that work together: while one keeps the daemon from mapping memory, and so from starting threads, others hold
//! up the same shard, one after the other.

use std::sync::Arc;

use super::MIB;
use super::frontend::daemon::Daemon;
use super::frontend::nic::{Nic, NicConfig};
use super::frontend::ram::{Region, memfd};
use super::frontend::witness::Witness;
use super::stalls::{LEN, waits};
use super::{mapping, stalls};

/// More than one, so that what stood in for the first is held up as well.
const TOGETHER: [&str; 2] = ["bad-1", "bad-2"];

/// Has them do it. Returns whether each was held up while no thread could be started: else it may be that one was.
fn others_go_on() -> bool {
    let ports: Vec<_> = TOGETHER.into_iter().chain(["mapper"]).collect();
    let daemon = Daemon::with_ports(&ports);
    let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
    let mut nics: Vec<_> = TOGETHER.map(|port| Nic::up(&daemon.socket(port), &NicConfig::default())).into();
    let held = nics.iter_mut().map(|nic| {
        let file = memfd(LEN);
        let region =
            Region { gpa: 0x8_0000_0000, uva: 0x7777_0000_0000, len: 2 * MIB, offset: 0, file: Arc::clone(&file) };
        let gpa = region.gpa;
        nic.plug(region).unwrap();
        (file, nic.vmm.ram.alloc_in(gpa, 4096, 4096))
    });
    let held: Vec<_> = held.collect();
    let Some((crowd, hole, wait)) = mapping::hold_up(&daemon, "mapper", false) else { return false };
    let mut punches = Vec::new();
    for (nic, (file, at)) in nics.iter_mut().zip(&held) {
        let (punch, wait) = stalls::hold_up(&daemon, nic, file, *at);
        punches.push((punch, wait));
        witness.keeps_going();
    }
    let shards = waits(&daemon, "shard-");
    let all = punches.iter().all(|(_, wait)| shards.contains(wait)) && waits(&daemon, "vhost-mapper").contains(&wait);
    punches.into_iter().for_each(|(punch, _)| punch.end());
    hole.end();
    drop(crowd);
    assert!(witness.finish() > 0);
    all
}

#[test]
fn point_12_holes_under_several_ports_while_no_thread_can_be_started() {
    assert!((0..8).any(|_| others_go_on()), "the others were served only once a thread could be started, each time");
}
