//! The diff against what it promises, on made-up states.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::config::{Offloads, SocketMode, StormRate, StormRates, TapPlan, VhostUserPlan};
use crate::control::desired::Origin;
use crate::ident::{Affinity, Compat, LatencySensitivity};

fn network(mac_limit: u32) -> NetworkPlan {
    NetworkPlan { mac_age: Duration::from_secs(300), mac_limit }
}

fn port(kind: KindPlan) -> PortPlan {
    PortPlan {
        kind,
        mac: None,
        profile: None,
        network: "lan".parse().unwrap(),
        latency: LatencySensitivity::Normal,
        affinity: Affinity::Auto,
        mtu: None,
        macs: 10,
        storm: StormRates::default(),
        offloads: Offloads { csum: true, tso: true, ecn: true, uso: true, gro: true },
        compat: Compat::default(),
        labels: BTreeMap::new(),
    }
}

fn wish(plan: PortPlan) -> Wish {
    Wish { origin: Origin::File, plan: Ok(plan) }
}

fn state(ports: &[(&str, PortPlan)]) -> Desired {
    let ports = ports.iter().map(|(name, plan)| (name.parse().unwrap(), wish(plan.clone())));
    Desired { networks: BTreeMap::from([("lan".parse().unwrap(), network(100))]), ports: ports.collect() }
}

fn any_plan() -> impl Strategy<Value = PortPlan> {
    let kind = prop_oneof![
        Just(KindPlan::Null),
        Just(KindPlan::Loopback),
        Just(KindPlan::Tap(TapPlan { interface: "t0".into() })),
    ];
    let network = prop_oneof![Just("lan"), Just("dmz")];
    (kind, network, proptest::option::of(1500u16..1502), 1u32..3).prop_map(|(kind, network, mtu, macs)| PortPlan {
        network: network.parse().unwrap(),
        mtu,
        macs,
        ..port(kind)
    })
}

fn any_wish() -> impl Strategy<Value = Wish> {
    let origin = prop_oneof![Just(Origin::File), Just(Origin::RunTime)];
    let plan = prop_oneof![5 => any_plan().prop_map(Ok), 1 => Just(Err("no such profile".to_string()))];
    (origin, plan).prop_map(|(origin, plan)| Wish { origin, plan })
}

fn any_state() -> impl Strategy<Value = Desired> {
    let name = |prefix: &'static str| (0u8..5).prop_map(move |n| format!("{prefix}{n}").parse::<Name>().unwrap());
    let networks = proptest::collection::btree_map(name("net"), (1u32..4).prop_map(network), 0..4);
    let ports = proptest::collection::btree_map(name("port"), any_wish(), 0..5);
    (networks, ports).prop_map(|(networks, ports)| Desired { networks, ports })
}

fn name_of(action: &Action) -> (bool, &Name) {
    match action {
        Action::AddNetwork(name, _) | Action::ChangeNetwork(name, ..) | Action::RemoveNetwork(name) => (false, name),
        Action::AddPort(name, _)
        | Action::ChangePort(name, ..)
        | Action::RemakePort(name, ..)
        | Action::RetryPort(name)
        | Action::RemovePort(name) => (true, name),
    }
}

proptest! {
    #[test]
    fn carrying_out_the_diff_leads_to_the_new_state(old in any_state(), new in any_state()) {
        let mut now = old.clone();
        diff(&old, &new, &BTreeSet::new()).iter().for_each(|action| now.perform(action));
        prop_assert_eq!(now, new);
    }

    #[test]
    fn what_did_not_change_is_not_touched(old in any_state(), new in any_state()) {
        for action in diff(&old, &new, &BTreeSet::new()) {
            let differs = match name_of(&action) {
                (true, name) => old.ports.get(name) != new.ports.get(name),
                (false, name) => old.networks.get(name) != new.networks.get(name),
            };
            prop_assert!(differs, "{:?}", action);
        }
    }

    #[test]
    fn each_thing_is_touched_at_most_once(old in any_state(), new in any_state()) {
        let actions = diff(&old, &new, &old.ports.keys().cloned().collect());
        let touched: BTreeSet<_> = actions.iter().map(name_of).collect();
        prop_assert_eq!(touched.len(), actions.len());
    }
}

