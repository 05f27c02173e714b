//! Single values of a configuration, as types that cannot hold a bad one.
//!
//! Each reads itself in its visitor, so that an error points at the very value and not at the mapping around it. What a
//! value may be is said once, in `EXPECTED` or in the reason that its parser gives. Durations and CPU lists have files of
//! their own, [`super::time`] and [`super::cpus`].

use std::fmt;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Unexpected, Visitor, value::SeqAccessDeserializer};

use crate::ident::{MacAddr, Name};

/// Why a scalar was refused.
pub(super) enum Fault {
    /// It is something else: the message says what was expected and what was found.
    Unlike,
    /// For this reason.
    Because(String),
}

/// A value that is written as one word or number.
pub(super) trait Scalar: Sized {
    /// What is expected, with its article: "a duration with its unit, as in 300s".
    const EXPECTED: &'static str;

    fn from_text(_text: &str) -> Result<Self, Fault> {
        Err(Fault::Unlike)
    }

    fn from_whole(_number: u64) -> Result<Self, Fault> {
        Err(Fault::Unlike)
    }
}

struct ScalarVisitor<T>(PhantomData<T>);

impl<T: Scalar> Visitor<'_> for ScalarVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        T::from_text(text).map_err(|fault| match fault {
            Fault::Unlike => E::invalid_value(Unexpected::Str(text), &self),
            Fault::Because(reason) => E::custom(reason),
        })
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        T::from_whole(number).map_err(|fault| match fault {
            Fault::Unlike => E::invalid_value(Unexpected::Unsigned(number), &self),
            Fault::Because(reason) => E::custom(reason),
        })
    }
}

/// Reads a `T` with serde; what [`deserialize_scalar`] implements `Deserialize` by.
pub(super) fn deserialize<'de, T: Scalar, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_any(ScalarVisitor(PhantomData))
}

macro_rules! deserialize_scalar {
    ($($type:ty),*) => {$(
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::config::scalar::deserialize(deserializer)
            }
        }
    )*};
}
pub(super) use deserialize_scalar;

deserialize_scalar!(
    Version, Mode, FilePath, SocketPath, Interface, Account, StationMac, Endpoint, LabelKey, LabelValue
);

/// The version of the format.
#[derive(Debug)]
pub(super) struct Version;

impl Scalar for Version {
    const EXPECTED: &'static str = "1, the version of the format that this linecard reads";

    fn from_whole(number: u64) -> Result<Self, Fault> {
        if number == 1 { Ok(Self) } else { Err(Fault::Unlike) }
    }
}

/// Permission bits of a file. In quotes because YAML versions disagree about what a bare 0660 is.
#[derive(Debug)]
pub(super) struct Mode(pub(super) u32);

impl Scalar for Mode {
    const EXPECTED: &'static str = "octal permissions in quotes, as in \"0660\"";

    fn from_text(text: &str) -> Result<Self, Fault> {
        let octal = matches!(text.len(), 3 | 4) && text.bytes().all(|b| (b'0'..=b'7').contains(&b));
        let mode = u32::from_str_radix(text, 8).ok().filter(|&mode| octal && mode <= 0o777);
        mode.map(Self).ok_or(Fault::Unlike)
    }
}

/// An absolute path that means the same to whoever reads it.
#[derive(Debug)]
pub(super) struct FilePath(pub(super) PathBuf);

impl Scalar for FilePath {
    const EXPECTED: &'static str = "an absolute path";

    fn from_text(text: &str) -> Result<Self, Fault> {
        let path = Path::new(text);
        if text.contains('\0') || !path.is_absolute() {
            return Err(Fault::Unlike);
        }
        if path.components().any(|part| part == Component::ParentDir) {
            return Err(Fault::Because("a path with `..` in it may name the same file twice: write it out".into()));
        }
        Ok(Self(path.into()))
    }
}

/// The path of a Unix socket.
#[derive(Debug)]
pub(super) struct SocketPath(pub(super) PathBuf);

/// `sun_path` holds 108 bytes with the final NUL (unix(7)).
const SOCKET_PATH_BYTES: usize = 107;

impl Scalar for SocketPath {
    const EXPECTED: &'static str = "the absolute path of a socket";

    fn from_text(text: &str) -> Result<Self, Fault> {
        if text.len() > SOCKET_PATH_BYTES {
            let long = text.len();
            return Err(Fault::Because(format!(
                "the path is {long} bytes long; a socket's has at most {SOCKET_PATH_BYTES}"
            )));
        }
        let FilePath(path) = FilePath::from_text(text)?;
        if path.file_name().is_none() || text.ends_with('/') {
            return Err(Fault::Because("the path names a directory, not a socket".into()));
        }
        Ok(Self(path))
    }
}

/// The name of a network interface, as `dev_valid_name` (net/core/dev.c) takes it, without the `%d` of a pattern.
#[derive(Debug)]
pub(super) struct Interface(pub(super) String);

impl Scalar for Interface {
    const EXPECTED: &'static str = "the name of an interface: 1 to 15 bytes without / : % or spaces";

    fn from_text(text: &str) -> Result<Self, Fault> {
        let plain = text.bytes().all(|b| b.is_ascii_graphic() && !b"/:%".contains(&b));
        let good = plain && (1..libc::IFNAMSIZ).contains(&text.len()) && text != "." && text != "..";
        if good { Ok(Self(text.into())) } else { Err(Fault::Unlike) }
    }
}

/// A user or a group, by name or number.
#[derive(Debug)]
pub(super) struct Account(pub(super) String);

impl Scalar for Account {
    const EXPECTED: &'static str = "the name or the number of a user or group";

