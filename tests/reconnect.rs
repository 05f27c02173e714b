//! Connections that come and go, thousands of them and at any point of the handshake, and daemons that do: nothing is
//! left behind, nobody else notices, and a guest that stayed finds its rings where they were.

#![allow(clippy::unwrap_used)]

mod frontend;

use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use frontend::daemon::{Daemon, port, port_with, preamble};
use frontend::doorbell::Doorbell;
use frontend::eventually;
use frontend::footprint::Footprint;
use frontend::frame::{BROADCAST, assert_same, frame};
use frontend::nic::{LINUX, Nic, NicConfig, exchange, meet};
use frontend::packed::Packed;
use frontend::ram::GuestRam;
use frontend::ring::{Desc, Ring};
use frontend::session::{Session, feature, is_closed};
use frontend::vmm::{Kind, Vmm, Vring};
use frontend::witness::Witness;

const CONNECTIONS: usize = 10_000;
const DOORS: usize = 100;

/// Waits until everything that front ends brought has gone since `before`, and checks what the daemon has mapped.
#[track_caller]
fn expect_nothing_left(daemon: &Daemon, before: &Footprint) {
    let now = daemon.expect_given_back(before, "what front ends left is given back");
    // Each thread that the daemon starts on a first use is some; fifty visits that leave one each would be more.
    assert!(now.mappings <= before.mappings + 32, "{before:?}, then {now:?}");
    // 16 MiB for what an allocator keeps; 10,000 connections that leave a page each would be 40.
    assert!(now.resident <= before.resident + 4096, "{before:?}, then {now:?}");
}

/// One visit to `port`: to the end of the handshake, with some frames, or cut somewhere on the way.
fn visit(daemon: &Daemon, port: &str, ram: &Arc<GuestRam>, at: usize) {
    ram.rewind();
    // The longest of the four start-ups sends less than 3000 bytes.
    let cut_after = (!at.is_multiple_of(4)).then_some(at * 7919 % 3000);
    let config = NicConfig { size: 64, ram: Some(ram.clone()), cut_after, ..NicConfig::of(Kind::ALL[at / 4 % 4]) };
    let session = Session::connect(&daemon.socket(port)).expect("a listening socket");
    match Nic::start(session, &config) {
        Ok(mut nic) => {
            for seed in 0..at % 20 {
                nic.pairs[0].tx.send(&frame(BROADCAST, nic.mac, 60 + seed, seed as u64));
            }
        }
        // Cut by ourselves, or turned away while the daemon still sees the last visitor.
        Err(error) => assert!(error.kind() == ErrorKind::ConnectionAborted || is_closed(&error), "visit {at}: {error}"),
    }
}

#[test]
fn ten_thousand_connections_leave_nothing_behind() {
    // Many doors, because each lets in a few visitors a second only.
    let doors: Vec<_> = (0..DOORS).map(|at| format!("door-{at}")).collect();
    let names: Vec<_> = doors.iter().map(String::as_str).chain(["peer"]).collect();
    let daemon = Daemon::with_ports(&names);
    let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
    let mut peer = Nic::up(&daemon.socket("peer"), &NicConfig::default());
    // Memory of its own for each door: the daemon may still be in a ring of the last visitor of another when the next
    // one lays out its own.
    let rams: Vec<_> = doors.iter().map(|_| GuestRam::qemu(16 << 20)).collect();
    let mut visits = 0..;
    let mut visit_all = |count: usize, peer: &mut Nic| {
        for at in visits.by_ref().take(count) {
            visit(&daemon, &doors[at % DOORS], &rams[at % DOORS], at);
            peer.poll();
        }
    };
    visit_all(2 * DOORS, &mut peer);
    let before = daemon.footprint_at_rest();
    visit_all(CONNECTIONS, &mut peer);
    expect_nothing_left(&daemon, &before);
    witness.keeps_going();
    for door in doors.iter().step_by(50) {
        let mut bad = Nic::up(&daemon.socket(door), &NicConfig::default());
        meet(&mut bad, &mut peer);
        exchange(&mut bad, &mut peer, 64);
    }
    assert!(witness.finish() > 0);
}

