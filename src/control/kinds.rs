//! From a port's plan to a port: the one place that knows every kind.

use std::sync::Arc;

use crate::config::{FaultyPlan, KindPlan, PortPlan};
use crate::ident::Name;
use crate::port::Port;
use crate::port::faulty::{Faulty, FaultyConfig};
use crate::port::loopback::Loopback;
use crate::port::null::Null;
use crate::port::replay::{Replay, ReplayConfig};
use crate::port::tap::{Tap, TapConfig};

/// What ports of some kinds share.
pub(super) struct Kinds;

impl Kinds {
    /// Nothing shared yet.
    pub(super) fn new() -> Self {
        Self
    }

    /// Opens the port called `name`.
    ///
    /// # Errors
    /// Why it cannot be had, and what to do about it, for the operator.
    pub(super) fn open(&self, _name: &Name, plan: &PortPlan) -> Result<Arc<dyn Port>, String> {
        match &plan.kind {
            KindPlan::VhostUser(_) => Err("vhost-user ports are not part of this build".into()),
            KindPlan::Tap(tap) => {
                let config = TapConfig { interface: tap.interface.clone(), mtu: plan.mtu };
                Tap::new(&config).map(|port| port as _).map_err(|error| told(&error))
            }
            KindPlan::Loopback => Ok(Loopback::new()),
            KindPlan::Null => Ok(Null::new()),
            KindPlan::Replay(replay) => {
                let (file, interval, repeat) = (replay.file.clone(), replay.interval, replay.repeat);
                Replay::new(ReplayConfig { file, interval, repeat }).map(|port| port as _).map_err(|error| told(&error))
            }
            KindPlan::Faulty(FaultyPlan { drop_every, corrupt_every }) => Ok(Faulty::new(FaultyConfig {
                drop_every: drop_every.unwrap_or(0),
                flip_every: corrupt_every.unwrap_or(0),
                ..FaultyConfig::default()
            })),
        }
    }
}

/// An error and its causes in one line.
fn told(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
