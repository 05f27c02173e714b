//! Profiles made whole: each with everything that it inherits.
//!
//! Profiles are finished in the order of inheritance, parents first (Kahn's algorithm), so a long chain costs no stack
//! and each profile is merged once. What is left at the end inherits from itself. Of several parents the later ones win,
//! and a profile's own keys win over all of them; labels are merged key by key.

use std::collections::{BTreeMap, BTreeSet};

use super::key_path::{KeyPath, Step};
use super::nearest::nearest;
use super::plan::ProfilePlan;
use super::report::{At, Finding, Report};
use super::scalar::Names;
use super::written::{Profile, Settings, Table};
use crate::ident::Name;

/// Most labels of a port or a profile, inherited ones included.
pub(super) const LABELS: usize = 64;

/// Every profile with what it inherits. `None`: it, or one that it inherits from, has a mistake, which is reported.
pub(super) fn profiles(written: Table<Profile>, report: &mut Report) -> Table<ProfilePlan> {
    let mut own = BTreeMap::new();
    let mut done = Table::new();
    for (name, profile) in written {
        match profile {
            Some(mut profile) => {
                let parents = std::mem::take(&mut profile.inherit);
                let settings = ProfilePlan::from(profile.take_settings());
                report_offloads(&KeyPath::of(&["profiles", name.as_str()]), &settings, report);
                own.insert(name, (parents, settings));
            }
            None => drop(done.insert(name, None)),
        }
    }
    report_unknown_parents(&own, &done, report);
    let mut waiting: BTreeMap<Name, usize> = BTreeMap::new();
    let mut heirs: BTreeMap<Name, Vec<Name>> = BTreeMap::new();
    for (name, (parents, _)) in &own {
        let parents: BTreeSet<&Name> = parents.names.iter().filter(|parent| own.contains_key(*parent)).collect();
        waiting.insert(name.clone(), parents.len());
        for parent in parents {
            heirs.entry(parent.clone()).or_default().push(name.clone());
        }
    }
    let mut ready: Vec<Name> =
        waiting.iter().filter(|(_, parents)| **parents == 0).map(|(name, _)| name.clone()).collect();
    while let Some(name) = ready.pop() {
        let Some((parents, settings)) = own.remove(&name) else { continue };
        let whole = merged(&parents, settings, &done);
        if whole.as_ref().is_some_and(|whole| whole.labels.len() > LABELS) {
            report_labels(&KeyPath::of(&["profiles", name.as_str()]), report);
        }
        done.insert(name.clone(), whole.filter(|whole| whole.labels.len() <= LABELS));
        for heir in heirs.remove(&name).unwrap_or_default() {
            let parents = waiting.entry(heir.clone()).or_default();
            *parents = parents.saturating_sub(1);
            if *parents == 0 {
                ready.push(heir);
            }
        }
    }
    report_cycles(&own, report);
    done.extend(own.into_keys().map(|name| (name, None)));
    done
}

/// Says that the port or profile at `path` has too many labels.
pub(super) fn report_labels(path: &KeyPath, report: &mut Report) {
    report.add(Finding::key(path, format!("more than {LABELS} labels, inherited ones included")));
}

/// Says that what the port or profile at `path` writes itself about offloads contradicts itself. What is inherited does not
/// count: `csum: false` over a parent's `tso: true` switches both off.
pub(super) fn report_offloads(path: &KeyPath, own: &ProfilePlan, report: &mut Report) {
    let Some([on, without]) = own.offloads.contradiction() else { return };
    let at = |key: &str| path.join(&[Step::Key("offloads".into()), Step::Key(key.into())]);
    let finding = Finding::value(&at(on), format!("`{on}` cannot be on while `{without}` is off"))
        .help(format!("switch `{on}` off as well, or leave it out"))
        .related(&at(without), At::Value, "switched off here");
    report.add(finding);
}

