//! From a port's plan to a port: the one place that knows every kind.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crate::config::{self, KindPlan, Offloads, PortPlan, SocketMode, VhostUserPlan};
use crate::frame::Needs;
use crate::host::account::{self, AccountError};
use crate::ident::Name;
use crate::port::Port;
use crate::port::faulty::{Faulty, FaultyConfig};
use crate::port::loopback::Loopback;
use crate::port::null::Null;
use crate::port::replay::{Replay, ReplayConfig, ReplayError};
use crate::port::tap::{Keeper, Tap, TapConfig, TapError};
use crate::port::vnic::{Acceptor, Mode, Vnic, VnicConfig, VnicError, sweep_records};
use crate::switch::{StormClass, StormRates};

/// Why a port cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) enum OpenError {
    Vnic(#[from] VnicError),
    Account(#[from] AccountError),
    Tap(#[from] TapError),
    Replay(#[from] ReplayError),
}

/// What the ports of a kind share.
pub(super) struct Kinds {
    acceptor: Acceptor,
    /// Opens TAP interfaces and looks at them.
    pub(super) taps: Keeper,
    /// Where vNICs note how far they are in packed rings.
    records: Option<PathBuf>,
    #[cfg(test)]
    pub(super) stand_in: Option<StandIn>,
}

/// Opens ports in place of their kinds.
#[cfg(test)]
pub(crate) type StandIn = Box<dyn Fn(&Name) -> Option<Arc<dyn Port>> + Send + Sync>;

/// Where they do, in the directory of what lives as long as this host is up.
fn records(run: &Path) -> PathBuf {
    run.join("rings")
}

/// Removes what ports that are gone have left in that directory and nobody will ask for.
pub(super) fn sweep(run: &Path) {
    sweep_records(&records(run));
}

impl Kinds {
    /// Starts the threads that wait for VMs and for the kernel. `run` is the directory of what lives as long as this host is up, such as the
    /// API's socket.
    pub(super) fn start(run: Option<&Path>) -> io::Result<Self> {
        Ok(Self {
            acceptor: Acceptor::start()?,
            taps: Keeper::start()?,
            records: run.map(records),
            #[cfg(test)]
            stand_in: None,
        })
    }

    /// Opens the port called `name`. What may have to wait for the kernel is waited for until `deadline`, and goes on after that.
    pub(super) fn open(&self, name: &Name, plan: &PortPlan, deadline: Instant) -> Result<Arc<dyn Port>, OpenError> {
        #[cfg(test)]
        if let Some(port) = self.stand_in.as_ref().and_then(|stand_in| stand_in(name)) {
            return Ok(port);
        }
        let port: Arc<dyn Port> = match &plan.kind {
            KindPlan::VhostUser(vhost_user) => {
                let config = VnicConfig { records: self.records.clone(), ..vnic(name, plan, vhost_user)? };
                Vnic::new(config, &self.acceptor)?
            }
            KindPlan::Tap(tap) => {
                let config = TapConfig { interface: tap.interface.clone(), mtu: plan.mtu };
                Tap::new(&config, &self.taps, deadline)?
            }
            KindPlan::Loopback => Loopback::new(),
            KindPlan::Null => Null::new(),
            KindPlan::Replay(replay) => {
                let (file, interval, repeat) = (replay.file.clone(), replay.interval, replay.repeat);
                Replay::new(ReplayConfig { file, interval, repeat })?
            }
            KindPlan::Faulty(faulty) => Faulty::new(FaultyConfig {
                drop_every: faulty.drop_every.unwrap_or(0),
                truncate_every: faulty.truncate_every.unwrap_or(0),
                duplicate_every: faulty.duplicate_every.unwrap_or(0),
                flip_every: faulty.flip_every.unwrap_or(0),
                seed: u64::from(faulty.seed),
            }),
        };
        port.set_offloads(offloads(plan));
        Ok(port)
    }
}

/// What the far end of a port is left with, as the data path has it: all offloads stand on the checksum.
pub(super) fn offloads(plan: &PortPlan) -> Needs {
    let Offloads { csum, tso, ecn, uso, gro } = plan.offloads;
    let tcp = Needs::TSO4.and(Needs::TSO6).and(Needs::ECN.when(ecn)).and(Needs::MERGED.when(gro)).when(tso);
    Needs::CSUM.and(tcp).and(Needs::USO4.and(Needs::USO6).when(uso)).when(csum)
}

/// How much of what a port sends may be flooded, as the data path has it, while it is `in_loop` or is not.
pub(super) fn storm(plan: &PortPlan, in_loop: bool) -> StormRates {
    let config::StormRates { broadcast, multicast, unknown_unicast } = plan.storm.in_force(in_loop);
    StormClass::ALL.map(|class| match class {
        StormClass::Broadcast => broadcast,
        StormClass::Multicast => multicast,
        StormClass::UnknownUnicast => unknown_unicast,
    })
}

fn vnic(name: &Name, plan: &PortPlan, vhost_user: &VhostUserPlan) -> Result<VnicConfig, AccountError> {
    let VhostUserPlan { socket, mode, queues, owner, group, permissions, memory } = vhost_user.clone();
    Ok(VnicConfig {
        name: name.clone(),
        socket,
        mode: match mode {
            SocketMode::Server => Mode::Server,
            SocketMode::Client => Mode::Client,
        },
        queue_pairs: queues,
        mtu: plan.mtu,
        owner: owner.as_deref().map(account::user).transpose()?,
        group: group.as_deref().map(account::group).transpose()?,
        permissions,
        memory,
        mac: plan.mac,
        compat: plan.compat,
        records: None,
    })
}
