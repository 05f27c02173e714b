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
