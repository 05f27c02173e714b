//! Descriptors: what this process may have, against what its ports can take.
//!
//! Where there are none left, no VM connects and nobody is answered. So the limit is raised as far as it goes before anything is
//! opened, and before the relay is started, which has the same limit and as many descriptors of its own.

use crate::config::{KindPlan, Plan};
use crate::limits::{API_CONNECTIONS, API_CONNECTIONS_READ_ONLY, METRICS_CONNECTIONS};
use crate::sys::descriptors;

/// What the daemon itself has open: for each shard and thread some, logs, sockets, the state directory.
const OWN: u64 = 256;

/// What a vNIC has beside its queues: its listening socket, its connection, what wakes its session, and the files that its VM's
/// memory is in, as many as nobody can take from it.
const PORT: u64 = 32;

/// What a queue pair has: two rings, each with eventfds for kicks, calls and errors, of which the first two are there twice for a
/// moment.
const PAIR: u64 = 10;

/// Has this process have as many descriptors as it can, and none of those that it inherited passed on to the relay.
pub(super) fn prepare() {
    if let Err(error) = descriptors::close_in_other_programs() {
        log::debug!("descriptors that linecardd was started with are the relay's as well: {error}");
    }
    match descriptors::raise_limit() {
        Ok(limit) => log::debug!("linecardd may have {limit} descriptors"),
        Err(error) => log::warn!("cannot raise the limit of descriptors to what this host allows: {error}"),
    }
}

/// Says so if the VMs of `plan` can need more descriptors than there may be. A quarter is for those with memory in many files.
pub(super) fn compare(plan: &Plan) {
    let (needed, limit) = (needed(plan), descriptors::limit());
    if needed > limit - limit / 4 {
        log::warn!(
            "linecardd may have {limit} descriptors, too few for what {} ports can need: raise LimitNOFILE= of its unit (ulimit -Hn) \
             to {}, or VMs and requests may be refused",
            plan.ports.len(),
            needed + needed.div_ceil(3)
        );
    }
}

/// How many descriptors the ports of `plan` and everything else can take.
fn needed(plan: &Plan) -> u64 {
    let port = |kind: &KindPlan| match kind {
        KindPlan::VhostUser(vnic) => PORT + PAIR * u64::from(vnic.queues),
        _ => 8,
    };
    let connections = API_CONNECTIONS + API_CONNECTIONS_READ_ONLY + METRICS_CONNECTIONS;
    OWN + connections as u64 + plan.ports.values().map(|plan| port(&plan.kind)).sum::<u64>()
}