#[test]
fn front_ends_that_die_in_the_middle_of_traffic_harm_nobody() {
    let daemon = Daemon::with_ports(&["bad", "peer"]);
    let witness = Witness::start(&daemon.socket("well-1"), &daemon.socket("well-2"));
    let mut peer = Nic::up(&daemon.socket("peer"), &NicConfig::default());
    let mut before = None;
    for round in 0..50 {
        let config = NicConfig { pairs: 4, enabled_pairs: 4, ..NicConfig::of(Kind::ALL[round % 4]) };
        let mut bad = Nic::up(&daemon.socket("bad"), &config);
        meet(&mut bad, &mut peer);
        for pair in 0..4 {
            for at in 0..200 {
                bad.pairs[pair].tx.queue_frame(&frame(peer.mac, bad.mac, 1000, at));
            }
            bad.pairs[pair].tx.queue.publish();
        }
        for at in 0..100 {
            peer.send(&frame(bad.mac, peer.mac, 1000, at));
        }
        drop(bad);
        peer.drain();
        peer.poll();
        daemon.port_when("bad", "it has left", |port| port.state() == "down");
        before = before.or_else(|| (round == 5).then(|| daemon.footprint_at_rest()));
    }
    expect_nothing_left(&daemon, &before.unwrap());
    assert!(witness.finish() > 0);
}

#[test]
fn guests_that_stay_go_on_when_the_daemon_comes_back() {
    let mut daemon = Daemon::with_ports(&["a", "b"]);
    let packed = LINUX | feature::RING_PACKED;
    let forms = [(Kind::Qemu72, LINUX), (Kind::Qemu10, LINUX), (Kind::Qemu72, packed), (Kind::Qemu10, packed)];
    for (kind, features) in forms.into_iter().chain([(Kind::Qemu10, packed | feature::IN_ORDER)]) {
        let config = NicConfig { pairs: 2, enabled_pairs: 2, features, ..NicConfig::of(kind) };
        let mut a = Nic::up(&daemon.socket("a"), &config);
        let mut b = Nic::up(&daemon.socket("b"), &config);
        meet(&mut a, &mut b);
        for round in 0..6 {
            exchange(&mut a, &mut b, 32);
            if round % 2 == 0 {
                let status = daemon.terminate();
                assert!(status.success(), "linecardd ended with {status}");
                assert!(!daemon.socket("a").exists(), "a daemon that ends in peace takes its sockets along");
            } else {
                daemon.kill();
            }
            let sent = frame(b.mac, a.mac, 400, round);
            assert!(a.pairs[0].tx.send(&sent));
            daemon.restart();
            b.reconnect(&daemon.socket("b"));
            a.reconnect(&daemon.socket("a"));
            assert_same(&b.receive(1)[0].1.frame, &sent, "sent while the daemon was away");
            meet(&mut a, &mut b);
        }
    }
}

