//! The TAP port against the real kernel, in a network namespace of each test's own thread. Needs root and iproute2.

#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::reading::push;
use super::*;
use crate::limits::FRAME_MAX_BYTES;
use crate::mem::Span;
use crate::offload;
use crate::port::testing::{self, Shard};
use crate::sys::tap::enter_fresh_network_namespace;
use crate::wire::virtio_net::VnetHeader;

mod kernel;
mod waiters;

/// The station that the tests play behind the port.
const STATION: [u8; 6] = [0x02, 0, 0, 0, 0, 0x22];
const STATION_IP: [u8; 4] = [192, 0, 2, 2];
const HOST_IP: [u8; 4] = [192, 0, 2, 1];

/// Runs `test` on a thread that has a network namespace of its own.
pub(super) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        enter_fresh_network_namespace();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` in the calling thread's namespace.
pub(super) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.expect("this test needs `ip`: install iproute2");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn tap(interface: &str, mtu: Option<u16>) -> Result<Arc<Tap>, TapError> {
    let tap = Tap::unopened(&TapConfig { interface: interface.into(), mtu }, &Arc::default())?;
    tap.0.tend();
    tap.0.wait_until_opened(Instant::now())?;
    Ok(tap)
}

/// What the port says of itself when somebody has just had a look.
fn link(port: &Tap) -> LinkState {
    port.0.tend();
    port.link()
}

fn set_offloads(port: &Tap, offloads: Needs) {
    port.set_offloads(offloads);
    port.0.tend();
}

/// Polls until `done` says so. What a port closes may live on for a moment in a child that another test's thread is just
/// starting: descriptors close when it executes its program.
pub(super) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "not in a minute: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The port on an interface that was just given up.
fn tap_again(interface: &str, mtu: Option<u16>) -> Arc<Tap> {
    let mut port = None;
    wait_until("the interface is free again", || match tap(interface, mtu) {
        Err(TapError::Busy(_)) => false,
        other => {
            port = Some(other.unwrap());
            true
        }
    });
    port.unwrap()
}

/// A port whose host side has an address and knows the station's.
fn addressed(interface: &str) -> Arc<Tap> {
    let port = tap(interface, None).unwrap();
    ip(&format!("addr add 192.0.2.1/24 dev {interface}"));
    ip(&format!("neigh add 192.0.2.2 lladdr 02:00:00:00:00:22 dev {interface}"));
    port
}

/// The Internet checksum (RFC 1071) of `bytes`; 0 over what contains its own right checksum.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A UDP datagram from the station to `port` of the host, as a frame to `mac`, without UDP checksum.
fn datagram(mac: [u8; 6], port: u16, payload: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0];
    ip.extend((28 + payload.len() as u16).to_be_bytes());
    ip.extend([0, 1, 0, 0, 64, 17, 0, 0]);
    ip.extend([STATION_IP, HOST_IP].concat());
    let sum = checksum(&ip).to_be_bytes();
    ip[10..12].copy_from_slice(&sum);
    let mut frame = [&mac[..], &STATION, &[8, 0], &ip].concat();
    for field in [4000, port, 8 + payload.len() as u16, 0] {
        frame.extend(field.to_be_bytes());
    }
    frame.extend(payload);
    frame
}

/// The frames to the station that come in until there are `count`, or for ten seconds. The host sends others of its own.
pub(super) fn receive_to_station(queue: &dyn Receive, shard: &Shard, count: usize) -> Vec<Vec<u8>> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut got = Vec::new();
    while got.len() < count && Instant::now() < deadline {
        got.extend(testing::receive_all(queue).into_iter().filter(|frame| frame.starts_with(&STATION)));
        if got.len() < count && queue.arm() {
            shard.wait(1);
        }
        queue.disarm();
    }
    got
}

#[test]
fn without_offloads_what_the_host_sends_has_complete_checksums() {
    in_namespace(|| {
        let port = addressed("lc0");
        set_offloads(&port, Needs::NONE);
        let (queue, shard) = (port.receive_queues().remove(0), Shard::new());
        queue.attach(Some(shard.clone()));
        let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
        for len in [1, 20, 21, 22, 23, 1472, 4000] {
            let payload: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            socket.send_to(&payload, "192.0.2.2:9").unwrap();
            // 4000 bytes do not fit the MTU of 1500: the host sends three fragments.
            let fragments = if len == 4000 { 3 } else { 1 };
            let frames = receive_to_station(&*queue, &shard, fragments);
            assert_eq!(frames.len(), fragments, "of {len} bytes");
            let mut got = Vec::new();
            for frame in &frames {
                assert_eq!(frame[12..14], [8, 0]);
                assert_eq!(checksum(&frame[14..34]), 0, "IPv4 header");
                got.extend(&frame[34..]);
            }
            let pseudo = [&HOST_IP[..], &STATION_IP, &[0, 17], &(8 + len as u16).to_be_bytes()].concat();
            assert_eq!(got[8..], payload);
            assert_eq!(checksum(&[pseudo, got].concat()), 0, "UDP of {len} bytes");
        }
        queue.attach(None);
        assert_eq!(port.detail()["read-errors"], 0);
    });
}

#[test]
fn a_burst_longer_than_a_batch_is_received_in_order_and_wakes_the_resting_shard() {
    in_namespace(|| {
        let port = addressed("lc0");
        let (queue, shard) = (port.receive_queues().remove(0), Shard::new());
        queue.attach(Some(shard.clone()));
        assert!(shard.wakes() > 0, "a look at what came before");
        let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
        let sender = std::thread::spawn(move || {
            for i in 0..300u16 {
                socket.send_to(&i.to_be_bytes(), "192.0.2.2:9").unwrap();
            }
        });
        let frames = receive_to_station(&*queue, &shard, 300);
        sender.join().unwrap();
        let numbers: Vec<u16> = frames.iter().map(|frame| u16::from_be_bytes([frame[42], frame[43]])).collect();
        assert_eq!(numbers, (0..300).collect::<Vec<_>>());
        wait_until("the queue may rest", || testing::receive_all(&*queue).is_empty() && queue.arm());
    });
}

/// The host side's address, which it shows by sending a frame.
fn host_mac(queue: &dyn Receive, shard: &Shard) -> [u8; 6] {
    UdpSocket::bind("192.0.2.1:0").unwrap().send_to(b"?", "192.0.2.2:9").unwrap();
    let frame = receive_to_station(queue, shard, 1).remove(0);
    *frame[6..].first_chunk().unwrap()
}

#[test]
fn what_is_transmitted_the_host_receives_and_every_frame_has_an_end() {
    in_namespace(|| {
        let port = addressed("lc0");
        let (queue, side, shard) = (port.receive_queues().remove(0), port.transmit_side(), Shard::new());
        queue.attach(Some(shard.clone()));
        let mac = host_mac(&*queue, &shard);
        let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let to = socket.local_addr().unwrap().port();
        let payloads: Vec<Vec<u8>> = [1, 22, 23, 300, 1472].iter().map(|&len| vec![len as u8; len]).collect();
        let frames: Vec<Vec<u8>> = payloads.iter().map(|payload| datagram(mac, to, payload)).collect();
        let outcome = testing::transmit(&*side, &frames);
        assert_eq!(outcome.delivered, 0b1_1111, "{:?}", port.detail());
        let mut buffer = [0; 2000];
        for payload in &payloads {
            let (len, from) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..len], from.to_string().as_str()), (&payload[..], "192.0.2.2:4000"));
        }

        ip("link set lc0 down");
        assert_eq!(link(&port), LinkState::Down("interface lc0 is down: `ip link set lc0 up`".into()));
        // What is on its way by then is lost, and told apart from what the host has; what comes then is refused at once.
        let outcome = testing::transmit(&*side, &frames[..2]);
        assert_eq!(outcome.delivered, 0b11);
        wait_until("the host has refused them", || port.handover().refused == 2);
        let outcome = testing::transmit(&*side, &frames[..2]);
        assert_eq!((outcome.delivered, outcome.reasons[0]), (0, DropReason::HostRefused));
        assert_eq!(port.detail()["transmitted-frames"], 5);
        assert_eq!(port.detail()["refused-frames"], 4);
        assert_eq!(port.detail()["last-error"], "Input/output error (os error 5)");
        ip("link set lc0 up");
        assert_eq!(link(&port), LinkState::Up);
        wait_until("frames reach the host again", || {
            testing::transmit(&*side, &frames[..1]);
            port.detail()["transmitted-frames"].as_u64() > Some(5)
        });
    });
}

#[test]
fn an_interface_that_was_made_for_the_port_goes_with_it_even_if_a_queue_is_still_held() {
    in_namespace(|| {
        let control = InterfaceControl::open().unwrap();
        let name = "lc0".parse().unwrap();
        let port = tap("lc0", Some(9000)).unwrap();
        assert_eq!((link(&port), control.mtu(&name).unwrap()), (LinkState::Up, 9000));
        let (queue, side, shard) = (port.receive_queues().remove(0), port.transmit_side(), Shard::new());
        queue.attach(Some(shard.clone()));
        drop(port);
        let gone = || control.flags(&name).is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV));
        wait_until("the interface is gone", gone);
        let outcome = testing::transmit(&*side, &[vec![0; 60]]);
        assert_eq!((outcome.delivered, outcome.reasons[0]), (0, DropReason::LinkDown));
        assert!(testing::receive_all(&*queue).is_empty() && queue.arm());
        assert_eq!(link(&tap("lc0", None).unwrap()), LinkState::Up);
    });
}

#[test]
fn a_shard_does_not_wait_for_whoever_opens_or_ends_the_port() {
    in_namespace(|| {
        let port = tap("lc0", None).unwrap();
        let (queue, side) = (port.receive_queues().remove(0), port.transmit_side());
        let taken = port.0.device.write().unwrap();
        let outcome = testing::transmit(&*side, &[vec![0; 60]]);
        assert_eq!((outcome.delivered, outcome.reasons[0]), (0, DropReason::LinkDown));
        assert!(testing::receive_all(&*queue).is_empty() && !queue.arm());
        assert_eq!(port.handover(), Handover::default());
        drop(taken);
        assert_eq!(testing::transmit(&*side, &[vec![0; 60]]).delivered, 1);
    });
}

#[test]
fn a_persistent_interface_is_used_and_stays() {
    in_namespace(|| {
        ip("tuntap add dev lc0 mode tap");
        let port = tap("lc0", None).unwrap();
        assert_eq!(link(&port), LinkState::Up);
        assert_eq!((&port.detail()["persistent"], &port.detail()["mtu"]), (&true.into(), &1500.into()));
        assert!(matches!(tap("lc0", None).err(), Some(TapError::Busy(_))));
        drop(port);
        assert_eq!(link(&tap_again("lc0", None)), LinkState::Up);
        assert!(InterfaceControl::open().unwrap().flags(&"lc0".parse().unwrap()).is_ok(), "it stays");
    });
}

#[test]
fn an_interface_may_be_renamed_moved_or_deleted_under_the_port() {
    in_namespace(|| {
        let port = tap("lc0", None).unwrap();
        let (queue, shard) = (port.receive_queues().remove(0), Shard::new());
        queue.attach(Some(shard.clone()));
        ip("link set lc0 down");
        ip("link set lc0 name lc1");
        assert!(matches!(link(&port), LinkState::Down(reason) if reason.contains("interface lc1 is down")));
        assert_eq!(port.detail()["interface"], "lc1");
        // A process that has a network namespace of its own until its input ends.
        let mut held = std::process::Command::new("unshare");
        held.args(["--net", "sh", "-c", "echo; read end"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut held = held.spawn().unwrap();
        held.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        ip(&format!("link set lc1 netns {}", held.id()));
        assert!(
            matches!(link(&port), LinkState::Impaired(reason) if reason.contains("lc1 is in another network namespace"))
        );
        // A namespace that ends takes its interfaces with it.
        drop(held.stdin.take());
        held.wait().unwrap();
        wait_until("the namespace is gone", || matches!(link(&port), LinkState::Gone(_)));
        assert!(matches!(link(&port), LinkState::Gone(reason) if reason.contains("lc0 was deleted")));
        testing::receive_all(&*queue);
        assert!(queue.arm(), "a shard can rest beside a dead interface");
        wait_until("frames are refused", || {
            let outcome = testing::transmit(&*port.transmit_side(), &[vec![0; 60]]);
            (outcome.delivered, outcome.reasons[0]) == (0, DropReason::HostRefused)
        });
    });
}

#[test]
fn refusals_say_what_to_do() {
    in_namespace(|| {
        let said = |interface, mtu| tap(interface, mtu).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(said("a/b", None).contains("\"a/b\" is not an interface name"));
        assert!(said("lo", None).contains("not a TAP interface with one queue"), "{}", said("lo", None));
        ip("tuntap add dev lcmq mode tap multi_queue");
        assert!(said("lcmq", None).contains("ip link del lcmq"));
        assert!(said("lc0", Some(65_535)).contains("68 to 65521"));
        ip("tuntap add dev lcp0 mode tap");
        ip("link set lcp0 up mtu 2000");

        // From here on the thread lacks the capability; a thread's capabilities are its own.
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::NET_ADMIN);
        rustix::thread::set_capabilities(None, sets).unwrap();
        assert!(said("lc1", None).contains("attach to lc1: give the daemon CAP_NET_ADMIN"), "{}", said("lc1", None));
        assert!(said("lcp0", Some(1500)).contains("set the MTU of lcp0"));
        // An interface that was prepared needs no capability.
        assert_eq!(link(&tap_again("lcp0", Some(2000))), LinkState::Up);
    });
}

#[test]
fn a_header_that_cannot_be_is_a_drop_with_its_reason() {
    use crate::verdict::Verdict;
    let record = |flags, gso_type, len: usize| {
        let mut record = vec![0; VNET_HEADER_BYTES + len];
        record[..2].copy_from_slice(&[flags, gso_type]);
        record
    };
    let dropped = |reason| Verdict::Drop(reason);
    for (mut bytes, verdict) in [
        (record(0, 0, 60), Verdict::Pending),
        (record(2, 0, 60), Verdict::Pending), // VIRTIO_NET_HDR_F_DATA_VALID asks for nothing.
        (record(1, 0, 60), dropped(DropReason::ChecksumInvalid)),
        (record(1, 3, 60), dropped(DropReason::OffloadNotNegotiated)),
        (record(0, 1, 60), dropped(DropReason::GsoInvalid)),
        (record(0, 0, 13), dropped(DropReason::FrameTooShort)),
        (record(0, 0, FRAME_MAX_BYTES), Verdict::Pending),
        (record(0, 0, FRAME_MAX_BYTES + 1), dropped(DropReason::FrameTooLong)),
        (vec![0; 11], dropped(DropReason::HeaderTruncated)),
    ] {
        let len = bytes.len();
        let mut heads = crate::frame::heads();
        let mut batch = Batch::new(&mut heads, 0);
        push(&mut batch, &mut bytes, Needs::ALL);
        assert_eq!((batch.len(), batch.frames()[0].verdict), (1, verdict));
        assert_eq!(batch.frames()[0].len as usize, len.saturating_sub(VNET_HEADER_BYTES));
    }
}
