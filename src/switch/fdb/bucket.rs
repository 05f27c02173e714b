//! A cache line of four FDB slots, and the protocol by which shards share a slot without a lock: [`Slot`].
//!
//! A slot's life, with (key, value): free (0, 0) → claimed (K, 0) → in use (K, V), where V changes any number of times →
//! leaving (K, 0) → free. Each arrow is one atomic operation on one word:
//!
//! - Claiming is a compare-exchange of the key from 0; only its winner stores the first value.
//! - A value changes by compare-exchange only, so that of two writers one sees that it was late.
//! - Leaving is a compare-exchange of the value to 0; only its winner frees the key. A late refresh then fails.
//!
//! A reader loads the key, the value, and the key once more. Without the second look it could pair a key it saw before
//! the slot changed hands with the value of the next tenant. Value stores release and value loads acquire, so whoever
//! sees a tenant's value also sees that tenant's key or a later one. What remains is a reader that sleeps through three
//! changes of hands, the last to the station it looks for: it gets another station's port, once, and `switch::forward`
//! checks that the port is in the frame's network.
//!
//! In the same way a compare-exchange can succeed on the next tenant if that one's value has the very same bits. It then
//! refreshes, moves or removes a station of the same port and tick, which the next frames put right; the counts stay
//! exact, because they follow what was in the slot.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

use super::entry::{Key, Value};

/// Slots of a bucket: what fits a cache line.
pub(super) const SLOTS: usize = 4;

/// One cache line of slots.
#[derive(Debug, Default)]
#[cfg_attr(not(loom), repr(align(64)))]
pub(super) struct Bucket([Slot; SLOTS]);

impl Bucket {
    #[inline]
    pub(super) fn slots(&self) -> &[Slot; SLOTS] {
        &self.0
    }

    /// The slot in use for `key`, and its value.
    ///
    /// All four keys are compared, and the first that matches is selected without a branch: which slot a station has
    /// is random, so a branch would be guessed wrong more often than not, at more than the price of the comparisons.
    #[inline]
    pub(super) fn find(&self, key: Key) -> Option<(&Slot, Value)> {
        let mut hit = SLOTS;
        for (index, slot) in self.0.iter().enumerate().rev() {
            hit = if slot.key.load(Ordering::Acquire) == key.0 { index } else { hit };
        }
        let slot = self.0.get(hit)?;
        slot.value_of(key).map(|value| (slot, value))
    }

    /// Puts an entry into a free slot, if there is one.
    pub(super) fn claim(&self, key: Key, value: Value) -> bool {
        self.0.iter().any(|slot| slot.claim(key, value))
    }
}

/// One entry, or room for one.
#[derive(Debug, Default)]
pub(super) struct Slot {
    key: AtomicU64,
    value: AtomicU64,
}

impl Slot {
    /// The value, if the slot is in use for `key`.
    #[inline]
    pub(super) fn read(&self, key: Key) -> Option<Value> {
        if self.key.load(Ordering::Acquire) == key.0 { self.value_of(key) } else { None }
    }

    /// The value, if the slot is in use for `key`, which it was seen to have a moment ago: the second and third load.
    #[inline]
    fn value_of(&self, key: Key) -> Option<Value> {
        let value = self.value.load(Ordering::Acquire);
        if self.key.load(Ordering::Relaxed) == key.0 { Value::from_word(value) } else { None }
    }

    /// The entry, if the slot is in use.
    pub(super) fn entry(&self) -> Option<(Key, Value)> {
        let key = Key(self.key.load(Ordering::Acquire));
        if key.0 == 0 { None } else { self.read(key).map(|value| (key, value)) }
    }