#[test]
fn a_daemon_killed_in_the_middle_of_traffic_leaves_rings_that_go_on() {
    let mut daemon = Daemon::with_ports(&["a", "b"]);
    let packed = LINUX | feature::RING_PACKED;
    for (features, size) in [(LINUX, 256), (packed, 256), (packed | feature::IN_ORDER, 255), (packed, 100)] {
        let config = NicConfig { features, size, ..NicConfig::default() };
        let mut a = Nic::up(&daemon.socket("a"), &config);
        let mut b = Nic::up(&daemon.socket("b"), &config);
        meet(&mut a, &mut b);
        for round in 0..12u64 {
            // It dies when it has taken so many frames, or a few more.
            let most = round * 37 % 300;
            let mut taken = 0;
            eventually("frames are taken", || {
                for at in 0..32 {
                    a.pairs[0].tx.queue_frame(&frame(b.mac, a.mac, 60 + at, round));
                    b.pairs[0].tx.queue_frame(&frame(a.mac, b.mac, 60 + at, round));
                }
                for nic in [&mut a, &mut b] {
                    nic.pairs[0].tx.queue.publish();
                    taken += nic.pairs[0].tx.reclaim();
                    nic.poll();
                }
                (taken as u64 >= most).then_some(())
            });
            daemon.kill();
            daemon.restart();
            b.reconnect(&daemon.socket("b"));
            a.reconnect(&daemon.socket("a"));
            // What was on its way may be lost or come twice; no ring is.
            for nic in [&mut a, &mut b] {
                nic.drain();
            }
            meet(&mut a, &mut b);
            a.poll();
            b.poll();
            exchange(&mut a, &mut b, usize::from(size) + 5);
        }
    }
}

/// Has the guest send until its ring is full, and its VMM take what it finds from where it believes the ring to be.
fn send_to_nobody(nic: &mut Nic, to: [u8; 6], most: u16) {
    let mut at = 0;
    while nic.pairs[0].tx.queue_frame(&frame(to, nic.mac, 60, at)) {
        at += 1;
    }
    let queue = &mut nic.pairs[0].tx.queue;
    queue.publish();
    let vring = &mut nic.vmm.vrings[1];
    vring.base = queue.serve_as_vmm(vring.base, most);
    // It was for the VMM.
    queue.kick.take();
}

#[test]
fn rings_go_on_when_their_vmm_takes_frames_while_the_daemon_is_away() {
    const SIZE: u16 = 16;
    let mut daemon = Daemon::with_ports(&["a", "b"]);
    let packed = LINUX | feature::RING_PACKED;
    let mut overtaken = 0;
    for features in [packed, packed | feature::IN_ORDER, LINUX] {
        let config = NicConfig { features, size: SIZE, ..NicConfig::default() };
        let mut a = Nic::up(&daemon.socket("a"), &config);
        let mut b = Nic::up(&daemon.socket("b"), &config);
        meet(&mut a, &mut b);
        for round in 0..16 {
            // All places in two laps.
            exchange(&mut a, &mut b, 3 + 2 * round);
            daemon.kill();
            for (nic, to, most) in [(&mut a, b.mac, 1 + round as u16), (&mut b, BROADCAST, SIZE)] {
                let before = nic.vmm.vrings[1].base;
                send_to_nobody(nic, to, most);
                overtaken += u32::from(before != nic.vmm.vrings[1].base);
            }
            daemon.restart();
            b.reconnect(&daemon.socket("b"));
            a.reconnect(&daemon.socket("a"));
            for nic in [&mut a, &mut b] {
                nic.drain();
            }
            meet(&mut a, &mut b);
            a.poll();
            b.poll();
            exchange(&mut a, &mut b, usize::from(SIZE) + 5);
        }
    }
    assert!(overtaken > 20, "{overtaken} rings were taken from");
}

/// The file in which port `name` of a daemon notes where its packed rings are.
fn record(daemon: &Daemon, name: &str) -> std::path::PathBuf {
    daemon.dir().join("rings").join(daemon.socket(name).to_str().unwrap().replace('/', "!"))
}

