//! Threads that are late or cannot be had: neither is a port's fault, and nobody is left waiting.

#![allow(clippy::unwrap_used)]

use std::os::unix::process::ExitStatusExt;
use std::sync::mpsc::channel;
use std::thread;

use rustix::process::{Resource, Rlimit, setrlimit};

use super::*;
use crate::port::null::Null;

/// How long anything may take before a test gives up. Far more than it takes.
const LONG: Duration = Duration::from_secs(60);

/// Calls whose threads are all started when they are needed.
fn without_kept_threads() -> Calls {
    Calls(Pool::start("port-calls", 0).unwrap())
}

fn ports(count: usize, calls: &Calls) -> Vec<Arc<Handle>> {
    (0..count).map(|_| Handle::new(Null::new() as Arc<dyn Port>, calls)).collect()
}

#[test]
fn a_thread_that_begins_late_leaves_no_port_silent() {
    let calls = without_kept_threads();
    let handles = ports(2, &calls);
    // A thread that is idle, gets the job, and is not let run.
    calls.0.pretend_idle(1);
    let answers = calls.ask(handles.clone(), |_, port| port.link());
    calls.0.pretend_idle(0);
    assert!(answers.iter().all(Option::is_some), "another thread asks them: {answers:?}");
    assert!(handles.iter().all(|handle| !handle.is_silent()), "nobody has asked them for long");
    assert!(calls.ask(handles, |_, port| port.link()).iter().all(Option::is_some));
}

#[test]
fn a_port_has_its_time_from_when_it_is_asked() {
    let calls = without_kept_threads();
    let handles = ports(1, &calls);
    calls.0.pretend_idle(1);
    // The thread begins when half of the asker's patience is gone, and the port takes as much again and a little more.
    let late = {
        let pool = calls.0.clone();
        thread::spawn(move || {
            thread::sleep(PATIENCE / 2);
            let job = pool.take_job();
            let begun = Instant::now();
            job.into_iter().for_each(|job| job());
            begun
        })
    };
    let answers = calls.ask(handles.clone(), move |_, _| thread::sleep(PATIENCE * 6 / 10));
    let returned = Instant::now();
    let begun = late.join().unwrap();
    calls.0.pretend_idle(0);
    assert!(answers[0].is_some() || returned.duration_since(begun) >= PATIENCE, "passed over too early");
    assert!(!handles[0].is_silent(), "its call has returned");
}

/// What is changed for a whole process is tried in one of its own, which runs this test alone.
const CHILD: &str = "LINECARD_TEST_CALLS";

#[test]
fn where_no_thread_can_be_had_those_that_there_are_do_it() {
    if std::env::var(CHILD).is_ok() {
        return without_threads();
    }
    let me = "control::calls::tests::where_no_thread_can_be_had_those_that_there_are_do_it";
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", me, "--test-threads=1", "--nocapture"]).env(CHILD, "yes");
    let output = child.output().unwrap();
    let (status, said) = (output.status, String::from_utf8_lossy(&output.stderr));
    assert!(status.success(), "signal {:?}, {said}", status.signal());
}

/// What the process of its own does.
fn without_threads() {
    let calls = Calls::start().unwrap();
    let (begun, has_begun) = channel();
    let hang = |_| {
        let (free, freed) = channel::<()>();
        let begun = begun.clone();
        calls.run(move || {
            begun.send(()).unwrap();
            let _ = freed.recv();
        });
        has_begun.recv_timeout(LONG).unwrap();
        free
    };
    let busy: Vec<_> = (0..KEPT).map(hang).collect();
    let (by, who) = channel();

    // A thread's stack has no room any more, other things do.
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let mapped: u64 = pages.split(' ').next().unwrap().parse().unwrap();
    let limit = mapped * crate::sys::mapped_file::page_bytes() + (1 << 20);
    setrlimit(Resource::As, Rlimit { current: Some(limit), maximum: Some(limit) }).unwrap();
    assert!(thread::Builder::new().spawn(|| ()).is_err(), "the limit is what this test needs");
    assert!(Calls::start().is_err(), "there would be nobody to make calls");

    calls.run(move || by.send(thread::current().id()).unwrap());
    assert!(who.try_recv().is_err(), "the caller does not wait for it: a thread will take it");
    drop(busy);
    assert_ne!(who.recv_timeout(LONG).unwrap(), thread::current().id());
    let answers = calls.ask(ports(3, &calls), |_, port| port.link());
    assert!(answers.iter().all(Option::is_some), "{answers:?}");
}
