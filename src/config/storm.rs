//! Bounds on what a port may have flooded: how `storm` is written, inherited and shown.
//!
//! Written as one word for all classes, `off`, or class by class: `{ broadcast: 1000, multicast: off }`. A class that a port
//! does not name is its profile's, and one that nobody names has the default of the port's kind.

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
    /// So many; 0 for none.
    PerSecond(u32),
}

deserialize_scalar!(StormRate);

impl Scalar for StormRate {
    const EXPECTED: &'static str = "a number of frames in a second, up to 100000000, or `off`";

    fn from_text(text: &str) -> Result<Self, Fault> {
        if text == OFF { Ok(Self::Off) } else { Err(Fault::Unlike) }
    }

    fn from_whole(number: u64) -> Result<Self, Fault> {
        let rate = u32::try_from(number).ok().filter(|&rate| rate <= STORM_RATE);
        rate.map(Self::PerSecond).ok_or(Fault::Unlike)
    }
}

/// The word for no bound.
const OFF: &str = "off";

impl StormRate {
    /// The number, if there is one.
    pub fn per_second(self) -> Option<u32> {
        match self {
            Self::Off => None,
            Self::PerSecond(rate) => Some(rate),
        }
    }
}

impl Serialize for StormRate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_str(OFF),
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

    /// These bounds, and where they say nothing those of a port of this kind: guests are bounded, and what the host or a test
    /// sends is not.
    pub(super) fn or_of_kind(self, kind: &KindPlan) -> StormRates<StormRate> {
        let guest = matches!(kind, KindPlan::VhostUser(_));
        let or = |rate: Option<StormRate>, default| match rate {
            Some(rate) => rate,
            None if guest => StormRate::PerSecond(default),
            None => StormRate::Off,
        };
        StormRates {
            broadcast: or(self.broadcast, STORM_BROADCAST_DEFAULT),
            multicast: or(self.multicast, STORM_MULTICAST_DEFAULT),
            unknown_unicast: or(self.unknown_unicast, STORM_UNKNOWN_UNICAST_DEFAULT),
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
        f.write_str("`off`, or a mapping with keys such as `broadcast`, `multicast`, `unknown-unicast`")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Storm, E> {
        if text != OFF {
            return Err(E::invalid_value(Unexpected::Str(text), &self));
        }
        let off = Some(StormRate::Off);
        Ok(Storm(StormRates { broadcast: off, multicast: off, unknown_unicast: off }))
    }

    fn visit_map<A: MapAccess<'de>>(self, classes: A) -> Result<Storm, A::Error> {
        Deserialize::deserialize(MapAccessDeserializer::new(classes)).map(Storm)
    }
}
