//! Message orders: what QEMU 7.2, QEMU 10, DPDK's virtio-user and cloud-hypervisor send, and the corners of the protocol
//! that a real VM reaches in its life. After each, frames must flow.

#![allow(clippy::unwrap_used)]

mod frontend;

use std::fs;
use std::os::unix::net::UnixListener;

use frontend::daemon::{Daemon, port, port_with, preamble};
use frontend::doorbell::Doorbell;
use frontend::frame::{BROADCAST, assert_same, frame, mac};
use frontend::nic::{LINUX, Nic, NicConfig, carry, exchange, meet};
use frontend::ram::Region;
use frontend::ring::Desc;
use frontend::session::{Session, feature, is_closed, is_nack, protocol, request};
use frontend::vmm::Kind;
use frontend::{DEADLINE, eventually};

/// EtherType of RARP (RFC 903).
const RARP: [u8; 2] = [0x80, 0x35];

fn pair(daemon: &Daemon, a: &NicConfig, b: &NicConfig) -> (Nic, Nic) {
    let (mut a, mut b) = (Nic::up(&daemon.socket("a"), a), Nic::up(&daemon.socket("b"), b));
    meet(&mut a, &mut b);
    (a, b)
}

fn session(daemon: &Daemon, port: &str) -> Session {
    eventually("a connection that stays", || {
        let session = Session::connect(&daemon.socket(port)).ok()?;
        session.get_features().ok().map(|_| session)
    })
}

#[test]
fn what_is_offered_is_what_guests_need_and_qemu_can_forward() {
    let daemon = Daemon::with_ports(&["a"]);
    let session = session(&daemon, "a");
    let offered = session.get_features().unwrap();
    let needed = LINUX | feature::MTU | feature::CTRL_VQ | feature::IN_ORDER | feature::PROTOCOL_FEATURES;
    assert_eq!(offered & needed, needed, "{offered:#x}");
    // NOTIFY_ON_EMPTY, NOTIFICATION_DATA, RING_RESET, HASH_REPORT, RSS, RSC_EXT: QEMU cannot forward what they need.
    for bit in [24, 38, 40, 57, 60, 61] {
        assert_eq!(offered >> bit & 1, 0, "bit {bit} is offered");
    }
    let offered = session.get_protocol_features().unwrap();
    let needed =
        protocol::MQ | protocol::RARP | protocol::REPLY_ACK | protocol::NET_MTU | protocol::CONFIGURE_MEM_SLOTS;
    assert_eq!(offered & needed, needed, "{offered:#x}");
    session.set_protocol_features(needed).unwrap();
    assert_eq!(session.ask_u64(request::GET_QUEUE_NUM).unwrap(), 128);
    assert!(session.ask_u64(request::GET_MAX_MEM_SLOTS).unwrap() >= 32);
}

#[test]
fn every_front_end_is_served_with_and_without_each_protocol_feature() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let masks = [u64::MAX, !protocol::REPLY_ACK, !protocol::CONFIGURE_MEM_SLOTS, protocol::MQ, 0];
    for kind in Kind::ALL {
        for mask in masks {
            for pairs in [1, 4] {
                let config = NicConfig { pairs, enabled_pairs: pairs, protocol: mask, ..NicConfig::of(kind) };
                let (mut a, mut b) = pair(&daemon, &config, &config);
                exchange(&mut a, &mut b, 64);
            }
        }
    }
}

#[test]
fn front_ends_of_all_kinds_meet_on_one_switch() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    for first in Kind::ALL {
        for second in Kind::ALL {
            let (mut a, mut b) = pair(&daemon, &NicConfig::of(first), &NicConfig::of(second));
            exchange(&mut a, &mut b, 32);
        }
    }
}

