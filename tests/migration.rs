//! Dirty logging, as a front end uses it while its VM is migrated: every page that the switch writes is marked, and no
//! log, however wrong, harms anybody.
//!
//! The proof compares the guest's whole memory before and after: while the guest itself keeps still, whatever changed was
//! written by the switch, and has to be marked. Real migrations, of QEMU guests, are in qemu-tests/.

#![allow(clippy::unwrap_used)]

mod frontend;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use frontend::daemon::{Daemon, port, port_with, preamble};
use frontend::driver::Shape;
use frontend::eventually;
use frontend::frame::{BROADCAST, frame};
use frontend::large::{KINDS, SEGMENT};
use frontend::nic::{LINUX, Nic, NicConfig, exchange, meet};
use frontend::ram::{Region, memfd};
use frontend::session::feature::GUEST_OFFLOADS;
use frontend::session::{feature, is_closed, is_nack};
use frontend::vmm::Kind;

const PAGE: u64 = 4096;

/// A dirty log as QEMU makes it: a memfd with a bit for each page up to the end of guest memory.
struct Log {
    file: Arc<File>,
    len: u64,
}

impl Log {
    fn covering(end: u64) -> Self {
        let len = end.div_ceil(8 * PAGE);
        Self { file: memfd(len), len }
    }

    fn of(nic: &Nic) -> Self {
        Self::covering(nic.vmm.ram.regions().iter().map(|region| region.gpa + region.len).max().unwrap())
    }

    fn has(&self, guest: u64) -> bool {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, guest / PAGE / 8).unwrap();
        byte[0] >> (guest / PAGE % 8) & 1 != 0
    }

    fn pages(&self) -> u32 {
        let mut bytes = vec![0; self.len as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes.iter().map(|byte| byte.count_ones()).sum()
    }

    fn clear(&self) {
        self.file.write_all_at(&vec![0; self.len as usize], 0).unwrap();
    }

    /// What QEMU sends when a migration begins.
    fn start(&self, nic: &Nic) {
        nic.session().set_log_base(&self.file, 0, self.len).unwrap();
        log_all(nic, true).unwrap();
    }
}

/// SET_FEATURES with or without LOG_ALL, and each ring's SET_VRING_ADDR as QEMU repeats it with both.
fn log_all(nic: &Nic, on: bool) -> std::io::Result<()> {
    let features = nic.features() & !feature::LOG_ALL | if on { feature::LOG_ALL } else { 0 };
    nic.session().set_features(features, true)?;
    for (index, vring) in nic.vmm.vrings.iter().enumerate() {
        nic.session().set_vring_addr(index as u32, &vring.ring, true)?;
    }
    nic.vmm.settle()
}

fn snapshot(nic: &Nic) -> Vec<(u64, Vec<u8>)> {
    let regions = nic.vmm.ram.regions();
    regions.iter().map(|region| (region.gpa, nic.vmm.ram.bytes(region.gpa, region.len as usize))).collect()
}

/// Guest addresses of the pages that differ.
fn changed(before: &[(u64, Vec<u8>)], after: &[(u64, Vec<u8>)]) -> Vec<u64> {
    let mut differ = Vec::new();
    for ((gpa, old), (_, new)) in before.iter().zip(after) {
        for (at, (old, new)) in old.chunks(PAGE as usize).zip(new.chunks(PAGE as usize)).enumerate() {
            if old != new {
                differ.push(gpa + at as u64 * PAGE);
            }
        }
    }
    differ
}

/// Has `a` send `frames` to `b`, whose guest does nothing meanwhile, and waits until the switch has used its buffers.
fn send_to_a_sleeper(a: &mut Nic, b: &Nic, frames: usize, len: usize) {
    let rx = &b.pairs[0].rx.queue;
    let before = rx.waiting();
    for at in 0..frames {
        a.send(&frame(b.mac, a.mac, len, at as u64));
    }
    a.drain();
    eventually("the frames are in b's memory", || (rx.waiting() >= before + frames).then_some(()));
}

