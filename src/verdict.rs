//! What happens to a frame: [`Verdict`], and the closed list of reasons for dropping one, [`DropReason`].
//!
//! One reason is one counter per port, one row in docs/drop-reasons.md (made from this list and checked against it by a
//! test) and one test that provokes it. Every received frame ends as delivered or under exactly one reason.

use crate::ident::PortIndex;

/// What the switch decided for one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing yet: the frame was received and waits for the switch.
    Pending,
    /// Deliver to this port.
    Deliver(PortIndex),
    /// Deliver to every port of the network but the one it came from.
    Flood,
    /// Drop, for this reason.
    Drop(DropReason),
}

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident => $name:literal, $advice:literal;)+) => {
        /// Why a frame was dropped.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl DropReason {
            /// Every reason, in the order of their counters.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The reason's name in counters, metrics and the command line: kebab-case.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// What it means, in a sentence.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc,)+).trim_ascii(),)+ }
            }

            /// What an operator can do about it, in a sentence.
            pub const fn advice(self) -> &'static str {
                match self { $(Self::$variant => $advice,)+ }
            }
        }
    };
}

drop_reasons! {
    /// The frame is shorter than an Ethernet header.
    FrameTooShort => "frame-too-short", "The sender's driver is broken or hostile; look at the VM.";
    /// The frame is longer than any frame can be.
    FrameTooLong => "frame-too-long", "The sender's driver is broken or hostile; look at the VM.";
    /// The frame's payload is longer than the port's MTU.
    MtuExceeded => "mtu-exceeded", "Give both ends of the network the same MTU, in the guests and in the profile.";
    /// The buffer that carries the frame is shorter than the virtio-net header.
    HeaderTruncated => "header-truncated", "The sender's driver is broken or hostile; look at the VM.";
    /// The virtio-net header asks for an offload that was not negotiated.
    OffloadNotNegotiated => "offload-not-negotiated", "The sender's driver is broken or hostile; look at the VM.";
    /// The virtio-net header asks for a checksum that does not lie within the frame.
    ChecksumInvalid => "checksum-invalid", "The sender's driver is broken or hostile; look at the VM.";
    /// The virtio-net header asks for segments that the frame cannot be cut into: another protocol, headers that do not fit, segments too small, no checksum asked for.
    GsoInvalid => "gso-invalid", "The sender's driver is broken or hostile; `ethtool -K DEV tso off` in the guest avoids it.";
    /// The frame lies in more pieces of guest memory than one frame may.
    TooManySegments => "too-many-segments", "The sender's driver is broken or hostile; look at the VM.";
    /// The sender's queue is disabled, so what it sends is thrown away.
    QueueDisabled => "queue-disabled", "The guest sends on a queue that it has not enabled; check `ethtool -l` in the guest.";
    /// The source address is a group address or all zero.
    SourceInvalid => "source-invalid", "No station may send from such an address; look at the VM.";
    /// The source address is one that stays at another port, because it was seen at several in turn too often.
    SourceDamped => "source-damped", "Give each VM a MAC address of its own, and take apart what connects two ports: `linecard port show` names the other one.";
    /// The source address is the configured one (`mac`) of another port.
    SourcePinned => "source-pinned", "The VM uses another one's address, or connects two ports: `linecard port show` names the other one.";
    /// The destination is one of the addresses that bridges keep to the link (IEEE 802.1Q, table 8-1).
    LinkLocalGroup => "link-local-group", "Nothing to do: LLDP, LACP, STP and pause frames end at the switch. A guest that bridges two of its NICs in one network is not kept from a loop by its spanning tree, then.";
    /// The destination is behind the port that the frame came from.
    SamePort => "same-port", "Nothing to do, unless two stations behind one port expect the switch to reflect frames.";
    /// The port sent more broadcasts, multicasts or frames to unknown stations in a second, or at once, than its `storm` allows.
    StormLimited => "storm-limited", "Look for a loop or a scan in the VM; `linecard port show` says which kind it was. If it has to send as many, raise `storm` of its port or profile.";
    /// No other port is in the network, or none of them is up.
    NoDestination => "no-destination", "Add the other ports of the network, or start their VMs.";
    /// The receiver has posted no free buffer, or too few for the frame; of a large frame, none for its first segment.
    RingFull => "ring-full", "The receiver is slower than the sender: give its VM more CPU, queues or a longer ring. Or its interface is down in the guest, so it posts none. Or it posts few buffers, as firmware that boots from the network does, and large frames go to it: `offloads: { tso: false }` of the TAP port that sends, or `ethtool -K DEV tso off` in the guest that sends.";
    /// The receiver's buffers are too small for the frame and it cannot merge them.
    BufferTooSmall => "buffer-too-small", "Switch on mrg_rxbuf for the receiver, or lower the MTU of the sender.";
    /// The receiver's queue was in use for longer than a batch takes: the receiver's VM or the host held up who was in it.
    ReceiverBusy => "receiver-busy", "`linecard port show` of the receiver and the log say if its VM did it; else give shards CPUs that nobody else uses.";
    /// The receiver has no connection or has not started its queues.
    LinkDown => "link-down", "Start the receiver's VM, or see `linecard port show` for why its port is down.";
    /// The receiver's queue was stopped because of what its guest wrote into it, or because its memory lacks pages.
    RingFaulted => "ring-faulted", "See `linecard port show` of the receiver; its guest must reset the device.";
    /// The host takes frames of the TAP interface more slowly than this sender sends them, or takes long for each.
    HostBusy => "host-busy", "Look who sends more than the host takes (`linecard drops`), what the host does with frames, and who uses the CPUs of `tap-NAME`.";
    /// The host's network stack did not take the frame.
    HostRefused => "host-refused", "Bring the TAP interface up and look at its own drop counters (`ip -s link`).";
    /// A fault was injected on purpose by a `faulty` port.
    FaultInjected => "fault-injected", "Remove the `faulty` port when the test is over.";
}

impl DropReason {
    /// How many reasons there are: the length of a counter block.
    pub const COUNT: usize = Self::ALL.len();

    /// The reason's place in a counter block.
    pub const fn index(self) -> usize {
        self as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_named_once_in_kebab_case_and_indexed_in_order() {
        for (i, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), i);
            assert!(reason.name().bytes().all(|b| b.is_ascii_lowercase() || b == b'-'), "{}", reason.name());
            assert!(reason.meaning().ends_with(".") || reason.meaning().ends_with(")."), "{}", reason.meaning());
            assert_eq!(DropReason::ALL.iter().filter(|r| r.name() == reason.name()).count(), 1);
        }
    }
}
