//! The controller with ports that hang: one in each of a port's calls.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::report::{PortReport, PortState};
use super::stuck::{Gate, Stuck};
use super::{Controller, FdbFilter};
use crate::port::{Handover, LinkState, Port};
use crate::sys::tap::enter_fresh_network_namespace;

/// How long anything may take before a test gives up. Far more than it takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A controller in a directory of its own.
struct Bench {
    directory: tempfile::TempDir,
    controller: Arc<Controller>,
    gate: Arc<Gate>,
}

impl Bench {
    /// Two ports, of which `bad` hangs in `call`.
    fn new(call: &'static str) -> Self {
        let (directory, gate) = (tempfile::tempdir().unwrap(), Arc::<Gate>::default());
        let file = write(&directory, "", "null");
        let held = Arc::clone(&gate);
        let stand_in = Box::new(move |name: &crate::ident::Name| {
            let call = if name.as_str() == "bad" { call } else { "" };
            Some(Arc::new(Stuck::new(call, &held)) as Arc<dyn Port>)
        });
        let controller = Arc::new(Controller::for_test(&file, stand_in));
        Self { directory, controller, gate }
    }

    /// Writes another file.
    fn write(&self, keys: &str, kind: &str) {
        write(&self.directory, keys, kind);
    }

    /// What `ask` answers, which must not take for ever.
    fn in_time<T: Send + 'static>(&self, what: &str, ask: impl FnOnce(&Controller) -> T + Send + 'static) -> T {
        let (answer, answered) = channel();
        let controller = Arc::clone(&self.controller);
        std::thread::spawn(move || answer.send(ask(&controller)));
        answered.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{what} does not return"))
    }

    /// Has `change` made by another thread, which may hang in it.
    fn begin_to(&self, change: impl FnOnce(&Controller) + Send + 'static) {
        let controller = Arc::clone(&self.controller);
        std::thread::spawn(move || change(&controller));
    }

    fn port(&self, name: &'static str) -> PortReport {
        self.in_time("port show", move |c| c.port(name).unwrap())
    }

    fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !done(self) {
            assert!(begin.elapsed() < PATIENCE, "not in time: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Everything that can be looked at is shown, though this hangs.
    fn look_at_everything(&self, call: &str) {
        let what = |of: &str| format!("{of}, while {call} hangs,");
        let status = self.in_time(&what("status"), Controller::status);
        assert_eq!(status.networks, 1);
        let ports = self.in_time(&what("port list"), Controller::ports);
        assert!(["bad", "good"].iter().all(|name| ports.iter().any(|port| port.name == *name)), "{call}");
        // A port is passed over after a second, which a busy host may take to let its answer through.
        self.until(&what("the other port"), |bench| {
            let is_up = |port: &PortReport| (port.state, &port.reason) == (PortState::Up, &None);
            let ports = bench.in_time("port list", Controller::ports);
            ports.iter().any(|port| port.name == "good" && is_up(port)) && bench.port("good").detail.is_some()
        });
        self.in_time(&what("port show of that port"), |c| c.port("bad").unwrap());
        self.in_time(&what("network list"), Controller::networks);
        self.in_time(&what("fdb list"), |c| c.fdb(&FdbFilter::default(), None).unwrap());
        self.in_time(&what("drops"), |c| c.drops(None).unwrap());
        assert_eq!(self.in_time(&what("shard list"), Controller::shards).len(), status.shards);
        self.in_time(&what("shard moves"), Controller::moves);
        self.in_time(&what("the counts of notifications"), Controller::notifications);
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.gate.open();
    }
}

fn write(directory: &tempfile::TempDir, keys: &str, kind: &str) -> PathBuf {
    let (here, file) = (directory.path().display(), directory.path().join("linecard.yaml"));
    let port = |name: &str| format!("  {name}: {{ \"{kind}\": {{}}, network: lan{keys} }}\n");
    let text = format!(
        "version: 1\ndaemon: {{ api: {here}/api.sock, state-dir: {here}/state }}\nnetworks: {{ lan: {{}} }}\nports:\n{}{}",
        port("bad"),
        port("good")
    );
    fs::write(&file, text).unwrap();
    file
}

#[test]
fn a_port_that_hangs_keeps_nobody_from_looking() {
    for call in ["link", "detail", "notifications", "memory_nodes", "set_mtu", "set_offloads", "set_latency"] {
        let bench = Bench::new(call);
        bench.begin_to(|c| drop(c.begin()));
        bench.until("the first configuration", |bench| bench.in_time("status", Controller::status).generation == 1);
        bench.write(", mtu: 9000, latency-sensitivity: low", "null");
        bench.begin_to(|c| drop(c.apply(None)));
        bench.begin_to(Controller::upkeep);
        for _ in 0..2 {
            bench.look_at_everything(call);
        }
        bench.until("the change", |bench| bench.port("good").mtu == Some(9000));
        if call == "link" {
            let bad = bench.port("bad");
            assert_eq!(bad.state, PortState::Stopped);
            assert!(bad.reason.unwrap().starts_with("it does not answer"));
        }
        bench.gate.open();
        bench.until("the port", |bench| bench.port("bad").state == PortState::Up);
        assert_eq!(bench.port("bad").mtu, Some(9000));
    }
}

#[test]
fn noting_conflicts_keeps_nobody_from_looking() {
    let bench = Bench::new("");
    bench.controller.begin().unwrap();
    let noting = bench.controller.conflicts.lock().unwrap();
    bench.look_at_everything("noting conflicts");
    drop(noting);
    bench.in_time("upkeep", Controller::upkeep);
}

#[test]
fn a_change_that_hangs_keeps_nobody_from_looking() {
    for call in ["receive_queues", "transmit_side"] {
        let bench = Bench::new("");
        bench.controller.begin().unwrap();
        let hanging = Bench::new(call);
        hanging.begin_to(|c| drop(c.begin()));
        bench.look_at_everything(call);
        // Nothing has been shown yet of what is being carried out.
        assert_eq!(hanging.in_time("status", Controller::status).generation, 0);
        hanging.in_time("port list", Controller::ports);
        hanging.in_time("upkeep", Controller::upkeep);
        let refused = hanging.in_time("another change", |c| c.remove_port("good").unwrap_err().to_string());
        assert!(refused.starts_with("another change has been going on"), "{refused}");
        hanging.gate.open();
        hanging.until("the configuration", |bench| bench.in_time("status", Controller::status).generation == 1);
        hanging.look_at_everything("nothing");
    }
}

#[test]
fn a_port_that_does_not_end_is_not_waited_for_and_keeps_its_number() {
    let bench = Bench::new("drop");
    bench.controller.begin().unwrap();
    bench.write("", "loopback");
    let report = bench.in_time("apply", |c| c.apply(None).unwrap());
    assert!(report.stopped["bad"].contains("has not ended"), "{:?}", report.stopped);
    assert_eq!(report.stopped.len(), 1);
    bench.look_at_everything("drop");
    let again = bench.in_time("apply", |c| c.apply(None).unwrap());
    assert!(again.stopped["bad"].contains("has not ended"), "{:?}", again.stopped);
    bench.gate.open();
    bench.until("the port", |bench| bench.controller.apply(None).unwrap().stopped.is_empty());
    bench.until("it is up", |bench| bench.port("bad").state == PortState::Up);

    the_number_is_its_own_until("drop");
}

#[test]
fn the_number_of_a_port_that_has_ended_is_its_own_until_no_shard_is_held_up_there() {
    the_number_is_its_own_until("receive");
}

/// The number of a port that was removed is not another's before this call has returned.
fn the_number_is_its_own_until(call: &'static str) {
    let bench = Bench::new(call);
    bench.controller.begin().unwrap();
    if call == "receive" {
        bench.until("a shard is held up", |bench| {
            bench.in_time("shard list", Controller::shards).iter().any(|shard| shard.stuck == 1)
        });
    }
    let number = |name: &str| bench.controller.shown.ports.load().ports[name].number;
    let before = number("bad");
    let text = fs::read_to_string(bench.directory.path().join("linecard.yaml")).unwrap();
    let renamed = |to: &str| fs::write(bench.directory.path().join("linecard.yaml"), text.replace("bad:", to)).unwrap();
    renamed("other:");
    bench.in_time("apply", |c| c.apply(None).unwrap());
    assert_ne!(number("other"), before);
    bench.gate.open();
    bench.until("its number", |bench| {
        renamed("third:");
        bench.controller.apply(None).unwrap();
        renamed("other:");
        bench.controller.apply(None).unwrap();
        bench.controller.shown.ports.load().ports["other"].number == before
    });
}

#[test]
fn ports_whose_ground_is_gone_are_made_again_with_each_change_and_no_others() {
    let (directory, opened) = (tempfile::tempdir().unwrap(), Arc::new(AtomicUsize::new(0)));
    let file = write(&directory, "", "null");
    let count = Arc::clone(&opened);
    let stand_in = Box::new(move |name: &crate::ident::Name| {
        let mut port = Stuck::new("", &Arc::default());
        if name.as_str() == "bad" && count.fetch_add(1, Ordering::Relaxed) == 0 {
            port.link = LinkState::Gone("its interface was deleted".into());
        }
        if name.as_str() == "good" {
            // Its guest is still there, and others of its rings may run.
            port.link = LinkState::Stopped("ring 1 stopped".into());
        }
        Some(Arc::new(port) as Arc<dyn Port>)
    });
    let controller = Controller::for_test(&file, stand_in);
    controller.begin().unwrap();
    assert_eq!(controller.port("bad").unwrap().state, PortState::Stopped);
    assert_eq!(controller.plan(None).unwrap().steps.len(), 1);
    assert_eq!(controller.apply(None).unwrap().steps.len(), 1);
    assert_eq!((controller.port("bad").unwrap().state, opened.load(Ordering::Relaxed)), (PortState::Up, 2));
    assert_eq!(controller.apply(None).unwrap().steps, []);
}

#[test]
fn what_a_port_has_handed_over_stays_counted_when_it_is_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(&directory, "", "null");
    let stand_in = Box::new(|_: &crate::ident::Name| {
        let mut port = Stuck::new("", &Arc::default());
        port.handover = Handover { frames: 2, bytes: 180, refused: 1, late: 3 };
        port.link = LinkState::Gone("its interface was deleted".into());
        Some(Arc::new(port) as Arc<dyn Port>)
    });
    let controller = Controller::for_test(&file, stand_in);
    controller.begin().unwrap();
    for times in 1..4 {
        let counters = controller.port("good").unwrap().counters;
        let seen = (counters.tx_frames, counters.tx_bytes, counters.tx_dropped);
        assert_eq!(seen, (2 * times, 180 * times, 4 * times), "the first time, and made anew {} times", times - 1);
        controller.apply(None).unwrap();
    }
}