#[test]
fn every_page_that_the_switch_writes_is_marked() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let linux = NicConfig::default();
    let shapes = [
        linux.clone(),
        NicConfig { rx_buffer: 300, ..linux.clone() },
        NicConfig { rx_shape: Shape::Pieces(700), ..linux.clone() },
        NicConfig { rx_shape: Shape::HeaderApart, features: LINUX & !feature::MRG_RXBUF, ..linux.clone() },
        // A guest that does not merge posts buffers of 64 KiB, of which a frame touches a page or two.
        NicConfig { features: LINUX & !feature::MRG_RXBUF, rx_buffer: 65_562, size: 32, ..linux.clone() },
        NicConfig { indirect: true, rx_shape: Shape::Pieces(1000), ..linux.clone() },
        NicConfig { features: LINUX & !feature::EVENT_IDX, size: 1024, ..linux.clone() },
        NicConfig { features: feature::ANY_LAYOUT, ..linux.clone() },
        NicConfig { kind: Kind::Qemu72, pairs: 2, enabled_pairs: 2, ..linux.clone() },
        NicConfig { features: LINUX | feature::RING_PACKED, ..linux.clone() },
        NicConfig { features: LINUX | feature::RING_PACKED, rx_buffer: 300, size: 1000, ..linux.clone() },
        NicConfig { features: LINUX | feature::RING_PACKED, rx_shape: Shape::Pieces(700), size: 300, ..linux.clone() },
    ];
    for config in shapes {
        let mut a = Nic::up(&daemon.socket("a"), &linux);
        let mut b = Nic::up(&daemon.socket("b"), &config);
        meet(&mut a, &mut b);
        let log = Log::of(&b);
        log.start(&b);
        assert!(b.vmm.vrings.iter().all(|vring| log.has(vring.ring.used)), "rings are marked from the first moment on");
        log.clear();
        let before = snapshot(&b);
        send_to_a_sleeper(&mut a, &b, 20, 1400);
        b.stop().unwrap();
        let changed = changed(&before, &snapshot(&b));
        assert!(changed.len() > 7, "20 frames of 1400 bytes lie on more pages than {changed:x?}");
        let lost: Vec<_> = changed.iter().filter(|&&page| !log.has(page)).collect();
        assert!(lost.is_empty(), "written and not marked: {lost:x?}");
        assert!((log.pages() as usize) < changed.len() + 40, "{} pages marked, {} written", log.pages(), changed.len());
    }
}

#[test]
fn every_page_of_merged_segments_is_marked_even_if_one_is_damaged() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let guest = NicConfig { features: LINUX | GUEST_OFFLOADS, ..NicConfig::default() };
    let shapes = [
        guest.clone(),
        NicConfig { features: guest.features | feature::RING_PACKED, ..guest.clone() },
        NicConfig { features: guest.features & !feature::MRG_RXBUF, rx_buffer: 65_562, size: 32, ..guest },
    ];
    for (config, damaged) in shapes.iter().flat_map(|shape| [(shape, false), (shape, true)]) {
        let mut a = Nic::up(&daemon.socket("a"), &NicConfig::default());
        let mut b = Nic::up(&daemon.socket("b"), config);
        meet(&mut a, &mut b);
        let merged = daemon.port("b").counter("tx_merged");
        let log = Log::of(&b);
        log.start(&b);
        log.clear();
        let before = snapshot(&b);
        let mut segments = KINDS[0].segments(b.mac, a.mac, 30 * SEGMENT, 1, false);
        if damaged {
            segments[29].1[700] ^= 1;
        }
        for (header, bytes) in &segments {
            assert!(a.pairs[0].tx.queue_bytes(header, bytes), "the ring holds them");
        }
        a.pairs[0].tx.queue.publish();
        a.drain();
        eventually("all is delivered", || daemon.port("a").is_conserved().then_some(()));
        b.stop().unwrap();
        let changed = changed(&before, &snapshot(&b));
        let lost: Vec<_> = changed.iter().filter(|&&page| !log.has(page)).collect();
        assert!(changed.len() > 10 && lost.is_empty(), "written and not marked: {lost:x?}");
        let merged = daemon.port("b").counter("tx_merged") - merged;
        assert_eq!(merged, if damaged { 0 } else { 30 });
    }
}

#[test]
fn sent_frames_mark_the_used_ring_and_nothing_else() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let (mut a, mut b) =
        (Nic::up(&daemon.socket("a"), &NicConfig::default()), Nic::up(&daemon.socket("b"), &NicConfig::default()));
    meet(&mut a, &mut b);
    let log = Log::of(&a);
    log.start(&a);
    log.clear();
    send_to_a_sleeper(&mut a, &b, 20, 1400);
    let used = a.pairs[0].tx.queue.ring.used;
    eventually("the used ring is marked", || log.has(used).then_some(()));
    a.stop().unwrap();
    let rings: Vec<_> = a.vmm.vrings.iter().map(|vring| vring.ring.used).collect();
    let of_rings =
        |page: u64| rings.iter().any(|&used| (used / PAGE..=(used + 6 + 8 * 256) / PAGE).contains(&(page / PAGE)));
    let marked = (0..log.len * 8).map(|page| page * PAGE).filter(|&page| log.has(page));
    let stray: Vec<_> = marked.filter(|&page| !of_rings(page)).collect();
    assert!(stray.is_empty(), "nobody wrote to {stray:x?}");
}

#[test]
fn a_migration_that_is_cancelled_marks_nothing_more_and_can_be_tried_again() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let (mut a, mut b) =
        (Nic::up(&daemon.socket("a"), &NicConfig::default()), Nic::up(&daemon.socket("b"), &NicConfig::default()));
    meet(&mut a, &mut b);
    let mut before: Option<Log> = None;
    for _ in 0..3 {
        let log = Log::of(&b);
        log.start(&b);
        exchange(&mut a, &mut b, 50);
        assert!(log.pages() > 0);
        let stale = before.as_ref().map_or(0, Log::pages);
        assert_eq!(stale, 0, "the log of the migration before is still written to");
        log_all(&b, false).unwrap();
        log.clear();
        exchange(&mut a, &mut b, 50);
        assert_eq!(log.pages(), 0, "marked after the migration was cancelled");
        before = Some(log);
    }
}

