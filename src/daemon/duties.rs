//! The daemon's own threads: [`Changes`], which applies the file, and [`Upkeep`], which does what has to be done every second.
//!
//! Both may have to wait, for a shard, for the kernel, or for another change, so neither is the thread that hears signals. They end
//! when these handles are dropped, or else with the process.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{logging, service};
use crate::control::{ControlError, Controller};

/// The thread that carries out the configuration that the daemon was started with, and then the file again whenever it is told.
pub(super) struct Changes {
    requests: SyncSender<()>,
}

impl Changes {
    /// Starts the thread. What is received says what became of the first configuration.
    pub(super) fn start(
        controller: &Arc<Controller>,
    ) -> io::Result<(Self, oneshot::Receiver<Result<(), ControlError>>)> {
        // One that waits is enough: it reads the file when its turn comes.
        let (requests, asked) = sync_channel(1);
        let (begun, beginning) = oneshot::channel();
        let controller = Arc::clone(controller);
        let run = move || {
            // Nobody listens any more if the daemon was told to end meanwhile.
            let _ = begun.send(controller.begin().map(drop));
            asked.iter().for_each(|()| reload(&controller));
        };
        thread::Builder::new().name("changes".into()).spawn(run)?;
        Ok((Self { requests }, beginning))
    }

    /// Has the file applied again. Does not wait for that.
    pub(super) fn request(&self) {
        let _ = self.requests.try_send(());
    }
}

/// Applies the file again. What is refused is logged and changes nothing.
fn reload(controller: &Controller) {
    service::reloading();
    match controller.apply(None) {
        Ok(_) => {}
        Err(ControlError::Invalid(wrong)) => {
            log::error!("the configuration was refused, nothing changed:");
            wrong.to_string().lines().for_each(|line| log::error!("{line}"));
        }
        Err(error) => log::error!("nothing changed: {}", logging::chain(&error)),
    }
    service::reloaded();
}

/// The thread that does what has to be done every second.
pub(super) struct Upkeep {
    _until_dropped: Sender<()>,
}

impl Upkeep {
    /// Starts the thread.
    pub(super) fn start(controller: &Arc<Controller>) -> io::Result<Self> {
        let (until_dropped, end) = channel();
        let controller = Arc::clone(controller);
        thread::Builder::new().name("upkeep".into()).spawn(move || keep_up(&controller, &end))?;
        Ok(Self { _until_dropped: until_dropped })
    }
}

fn keep_up(controller: &Controller, end: &Receiver<()>) {
    loop {
        controller.upkeep();
        service::tell_status(&controller.status());
        match end.recv_timeout(Duration::from_secs(1)) {
            Err(RecvTimeoutError::Timeout) => {}
            _ => return,
        }
    }
}
