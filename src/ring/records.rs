//! The file that outlives this process and holds the [`Record`]s of one port's packed rings: [`Records`].
//!
//! It lies in a directory beside the API's socket, best on tmpfs. Who can write there can stop rings and have guests given
//! back what they never sent, so the directory and the file have to be this user's, and writable for nobody else; neither may
//! be a symbolic link, a file with anything in it that was not written by us is left alone, and only one process at a time has it.
//! Otherwise there are no records, which is said, and packed rings work as well until this process ends.
//!
//! The file begins with a page of its own: that it is ours, which boot of the host it is of, and which process the front end
//! is. It ends with that process: rings of a VM that is gone are forgotten when another process comes, or when the port goes;
//! where the port went first, [`Records::sweep`] finds the file.
//! Then a page of each ring has its header and 250 entries of its list; the rest of a list has pages when they are used, so
//! a port of n rings takes 4 KiB for each, and at most 16 bytes for each of their descriptors more.

#![allow(unsafe_code)] // The file is memory that another process may map as well, so it is no Rust slice.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, fallocate, flock, openat, statat, unlinkat};

use super::record::{ENTRY_WORDS, HEADER_WORDS, Record, STATE};
use crate::limits::{QUEUE_PAIRS, RING_SIZE};
use crate::sys::eventfd::EventFd;
use crate::sys::mapped_file::{MappedFile, MappedFileError};
use crate::sys::process_identity::ProcessIdentity;

/// Held where a file is opened and locked: who looks whether anybody needs it must not be taken for somebody who has it.
static OPENING: Mutex<()> = Mutex::new(());

/// Bytes before the records.
const FILE_HEADER_BYTES: usize = 4096;
/// Bytes of the file for each ring, in whole pages. Most of them are never touched, and then take no memory.
const RECORD_BYTES: usize = (8 * (HEADER_WORDS + ENTRY_WORDS * RING_SIZE as usize)).next_multiple_of(4096);
/// Bytes of the longest file: that of a port with every queue pair, and a control queue.
const MOST_BYTES: u64 = (FILE_HEADER_BYTES + (2 * QUEUE_PAIRS + 1) * RECORD_BYTES) as u64;
/// Bytes of a record that have their memory from the start.
const FIRST_BYTES: u64 = 4096;

/// The words of the file's header.
const MAGIC: u64 = u64::from_le_bytes(*b"LCrings2");
const MAGIC_WORD: usize = 0;
const BOOT_WORD: usize = 1;
const PROCESS_WORD: usize = 2;
const STARTED_WORD: usize = 3;