    /// Puts an entry into the slot, if it is free.
    pub(super) fn claim(&self, key: Key, value: Value) -> bool {
        let free = self.key.load(Ordering::Relaxed) == 0
            && self.key.compare_exchange(0, key.0, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if free {
            self.value.store(value.word(), Ordering::Release);
        }
        free
    }

    /// Changes the value, if it still is `old`.
    #[inline]
    pub(super) fn replace(&self, old: Value, new: Value) -> bool {
        self.value.compare_exchange(old.word(), new.word(), Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Frees the slot, if its value still is `old`. Returns the key that it had.
    pub(super) fn remove(&self, old: Value) -> Option<Key> {
        self.value.compare_exchange(old.word(), 0, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        Some(Key(self.key.swap(0, Ordering::AcqRel)))
    }
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Bucket>() == 64);

/// Every interleaving and every allowed memory order of a few steps:
/// `cargo test --release --manifest-path tests/loom/Cargo.toml`.
#[cfg(all(test, loom))]
mod loom_tests {
    #![allow(clippy::unwrap_used)]

    use loom::sync::Arc;
    use loom::thread;

    use super::*;
    use crate::clock::Tick;
    use crate::ident::{MacAddr, NetworkIndex, PortIndex};

    fn key(last: u8) -> Key {
        Key::new(NetworkIndex(0), MacAddr([2, 0, 0, 0, 0, last]))
    }

    fn value(port: u16) -> Value {
        Value::learned(PortIndex(port), Tick(0))
    }

    /// A slot that has station 1 at port 1.
    fn slot() -> Arc<Slot> {
        let slot = Slot::default();
        assert!(slot.claim(key(1), value(1)));
        Arc::new(slot)
    }

    #[test]
    fn a_reader_never_pairs_a_key_with_the_next_tenants_value() {
        loom::model(|| {
            let slot = slot();
            let other = slot.clone();
            let writer = thread::spawn(move || {
                assert_eq!(other.remove(value(1)), Some(key(1)));
                assert!(other.claim(key(2), value(2)));
            });
            assert!(slot.read(key(1)).is_none_or(|found| found == value(1)));
            assert!(slot.read(key(2)).is_none_or(|found| found == value(2)));
            writer.join().unwrap();
            assert_eq!((slot.read(key(1)), slot.read(key(2))), (None, Some(value(2))));
        });
    }

    #[test]
    fn of_two_claims_one_wins_and_its_value_stands() {
        loom::model(|| {
            let slot = Arc::new(Slot::default());
            let other = slot.clone();
            let rival = thread::spawn(move || other.claim(key(2), value(2)));
            let mine = slot.claim(key(1), value(1));
            let theirs = rival.join().unwrap();
            assert!(mine != theirs);
            assert_eq!(slot.entry(), Some(if mine { (key(1), value(1)) } else { (key(2), value(2)) }));
        });
    }

    #[test]
    fn a_late_refresh_does_not_revive_what_left() {
        loom::model(|| {
            let slot = slot();
            let other = slot.clone();
            let remover = thread::spawn(move || {
                let removed = other.remove(value(1)).is_some();
                removed && other.claim(key(2), value(2))
            });
            let refreshed = slot.replace(value(1), value(3));
            let reused = remover.join().unwrap();
            assert!(refreshed != reused);
            assert_eq!(slot.entry(), Some(if refreshed { (key(1), value(3)) } else { (key(2), value(2)) }));
        });
    }

    #[test]
    fn of_two_removers_one_frees_the_slot_and_the_next_tenant_stays() {
        loom::model(|| {
            let slot = slot();
            let (second, third) = (slot.clone(), slot.clone());
            let remover = thread::spawn(move || second.remove(value(1)).is_some());
            let tenant = thread::spawn(move || third.claim(key(2), value(2)));
            let removed = slot.remove(value(1)).is_some();
            assert!(removed != remover.join().unwrap());
            let claimed = tenant.join().unwrap();
            assert_eq!(slot.entry(), claimed.then(|| (key(2), value(2))));
        });
    }

    #[test]
    fn two_stations_find_room_in_one_bucket() {
        loom::model(|| {
            let bucket = Arc::new(Bucket::default());
            let other = bucket.clone();
            let rival = thread::spawn(move || other.claim(key(2), value(2)));
            assert!(bucket.claim(key(1), value(1)) && rival.join().unwrap());
            let port = |last| bucket.find(key(last)).map(|(_, found)| found);
            assert_eq!((port(1), port(2)), (Some(value(1)), Some(value(2))));
        });
    }
}
