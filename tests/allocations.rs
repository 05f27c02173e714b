//! Nothing is allocated on a shard while it moves frames: not for unicast, floods, merged or scattered buffers, several
//! queue pairs, large frames that are cut or segments that are merged, drops, or the way to rest and back.
//!
//! The daemon runs in this process, under an allocator that counts what threads named after shards ask for. One test and
//! no more, because both are the process's own.

#![allow(clippy::unwrap_used)]
#![allow(unsafe_code)] // A global allocator is unsafe to implement.

mod frontend;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use frontend::daemon::{port, preamble};
use frontend::driver::Shape;
use frontend::eventually;
use frontend::frame::{BROADCAST, frame};
use frontend::large::{KINDS, SEGMENT};
use frontend::nic::{LINUX, Nic, NicConfig, exchange, meet};
use frontend::session::feature::{self, GUEST_OFFLOADS, HOST_OFFLOADS};

/// What shards have asked for.
static ON_SHARDS: AtomicU64 = AtomicU64::new(0);

struct Counting;

/// Whether the calling thread is a shard: asks the kernel, because asking std would allocate.
fn on_a_shard() -> bool {
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, with their end (prctl(2)).
    let done = unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    done == 0 && name.starts_with(b"shard-")
}

// SAFETY: every call is passed on to the system's allocator as it came; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ON_SHARDS.fetch_add(u64::from(on_a_shard()), Ordering::Relaxed);
        // SAFETY: the caller's promise for `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: as above: `place` came from `System` with this `layout`.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ON_SHARDS.fetch_add(u64::from(on_a_shard()), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// All that guests do in a minute, in a moment.
fn traffic(nics: &mut [Nic]) {
    for other in 1..nics.len() {
        let (first, rest) = nics.split_at_mut(1);
        exchange(&mut first[0], &mut rest[other - 1], 100);
    }
    let from = nics[0].mac;
    large_frames(nics);
    for at in 0..20 {
        nics[0].send(&frame(BROADCAST, from, 60 + at as usize, at));
        // To a station that nobody knows, and from an address that none has.
        nics[0].send(&frame([2, 0xff, 0, 0, 0, 1], from, 60, at));
        nics[0].send(&frame(nics[1].mac, [1; 6], 60, at));
    }
    nics[0].drain();
    for nic in &mut nics[1..] {
        assert_eq!(nic.receive(40).len(), 40, "the broadcasts, and what nobody is known for");
    }
}

/// Large frames to a guest that takes none, and segments to one that would rather have large frames.
fn large_frames(nics: &mut [Nic]) {
    for (at, other) in [(0, 2), (1, 1)] {
        let kind = KINDS[at];
        let (to, from) = (nics[other].mac, nics[0].mac);
        let mut frames = kind.segments(to, from, 9 * SEGMENT, 1, false);
        if other == 2 {
            frames = vec![kind.make(to, from, 9 * SEGMENT, 1)];
        }
        for (header, bytes) in &frames {
            assert!(nics[0].pairs[0].tx.queue_bytes(header, bytes), "the ring holds them");
        }
        nics[0].pairs[0].tx.queue.publish();
        nics[0].drain();
        let mut payload = 0;
        while payload < 9 * SEGMENT {
            let got = nics[other].receive(1);
            payload += got.iter().map(|(_, received)| received.frame.len() - kind.headers()).sum::<usize>();
        }
    }
}

#[test]
fn a_shard_that_moves_frames_allocates_nothing() {
    let dir = tempfile::TempDir::with_prefix("linecard-").unwrap();
    fs::create_dir(dir.path().join("state")).unwrap();
    let names = ["a", "b", "c", "d"];
    let ports: String = names.iter().map(|name| port(dir.path(), name, "lan")).collect();
    let file = dir.path().join("linecard.yaml");
    fs::write(&file, preamble(dir.path()) + "networks: { lan: {} }\nports:\n" + &ports).unwrap();
    let daemon =
        std::thread::spawn(move || linecard::daemon::run(&file, Path::new(env!("CARGO_BIN_EXE_linecardd"))).unwrap());

    let socket = |name: &str| -> PathBuf { dir.path().join(format!("{name}.sock")) };
    eventually("the daemon listens", || socket("d").exists().then_some(()));
    let linux = NicConfig::default();
    let configs = [
        NicConfig { features: LINUX | HOST_OFFLOADS, tx_buffer: 16_384, ..linux.clone() },
        NicConfig { features: LINUX | GUEST_OFFLOADS, rx_buffer: 300, ..linux.clone() },
        NicConfig { rx_shape: Shape::Pieces(700), features: LINUX & !feature::MRG_RXBUF, ..linux.clone() },
        NicConfig { pairs: 4, enabled_pairs: 4, indirect: true, shape: Shape::Pieces(90), ..linux },
    ];
    let mut nics: Vec<_> = names.iter().zip(&configs).map(|(name, config)| Nic::up(&socket(name), config)).collect();
    for other in 1..nics.len() {
        let (first, rest) = nics.split_at_mut(1);
        meet(&mut first[0], &mut rest[other - 1]);
    }
    nics.iter_mut().for_each(|nic| drop(nic.poll()));
    // What grows to its size with its first use has done so after this.
    traffic(&mut nics);

    let before = ON_SHARDS.load(Ordering::Relaxed);
    assert!(before > 0, "shards allocate when they begin: nothing was counted at all");
    for _ in 0..5 {
        traffic(&mut nics);
    }
    assert_eq!(ON_SHARDS.load(Ordering::Relaxed) - before, 0, "allocations on shards");
    drop(nics);
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM).unwrap();
    daemon.join().unwrap();
}
