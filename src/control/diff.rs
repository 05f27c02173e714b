//! From what is to what should be: [`diff`] finds the [`Action`]s, in an order that is safe to carry out.
//!
//! Pure: what it says is what `linecard plan` prints and what applying does, and tests need no daemon. A port whose plan
//! did not change does not occur in the answer, which is all that "a change touches only what it concerns" takes.
//!
//! The order: ports go first, so that sockets and interfaces are free for those that come; networks come before the
//! ports that use them and go after.

use std::collections::BTreeSet;

use serde_json::Value;

use super::desired::{Desired, Wish};
use crate::config::{KindPlan, NetworkPlan, PortPlan};
use crate::ident::Name;

/// One step from what is to what should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Ends a port.
    RemovePort(Name),
    /// Makes a network.
    AddNetwork(Name, NetworkPlan),
    /// Changes a network's settings; its ports do not notice.
    ChangeNetwork(Name, NetworkPlan, Vec<Change>),
    /// Changes a port's settings while it runs; its far end does not notice.
    ChangePort(Name, Wish, Vec<Change>),
    /// Ends a port and makes it anew: what changed is what its far end is attached to. Its number and counters stay.
    RemakePort(Name, Wish, Vec<Change>),
    /// Tries a stopped port again.
    RetryPort(Name),
    /// Makes a port.
    AddPort(Name, Wish),
    /// Ends a network that no port is in any more.
    RemoveNetwork(Name),
}

/// One setting that differs.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Change {
    /// Its key as it is written in the file, with dots between levels.
    pub key: String,
    /// What it was; nothing if it was not set.
    pub from: Option<String>,
    /// What it will be; nothing if it is set no longer.
    pub to: Option<String>,
}

impl Desired {
    /// Carries out `action` on the description itself: `old` after all of `diff(old, new)` is `new`.
    pub fn perform(&mut self, action: &Action) {
        match action.clone() {
            Action::AddNetwork(name, plan) | Action::ChangeNetwork(name, plan, _) => {
                self.networks.insert(name, plan);
            }
            Action::RemoveNetwork(name) => {
                self.networks.remove(&name);
            }
            Action::AddPort(name, wish) | Action::ChangePort(name, wish, _) | Action::RemakePort(name, wish, _) => {
                self.ports.insert(name, wish);
            }
            Action::RemovePort(name) => {
                self.ports.remove(&name);
            }
            Action::RetryPort(_) => {}
        }
    }
}

/// The actions that lead from `old` to `new`. Ports in `stopped` are tried again even if nothing changed about them.
pub fn diff(old: &Desired, new: &Desired, stopped: &BTreeSet<Name>) -> Vec<Action> {
    let gone = old.ports.keys().filter(|name| !new.ports.contains_key(*name));
    let mut actions: Vec<_> = gone.cloned().map(Action::RemovePort).collect();
    for (name, plan) in &new.networks {
        match old.networks.get(name) {
            None => actions.push(Action::AddNetwork(name.clone(), plan.clone())),
            Some(was) if was != plan => {
                actions.push(Action::ChangeNetwork(name.clone(), plan.clone(), changes(was, plan)));
            }
            Some(_) => {}
        }
    }
    for (name, wish) in &new.ports {
        if let Some(was) = old.ports.get(name) {
            actions.extend(port_action(name, was, wish, stopped.contains(name)));
        }
    }
    let come = new.ports.iter().filter(|(name, _)| !old.ports.contains_key(*name));
    actions.extend(come.map(|(name, wish)| Action::AddPort(name.clone(), wish.clone())));
    let gone = old.networks.keys().filter(|name| !new.networks.contains_key(*name));
    actions.extend(gone.cloned().map(Action::RemoveNetwork));
    actions
}

fn port_action(name: &Name, was: &Wish, wish: &Wish, stopped: bool) -> Option<Action> {
    let (name, next) = (name.clone(), wish.clone());
    let between = match (&was.plan, &wish.plan) {
        (Ok(old), Ok(new)) => changes(old, new),
        _ => Vec::new(),
    };
    match (&was.plan, &wish.plan) {
        (Ok(old), Ok(new)) if must_remake(old, new) => Some(Action::RemakePort(name, next, between)),
        (Ok(_), Err(_)) | (Err(_), Ok(_)) => Some(Action::RemakePort(name, next, between)),
        (Ok(_), Ok(_)) if stopped && was == wish => Some(Action::RetryPort(name)),
        (Ok(_), Ok(_)) if stopped => Some(Action::RemakePort(name, next, between)),
        _ if was != wish => Some(Action::ChangePort(name, next, between)),
        _ => None,
    }
}

/// Whether a running port cannot become the new one. Its kind is what its far end is attached to; a TAP's MTU is a
/// property of the host's interface, which is set when it is opened; what a vNIC offers its VM was told when that connected.
fn must_remake(old: &PortPlan, new: &PortPlan) -> bool {
    let offer = matches!(new.kind, KindPlan::VhostUser(_)) && old.compat != new.compat;
    old.kind != new.kind || offer || (matches!(new.kind, KindPlan::Tap(_)) && old.mtu != new.mtu)
}

/// The settings that differ, by their keys in the file.
pub fn changes<T: serde::Serialize>(old: &T, new: &T) -> Vec<Change> {
    // A plan serializes to keys and plain values; there is nothing in it that JSON cannot say.
    let tree = |plan: &T| serde_json::to_value(plan).unwrap_or(Value::Null);
    let mut found = Vec::new();
    compare(String::new(), Some(&tree(old)), Some(&tree(new)), &mut found);
    found
}

fn compare(key: String, old: Option<&Value>, new: Option<&Value>, found: &mut Vec<Change>) {
    if old == new {
        return;
    }
    let (Some(Value::Object(a)), Some(Value::Object(b))) = (old, new) else {
        found.push(Change { key, from: old.map(text), to: new.map(text) });
        return;
    };
    for inner in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
        let path = match key.as_str() {
            // The file has the kind's own key where the plan says "kind".
            "" | "kind" => inner.clone(),
            _ => format!("{key}.{inner}"),
        };
        compare(path, a.get(inner), b.get(inner), found);
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