/// Why there are no records.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// The kernel says no.
    #[error("{0} cannot be used")]
    Open(PathBuf, #[source] io::Error),
    /// A symbolic link, a file where a directory should be, or the other way round, or a file with several names.
    #[error("{path} is not {expected}; remove it")]
    Kind {
        /// Of what.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
    /// Somebody else's.
    #[error("{path} belongs to user {owner} and not to user {user}, who runs linecardd; remove it")]
    Owner {
        /// Of what.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who we are.
        user: u32,
    },
    /// Others may write to it.
    #[error("others than its owner may write to {path} (mode {mode:04o}): chmod go-w, or remove it")]
    Writable {
        /// To what.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Somebody has it.
    #[error("another process is using {0}: give each linecardd an API socket in a directory of its own")]
    InUse(PathBuf),
    /// Contents that we have not written.
    #[error("{0} was not written by this version of linecardd and is left alone; remove it")]
    Foreign(PathBuf),
    /// The kernel did not map it.
    #[error("{0} cannot be mapped")]
    Map(PathBuf, #[source] MappedFileError),
    /// A ring that the port does not have.
    #[error("there is no ring {0}")]
    NoRing(usize),
}

/// The records of one port's rings, in one file. It goes when nothing is written in it and the port does.
#[derive(Debug)]
pub struct Records {
    path: PathBuf,
    directory: OwnedFd,
    name: String,
    rings: usize,
    mapping: MappedFile,
    /// Last, so that nothing of the file is ours any more when somebody else may have it.
    _lock: Lock,
}

/// A file that this process has to itself. flock(2) locks the open file, which a process that is being started has as well from
/// its fork(2) until its execve(2) has closed it, and a mapping too; so it is unlocked explicitly (LOCK_UN), and not by being closed.
#[derive(Debug)]
struct Lock(Arc<File>);

impl Lock {
    fn try_new(file: File) -> rustix::io::Result<Self> {
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self(Arc::new(file)))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // It has been locked by this open file, and so can be unlocked.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

impl Records {
    /// Whether there is a file called `name` in `directory`, of whatever kind.
    pub fn exist(directory: &Path, name: &str) -> bool {
        fs::symlink_metadata(directory.join(name)).is_ok()
    }

    /// Opens or makes the file `name` in `directory` for so many rings, and the directory if need be. `attention` is
    /// signalled should the file lose pages, which costs the records and nothing else: see [`Records::failed`].
    ///
    /// # Errors
    /// The file cannot be made or mapped, or it cannot be trusted.
    pub fn open(
        directory: &Path,
        name: &str,
        rings: usize,
        attention: Arc<EventFd>,
    ) -> Result<Arc<Self>, RecordsError> {
        let path = directory.join(name);
        let directory = open_directory(directory)?;
        let lock = open_file(&directory, name, &path)?;
        let file = &lock.0;
        let mapping = map(file, rings, attention, &path).inspect_err(|_| {
            // Nobody but us has begun to use it: it is locked.
            if says_nothing(file) {
                remove(&directory, name, file);
            }
        })?;
        let records = Arc::new(Self { path, directory, name: name.into(), rings, mapping, _lock: lock });
        records.claim();
        Ok(records)
    }

    /// Removes the files in `directory` whose ports are gone and whose front ends have ended since, so that nobody will ask for
    /// what they say. Those that a port has open stay, and so does what is not ours.
    pub fn sweep(directory: &Path) {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(opened) = rustix::fs::open(directory, flags, Mode::empty()) else { return };
        let (Ok(()), Ok(entries)) = (trusted(&opened, directory, "a directory"), fs::read_dir(directory)) else {
            return;
        };
        let boot = boot();
        for name in entries.flatten().map(|entry| entry.file_name()) {
            let _opening = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
            // Locked until it is removed; one that cannot be is met again.
            if let Some(_lock) = left_over(&opened, &name, boot) {
                let _ = unlinkat(&opened, &name, AtFlags::empty());
            }
        }
    }

    /// Makes the file ours and this boot's. Memory files of another have nothing to do with those of now, whatever their numbers.
    fn claim(&self) {
        // First of all that is written: what has zeros only may be ours, too ([`says_nothing`]).
        self.header(MAGIC_WORD).store(MAGIC, Ordering::Release);
        let boot = boot();
        if self.header(BOOT_WORD).load(Ordering::Acquire) != boot {
            self.forget_all();
            self.header(PROCESS_WORD).store(0, Ordering::Relaxed);
        }
        self.header(BOOT_WORD).store(boot, Ordering::Release);
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file itself.
    #[cfg(test)]
    pub fn file(&self) -> &File {
        self.mapping.file()
    }

    /// Whether the file was found to lack pages. What is in it is not to be believed any more then: [`Records::abandon`].
    pub fn failed(&self) -> bool {
        self.mapping.failure().is_some()
    }

    /// Makes the file say nothing, past the mapping, which does not lead there any more: rings that go on noting where they stand
    /// have no faults by that.
    pub fn abandon(&self) {
        self.mapping.cover();
        for index in 0..self.rings {
            let header = [0; 8 * HEADER_WORDS];
            // What is not there, or cannot be written, says nothing either.
            let _ = self.mapping.file().write_all_at(&header, (FILE_HEADER_BYTES + index * RECORD_BYTES) as u64);
        }
    }

    /// The front end that the rings are of.
    pub fn front_end(&self) -> Option<ProcessIdentity> {
        process(self.header(PROCESS_WORD).load(Ordering::Acquire), self.header(STARTED_WORD).load(Ordering::Acquire))
    }

    /// Notes which front end the rings are of from now on, and forgets those of another. One whose process cannot be seen
    /// may be the same.
    pub fn set_front_end(&self, process: Option<ProcessIdentity>) {
        let Some(process) = process else { return };
        if self.front_end().is_some_and(|before| before != process) {
            self.forget_all();
        }
        self.header(STARTED_WORD).store(process.started, Ordering::Relaxed);
        self.header(PROCESS_WORD).store(process.pid.unsigned_abs().into(), Ordering::Release);
    }

    /// The record of ring number `index`, with room for a ring of `size`.
    ///
    /// # Errors
    /// There is no such ring, or no memory for it.
    pub fn record(self: &Arc<Self>, index: usize, size: u16) -> Result<Record, RecordsError> {
        if index >= self.rings {
            return Err(RecordsError::NoRing(index));
        }
        let offset = FILE_HEADER_BYTES + index * RECORD_BYTES;
        fallocate(self.mapping.file(), FallocateFlags::KEEP_SIZE, offset as u64, FIRST_BYTES)
            .map_err(|error| RecordsError::Open(self.path.clone(), error.into()))?;
        let words = self.mapping.address().wrapping_add(offset).cast();
        // SAFETY: `index` is below `rings` and `size` at most RING_SIZE, so all of the record is within the mapping, which
        // begins at a page; a port has one ring of each number, and whoever runs that has it to himself. All accesses are
        // atomic or volatile, also those of a shard that is held up in a ring which was given up.
        Ok(unsafe { Record::in_file(words, size.min(RING_SIZE), Arc::clone(self)) })
    }

    /// Forgets ring number `index`: its front end has been told where it stands.
    pub fn forget(&self, index: usize) {
        if index < self.rings && !self.is_silent(index) {
            self.word(FILE_HEADER_BYTES + index * RECORD_BYTES + 8 * STATE).store(0, Ordering::Release);
        }
    }

    /// Forgets all rings: their front end is gone.
    pub fn forget_all(&self) {
        (0..self.rings).for_each(|index| self.forget(index));
    }

    /// Whether nothing is written of ring number `index`. The file is read and not the mapping: looking there would allocate the
    /// page of a ring that nobody uses.
    fn is_silent(&self, index: usize) -> bool {
        let mut state = [0; 8];
        let read = self
            .mapping
            .file()
            .read_exact_at(&mut state, (FILE_HEADER_BYTES + index * RECORD_BYTES + 8 * STATE) as u64);
        read.is_err() || state == [0; 8]
    }

    fn header(&self, word: usize) -> &AtomicU64 {
        self.word(8 * word)
    }

    /// The word at byte `at`, a multiple of 8 within the mapping.
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.mapping.len());
        let word = self.mapping.address().wrapping_add(at);
        // SAFETY: the word is within the mapping, which lives as long as `self` and begins at a page; every access to it from
        // this process is atomic or, where a ring runs, by its one thread. Where the file has no page any more, the
        // mapping's watch puts one of ours.
        unsafe { AtomicU64::from_ptr(word.cast()) }
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        let silent = (0..self.rings).all(|index| self.is_silent(index));
        // The lock is ours, so nobody else has begun to use it.
        if silent {
            remove(&self.directory, &self.name, self.mapping.file());
        }
    }
}

/// Removes `file` from the directory, if it is the one that is called `name` there. One that cannot be removed is read as saying
/// nothing.
fn remove(directory: &OwnedFd, name: &str, file: &File) {
    let same = |here: rustix::fs::Stat| {
        file.metadata().is_ok_and(|ours| (ours.dev(), ours.ino()) == (here.st_dev, here.st_ino))
    };
    if statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(same) {
        let _ = unlinkat(directory, name, AtFlags::empty());
    }
}

/// Has memory for the file's header, and maps it with room for so many rings.
fn map(file: &Arc<File>, rings: usize, attention: Arc<EventFd>, path: &Path) -> Result<MappedFile, RecordsError> {
    let failed = |error| RecordsError::Open(path.into(), error);
    let len = FILE_HEADER_BYTES + rings * RECORD_BYTES;
    // What may fail comes first.
    fallocate(file, FallocateFlags::KEEP_SIZE, 0, FILE_HEADER_BYTES as u64).map_err(|error| failed(error.into()))?;
    // What a port with more rings has left is longer; it is not cut.
    if file.metadata().map_err(failed)?.len() < len as u64 {
        file.set_len(len as u64).map_err(failed)?;
    }
    MappedFile::of_ours(Arc::clone(file), len, attention).map_err(|error| RecordsError::Map(path.into(), error))
}

/// Whether the file is no longer than ours are and has zeros only: it was begun by a process that was killed, or found no memory,
/// before it could write that the file is ours.
fn says_nothing(file: &File) -> bool {
    let mut bytes = vec![0; 1 << 16];
    let zeros = bytes.clone();
    let Ok(len) = file.metadata().map(|stat| stat.len()) else { return false };
    let mut pieces = (0..len).step_by(zeros.len());
    len <= MOST_BYTES
        && pieces.all(|at| {
            let count = (len - at).min(zeros.len() as u64) as usize;
            file.read_exact_at(&mut bytes[..count], at).is_ok() && bytes[..count] == zeros[..count]
        })
}

/// Opens the directory, which is made if there is none.
fn open_directory(path: &Path) -> Result<OwnedFd, RecordsError> {
    let failed = |error: io::Error| RecordsError::Open(path.into(), error);
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = || rustix::fs::open(path, flags, Mode::empty());
    let opened = match open() {
        Err(rustix::io::Errno::NOENT) => {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
            open()
        }
        other => other,
    };
    match opened {
        Ok(directory) => {
            trusted(&directory, path, "a directory")?;
            Ok(directory)
        }
        // A symbolic link is one or the other, depending on where it leads.
        Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
            Err(RecordsError::Kind { path: path.into(), expected: "a directory" })
        }
        Err(error) => Err(failed(error.into())),
    }
}

/// Opens the file, which is made if there is none, and has it to itself.
fn open_file(directory: &OwnedFd, name: &str, path: &Path) -> Result<Lock, RecordsError> {
    let failed = |error: rustix::io::Errno| RecordsError::Open(path.into(), error.into());
    // Opening anything but a regular file has no effect on it and does not wait.
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let _opening = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
    // Who had it may have removed it between our opening and our locking it; a few such meetings are enough.
    for _ in 0..8 {
        let opened = openat(directory, name, flags, Mode::RUSR | Mode::WUSR);
        let file = match opened {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::LOOP | rustix::io::Errno::ISDIR | rustix::io::Errno::NXIO) => {
                return Err(RecordsError::Kind { path: path.into(), expected: "a regular file" });
            }
            Err(error) => return Err(failed(error)),
        };
        trusted(&file, path, "a regular file")?;
        let lock = match Lock::try_new(file) {
            Ok(lock) => lock,
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(RecordsError::InUse(path.into())),
            Err(error) => return Err(failed(error)),
        };
        let file = &lock.0;
        let stat = file.metadata().map_err(|error| RecordsError::Open(path.into(), error))?;
        if stat.nlink() > 1 {
            return Err(RecordsError::Kind { path: path.into(), expected: "a regular file with one name" });
        }
        if stat.nlink() == 1 {
            let mut magic = [0; 8];
            let ours = file.read_exact_at(&mut magic, 0).is_ok() && magic == MAGIC.to_ne_bytes();
            return if ours || says_nothing(file) { Ok(lock) } else { Err(RecordsError::Foreign(path.into())) };
        }
    }
    Err(RecordsError::InUse(path.into()))
}

/// The file `name`, locked, if it is ours, nobody has it open, and the front end that it is of has ended, if it is of one.
fn left_over(directory: &OwnedFd, name: &OsStr, boot: u64) -> Option<Lock> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(openat(directory, name, flags, Mode::empty()).ok()?);
    trusted(&file, Path::new(name), "a regular file").ok()?;
    let lock = Lock::try_new(file).ok()?;
    let file = &lock.0;
    if says_nothing(file) {
        return Some(lock);
    }
    let mut header = [0; 32];
    file.read_exact_at(&mut header, 0).ok()?;
    let word = |at: usize| header.chunks_exact(8).nth(at)?.try_into().ok().map(u64::from_ne_bytes);
    let gone = process(word(PROCESS_WORD)?, word(STARTED_WORD)?).is_some_and(|process| !process.is_running());
    (word(MAGIC_WORD)? == MAGIC && (gone || word(BOOT_WORD)? != boot)).then_some(lock)
}

