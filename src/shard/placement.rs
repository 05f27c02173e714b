//! Which shard serves which queue of a port that comes: [`choose`], and of several: [`choose_together`]; pure.
//!
//! A port of latency sensitivity `high` gets a CPU of `shards.exclusive` that serves nobody else, all others share the
//! rest. What stays together is the port's *affinity*:
//!
//! | affinity | shares a shard |
//! |---|---|
//! | vm | all ports with the same `vm` label, so that what they say to each other stays in one CPU's cache |
//! | vnic | the queues of the port |
//! | queue | nothing: each queue goes where there is most room |
//! | auto | as `queue`; at `high`, where a queue more is a CPU more, as `vnic` |
//!
//! Once the NUMA node of a guest's memory is known, `medium` and `high` ports are served there, if there is a shard for them on
//! that node: rather than where there is more room, and rather than with the rest of their VM (of which ports at these levels
//! follow as soon as the node of their memory is known too). For the other levels the node decides between shards with as much
//! room, when they are placed.
//!
//! Most room means fewest queues: what a port will do is not known when it comes. What it does is the balancer's concern.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::ShardError;
use crate::ident::{Affinity, LatencySensitivity, PortIndex};

/// What a port asks of the shards that serve it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Service {
    /// How much it minds delay.
    pub latency: LatencySensitivity,
    /// What of it stays together.
    pub affinity: Affinity,
    /// The VM it belongs to, if that is known.
    pub vm: Option<Arc<str>>,
    /// The NUMA node that its guest's memory is on, if it is known and one.
    pub node: Option<u16>,
}

impl From<LatencySensitivity> for Service {
    fn from(latency: LatencySensitivity) -> Self {
        Self { latency, ..Self::default() }
    }
}

/// Who has a shard with others of its kind only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Tenant {
    Port(PortIndex),
    Vm(Arc<str>),
}

impl Service {
    /// Whom the queues of `port` count as.
    pub(super) fn tenant(&self, port: PortIndex) -> Tenant {
        match &self.vm {
            Some(vm) if self.affinity == Affinity::Vm => Tenant::Vm(Arc::clone(vm)),
            _ => Tenant::Port(port),
        }
    }

    /// The NUMA node that it is to be served on wherever possible.
    pub(super) fn home(&self) -> Option<u16> {
        self.node.filter(|_| self.latency >= LatencySensitivity::Medium)
    }

    /// Whether each queue may go to another shard.
    pub(super) fn spreads(&self) -> bool {
        match self.affinity {
            Affinity::Queue => true,
            Affinity::Auto => self.latency != LatencySensitivity::High,
            Affinity::Vm | Affinity::Vnic => false,
        }
    }
}

/// One shard, and who is there.
#[derive(Debug, Clone, Default)]
pub(super) struct Seat {
    /// It serves ports of latency sensitivity `high` only.
    pub exclusive: bool,
    /// It is about to end.
    pub leaving: bool,
    /// The NUMA node of its CPU.
    pub node: u16,
    /// The tenant of each of its queues.
    pub tenants: Vec<Tenant>,
}

/// The shards, by place in `seats`, for the `count` queues of `port`, which has none yet.
///
/// # Errors
/// There are no exclusive CPUs, or not enough of them are free.
pub(super) fn choose(
    seats: &[Seat],
    port: PortIndex,
    count: usize,
    service: &Service,
) -> Result<Vec<usize>, ShardError> {
    let exclusive = service.latency == LatencySensitivity::High;
    let tenant = service.tenant(port);
    let away = |seat: &Seat| service.node.is_some_and(|node| node != seat.node);
    let kind: Vec<(usize, &Seat)> =
        seats.iter().enumerate().filter(|(_, seat)| seat.exclusive == exclusive && !seat.leaving).collect();
    let with_its_own = |among: &[(usize, &Seat)]| {
        let found = among.iter().find(|(_, seat)| seat.tenants.contains(&tenant));
        found.map(|(at, _)| *at).filter(|_| !service.spreads())
    };
    let near: Vec<(usize, &Seat)> =
        kind.iter().copied().filter(|(_, seat)| service.home() == Some(seat.node)).collect();
    if exclusive {
        if let Some(at) = with_its_own(&near) {
            return Ok(vec![at; count]);
        }
        let cpus = if service.spreads() { count } else { 1 };
        let has_room = near.iter().filter(|(_, seat)| seat.tenants.is_empty()).count() >= cpus;
        return match with_its_own(&kind).filter(|_| !has_room) {
            Some(at) => Ok(vec![at; count]),
            None => choose_exclusive(&kind, away, cpus, count),
        };
    }
    let eligible = if near.is_empty() { kind } else { near };
    if let Some(at) = with_its_own(&eligible) {
        return Ok(vec![at; count]);
    }
    let mut room: Vec<(usize, bool, usize)> =
        eligible.iter().map(|(at, seat)| (seat.tenants.len(), away(seat), *at)).collect();
    let mut chosen = Vec::with_capacity(count);
    while chosen.len() < count {
        let Some(least) = room.iter_mut().min() else { return Err(ShardError::Count(0)) };
        let share = if service.spreads() { 1 } else { count };
        least.0 += share;
        chosen.extend(std::iter::repeat_n(least.2, share));
    }
    Ok(chosen)
}