#[test]
fn a_restart_of_the_rings_and_a_change_of_memory_keep_the_log() {
    let daemon = Daemon::with_ports(&["a", "b"]);
    let (mut a, mut b) =
        (Nic::up(&daemon.socket("a"), &NicConfig::default()), Nic::up(&daemon.socket("b"), &NicConfig::default()));
    meet(&mut a, &mut b);
    let end = Log::of(&b).len * 8 * PAGE;
    let log = Log::of(&b);
    log.start(&b);
    // The guest is stopped and goes on: the start sequence repeats the features as they are.
    b.stop().unwrap();
    b.vmm.features |= feature::LOG_ALL;
    log.clear();
    b.cont().unwrap();
    exchange(&mut a, &mut b, 20);
    assert!(log.pages() > 0, "the rings have forgotten their log");

    // Memory that the log has no bits for is refused, and nothing has changed.
    let region = Region::new(end, 0x7e00_0000_0000, 2 << 20);
    let error = b.session().add_mem_reg(&region, true).unwrap_err();
    assert!(is_nack(&error), "{error}");
    exchange(&mut a, &mut b, 20);
    // QEMU sends a longer log first.
    let longer = Log::covering(end + (2 << 20));
    b.session().set_log_base(&longer.file, 0, longer.len).unwrap();
    b.plug(region).unwrap();
    log.clear();
    exchange(&mut a, &mut b, 20);
    assert!(longer.pages() > 0 && log.pages() == 0, "the longer log is the one that counts");
}

#[test]
fn logs_that_do_not_fit_end_the_connection_and_nothing_else() {
    let daemon = Daemon::with_ports(&["a", "b", "c"]);
    let (mut a, mut c) =
        (Nic::up(&daemon.socket("a"), &NicConfig::default()), Nic::up(&daemon.socket("c"), &NicConfig::default()));
    meet(&mut a, &mut c);
    let short = memfd(PAGE);
    let disk = Arc::new(File::open("/proc/self/exe").unwrap());
    let bad = [
        (&short, 0, 0),
        (&short, 0, PAGE),
        (&short, 0, 1 << 17),
        (&short, 1 << 40, 1 << 17),
        (&short, u64::MAX, 1 << 17),
        (&short, 0, u64::MAX),
        (&disk, 0, 1 << 17),
    ];
    for (file, offset, len) in bad {
        let b = Nic::up(&daemon.socket("b"), &NicConfig::default());
        // It has no way to say no, and a front end that took silence for yes would lose what the guest receives.
        let error = b.session().set_log_base(file, offset, len).unwrap_err();
        assert!(is_closed(&error), "{offset:#x}+{len:#x}: {error}");
        exchange(&mut a, &mut c, 16);
    }
}

#[test]
fn a_log_whose_file_shrinks_stops_its_port_until_the_migration_is_cancelled() {
    let daemon = Daemon::with_ports(&["a", "b", "c"]);
    let up = |port: &str| Nic::up(&daemon.socket(port), &NicConfig::default());
    let (mut a, mut b, mut c) = (up("a"), up("b"), up("c"));
    meet(&mut a, &mut c);
    // What was flooded to the third has come before this is over.
    meet(&mut a, &mut b);
    b.poll();
    c.poll();
    for _ in 0..2 {
        let log = Log::of(&b);
        log.start(&b);
        log.file.set_len(0).unwrap();
        let sent = frame(b.mac, a.mac, 400, 1);
        a.send(&sent);
        // What is written now would be missing at the destination.
        let port = daemon.port_when("b", "its log is gone", |port| port.state() == "stopped");
        let reason = port.reason().unwrap_or_default();
        assert!(reason.contains("shrank") && reason.contains("cancel the migration"), "{reason}");
        exchange(&mut a, &mut c, 50);
        log_all(&b, false).unwrap();
        b.stop().unwrap();
        b.vmm.features &= !feature::LOG_ALL;
        b.cont().unwrap();
        a.drain();
        meet(&mut a, &mut b);
        exchange(&mut a, &mut b, 50);
    }
}

#[test]
fn a_guest_whose_address_is_configured_is_announced_when_it_starts() {
    let daemon = Daemon::start(|dir| {
        preamble(dir)
            + "networks: { lan: {} }\nports:\n"
            + &port(dir, "b", "lan")
            + &port_with(dir, "a", "lan", "server", ", mac: \"02:00:00:00:0a:0a\"")
    });
    let mut b = Nic::up(&daemon.socket("b"), &NicConfig::default());
    let mut a = Nic::up(&daemon.socket("a"), &NicConfig::default());
    for start in 1..=3 {
        let heard = b.receive(1);
        let frame = &heard[0].1.frame;
        // RARP (RFC 903), broadcast from the guest's own address, as QEMU sends it for guests that cannot.
        assert_eq!(frame[..6], BROADCAST, "start {start}");
        assert_eq!(frame[6..14], [2, 0, 0, 0, 0x0a, 0x0a, 0x80, 0x35]);
        assert_eq!(heard.len(), 1, "one announcement a start");
        a.stop().unwrap();
        a.cont().unwrap();
    }
}
