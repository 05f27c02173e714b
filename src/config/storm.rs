//! Bounds on what a port may have flooded: how `storm` is written, inherited and shown.
//!
//! Written as one word for all classes, `off` or `auto`, or class by class: `{ broadcast: 1000, multicast: off }`. A class that a
//! port does not name is its profile's, and one that nobody names has the default of the port's kind.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Unexpected, Visitor};
use serde::{Serialize, Serializer};

use super::plan::KindPlan;
use super::scalar::{Fault, Scalar, deserialize_scalar};
use crate::limits::{STORM_BROADCAST_DEFAULT, STORM_MULTICAST_DEFAULT, STORM_RATE, STORM_UNKNOWN_UNICAST_DEFAULT};

/// How many frames a port may have flooded in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StormRate {
    /// As many as it sends.
    #[default]
    Off,
    /// As many as it sends, and while it seems to be connected to another port of its network the default of a vNIC.
    Auto,
    /// So many; 0 for none.
    PerSecond(u32),
}

deserialize_scalar!(StormRate);

impl Scalar for StormRate {
    const EXPECTED: &'static str = "a number of frames in a second, up to 100000000, `auto` or `off`";

    fn from_text(text: &str) -> Result<Self, Fault> {
        match text {
            OFF => Ok(Self::Off),
            AUTO => Ok(Self::Auto),
            _ => Err(Fault::Unlike),
        }
    }

    fn from_whole(number: u64) -> Result<Self, Fault> {
        let rate = u32::try_from(number).ok().filter(|&rate| rate <= STORM_RATE);
        rate.map(Self::PerSecond).ok_or(Fault::Unlike)
    }
}

/// The word for no bound.
const OFF: &str = "off";

/// The word for no bound until there is a loop.
const AUTO: &str = "auto";

impl Serialize for StormRate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_str(OFF),
            Self::Auto => serializer.serialize_str(AUTO),
            Self::PerSecond(rate) => serializer.serialize_u32(*rate),
        }
    }
}

/// A value for each class of frames that are flooded. `storm:` in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, serde::Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct StormRates<T: Default> {
    /// Frames for everybody.
    pub broadcast: T,
    /// Frames for a group.
    pub multicast: T,
    /// Frames for a station of which nobody knows where it is.
    pub unknown_unicast: T,
}

impl StormRates<Option<StormRate>> {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// These bounds, and where they say nothing those of `below`.
    pub(super) fn over(self, below: Self) -> Self {
        Self {
            broadcast: self.broadcast.or(below.broadcast),
            multicast: self.multicast.or(below.multicast),
            unknown_unicast: self.unknown_unicast.or(below.unknown_unicast),
        }
    }

    /// These bounds, and where they say nothing those of a port of this kind: guests are bounded, what the host sends is where
    /// it goes round, and what a test sends is not.
    pub(super) fn or_of_kind(self, kind: &KindPlan) -> StormRates<StormRate> {
        let of_kind = |of_guest| match kind {
            KindPlan::VhostUser(_) => StormRate::PerSecond(of_guest),
            KindPlan::Tap(_) => StormRate::Auto,
            _ => StormRate::Off,
        };
        StormRates {
            broadcast: self.broadcast.unwrap_or(of_kind(OF_GUESTS.broadcast)),
            multicast: self.multicast.unwrap_or(of_kind(OF_GUESTS.multicast)),
            unknown_unicast: self.unknown_unicast.unwrap_or(of_kind(OF_GUESTS.unknown_unicast)),
        }
    }
}

/// The bounds of a vNIC that names none, in frames in a second.
const OF_GUESTS: StormRates<u32> = StormRates {
    broadcast: STORM_BROADCAST_DEFAULT,
    multicast: STORM_MULTICAST_DEFAULT,
    unknown_unicast: STORM_UNKNOWN_UNICAST_DEFAULT,
};

impl StormRates<StormRate> {
    /// Whether a loop changes any of them.
    pub fn minds_loops(self) -> bool {
        [self.broadcast, self.multicast, self.unknown_unicast].contains(&StormRate::Auto)
    }

    /// The numbers that hold for a port that is `in_loop`, or is not: frames in a second; `None`: any number.
    pub fn in_force(self, in_loop: bool) -> StormRates<Option<u32>> {
        let number = |rate, of_guest| match rate {
            StormRate::PerSecond(rate) => Some(rate),
            StormRate::Auto if in_loop => Some(of_guest),
            StormRate::Auto | StormRate::Off => None,
        };
        StormRates {
            broadcast: number(self.broadcast, OF_GUESTS.broadcast),
            multicast: number(self.multicast, OF_GUESTS.multicast),
            unknown_unicast: number(self.unknown_unicast, OF_GUESTS.unknown_unicast),
        }
    }
}

/// What is written under `storm`.
#[derive(Debug, Default)]
pub(super) struct Storm(pub(super) StormRates<Option<StormRate>>);

impl<'de> Deserialize<'de> for Storm {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StormVisitor)
    }
}

struct StormVisitor;

impl<'de> Visitor<'de> for StormVisitor {
    type Value = Storm;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`off`, `auto`, or a mapping with keys such as `broadcast`, `multicast`, `unknown-unicast`")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Storm, E> {
        let Ok(rate) = StormRate::from_text(text) else {
            return Err(E::invalid_value(Unexpected::Str(text), &self));
        };
        let all = Some(rate);
        Ok(Storm(StormRates { broadcast: all, multicast: all, unknown_unicast: all }))
    }

    fn visit_map<A: MapAccess<'de>>(self, classes: A) -> Result<Storm, A::Error> {
        Deserialize::deserialize(MapAccessDeserializer::new(classes)).map(Storm)
    }
}
