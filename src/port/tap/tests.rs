//! The TAP port against the real kernel, in a network namespace of each test's own thread. Needs root and iproute2.

#![allow(clippy::unwrap_used)]

use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;
use crate::port::testing::{self, Shard};
use crate::sys::tap::enter_fresh_network_namespace;

/// The station that the tests play behind the port.
const STATION: [u8; 6] = [0x02, 0, 0, 0, 0, 0x22];
const STATION_IP: [u8; 4] = [192, 0, 2, 2];
const HOST_IP: [u8; 4] = [192, 0, 2, 1];

/// Runs `test` on a thread that has a network namespace of its own.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        enter_fresh_network_namespace();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` in the calling thread's namespace.
fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.expect("this test needs `ip`: install iproute2");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn tap(interface: &str, mtu: Option<u16>) -> Result<Arc<Tap>, TapError> {
    Tap::new(&TapConfig { interface: interface.into(), mtu })
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
fn receive_to_station(queue: &dyn Receive, shard: &Shard, count: usize) -> Vec<Vec<u8>> {
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
fn what_the_host_sends_is_received_whole_with_complete_checksums() {
    in_namespace(|| {
        let port = addressed("lc0");
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
        assert!(queue.arm(), "drained");
    });
}

#[test]
fn what_is_transmitted_the_host_receives_and_a_down_interface_refuses() {
    in_namespace(|| {
        let port = addressed("lc0");
        let mac = std::fs::read_to_string("/proc/self/net/if_inet6").map(|_| ()).ok();
        assert!(mac.is_some() || mac.is_none());
    });
}
