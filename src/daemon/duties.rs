//! The daemon's own threads: [`Changes`], which applies the file, [`Upkeep`], which does what has to be done every second, and
//! [`Closing`], which ends ports and shards and removes the API's socket.
//!
//! All may have to wait, for a shard, for the kernel, or for another change, so none is the thread that hears signals. They end
//! when these handles are dropped, or else with the process.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;

use super::logging;
use super::service::Manager;
use crate::control::{ControlError, Controller};
use crate::sys::socket_file::SocketFile;
use crate::sys::threads::touch_stack;

/// The thread that carries out the configuration that the daemon was started with, and then the file again whenever it is told.
pub(super) struct Changes {
    requests: SyncSender<()>,
}

impl Changes {
    /// Starts the thread. What is received says what became of the first configuration.
    pub(super) fn start(
        controller: &Arc<Controller>,
        manager: &Arc<Manager>,
    ) -> io::Result<(Self, oneshot::Receiver<Result<(), ControlError>>)> {
        // One that waits is enough: it reads the file when its turn comes.
        let (requests, asked) = sync_channel(1);
        let (begun, beginning) = oneshot::channel();
        let (controller, manager) = (Arc::clone(controller), Arc::clone(manager));
        let run = move || {
            touch_stack();
            // Nobody listens any more if the daemon was told to end meanwhile.
            let _ = begun.send(controller.begin().map(drop));
            asked.iter().for_each(|()| reload(&controller, &manager));
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
fn reload(controller: &Controller, manager: &Manager) {
    manager.reloading();
    match controller.apply(None) {
        Ok(_) => {}
        Err(ControlError::Invalid(wrong)) => {
            log::error!("the configuration was refused, nothing changed:");
            wrong.to_string().lines().for_each(|line| log::error!("{line}"));
        }
        Err(error) => log::error!("nothing changed: {}", logging::chain(&error)),
    }
    manager.ready();
}

/// The thread that does what has to be done every second.
pub(super) struct Upkeep {
    _until_dropped: Sender<()>,
}

impl Upkeep {
    /// Starts the thread.
    pub(super) fn start(controller: &Arc<Controller>, manager: &Arc<Manager>) -> io::Result<Self> {
        let (until_dropped, end) = channel();
        let (controller, manager) = (Arc::clone(controller), Arc::clone(manager));
        thread::Builder::new().name("upkeep".into()).spawn(move || keep_up(&controller, &manager, &end))?;
        Ok(Self { _until_dropped: until_dropped })
    }
}

fn keep_up(controller: &Controller, manager: &Manager, end: &Receiver<()>) {
    touch_stack();
    loop {
        controller.upkeep();
        manager.tell_status(controller.tally());
        match end.recv_timeout(Duration::from_secs(1)) {
            Err(RecvTimeoutError::Timeout) => {}
            _ => return,
        }
    }
}

/// The thread that ends ports and shards and removes the API's socket. It is there from the start: when the daemon ends, the host may
/// have none to give.
pub(super) struct Closing {
    controller: Sender<Arc<Controller>>,
    closed: Receiver<()>,
}

impl Closing {
    /// Starts the thread, which has charge of `file`.
    pub(super) fn start(file: SocketFile) -> io::Result<Self> {
        let (controller, given) = channel();
        let (done, closed) = channel();
        thread::Builder::new().name("closing".into()).spawn(move || close(&given, file, &done))?;
        Ok(Self { controller, closed })
    }

    /// Has every port ended, then the shards, and the file removed. Returns whether that was done within `patience`.
    pub(super) fn close(self, controller: Arc<Controller>, patience: Duration) -> bool {
        self.controller.send(controller).is_ok() && self.closed.recv_timeout(patience).is_ok()
    }
}

fn close(given: &Receiver<Arc<Controller>>, file: SocketFile, done: &Sender<()>) {
    touch_stack();
    // It is dropped if the daemon does not get so far.
    let Ok(controller) = given.recv() else { return };
    controller.close();
    // A request that never ended may still hold the controller; then the process's end is the shards' as well.
    if let Some(controller) = Arc::into_inner(controller) {
        controller.stop();
    }
    drop(file);
    // Nobody waits any more if it took too long.
    let _ = done.send(());
}