/// One port that comes or whose service changes, its number of queues, and what it asks for.
pub(super) type Request<'a> = (PortIndex, usize, &'a Service);

/// As [`choose`] for ports that change together, in this order: each may have what another of them gives up, so that a whole VM
/// can be given another label. `seats_without` has the shards as they are without these ports. A port that is refused stays
/// where it is, which may be in the way of others: they are then placed anew around it, so a place is given at most once.
pub(super) fn choose_together(
    seats_without: impl Fn(&BTreeSet<PortIndex>) -> Vec<Seat>,
    wishes: &[Request<'_>],
) -> Vec<Result<Vec<usize>, ShardError>> {
    let mut refused: BTreeMap<usize, ShardError> = BTreeMap::new();
    // Each round but the last refuses somebody.
    loop {
        let moving = || wishes.iter().enumerate().filter(|(at, _)| !refused.contains_key(at));
        let mut seats = seats_without(&moving().map(|(_, (port, ..))| *port).collect());
        let (mut chosen, mut failed) = (BTreeMap::new(), BTreeMap::new());
        for (at, &(port, count, service)) in moving() {
            match choose(&seats, port, count, service) {
                Ok(on) => {
                    on.iter().for_each(|&seat| seats[seat].tenants.push(service.tenant(port)));
                    chosen.insert(at, Ok(on));
                }
                Err(error) => {
                    failed.insert(at, error);
                }
            }
        }
        if failed.is_empty() {
            chosen.extend(refused.into_iter().map(|(at, error)| (at, Err(error))));
            return chosen.into_values().collect();
        }
        refused.extend(failed);
    }
}

/// Where each of `wishes` (its number of queues, its service) would be served by shards on these CPUs, in the order in which
/// the control side places ports: those of latency sensitivity `high` last.
pub fn preview(shared: &[u16], exclusive: &[u16], wishes: &[(usize, Service)]) -> Vec<Result<Vec<u16>, ShardError>> {
    let seat = |exclusive| move |_| Seat { exclusive, ..Seat::default() };
    let seats: Vec<Seat> = shared.iter().map(seat(false)).chain(exclusive.iter().map(seat(true))).collect();
    let cpus: Vec<u16> = shared.iter().chain(exclusive).copied().collect();
    let mut order: Vec<usize> = (0..wishes.len()).collect();
    order.sort_by_key(|&at| wishes[at].1.latency == LatencySensitivity::High);
    let ordered: Vec<Request<'_>> =
        order.iter().map(|&at| (PortIndex(at as u16), wishes[at].0, &wishes[at].1)).collect();
    let chosen = choose_together(|_| seats.clone(), &ordered);
    let placed: BTreeMap<usize, _> = order.into_iter().zip(chosen).collect();
    placed.into_values().map(|on| Ok(on?.into_iter().map(|seat| cpus[seat]).collect())).collect()
}

/// `cpus` of these exclusive shards that serve nobody, for `count` queues; those first that are not `away`.
fn choose_exclusive(
    seats: &[(usize, &Seat)],
    away: impl Fn(&Seat) -> bool,
    cpus: usize,
    count: usize,
) -> Result<Vec<usize>, ShardError> {
    let mut free: Vec<_> = seats.iter().filter(|(_, seat)| seat.tenants.is_empty()).collect();
    free.sort_by_key(|(_, seat)| away(seat));
    match free.get(..cpus) {
        _ if seats.is_empty() => Err(ShardError::NoExclusiveCpu),
        None => Err(ShardError::ExclusiveTaken { needed: cpus, free: free.len(), all: seats.len() }),
        Some(free) => Ok((0..count).map(|queue| free[queue % free.len().max(1)].0).collect()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn seats(shared: &[usize], exclusive: &[usize]) -> Vec<Seat> {
        let seat = |exclusive| {
            move |&queues| {
                let tenants = vec![Tenant::Port(PortIndex(999)); queues];
                Seat { exclusive, tenants, ..Seat::default() }
            }
        };
        shared.iter().map(seat(false)).chain(exclusive.iter().map(seat(true))).collect()
    }

    fn service(latency: LatencySensitivity, affinity: Affinity, vm: Option<&str>) -> Service {
        Service { latency, affinity, vm: vm.map(Arc::from), node: None }
    }

    #[test]
    fn shared_queues_go_where_there_are_fewest() {
        let seats = seats(&[3, 0, 1], &[0]);
        let normal = |affinity| service(LatencySensitivity::Normal, affinity, None);
        let on = |count, service| choose(&seats, PortIndex(0), count, &service).unwrap();
        assert_eq!(on(4, normal(Affinity::Auto)), [1, 1, 2, 1]);
        assert_eq!(on(4, normal(Affinity::Queue)), [1, 1, 2, 1]);
        assert_eq!(on(4, normal(Affinity::Vnic)), [1, 1, 1, 1]);
        assert_eq!(on(2, normal(Affinity::Vm)), [1, 1], "without a label a port is its own VM");
    }

    #[test]
    fn ports_of_one_vm_stay_together() {
        let mut seats = seats(&[3, 0, 1], &[0, 0]);
        let of = |latency, vm| service(latency, Affinity::Vm, Some(vm));
        seats[0].tenants.push(Tenant::Vm("a".into()));
        assert_eq!(choose(&seats, PortIndex(0), 2, &of(LatencySensitivity::Low, "a")).unwrap(), [0, 0]);
        assert_eq!(choose(&seats, PortIndex(0), 2, &of(LatencySensitivity::Low, "b")).unwrap(), [1, 1]);
        seats[4].tenants.push(Tenant::Vm("a".into()));
        assert_eq!(choose(&seats, PortIndex(0), 2, &of(LatencySensitivity::High, "a")).unwrap(), [4, 4]);
        assert_eq!(choose(&seats, PortIndex(0), 1, &of(LatencySensitivity::High, "b")).unwrap(), [3]);
    }

    #[test]
    fn ports_that_change_together_may_have_what_the_others_give_up() {
        let high = |affinity, vm| service(LatencySensitivity::High, affinity, Some(vm));
        let ports = [PortIndex(0), PortIndex(1)];
        // One exclusive CPU, and both are on it.
        let both = |gone: &BTreeSet<PortIndex>| {
            let mut seats = seats(&[0], &[0]);
            let stay = ports.iter().filter(|port| !gone.contains(port));
            seats[1].tenants = stay.map(|_| Tenant::Vm("old".into())).collect();
            seats
        };
        let new = high(Affinity::Vm, "new");
        let on = |wishes: &[Request<'_>]| choose_together(both, wishes).into_iter().map(Result::ok).collect::<Vec<_>>();
        assert_eq!(on(&[(ports[0], 2, &new), (ports[1], 1, &new)]), [Some(vec![1, 1]), Some(vec![1])]);
        assert_eq!(on(&[(ports[0], 2, &new)]), [None], "the other one is still there");
        // One asks for too much and stays, so the other cannot have its place.
        let wide = high(Affinity::Queue, "new");
        assert_eq!(on(&[(ports[0], 2, &wide), (ports[1], 1, &new)]), [None, None]);
        let normal = Service::default();
        assert_eq!(on(&[(ports[0], 1, &normal), (ports[1], 1, &new)]), [Some(vec![0]), Some(vec![1])]);
    }

    #[test]
    fn high_gets_a_cpu_of_its_own_or_hears_why_not() {
        let high = |affinity| service(LatencySensitivity::High, affinity, None);
        let on = |seats: &[Seat], count, affinity| choose(seats, PortIndex(0), count, &high(affinity));
        assert_eq!(on(&seats(&[0], &[1, 0, 0]), 4, Affinity::Auto).unwrap(), [2, 2, 2, 2]);
        assert_eq!(on(&seats(&[0], &[1, 0, 0]), 2, Affinity::Queue).unwrap(), [2, 3]);
        let refused = |seats: &[Seat], affinity| on(seats, 2, affinity).unwrap_err().to_string();
        assert!(refused(&seats(&[0], &[]), Affinity::Auto).contains("none is configured"));
        let taken = refused(&seats(&[0], &[1, 2]), Affinity::Auto);
        assert!(taken.contains("needs 1 CPU of its own, and of the 2 in shards.exclusive 0 are free"), "{taken}");
        let few = refused(&seats(&[0], &[1, 0]), Affinity::Queue);
        assert!(few.contains("needs 2 CPUs of its own, and of the 2 in shards.exclusive 1 is free"), "{few}");
    }

    /// Shared and exclusive shards of this many queues each, on the nodes given.
    fn on_nodes(shared: &[(usize, u16)], exclusive: &[(usize, u16)]) -> Vec<Seat> {
        let queues = |kind: &[(usize, u16)]| kind.iter().map(|(queues, _)| *queues).collect::<Vec<_>>();
        let mut seats = seats(&queues(shared), &queues(exclusive));
        seats.iter_mut().zip(shared.iter().chain(exclusive)).for_each(|(seat, (_, node))| seat.node = *node);
        seats
    }

    fn near(latency: LatencySensitivity, affinity: Affinity, vm: Option<&str>, node: u16) -> Service {
        Service { node: Some(node), ..service(latency, affinity, vm) }
    }

    #[test]
    fn medium_is_served_on_the_node_of_its_memory_and_others_if_it_costs_nothing() {
        use LatencySensitivity::{Low, Medium, Normal};
        let seats = on_nodes(&[(0, 0), (5, 1), (4, 1), (0, 1)], &[(0, 1)]);
        let on = |latency, node, count| {
            choose(&seats, PortIndex(0), count, &near(latency, Affinity::Auto, None, node)).unwrap()
        };
        assert_eq!(on(Medium, 0, 3), [0, 0, 0], "the only one of its node");
        assert_eq!(on(Medium, 1, 6), [3, 3, 3, 3, 2, 3], "those of its node, by room");
        assert_eq!(on(Medium, 7, 3), [0, 3, 0], "there is none on its node");
        for level in [Low, Normal] {
            assert_eq!([on(level, 0, 1), on(level, 1, 1)], [[0], [3]], "of two with as much room the nearer one");
            assert_eq!(on(level, 0, 2), [0, 3], "but room comes first");
        }
        let whole = near(Medium, Affinity::Vnic, None, 1);
        assert_eq!(choose(&seats, PortIndex(0), 2, &whole).unwrap(), [3, 3]);
        let mut leaving = seats;
        leaving.iter_mut().filter(|seat| seat.node == 1).for_each(|seat| seat.leaving = true);
        assert_eq!(choose(&leaving, PortIndex(0), 1, &whole).unwrap(), [0], "shards that end do not count");
    }

    #[test]
    fn a_vm_follows_its_memory_port_by_port() {
        let medium = |node| Service { node, ..service(LatencySensitivity::Medium, Affinity::Vm, Some("a")) };
        let mut seats = on_nodes(&[(0, 0), (9, 1)], &[]);
        seats[0].tenants.push(Tenant::Vm("a".into()));
        assert_eq!(
            choose(&seats, PortIndex(0), 2, &medium(None)).unwrap(),
            [0, 0],
            "with the others while nothing is known"
        );
        assert_eq!(choose(&seats, PortIndex(0), 2, &medium(Some(1))).unwrap(), [1, 1], "the first to know goes ahead");
        seats[1].tenants.push(Tenant::Vm("a".into()));
        assert_eq!(choose(&seats, PortIndex(1), 1, &medium(Some(1))).unwrap(), [1], "the next one follows");
        assert_eq!(
            choose(&seats, PortIndex(1), 1, &medium(Some(2))).unwrap(),
            [0],
            "with the others where no node is near"
        );
    }

    #[test]
    fn high_takes_a_cpu_of_its_node_first_and_never_goes_without_one_for_it() {
        let high = |affinity, vm, node| near(LatencySensitivity::High, affinity, vm, node);
        let on = |seats: &[Seat], count, service: &Service| choose(seats, PortIndex(0), count, service).unwrap();
        let seats = on_nodes(&[(0, 1)], &[(0, 0), (1, 1), (0, 1), (0, 0)]);
        assert_eq!(on(&seats, 2, &high(Affinity::Auto, None, 1)), [3, 3]);
        assert_eq!(on(&seats, 2, &high(Affinity::Auto, None, 0)), [1, 1]);
        assert_eq!(on(&seats, 2, &high(Affinity::Queue, None, 1)), [3, 1], "the second is better far than not at all");
        assert_eq!(on(&seats, 1, &high(Affinity::Auto, None, 7)), [1]);
        let mut seats = on_nodes(&[], &[(0, 0), (0, 1)]);
        seats[0].tenants.push(Tenant::Vm("a".into()));
        let vm = high(Affinity::Vm, Some("a"), 1);
        assert_eq!(on(&seats, 1, &vm), [1]);
        seats[1].tenants.push(Tenant::Port(PortIndex(9)));
        assert_eq!(on(&seats, 1, &vm), [0], "its own CPU elsewhere, if those of its node are taken");
    }
}