#[test]
fn ethtool_changes_the_number_of_pairs_under_traffic() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    for kind in [Kind::Qemu72, Kind::Qemu10, Kind::Dpdk] {
        let config = NicConfig { pairs: 4, ..NicConfig::of(kind) };
        let (mut a, mut b) = pair(&daemon, &config, &config);
        for pairs in [4, 2, 3, 1, 4, 1, 2] {
            a.set_pairs(pairs).unwrap();
            b.set_pairs(pairs).unwrap();
            meet(&mut a, &mut b);
            for on in 0..pairs {
                let sent: Vec<_> = (0..20).map(|at| frame(b.mac, a.mac, 60 + at, at as u64)).collect();
                for frame in &sent {
                    a.send_on(on, frame);
                }
                for ((at, got), sent) in b.receive(sent.len()).iter().zip(&sent) {
                    assert!(*at < pairs, "a frame on pair {at}, {pairs} are enabled");
                    assert_same(&got.frame, sent, "one queue's frames");
                }
            }
        }
    }
}

#[test]
fn frames_on_a_disabled_pair_are_taken_and_thrown_away() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let config = NicConfig { pairs: 2, ..NicConfig::default() };
    let (mut a, mut b) = pair(&daemon, &config, &config);
    let before = daemon.port("a").drops("queue-disabled");
    for at in 0..10 {
        a.send_on(1, &frame(b.mac, a.mac, 60, at));
    }
    a.drain();
    daemon.port_when("a", "the drops are counted", |port| port.drops("queue-disabled") == before + 10);
    exchange(&mut a, &mut b, 16);
}

#[test]
fn stop_and_cont_lose_nothing_that_was_sent_meanwhile() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    for kind in Kind::ALL {
        for protocol in [u64::MAX, !protocol::CONFIGURE_MEM_SLOTS] {
            let config = NicConfig { pairs: 2, enabled_pairs: 2, protocol, ..NicConfig::of(kind) };
            let (mut a, mut b) = pair(&daemon, &config, &config);
            for round in 0..5 {
                exchange(&mut a, &mut b, 16);
                a.stop().unwrap();
                for vring in &a.vmm.vrings {
                    assert_eq!(vring.base, vring.ring.used_idx(), "at rest, next available is next used");
                }
                let sent: Vec<_> = (0..8).map(|at| frame(b.mac, a.mac, 100 + at, round * 8 + at as u64)).collect();
                for frame in &sent {
                    assert!(a.pairs[0].tx.send(frame));
                }
                // QEMU owned the eventfd meanwhile and has swallowed the kicks: the start alone must do.
                a.pairs[0].tx.queue.kick.take();
                assert_eq!(b.poll().len(), 0, "a stopped ring sends");
                a.cont().unwrap();
                if matches!(kind, Kind::Dpdk | Kind::CloudHypervisor) {
                    // They start rings before they enable them, and what a disabled ring sends may be thrown away.
                    a.drain();
                    meet(&mut a, &mut b);
                    continue;
                }
                for ((_, got), sent) in b.receive(sent.len()).iter().zip(&sent) {
                    assert_same(&got.frame, sent, "sent while stopped");
                }
            }
        }
    }
}

#[test]
fn link_off_and_on_moves_the_base() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    for kind in [Kind::Qemu72, Kind::Qemu10] {
        let (mut a, mut b) = pair(&daemon, &NicConfig::of(kind), &NicConfig::of(kind));
        for round in 0..5 {
            exchange(&mut a, &mut b, 16);
            a.stop().unwrap();
            for at in 0..6 {
                assert!(a.pairs[0].tx.send(&frame(b.mac, a.mac, 60, at)));
            }
            // The link is down: QEMU takes what the guest sends and drops it.
            a.vmm.vrings[1].base = a.pairs[0].tx.queue.serve_as_vmm(a.vmm.vrings[1].base, 6);
            let last = frame(b.mac, a.mac, 90, round);
            assert!(a.pairs[0].tx.send(&last));
            a.cont().unwrap();
            assert_same(&b.receive(1)[0].1.frame, &last, "the first frame after the link came back");
            a.drain();
        }
    }
}

