//! What the relay has threads do because it may take for ever: [`Job`]. Which there are at a time, and what comes of them, is the
//! process's ([`super::process`]); the calls themselves are [`super::vetting`]'s.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::super::message::DESCRIPTORS;
use super::vetting;

/// Something that may take for ever.
pub(super) struct Job {
    pub port: u64,
    pub work: Work,
    pub since: Instant,
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
    /// One that begins now.
    pub fn new(port: u64, work: Work) -> Self {
        Self { port, work, since: Instant::now(), held: false, refused: false }
    }

    /// Whether it could be found to take too long.
    pub fn may_be_late(&self) -> bool {
        !self.held && self.work != Work::HangUp
    }
}
