//! Which queues should move to another shard: [`decide`], pure.
//!
//! What is balanced is delay, not load: a shard that is busy all the time and serves everybody in time is left alone. The
//! delay of a queue is what its frames can have waited at most: the time between two visits of it, when the second found
//! frames. Only queues of shards that several ports want have any (`roster` measures nothing else).
//!
//! Once in an interval, the shard with the longest delay gives one of its groups (queues that stay together by their
//! affinity) to the one with the least to do; if none of them may go, the shard with the next longest. A group that has a home
//! and is there, which is a NUMA node, goes to shards of that node only. Three things keep it from moving things to and fro:
//!
//! - a delay below [`DELAY_MICROS`] is none;
//! - the move must bring the busier of the two shards down by a fifth, going by what the group took in the last interval.
//!   Under a load that does not change, each move therefore makes the larger of two loads smaller and leaves the others
//!   alone, so the sorted list of loads falls with every move and moves come to an end;
//! - a group that moved stays for [`REST_INTERVALS`].

/// The delay from which on something is done about it, in microseconds: what `normal` lets a guest's interrupt be late by.
const DELAY_MICROS: u64 = 50;

/// Intervals that a group stays where it went.
const REST_INTERVALS: u32 = 10;

/// Queues that stay together, over one interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Group {
    /// The shard it is on.
    pub shard: usize,
    /// Cycles that it took.
    pub cycles: u64,
    /// Visits that found frames while others wanted the shard too.
    pub visits: u64,
    /// How long its frames had waited by then, in cycles, all visits together.
    pub waited: u64,
    /// Intervals since it moved.
    pub rested: u32,
    /// The NUMA node that it does not leave.
    pub home: Option<u16>,
}

/// One shard over one interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    /// Its NUMA node.
    pub node: u16,
    /// Cycles that it was busy.
    pub busy: u64,
}

/// One move: a group, by its place in the list, and the shard it should go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    pub group: usize,
    pub to: usize,
    /// The delay of the shard it leaves, in cycles.
    pub delay: u64,
}

/// What to move. `micro` has the cycles of a microsecond.
pub(super) fn decide(shards: &[Load], groups: &[Group], micro: u64) -> Option<Move> {
    let delay = |shard: usize| {
        let on = groups.iter().filter(|group| group.shard == shard);
        let (waited, visits) = on.fold((0u64, 0u64), |(w, v), group| (w + group.waited, v + group.visits));
        waited.checked_div(visits).unwrap_or(0)
    };
    let mut late: Vec<(usize, u64)> = (0..shards.len()).map(|shard| (shard, delay(shard))).collect();
    late.retain(|(_, delay)| *delay >= DELAY_MICROS * micro);
    late.sort_by_key(|(_, delay)| std::cmp::Reverse(*delay));
    late.into_iter().find_map(|(from, delay)| {
        let (group, to) = best(shards, groups, from)?;
        Some(Move { group, to, delay })
    })
}

