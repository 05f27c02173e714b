//! Threads for what may have to wait: [`Pool`].
//!
//! While the kernel keeps a session waiting for its front end's file (`sys/mapping_turn.rs`), whoever starts a thread waits as
//! long. So some threads are there from the start and stay, and others are started only while all of those are busy, by a
//! thread that does nothing else: nobody who has something to do ever waits for the start of a thread. Those others get what the
//! kept ones cannot do at once and nothing else, or what comes once a second would go round among them and keep them all.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::sys::threads::touch_stack;

/// How long a thread that was started for more work stays without any.
const IDLE: Duration = Duration::from_secs(5);

/// How long none is started after the kernel has refused one.
const REST: Duration = Duration::from_millis(100);

type Job = Box<dyn FnOnce() + Send>;

/// Threads that do what they are given, each one thing at a time. They end when the last handle has gone and all is done.
#[derive(Clone)]
pub struct Pool(Arc<Handle>);

struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.queue().closed = true;
        self.0.more.notify_all();
        self.0.overflow.notify_all();
        self.0.wanted.notify_all();
    }
}

struct Shared {
    name: &'static str,
    queue: Mutex<Queue>,
    /// There is a job for one that is kept.
    more: Condvar,
    /// There is a job, and none of those is idle.
    overflow: Condvar,
    /// There are more jobs than threads for them.
    wanted: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Threads that wait for a job, or are about to: those that are kept.
    idle: usize,
    /// And the others.
    idle_others: usize,
    /// Threads that are being started.
    coming: usize,
    closed: bool,
}

impl Queue {
    fn is_short_of_kept_threads(&self) -> bool {
        self.jobs.len() > self.idle
    }

    fn is_short_of_threads(&self) -> bool {
        self.jobs.len() > self.idle + self.idle_others + self.coming
    }
}

impl Pool {
    /// Starts `kept` threads called `name`, which stay, and one that starts others if need be.
    ///
    /// # Errors
    /// The kernel refused a thread.
    pub fn start(name: &'static str, kept: usize) -> io::Result<Self> {
        let queue = Mutex::new(Queue { coming: kept, ..Queue::default() });
        let (more, overflow, wanted) = Default::default();
        let shared = Arc::new(Shared { name, queue, more, overflow, wanted });
        let pool = Self(Arc::new(Handle(Arc::clone(&shared))));
        for _ in 0..kept {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name(name.into()).spawn(move || shared.work(None))?;
        }
        thread::Builder::new().name(format!("{name}+")).stack_size(64 * 1024).spawn(move || shared.grow())?;
        Ok(pool)
    }

    /// Has `job` done soon, by a thread of the pool. Does not wait.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let Handle(shared) = &*self.0;
        let mut queue = shared.queue();
        queue.jobs.push_back(Box::new(job));
        let idle = if queue.is_short_of_kept_threads() { &shared.overflow } else { &shared.more };
        idle.notify_one();
        if queue.is_short_of_threads() {
            shared.wanted.notify_one();
        }
    }

    /// What `job` returns, done by a thread of the pool; `None` if it panicked.
    pub async fn call<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.run(move || {
            // Whoever asked may have gone.
            let _ = answer.send(job());
        });
        answered.await.ok()
    }
}

#[cfg(test)]
impl Pool {
    /// As if there were so many threads that wait for a job and are not let run.
    pub(super) fn pretend_idle(&self, threads: usize) {
        self.0.0.queue().idle = threads;
    }

