//! The keeper with a kernel that has it wait. Needs root and iproute2.

#![allow(clippy::unwrap_used)]

use std::net::UdpSocket;

use super::*;
use crate::port::Port;
use crate::port::tap::tests::{in_namespace, ip, receive_to_station, wait_until};
use crate::port::tap::{Tap, TapConfig};
use crate::port::testing::{self, Shard};

/// A keeper, and what has it wait while it is held.
fn keeper() -> (Keeper, Arc<Mutex<()>>) {
    let keeper = Keeper::start().unwrap();
    let lock = keeper.kernel();
    (keeper, lock)
}

fn config(interface: &str) -> TapConfig {
    TapConfig { interface: interface.into(), mtu: None }
}

fn later() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

#[test]
fn who_looks_at_a_tap_that_nobody_can_ask_is_told_since_when() {
    in_namespace(|| {
        let (keeper, lock) = keeper();
        let ports = ["lc0", "lc1"].map(|name| Tap::new(&config(name), &keeper, later()).unwrap());
        assert_eq!(ports[0].link(), LinkState::Up);
        ip("link set lc1 down");
        wait_until("it is seen", || matches!(ports[1].link(), LinkState::Down(_)));
        let kernel = lock.lock().unwrap();
        let says = |link: LinkState| match link {
            LinkState::Impaired(reason) | LinkState::Down(reason) => reason,
            other => format!("{other:?}"),
        };
        wait_until("it is said", || ports.iter().all(|port| says(port.link()).contains("state unknown for ")));
        assert!(ports[0].link().is_up() && !ports[1].link().is_up(), "it is what it was");
        assert_eq!(ports[0].detail()["mtu"], 1500);
        ports[0].set_offloads(crate::frame::Needs::NONE);
        // That one is gone can be seen all the same.
        ip("link del lc1");
        assert!(matches!(ports[1].link(), LinkState::Gone(_)));
        drop(kernel);
        wait_until("it is asked again", || ports[0].link() == LinkState::Up);
    });
}

#[test]
fn a_tap_that_takes_long_to_open_is_up_when_it_is_open() {
    in_namespace(|| {
        let (keeper, lock) = keeper();
        let kernel = lock.lock().unwrap();
        let (port, removed) = {
            let new = |name| Tap::new(&config(name), &keeper, Instant::now() + Duration::from_millis(20)).unwrap();
            (new("lc0"), new("lc1"))
        };
        assert!(matches!(port.link(), LinkState::Down(reason) if reason.contains("has been waiting to be opened for")));
        let (queue, shard) = (port.receive_queues().remove(0), Shard::new());
        queue.attach(Some(shard.clone()));
        assert!(testing::receive_all(&*queue).is_empty() && queue.arm(), "a shard can rest");
        assert_eq!(testing::transmit(&*port.transmit_side(), &[vec![0; 60]]).delivered, 0);
        // Shards may still have one that was removed.
        let (side, wakes) = (removed.transmit_side(), shard.wakes());
        drop(removed);
        drop(kernel);
        wait_until("it is open", || port.link() == LinkState::Up);
        assert!(shard.wakes() > wakes, "the shard has a look");
        ip("addr add 192.0.2.1/24 dev lc0");
        ip("neigh add 192.0.2.2 lladdr 02:00:00:00:00:22 dev lc0");
        UdpSocket::bind("192.0.2.1:0").unwrap().send_to(b"!", "192.0.2.2:9").unwrap();
        assert_eq!(receive_to_station(&*queue, &shard, 1).len(), 1);
        std::thread::sleep(INTERVAL);
        assert_eq!(testing::transmit(&*side, &[vec![0; 60]]).delivered, 0, "nobody opens what was removed");
    });
}

#[test]
fn what_could_not_be_opened_is_told_in_time_and_tried_again_later() {
    in_namespace(|| {
        let (keeper, lock) = keeper();
        let first = Tap::new(&config("lc0"), &keeper, later()).unwrap();
        assert!(matches!(Tap::new(&config("lc0"), &keeper, later()).err(), Some(TapError::Busy(_))));
        let kernel = lock.lock().unwrap();
        let second = Tap::new(&config("lc0"), &keeper, Instant::now()).unwrap();
        drop(kernel);
        wait_until("it is refused", || matches!(second.link(), LinkState::Stopped(_)));
        let LinkState::Stopped(reason) = second.link() else { panic!("{:?}", second.link()) };
        assert!(reason.contains("lc0 is in use") && reason.contains("tried again every second"), "{reason}");
        drop(first);
        wait_until("it is open", || second.link() == LinkState::Up);
    });
}
