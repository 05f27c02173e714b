//! The file of records where it could not be made whole: a process that was killed, a file system that was full.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::bases;
use super::record::{open, place, resumed, try_open, use_some};
use crate::ring::packed_driver::PackedDriver;
use crate::ring::{Records, RecordsError};

/// A file of zeros, with memory for so many pages of them, that this user alone may write.
fn begun(path: &Path, pages: usize, len: u64) -> File {
    let file = File::create_new(path).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    file.write_all_at(&vec![0; pages * 4096], 0).unwrap();
    file.set_len(len).unwrap();
    file
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn a_file_that_was_begun_and_says_nothing_is_used_or_removed() {
    let (_directory, path) = place();
    let records = open(&path);
    let len = fs::metadata(&path).unwrap().len();
    drop(records);
    // What a process that is killed leaves after each step: a file, its first page, its length.
    for (pages, length) in [(0, 0), (1, 0), (0, 4096), (0, len), (1, len)] {
        begun(&path, pages, length);
        let records = try_open(&path).unwrap_or_else(|error| panic!("{pages} pages, {length} bytes: {error}"));
        records.record(1, 8).unwrap();
        drop(records);
        begun(&path, pages, length);
        Records::sweep(path.parent().unwrap());
        assert!(!path.exists(), "{pages} pages, {length} bytes: nobody needs it");
    }
    // Zeros and then something, and more zeros than we ever write.
    let (file, at) = (begun(&path, 0, len), len - 1);
    file.write_all_at(&[1], at).unwrap();
    assert!(try_open(&path).unwrap_err().to_string().contains("was not written by"));
    Records::sweep(path.parent().unwrap());
    let mut last = [0];
    file.read_exact_at(&mut last, at).unwrap();
    assert!(path.exists() && last == [1]);
    file.set_len(0).unwrap();
    file.set_len(1 << 40).unwrap();
    assert!(try_open(&path).unwrap_err().to_string().contains("was not written by"));
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn a_process_that_is_being_started_keeps_no_file_from_the_next_who_opens_it() {
    let (_directory, path) = place();
    let records = open(&path);
    let mut driver = PackedDriver::new(8, bases(8).next().unwrap());
    let mut ring = resumed(&driver, records.record(0, 8).unwrap());
    use_some(&mut driver, &mut ring, 1);
    // What a process has from its fork(2) until its execve(2): the same open file.
    let _copied = records.file().try_clone().unwrap();
    assert!(matches!(try_open(&path), Err(RecordsError::InUse(_))), "it is in use");
    drop((ring, records));
    assert!(path.exists(), "it says where the ring stood");
    open(&path);
}

/// A tmpfs of 16 pages, in a mount namespace that lasts as long as this.
struct SmallTmpfs {
    holder: Child,
    path: PathBuf,
}

impl SmallTmpfs {
    fn new() -> Self {
        let mut unshare = Command::new("unshare");
        // Who is not root is so in a user namespace of its own.
        if !rustix::process::geteuid().is_root() {
            unshare.args(["--user", "--map-root-user"]);
        }
        let script = "mount -t tmpfs -o size=64k linecard-test /mnt && echo mounted && exec cat";
        unshare.args(["--mount", "sh", "-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = unshare.spawn().expect("unshare, of util-linux");
        let told = holder.stdout.as_mut().unwrap().read_exact(&mut [0; 8]);
        told.expect("a tmpfs, which takes root or user namespaces");
        let path = format!("/proc/{}/root/mnt", holder.id()).into();
        Self { holder, path }
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        // The end of its input ends it, and the namespace with it.
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

#[test]
#[cfg_attr(miri, ignore = "mounts")]
fn a_file_system_that_was_full_once_is_used_when_it_has_room() {
    let tmpfs = SmallTmpfs::new();
    let rings = tmpfs.path.join("rings");
    fs::create_dir(&rings).unwrap();
    fs::set_permissions(&rings, Permissions::from_mode(0o700)).unwrap();
    let mut filler = File::create(tmpfs.path.join("filler")).unwrap();
    while filler.write(&[1; 4096]).is_ok_and(|written| written > 0) {}
    let path = rings.join("vm1");
    let full = try_open(&path).unwrap_err();
    let cause = std::error::Error::source(&full).map(ToString::to_string).unwrap_or_default();
    assert!(cause.contains("No space left"), "{full}: {cause}");
    let left = path.exists();
    filler.set_len(0).unwrap();
    assert_eq!(try_open(&path).map(drop).map_err(|error| error.to_string()), Ok(()));
    assert!(!left, "a file that says nothing was left");
}