#[test]
fn reboot_and_driver_rebind_may_bring_other_features() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    for kind in Kind::ALL {
        let (mut a, mut b) = pair(&daemon, &NicConfig::of(kind), &NicConfig::of(kind));
        for features in [LINUX, feature::ANY_LAYOUT, LINUX | feature::IN_ORDER, feature::VERSION_1, LINUX] {
            for _ in 0..4 {
                a.rebind(features).unwrap();
                meet(&mut a, &mut b);
                exchange(&mut a, &mut b, 16);
            }
        }
    }
}

#[test]
fn memory_comes_and_goes_under_running_rings() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    for kind in Kind::ALL {
        let config = NicConfig { pairs: 2, ..NicConfig::of(kind) };
        let (mut a, mut b) = pair(&daemon, &config, &config);
        let extra = Region::new(0x8_0000_0000, 0x7777_0000_0000, 4 << 20);
        for _ in 0..5 {
            a.plug(extra.clone()).unwrap();
            let buffer = a.vmm.ram.alloc_in(extra.gpa, 2048, 64);
            let sent = frame(b.mac, a.mac, 500, 7);
            a.vmm.ram.write(buffer, &[0; 12]);
            a.vmm.ram.write(buffer + 12, &sent);
            a.pairs[0].tx.queue.add(&[Desc::readable(buffer, 512)], false).unwrap();
            a.pairs[0].tx.queue.publish();
            assert_same(&b.receive(1)[0].1.frame, &sent, "from hot-plugged memory");
            a.drain();
            exchange(&mut a, &mut b, 16);
            a.unplug(extra.gpa).unwrap();
            exchange(&mut a, &mut b, 16);
        }
    }
}

#[test]
fn repeated_memory_messages_change_nothing() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let (mut a, mut b) = pair(&daemon, &NicConfig::default(), &NicConfig::of(Kind::Dpdk));
    for _ in 0..3 {
        for region in a.vmm.ram.regions() {
            a.session().add_mem_reg(&region, true).unwrap();
        }
        b.session().set_mem_table(&b.vmm.ram.regions(), true).unwrap();
        exchange(&mut a, &mut b, 16);
    }
    let extra = Region::new(0x8_0000_0000, 0x7777_0000_0000, 1 << 20);
    a.session().add_mem_reg(&extra, true).unwrap();
    a.session().rem_mem_reg(&extra, true).unwrap();
    a.session().rem_mem_reg(&extra, true).unwrap();
    exchange(&mut a, &mut b, 16);
}

#[test]
fn an_early_enable_is_remembered() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let mut b = Nic::up(&daemon.socket("b"), &NicConfig::default());
    let mut a = Nic::prepare(session(&daemon, "a"), &NicConfig::of(Kind::Dpdk)).unwrap();
    for index in [0, 1] {
        a.session().set_vring_enable(index, true, true).unwrap();
    }
    start_without_enable(&mut a);
    meet(&mut a, &mut b);
    exchange(&mut a, &mut b, 32);
}

#[test]
fn rings_are_born_disabled_with_protocol_features_and_enabled_without() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let mut b = Nic::up(&daemon.socket("b"), &NicConfig::default());
    let mut a = Nic::prepare(session(&daemon, "a"), &NicConfig::of(Kind::Dpdk)).unwrap();
    start_without_enable(&mut a);
    a.send(&frame(BROADCAST, a.mac, 60, 1));
    a.drain();
    daemon.port_when("a", "a disabled ring's frame is counted", |port| port.drops("queue-disabled") == 1);
    b.send(&frame(BROADCAST, b.mac, 60, 1));
    b.drain();
    daemon.port_when("b", "the other's frame has had its end", |port| port.counter("rx_frames") == 1);
    assert_eq!((a.poll().len(), b.poll().len()), (0, 0));
    drop(a);

    let mut a = Nic::prepare(session(&daemon, "a"), &NicConfig { protocol: 0, ..NicConfig::of(Kind::Dpdk) }).unwrap();
    a.vmm.features &= !feature::PROTOCOL_FEATURES;
    start_without_enable(&mut a);
    meet(&mut a, &mut b);
    exchange(&mut a, &mut b, 32);
}