#[test]
fn guests_go_on_when_their_port_is_renamed() {
    let daemon = Daemon::with_ports(&["vm", "peer"]);
    let config = NicConfig { features: LINUX | feature::RING_PACKED, ..NicConfig::default() };
    let mut vm = Nic::up(&daemon.socket("vm"), &config);
    let mut peer = Nic::up(&daemon.socket("peer"), &NicConfig::default());
    let file = daemon.dir().join("linecard.yaml");
    for (from, to) in [("vm", "web-1"), ("web-1", "web-2"), ("web-2", "vm")] {
        meet(&mut vm, &mut peer);
        exchange(&mut vm, &mut peer, 100);
        let text = std::fs::read_to_string(&file).unwrap();
        let renamed = text.replace(&format!("  {from}: {{"), &format!("  {to}: {{"));
        assert_ne!(renamed, text);
        std::fs::write(&file, renamed).unwrap();
        daemon.linecard(&["apply"]).unwrap();
        // At the same socket, whose name is that of the first port.
        vm.reconnect(&daemon.socket("vm"));
        let rings = &daemon.port_when(to, "its VM is back", |port| port.state() == "up").0["detail"]["queues"];
        assert!((0..2).all(|ring| rings[ring]["doubt"].is_null()), "{rings}");
        assert!(record(&daemon, "vm").exists());
    }
    meet(&mut vm, &mut peer);
    exchange(&mut vm, &mut peer, 100);
}

/// A VM that is restored from `image`, the memory of `of`, as a process with memory of its own.
fn restored(daemon: &Daemon, of: &Nic, image: &[(u64, Vec<u8>)]) -> Vmm {
    let ram = GuestRam::qemu(32 << 20);
    image.iter().for_each(|(gpa, bytes)| ram.write(*gpa, bytes));
    let session = eventually("a connection that stays", || {
        Session::connect(&daemon.socket("vm")).ok().filter(|session| session.get_features().is_ok())
    });
    let mut vmm = Vmm::create(Kind::Qemu10, session, ram.clone(), 1, of.features(), u64::MAX).unwrap();
    vmm.features = of.features();
    let vring = |vring: &Vring| Vring {
        ring: Ring { ram: ram.clone(), ..vring.ring.clone() },
        kick: Doorbell::new(),
        call: Doorbell::new(),
        base: vring.base,
    };
    vmm.vrings = of.vmm.vrings.iter().map(vring).collect();
    vmm.start().unwrap();
    vmm.settle().unwrap();
    vmm
}

#[test]
fn a_vm_with_packed_rings_that_is_restored_twice_goes_on_both_times() {
    let daemon = Daemon::with_ports(&["vm", "peer"]);
    let config = NicConfig { features: LINUX | feature::RING_PACKED, size: 64, ..NicConfig::default() };
    let mut vm = Nic::up(&daemon.socket("vm"), &config);
    let mut peer = Nic::up(&daemon.socket("peer"), &NicConfig::default());
    meet(&mut vm, &mut peer);
    exchange(&mut vm, &mut peer, 37);
    vm.stop().unwrap();
    let regions = vm.vmm.ram.regions();
    let image: Vec<_> =
        regions.iter().map(|region| (region.gpa, vm.vmm.ram.bytes(region.gpa, region.len as usize))).collect();
    vm.disconnect();
    // Once in memory of its own, where it sends and is sent frames until it is killed, so that its rings are elsewhere than
    // the saved state says.
    let first = restored(&daemon, &vm, &image);
    let (at, mut tx) = (first.ram.alloc(4096, 4096) + (20 << 20), Packed::new());
    tx.next = vm.pairs[0].tx.queue.place().unwrap();
    for id in 0..20 {
        first.ram.write(at, &[&[0; 12][..], &frame(peer.mac, vm.mac, 100, id.into())].concat());
        tx.add(&first.vrings[1].ring, &[Desc::readable(at, 112)], id);
        tx.publish(&first.vrings[1].ring);
    }
    first.vrings[1].kick.ring();
    assert_eq!(peer.receive(20).len(), 20);
    for at in 0..23 {
        peer.send(&frame(vm.mac, peer.mac, 100, at));
    }
    peer.drain();
    drop(first);
    daemon.port_when("vm", "it was killed", |port| port.state() == "down");
    // And once in memory that is as it was saved.
    vm.reconnect(&daemon.socket("vm"));
    exchange(&mut vm, &mut peer, 100);
    assert!(!daemon.log().contains("counts from another place"), "{}", daemon.log());
}