/// The process of these two words of a header, if they are of one.
fn process(number: u64, started: u64) -> Option<ProcessIdentity> {
    let pid = i32::try_from(number).ok().filter(|&pid| pid > 0)?;
    Some(ProcessIdentity { pid, started })
}

/// Whether nobody but this user can have made or written what is open.
fn trusted(open: impl AsFd, path: &Path, expected: &'static str) -> Result<(), RecordsError> {
    let stat = rustix::fs::fstat(open).map_err(|error| RecordsError::Open(path.into(), error.into()))?;
    let (mode, user) = (stat.st_mode, rustix::process::geteuid().as_raw());
    let kind = rustix::fs::FileType::from_raw_mode(mode);
    if !(kind.is_file() && expected != "a directory" || kind.is_dir()) {
        return Err(RecordsError::Kind { path: path.into(), expected });
    }
    if stat.st_uid != user {
        return Err(RecordsError::Owner { path: path.into(), owner: stat.st_uid, user });
    }
    if mode & 0o022 != 0 {
        return Err(RecordsError::Writable { path: path.into(), mode: mode & 0o7777 });
    }
    Ok(())
}

/// Which boot of this host it is; 0 if the kernel does not say.
fn boot() -> u64 {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    u64::from_str_radix(&digits, 16).unwrap_or(0)
}
