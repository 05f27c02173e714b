//! The decision for each frame: [`process`].
//!
//! In this order: the source is a station's address; the payload is within the port's MTU; the destination is not kept
//! to the link; the source is learned; the destination's port is looked up. A frame that fails an earlier check does not
//! teach the switch anything. One whose source is known to be at another port, because it was configured there or moves too
//! often, goes nowhere: it is a copy that a loop brought back, or from somebody who borrowed the address.
//! Frames that may become many, because they are flooded or to be segmented, are then held against
//! what their port may have flooded and what fits one visit ([`flood::bound`]); a batch without such does not get there.
//!
//! Frames of one flow come in runs, and within a batch time stands still, so two frames with the same addresses get the
//! same verdict: a frame whose twelve address bytes equal those of the frame before takes over that one's verdict
//! without a lookup. Only the MTU check looks at more than addresses and is made for every frame.

use std::cell::Cell;

use crate::clock::Tick;
use crate::frame::{Batch, Head, longest_within};
use crate::ident::{NetworkIndex, PortIndex};
use crate::switch::fdb::Key;
use crate::switch::{Fdb, Learned, Limits, Storm, Tables, flood};
use crate::verdict::{DropReason, Verdict};

/// Decides on every pending frame of `batch`, which came from port `ingress`. Frames that are dropped already stay so.
pub fn process(tables: &Tables, ingress: PortIndex, batch: &mut Batch<'_>, now: Tick) {
    let Some(ingress) = Ingress::new(tables, ingress, now) else { return refuse_all(batch) };
    if tables.fdb.capacity() > CACHED_CAPACITY {
        ingress.prefetch(batch);
    }
    let mut memo = Memo::EMPTY;
    for (frame, head) in batch.decisions() {
        if frame.verdict != Verdict::Pending {
            continue;
        }
        if frame.exceeds(head, ingress.longest) {
            frame.verdict = Verdict::Drop(too_long(head));
            continue;
        }
        let addresses = head.addresses();
        if addresses != memo.addresses {
            memo.verdict = ingress.decide(&addresses, &mut memo.learned);
            memo.addresses = addresses;
        }
        frame.verdict = memo.verdict;
    }
    if ingress.floods.get() || batch.gso_frames() > 0 || batch.is_begun() {
        flood::bound(batch, ingress.members, ingress.storm, now);
    }
}

/// Entries of an FDB that the CPU's caches hold anyway: 512 KiB of them. In a larger one, fetching all lines of a batch
/// before the first is needed halves the price of a frame between stations in no order; in a smaller one it would cost
/// more than it saves.
const CACHED_CAPACITY: usize = 32 << 10;

/// What the frame before came to.
struct Memo {
    addresses: [u8; 12],
    verdict: Verdict,
    /// The source learned last. A guest mostly has one address, so most frames of a batch have the same source even if
    /// they go to many destinations.
    learned: Option<Key>,
}

impl Memo {
    /// No frame's. Twelve zeros are as good as no addresses: their source is all zero, which is invalid.
    const EMPTY: Self = Self { addresses: [0; 12], verdict: Verdict::Drop(DropReason::SourceInvalid), learned: None };
}

/// A batch from a port that the tables do not have, or that is in no network.
#[cold]
fn refuse_all(batch: &mut Batch<'_>) {
    batch.begin_anew();
    for (frame, _) in batch.decisions() {
        if frame.verdict == Verdict::Pending {
            frame.verdict = Verdict::Drop(DropReason::NoDestination);
        }
    }
}

/// Why a frame is dropped that is longer than the MTU allows.
#[cold]
fn too_long(head: &Head) -> DropReason {
    if head.source().is_station() { DropReason::MtuExceeded } else { DropReason::SourceInvalid }
}

/// What is the same for all frames of a batch.
struct Ingress<'t> {
    tables: &'t Tables,
    fdb: &'t Fdb,
    port: PortIndex,
    network: NetworkIndex,
    limits: Limits,
    now: Tick,
    /// Bytes of the longest untagged frame within the port's MTU.
    longest: u32,
    /// What flooding comes to: nothing, if the port is alone in its network.
    flood: Verdict,
    /// Something is to be flooded.
    floods: Cell<bool>,
    /// How many ports are in the network.
    members: usize,
    storm: &'t Storm,
}

impl<'t> Ingress<'t> {
    fn new(tables: &'t Tables, port: PortIndex, now: Tick) -> Option<Self> {
        let row = tables.port(port)?;
        let network = tables.network(row.network)?;
        let company = network.members.iter().any(|&member| member != port);
        Some(Self {
            tables,
            fdb: &tables.fdb,
            port,
            network: row.network,
            limits: Limits { port: row.macs, network: network.mac_limit },
            now,
            longest: longest_within(row.mtu),
            flood: if company { Verdict::Flood } else { Verdict::Drop(DropReason::NoDestination) },
            floods: Cell::new(false),
            members: network.members.len(),
            storm: &row.storm,
        })
    }

    /// Has the CPU fetch the FDB's lines for all frames at once.
    fn prefetch(&self, batch: &Batch<'_>) {
        for index in 0..batch.len() {
            let (destination, source) = Key::pair(self.network, &batch.head(index).addresses());
            self.fdb.prefetch(destination);
            self.fdb.prefetch(source);
        }
    }

    /// The verdict for a frame with these addresses; learns where its source is.
    #[inline]
    fn decide(&self, addresses: &[u8; 12], learned: &mut Option<Key>) -> Verdict {
        let (destination, source) = Key::pair(self.network, addresses);
        if !source.is_station() {
            return Verdict::Drop(DropReason::SourceInvalid);
        }
        if destination.is_link_local() {
            return Verdict::Drop(DropReason::LinkLocalGroup);
        }
        if *learned != Some(source) {
            match self.fdb.learn_key(source, self.port, self.limits, self.now) {
                Learned::Damped => return Verdict::Drop(DropReason::SourceDamped),
                Learned::Pinned => return Verdict::Drop(DropReason::SourcePinned),
                _ => *learned = Some(source),
            }
        }
        if destination.is_group() {
            return self.flood();
        }
        match self.fdb.lookup_key(destination) {
            Some(port) if port == self.port => Verdict::Drop(DropReason::SamePort),
            Some(port) => self.deliver(port),
            None => self.flood(),
        }
    }

    /// The verdict for a frame that every port is to get, if it may be.
    #[inline]
    fn flood(&self) -> Verdict {
        self.floods.set(true);
        self.flood
    }

    /// A port that was known to have the station may have been removed or moved to another network since: whatever the
    /// FDB says, no frame leaves its network.
    #[inline]
    fn deliver(&self, port: PortIndex) -> Verdict {
        match self.tables.port(port) {
            Some(row) if row.network == self.network => Verdict::Deliver(port),
            _ => Verdict::Drop(DropReason::NoDestination),
        }
    }
}

#[cfg(test)]
mod tests;
