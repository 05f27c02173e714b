//! What should be: [`Desired`], the networks and ports of the file together with the ports made at run time.
//!
//! A port made at run time is kept as it was written and resolved anew against each file, so a change of its profile
//! reaches it. If a new file leaves it without its profile or network, it stays here with the reason: it must neither
//! vanish nor keep the daemon from starting. If a new file has a port of the same name, the file's is meant: that is how
//! a port that was tried at run time is made permanent.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::config::{self, NetworkPlan, Plan, PortPlan};
use crate::ident::Name;

/// Who asked for a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// The configuration file.
    File,
    /// Somebody, while the daemon ran; kept in the state directory.
    RunTime,
}

/// One port that should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Who asked for it.
    pub origin: Origin,
    /// What it should be, or why that cannot be said.
    pub plan: Result<PortPlan, String>,
}

/// Everything that should be on this host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Desired {
    /// Broadcast domains.
    pub networks: BTreeMap<Name, NetworkPlan>,
    /// Ports of both origins.
    pub ports: BTreeMap<Name, Wish>,
}

impl Desired {
    /// What `plan` and the ports made at run time ask for together.
    pub fn new(plan: &Plan, run_time: &BTreeMap<Name, Value>) -> Self {
        let wish = |plan: &PortPlan| Wish { origin: Origin::File, plan: Ok(plan.clone()) };
        let mut ports: BTreeMap<_, _> = plan.ports.iter().map(|(name, plan)| (name.clone(), wish(plan))).collect();
        // Each is checked beside those before it, so that two that claim one socket are told apart.
        let mut seen = plan.clone();
        for (name, written) in run_time.iter().filter(|(name, _)| !plan.ports.contains_key(*name)) {
            let resolved = config::check_port(name.as_str(), written.clone(), &seen).map_err(|wrong| wrong.to_string());
            if let Ok(port) = &resolved {
                seen.ports.insert(name.clone(), port.clone());
            }
            ports.insert(name.clone(), Wish { origin: Origin::RunTime, plan: resolved });
        }
        Self { networks: plan.networks.clone(), ports }
    }
}