    /// The job whose turn it is, for a thread of a test.
    pub(super) fn take_job(&self) -> Option<Box<dyn FnOnce() + Send>> {
        self.0.0.queue().jobs.pop_front()
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // It is whole between two statements.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread that does what there is to do, until there was nothing for so long.
    fn work(&self, patience: Option<Duration>) {
        touch_stack();
        self.queue().coming -= 1;
        while let Some(job) = self.next(patience) {
            // It has been reported by the hook; what it was to do is not done.
            let _ = catch_unwind(AssertUnwindSafe(job));
        }
    }

    fn next(&self, patience: Option<Duration>) -> Option<Job> {
        let mut queue = self.queue();
        let Some(patience) = patience else {
            queue.idle += 1;
            let none = |queue: &mut Queue| queue.jobs.is_empty() && !queue.closed;
            queue = self.more.wait_while(queue, none).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
            return queue.jobs.pop_front();
        };
        // Also one that has just ended a job leaves the next to those that are kept, or it would depend on who comes first.
        let none = |queue: &mut Queue| !queue.is_short_of_kept_threads() && !queue.closed;
        queue.idle_others += 1;
        let waited = self.overflow.wait_timeout_while(queue, patience, none);
        queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        queue.idle_others -= 1;
        if none(&mut queue) { None } else { queue.jobs.pop_front() }
    }

    /// The thread that starts others.
    fn grow(self: Arc<Self>) {
        loop {
            let queue = self.queue();
            let enough = |queue: &mut Queue| !queue.is_short_of_threads() && !queue.closed;
            let mut queue = self.wanted.wait_while(queue, enough).unwrap_or_else(PoisonError::into_inner);
            if !queue.is_short_of_threads() {
                return;
            }
            queue.coming += 1;
            drop(queue);
            let shared = Arc::clone(&self);
            let started = thread::Builder::new().name(self.name.into()).spawn(move || shared.work(Some(IDLE)));
            if let Err(error) = started {
                log::error!("no thread more for {}: {error}", self.name);
                self.queue().coming -= 1;
                thread::sleep(REST);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// Jobs that hang until what this sends to is dropped.
    fn hang(pool: &Pool, jobs: usize) -> Vec<Sender<()>> {
        let (begun, begins) = channel();
        let hung = (0..jobs).map(|_| {
            let (end, ends) = channel::<()>();
            let begun = begun.clone();
            pool.run(move || {
                begun.send(()).unwrap();
                let _ = ends.recv();
            });
            end
        });
        let hung = hung.collect();
        (0..jobs).for_each(|_| begins.recv().unwrap());
        hung
    }

    #[test]
    fn jobs_are_done_however_many_hang() {
        let pool = Pool::start("test", 2).unwrap();
        let (done, ids) = channel();
        let one = || {
            let done = done.clone();
            pool.run(move || done.send(thread::current().id()).unwrap());
            ids.recv().unwrap()
        };
        let asker = thread::current().id();
        assert_ne!(one(), asker);
        let hung = hang(&pool, 9);
        assert_ne!(one(), asker);
        drop(hung);
    }

    #[test]
    fn what_comes_now_and_then_keeps_no_thread_but_those_that_are_kept() {
        let pool = Pool::start("test", 1).unwrap();
        drop(hang(&pool, 3));
        let (done, ids) = channel();
        let mut all = (0..20).map(|_| {
            let done = done.clone();
            while pool.0.0.queue().idle == 0 {
                thread::yield_now();
            }
            pool.run(move || done.send(thread::current().id()).unwrap());
            ids.recv().unwrap()
        });
        let first = all.next().unwrap();
        assert!(all.all(|id| id == first), "another had some of it");
    }

    #[test]
    fn a_job_that_panics_costs_itself_and_what_was_given_is_done_when_the_pool_goes() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let pool = Pool::start("test", 1).unwrap();
        assert_eq!(runtime.block_on(pool.call(|| panic!("to be expected"))), None::<()>);
        assert_eq!(runtime.block_on(pool.call(|| 7)), Some(7));
        let (done, last) = channel();
        let hung: Vec<_> = (0..9).map(|_| channel::<()>()).collect();
        let (ends, hung): (Vec<_>, Vec<_>) = hung.into_iter().unzip();
        for hung in hung {
            pool.run(move || assert!(hung.recv().is_err()));
        }
        pool.run(move || done.send(()).unwrap());
        drop(pool);
        last.recv().unwrap();
        assert!(last.recv().is_err());
        drop(ends);
    }
}