#[test]
fn settings_change_in_place_and_far_ends_do_not() {
    let vnic = port(KindPlan::Null);
    let old = state(&[("a", vnic.clone()), ("b", vnic.clone())]);
    let storm = StormRates { broadcast: StormRate::PerSecond(9), ..StormRates::default() };
    let live = PortPlan { mtu: Some(9000), macs: 20, storm, latency: LatencySensitivity::Low, ..vnic.clone() };
    let actions = diff(&old, &state(&[("a", live), ("b", vnic.clone())]), &BTreeSet::new());
    let [Action::ChangePort(name, _, changes)] = actions.as_slice() else { panic!("{actions:?}") };
    assert_eq!(name.as_str(), "a");
    let keys: Vec<_> = changes.iter().map(|change| change.key.as_str()).collect();
    assert_eq!(keys, ["latency-sensitivity", "macs", "mtu", "storm.broadcast"]);
    let mtu = Change { key: "mtu".into(), from: None, to: Some("9000".into()) };
    assert_eq!(changes[2], mtu);

    let actions = diff(&old, &state(&[("a", port(KindPlan::Loopback)), ("b", vnic)]), &BTreeSet::new());
    assert!(matches!(actions.as_slice(), [Action::RemakePort(..)]), "{actions:?}");
}

#[test]
fn offloads_change_in_place_and_what_is_offered_makes_a_vnic_anew() {
    let vnic = port(KindPlan::VhostUser(VhostUserPlan {
        socket: "/run/a".into(),
        mode: SocketMode::Server,
        queues: 1,
        owner: None,
        group: None,
        permissions: 0o660,
        memory: None,
    }));
    let old = state(&[("a", vnic.clone())]);
    let offloads = Offloads { tso: false, ..vnic.offloads };
    let actions = diff(&old, &state(&[("a", PortPlan { offloads, ..vnic.clone() })]), &BTreeSet::new());
    let [Action::ChangePort(_, _, changes)] = actions.as_slice() else { panic!("{actions:?}") };
    assert_eq!(changes[0].key, "offloads.tso");
    let compat = Compat::V2026_11NoOffload;
    let actions = diff(&old, &state(&[("a", PortPlan { compat, ..vnic })]), &BTreeSet::new());
    assert!(matches!(actions.as_slice(), [Action::RemakePort(..)]), "{actions:?}");
}

#[test]
fn a_taps_mtu_is_the_interfaces_and_makes_it_anew() {
    let tap = port(KindPlan::Tap(TapPlan { interface: "t0".into() }));
    let jumbo = PortPlan { mtu: Some(9000), ..tap.clone() };
    let actions = diff(&state(&[("t", tap)]), &state(&[("t", jumbo)]), &BTreeSet::new());
    assert!(matches!(actions.as_slice(), [Action::RemakePort(..)]), "{actions:?}");
}

#[test]
fn stopped_ports_are_tried_again() {
    let now = state(&[("a", port(KindPlan::Null)), ("b", port(KindPlan::Null))]);
    let actions = diff(&now, &now, &BTreeSet::from(["b".parse().unwrap()]));
    assert_eq!(actions, [Action::RetryPort("b".parse().unwrap())]);
}

#[test]
fn ports_go_before_networks_come_and_networks_go_last() {
    let mut old = state(&[("a", port(KindPlan::Null))]);
    let mut new = state(&[("b", port(KindPlan::Null))]);
    old.networks.insert("old".parse().unwrap(), network(1));
    new.networks.insert("new".parse().unwrap(), network(1));
    let actions = diff(&old, &new, &BTreeSet::new());
    use Action::{AddNetwork, AddPort, RemoveNetwork, RemovePort};
    assert!(
        matches!(actions.as_slice(), [RemovePort(_), AddNetwork(..), AddPort(..), RemoveNetwork(_)]),
        "{actions:?}"
    );
}