#[test]
fn taps_that_the_kernel_keeps_waiting_hold_up_no_other_port_and_nobody_who_looks_or_changes() {
    std::thread::spawn(|| {
        enter_fresh_network_namespace();
        let directory = tempfile::tempdir().unwrap();
        let file = write(&directory, "", "null");
        let taps: Vec<_> = (0..8).map(|i| format!("tap{i}")).collect();
        let tap = |name: &String| format!("  {name}: {{ tap: {{ interface: {name} }}, network: lan }}\n");
        let text = fs::read_to_string(&file).unwrap() + &taps.iter().map(tap).collect::<String>();
        fs::write(&file, &text).unwrap();
        let controller = Arc::new(Controller::for_test(&file, Box::new(|_| None)));
        let bench = Bench { directory, controller, gate: Arc::default() };
        let lock = bench.controller.kernel_of_taps();

        let kernel = lock.lock().unwrap();
        let begun = bench.in_time("the start", |c| c.begin().unwrap());
        assert_eq!(begun.stopped, [].into());
        let status = bench.in_time("status", Controller::status);
        assert_eq!((status.ports_up, status.ports_down), (2, taps.len()), "{status:?}");
        assert!(bench.port("tap0").reason.unwrap().contains("has been waiting to be opened for"));
        bench.look_at_everything("opening TAPs");
        let fewer = text.replace("  bad: { \"null\": {}, network: lan }\n", "");
        assert_ne!(fewer, text);
        fs::write(&file, fewer).unwrap();
        assert_eq!(bench.in_time("apply", |c| c.apply(None).unwrap()).steps.len(), 1);
        drop(kernel);
        bench.until("TAPs", |bench| bench.in_time("status", Controller::status).ports_up == 1 + taps.len());

        let kernel = lock.lock().unwrap();
        bench.until("it is told", |bench| {
            let port = bench.port("tap7");
            assert_eq!(port.state, PortState::Up);
            port.reason.is_some_and(|reason| reason.contains("state unknown for"))
        });
        bench.in_time("upkeep", Controller::upkeep);
        assert_eq!(bench.in_time("status", Controller::status).ports_up, 1 + taps.len());
        fs::write(&file, &text).unwrap();
        assert_eq!(bench.in_time("apply", |c| c.apply(None).unwrap()).steps.len(), 1);
        bench.look_at_everything("looking at TAPs");
        drop(kernel);
    })
    .join()
    .unwrap();
}
