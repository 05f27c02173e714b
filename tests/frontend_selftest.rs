//! The front end proved against a reference back end over the virtio-queue crate: if a test of the daemon fails, it is
//! not for want of a correct front end.

#![allow(clippy::unwrap_used)]

mod frontend;

use frontend::driver::Shape;
use frontend::footprint::{CONNECTIONS, Footprint};
use frontend::frame::{assert_same, frame, mac};
use frontend::loopback::Loopback;
use frontend::nic::{LINUX, Nic, NicConfig};
use frontend::ram::Region;
use frontend::ring::{Desc, Ring};
use frontend::session::{feature, protocol, request};
use frontend::vmm::Kind;

const LENGTHS: [usize; 8] = [14, 15, 60, 64, 1514, 2047, 4096, 9014];

/// Sends frames of many lengths, a few at a time, and checks each that comes back.
#[track_caller]
fn echo(nic: &mut Nic, pair: usize, longest: usize) {
    for (at, len) in LENGTHS.into_iter().filter(|len| *len <= longest).enumerate() {
        let sent: Vec<_> = (0..5).map(|copy| frame(mac(1), mac(2), len, (at * 5 + copy) as u64)).collect();
        for frame in &sent {
            nic.send_on(pair, frame);
        }
        let got = nic.receive_on(pair, sent.len());
        assert_eq!(got.len(), sent.len());
        for (got, sent) in got.iter().zip(&sent) {
            assert_same(&got.frame, sent, "loopback");
        }
    }
    nic.drain();
}

fn loopback(config: &NicConfig) -> (Loopback, Nic) {
    let (device, session) = Loopback::start();
    let nic = Nic::start(session, config).unwrap();
    (device, nic)
}

#[test]
fn every_front_end_brings_a_nic_up() {
    for kind in Kind::ALL {
        for protocol in [u64::MAX, !protocol::REPLY_ACK, !protocol::CONFIGURE_MEM_SLOTS, 0] {
            let config = NicConfig { pairs: 2, enabled_pairs: 2, protocol, ..NicConfig::of(kind) };
            let (device, mut nic) = loopback(&config);
            echo(&mut nic, 0, 1514);
            echo(&mut nic, 1, 1514);
            drop(nic);
            device.join().unwrap();
        }
    }
}

#[test]
fn every_ring_form_carries_every_frame() {
    let header_forms = [0, feature::MRG_RXBUF, feature::VERSION_1, feature::MRG_RXBUF | feature::VERSION_1];
    for header in header_forms {
        for bits in 0..8u64 {
            let option = |bit: u64, feature: u64| if bits & bit != 0 { feature } else { 0 };
            let features = feature::ANY_LAYOUT
                | header
                | option(1, feature::INDIRECT_DESC)
                | option(2, feature::EVENT_IDX)
                | option(4, feature::IN_ORDER);
            for shape in [Shape::Joined, Shape::HeaderApart, Shape::Pieces(700)] {
                let mergeable = header & feature::MRG_RXBUF != 0;
                let config = NicConfig {
                    features,
                    indirect: true,
                    shape,
                    rx_shape: shape,
                    size: 128,
                    tx_buffer: 9216,
                    rx_buffer: if mergeable { 1536 } else { 9216 },
                    ..NicConfig::default()
                };
                let (device, mut nic) = loopback(&config);
                assert_eq!(nic.features() & !feature::PROTOCOL_FEATURES, features);
                echo(&mut nic, 0, 9014);
                drop(nic);
                device.join().unwrap();
            }
        }
    }
}

#[test]
fn the_largest_ring_wraps() {
    let config = NicConfig { size: 32768, tx_buffer: 128, rx_buffer: 128, ..NicConfig::default() };
    let (device, mut nic) = loopback(&config);
    for round in 0..70_000 / 50 {
        for at in 0..50 {
            nic.send(&frame(mac(1), mac(2), 60, round * 50 + at));
        }
        for (at, got) in nic.receive_on(0, 50).iter().enumerate() {
            assert_same(&got.frame, &frame(mac(1), mac(2), 60, round * 50 + at as u64), "after a wrap");
        }
    }
    drop(nic);
    device.join().unwrap();
}

#[test]
fn stop_cont_reboot_and_rebind_keep_the_rings_going() {
    for kind in Kind::ALL {
        let (device, mut nic) = loopback(&NicConfig::of(kind));
        echo(&mut nic, 0, 1514);
        nic.stop().unwrap();
        nic.cont().unwrap();
        echo(&mut nic, 0, 1514);
        nic.rebind(LINUX).unwrap();
        echo(&mut nic, 0, 1514);
        nic.rebind(feature::ANY_LAYOUT).unwrap();
        echo(&mut nic, 0, 1514);
        drop(nic);
        device.join().unwrap();
    }
}

