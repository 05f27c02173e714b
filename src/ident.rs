//! Names and numbers that identify things, as types that cannot hold a bad value.
//!
//! Names come from operators and are checked when they are parsed; indexes are given out by the control side and are
//! always below their bound in [`crate::limits`]. Nothing here does I/O.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;

/// Why a name, an address or a size in text form was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// A port, network or profile name that is empty, too long or has a character we do not allow.
    #[error("\"{0}\" is not a name: use 1 to 63 of a-z A-Z 0-9 . _ - and begin with a letter or a digit")]
    Name(String),
    /// Text that is not six hexadecimal bytes.
    #[error("\"{0}\" is not a MAC address: write six bytes as in 52:54:00:12:34:56")]
    Mac(String),
}

/// Name of a port, a network or a profile: what operators type, and part of file names in the state directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Box<str>);

impl Name {
    /// Longest name, in bytes: a DNS label's, so that names fit metric labels, file names and libvirt's own limits.
    pub const MAX_BYTES: usize = 63;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let plain = |b: u8| b.is_ascii_alphanumeric();
        let bytes = text.as_bytes();
        let good = bytes.first().is_some_and(|&b| plain(b))
            && bytes.len() <= Self::MAX_BYTES
            && bytes.iter().all(|&b| plain(b) || matches!(b, b'.' | b'_' | b'-'));
        if good { Ok(Self(text.into())) } else { Err(ParseError::Name(text.chars().take(80).collect())) }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl serde::Serialize for Name {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for Name {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer, "a name")
    }
}

/// A 48-bit IEEE 802 MAC address, in the order of the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// The group address that every station receives.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether the individual/group bit is set: broadcast or multicast (IEEE 802, 8.2).
    pub fn is_group(self) -> bool {
        self.0[0] & 1 == 1
    }

    /// Whether this is an address that a station may send from: individual and not all zero.
    pub fn is_station(self) -> bool {
        !self.is_group() && self.0 != [0; 6]
    }

    /// The address as the low 48 bits of a number, first byte highest.
    pub fn to_bits(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }

    /// The address whose [`MacAddr::to_bits`] are the low 48 bits of `bits`.
    pub fn from_bits(bits: u64) -> Self {
        let [_, _, a, b, c, d, e, f] = bits.to_be_bytes();
        Self([a, b, c, d, e, f])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let refused = || ParseError::Mac(text.chars().take(80).collect());
        let mut mac = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or_else(refused)?;
        }
        if parts.next().is_some() { Err(refused()) } else { Ok(Self(mac)) }
    }
}

impl serde::Serialize for MacAddr {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for MacAddr {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer, "a MAC address")
    }
}

/// Number of a port of this host, given out by the control side; below [`crate::limits::PORTS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortIndex(pub u16);

/// Number of a network of this host, given out by the control side; below [`crate::limits::NETWORKS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkIndex(pub u16);

/// Number of a shard of this host, in the order of its CPUs; below [`crate::limits::SHARDS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardIndex(pub u16);

impl PortIndex {
    /// The number as an index into a table.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl NetworkIndex {
    /// The number as an index into a table.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl ShardIndex {
    /// The number as an index into a table.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// How much a port minds delay and jitter, ascending: the words that vSphere users know. What each does to a queue:
/// `shard::idle`, `shard::placement`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LatencySensitivity {
    /// Sleeps at once; notifications may be held back.
    Low,
    /// Polls for a short while, then sleeps.
    #[default]
    Normal,
    /// Polls for longer, notifies at once.
    Medium,
    /// Never sleeps, never coalesces.
    High,
}

impl fmt::Display for LatencySensitivity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Low => "low",
            Self::Normal => "normal",
            Self::Medium => "medium",
            Self::High => "high",
        })
    }
}

/// Which queues stay together on one shard. What each means: `shard::placement`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Affinity {
    /// As is best for the port's latency sensitivity.
    #[default]
    Auto,
    /// All ports of a VM.
    Vm,
    /// The queues of a port.
    Vnic,
    /// None.
    Queue,
}

/// A set of features that a port offers, frozen under a name: the same on every host and in every later version, so that a
/// VM that was started against it finds it wherever it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
pub enum Compat {
    /// All that this switch can do, as of November 2026.
    #[default]
    #[serde(rename = "2026.11")]
    V2026_11,
    /// The same without checksum and segmentation offloads, for guests that take frames apart themselves.
    #[serde(rename = "2026.11-no-offload")]
    V2026_11NoOffload,
}

impl fmt::Display for Compat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V2026_11 => "2026.11",
            Self::V2026_11NoOffload => "2026.11-no-offload",
        })
    }
}

/// Reads a value in its text form, so that a deserializer's error points at the scalar itself.
fn parsed<'de, D, T>(deserializer: D, what: &'static str) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: FromStr<Err = ParseError>,
{
    struct Text<T>(&'static str, std::marker::PhantomData<T>);
    impl<T: FromStr<Err = ParseError>> serde::de::Visitor<'_> for Text<T> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
            text.parse().map_err(E::custom)
        }
    }
    deserializer.deserialize_str(Text(what, std::marker::PhantomData))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn mac_addresses_round_trip_and_bad_ones_are_refused() {
        let mac: MacAddr = "52:54:00:12:34:5f".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:12:34:5f");
        assert_eq!(MacAddr::from_bits(mac.to_bits()), mac);
        assert!(mac.is_station() && !MacAddr::BROADCAST.is_station() && !MacAddr([0; 6]).is_station());
        for bad in
            ["", "52:54:00:12:34", "52:54:00:12:34:5f:00", "52:54:00:12:34:+f", "525400123456", "zz:54:00:12:34:5f"]
        {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_safe_as_file_names() {
        for good in ["vm1-eth0", "a", "7", "web.prod_2"] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }
}
