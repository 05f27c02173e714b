//! Huge pages that tests use: some taken into the host's pool and given back ([`Pool`]), and a file system with room for a few
//! ([`SmallHugetlbfs`]), which both take root. And parts of a page of 1 GiB, which few hosts have to give.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use super::frontend::DEADLINE;
use super::frontend::child;
use super::frontend::frame::frame;
use super::frontend::ram::{Region, huge_memfd};
use super::frontend::ring::Desc;
use super::frontend::session::feature;
use super::{MIB, Scene, refused};

/// So many huge pages more than there were, while this lives. Others add and take away meanwhile, so what counts is the
/// difference.
pub(super) struct Pool {
    file: String,
    added: u64,
    /// Keeps others from having one meanwhile, or from being alone.
    _company: Option<File>,
}

impl Pool {
    /// `count` pages of `mib` MiB more.
    ///
    /// # Panics
    /// The kernel does not give them: what a test is about would go untested.
    #[track_caller]
    pub(super) fn reserve(mib: u64, count: u64) -> Self {
        Self::try_reserve(mib, count).fill(mib, count)
    }

    /// The same, while no other test here has a pool: for who keeps others from touching huge pages.
    ///
    /// # Panics
    /// As above.
    #[track_caller]
    pub(super) fn reserve_alone(mib: u64, count: u64) -> Self {
        Self::new(mib, count, FlockOperation::LockExclusive).fill(mib, count)
    }

    #[track_caller]
    fn fill(mut self, mib: u64, count: u64) -> Self {
        let deadline = Instant::now() + DEADLINE;
        while self.added < count && Instant::now() < deadline {
            // What is free lies in pieces, or belongs to a test that is about to end.
            let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
            std::thread::sleep(Duration::from_millis(200));
            self.added += Self::grow(&self.file, count - self.added);
        }
        assert!(
            self.added >= count,
            "{} of {count} huge pages of {mib} MiB: this test takes root and free memory",
            self.added
        );
        self
    }

    /// As many of them as the kernel has.
    pub(super) fn try_reserve(mib: u64, count: u64) -> Self {
        Self::new(mib, count, FlockOperation::LockShared)
    }

    fn new(mib: u64, count: u64, company: FlockOperation) -> Self {
        const POOLS: &str = "/sys/kernel/mm/hugepages";
        let pools = File::open(POOLS).ok();
        pools.iter().for_each(|pools| rustix::fs::flock(pools, company).unwrap());
        let file = format!("{POOLS}/hugepages-{}kB/nr_hugepages", mib * 1024);
        let added = Self::grow(&file, count);
        Self { file, added, _company: pools }
    }

    fn grow(file: &str, count: u64) -> u64 {
        let (before, after) = change(file, |before| before + count);
        after.saturating_sub(before)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        change(&self.file, |before| before.saturating_sub(self.added));
    }
}

/// Changes a number of pages, alone of all tests on this machine; what it was, and what it is then.
fn change(file: &str, wish: impl Fn(u64) -> u64) -> (u64, u64) {
    let Ok(lock) = File::open(file) else { return (0, 0) };
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
    let number = || std::fs::read_to_string(file).unwrap().trim().parse().unwrap();
    let before = number();
    // Who may not, or has no memory left, sees the number as it was.
    let _ = std::fs::write(file, wish(before).to_string());
    (before, number())
}

/// A hugetlbfs of its own, in a mount namespace that lasts as long as this.
pub(super) struct SmallHugetlbfs {
    holder: Child,
    path: PathBuf,
}

impl SmallHugetlbfs {
    pub(super) fn new(page: &str, size: &str) -> Self {
        let options = format!("pagesize={page},size={size}");
        let script = format!("mount -t hugetlbfs -o {options} linecard-test /mnt && echo mounted && exec cat");
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "sh", "-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = child::spawn(&mut unshare);
        let told = std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut [0; 8]);
        told.expect("a hugetlbfs, which takes root");
        let path = format!("/proc/{}/root/mnt", holder.id()).into();
        Self { holder, path }
    }

    /// A new file of `len` bytes, without a page yet.
    pub(super) fn file(&self, name: &str, len: u64) -> File {
        assert!(len.is_multiple_of(2 * MIB));
        let path = self.path.join(name);
        let file = File::options().create(true).truncate(true).read(true).write(true).open(path).unwrap();
        file.set_len(len).unwrap();
        file
    }

    /// Removes all files.
    pub(super) fn empty(&self) {
        std::fs::read_dir(&self.path).unwrap().flatten().for_each(|file| std::fs::remove_file(file.path()).unwrap());
    }
}

impl Drop for SmallHugetlbfs {
    fn drop(&mut self) {
        // The end of its input ends it, and the namespace with it.
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

/// Port `bad` is up, or has said that the host has no such page; `true` if it is up.
#[track_caller]
fn is_up_or_says_why(scene: &Scene, done: impl Fn() -> bool) -> bool {
    let port = scene.daemon.port_when("bad", "it is settled", |port| port.state() == "stopped" || done());
    let named = port.reason().is_some_and(|why| why.contains("no memory left"));
    assert!(port.state() == "up" || named, "{}: {:?}", port.state(), port.reason());
    port.state() == "up"
}

/// A host that has such a page gives it, to whichever test comes first, and then what is written is there; one that has none
/// has that said.
#[test]
fn parts_of_a_page_of_1_gib_are_written_or_their_lack_is_named() {
    let _pool = Pool::try_reserve(1024, 1);
    let mut scene = Scene::new();
    for is_log in [true, false] {
        let nic = scene.nic();
        let file = huge_memfd(1 << 30, true);
        let sent = frame(nic.mac, scene.peer.mac, 1000, 1);
        let mut expected = vec![0; sent.len()];
        if is_log {
            nic.session().set_log_base(&file, 0, 256 * 1024).unwrap();
            nic.session().set_features(nic.features() | feature::LOG_ALL, true).unwrap();
        } else {
            let region =
                Region { gpa: 0x8_0000_0000, uva: 0x7777_0000_0000, len: 1 << 30, offset: 0, file: file.clone() };
            // The kernel maps a part of a page as all of it.
            let part = Region { len: 2 * MIB, ..region.clone() };
            refused(nic.session().add_mem_reg(&part, true), "memory in a part of a page");
            nic.session().add_mem_reg(&region, true).unwrap();
            let ring = &nic.vmm.vrings[0].ring;
            (0..256).for_each(|head| ring.set_desc(head, Desc::writable(region.gpa + MIB, 2048)));
            expected.copy_from_slice(&sent);
        }
        let waiting = nic.pairs[0].rx.queue.waiting();
        scene.peer.send(&sent);
        scene.peer.drain();
        if is_up_or_says_why(&scene, || nic.pairs[0].rx.queue.waiting() > waiting) {
            let mut bytes = vec![0; if is_log { 256 * 1024 } else { sent.len() }];
            file.read_exact_at(&mut bytes, if is_log { 0 } else { MIB + 12 }).unwrap();
            assert!(
                if is_log { bytes.iter().any(|&byte| byte != 0) } else { bytes == expected },
                "not written: log {is_log}"
            );
        }
        scene.witness.keeps_going();
        drop(nic);
        scene.peer.poll();
        scene.expect_usable("a part of a page of 1 GiB");
    }
    scene.finish();
}