fn start_without_enable(nic: &mut Nic) {
    nic.pairs[0].rx.fill();
    nic.session().set_features(nic.vmm.features, false).unwrap();
    nic.vmm.send_memory(false).unwrap();
    nic.vmm.start_ring(0).unwrap();
    nic.vmm.start_ring(1).unwrap();
    nic.vmm.settle().unwrap();
}

#[test]
fn an_interrupt_may_move_to_another_eventfd_at_any_time() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let (mut a, mut b) = pair(&daemon, &NicConfig::default(), &NicConfig::default());
    for _ in 0..20 {
        let call = Doorbell::new();
        b.session().set_vring_call(0, &call, false).unwrap();
        b.vmm.vrings[0].call = call.clone();
        b.pairs[0].rx.queue.call = call.clone();
        assert!(call.wait(DEADLINE), "what the old one should have said may be lost, so the new one is signalled");
        exchange(&mut a, &mut b, 16);
    }
}

#[test]
fn an_mtu_beyond_the_port_is_refused_and_the_session_goes_on() {
    let daemon = Daemon::start(|dir| {
        let small = port_with(dir, "a", "lan", "server", ", mtu: 1500");
        preamble(dir) + "networks: { lan: {} }\nports:\n" + &small + &port(dir, "b", "lan")
    });
    let config = NicConfig { mtu: Some(1500), features: LINUX | feature::MTU, ..NicConfig::default() };
    let (mut a, mut b) = pair(&daemon, &config, &NicConfig { mtu: Some(9000), ..config.clone() });
    for mtu in [1501, 9000, 65_536, 67, 0, u64::MAX] {
        let error = a.session().net_set_mtu(mtu, true).expect_err("an MTU that is none");
        assert!(is_nack(&error), "MTU {mtu}: {error}");
    }
    a.session().net_set_mtu(1400, true).unwrap();
    exchange(&mut a, &mut b, 16);
}

#[test]
fn a_migrated_guest_is_announced_before_its_rings_run_and_after() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let mut b = Nic::up(&daemon.socket("b"), &NicConfig::default());
    let a = Nic::prepare(session(&daemon, "a"), &NicConfig::default()).unwrap();
    let guest = mac(0xbeef);
    a.session().send_rarp(guest, true).unwrap();
    expect_announcement(&mut b, guest);
    drop(a);
    let mut a = Nic::up(&daemon.socket("a"), &NicConfig::default());
    meet(&mut a, &mut b);
    let guest = mac(0xcafe);
    a.session().send_rarp(guest, false).unwrap();
    expect_announcement(&mut b, guest);
    // The switch knows from it where the guest is: no frame to it comes back to `b`'s side of the world.
    b.send(&frame(guest, b.mac, 77, 3));
    eventually("a frame to the announced guest", || {
        a.receive(1).iter().any(|(_, got)| got.frame == frame(guest, b.mac, 77, 3)).then_some(())
    });
}

#[track_caller]
fn expect_announcement(nic: &mut Nic, guest: [u8; 6]) {
    eventually("an announcement on the network", || {
        let got = nic.receive(1);
        let is_it = |frame: &[u8]| frame[..6] == BROADCAST && frame[6..12] == guest && frame[12..14] == RARP;
        got.iter().any(|(_, got)| is_it(&got.frame)).then_some(())
    });
}

#[test]
fn a_second_front_end_is_turned_away_and_the_first_goes_on() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let (mut a, mut b) = pair(&daemon, &NicConfig::default(), &NicConfig::default());
    for _ in 0..20 {
        if let Ok(second) = Session::connect(&daemon.socket("a")) {
            let error = second.get_features().expect_err("a second front end is served");
            assert!(is_closed(&error), "{error}");
        }
        exchange(&mut a, &mut b, 16);
    }
}

