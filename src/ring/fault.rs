//! What can be wrong with a ring: [`RingError`] when it is set up, [`RingFault`] while it runs.
//!
//! Both are shown to operators word for word, so each says what was found, with its numbers.

/// Why a ring could not be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is zero, too large, or not a power of two (virtio 1.3, 2.7).
    #[error("a ring of {0} descriptors is not possible: the size must be a power of two up to 32768")]
    Size(u16),
    /// The size of a packed ring is zero or too large (virtio 1.3, 2.8.10.1).
    #[error("a packed ring of {0} descriptors is not possible: the size must be 1 to 32768")]
    PackedSize(u16),
    /// The base of a packed ring is a descriptor that the ring does not have.
    #[error("a packed ring of {size} descriptors cannot go on at {base:#06x} (bit 15 is the wrap counter)")]
    Base {
        /// What the front end said.
        base: u16,
        /// Descriptors of the ring.
        size: u16,
    },
    /// One of the three areas is not within one region of the memory that the VM shares.
    #[error(
        "the {area} area of {len} bytes at guest address {address:#x} is not in memory that the VM shares; share all of it (share=on)"
    )]
    Unmapped {
        /// Which area.
        area: &'static str,
        /// Its guest-physical address.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// One of the three areas does not have the alignment of virtio 1.3, 2.7.
    #[error("the {area} area at guest address {address:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// Which area.
        area: &'static str,
        /// Its guest-physical address.
        address: u64,
        /// The alignment it must have.
        align: usize,
    },
    /// The ring is already running.
    #[error("the ring is already running")]
    Running,
}

/// What the driver wrote into a running ring that no driver may write. The ring is stopped for it. A chain is named by
/// its first descriptor, in rings of either form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// The available index moved by more than the ring has entries.
    #[error("the driver's available index jumped from {from} to {to} in a ring of {size}")]
    AvailableJump {
        /// Where we had read up to.
        from: u16,
        /// What the driver wrote.
        to: u16,
        /// Descriptors of the ring.
        size: u16,
    },
    /// A chain begins with a descriptor that the ring does not have.
    #[error("the driver made descriptor {head} available in a ring of {size}")]
    Head {
        /// The index that the driver wrote.
        head: u16,
        /// Descriptors of the ring.
        size: u16,
    },
    /// A descriptor's `next` is one that its table does not have.
    #[error("descriptor chain {head} goes on at descriptor {next} of a table of {size}")]
    Next {
        /// The chain.
        head: u16,
        /// The index that the driver wrote.
        next: u16,
        /// Descriptors of the table.
        size: u16,
    },
    /// A chain has more descriptors than its table: it loops.
    #[error("descriptor chain {head} does not end within the {size} descriptors of its table")]
    Loop {
        /// The chain.
        head: u16,
        /// Descriptors of the table.
        size: u16,
    },
    /// A packed ring has more descriptors available than it has slots, or a chain that goes all the way round it.
    #[error(
        "the descriptor chain at {head} runs into descriptors of a ring of {size} that the driver has not got back"
    )]
    Overrun {
        /// The chain's first descriptor.
        head: u16,
        /// Descriptors of the ring.
        size: u16,
    },
    /// A descriptor allows the wrong direction of access.
    #[error("descriptor chain {head} has a {found} buffer where the device must find {expected} ones only")]
    Direction {
        /// The chain.
        head: u16,
        /// What the descriptor allows.
        found: &'static str,
        /// What it must allow.
        expected: &'static str,
    },
    /// An indirect table that was not negotiated, is nested, combined with `next`, empty, too long or of odd length.
    #[error("descriptor chain {head} has an indirect table that is not allowed: {why} (length {len} bytes)")]
    Indirect {
        /// The chain.
        head: u16,
        /// What is not allowed about it.
        why: &'static str,
        /// The table's length in bytes.
        len: u32,
    },
    /// A buffer or an indirect table is not in memory that the VM shares.
    #[error(
        "descriptor chain {head} points at guest address {address:#x} ({len} bytes), which the VM does not share; share all of its memory (share=on)"
    )]
    Unmapped {
        /// The chain.
        head: u16,
        /// Guest-physical address of the buffer.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// The areas of the ring itself went away with the memory they were in.
    #[error("the memory that held the ring was taken away while it ran")]
    MemoryGone,
}
