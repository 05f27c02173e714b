//! The thread that asks the kernel about TAP interfaces: [`Keeper`], and what it has seen of one: [`Sight`].
//!
//! The kernel answers most questions about an interface, opens and closes it under one lock of the whole host (rtnl), which any
//! local user can have held for minutes, in a user namespace of his own. So one thread opens all interfaces, looks at each once a
//! second and tells the kernel which offloads are used, and may wait there for as long as it takes. Everybody else reads what that
//! thread saw last, and how long ago that was. That an interface was deleted is told by poll(2), which needs no such lock.
//!
//! One that cannot be opened is tried again every second for as long as there is the port: the process before may still have it.

use std::error::Error;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Interface, TapError};
use crate::port::LinkState;
use crate::sys::tap::{self, InterfaceName};
use crate::sys::threads::touch_stack;

/// How often each interface is looked at.
const INTERVAL: Duration = Duration::from_secs(1);

/// How old may be what is told of an interface before that is said.
const OLD: Duration = Duration::from_secs(3);

/// Why it may be older, or not be there yet.
const HELD: &str = "the kernel's interface lock (rtnl) is held, which any user of this host can do";

/// The thread for all TAPs. Dropping this lets it end when it can.
pub struct Keeper(Arc<Rounds>);

/// What it has to do.
#[derive(Default)]
pub(super) struct Rounds {
    list: Mutex<List>,
    news: Condvar,
    /// Who holds this has whoever asks the kernel wait.
    #[cfg(test)]
    kernel: Arc<Mutex<()>>,
}

#[derive(Default)]
struct List {
    interfaces: Vec<Weak<Interface>>,
    /// Something is not to wait for the next second.
    news: bool,
    closed: bool,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these guard is whole between two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Keeper {
    /// Starts the thread, in the network namespace of the calling one.
    ///
    /// # Errors
    /// The kernel refused it.
    pub fn start() -> io::Result<Self> {
        let rounds = Arc::<Rounds>::default();
        let keeper = Self(Arc::clone(&rounds));
        thread::Builder::new().name("taps".into()).spawn(move || rounds.run())?;
        Ok(keeper)
    }

    pub(super) fn rounds(&self) -> &Arc<Rounds> {
        &self.0
    }

    /// Who holds this has whoever asks the kernel wait.
    #[cfg(test)]
    pub(crate) fn kernel(&self) -> Arc<Mutex<()>> {
        Arc::clone(&self.0.kernel)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        held(&self.0.list).closed = true;
        self.0.news.notify_all();
    }
}

impl Rounds {
    /// Has `interface` opened, and looked at from then on.
    pub(super) fn add(&self, interface: &Arc<Interface>) {
        held(&self.list).interfaces.push(Arc::downgrade(interface));
        self.ring();
    }

    /// Has what is due done now.
    pub(super) fn ring(&self) {
        held(&self.list).news = true;
        self.news.notify_all();
    }

    fn run(&self) {
        touch_stack();
        while let Some(interfaces) = self.next() {
            for interface in interfaces.iter().filter_map(Weak::upgrade).filter(|interface| interface.is_due()) {
                interface.tend();
            }
        }
    }

    /// The interfaces there are, when there may be something to do; `None` if there will be nothing any more.
    fn next(&self) -> Option<Vec<Weak<Interface>>> {
        let (list, idle) = (held(&self.list), |list: &mut List| !list.news && !list.closed);
        let mut list = if list.interfaces.is_empty() {
            self.news.wait_while(list, idle).unwrap_or_else(PoisonError::into_inner)
        } else {
            self.news.wait_timeout_while(list, INTERVAL, idle).unwrap_or_else(PoisonError::into_inner).0
        };
        list.news = false;
        list.interfaces.retain(|interface| interface.strong_count() > 0);
        (!list.closed).then(|| list.interfaces.clone())
    }
}

/// What was seen of an interface last.
pub(super) struct Sight {
    at: Instant,
    state: State,
}

enum State {
    /// It was not opened yet.
    Opening,
    /// It could not be.
    Refused(TapError),
    Seen {
        /// Its name of then.
        name: InterfaceName,
        persistent: bool,
        /// Nothing if it is in another network namespace.
        flags: Option<libc::c_int>,
        mtu: Option<u32>,
    },
}

impl Default for Sight {
    fn default() -> Self {
        Self { at: Instant::now(), state: State::Opening }
    }
}

impl Interface {
    /// Opens it if it is not open, and looks at it. Waits for the kernel.
    pub(super) fn tend(&self) {
        let ended = held(&self.kernel);
        if *ended {
            return;
        }
        #[cfg(test)]
        let _kernel = held(&self.rounds.kernel);
        if self.device().is_none()
            && let Err(error) = self.open()
        {
            return self.publish(State::Refused(error));
        }
        let device = self.device();
        let Some(device) = &*device else { return };
        let wish = held(&self.wish).take();
        if let Some(offloads) = wish
            && let Err(error) = device.offloads.set(device.tun.as_fd(), offloads)
        {
            log::error!("{}: the host does not take the offloads that the port is set to: {error}", self.name);
        }
        // Of one that was deleted nothing more is seen.
        if let Ok((name, persistent)) = tap::attached(device.tun.as_fd()) {
            let (flags, mtu) = (self.control.flags(&name).ok(), self.control.mtu(&name).ok());
            self.publish(State::Seen { name, persistent, flags, mtu });
        }
    }

