//! Keeps stand-ins at hand for each crew ([`super::crew`]): [`Recruiter`], a thread that may wait.
//!
//! To start a thread, or to join one, the kernel needs the lock of the process's memory map, and a front end may have somebody
//! hold that for as long as it holds a shard up. So the watchdog does neither: it takes stand-ins that are there, and calls
//! this one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use super::crew::Crew;
use crate::limits::SHARDS;

/// When it tries again after the kernel refused a thread.
const RETRY: Duration = Duration::from_secs(1);

/// All crews there are.
pub(super) type Crews = Arc<Mutex<Vec<Weak<Crew>>>>;

/// The recruiter's thread. It ends with this.
pub(super) struct Recruiter {
    told: Arc<Told>,
    thread: Option<JoinHandle<()>>,
}

/// What it has been told. Waking it is not enough: it also parks while a thread that it starts comes up, and would take that for
/// what it waits for there.
#[derive(Default)]
struct Told {
    to_look: AtomicBool,
    to_end: AtomicBool,
}

/// The means to have it look what is needed.
#[derive(Clone)]
pub(super) struct Call(Arc<Told>, Thread);

impl Call {
    /// Has it look. Waits for nobody.
    pub fn make(&self) {
        self.0.to_look.store(true, Ordering::SeqCst);
        self.1.unpark();
    }
}

impl Recruiter {
    /// Starts one for `crews`; returns the means to call it, too.
    pub fn start(crews: Crews) -> std::io::Result<(Self, Call)> {
        let told = Arc::<Told>::default();
        let own = Arc::clone(&told);
        let run = move || recruit(&crews, &own);
        let thread = std::thread::Builder::new().name("recruiter".into()).stack_size(128 * 1024).spawn(run)?;
        let call = Call(Arc::clone(&told), thread.thread().clone());
        Ok((Self { told, thread: Some(thread) }, call))
    }
}

impl Drop for Recruiter {
    fn drop(&mut self) {
        self.told.to_end.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn recruit(crews: &Crews, told: &Told) {
    let mut refused = false;
    while !told.to_end.load(Ordering::SeqCst) {
        told.to_look.store(false, Ordering::SeqCst);
        // Room before the lock is taken, which the watchdog takes as well.
        let mut present = Vec::with_capacity(SHARDS);
        present.extend(crews.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade));
        let failed = present.iter().find_map(|crew| crew.replenish().err());
        drop(present);
        if let Some(error) = failed {
            if !std::mem::replace(&mut refused, true) {
                log::error!("no other thread could serve the ports of a shard that is held up: {error}");
            }
            std::thread::park_timeout(RETRY);
        } else {
            refused = false;
            while !told.to_look.load(Ordering::SeqCst) && !told.to_end.load(Ordering::SeqCst) {
                std::thread::park();
            }
        }
    }
}
