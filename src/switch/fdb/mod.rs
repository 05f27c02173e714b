//! The forwarding database: at which port each station of each network was last seen. Shared by all shards.
//!
//! It is a hash table of a fixed number of cache lines with four slots each ([`bucket`]: how shards share a slot without
//! a lock). A station has two candidate lines; it goes into the second only if the first is full, and if both are, one
//! of their tenants is moved over to its own other line. With lookups this leaves a table that is at most half full,
//! as it is kept, at little more than one cache line per known station, and lets it fill to over 95 % before it
//! refuses anything. A chained or open-ended probe would be simpler to fill but has no bound a guest cannot push.
//!
//! The hash is keyed with random numbers of this process, so that guests cannot choose addresses that meet in a line. It
//! is two multiplications, each folded onto itself: nine cycles, against 15 to 20 for SipHash on the same eight bytes. One
//! would do for addresses without order, but with one seed out of some hundred it has a twentieth to a half of the addresses of a
//! numbered series meet in lines that are full while half the table is free; with two none of 1500 seeds had any of 2048 refused in
//! 4096 places.
//!
//! Who does what: shards look up and learn ([`learn`]); the control side pins, sweeps, flushes and lists ([`age`],
//! [`pin`]). Shards that see a new station at the same moment may enter it twice; lookups agree on the one that comes
//! first in its lines, and the sweep removes the other. The table never grows under a reader: the control side publishes
//! [`Fdb::grown`], and what is learned in between is learned again.

mod age;
mod bucket;
mod count;
mod entry;
mod incidents;
mod learn;
mod pin;

pub use age::{FdbEntry, Flush, Swept};
pub use count::{FdbCounters, MacLimit};
pub use entry::{FLAP_HOLD_DOWN, FLAP_MOVES, FLAP_WINDOW};
pub use incidents::{Incident, IncidentKind};
pub use learn::{Learned, Limits};
pub use pin::PinError;

use std::sync::Arc;

use crate::ident::{MacAddr, NetworkIndex, PortIndex};
use crate::limits::FDB_ENTRIES;
use crate::sys::cpu;
use bucket::{Bucket, SLOTS, Slot};
use count::Counts;
pub(in crate::switch) use entry::Key;
use entry::Value;
use incidents::Incidents;

/// The forwarding database of a host.
#[derive(Debug)]
pub struct Fdb {
    /// A power of two of them.
    buckets: Box<[Bucket]>,
    hash: Hash,
    counts: Counts,
    /// Most entries that are learned, but for what is within the shares of ports.
    most: usize,
    incidents: Arc<Incidents>,
}

impl Fdb {
    /// Fewest entries a table has room for: one page of buckets.
    pub const CAPACITY_MIN: usize = 256;

    /// Entries that a host's table has room for at first: 64 KiB of them. A table grows once a second if it is crowded, and
    /// until then stations that find no room are flooded to; this is room for the VMs that may all start in one second.
    pub const CAPACITY_START: usize = 4096;

    /// Most entries a table has room for: at most half full with all entries that a host may have, and little more with the shares
    /// of all ports beyond that ([`PORT_MACS_SHARE`](crate::limits::PORT_MACS_SHARE)).
    pub const CAPACITY_MAX: usize = 2 * FDB_ENTRIES;

    /// A table with room for `entries`, rounded up to a power of two and kept within the two bounds above. `seed` is two
    /// random numbers that no guest can know.
    pub fn with_capacity(entries: usize, seed: [u64; 2]) -> Self {
        Self::with_hash(entries, Hash::new(seed), Arc::default())
    }

    fn with_hash(entries: usize, hash: Hash, incidents: Arc<Incidents>) -> Self {
        let slots = entries.clamp(Self::CAPACITY_MIN, Self::CAPACITY_MAX).next_power_of_two();
        let buckets = (0..slots / SLOTS).map(|_| Bucket::default()).collect();
        Self { buckets, hash, counts: Counts::new(), most: FDB_ENTRIES, incidents }
    }

    /// How many entries there is room for.
    pub fn capacity(&self) -> usize {
        self.buckets.len() * SLOTS
    }

    /// Whether more than half of the room is taken, so that [`Fdb::grown`] should be published. Stations that found no room
    /// count: they do not care how much of it is left elsewhere.
    pub fn is_crowded(&self) -> bool {
        self.counts.wanted() > self.capacity() / 2
    }

