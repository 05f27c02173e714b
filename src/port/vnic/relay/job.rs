//! What the relay has threads do because it may take for ever: [`Job`]. Which there are at a time, and what comes of them, is the
//! process's ([`super::process`]); the calls themselves are [`super::vetting`]'s.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::super::message::DESCRIPTORS;
use super::vetting;

/// Something that may take for ever.
pub(super) struct Job {
    pub port: u64,
    pub work: Work,
    /// When it began, by the time for which the relay was there.
    pub since: Duration,
    /// It has taken for too long.
    pub held: bool,
    /// The kernel had no thread for it.
    pub refused: bool,
}

/// What a job does with its descriptors.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// They came with a message of this link, which waits for them to be looked at.
    Look(u64),
    /// They went with a message of this link, which waits for them to be closed.
    Close(u64),
    /// They are a link's, which does not wait for them to be closed and may have ended.
    LetGo(u64),
    /// They are connections to be shut down. That takes time, perhaps, and waits for nobody.
    HangUp,
    /// They are such connections, in which something lies.
    Drain,
}

impl Work {
    /// The link that it ends if it takes for too long.
    pub fn link(self) -> Option<u64> {
        if let Self::Look(link) | Self::Close(link) | Self::LetGo(link) = self { Some(link) } else { None }
    }

    /// How many more descriptors it has at a time, beside those that it is given.
    pub fn opens(self) -> usize {
        if self == Self::Drain { vetting::DRAINED } else { 0 }
    }

    /// Does it.
    pub fn run(self, descriptors: Vec<OwnedFd>) -> io::Result<Vec<OwnedFd>> {
        match self {
            Self::Look(_) => {
                let mut looked = vetting::look(descriptors)?;
                // The others are let go of here.
                looked.truncate(DESCRIPTORS + 1);
                Ok(looked)
            }
            Self::Close(_) | Self::LetGo(_) => {
                descriptors.into_iter().for_each(vetting::close);
                Ok(Vec::new())
            }
            Self::HangUp => Ok(descriptors.into_iter().filter_map(vetting::hang_up).collect()),
            Self::Drain => {
                descriptors.iter().for_each(vetting::drain);
                descriptors.into_iter().for_each(vetting::close);
                Ok(Vec::new())
            }
        }
    }
}

/// A job that was done.
pub(super) struct Done {
    /// Its number.
    pub id: u64,
    /// The descriptors that came of it.
    pub outcome: io::Result<Vec<OwnedFd>>,
    /// The CPU time that it took.
    pub used: Duration,
}

impl Job {
    /// One that has not begun.
    pub fn new(port: u64, work: Work) -> Self {
        Self { port, work, since: Duration::ZERO, held: false, refused: false }
    }

    /// Whether it could be found to take too long.
    pub fn may_be_late(&self) -> bool {
        !self.held && self.work != Work::HangUp
    }
}

/// How many jobs each port has running, counted: there can be hundreds, and thousands that wait for them. Hanging up has a number of
/// its own, so that it is not kept waiting by what may take for ever.
#[derive(Default)]
pub(super) struct Running(HashMap<(u64, bool), u32>);

impl Running {
    fn kind(job: &Job) -> (u64, bool) {
        (job.port, job.work == Work::HangUp)
    }

    /// Whether there are as many like this one as there may be.
    pub fn is_full(&self, job: &Job) -> bool {
        self.0.get(&Self::kind(job)).is_some_and(|&count| count >= vetting::THREADS)
    }

    /// One runs from now on.
    pub fn begin(&mut self, job: &Job) {
        *self.0.entry(Self::kind(job)).or_default() += 1;
    }

    /// One was done.
    pub fn end(&mut self, job: &Job) {
        if let Entry::Occupied(mut count) = self.0.entry(Self::kind(job)) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_port_has_so_many_at_a_time_and_others_for_hanging_up() {
        let (mut running, job) = (Running::default(), |port, work| Job::new(port, work));
        (0..vetting::THREADS).for_each(|_| running.begin(&job(7, Work::Look(1))));
        assert!(running.is_full(&job(7, Work::Drain)));
        assert!(!running.is_full(&job(7, Work::HangUp)) && !running.is_full(&job(8, Work::Drain)));
        running.end(&job(7, Work::LetGo(2)));
        assert!(!running.is_full(&job(7, Work::Close(3))));
        (1..vetting::THREADS).for_each(|_| running.end(&job(7, Work::Drain)));
        assert!(running.0.is_empty(), "nothing is kept of ports that have none");
    }
}
