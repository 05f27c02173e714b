//! Why a message of a front end is refused: [`Refusal`].
//!
//! A refusal is answered with a NACK where the front end asked for an ack, is logged, and changes nothing. It does not end
//! the connection: for a NIC that would mean no network until somebody reconnects, and most front ends go on without
//! what was refused.

use std::io;

use super::message::Request;
use super::offence::Offence;
use crate::limits::{MTU_RANGE, QUEUE_PAIRS};
use crate::mem::{DirtyLogError, MappingError};
use crate::ring::RingError;

/// Why a message is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("ring {index} does not exist: the port has {pairs} queue pairs, give it more or the VM fewer")]
    NoSuchRing { index: u32, pairs: usize },
    #[error("feature bits {0:#x} were not offered")]
    NotOffered(u64),
    #[error("features cannot change from {from:#x} to {to:#x} while rings run")]
    FeaturesInUse { from: u64, to: u64 },
    #[error("ring {0} runs, its {1} cannot change")]
    RingRuns(usize, &'static str),
    #[error("ring {0} cannot have {1} entries: use a power of two up to 32768")]
    RingSize(usize, u32),
    #[error("ring {0} has no kick eventfd: polling without one is not supported")]
    NoKick(usize),
    #[error("ring {0}: its {1} eventfd is unusable")]
    Event(usize, &'static str, #[source] io::Error),
    #[error("the front end {0}: for {1} s nobody is served here")]
    Barred(Offence, u64),
    #[error("ring {ring}: its {area} is at {address:#x}, outside of the shared memory")]
    AreaUnmapped { ring: usize, area: &'static str, address: u64 },
    #[error("ring {0} is not aligned as virtio asks for")]
    RingUnaligned(usize),
    #[error("ring {0} cannot start")]
    Ring(usize, #[source] RingError),
    #[error("shared memory is unusable")]
    Memory(#[from] MappingError),
    #[error("the dirty log is unusable")]
    Log(#[from] DirtyLogError),
    #[error("its descriptor is no file on tmpfs or hugetlbfs but {0}: use memfd, /dev/shm or hugepages")]
    NoMemory(String),
    #[error(
        "linecardd has nearly all of its {0} descriptors in use: raise LimitNOFILE= of its unit (ulimit -Hn) and restart it"
    )]
    NoDescriptors(u64),
    #[error("{0} regions came with {1} descriptors")]
    RegionFiles(usize, usize),
    #[error("pages of the shared memory are missing; it has to be shared anew")]
    MemoryFailed,
    #[error("an MTU of {0} is not in {low} to {high}", low = MTU_RANGE.start(), high = MTU_RANGE.end())]
    Mtu(u64),
    #[error("an MTU of {0} is more than the port's {1}")]
    MtuAbovePort(u64, u16),
    #[error("{0} is not an address that a station can have")]
    NotAStation(crate::ident::MacAddr),
    #[error("too many announcements in a second")]
    TooManyAnnouncements,
    #[error("{0} is not served")]
    Unserved(Request),
    #[error("its body is malformed")]
    Malformed,
    #[error("rings are numbered below {rings}", rings = 2 * QUEUE_PAIRS)]
    RingNumber,
}

impl Refusal {
    /// Whether the port cannot do its work because of it, so that it is the reason to show for a link that is down.
    pub(super) fn is_obstacle(&self) -> bool {
        !matches!(
            self,
            Self::Mtu(_)
                | Self::Log(_)
                | Self::NotAStation(_)
                | Self::TooManyAnnouncements
                | Self::Unserved(_)
                | Self::Malformed
                | Self::RingNumber
        )
    }

    /// The sentence with those of its causes.
    pub(super) fn sentence(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}
