//! How much memory a front end may share, and how often it may change that.

use super::*;
use crate::limits::{MEMORY_CHANGES, MEMORY_CHANGES_PER_SECOND};

#[test]
fn a_vm_with_more_memory_than_its_port_takes_is_refused_and_told_how_much_it_may_have() {
    let (host, guest) = (Host::new(), Guest::new());
    let port = Vnic::new(VnicConfig { memory: Some(MEMORY - 4096), ..host.config("vm1") }, &host.acceptor).unwrap();
    let mut qemu = host.connect("vm1");
    qemu.negotiate();
    assert!(!qemu.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
    let LinkState::Stopped(why) = port.link() else { panic!("{:?}", port.link()) };
    assert!(why.contains(&format!("the port takes {}: say in `memory`", MEMORY - 4096)), "{why}");
    let less = [0, 0, MEMORY - 4096, USER, 0].map(u64::to_ne_bytes).concat();
    assert!(qemu.done(Req::ADD_MEM_REG, &less, &[guest.memory.as_fd()]));
}

#[test]
fn a_port_takes_as_much_as_the_host_has_unless_it_says_otherwise() {
    let (host, guest) = (Host::new(), Guest::new());
    let _port = host.port("vm1");
    let mut qemu = host.connect("vm1");
    qemu.negotiate();
    let most = crate::mem::host_bytes().next_multiple_of(4096);
    // A file of holes: as long as one likes.
    guest.memory.set_len(most + 4096).unwrap();
    let region = |len| [0, 0, len, USER, 0].map(u64::to_ne_bytes).concat();
    assert!(!qemu.done(Req::ADD_MEM_REG, &region(most + 4096), &[guest.memory.as_fd()]));
    assert!(qemu.done(Req::ADD_MEM_REG, &region(most - 4096), &[guest.memory.as_fd()]));
}

#[test]
fn a_storm_of_memory_changes_slows_its_front_end_and_a_new_connection_does_not_help() {
    let (host, guest) = (Host::new(), Guest::new());
    let port = host.port("vm1");
    let rounds = [MEMORY_CHANGES / 2 + 10, 10];
    let start = Instant::now();
    for rounds in rounds {
        let mut qemu = host.connect("vm1");
        qemu.negotiate();
        for _ in 0..rounds {
            assert!(qemu.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
            // The very same again is no change.
            assert!(qemu.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
            assert!(qemu.done(Req::REM_MEM_REG, &guest.region(), &[]));
        }
        drop(qemu);
        eventually_free(&port);
    }
    let changes = 2 * rounds.iter().sum::<u32>();
    // The last one is answered before it is waited for.
    let least = Duration::from_secs(1) / MEMORY_CHANGES_PER_SECOND * (changes - 1 - MEMORY_CHANGES);
    assert!(start.elapsed() >= least, "{changes} changes in {:?}", start.elapsed());
}