#[test]
fn a_vmm_that_serves_the_ring_moves_its_base() {
    let (device, mut nic) = loopback(&NicConfig::default());
    echo(&mut nic, 0, 64);
    nic.stop().unwrap();
    let before = nic.vmm.vrings[1].base;
    for at in 0..6 {
        assert!(nic.pairs[0].tx.send(&frame(mac(1), mac(2), 60, at)));
    }
    nic.vmm.vrings[1].base = nic.pairs[0].tx.queue.serve_as_vmm(before, 6);
    assert_eq!(nic.vmm.vrings[1].base, before + 6);
    nic.cont().unwrap();
    echo(&mut nic, 0, 64);
    drop(nic);
    device.join().unwrap();
}

#[test]
fn memory_comes_and_goes_under_running_rings() {
    for kind in Kind::ALL {
        let (device, mut nic) = loopback(&NicConfig { pairs: 2, enabled_pairs: 2, ..NicConfig::of(kind) });
        let extra = Region::new(0x8_0000_0000, 0x7777_0000_0000, 4 << 20);
        nic.plug(extra.clone()).unwrap();
        let buffer = nic.vmm.ram.alloc_in(extra.gpa, 2048, 64);
        let sent = frame(mac(1), mac(2), 500, 7);
        nic.vmm.ram.write(buffer, &[0; 12]);
        nic.vmm.ram.write(buffer + 12, &sent);
        nic.pairs[0].tx.queue.add(&[Desc::readable(buffer, 512)], false).unwrap();
        nic.pairs[0].tx.queue.publish();
        assert_same(&nic.receive_on(0, 1)[0].frame, &sent, "from hot-plugged memory");
        nic.unplug(extra.gpa).unwrap();
        echo(&mut nic, 0, 1514);
        drop(nic);
        device.join().unwrap();
    }
}

#[test]
fn interrupts_stay_away_when_asked() {
    for features in [LINUX, LINUX & !feature::EVENT_IDX] {
        let (device, mut nic) = loopback(&NicConfig { features, ..NicConfig::default() });
        nic.pairs[0].tx.queue.set_quiet(true);
        nic.pairs[0].rx.queue.set_quiet(true);
        nic.pairs[0].tx.queue.take_calls();
        let before = nic.pairs[0].rx.queue.take_calls();
        echo(&mut nic, 0, 1514);
        assert_eq!(nic.pairs[0].rx.queue.take_calls(), before);
        nic.pairs[0].rx.queue.set_quiet(false);
        echo(&mut nic, 0, 1514);
        assert!(nic.pairs[0].rx.queue.take_calls() > before);
        drop(nic);
        device.join().unwrap();
    }
}

#[test]
fn an_in_order_device_may_use_a_batch_with_one_entry() {
    let (device, mut nic) = loopback(&NicConfig::default());
    let ring = Ring::alloc(&nic.vmm.ram, 8);
    let mut queue = frontend::queue::Queue::new(ring.clone(), feature::IN_ORDER, false);
    let heads: Vec<_> = (0..3).map(|_| queue.add(&[Desc::writable(0, 100)], false).unwrap()).collect();
    assert_eq!(heads, [0, 1, 2]);
    queue.publish();
    ring.set_used_entry(0, 2, 60);
    ring.set_used_idx(3);
    let used = queue.collect();
    assert_eq!(
        used.iter().map(|used| (used.head, used.len)).collect::<Vec<_>>(),
        [(0, None), (1, None), (2, Some(60))]
    );
    nic.drain();
    drop(nic);
    device.join().unwrap();
}

#[test]
#[should_panic(expected = "not outstanding")]
fn a_used_entry_out_of_thin_air_is_noticed() {
    let (_device, mut nic) = loopback(&NicConfig::default());
    nic.stop().unwrap();
    let idx = nic.pairs[0].rx.queue.ring.used_idx();
    nic.pairs[0].rx.queue.ring.set_used_entry(idx, 999, 60);
    nic.pairs[0].rx.queue.ring.set_used_idx(idx + 1);
    nic.poll();
}

#[test]
fn qemu_enables_rings_before_it_sets_features() {
    let (device, nic) = loopback(&NicConfig { pairs: 2, ..NicConfig::of(Kind::Qemu72) });
    let requests = device.requests();
    let first = |request| requests.iter().position(|seen| *seen == request).unwrap();
    assert!(first(request::SET_VRING_ENABLE) < first(request::SET_FEATURES));
    assert!(first(request::GET_PROTOCOL_FEATURES) < first(request::SET_OWNER));
    let regions = requests.iter().filter(|seen| **seen == request::ADD_MEM_REG).count();
    assert_eq!(regions, 6, "three regions, once per pair");
    drop(nic);
    device.join().unwrap();
}

#[test]
fn a_cut_connection_ends_in_the_middle_of_a_message() {
    for bytes in [0, 5, 12, 40, 300] {
        let (device, session) = Loopback::start();
        let config = NicConfig { cut_after: Some(bytes), ..NicConfig::default() };
        let error = Nic::start(session, &config).err().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted);
        device.join().unwrap();
    }
}

