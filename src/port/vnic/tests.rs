//! A vNIC against front ends that send what QEMU, DPDK and hostile programs send, over real sockets and memfds.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vhost::vhost_user::message::{FrontendReq as Req, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use super::*;
use crate::sys::eventfd::EventFd;

mod budget;
mod busy;
mod connections;
mod divided;
mod idle;
mod interrupts;
mod kicks;
mod lost;
mod memory;
mod published;

/// Where the test guest's memory is, in the front end's address space; guest-physical addresses begin at zero.
const USER: u64 = 0x7f00_0000_0000;
const MEMORY: u64 = 0x10_0000;
const RING: u64 = 256;
const FEATURES: u64 = 0x1_7000_8000 | 1 << 22;
const NEED_REPLY: u32 = 8;

/// A directory, an acceptor and a port in it.
struct Host {
    dir: tempfile::TempDir,
    acceptor: Acceptor,
}

impl Host {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), acceptor: Acceptor::start().unwrap() }
    }

    fn config(&self, name: &str) -> VnicConfig {
        VnicConfig {
            name: name.parse().unwrap(),
            socket: self.dir.path().join(name),
            mode: Mode::Server,
            queue_pairs: 2,
            mtu: Some(9000),
            owner: None,
            group: None,
            permissions: 0o600,
            memory: None,
            mac: None,
            compat: crate::ident::Compat::default(),
            records: None,
        }
    }

    fn port(&self, name: &str) -> Arc<Vnic> {
        Vnic::new(self.config(name), &self.acceptor).unwrap()
    }

    fn connect(&self, name: &str) -> Raw {
        Raw(UnixStream::connect(self.dir.path().join(name)).unwrap())
    }
}

/// A front end that sends any message, in any order.
struct Raw(UnixStream);

