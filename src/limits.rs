//! Every bound of the product, in one place, each with its reason.
//!
//! A loop over anything that a guest, a peer or a file controls ends at one of these. Nothing here is tuned per host:
//! what an operator may set has its key in the configuration and only its ceiling here.

/// Frames in one batch. 64 frames of 76 copied bytes stay in a 32 KiB L1 cache together with their descriptors, and a
/// `u64` holds one bit per frame, which is how delivery is tracked.
pub const BATCH_FRAMES: usize = 64;

/// Scattered payload pieces that one batch can describe beyond the first piece of each frame.
pub const BATCH_SEGMENTS: usize = 512;

/// Pieces of guest memory one frame may be scattered over. A 64 KiB frame in 4 KiB pages needs 17; Linux drivers cap at 19.
pub const CHAIN_SEGMENTS: usize = 256;

/// Entries of an indirect descriptor table (virtio 1.3, 2.7.5.3.1: a driver never makes one longer than the ring, and
/// no driver in use goes over 1024).
pub const INDIRECT_DESCRIPTORS: u16 = 1024;

/// Largest split ring (virtio 1.3, 2.7: the queue size is at most 32768).
pub const RING_SIZE: u16 = 32768;

/// Queue pairs of a vNIC: KICK, CALL and ERR messages carry an 8-bit ring index, so 256 rings, so 128 pairs.
pub const QUEUE_PAIRS: usize = 128;

/// Bytes of a frame that are copied out of guest memory before anything is decided. All of a minimum-size frame.
pub const HEAD_BYTES: usize = 64;

/// The same of a frame that is to be segmented, whose headers are longer: with the virtio-net header two cache lines.
/// Enough for a VLAN tag, IPv6 and TCP with all the options that a data segment has in practice (12 bytes of 40).
pub const LONG_HEAD_BYTES: usize = 128 - VNET_HEADER_BYTES;

/// Bytes of headers that a frame to be segmented may have. All legal combinations of two VLAN tags, IPv4 with options and
/// TCP with options (142), and IPv6 with some extension headers.
pub const GSO_HEADER_BYTES: usize = 256;

/// Fewest payload bytes of a segment. With 64 KiB in a frame it bounds what one frame can become: 1365 segments.
/// Linux refuses smaller segments for the same reason (TCP_MIN_SND_MSS, 48, after CVE-2019-11479).
pub const GSO_SIZE_MIN: u16 = 48;

/// Datagrams that one frame may be. They may be as short as a byte; Linux makes no more of them at once (UDP_MAX_SEGMENTS of
/// linux/udp.h, 128 since 6.9 and 64 before).
pub const USO_SEGMENTS: usize = 128;

/// Bytes of the virtio-net header in front of a frame's head when its form has `num_buffers` (virtio 1.3, 5.1.6).
pub const VNET_HEADER_BYTES: usize = 12;

/// Smallest frame that carries anything: two addresses and an EtherType (IEEE 802.3, without padding and FCS).
pub const FRAME_MIN_BYTES: usize = 14;

/// Largest frame a guest may hand over: a full-size IP packet, its Ethernet header and two VLAN tags.
pub const FRAME_MAX_BYTES: usize = 65_535 + 14 + 8;

/// Bytes that one turn takes from one queue before it moves on, so that jumbo senders do not hold a shard 40 times as
/// long as others. 64 frames of 4 KiB.
pub const BATCH_BYTES: usize = 256 * 1024;

/// What one visit of a queue may come to, in frames written to ports, where frames become many by flooding or segmentation. A
/// KiB counts as one as well, and a port that is flooded to as [`VISIT_PORT_WORK`]. With some 150 ns for each it is 0.15 ms that
/// others wait. One frame to one port is always done, and may be 1763: 1365 segments of 48 bytes behind headers of 250.
pub const VISIT_WORK: u32 = 1024;

/// What a port that is flooded to counts as beside the frames: its ring is taken and given back, and its guest interrupted.
pub const VISIT_PORT_WORK: u32 = 8;

