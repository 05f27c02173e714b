//! How anybody gets a shard's attention: its [`Bell`].
//!
//! Three things come in through it: kicks, by epoll; queues that say they are worth a look, by a list; orders of the
//! control side, by another. A sleep may have an end, for which there is a timer. The lists are guarded by mutexes that are
//! held for a push or a swap. A shard at work sees one flag per turn; a shard asleep is woken by an eventfd, which is written
//! only then.
//!
//! Falling asleep: the shard says so (`asleep`), then looks at the flag (`rung`) once more. Ringing: set the flag, then
//! look whether the shard is asleep. Both stores are followed by a load of the other's variable with sequential
//! consistency, so at least one side sees the other (Dekker); no ring is lost. `flags` has them, and a loom model of it.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::crew::QUEUES_AT_HAND;
use super::flags::Flags;
use crate::ident::{LatencySensitivity, PortIndex};
use crate::port::{Receive, Wake};
use crate::stats::QueueLoad;

/// The epoll tokens of the bell's own eventfd and timer; slots have their number.
const RING: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// A queue to own, and how.
#[derive(Clone)]
pub(super) struct Engagement {
    pub port: PortIndex,
    /// Which of its port's queues it is.
    pub number: u16,
    pub queue: Arc<dyn Receive>,
    pub latency: LatencySensitivity,
    /// Where to count what it takes.
    pub load: Arc<QueueLoad>,
}

/// What the control side wants of a shard. Whoever sends one that has `done` waits for the answer.
pub(super) enum Order {
    /// Own this queue from now on.
    Attach(Engagement),
    /// Give up one queue of a port; the port stays.
    Release { port: PortIndex, number: u16, done: Sender<()> },
    /// Give up the queues of this port.
    Detach { port: PortIndex, done: Sender<()> },
    /// Let go of old tables.
    Refresh { done: Sender<()> },
    /// Another thread was to send what ports hold back: send it.
    TakeOver,
    /// End.
    Stop,
}

/// A shard's bell.
pub(super) struct Bell {
    epoll: OwnedFd,
    /// Held by who changes what the set waits for. That can take long, by the doing of whoever owns what is waited for, and who
    /// waits in the kernel for another's change spins: that would pass for the doing of his own port.
    changes: Mutex<()>,
    event: EventFd,
    /// Ends a sleep that has an end. epoll's own time limit has milliseconds before Linux 5.11, and is rounded by the thread's
    /// timer slack.
    timer: OwnedFd,
    flags: Flags,
    ready: Mutex<Vec<u32>>,
    /// `None` once nobody reads them any more.
    orders: Mutex<Option<Vec<Order>>>,
}

impl Bell {
    /// A bell that nobody listens to yet.
    pub fn new() -> std::io::Result<Self> {
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        let listen = epoll::Event::new(epoll::Events::EPOLLIN, RING);
        epoll::ctl(epoll.as_raw_fd(), epoll::ControlOptions::EPOLL_CTL_ADD, event.as_raw_fd(), listen)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        // Edge-triggered: each time that it runs out counts, and nobody reads it.
        let runs_out = epoll::Event::new(epoll::Events::EPOLLIN | epoll::Events::EPOLLET, TIMER);
        epoll::ctl(epoll.as_raw_fd(), epoll::ControlOptions::EPOLL_CTL_ADD, timer.as_raw_fd(), runs_out)?;
        Ok(Self {
            epoll,
            changes: Mutex::default(),
            event,
            timer,
            flags: Flags::default(),
            ready: Mutex::default(),
            orders: Mutex::new(Some(Vec::with_capacity(QUEUES_AT_HAND))),
        })
    }

    /// Orders the shard to own a queue.
    pub fn attach(&self, engagement: Engagement) {
        self.order(Order::Attach(engagement));
    }

    /// Orders the shard to give up one queue and waits until it has.
    pub fn release(&self, port: PortIndex, number: u16) {
        let (done, answer) = channel();
        self.order(Order::Release { port, number, done });
        let _ = answer.recv();
    }

    /// Orders the shard to give up the queues of `port` and waits until it has.
    pub fn detach(&self, port: PortIndex) {
        let (done, answer) = channel();
        self.order(Order::Detach { port, done });
        // Shards end after the last order only, or with the process.
        let _ = answer.recv();
    }

    /// Waits until the shard has let go of old tables.
    pub fn refresh(&self) {
        let (done, answer) = channel();
        self.order(Order::Refresh { done });
        let _ = answer.recv();
    }

    /// Orders the shard to send what another one was to send.
    pub fn take_over(&self) {
        self.order(Order::TakeOver);
    }

    /// Nobody reads orders any more: those that wait count as carried out, and so do all that come. Wakes the thread, which may
    /// be about to sleep and finds itself evicted then.
    pub fn close(&self) {
        let orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(orders);
        self.ring();
    }

