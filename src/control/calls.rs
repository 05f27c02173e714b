//! Calls of ports, made where they hold up nobody else: [`Calls`].
//!
//! What a port does when it is asked, tuned or ended depends on its far end and on the kernel: a file that a peer shared is closed, a
//! lock is held by a shard that waits for a guest's page, the kernel changes network devices. No kind of port means to wait for
//! that; one that does all the same costs a thread, and a second of whoever asks first, and nothing else. Such a port is *silent*
//! until its call returns, and nobody asks it anything meanwhile. Only a port that somebody is asking can become silent: a thread
//! that the host does not let run is no port's fault.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::pool::Pool;
use crate::port::Port;

/// How long a port may take to answer. Far more than it takes, however busy the host is.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// How often a question that no thread has begun to ask for that long is given to one more, before it is given up.
const HAND_ONS: u32 = 10;

/// Threads for them that are there from the start. Others come while calls hang.
const KEPT: usize = 2;

/// Threads for calls that may never return: as many as there are such calls, and two for all others.
#[derive(Clone)]
pub(super) struct Calls(Pool);

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these guard is whole between two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Calls {
    /// Starts the threads.
    ///
    /// # Errors
    /// The kernel refused one.
    pub(super) fn start() -> io::Result<Self> {
        Pool::start("port-calls", KEPT).map(Self)
    }

    /// Has `job` done soon, by another thread. Does not wait.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        self.0.run(job);
    }

    /// The answer of each of `ports` to `question`, which hears where in them it is; `None` of those that are silent.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        ports: Vec<Arc<Handle>>,
        question: impl Fn(usize, &dyn Port) -> T + Send + Sync + 'static,
    ) -> Vec<Option<T>> {
        if ports.is_empty() {
            return Vec::new();
        }
        let answers = ports.iter().map(|_| None).collect();
        let round = Arc::new(Round {
            ports,
            question,
            state: Mutex::new(RoundState { next: 0, asker: 0, asked: None, answers }),
            done: Condvar::new(),
        });
        self.walk(&round);
        let mut hand_ons = 0;
        let mut state = held(&round.state);
        while state.next < round.ports.len() {
            let (before, asked) = (state.next, state.asked.map_or(Duration::ZERO, |since| since.elapsed()));
            let patience = PATIENCE.saturating_sub(asked);
            let waited = round.done.wait_timeout_while(state, patience, |state| state.next < round.ports.len());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            // Somebody else goes on: with the others if it is the port that takes so long, else with this one.
            match state.asked {
                _ if state.next != before => continue,
                Some(since) if since.elapsed() < PATIENCE => continue,
                Some(_) => {
                    round.ports[before].silent.store(true, Ordering::Release);
                    state.pass_over();
                }
                None if hand_ons < HAND_ONS => hand_ons += 1,
                None => {
                    log::error!("no thread has begun to ask {} ports for {hand_ons} s", round.ports.len() - before);
                    state.next = round.ports.len();
                    break;
                }
            }
            drop(state);
            self.walk(&round);
            state = held(&round.state);
        }
        std::mem::take(&mut state.answers)
    }

    /// Tells each of `ports` something, and waits until they have taken it in; one that is silent takes it in when it can.
    pub(super) fn tell(&self, ports: Vec<Arc<Handle>>, news: impl Fn(usize, &dyn Port) + Send + Sync + 'static) {
        let news = Arc::new(news);
        let told = {
            let news = Arc::clone(&news);
            self.ask(ports.clone(), move |at, port| news(at, port))
        };
        for (at, handle) in ports.into_iter().enumerate().filter(|(at, _)| told[*at].is_none()) {
            let news = Arc::clone(&news);
            self.run(move || handle.port().into_iter().for_each(|port| news(at, &**port)));
        }
    }

    fn walk<T: Send + 'static>(&self, round: &Arc<Round<T, impl Fn(usize, &dyn Port) -> T + Send + Sync + 'static>>) {
        let round = Arc::clone(round);
        self.run(move || round.walk());
    }
}

/// One question to many ports.
struct Round<T, Q> {
    ports: Vec<Arc<Handle>>,
    question: Q,
    state: Mutex<RoundState<T>>,
    done: Condvar,
}

struct RoundState<T> {
    /// The port whose turn it is.
    next: usize,
    /// Who asks: a thread that was passed over asks nobody else.
    asker: usize,
    /// Since when somebody is asking that port, if somebody is.
    asked: Option<Instant>,
    answers: Vec<Option<T>>,
}

impl<T> RoundState<T> {
    /// Goes on without an answer of the port that is being asked, and without who asks it.
    fn pass_over(&mut self) {
        self.next += 1;
        self.asker += 1;
        self.asked = None;
    }
}

impl<T, Q: Fn(usize, &dyn Port) -> T> Round<T, Q> {
    /// Asks those that were not asked yet, unless somebody does.
    fn walk(&self) {
        let mut state = held(&self.state);
        let asker = state.asker;
        while state.asked.is_none() && state.next < self.ports.len() {
            let at = state.next;
            let mut answer = None;
            if !self.ports[at].is_silent() {
                state.asked = Some(Instant::now());
                drop(state);
                answer = self.ports[at].port().map(|port| (self.question)(at, &**port));
                state = held(&self.state);
                if state.asker != asker {
                    self.ports[at].silent.store(false, Ordering::Release);
                    return;
                }
                state.asked = None;
            }
            state.answers[at] = answer;
            state.next += 1;
        }
        drop(state);
        self.done.notify_all();
    }
}

/// A port that was opened. When the last who has it lets go, it is ended by another thread: that may take as long as its far end
/// has it take.
pub(super) struct Handle {
    /// Taken by its end only.
    port: Option<Arc<dyn Port>>,
    calls: Calls,
    silent: AtomicBool,
    ended: Arc<Ended>,
}

impl Handle {
    pub(super) fn new(port: Arc<dyn Port>, calls: &Calls) -> Arc<Self> {
        let (calls, silent, ended) = (calls.clone(), AtomicBool::new(false), Arc::default());
        Arc::new(Self { port: Some(port), calls, silent, ended })
    }

    /// The port, for what never waits: its queues.
    pub(super) fn port(&self) -> Option<&Arc<dyn Port>> {
        self.port.as_ref()
    }

    /// Whether a call of it has not returned for too long.
    pub(super) fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Acquire)
    }

    /// What becomes true when the port has ended.
    pub(super) fn ended(&self) -> Arc<Ended> {
        Arc::clone(&self.ended)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let (port, ended) = (self.port.take(), Arc::clone(&self.ended));
        self.calls.run(move || {
            drop(port);
            ended.set();
        });
    }
}

/// Something that happens once.
#[derive(Default)]
pub(super) struct Ended {
    is: Mutex<bool>,
    news: Condvar,
}

impl Ended {
    pub(super) fn is_set(&self) -> bool {
        *held(&self.is)
    }

    fn set(&self) {
        *held(&self.is) = true;
        self.news.notify_all();
    }

    /// Waits until all of them have happened, but no longer than `patience` altogether.
    pub(super) fn wait_for(all: &[Arc<Self>], patience: Duration) {
        let deadline = Instant::now() + patience;
        for one in all {
            let left = deadline.saturating_duration_since(Instant::now());
            drop(one.news.wait_timeout_while(held(&one.is), left, |is| !*is));
        }
    }
}

#[cfg(test)]
mod tests;