/// The settings over those of all parents; `None` if a parent has a mistake.
fn merged(parents: &Names, own: ProfilePlan, done: &Table<ProfilePlan>) -> Option<ProfilePlan> {
    let mut whole = ProfilePlan::default();
    for parent in &parents.names {
        whole = done.get(parent)?.clone()?.over(&whole);
    }
    Some(own.over(&whole))
}

type Waiting = BTreeMap<Name, (Names, ProfilePlan)>;

fn report_unknown_parents(own: &Waiting, broken: &Table<ProfilePlan>, report: &mut Report) {
    let known = || own.keys().chain(broken.keys());
    for (name, (parents, _)) in own {
        for (position, parent) in parents.names.iter().enumerate() {
            if own.contains_key(parent) || broken.contains_key(parent) {
                continue;
            }
            let mut path = KeyPath::of(&["profiles", name.as_str(), "inherit"]);
            if parents.list {
                path = path.join(&[Step::Item(position)]);
            }
            report.add(unknown(&path, "profile", parent, known().map(Name::as_str)));
        }
    }
}

/// The finding that `name`, written at `path`, is no `what` that exists.
pub(super) fn unknown<'a>(path: &KeyPath, what: &str, name: &Name, known: impl Iterator<Item = &'a str>) -> Finding {
    let help = match nearest(name.as_str(), known) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("add it under `{what}s:`"),
    };
    Finding::value(path, format!("there is no {what} `{name}`")).help(help)
}

/// Reports each circle once. Every profile that is left leads into one by its parents that are left.
fn report_cycles(left: &Waiting, report: &mut Report) {
    let mut seen: BTreeSet<&Name> = BTreeSet::new();
    for start in left.keys() {
        let mut way: Vec<&Name> = Vec::new();
        let mut on_way: BTreeSet<&Name> = BTreeSet::new();
        let mut at = start;
        while seen.insert(at) {
            way.push(at);
            on_way.insert(at);
            let parents = left.get(at).map(|(parents, _)| parents.names.as_slice()).unwrap_or_default();
            match parents.iter().find(|parent| left.contains_key(*parent)) {
                Some(parent) => at = parent,
                None => break,
            }
        }
        if !on_way.contains(at) {
            continue;
        }
        let circle: Vec<&str> = way.iter().skip_while(|name| **name != at).map(|name| name.as_str()).collect();
        if circle.is_empty() {
            continue;
        }
        let path = KeyPath::of(&["profiles", at.as_str(), "inherit"]);
        report.add(Finding::value(&path, format!("profile `{at}` inherits from itself: {}", chain(&circle))));
    }
}

/// `a -> b -> a`, with the middle of a long circle left out.
fn chain(circle: &[&str]) -> String {
    /// Names that are shown of a circle.
    const SHOWN: usize = 8;
    let mut names: Vec<&str> = circle.iter().copied().take(SHOWN).collect();
    if circle.len() > SHOWN {
        names.push("...");
    }
    names.push(circle[0]);
    names.join(" -> ")
}

impl ProfilePlan {
    /// These settings, and where they say nothing those of `below`.
    pub(super) fn over(self, below: &Self) -> Self {
        let mut labels = below.labels.clone();
        labels.extend(self.labels);
        Self {
            network: self.network.or_else(|| below.network.clone()),
            latency: self.latency.or(below.latency),
            affinity: self.affinity.or(below.affinity),
            mtu: self.mtu.or(below.mtu),
            macs: self.macs.or(below.macs),
            storm: self.storm.over(below.storm),
            offloads: self.offloads.over(below.offloads),
            compat: self.compat.or(below.compat),
            labels,
        }
    }
}

impl From<Settings> for ProfilePlan {
    fn from(written: Settings) -> Self {
        Self {
            network: written.network,
            latency: written.latency_sensitivity,
            affinity: written.affinity,
            mtu: written.mtu.map(|mtu| mtu.u16()),
            macs: written.limits.macs.map(|macs| macs.u32()),
            storm: written.storm.0,
            offloads: written.offloads,
            compat: written.compat,
            labels: written.labels.into_iter().map(|(key, value)| (key.0, value.0)).collect(),
        }
    }
}
