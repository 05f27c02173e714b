//! Entries that the configuration makes: a station whose port is known for certain ([`Fdb::pin`]).
//!
//! A pin neither moves nor ages, and the limits on learning do not count it. Only the control side pins, from one thread.

use super::Fdb;
use super::bucket::SLOTS;
use super::entry::{Key, Value};
use crate::ident::{MacAddr, NetworkIndex, PortIndex};

/// Why a station could not be pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// A group address, or zero.
    #[error("{0} cannot be a port's own address: it is a group address or all zero")]
    NoStation(MacAddr),
    /// The places where the station could be entered are all taken by pins.
    #[error("no room in the FDB to pin {0}: the {n} places it could have are all pinned", n = 2 * SLOTS)]
    Full(MacAddr),
}

impl Fdb {
    /// Enters station `mac` of `network` at `port` for good, in place of what was known of it. If there is no room a
    /// learned station makes some, which is learned again when it sends.
    ///
    /// # Errors
    /// See [`PinError`].
    pub fn pin(&self, network: NetworkIndex, mac: MacAddr, port: PortIndex) -> Result<(), PinError> {
        let (key, pin) = (Key::new(network, mac), Value::pinned(port));
        if !mac.is_station() {
            return Err(PinError::NoStation(mac));
        }
        if self.find(key).is_some_and(|(_, value)| value == pin) {
            return Ok(());
        }
        // The pin goes in first and what was there comes out second, so that the station can be found all the time. If
        // a shard changes a learned entry just now, the sweep takes it out.
        let placed = self.place(key, pin) || (self.evict(key, |value| !value.is_pinned()) && self.place(key, pin));
        if !placed {
            return Err(PinError::Full(mac));
        }
        self.counts.entered(key, pin);
        self.remove(key, |value| value != pin);
        Ok(())
    }

    /// Takes the pin of station `mac` of `network` out, so that it is learned like any other. Returns whether it had one.
    pub fn unpin(&self, network: NetworkIndex, mac: MacAddr) -> bool {
        self.remove(Key::new(network, mac), Value::is_pinned) > 0
    }
}
