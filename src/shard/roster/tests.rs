//! Whose turn it is, with costs that the test makes up: nothing here depends on a clock.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::frame::{Batch, Heads};
use crate::ident::LatencySensitivity;

/// A queue that is never asked anything but to rest.
struct Idle;

impl Receive for Idle {
    fn receive(&self, _: &mut Heads, _: &mut dyn FnMut(&mut Batch<'_>)) -> Received {
        Received::Nothing
    }
    fn arm(&self) -> bool {
        true
    }
    fn disarm(&self) {}
    fn attach(&self, _: Option<Arc<dyn Wake>>) {}
}

struct Deaf;

impl Wake for Deaf {
    fn wake(&self) {}
    fn watch(&self, _: std::os::fd::BorrowedFd<'_>) -> std::io::Result<()> {
        Ok(())
    }
    fn unwatch(&self, _: std::os::fd::BorrowedFd<'_>) {}
}

/// A port that always has more: its queues, what a batch of it costs, and how many frames that has.
#[derive(Debug, Clone, Copy)]
struct Load {
    queues: usize,
    cost: u64,
    frames: usize,
}

fn roster(loads: &[Load]) -> Roster {
    let mut roster = Roster { quantum: 5_000, ..Roster::new(Arc::default()) };
    for (port, load) in (0..).map(PortIndex).zip(loads) {
        for number in 0..load.queues {
            let (queue, latency, load) = (Arc::new(Idle), LatencySensitivity::Normal, Arc::default());
            let engagement = Engagement { port, number: number as u16, queue, latency, load };
            roster.attach(engagement, 100, |_| Arc::new(Deaf));
        }
    }
    roster
}

/// Runs rounds until `total` cycles are used; returns what each port got of them and each slot's visits.
fn run(roster: &mut Roster, loads: &[Load], total: u64) -> (Vec<u64>, BTreeMap<u32, u64>) {
    let (mut used, mut visits, mut now) = (vec![0; loads.len()], BTreeMap::new(), 0);
    while now < total {
        let before = now;
        roster.begin();
        while let Some(slot) = roster.next() {
            let port = slot.port.index();
            let Load { cost, frames, .. } = loads[port];
            used[port] += cost;
            now += cost;
            *visits.entry(roster.round.visiting).or_default() += 1;
            let received = if frames > 0 { Received::Frames(frames) } else { Received::Nothing };
            roster.settle(received, now - cost, cost);
        }
        assert!(now > before, "a round in which nobody was served");
    }
    (used, visits)
}

proptest! {
    /// Whatever their queues and the costs of their batches: ports that always have full batches get equal shares, to
    /// within one batch and one quantum, and so do the queues of one port.
    #[test]
    fn ports_that_want_all_get_the_same(
        loads in prop::collection::vec(
            (1usize..40, 200u64..100_000).prop_map(|(queues, cost)| Load { queues, cost, frames: BATCH_FRAMES }),
            2..8,
        ),
    ) {
        let mut roster = roster(&loads);
        let total = 20_000_000;
        let (used, visits) = run(&mut roster, &loads, total);
        let fair = used.iter().sum::<u64>() / loads.len() as u64;
        let dearest = loads.iter().map(|load| load.cost).max().unwrap();
        for (got, load) in used.iter().zip(&loads) {
            prop_assert!(got.abs_diff(fair) <= 2 * (dearest + 5_000), "{got} of {fair} for {load:?} in {used:?}");
        }
        for (port, load) in loads.iter().enumerate() {
            let own = |slot: &u32| roster.slots[*slot as usize].as_ref().unwrap().port.index() == port;
            let counts: Vec<u64> = visits.iter().filter(|(slot, _)| own(slot)).map(|(_, count)| *count).collect();
            prop_assert!(counts.len() == load.queues || used[port] < load.queues as u64 * load.cost);
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
        }
    }
}

#[test]
fn a_port_with_many_queues_gets_no_more_than_one_with_one() {
    let one = Load { queues: 1, cost: 5_000, frames: 64 };
    let loads = [one, Load { queues: 128, ..one }];
    let (used, _) = run(&mut roster(&loads), &loads, 100_000_000);
    assert!(used[0].abs_diff(used[1]) <= 20_000, "{used:?}");
}

#[test]
fn a_modest_port_gets_all_it_wants_beside_a_flooding_one() {
    // Three frames at a time and then nothing more, against 64 dear ones: each round the modest one is visited once.
    let loads = [Load { queues: 1, cost: 400, frames: 3 }, Load { queues: 16, cost: 60_000, frames: 64 }];
    let mut roster = roster(&loads);
    let (used, visits) = run(&mut roster, &loads, 100_000_000);
    let floods: u64 = visits.iter().filter(|(slot, _)| **slot > 0).map(|(_, count)| count).sum();
    assert!(visits[&0] >= floods, "visited {} times beside {floods} in {used:?}", visits[&0]);
}

#[test]
fn idle_ports_hold_nobody_up() {
    let mut loads = vec![Load { queues: 1, cost: 40, frames: 0 }; 5];
    loads[0] = Load { queues: 1, cost: 60_000, frames: 64 };
    let (used, _) = run(&mut roster(&loads), &loads, 100_000_000);
    let share = used[0] as f64 / used.iter().sum::<u64>() as f64;
    assert!(share > 0.99, "the only port with frames got {share}");
}

#[test]
fn a_port_alone_is_not_measured_and_its_rounds_are_short() {
    let loads = [Load { queues: 128, cost: 1, frames: 64 }];
    let mut roster = roster(&loads);
    assert!(!roster.begin());
    let mut visited = Vec::new();
    for _ in 0..16 {
        while roster.next().is_some() {
            visited.push(roster.round.visiting);
            roster.settle(Received::Frames(64), 0, 0);
        }
        assert_eq!(visited.len() % ALONE_VISITS, 0);
        roster.begin();
    }
    visited.sort_unstable();
    assert_eq!(visited, (0..128).collect::<Vec<_>>(), "each queue once");
}

#[test]
fn queues_rest_and_wake_by_themselves() {
    let loads = [Load { queues: 2, cost: 10, frames: 0 }; 2];
    let mut roster = roster(&loads);
    run(&mut roster, &loads, 1000);
    roster.put_to_rest(50, false);
    assert_eq!(roster.resting(), 0, "none was empty for 100 cycles");
    roster.put_to_rest(2000, false);
    assert!(roster.resting() == 4 && roster.all_rest() && !roster.begin() && roster.next().is_none());
    roster.awaken(&mut vec![3, 3, 9]);
    assert_eq!((roster.resting(), roster.active.len()), (3, 1));
    assert_eq!(roster.detach(PortIndex(1), None), 2);
    assert_eq!((roster.resting(), roster.active.len()), (2, 0));
    roster.awaken(&mut vec![0, 3]);
    roster.begin();
    assert_eq!(roster.next().unwrap().port, PortIndex(0));
    assert_eq!(roster.detach(PortIndex(0), Some(1)), 1);
    roster.begin();
    assert!(roster.next().is_some(), "its other queue is served on");
    assert_eq!((roster.detach(PortIndex(0), None), roster.detach(PortIndex(0), None)), (1, 0));
    assert!(roster.all_rest() && roster.resting() == 0);
}

#[test]
fn a_busy_shard_goes_on_polling_a_few_queues_that_would_rest_for_a_while() {
    let loads = [Load { queues: 1, cost: 10, frames: 0 }; 9];
    let served = loads.map(|load| Load { frames: 1, ..load });
    let mut roster = Roster { busy_spin: 10_000, ..roster(&loads) };
    run(&mut roster, &served, 1000);
    run(&mut roster, &loads, 1000);
    // One of them is at low, which does not poll.
    roster.slots[0].as_mut().unwrap().spin = 0;
    roster.put_to_rest(2000, true);
    assert_eq!((roster.resting(), roster.active.len()), (9 - POLLED_WHEN_BUSY, POLLED_WHEN_BUSY));
    assert!(!roster.slots[0].as_ref().unwrap().awake);
    roster.put_to_rest(9000, true);
    assert_eq!(roster.resting(), 9 - POLLED_WHEN_BUSY);
    roster.put_to_rest(12_000, true);
    assert!(roster.all_rest(), "each was empty for too long");
    roster.awaken(&mut vec![1, 2]);
    run(&mut roster, &served, 1000);
    run(&mut roster, &loads, 1000);
    roster.awaken(&mut vec![5]);
    run(&mut roster, &loads, 1000);
    roster.slots[1].as_mut().unwrap().served = None;
    roster.put_to_rest(2000, true);
    let awake = |roster: &Roster, at: usize| roster.slots[at].as_ref().unwrap().awake;
    assert!(!awake(&roster, 1) && awake(&roster, 2), "who kicks and has nothing earns nothing");
    roster.put_to_rest(2000, false);
    assert!(roster.all_rest(), "there is nobody to be awake for");
}

#[test]
fn a_visit_that_the_kernel_interrupted_is_not_paid_for_for_ever() {
    let mut account = Account::default();
    account.charge(u64::MAX, 5_000);
    assert_eq!(account.debt(), 25_000_000);
    account.grant(i64::MAX, 5_000);
    assert!(!account.is_spent() && account.debt() == 0);
}

#[test]
fn waiting_is_measured_while_several_want_the_shard() {
    let loads = [Load { queues: 1, cost: 1_000, frames: 3 }, Load { queues: 1, cost: 9_000, frames: 64 }];
    let mut roster = roster(&loads);
    run(&mut roster, &loads, 1_000_000);
    let load = |port: u32| &roster.slots[port as usize].as_ref().unwrap().load;
    let wait = |port| load(port).waited.get() / load(port).visits.get();
    assert!((3_000..=9_000).contains(&wait(0)), "it waits for the other's batches: {}", wait(0));
    assert!(wait(1) < wait(0));
    assert!(load(1).cycles.get() > load(0).cycles.get());
}