    /// A copy twice the size, with the same hash, counters and incidents; `None` at [`Fdb::CAPACITY_MAX`].
    pub fn grown(&self) -> Option<Self> {
        if self.capacity() >= Self::CAPACITY_MAX {
            return None;
        }
        let grown = Self { most: self.most, ..Self::with_hash(self.capacity() * 2, self.hash, self.incidents.clone()) };
        let entries =
            |pinned| self.slots().filter_map(Slot::entry).filter(move |(_, value)| value.is_pinned() == pinned);
        // Pins first, so that none yields to a learned entry of the same station. What found room in the small table
        // finds it in the large one, which is a quarter full.
        for (key, value) in entries(true).chain(entries(false)) {
            if grown.find(key).is_none() && grown.place(key, value) {
                grown.counts.entered(key, value);
            }
        }
        grown.counts.inherit(&self.counts);
        Some(grown)
    }

    /// The port at which a station is, if that is known.
    #[inline]
    pub fn lookup(&self, network: NetworkIndex, mac: MacAddr) -> Option<PortIndex> {
        self.lookup_key(Key::new(network, mac))
    }

    /// [`Fdb::lookup`] by key.
    #[inline]
    pub(in crate::switch) fn lookup_key(&self, key: Key) -> Option<PortIndex> {
        self.find(key).map(|(_, value)| value.port())
    }

    /// Asks the CPU to fetch the line in which a key is looked for first.
    #[inline]
    pub(in crate::switch) fn prefetch(&self, key: Key) {
        let [first, _] = self.candidates(key);
        cpu::prefetch_read(first);
    }

    /// The slot in use for `key`, the first of them if it was entered twice, and its value.
    #[inline]
    fn find(&self, key: Key) -> Option<(&Slot, Value)> {
        let [first, second] = self.candidates(key);
        first.find(key).or_else(|| second.find(key))
    }

    /// The two buckets in which `key` may be, in the order of looking.
    #[inline]
    fn candidates(&self, key: Key) -> [&Bucket; 2] {
        let mask = self.buckets.len() - 1;
        let hash = self.hash.of(key);
        let (first, second) = (hash as usize & mask, (hash >> 32) as usize & mask);
        [&self.buckets[first], &self.buckets[second]]
    }

    /// Finds room for an entry and puts it there. Does not look whether the key is there already.
    fn place(&self, key: Key, value: Value) -> bool {
        let candidates = self.candidates(key);
        candidates.iter().any(|bucket| bucket.claim(key, value))
            || candidates.iter().any(|bucket| self.make_room(bucket) && bucket.claim(key, value))
    }

    /// Moves one tenant of a full bucket to its other bucket, if one of them has room there. The tenant is put there
    /// first and taken away here second, so that it can be found all the time. Pins stay: whoever takes one out must
    /// not meet two of it.
    fn make_room(&self, bucket: &Bucket) -> bool {
        bucket.slots().iter().any(|slot| {
            let Some((key, value)) = slot.entry().filter(|(_, value)| !value.is_pinned()) else { return false };
            let [first, second] = self.candidates(key);
            let other = if std::ptr::eq(first, bucket) { second } else { first };
            if std::ptr::eq(other, bucket) || !other.claim(key, value) {
                return false;
            }
            let moved = slot.remove(value).is_some();
            if !moved {
                // Another shard changed the tenant meanwhile: it is entered twice now, and the sweep will find it.
                self.counts.entered(key, value);
            }
            moved
        })
    }

    /// Takes out one entry that `which` picks from the buckets in which `key` may be.
    fn evict(&self, key: Key, which: impl Fn(Value) -> bool) -> bool {
        let mut slots = self.candidates(key).into_iter().flat_map(Bucket::slots);
        slots.any(|slot| slot.entry().is_some_and(|(_, value)| which(value) && self.take_out(slot, value)))
    }

    /// Takes out what happened to stations since the last call, in no order; and how much more there was than could be noted.
    pub fn take_incidents(&self) -> (Vec<Incident>, u64) {
        self.incidents.take()
    }

    fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.buckets.iter().flat_map(Bucket::slots)
    }
}

/// A keyed hash of two multiplications.
#[derive(Debug, Clone, Copy)]
struct Hash {
    key: u64,
    multiplier: u64,
}

/// 2^64 divided by the golden ratio: a good multiplier.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Hash {
    /// A seed of zeros hashes well too. An even multiplier would lose the key's highest bits.
    fn new([key, multiplier]: [u64; 2]) -> Self {
        Self { key, multiplier: (multiplier ^ GOLDEN) | 1 }
    }

    /// Every bit of the key moves bits everywhere.
    #[inline]
    fn of(self, key: Key) -> u64 {
        folded(folded(key.0 ^ self.key, self.multiplier), GOLDEN)
    }
}

/// The two halves of the product, folded onto each other.
#[inline]
fn folded(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

#[cfg(test)]
pub(in crate::switch) mod model;
#[cfg(test)]
mod tests;