    /// Orders the shard to end.
    pub fn stop(&self) {
        self.order(Order::Stop);
    }

    /// Whether anything came in since the last call. One relaxed load if not.
    #[inline]
    pub fn rang(&self) -> bool {
        self.flags.take()
    }

    /// Moves the orders that came in to `orders` and the slots worth a look to `ready`.
    pub fn collect(&self, orders: &mut Vec<Order>, ready: &mut Vec<u32>) {
        if let Some(own) = &mut *self.orders.lock().unwrap_or_else(PoisonError::into_inner) {
            orders.append(own);
        }
        ready.append(&mut self.ready.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Adds the slots that were kicked to `ready`, without waiting.
    pub fn look(&self, ready: &mut Vec<u32>) {
        self.wait(0, ready);
    }

    /// Sleeps until something comes in, or for as long as `longest`; adds the slots that were kicked to `ready`.
    pub fn sleep(&self, longest: Option<Duration>, ready: &mut Vec<u32>) {
        // One that cannot be woken in time does not sleep: it looks again until it is time.
        let timed = longest.is_none_or(|longest| self.set_timer(longest).is_ok());
        if timed && self.flags.fall_asleep() {
            self.wait(-1, ready);
            self.flags.wake_up();
        }
    }

    /// Has the timer run out once after `time`. It is not stopped when something else ends the sleep: running out late, it
    /// wakes a shard for nothing, once.
    fn set_timer(&self, time: Duration) -> std::io::Result<()> {
        let once = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A time of zero would stop it (timerfd_settime(2)).
        let time = time.max(Duration::from_nanos(1));
        let value = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        let when = Itimerspec { it_interval: once, it_value: value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &when)?;
        Ok(())
    }

    fn wait(&self, milliseconds: i32, ready: &mut Vec<u32>) {
        let mut events = [epoll::Event { events: 0, data: 0 }; 64];
        // An interrupted wait is one that found nothing.
        let count = epoll::wait(self.epoll.as_raw_fd(), milliseconds, &mut events).unwrap_or(0);
        for event in &events[..count] {
            match event.data {
                RING => {
                    // Reading resets the counter; that it was zero already is not possible and would not matter.
                    let _ = self.event.read();
                }
                TIMER => {}
                slot => ready.push(slot as u32),
            }
        }
    }

    /// Changes what the epoll set waits for.
    fn change(&self, how: epoll::ControlOptions, fd: BorrowedFd<'_>, wanted: epoll::Event) -> std::io::Result<()> {
        let _one_at_a_time = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        epoll::ctl(self.epoll.as_raw_fd(), how, fd.as_raw_fd(), wanted)
    }

    fn order(&self, order: Order) {
        match &mut *self.orders.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(orders) => orders.push(order),
            None => return,
        }
        self.ring();
    }

    fn ring(&self) {
        if self.flags.ring() {
            // It only fails when the counter is full, and then the shard is being woken already.
            let _ = self.event.write(1);
        }
    }
}

/// The means to wake a shard for the queue in one of its slots.
pub(super) struct SlotWake {
    /// The shard's bell.
    pub bell: Arc<Bell>,
    /// The queue's slot.
    pub slot: u32,
}

impl Wake for SlotWake {
    fn wake(&self) {
        let mut ready = self.bell.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if !ready.contains(&self.slot) {
            ready.push(self.slot);
        }
        drop(ready);
        self.bell.ring();
    }

    fn watch(&self, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        let wanted = epoll::Event::new(epoll::Events::EPOLLIN | epoll::Events::EPOLLET, u64::from(self.slot));
        self.bell.change(epoll::ControlOptions::EPOLL_CTL_ADD, fd, wanted)
    }

    fn unwatch(&self, fd: BorrowedFd<'_>) {
        let nothing = epoll::Event::new(epoll::Events::empty(), 0);
        // Not being watched is what is wanted.
        let _ = self.bell.change(epoll::ControlOptions::EPOLL_CTL_DEL, fd, nothing);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::toll::thread_time;

    /// What a change takes is charged to the port whose kick it is.
    #[test]
    fn who_waits_for_anothers_change_does_so_outside_of_the_kernel_and_asleep() {
        let wake = SlotWake { bell: Arc::new(Bell::new().unwrap()), slot: 0 };
        let kick = crate::sys::eventfd::EventFd::new().unwrap();
        let anothers = wake.bell.changes.lock().unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                let before = thread_time();
                wake.watch(kick.as_fd()).unwrap();
                thread_time() - before
            });
            std::thread::sleep(Duration::from_millis(200));
            assert!(!waits.is_finished());
            drop(anothers);
            let used = waits.join().unwrap();
            assert!(used < Duration::from_millis(100), "{used:?}");
        });
    }
}
