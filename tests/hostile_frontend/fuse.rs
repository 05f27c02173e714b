//! A FUSE file system of one file, whose server answers this process and nobody else: [`Fuse`]. FLUSH, which close(2) sends, and
//! STATFS and GETATTR hang with it, and the kernel does not let go of who waits, not even for SIGKILL. Takes root.
//!
//! The messages are those of include/uapi/linux/fuse.h, version 7.31.

#![allow(unsafe_code)] // mount(2).

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;

use super::frontend::child::{NoneStarts, none_starts};

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;

/// The mounted file. Dropping it unmounts it and ends its server, which frees whoever waits.
pub struct Fuse {
    server: Arc<Server>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
    _dir: TempDir,
}

/// The file, opened. Nobody but this process may be the one that closes it here.
pub struct Open {
    file: File,
    _none_starts: NoneStarts,
}

impl AsFd for Open {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

struct Server {
    device: File,
    stop: AtomicBool,
    /// Everybody gets an answer.
    answering: AtomicBool,
    /// Requests that have none.
    held: Mutex<Vec<(u64, u32)>>,
    held_ever: AtomicUsize,
}

impl Fuse {
    pub fn mount() -> Self {
        let device = File::options().read(true).write(true).open("/dev/fuse").expect("/dev/fuse (modprobe fuse)");
        let flags = rustix::fs::fcntl_getfl(&device).unwrap();
        rustix::fs::fcntl_setfl(&device, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
        let dir = TempDir::with_prefix("linecard-fuse-").unwrap();
        let path = dir.path().join("file");
        File::create(&path).unwrap();
        let options = CString::new(format!("fd={},rootmode=100000,user_id=0,group_id=0", device.as_raw_fd())).unwrap();
        let target = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: four strings that end with a zero byte and outlive the call.
        let mounted = unsafe {
            libc::mount(c"linecard-test".as_ptr(), target.as_ptr(), c"fuse".as_ptr(), 0, options.as_ptr().cast())
        };
        let error = std::io::Error::last_os_error();
        assert_eq!(mounted, 0, "this test mounts a FUSE file system and has to run as root: {error}");
        let (stop, answering, held, held_ever) = Default::default();
        let server = Arc::new(Server { device, stop, answering, held, held_ever });
        let serving = Arc::clone(&server);
        let thread = std::thread::spawn(move || serving.serve());
        Self { server, thread: Some(thread), path, _dir: dir }
    }

    pub fn open(&self) -> Open {
        let _none_starts = none_starts();
        Open { file: File::open(&self.path).unwrap(), _none_starts }
    }

    /// How many requests of others were left without an answer so far.
    pub fn held(&self) -> usize {
        self.server.held_ever.load(Ordering::SeqCst)
    }

    /// Answers what was left, and everybody from now on.
    pub fn release(&self) {
        self.server.answering.store(true, Ordering::SeqCst);
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let target = CString::new(self.path.as_os_str().as_bytes()).unwrap();
        self.server.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // SAFETY: a string that ends with a zero byte and outlives the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH | libc::MNT_FORCE) };
    }
}

impl Server {
    fn serve(&self) {
        let mut buffer = vec![0; 1 << 17];
        while !self.stop.load(Ordering::SeqCst) {
            if self.answering.load(Ordering::SeqCst) {
                let held = std::mem::take(&mut *self.held.lock().unwrap());
                held.into_iter().for_each(|(unique, operation)| self.give_up(unique, operation));
            }
            match (&self.device).read(&mut buffer) {
                Ok(len) if len >= 40 => self.request(&buffer),
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn request(&self, request: &[u8]) {
        let number = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let (operation, unique) = (number(4), u64::from_ne_bytes(request[8..16].try_into().unwrap()));
        let ours = Path::new(&format!("/proc/self/task/{}", number(32))).exists();
        match operation {
            INIT => self.reply(
                unique,
                0,
                &[7, 31, 0, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0].map(u32::to_ne_bytes).concat(),
            ),
            FORGET => {}
            RELEASE => self.reply(unique, 0, &[]),
            OPEN => self.reply(unique, 0, &[0; 16]),
            _ if !ours && !self.answering.load(Ordering::SeqCst) => {
                self.held.lock().unwrap().push((unique, operation));
                self.held_ever.fetch_add(1, Ordering::SeqCst);
            }
            GETATTR => self.reply(unique, 0, &attributes()),
            _ => self.give_up(unique, operation),
        }
    }

    fn give_up(&self, unique: u64, operation: u32) {
        let error = if operation == FLUSH { 0 } else { -libc::ENOSYS };
        self.reply(unique, error, &[]);
    }

    fn reply(&self, unique: u64, error: i32, body: &[u8]) {
        let len = 16 + body.len() as u32;
        let reply = [&len.to_ne_bytes()[..], &error.to_ne_bytes(), &unique.to_ne_bytes(), body].concat();
        // Whoever asked may be gone.
        let _ = (&self.device).write(&reply);
    }
}

/// struct fuse_attr_out: a regular file that everybody may read, for a thousand seconds.
fn attributes() -> Vec<u8> {
    let mut words = [0u32; 26];
    (words[0], words[4], words[19], words[20]) = (1000, 1, libc::S_IFREG | 0o666, 1);
    words.map(u32::to_ne_bytes).concat()
}