impl Drop for Raw {
    /// Hangs up. Closing alone would not: a child that another test is just forking has a copy until it executes.
    fn drop(&mut self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

impl Raw {
    fn send(&mut self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        let header = [request, 1 | flags, body.len() as u32].map(u32::to_ne_bytes).concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let parts = [IoSlice::new(&header), IoSlice::new(body)];
        rustix::net::sendmsg(&self.0, &parts, &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    fn reply(&mut self, request: u32) -> Vec<u8> {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).unwrap();
        assert_eq!(header[..8], [request, 5].map(u32::to_ne_bytes).concat());
        let mut body = vec![0; header[8] as usize];
        self.0.read_exact(&mut body).unwrap();
        body
    }

    fn get(&mut self, request: Req) -> u64 {
        self.send(request as u32, 0, &[], &[]);
        u64::from_ne_bytes(self.reply(request as u32).try_into().unwrap())
    }

    /// Sends with NEED_REPLY and returns whether it was done.
    fn done(&mut self, request: Req, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.done_raw(request as u32, body, fds)
    }

    fn done_raw(&mut self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.send(request, NEED_REPLY, body, fds);
        match u64::from_ne_bytes(self.reply(request).try_into().unwrap()) {
            0 => true,
            1 => false,
            other => panic!("neither ack nor nack: {other}"),
        }
    }

    fn base(&mut self, ring: u32) -> u32 {
        self.send(Req::GET_VRING_BASE as u32, 0, &state(ring, 0), &[]);
        let reply = self.reply(Req::GET_VRING_BASE as u32);
        assert_eq!(reply[..4], ring.to_ne_bytes());
        u32::from_ne_bytes(reply[4..].try_into().unwrap())
    }

    /// Negotiates protocol features as QEMU does, so that refusals are heard of.
    fn negotiate(&mut self) {
        assert_eq!(self.get(Req::GET_FEATURES), features::offered(crate::ident::Compat::default()));
        let protocol = self.get(Req::GET_PROTOCOL_FEATURES);
        assert_eq!(protocol, 0x801f);
        self.send(Req::SET_PROTOCOL_FEATURES as u32, 0, &protocol.to_ne_bytes(), &[]);
    }

    /// The messages that start a ring, in QEMU's order: NUM, BASE, ADDR, KICK, CALL.
    fn start(&mut self, ring: u32, base: u32, guest: &Guest) {
        assert!(self.done(Req::SET_VRING_NUM, &state(ring, RING as u32), &[]));
        assert!(self.done(Req::SET_VRING_BASE, &state(ring, base), &[]));
        assert!(self.done(Req::SET_VRING_ADDR, &addresses(ring), &[]));
        let fd = u64::from(ring).to_ne_bytes();
        assert!(self.done(Req::SET_VRING_KICK, &fd, &[guest.kick.as_fd()]));
        assert!(self.done(Req::SET_VRING_CALL, &fd, &[guest.call.as_fd()]));
    }

    /// Waits for the end of the connection. One that is closed with something unread in it is reset.
    fn is_closed(&mut self) -> bool {
        self.0.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        match self.0.read(&mut [0]) {
            Ok(read) => read == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

fn state(index: u32, number: u32) -> Vec<u8> {
    [index, number].map(u32::to_ne_bytes).concat()
}

/// Descriptor table, available and used ring of `ring`, in guest-physical addresses: 16 KiB for each ring.
fn areas(ring: u32) -> [u64; 3] {
    let at = u64::from(ring) * 0x4000;
    [at, at + 16 * RING, at + 0x2000]
}

fn addresses(ring: u32) -> Vec<u8> {
    let [descriptors, available, used] = areas(ring).map(|guest| USER + guest);
    [state(ring, 0), [descriptors, used, available, 0].map(u64::to_ne_bytes).concat()].concat()
}

/// What a guest brings: memory and eventfds.
struct Guest {
    memory: File,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
}

impl Guest {
    fn new() -> Self {
        let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY).unwrap();
        let event = || EventFd::new().unwrap();
        Self { memory, kick: event(), call: event(), error: event() }
    }

    fn region(&self) -> Vec<u8> {
        [0, 0, MEMORY, USER, 0].map(u64::to_ne_bytes).concat()
    }

    /// As if so many buffers had been offered and used.
    fn set_indexes(&self, ring: u32, index: u16) {
        let [_, available, used] = areas(ring);
        for at in [available, used] {
            self.memory.write_all_at(&index.to_le_bytes(), at + 2).unwrap();
        }
    }

    /// Descriptors of this process for the guest's files; the guest itself holds one of each.
    fn descriptors(&self) -> [usize; 4] {
        let events = [&self.kick, &self.call, &self.error].map(|event| count(&event_id(event.as_raw_fd())));
        let inode = std::os::unix::fs::MetadataExt::ino(&self.memory.metadata().unwrap());
        let memory = fds().filter(|fd| {
            let there = std::fs::metadata(format!("/proc/self/fd/{fd}"));
            there.is_ok_and(|file| std::os::unix::fs::MetadataExt::ino(&file) == inode)
        });
        [memory.count(), events[0], events[1], events[2]]
    }
}

fn fds() -> impl Iterator<Item = i32> {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn event_id(fd: i32) -> String {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
    info.lines().find(|line| line.starts_with("eventfd-id")).unwrap_or_default().to_owned()
}

fn count(id: &str) -> usize {
    assert!(!id.is_empty());
    fds().filter(|&fd| event_id(fd) == id).count()
}

fn eventually(what: &str, check: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !check() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until the front end is gone and cleaned up after. The link is no sign of that: it is down with the last ring.
fn eventually_free(port: &Vnic) {
    eventually("the port is free", || port.detail()["connected"] == false);
    assert!(is_down(port));
}

fn is_down(port: &Vnic) -> bool {
    matches!(port.link(), LinkState::Down(_))
}

#[test]
fn qemu_10_gets_through_its_whole_life() {
    let (host, guest) = (Host::new(), Guest::new());
    let port = host.port("vm1");
    assert!(matches!(port.link(), LinkState::Down(why) if why.starts_with("waiting for the VM at ")));
    let mut qemu = host.connect("vm1");
    // Device creation, with two queue pairs.
    for pair in 0..2u64 {
        qemu.negotiate();
        if pair == 0 {
            assert_eq!(qemu.get(Req::GET_QUEUE_NUM), 128);
        }
        assert_eq!(qemu.get(Req::GET_MAX_MEM_SLOTS), 509);
        if pair == 0 {
            qemu.send(Req::SET_OWNER as u32, 0, &[], &[]);
        }
        qemu.get(Req::GET_FEATURES);
        for ring in [2 * pair, 2 * pair + 1] {
            qemu.send(Req::SET_VRING_CALL as u32, 0, &ring.to_ne_bytes(), &[guest.call.as_fd()]);
            qemu.send(Req::SET_VRING_ERR as u32, 0, &ring.to_ne_bytes(), &[guest.error.as_fd()]);
        }
    }
    // Realize: enable before any SET_FEATURES.
    for (ring, enabled) in [(0, 1), (1, 1), (2, 0), (3, 0)] {
        assert!(qemu.done(Req::SET_VRING_ENABLE, &state(ring, enabled), &[]));
    }
    assert!(matches!(port.link(), LinkState::Down(why) if why.contains("has not started")));
    assert!(port.memory_nodes().is_none());
    // DRIVER_OK.
    assert!(qemu.done(Req::NET_SET_MTU, &1450u64.to_ne_bytes(), &[]));
    for ring in 0..4 {
        guest.set_indexes(ring, 5);
    }
    for pair in 0..2 {
        qemu.send(Req::SET_FEATURES as u32, 0, &FEATURES.to_ne_bytes(), &[]);
        // 10 sends it once, 7.2 once per pair.
        assert!(qemu.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
        guest.call.drain();
        for ring in [2 * pair, 2 * pair + 1] {
            qemu.start(ring, 5, &guest);
        }
        assert!(guest.call.drain() >= 2, "a new call eventfd of a running ring is signalled");
    }
    assert_eq!(port.link(), LinkState::Up);
    let detail = port.detail();
    assert_eq!(detail["peer"]["pid"], std::process::id());
    assert_eq!(detail["device"]["guest_mtu"], 1450);
    assert_eq!(detail["device"]["header_bytes"], 12);
    assert_eq!(detail["device"]["memory"]["regions"], 1);
    eventually("the session has looked at where the memory lies", || port.memory_nodes().is_some());
    let nodes = port.memory_nodes().unwrap();
    assert_eq!(port.detail()["device"]["memory"]["numa_node"], json!(nodes.node()));
    // The kernel tells, unless it has no NUMA or a container's filter says no.
    assert_eq!(!nodes.is_empty(), crate::sys::numa::nodes_of(&[&raw const nodes as usize]).is_ok());
    let queues = detail["queues"].as_array().unwrap();
    let enabled: Vec<_> = queues.iter().map(|queue| queue["enabled"].as_bool().unwrap()).collect();
    assert_eq!(enabled, [true, true, false, false]);
    assert!(queues.iter().all(|queue| queue["started"] == true && queue["size"] == RING));
    // ethtool -L; a live SET_VRING_ADDR of dirty logging; stop and cont with a base that QEMU moved meanwhile.
    assert!(qemu.done(Req::SET_VRING_ENABLE, &state(2, 1), &[]));
    assert!(qemu.done(Req::SET_VRING_ADDR, &addresses(0), &[]));
    assert!((0..4).all(|ring| qemu.base(ring) == 5));
    assert!(is_down(&port));
    guest.set_indexes(1, 11);
    qemu.send(Req::SET_FEATURES as u32, 0, &FEATURES.to_ne_bytes(), &[]);
    qemu.start(1, 11, &guest);
    assert_eq!((port.link(), qemu.base(1)), (LinkState::Up, 11), "enabled outlives the stop");
    drop(qemu);
    eventually_free(&port);
    assert_eq!(guest.descriptors(), [1; 4]);
}

#[test]
fn the_vhost_crates_own_front_end_starts_and_stops_rings() {
    let (host, guest) = (Host::new(), Guest::new());
    let port = host.port("vm1");
    let mut front = Frontend::connect(host.dir.path().join("vm1"), 4).unwrap();
    front.set_owner().unwrap();
    front.get_features().unwrap();
    let offered = front.get_protocol_features().unwrap();
    front.set_protocol_features(offered).unwrap();
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert!(offered.contains(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS));
    front.set_features(FEATURES).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: MEMORY,
        userspace_addr: USER,
        mmap_offset: 0,
        mmap_handle: guest.memory.as_raw_fd(),
    };
    front.set_mem_table(&[region]).unwrap();
    front.set_mem_table(&[region]).unwrap();
    let (kick, call) =
        (vmm_sys_util::eventfd::EventFd::new(0).unwrap(), vmm_sys_util::eventfd::EventFd::new(0).unwrap());
    // cloud-hypervisor's order: the base after the addresses, the kick last.
    for ring in 0..2 {
        let [desc_table_addr, avail_ring_addr, used_ring_addr] = areas(ring as u32).map(|guest| USER + guest);
        let areas = VringConfigData {
            queue_max_size: RING as u16,
            queue_size: RING as u16,
            flags: 0,
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: None,
        };
        front.set_vring_num(ring, RING as u16).unwrap();
        front.set_vring_addr(ring, &areas).unwrap();
        front.set_vring_base(ring, 0).unwrap();
        front.set_vring_call(ring, &call).unwrap();
        front.set_vring_kick(ring, &kick).unwrap();
    }
    assert!(is_down(&port), "started, not enabled");
    front.set_vring_enable(0, true).unwrap();
    front.set_vring_enable(1, true).unwrap();
    assert_eq!(port.link(), LinkState::Up);
    assert_eq!(front.get_vring_base(0).unwrap(), 0);
    front.remove_mem_region(&region).unwrap();
    drop(front);
    eventually_free(&port);
    assert_eq!(guest.descriptors()[0], 1);
}

#[test]
fn messages_that_nobody_serves_are_refused_and_the_connection_goes_on() {
    let (host, guest) = (Host::new(), Guest::new());
    let _port = host.port("vm1");
    let mut front = host.connect("vm1");
    front.negotiate();
    // SET_LOG_FD, IOTLB_MSG, SET_VRING_ENDIAN, GET_CONFIG, POSTCOPY_ADVISE, RESET_DEVICE, SET_STATUS, and made-up ones.
    for request in [7, 22, 23, 24, 28, 34, 39, 40, 45, 4711, 0, u32::MAX] {
        assert!(!front.done_raw(request, &[0; 100], &[guest.kick.as_fd(), guest.memory.as_fd()]), "{request}");
        front.send(request, 0, &[0; 4096], &[guest.kick.as_fd()]);
    }
    assert!(!front.done(Req::SEND_RARP, &[0; 7], &[]));
    assert!(!front.done(Req::SEND_RARP, &[1, 0, 0x5e, 0, 0, 1, 0, 0], &[]));
    assert!(front.done(Req::SEND_RARP, &[0x52, 0x54, 0, 1, 2, 3, 0, 0], &[]));
    for bad in [0, 67, 9001, 65_536] {
        assert!(!front.done(Req::NET_SET_MTU, &u64::to_ne_bytes(bad), &[]));
    }
    assert!(front.done(Req::NET_SET_MTU, &9000u64.to_ne_bytes(), &[]));
    front.get(Req::GET_FEATURES);
    assert_eq!(guest.descriptors(), [1; 4]);
}

#[test]
fn what_cannot_be_done_is_refused_and_changes_nothing() {
    let (host, guest) = (Host::new(), Guest::new());
    let port = host.port("vm1");
    let mut front = host.connect("vm1");
    front.negotiate();
    assert!(!front.done(Req::SET_FEATURES, &(FEATURES | 1 << 40).to_ne_bytes(), &[]));
    assert!(front.done(Req::SET_FEATURES, &FEATURES.to_ne_bytes(), &[]));
    for size in [0, 255, 32769, 65536, u32::MAX] {
        assert!(!front.done(Req::SET_VRING_NUM, &state(0, size), &[]), "{size}");
    }
    let (pipe, _other) = std::io::pipe().unwrap();
    assert!(!front.done(Req::SET_VRING_KICK, &0u64.to_ne_bytes(), &[pipe.as_fd()]));
    assert!(!front.done(Req::SET_VRING_CALL, &0u64.to_ne_bytes(), &[pipe.as_fd()]));
    assert!(!front.done(Req::SET_VRING_KICK, &0x100u64.to_ne_bytes(), &[]), "polling");
    assert!(matches!(port.link(), LinkState::Stopped(why) if why.contains("no kick eventfd")));
    // Rings that the port does not have: none of them can be enabled, all may be disabled and asked for.
    assert!(!front.done(Req::SET_VRING_ENABLE, &state(4, 1), &[]));
    assert!(front.done(Req::SET_VRING_ENABLE, &state(4, 0), &[]));
    assert!(!front.done(Req::SET_VRING_ENABLE, &state(0x1_0000, 1), &[]));
    assert!(!front.done(Req::SET_VRING_KICK, &4u64.to_ne_bytes(), &[guest.kick.as_fd()]));
    assert_eq!(front.base(4), 0);
    assert!(!front.done(Req::SET_VRING_ENABLE, &state(255, 1), &[]));
    assert!(!front.done(Req::SET_VRING_ENABLE, &state(256, 1), &[]));
    let short = [0, 0, 2 * MEMORY, USER, 0].map(u64::to_ne_bytes).concat();
    assert!(!front.done(Req::ADD_MEM_REG, &short, &[guest.memory.as_fd()]));
    assert!(matches!(port.link(), LinkState::Stopped(why) if why.contains("of a file that has 1048576 bytes")));
    assert!(front.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
    front.start(0, 0, &guest);
    assert!(front.done(Req::SET_VRING_ENABLE, &state(0, 1), &[]));
    assert!(matches!(port.link(), LinkState::Impaired(why) if why.contains("uses 128 queue pairs and the port has 2")));
    assert!(front.done(Req::SET_VRING_ENABLE, &state(255, 0), &[]));
    assert_eq!(port.link(), LinkState::Up);
    // While it runs.
    assert!(!front.done(Req::SET_FEATURES, &(FEATURES & !(1 << 29)).to_ne_bytes(), &[]));
    assert!(front.done(Req::SET_FEATURES, &FEATURES.to_ne_bytes(), &[]));
    assert!(!front.done(Req::SET_VRING_BASE, &state(0, 3), &[]));
    assert!(!front.done(Req::SET_VRING_NUM, &state(0, 128), &[]));
    let elsewhere = [&addresses(1)[8..]].concat();
    assert!(!front.done(Req::SET_VRING_ADDR, &[state(0, 0), elsewhere].concat(), &[]));
    assert!(front.done(Req::SET_VRING_KICK, &0u64.to_ne_bytes(), &[guest.kick.as_fd()]));
    assert_eq!((port.link(), front.base(0)), (LinkState::Up, 0));
    drop(pipe);
}

#[test]
fn a_ring_starts_once_everything_is_known_in_whatever_order() {
    let (host, guest) = (Host::new(), Guest::new());
    let port = host.port("vm1");
    let mut front = host.connect("vm1");
    front.negotiate();
    let started = |port: &Vnic| port.detail()["queues"][1]["started"] == true;
    assert!(front.done(Req::SET_VRING_KICK, &1u64.to_ne_bytes(), &[guest.kick.as_fd()]));
    assert!(front.done(Req::SET_VRING_ADDR, &addresses(1), &[]));
    assert!(front.done(Req::SET_VRING_NUM, &state(1, RING as u32), &[]));
    assert!(!started(&port));
    let table = [state(1, 0), guest.region()[8..].to_vec()].concat();
    assert!(front.done(Req::SET_MEM_TABLE, &table, &[guest.memory.as_fd()]));
    assert!(started(&port));
    assert_eq!(port.link(), LinkState::Up, "without protocol features in SET_FEATURES rings are born enabled");
}

#[test]
fn a_ring_that_loses_its_memory_faults_and_a_new_start_heals_it() {
    let (host, guest) = (Host::new(), Guest::new());
    let port = host.port("vm1");
    let mut front = host.connect("vm1");
    front.negotiate();
    assert!(front.done(Req::SET_FEATURES, &FEATURES.to_ne_bytes(), &[]));
    assert!(front.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
    assert!(front.done(Req::SET_VRING_ERR, &1u64.to_ne_bytes(), &[guest.error.as_fd()]));
    assert!(front.done(Req::SET_VRING_ENABLE, &state(1, 1), &[]));
    front.start(1, 0, &guest);
    assert_eq!(port.link(), LinkState::Up);
    assert!(front.done(Req::REM_MEM_REG, &guest.region(), &[]));
    assert!(front.done(Req::REM_MEM_REG, &guest.region(), &[]), "7.2 removes it once per pair");
    assert!(matches!(port.link(), LinkState::Stopped(why) if why.starts_with("ring 1 stopped: ")));
    assert_eq!(guest.error.drain(), 1);
    front.base(1);
    assert!(front.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
    front.start(1, 0, &guest);
    assert_eq!(port.link(), LinkState::Up);
}

#[test]
fn a_memory_file_that_shrinks_stops_its_port_and_no_other() {
    let (host, guest, other) = (Host::new(), Guest::new(), Guest::new());
    let (port, neighbour) = (host.port("vm1"), host.port("vm2"));
    let start = |name: &str, guest: &Guest| {
        let mut front = host.connect(name);
        front.negotiate();
        assert!(front.done(Req::SET_FEATURES, &FEATURES.to_ne_bytes(), &[]));
        assert!(front.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
        assert!(front.done(Req::SET_VRING_ENABLE, &state(0, 1), &[]));
        front.start(0, 0, guest);
        front
    };
    let (mut front, _other) = (start("vm1", &guest), start("vm2", &other));
    assert_eq!((port.link(), neighbour.link()), (LinkState::Up, LinkState::Up));
    guest.memory.set_len(0).unwrap();
    // What a shard would do: touch the ring.
    let memory = port.attachment.memory().unwrap();
    let mut bytes = [1; 8];
    memory.span(0, 8, &mut 0).unwrap().read(&mut bytes);
    assert_eq!(bytes, [0; 8]);
    eventually("the port is stopped", || matches!(port.link(), LinkState::Stopped(_)));
    assert_eq!(neighbour.link(), LinkState::Up);
    assert!(matches!(port.link(), LinkState::Stopped(why) if why.contains("shrank")));
    // A guest reset does not mend it, new memory does.
    front.base(0);
    drop(memory);
    assert!(front.done(Req::REM_MEM_REG, &guest.region(), &[]));
    guest.memory.set_len(MEMORY).unwrap();
    assert!(front.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
    front.start(0, 0, &guest);
    assert_eq!(port.link(), LinkState::Up);
}

#[test]
fn half_a_message_and_nonsense_end_the_connection_and_free_the_port() {
    let host = Host::new();
    let port = host.port("vm1");
    let header = |words: [u32; 3]| words.map(u32::to_ne_bytes).concat();
    let reply_flag = header([1, 5, 0]);
    let huge = header([1, 1, 1 << 20]);
    let no_such_size = [header([8, 1, 3]), vec![0; 3]].concat();
    for bad in [header([1, 1, 0])[..7].to_vec(), header([8, 1, 8]), reply_flag, huge, no_such_size] {
        let mut front = host.connect("vm1");
        front.0.write_all(&bad).unwrap();
        assert!(front.is_closed());
        eventually_free(&port);
    }
    let mut front = host.connect("vm1");
    for byte in header([1, 1, 0]) {
        front.0.write_all(&[byte]).unwrap();
        std::thread::yield_now();
    }
    assert_eq!(front.reply(1).len(), 8, "a message may come in pieces");
}