#[test]
fn a_front_end_that_comes_back_finds_its_rings_where_they_were() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    for kind in [Kind::Qemu72, Kind::Qemu10] {
        let config = NicConfig { pairs: 2, enabled_pairs: 2, ..NicConfig::of(kind) };
        let (mut a, mut b) = pair(&daemon, &config, &config);
        for round in 0..10 {
            exchange(&mut a, &mut b, 16);
            a.disconnect();
            daemon.port_when("a", "the port is down", |port| port.state() == "down");
            assert!(daemon.port("a").reason().is_some(), "a port that is down says why");
            let sent = frame(b.mac, a.mac, 200, round);
            assert!(a.pairs[0].tx.send(&sent));
            a.reconnect(&daemon.socket("a"));
            assert_same(&b.receive(1)[0].1.frame, &sent, "sent while there was no connection");
        }
    }
}

#[test]
fn in_client_mode_the_daemon_dials_until_the_vmm_is_there() {
    let daemon = Daemon::start(|dir| {
        let dialing = port_with(dir, "a", "lan", "client", "");
        preamble(dir) + "networks: { lan: {} }\nports:\n" + &dialing + &port(dir, "b", "lan")
    });
    let mut b = Nic::up(&daemon.socket("b"), &NicConfig::default());
    assert_eq!(daemon.port("a").state(), "down");
    for kind in Kind::ALL {
        // Each VMM makes the socket anew, as QEMU does with server=on.
        let _ = fs::remove_file(daemon.socket("a"));
        let listener = UnixListener::bind(daemon.socket("a")).unwrap();
        for _ in 0..2 {
            let (stream, _) = listener.accept().unwrap();
            let mut a = Nic::start(Session::new(stream).unwrap(), &NicConfig::of(kind)).unwrap();
            meet(&mut a, &mut b);
            exchange(&mut a, &mut b, 32);
        }
    }
}

#[test]
fn messages_that_nobody_knows_are_refused_and_cost_nothing() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let (mut a, mut b) = pair(&daemon, &NicConfig::default(), &NicConfig::default());
    let unknown = [0, 99, 4711, u32::MAX, request::SET_STATUS, request::SET_VRING_ENDIAN, request::IOTLB_MSG];
    for number in unknown {
        a.session().tell(number, &[0; 8], &[], false).unwrap();
        let error = a.session().tell(number, &[0; 8], &[], true).expect_err("an unknown message is acknowledged");
        assert!(is_nack(&error), "request {number}: {error}");
        exchange(&mut a, &mut b, 8);
    }
}

#[test]
fn a_message_may_come_in_pieces() {
    use std::io::Write;
    let daemon = Daemon::with_ports(&["a"]);
    let session = session(&daemon, "a");
    let bytes = frontend::message::encode(request::GET_FEATURES, frontend::message::VERSION, &[]);
    for byte in &bytes {
        session.stream().write_all(&[*byte]).unwrap();
        std::thread::yield_now();
    }
    assert_eq!(session.read().unwrap().request, request::GET_FEATURES);
}

#[test]
fn every_setting_may_be_acknowledged() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let (mut a, mut b) = pair(&daemon, &NicConfig::of(Kind::CloudHypervisor), &NicConfig::default());
    let features = a.features();
    a.session().set_features(features, true).unwrap();
    a.session().set_vring_enable(0, true, true).unwrap();
    a.session().set_vring_call(0, &a.vmm.vrings[0].call, true).unwrap();
    a.session().set_vring_kick(0, &a.vmm.vrings[0].kick, true).unwrap();
    a.session().set_vring_err(0, &Doorbell::new(), true).unwrap();
    a.session().set_vring_addr(0, &a.vmm.vrings[0].ring, true).unwrap();
    a.session().set_vring_num(0, a.vmm.vrings[0].ring.size.into(), true).unwrap();
    carry(&mut b, &mut a, 16);
    carry(&mut a, &mut b, 16);
}
