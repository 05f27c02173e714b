//! How a queue's shard is woken for it: [`Wakeup`], the shard's bell and the driver's kicks together.
//!
//! Apart from the queue's lock, because a queue goes to another shard also while whoever is in the ring cannot get out.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwapOption;

use super::super::kick::Kick;
use super::super::offence::Docket;
use crate::port::Wake;
use crate::sys::toll::thread_time;

/// The shard that receives from a queue, and what wakes it.
pub(super) struct Wakeup {
    /// Held for a change, never while a peer's memory is touched.
    shard: Mutex<Shard>,
    /// What the driver kicks, for a ring that runs or was taken out of service.
    kick: ArcSwapOption<Kick>,
    /// The kernel would not wait for the ring's kicks, so the queue must not rest.
    deaf: AtomicBool,
    /// Kicks by eventfds that the ring had before its present one, which counts for itself.
    retired: AtomicU64,
    docket: Arc<Docket>,
}

#[derive(Default)]
struct Shard {
    wake: Option<Arc<dyn Wake>>,
    /// The ring runs, so its kicks are waited for.
    watches: bool,
}

impl Wakeup {
    /// Of a queue that no shard receives from yet, of the port with this docket.
    pub(super) fn new(docket: Arc<Docket>) -> Self {
        let (shard, kick, deaf, retired) = Default::default();
        Self { shard, kick, deaf, retired, docket }
    }

    /// Tells which shard receives from the queue, or that none does any more.
    pub(super) fn attach(&self, wake: Option<Arc<dyn Wake>>) {
        let mut shard = self.shard();
        self.unwatch(&shard);
        shard.wake = wake;
        self.watch(&shard);
    }

    /// The ring runs, and is kicked by `kick`. What kicked it before is returned, for [`Wakeup::retire`].
    pub(super) fn start(&self, kick: Kick) -> Option<Arc<Kick>> {
        let mut shard = self.shard();
        self.unwatch(&shard);
        let old = self.kick.swap(Some(Arc::new(kick)));
        shard.watches = true;
        self.watch(&shard);
        old
    }

    /// The ring runs no longer; what kicked it still counts.
    pub(super) fn end(&self) {
        let mut shard = self.shard();
        self.unwatch(&shard);
        shard.watches = false;
    }

    /// Takes `kick` in place of what kicked the ring, if that runs.
    pub(super) fn replace(&self, kick: Kick) {
        let shard = self.shard();
        if !shard.watches {
            return;
        }
        self.unwatch(&shard);
        let old = self.kick.swap(Some(Arc::new(kick)));
        self.watch(&shard);
        drop(shard);
        self.retire(old);
    }

    /// Takes away what kicked the ring, which runs no longer, for [`Wakeup::retire`].
    pub(super) fn take_kick(&self) -> Option<Arc<Kick>> {
        self.kick.swap(None)
    }

    /// Has the shard look at the queue.
    pub(super) fn wake(&self) {
        if let Some(wake) = &self.shard().wake {
            wake.wake();
        }
    }

    /// Whether the queue must not rest, because nothing would wake its shard.
    pub(super) fn is_deaf(&self) -> bool {
        self.deaf.load(Ordering::Relaxed)
    }

    /// How often the driver kicked. Asks the kernel.
    pub(super) fn kicks(&self) -> u64 {
        let kick = self.kick.load_full();
        self.retired.load(Ordering::Relaxed).saturating_add(kick.map_or(0, |kick| kick.count()))
    }

    fn shard(&self) -> MutexGuard<'_, Shard> {
        self.shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the shard woken by the driver's kicks. Where the kernel has no room for one more wait (ENOSPC, ENOMEM) the queue
    /// is polled instead.
    fn watch(&self, shard: &Shard) {
        let Some(wake) = &shard.wake else { return };
        if let (true, Some(kick)) = (shard.watches, &*self.kick.load()) {
            let watched = self.charged(|| wake.watch(kick.as_fd()));
            self.deaf.store(watched.is_err(), Ordering::Relaxed);
        }
        wake.wake();
    }

    fn unwatch(&self, shard: &Shard) {
        if let (Some(wake), true, Some(kick)) = (&shard.wake, shard.watches, &*self.kick.load()) {
            self.charged(|| wake.unwatch(kick.as_fd()));
        }
    }

    /// Begins or ends to wait for a kick. The kernel has the lock of the shard's epoll set meanwhile, without which the shard gets
    /// no events, and spins for the kick's, which its front end can have held for 100 ms and more. So the port answers for what
    /// that takes. With the shard's entry locked: what is charged after a ring's end would be held against the next front end.
    fn charged<T>(&self, change: impl FnOnce() -> T) -> T {
        let before = thread_time();
        let done = change();
        self.docket.charge_for_kick(thread_time().saturating_sub(before));
        done
    }

    /// Counts what came by a kick that is not ours any more, and closes it. The kernel takes a while for both: never under a
    /// lock.
    pub(super) fn retire(&self, old: Option<Arc<Kick>>) {
        self.retired.fetch_add(old.map_or(0, |kick| kick.count()), Ordering::Relaxed);
    }
}