/// Which group should leave the shard `from`, and for which shard.
fn best(shards: &[Load], groups: &[Group], from: usize) -> Option<(usize, usize)> {
    let busy = |shard: usize| shards[shard].busy;
    // The busier of the two shards once the group has moved.
    let after =
        |group: &Group, to: usize| busy(from).saturating_sub(group.cycles).max(busy(to).saturating_add(group.cycles));
    let movable = |group: &Group| group.shard == from && group.rested >= REST_INTERVALS && group.cycles > 0;
    let may_go = |group: &Group, to: usize| {
        let leaves_home = |home| shards[from].node == home && shards[to].node != home;
        to != from && !group.home.is_some_and(leaves_home)
    };
    let movable = groups.iter().enumerate().filter(|(_, group)| movable(group));
    let pairs = movable.flat_map(|(at, group)| {
        let targets = (0..shards.len()).filter(move |&to| may_go(group, to));
        targets.map(move |to| (at, to, after(group, to)))
    });
    let (group, to, after) = pairs.min_by_key(|&(_, to, after)| (after, busy(to)))?;
    (after <= busy(from) / 5 * 4).then_some((group, to))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// Cycles of a microsecond, and of an interval of one second.
    const MICRO: u64 = 2_000;
    const SECOND: u64 = MICRO * 1_000_000;

    /// A group that wants so many hundredths of a shard. Whoever shares a shard waits, the longer the more others want it.
    fn observe(wants: &[(u64, usize)], rested: &[u32], shards: usize) -> (Vec<Load>, Vec<Group>) {
        let mut loads = vec![Load { node: 0, busy: 0 }; shards];
        wants.iter().for_each(|(want, shard)| loads[*shard].busy += want * (SECOND / 100));
        let group = |(&(want, shard), &rested): (&(u64, usize), &u32)| {
            let cycles = want * (SECOND / 100);
            let others = (loads[shard].busy - cycles) / (SECOND / 100);
            Group { shard, cycles, visits: 100, waited: 100 * others * 5 * MICRO, rested, home: None }
        };
        let groups = wants.iter().zip(rested).map(group).collect();
        (loads, groups)
    }

    #[test]
    fn a_port_that_waits_for_another_goes_where_there_is_room() {
        let (busy, groups) = observe(&[(60, 0), (50, 0), (5, 1)], &[99; 3], 2);
        let Move { group, to, delay } = decide(&busy, &groups, MICRO).unwrap();
        assert_eq!((group, to), (1, 1));
        assert!(delay > 50 * MICRO);
    }

    #[test]
    fn what_would_gain_little_or_is_in_time_or_has_just_moved_stays() {
        let (busy, groups) = observe(&[(90, 0), (10, 0), (85, 1)], &[99; 3], 2);
        assert_eq!(decide(&busy, &groups, MICRO), None, "90 and 95 are no better than 100 and 85");
        let (busy, groups) = observe(&[(5, 0), (4, 0)], &[99; 2], 2);
        assert_eq!(decide(&busy, &groups, MICRO), None, "nobody waits for long");
        let (busy, groups) = observe(&[(60, 0), (60, 0)], &[REST_INTERVALS - 1; 2], 2);
        assert_eq!(decide(&busy, &groups, MICRO), None);
        let (busy, groups) = observe(&[(60, 0), (60, 0)], &[REST_INTERVALS; 2], 2);
        assert!(decide(&busy, &groups, MICRO).is_some());
        let (busy, groups) = observe(&[(60, 0), (60, 0)], &[99; 2], 1);
        assert_eq!(decide(&busy, &groups, MICRO), None, "there is no other shard");
        assert_eq!(decide(&[], &[], MICRO), None);
    }

    #[test]
    fn what_is_at_home_moves_within_its_node_only() {
        // Shards 0 and 1 are on node 0, shards 2 and 3 on node 1, where there is nothing to do.
        let on_nodes = |wants: &[(u64, usize)]| {
            let (mut loads, groups) = observe(wants, &[99; 4][..wants.len()], 4);
            (loads[2].node, loads[3].node) = (1, 1);
            (loads, groups)
        };
        let decided = |(loads, groups): &(Vec<Load>, Vec<Group>)| {
            decide(loads, groups, MICRO).map(|Move { group, to, .. }| (group, to))
        };
        let mut seen = on_nodes(&[(60, 0), (50, 0), (5, 1)]);
        assert_eq!(decided(&seen), Some((0, 2)), "whoever has no home goes where there is least to do");
        seen.1[0].home = Some(0);
        assert_eq!(decided(&seen), Some((1, 2)), "rather the one without a home");
        seen.1[1].home = Some(0);
        assert_eq!(decided(&seen), Some((1, 1)), "both stay on their node");
        seen.1.iter_mut().for_each(|group| group.home = Some(1));
        assert_eq!(decided(&seen), Some((0, 2)), "who is not at home may go anywhere");

        // Shard 0 has the longest delay, but the only other shard of its node is as busy.
        let mut seen = on_nodes(&[(50, 0), (50, 0), (60, 1), (45, 1)]);
        seen.1[0].home = Some(0);
        seen.1[1].home = Some(0);
        seen.1.iter_mut().take(2).for_each(|group| group.waited *= 10);
        assert_eq!(decided(&seen), Some((2, 2)), "the next shard is looked at");
    }

    proptest! {
        /// Under a load that does not change, moves come to an end, and no move makes the busiest shard busier.
        #[test]
        fn nothing_moves_to_and_fro(
            shards in 1usize..6,
            wants in prop::collection::vec((1u64..100, 0usize..6), 1..24),
        ) {
            let mut wants: Vec<(u64, usize)> = wants.into_iter().map(|(want, shard)| (want, shard % shards)).collect();
            let mut rested = vec![REST_INTERVALS; wants.len()];
            let mut since_last = 0;
            for _ in 0..2_000 {
                let (busy, groups) = observe(&wants, &rested, shards);
                rested.iter_mut().for_each(|rested| *rested += 1);
                since_last += 1;
                if let Some(Move { group, to, .. }) = decide(&busy, &groups, MICRO) {
                    prop_assert!(groups[group].rested >= REST_INTERVALS && to != wants[group].1);
                    let most = |loads: &[Load]| loads.iter().map(|load| load.busy).max().unwrap();
                    wants[group].1 = to;
                    rested[group] = 0;
                    since_last = 0;
                    prop_assert!(most(&observe(&wants, &rested, shards).0) <= most(&busy));
                }
            }
            prop_assert!(since_last > 1_000, "still moving after a thousand intervals");
        }
    }
}