#[test]
fn a_packed_ring_that_begins_where_its_guest_is_not_is_named() {
    let daemon = Daemon::with_ports(&["vm"]);
    let config = NicConfig { features: LINUX | feature::RING_PACKED, size: 64, ..NicConfig::default() };
    let mut vm = Nic::up(&daemon.socket("vm"), &config);
    let doubt = |ring: usize| daemon.port("vm").0["detail"]["queues"][ring]["doubt"].clone();
    assert!(doubt(0).is_null() && doubt(1).is_null());
    vm.stop().unwrap();
    // The guest has offered all of its receive buffers and is in its second lap; it has sent nothing.
    vm.vmm.vrings[1].base = 0x8005;
    vm.cont().unwrap();
    assert!(doubt(0).is_null(), "{}", doubt(0));
    assert!(doubt(1).as_str().is_some_and(|doubt| doubt.contains("counts from another place")), "{}", doubt(1));
    assert!(daemon.log().contains("vm: ring 1: its guest counts from another place"), "{}", daemon.log());
    let port = daemon.port("vm");
    assert_eq!(port.state(), "up", "other rings may be well");
    assert!(port.reason().is_some_and(|reason| reason.starts_with("ring 1: its guest counts")), "{:?}", port.reason());
    vm.stop().unwrap();
    vm.rebind(vm.features()).unwrap();
    assert!(doubt(1).is_null() && daemon.port("vm").reason().is_none());
}

#[test]
fn records_that_cannot_be_trusted_are_not_used_and_the_port_says_so() {
    let elsewhere = tempfile::tempdir().unwrap();
    let name = std::cell::OnceCell::new();
    let daemon = Daemon::start(|dir| {
        let name = name.get_or_init(|| dir.join("vm.sock").to_str().unwrap().replace('/', "!"));
        std::fs::write(elsewhere.path().join(name), [0x41; 10_000]).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), dir.join("rings")).unwrap();
        preamble(dir)
            + "networks: { lan: {}, well: {} }\nports:\n"
            + &port(dir, "vm", "lan")
            + &port(dir, "peer", "lan")
    });
    let config = NicConfig { features: LINUX | feature::RING_PACKED, ..NicConfig::default() };
    let mut vm = Nic::up(&daemon.socket("vm"), &config);
    let mut peer = Nic::up(&daemon.socket("peer"), &NicConfig::default());
    meet(&mut vm, &mut peer);
    exchange(&mut vm, &mut peer, 64);
    assert_eq!(std::fs::read(elsewhere.path().join(name.get().unwrap())).unwrap(), [0x41; 10_000]);
    let said = daemon.port("vm").0["detail"]["ring_records"].clone();
    assert!(said.as_str().is_some_and(|said| said.starts_with("none: ") && said.contains("not a directory")), "{said}");
    assert!(daemon.log().contains("will not survive the end of this process"), "{}", daemon.log());
}