    fn from_text(text: &str) -> Result<Self, Fault> {
        // useradd(8): up to 32 bytes; a colon would end the field in passwd(5).
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-$@\\".contains(&b));
        if plain && (1..=32).contains(&text.len()) { Ok(Self(text.into())) } else { Err(Fault::Unlike) }
    }

    fn from_whole(number: u64) -> Result<Self, Fault> {
        // The largest 32-bit id means "no change" to chown(2).
        if number < u64::from(u32::MAX) { Ok(Self(number.to_string())) } else { Err(Fault::Unlike) }
    }
}

/// A MAC address that a station may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct StationMac(pub(super) MacAddr);

impl Scalar for StationMac {
    const EXPECTED: &'static str = "a MAC address in quotes, as in \"52:54:00:12:34:56\"";

    fn from_text(text: &str) -> Result<Self, Fault> {
        let mac: MacAddr = text.parse().map_err(|_| Fault::Unlike)?;
        if mac.is_station() {
            return Ok(Self(mac));
        }
        let kind = if mac.is_group() { "a group address (its first byte is odd)" } else { "all zero" };
        Err(Fault::Because(format!("{mac} is {kind}: no station can have it")))
    }
}

/// An IP address and a port number to listen on.
#[derive(Debug)]
pub(super) struct Endpoint(pub(super) SocketAddr);

impl Scalar for Endpoint {
    const EXPECTED: &'static str = "an IP address and a port, as in \"127.0.0.1:9477\" or \"[::1]:9477\"";

    fn from_text(text: &str) -> Result<Self, Fault> {
        text.parse().map(Self).map_err(|_| Fault::Unlike)
    }
}

/// The key of a label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LabelKey(pub(super) String);

impl Scalar for LabelKey {
    const EXPECTED: &'static str = "a label's key: 1 to 63 of a-z A-Z 0-9 . _ - /";

    fn from_text(text: &str) -> Result<Self, Fault> {
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b));
        if plain && (1..=63).contains(&text.len()) { Ok(Self(text.into())) } else { Err(Fault::Unlike) }
    }
}

/// The value of a label: a number or a boolean has to be quoted, so that it stays what was written.
#[derive(Debug)]
pub(super) struct LabelValue(pub(super) String);

impl Scalar for LabelValue {
    const EXPECTED: &'static str = "a label's value: a text of at most 255 bytes on one line";

    fn from_text(text: &str) -> Result<Self, Fault> {
        let good = text.len() <= 255 && !text.contains(char::is_control);
        if good { Ok(Self(text.into())) } else { Err(Fault::Unlike) }
    }

    fn from_whole(number: u64) -> Result<Self, Fault> {
        Err(Fault::Because(format!("a label's value is a text: write \"{number}\" in quotes")))
    }
}

/// A whole number from `MIN` to `MAX`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Whole<const MIN: u64, const MAX: u64>(pub(super) u64);

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Whole<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number<const MIN: u64, const MAX: u64>;
        impl<const MIN: u64, const MAX: u64> Visitor<'_> for Number<MIN, MAX> {
            type Value = u64;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a whole number from {MIN} to {MAX}")
            }
            fn visit_u64<E: Error>(self, number: u64) -> Result<u64, E> {
                let good = (MIN..=MAX).contains(&number);
                if good { Ok(number) } else { Err(E::invalid_value(Unexpected::Unsigned(number), &self)) }
            }
        }
        deserializer.deserialize_any(Number::<MIN, MAX>).map(Self)
    }
}

impl<const MIN: u64, const MAX: u64> Whole<MIN, MAX> {
    /// The number as a type that all of the range fits.
    pub(super) fn u16(self) -> u16 {
        const { assert!(MAX <= u16::MAX as u64) };
        self.0 as u16
    }

    /// The number as a type that all of the range fits.
    pub(super) fn u32(self) -> u32 {
        const { assert!(MAX <= u32::MAX as u64) };
        self.0 as u32
    }
}

/// One name or a list of them.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) names: Vec<Name>,
    /// Whether it was written as a list, so that places can be found.
    pub(super) list: bool,
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NamesVisitor;
        impl<'de> Visitor<'de> for NamesVisitor {
            type Value = Names;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name or a list of names")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Names, E> {
                Ok(Names { names: vec![text.parse().map_err(E::custom)?], list: false })
            }
            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Names, A::Error> {
                Ok(Names { names: Vec::deserialize(SeqAccessDeserializer::new(items))?, list: true })
            }
        }
        deserializer.deserialize_any(NamesVisitor)
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// What `text` reads as, if it does.
    pub(in super::super) fn text<T: Scalar>(text: &str) -> Option<T> {
        T::from_text(text).ok()
    }

    #[test]
    fn paths_permissions_and_names_are_what_the_kernel_takes() {
        assert_eq!(text::<Mode>("0660").unwrap().0, 0o660);
        assert_eq!(text::<Mode>("600").unwrap().0, 0o600);
        assert!(["660 ", "0o660", "0888", "1777", "7", "+660"].iter().all(|bad| text::<Mode>(bad).is_none()));
        assert!(text::<SocketPath>(&format!("/{}", "x".repeat(106))).is_some());
        assert!(text::<SocketPath>(&format!("/{}", "x".repeat(107))).is_none());
        assert!(["x", "", "/", "/a/", "/a/../b", "/a\0"].iter().all(|bad| text::<SocketPath>(bad).is_none()));
        assert!(text::<Interface>("abcdefghijklmno").is_some() && text::<Interface>("abcdefghijklmnop").is_none());
        assert!(["", ".", "..", "a/b", "a b", "tap%d", "a:1", "ä"].iter().all(|bad| text::<Interface>(bad).is_none()));
        assert!(text::<Account>("libvirt-qemu").is_some() && text::<Account>("a:b").is_none());
    }
}
