//! A host that takes long for a frame, because very many wait for the socket that it is for.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll;

use super::*;
use crate::ident::PortIndex;
use crate::sys::toll::thread_time;

/// Duplicates of the socket, each of which is in each of the sets.
const DUPLICATES: usize = 1000;

/// Whatever one frame takes the host at least.
const LONG: Duration = Duration::from_millis(20);

/// A set that waits for all of `sockets`.
fn set(sockets: &[OwnedFd]) -> OwnedFd {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let add = |socket| epoll::add(&set, socket, epoll::EventData::new_u64(0), epoll::EventFlags::IN).unwrap();
    sockets.iter().for_each(add);
    set
}

#[test]
fn what_the_host_does_with_a_frame_takes_nothing_of_who_transmits_it_and_little_of_other_senders() {
    in_namespace(|| {
        ip("link set lo up");
        let port = addressed("lc0");
        let (queue, side, shard) = (port.receive_queues().remove(0), port.transmit_side(), Shard::new());
        queue.attach(Some(shard.clone()));
        let mac = host_mac(&*queue, &shard);
        let bind = || {
            let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let to = socket.local_addr().unwrap().port();
            (socket, to)
        };
        let ((socket, to), (other, to_other)) = (bind(), bind());
        let duplicates: Vec<_> = (0..DUPLICATES).map(|_| socket.as_fd().try_clone_to_owned().unwrap()).collect();
        let (own, mut sets, mut buffer) = (UdpSocket::bind("192.0.2.1:0").unwrap(), Vec::new(), [0; 100]);
        // Whoever sends to it does all of that.
        let mut took = || {
            let before = thread_time();
            own.send_to(b"?", ("192.0.2.1", to)).unwrap();
            let took = thread_time().saturating_sub(before);
            socket.recv_from(&mut buffer).unwrap();
            took
        };
        while !(0..3).all(|_| took() > LONG) {
            sets.push(set(&duplicates));
        }
        let before = thread_time();
        let slow: Vec<_> = (0..50).map(|number| datagram(mac, to, &[number; 20])).collect();
        assert_eq!(testing::transmit(&*side, &slow).delivered.count_ones(), 50);
        let took = thread_time().saturating_sub(before);
        // Fifty times as long if it is done here.
        assert!(took < LONG, "{took:?}");
        let (len, _) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..len], [0; 20]);

        // Whose frames these are is shut out after some of them, and the rest is dropped; others' frames get there.
        wait_until("it is shut out, and that is told", || {
            testing::transmit(&*side, &slow[..1]);
            matches!(link(&port), LinkState::Impaired(reason) if reason.contains("ms for one frame"))
        });
        other.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        // A host that is slow itself may be late with one.
        wait_until("another one's frame gets there", || {
            let outcome = testing::transmit_from(PortIndex(1), &*side, &[datagram(mac, to_other, &[7; 20])]);
            outcome.delivered == 1 && other.recv_from(&mut buffer).is_ok_and(|(len, _)| buffer[..len] == [7; 20])
        });
        wait_until("the rest is dropped", || port.handover().late > 0);
    });
}