/// Descriptors of long chains that one turn walks in one queue, or in all queues of one receiver, before it moves on: a chain may have as many as its ring
/// (32768), all empty, and 64 of those would hold a shard for milliseconds. At most one chain begins beyond this.
pub const BATCH_DESCRIPTORS: usize = 4096;

/// Ports of one host. Port numbers are 16 bits wide in an FDB entry; the ceiling keeps per-shard tables small.
pub const PORTS: usize = 4096;

/// Networks of one host: the FDB key carries 16 bits of network number.
pub const NETWORKS: usize = 4096;

/// Profiles of one configuration. Each heir has a copy of its parents' settings, up to 64 labels among them, and a chain of as
/// many profiles as fit a file would make a thousand times its length of it.
pub const PROFILES: usize = 1024;

/// Shards of one host: a counter block per port and shard exists.
pub const SHARDS: usize = 64;

/// FDB entries of one host, over all networks.
pub const FDB_ENTRIES: usize = 1 << 20;

/// FDB entries that are listed at once: some 400 KiB of JSON, while the FDB may have 200 MiB of it.
pub const FDB_PAGE: usize = 2048;

/// MAC addresses that one port may teach the switch unless its configuration says otherwise.
pub const PORT_MACS_DEFAULT: u32 = 4096;

/// Stations of each port that are learned however many others have: no limit of its network or of the host counts for them, only the
/// port's own. A VM has one address for each vNIC, and a router some virtual ones (VRRP), a container each with macvlan. All
/// ports together have a sixteenth of [`FDB_ENTRIES`] of them, for which the table has room beside those.
pub const PORT_MACS_SHARE: u32 = 16;

/// Frames in a second that one vNIC may have flooded unless its configuration says otherwise: broadcasts. A booting guest sends
/// some ten, one that looks for a whole /24 by ARP 254; every other guest of the network pays for each with an interrupt.
pub const STORM_BROADCAST_DEFAULT: u32 = 1000;

/// The same for multicasts. A stream of 4K video at 25 Mbit/s has 2,400 frames in a second, one of audio (AES67) 1000, what finds
/// neighbours, routers and services (ND, MLD, VRRP, mDNS) some ten. A Linux guest that is in none of the groups spends 10 % of a
/// CPU on 1000 frames in a second, each with its interrupt, and 15 % on 5,000 and on 10,000, whose interrupts are held back.
pub const STORM_MULTICAST_DEFAULT: u32 = 10_000;

/// The same for frames to stations that nobody knows, which is what the first frames of a flow are, and all of a flow to a
/// station that never answers.
pub const STORM_UNKNOWN_UNICAST_DEFAULT: u32 = 5000;

/// Largest bound of that kind that may be set, so that what a bucket holds fits 32 bits. No shard can flood as many.
pub const STORM_RATE: u32 = 100_000_000;

/// Frames that a port may have flooded at once, however low its bound: what a guest sends when it boots.
pub const STORM_BURST_MIN: u32 = 16;

/// Frames that a port may have flooded at once if its bound lets it have as many in a second: QEMU's longest ring. That can be full
/// of what a guest has sent within its bound when nobody took it for a while.
pub const STORM_BURST_RING: u32 = 1024;

/// Memory regions that one front end may share. QEMU's own ceiling is 509 slots with CONFIGURE_MEM_SLOTS.
pub const MEMORY_REGIONS: usize = 509;

/// Guest memory that one front end may share whatever its port is configured for, in bytes: 16 TiB, beyond any host, so that
/// sums stay far from overflow.
pub const MEMORY_BYTES: u64 = 1 << 44;

/// Changes of what memory is mapped that one port may ask for at once: a VM of [`MEMORY_REGIONS`] twice over. Each costs every
/// shard's CPU a TLB flush.
pub const MEMORY_CHANGES: u32 = 1024;

/// Those that it may ask for in a second from then on.
pub const MEMORY_CHANGES_PER_SECOND: u32 = 100;