/// Daemons whose API sockets are in one directory have one directory of records too. Each has a port with a socket of its own, and
/// one in client mode that dials the same VM as the other's does.
#[test]
fn daemons_in_one_directory_do_not_share_records() {
    let here = tempfile::tempdir().unwrap();
    let vm = UnixListener::bind(here.path().join("vm.sock")).unwrap();
    let config = NicConfig { features: LINUX | feature::RING_PACKED, ..NicConfig::default() };
    let mut hosts = ["one", "two"].map(|name| {
        let daemon = Daemon::start(|dir| {
            let (api, usual) = (here.path().join(format!("{name}.sock")), dir.join("api.sock"));
            symlink(&api, &usual).unwrap();
            let preamble = preamble(dir).replace(usual.to_str().unwrap(), api.to_str().unwrap());
            let ports = port(dir, "own", "lan") + &port(dir, "peer", "lan");
            preamble + "networks: { lan: {} }\nports:\n" + &ports + &port_with(here.path(), "vm", "lan", "client", "")
        });
        let shared = Nic::start(Session::new(vm.accept().unwrap().0).unwrap(), &config).unwrap();
        let [own, peer] = ["own", "peer"].map(|name| Nic::up(&daemon.socket(name), &config));
        (daemon, shared, own, peer)
    });
    for (_, shared, own, peer) in &mut hosts {
        meet(own, peer);
        meet(shared, peer);
        let _ = own.poll();
        exchange(own, peer, 300);
        exchange(shared, peer, 300);
    }
    let said = |daemon: &Daemon, port: &str| daemon.port(port).0["detail"]["ring_records"].as_str().unwrap().to_owned();
    let [one, two] = hosts.each_ref().map(|(daemon, ..)| ["own", "vm"].map(|port| said(daemon, port)));
    let rings = here.path().join("rings").display().to_string();
    assert!(one[0].starts_with(&rings) && two[0].starts_with(&rings) && one[0] != two[0], "{one:?}, {two:?}");
    assert!(one[1].starts_with(&rings), "{one:?}");
    assert!(two[1].starts_with("none: another process is using "), "{two:?}");
    for (daemon, shared, own, peer) in &mut hosts {
        daemon.kill();
        daemon.restart();
        own.reconnect(&daemon.socket("own"));
        peer.reconnect(&daemon.socket("peer"));
        meet(own, peer);
        exchange(own, peer, 300);
        shared.disconnect();
    }
}

/// A VM with packed rings at port `vm`, which is added for it, in a process of its own, to be killed: this test, with other
/// work to do.
fn vm_to_be_killed(daemon: &Daemon) -> std::process::Child {
    let socket = daemon.dir().join("vm.sock");
    let add = ["port", "add", "vm", "--socket", socket.to_str().unwrap(), "--network", "lan", "--queues", "4"];
    daemon.linecard(&add).unwrap();
    let mut vm = std::process::Command::new(std::env::current_exe().unwrap());
    vm.args(["--exact", "plays_a_vm_until_it_is_killed", "--ignored", "--nocapture"]).env(VM_SOCKET, &socket);
    let vm = vm.stdout(std::process::Stdio::null()).spawn().unwrap();
    daemon.port_when("vm", "it runs", |port| port.state() == "up");
    assert!(record(daemon, "vm").exists(), "packed rings are written down");
    vm
}

#[test]
fn a_port_that_goes_after_its_vm_was_killed_takes_its_records_along() {
    let daemon = Daemon::with_ports(&["peer"]);
    let mut vm = vm_to_be_killed(&daemon);
    vm.kill().unwrap();
    vm.wait().unwrap();
    daemon.port_when("vm", "its VM was killed", |port| port.state() == "down");
    daemon.linecard(&["port", "del", "vm"]).unwrap();
    eventually("its records are gone", || (!record(&daemon, "vm").exists()).then_some(()));
}

#[test]
fn records_of_a_port_that_went_before_its_vm_end_with_the_vm() {
    let daemon = Daemon::with_ports(&["peer"]);
    let mut vm = vm_to_be_killed(&daemon);
    daemon.linecard(&["port", "del", "vm"]).unwrap();
    assert!(record(&daemon, "vm").exists(), "the VM may come back to another port at that socket");
    vm.kill().unwrap();
    vm.wait().unwrap();
    eventually("its records are gone", || (!record(&daemon, "vm").exists()).then_some(()));
}

const VM_SOCKET: &str = "LINECARD_TEST_VM_SOCKET";

#[test]
#[ignore = "the VM of tests whose VM is killed"]
fn plays_a_vm_until_it_is_killed() {
    let socket = std::env::var_os(VM_SOCKET).expect("started by that test");
    let config = NicConfig { features: LINUX | feature::RING_PACKED, ..NicConfig::default() };
    let _nic = Nic::up(socket.as_ref(), &config);
    loop {
        std::thread::park();
    }
}