#[test]
fn a_footprint_tells_what_front_ends_left_from_what_the_daemon_keeps() {
    let of = |fds: &[(&str, usize)], threads: &[(&str, usize)]| {
        let owned = |all: &[(&str, usize)]| all.iter().map(|(name, count)| (name.to_string(), *count)).collect();
        Footprint { fds: owned(fds), threads: owned(threads), ..Footprint::default() }
    };
    let ram = "/memfd:guest-ram (deleted)";
    let before = of(&[("socket", 5), (ram, 3)], &[("linecardd", 1), ("requests", 3), (CONNECTIONS, 2)]);
    // Fewer than there were, a thread and a file for a first use, and API calls that came at once.
    let threads = [("linecardd", 1), ("requests", 9), ("reaper", 1)];
    let kept = of(&[("socket", 7), ("anon_inode:[eventfd]", 1), ("/run/rings/a", 1)], &threads);
    assert_eq!(kept.beyond(&before), [""; 0]);
    assert!(!kept.is_steady(&before) && before.is_steady(&before));
    let left = of(&[("socket", 8), (ram, 4), ("/run/rings/a", 2)], &[(CONNECTIONS, 3), ("shard-0", 2)]);
    let lines = [
        format!("4 of {ram}, 3 before"),
        "2 of /run/rings/a, 0 before".into(),
        "8 of socket, 5 before".into(),
        "2 of shard-0, 0 before".into(),
        format!("3 of {CONNECTIONS}, 2 before"),
    ];
    assert_eq!(left.beyond(&before), lines);
}

/// The same front end against an independent back end: two `net_vhost` ports of testpmd that forward to each other.
struct Testpmd {
    dir: tempfile::TempDir,
    child: std::process::Child,
}

impl Testpmd {
    fn start(queues: usize) -> Self {
        let dir = tempfile::TempDir::with_prefix("testpmd-").unwrap();
        let vdev = |at: u32| format!("net_vhost{at},iface={}/s{at},queues={queues}", dir.path().display());
        let prefix = dir.path().file_name().unwrap().to_str().unwrap();
        let mut child = std::process::Command::new("dpdk-testpmd")
            .args(["-l", "0-1", "--no-pci", "--file-prefix", prefix, "--no-huge", "-m", "256"])
            .args(["--vdev", &vdev(0), "--vdev", &vdev(1), "--", "--no-mlockall", "-i", "--forward-mode=io"])
            .args(["--nb-cores=1", "--total-num-mbufs=8192", "--no-lsc-interrupt", "--max-pkt-len=9200"])
            .args([format!("--rxq={queues}"), format!("--txq={queues}")])
            .stdin(std::process::Stdio::piped())
            .stdout(std::fs::File::create(dir.path().join("log")).unwrap())
            .stderr(std::fs::File::options().create(true).append(true).open(dir.path().join("err")).unwrap())
            .spawn()
            .expect("dpdk-testpmd");
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"start\n").unwrap();
        Self { dir, child }
    }

    fn socket(&self, at: u32) -> std::path::PathBuf {
        self.dir.path().join(format!("s{at}"))
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default());
            eprintln!("{}", std::fs::read_to_string(self.dir.path().join("err")).unwrap_or_default());
        }
    }
}

/// testpmd keeps the pair, and starts each in its own time.
fn meet_on(pair: usize, from: &mut Nic, to: &mut Nic) {
    let mut number = 0;
    let mut last = Vec::new();
    frontend::eventually("testpmd forwards this pair", || {
        number += 1;
        last = frame(to.mac, from.mac, 60, number);
        from.send_on(pair, &last);
        let end = std::time::Instant::now() + std::time::Duration::from_millis(50);
        to.gather(1, end).iter().any(|(on, got)| *on == pair && got.frame == last).then_some(())
    });
}

#[test]
#[ignore = "starts dpdk-testpmd (Debian package dpdk): cargo test --test frontend_selftest -- --ignored"]
fn testpmd_understands_every_front_end() {
    let device = Testpmd::start(2);
    for kind in Kind::ALL {
        for form in [LINUX, LINUX | feature::IN_ORDER, feature::ANY_LAYOUT, feature::VERSION_1] {
            // Without MQ testpmd throws every pair but the first away.
            let features = form | feature::MQ;
            for indirect in [false, true] {
                let config = NicConfig { pairs: 2, enabled_pairs: 2, features, indirect, ..NicConfig::of(kind) };
                let mut a = Nic::up(&device.socket(0), &config);
                let mut b = Nic::up(&device.socket(1), &config);
                for pair in [0, 1] {
                    meet_on(pair, &mut a, &mut b);
                    meet_on(pair, &mut b, &mut a);
                }
                for at in 0..2000 {
                    let sent = frame(mac(1), mac(2), 60 + at % 1400, at as u64);
                    a.send_on(at % 2, &sent);
                    assert_same(&b.receive_on(at % 2, 1)[0].frame, &sent, "by way of testpmd");
                    b.send_on(at % 2, &sent);
                    assert_same(&a.receive_on(at % 2, 1)[0].frame, &sent, "and back");
                }
                for _ in 0..3 {
                    a.stop().unwrap();
                    a.cont().unwrap();
                    b.rebind(features).unwrap();
                    frontend::nic::meet(&mut a, &mut b);
                }
            }
        }
    }
}
