//! A [`Crowd`]: very many that wait for one thing. Whoever wakes them wakes them all, and one process can have as many of them as
//! it likes, through epoll sets and duplicates.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::epoll::{CreateFlags, EventData, EventFlags, add, create};

use super::frontend::doorbell::Doorbell;

/// Duplicates of what is waited for, each of which is in each of the sets.
const DUPLICATES: usize = 5000;

/// Descriptors that wait for something. It goes when they do.
pub struct Crowd {
    _duplicates: Vec<OwnedFd>,
    sets: Vec<OwnedFd>,
}

/// What waking all who wait has to take: five times what counts as slow.
pub const LONG: Duration = Duration::from_millis(5);

impl Crowd {
    /// Waits for an eventfd so often that ringing it takes at least `least`.
    pub fn around_bell(bell: &Doorbell, least: Duration) -> Self {
        Self::around(bell, least, || bell.ring())
    }

    /// Waits for `what` so often that `wake`, which wakes all who do, takes at least `least` of a thread's CPU time.
    pub fn around(what: impl AsFd, least: Duration, mut wake: impl FnMut()) -> Self {
        let mut took = || {
            let before = thread_time();
            wake();
            thread_time() - before
        };
        let duplicates = duplicates(what);
        let mut sets = Vec::new();
        loop {
            sets.push(set(&duplicates));
            // The first one finds more to do than those that follow.
            if (0..3).all(|_| took() > least) {
                return Self { _duplicates: duplicates, sets };
            }
        }
    }

    /// Waits for a connection so often that using its other end takes at least `least`.
    pub fn at_the_end_of(stream: &UnixStream, least: Duration) -> Self {
        let (twin, other) = UnixStream::pair().unwrap();
        let twins = Self::around(&twin, least, || {
            rustix::io::write(&other, &[0]).unwrap();
            rustix::io::read(&twin, &mut [0; 1]).unwrap();
        });
        let duplicates = duplicates(stream);
        let sets = twins.sets.iter().map(|_| set(&duplicates)).collect();
        Self { _duplicates: duplicates, sets }
    }
}

fn duplicates(of: impl AsFd) -> Vec<OwnedFd> {
    (0..DUPLICATES).map(|_| of.as_fd().try_clone_to_owned().unwrap()).collect()
}

fn set(of: &[OwnedFd]) -> OwnedFd {
    let set = create(CreateFlags::CLOEXEC).unwrap();
    let flags = EventFlags::IN | EventFlags::OUT;
    of.iter().for_each(|one| add(&set, one, EventData::new_u64(0), flags).unwrap());
    set
}

/// CPU time that ringing takes.
pub fn ringing(bell: &Doorbell) -> Duration {
    let before = thread_time();
    bell.ring();
    thread_time() - before
}

fn thread_time() -> Duration {
    Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime)).unwrap()
}