    fn publish(&self, state: State) {
        *held(&self.sight) = Sight { at: Instant::now(), state };
        self.seen.notify_all();
    }

    fn is_due(&self) -> bool {
        let sight = held(&self.sight);
        matches!(sight.state, State::Opening) || sight.at.elapsed() >= INTERVAL / 2 || held(&self.wish).is_some()
    }

    /// Waits until it was opened, or until then.
    ///
    /// # Errors
    /// It could not be opened.
    pub(super) fn wait_until_opened(&self, deadline: Instant) -> Result<(), TapError> {
        let patience = deadline.saturating_duration_since(Instant::now());
        let opening = |sight: &mut Sight| matches!(sight.state, State::Opening);
        let waited = self.seen.wait_timeout_while(held(&self.sight), patience, opening);
        let mut sight = waited.unwrap_or_else(PoisonError::into_inner).0;
        match std::mem::replace(&mut sight.state, State::Opening) {
            State::Refused(error) => Err(error),
            state => {
                sight.state = state;
                Ok(())
            }
        }
    }

    /// Whether it carries frames, as far as that was seen. Waits for nobody.
    pub(super) fn link(&self) -> LinkState {
        let name = self.name;
        if self.is_deleted() {
            return LinkState::Gone(format!("interface {name} was deleted; `linecard apply` makes it again"));
        }
        let sight = held(&self.sight);
        let age = sight.at.elapsed();
        let link = match &sight.state {
            State::Opening => {
                let seconds = age.as_secs();
                return LinkState::Down(format!(
                    "interface {name} has been waiting to be opened for {seconds} s: {HELD}"
                ));
            }
            State::Refused(error) => {
                let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
                return LinkState::Stopped(format!("{error}{source}; it is tried again every second"));
            }
            // It is attached, and still carries frames if it is up where it is.
            State::Seen { name, flags: None, .. } => LinkState::Impaired(format!(
                "interface {name} is in another network namespace: whether it is up is not seen from here"
            )),
            // Not IFF_RUNNING: a TAP has its carrier as long as we are attached, and the kernel shows that late, from a work
            // queue, when a persistent interface is attached to again (net/core/link_watch.c).
            State::Seen { name, flags: Some(flags), .. } if flags & libc::IFF_UP == 0 => {
                LinkState::Down(format!("interface {name} is down: `ip link set {name} up`"))
            }
            State::Seen { .. } => self.outgoing.trouble().map_or(LinkState::Up, LinkState::Impaired),
        };
        if age < OLD { link } else { unknown(link, age) }
    }

    fn is_deleted(&self) -> bool {
        let device = self.device();
        let Some(device) = &*device else { return false };
        let (mut state, now) = ([PollFd::new(&device.tun, PollFlags::empty())], Timespec { tv_sec: 0, tv_nsec: 0 });
        poll(&mut state, Some(&now)).is_ok() && state[0].revents().contains(PollFlags::ERR)
    }

    /// Its name, whether it is persistent and its MTU, as they were seen last.
    pub(super) fn facts(&self) -> (InterfaceName, bool, Option<u32>) {
        match held(&self.sight).state {
            State::Seen { name, persistent, mtu, .. } => (name, persistent, mtu),
            State::Opening | State::Refused(_) => (self.name, false, None),
        }
    }
}

/// What is told of an interface that was seen in this state, so long ago.
fn unknown(link: LinkState, age: Duration) -> LinkState {
    let unknown = format!("state unknown for {} s: {HELD}", age.as_secs());
    match link {
        LinkState::Down(reason) => LinkState::Down(format!("{reason}; {unknown}")),
        _ => LinkState::Impaired(unknown),
    }
}

#[cfg(test)]
mod tests;