/// vhost-user messages that one port takes at once. The start of a VM with 128 queue pairs takes QEMU some 4000, its firmware has
/// another, and so has the end of each.
pub const MESSAGES: u32 = 16_384;

/// Those that it takes in a second from then on. One costs about 10 us of a CPU, and its front end as much.
pub const MESSAGES_PER_SECOND: u32 = 1000;

/// Smallest and largest MTU a port may have, in bytes: IPv4's minimum (RFC 791) and what a 16-bit length can say.
pub const MTU_RANGE: std::ops::RangeInclusive<u16> = 68..=65_535;

/// Bytes of the body of a vhost-user message that are read before it is refused. The largest known body, SET_MEM_TABLE
/// with 32 regions, has 1032.
pub const VHOST_USER_BODY_BYTES: usize = 4096;

/// Bytes of a piece of memory that frames for a TAP interface wait in: an Ethernet frame with its header.
pub const TAP_PIECE_BYTES: usize = 2048;

/// How many of them a TAP port has at most, 16 MiB. A single sender may have two thirds: 160 of the largest frames, and more than what two
/// TCP connections of Linux have on their way at most (`tcp_wmem`, 4 MiB).
pub const TAP_PIECES: usize = 8192;

/// How many of them it has before it needs more, 2 MiB: what a guest sends at once out of a ring of usual size has room.
pub const TAP_PIECES_AT_FIRST: usize = 1024;

/// Frames that wait in a `loopback` or `faulty` port until they are received again, before its queue is full.
pub const LOOPBACK_FRAMES: usize = 1024;

/// Bytes of those frames: a queue full of full-size Ethernet frames.
pub const LOOPBACK_BYTES: u32 = 2 * 1024 * 1024;

/// Bytes of a capture file that a `replay` port sends from; all of it is held in memory.
pub const REPLAY_BYTES: u64 = 64 * 1024 * 1024;

/// Stations that are told of because one port sees them where they are not.
pub const PORT_CONFLICTS: usize = 32;

/// Events that are kept for whoever asks: some hours of a busy host, in less than a MiB.
pub const EVENTS: usize = 1024;

/// Bytes of a reason in an event. Reasons may quote what a front end or a file said.
pub const EVENT_REASON_BYTES: usize = 512;

/// Lines that are logged in a minute for events of one kind at one port.
pub const EVENT_LOG_LINES: u32 = 10;

/// Milliseconds that a port's memory may hold shards up in times that are too short to be told by themselves, beyond a tenth of the
/// time that passes. Twice what one front end can keep who maps memory waiting at once, so that nobody pays for another's.
pub const HELD_UP_MILLIS: u64 = 200;

/// Requests that may follow events at the same time; each holds a connection.
pub const EVENT_FOLLOWERS: usize = 16;

/// How many of them may be of those who may look but not change anything, so that they leave room for the others.
pub const EVENT_FOLLOWERS_READ_ONLY: usize = 8;

/// Connections to the API of those who may change something: people, scripts and hooks, each for a moment.
pub const API_CONNECTIONS: usize = 64;

/// Those of users who may look only, all together.
pub const API_CONNECTIONS_READ_ONLY: usize = 64;

/// Connections to the address of `daemon.metrics`. A scraper has one.
pub const METRICS_CONNECTIONS: usize = 64;

/// Lines of the log that wait for the thread that writes them. More than come at once where a thousand ports lose their front ends.
pub const LOG_LINES: usize = 2048;

/// Bytes of them.
pub const LOG_BYTES: usize = 512 * 1024;

const _: () = assert!(BATCH_FRAMES == u64::BITS as usize, "a u64 has one bit per frame of a batch");
const _: () =
    assert!(PORT_MACS_SHARE as usize * PORTS <= FDB_ENTRIES / 16, "shares are few beside what a host may have");
const _: () = assert!(PORTS <= u16::MAX as usize && NETWORKS <= u16::MAX as usize);
