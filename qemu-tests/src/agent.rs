//! The host side of a guest's command agent (`bin/guest-init.rs` has the protocol): any number of scripts at once,
//! each a [`Job`] to be waited for. A reader thread hands replies to their jobs; it ends with the agent, and every wait
//! with it.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use crate::child::check_all;
use crate::{Error, Result, wait};

/// The name of the agent's virtio-serial port.
pub const PORT_NAME: &str = "linecard.agent";

/// A script that runs somewhere: a guest or the host.
#[derive(Debug)]
pub struct Job {
    machine: String,
    script: String,
    done: Receiver<(i32, String)>,
}

impl Job {
    /// A job whose end `done` will tell; a `done` whose sender is gone is a machine that is gone.
    pub fn new(machine: &str, script: &str, done: Receiver<(i32, String)>) -> Job {
        Job { machine: machine.to_owned(), script: script.to_owned(), done }
    }

    /// Waits for the end and gives the output; a status other than 0 is an error.
    pub fn output(self, deadline: Duration) -> Result<String> {
        let ended = wait::until(&format!("`{}` on {}", self.script, self.machine), deadline, || {
            match self.done.recv_timeout(Duration::from_millis(50)) {
                Ok(ended) => Ok(Some(ended)),
                Err(RecvTimeoutError::Timeout) => Ok(None),
                Err(RecvTimeoutError::Disconnected) => {
                    check_all()?;
                    Err(Error::Unexpected(format!("{} was gone while it ran `{}`", self.machine, self.script)))
                }
            }
        });
        match ended? {
            (0, output) => Ok(output),
            (status, output) => Err(Error::Script { machine: self.machine, status, script: self.script, output }),
        }
    }
}

/// A connection to one guest's agent, through one QEMU after the other when the guest moves.
#[derive(Debug)]
pub struct Agent {
    machine: String,
    shared: Arc<Shared>,
    requests: Mutex<UnixStream>,
    successors: Sender<UnixStream>,
    next: AtomicU64,
}

#[derive(Debug, Default)]
struct Shared {
    /// How often a guest has reported ready on this connection: once per boot.
    boots: AtomicU64,
    jobs: Mutex<Jobs>,
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: HashMap<u64, Sender<(i32, String)>>,
    closed: bool,
}

impl Agent {
    /// Reads what the guest `machine` sends on `stream`.
    pub fn new(machine: &str, stream: UnixStream) -> Result<Agent> {
        let shared = Arc::new(Shared::default());
        let replies = stream.try_clone().map_err(Error::io("clone an agent socket"))?;
        let (successors, followers) = channel();
        let replies = Replies { stream: replies, followers };
        let reader = shared.clone();
        thread::spawn(move || {
            read_replies(&reader, BufReader::new(replies));
            let mut jobs = lock(&reader.jobs);
            jobs.closed = true;
            jobs.waiting.clear();
        });
        let (machine, requests) = (machine.to_owned(), Mutex::new(stream));
        Ok(Agent { machine, shared, requests, successors, next: AtomicU64::new(1) })
    }

    /// Has the guest, which has moved, go on talking on `stream`: to be called before the QEMU that it left is ended.
    pub fn follow(&self, stream: UnixStream) -> Result<()> {
        let replies = stream.try_clone().map_err(Error::io("clone an agent socket"))?;
        self.successors.send(replies).map_err(|_| Error::Unexpected(format!("{} is gone", self.machine)))?;
        *lock(&self.requests) = stream;
        Ok(())
    }

    /// How many boots of the guest have come up since QEMU started.
    pub fn boots(&self) -> u64 {
        self.shared.boots.load(Ordering::Relaxed)
    }

    /// Waits until the guest has come up `boots` times.
    pub fn wait_boots(&self, boots: u64, deadline: Duration) -> Result<()> {
        wait::until_true(&format!("{} to boot", self.machine), deadline, || Ok(self.boots() >= boots))
    }

    /// Starts a shell script in the guest.
    pub fn start(&self, script: &str) -> Result<Job> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, done) = channel();
        let mut jobs = lock(&self.shared.jobs);
        if !jobs.closed {
            jobs.waiting.insert(id, sender);
        }
        drop(jobs);
        let request = format!("{id} {}\n{script}", script.len());
        let sent = lock(&self.requests).write_all(request.as_bytes());
        sent.map_err(Error::io(format!("send a script to {}", self.machine)))?;
        Ok(Job::new(&self.machine, script, done))
    }

    /// Forgets the jobs of a guest that has rebooted: nobody will answer them.
    pub fn forget_jobs(&self) {
        lock(&self.shared.jobs).waiting.clear();
    }
}

/// What the guest sends. A reply that one QEMU had half delivered when its guest left goes on in the next.
struct Replies {
    stream: UnixStream,
    followers: Receiver<UnixStream>,
}

impl Read for Replies {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            // A QEMU that is killed while a request waits in its socket resets the connection: an end like any other.
            let read = self.stream.read(buffer).unwrap_or(0);
            if read > 0 {
                return Ok(read);
            }
            // A guest may be nowhere for a while, saved to a file. That a QEMU dies unasked shows in every wait (`check_all`).
            match self.followers.recv() {
                Ok(next) => self.stream = next,
                Err(_) => return Ok(0),
            }
        }
    }
}

fn read_replies(shared: &Shared, mut replies: BufReader<Replies>) {
    let mut header = String::new();
    loop {
        header.clear();
        if replies.read_line(&mut header).unwrap_or(0) == 0 {
            return;
        }
        let words: Vec<&str> = header.split_whitespace().collect();
        match words[..] {
            ["READY", _] => {
                shared.boots.fetch_add(1, Ordering::Relaxed);
            }
            [id, status, length] => {
                let (Ok(id), Ok(status), Ok(length)) = (id.parse(), status.parse(), length.parse()) else { continue };
                let mut output = vec![0; length];
                if replies.read_exact(&mut output).is_err() {
                    return;
                }
                if let Some(job) = lock(&shared.jobs).waiting.remove(&id) {
                    // A job nobody waits for any more has dropped its receiver.
                    let _ = job.send((status, String::from_utf8_lossy(&output).into_owned()));
                }
            }
            _ => {}
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
