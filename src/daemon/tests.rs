//! The daemon's own threads beside a port that hangs.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::Instant;

use rustix::process::{Signal, getpid, kill_process};

use super::*;
use crate::control::stuck::{Gate, Stuck};
use crate::port::Port;

/// How long anything may take before a test gives up. Far more than it takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the API on `socket` says, if it answers by now.
fn status(socket: &Path) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Runs a daemon with a port that hangs in `call`, has `meanwhile` done once it has begun to serve, and ends it by SIGTERM.
fn run_with(call: &'static str, meanwhile: impl FnOnce(&Path)) {
    let directory = tempfile::tempdir().unwrap();
    let (here, file) = (directory.path().display(), directory.path().join("linecard.yaml"));
    let daemon = format!("daemon: {{ api: {here}/api.sock, state-dir: {here}/state }}");
    let text =
        format!("version: 1\n{daemon}\nnetworks: {{ lan: {{}} }}\nports:\n  bad: {{ \"null\": {{}}, network: lan }}\n");
    fs::write(&file, text).unwrap();
    let gate = Arc::<Gate>::default();
    let held = Arc::clone(&gate);
    let stand_in = Box::new(move |_: &crate::ident::Name| Some(Arc::new(Stuck::new(call, &held)) as Arc<dyn Port>));
    let controller = Arc::new(Controller::for_test(&file, stand_in));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let signals = runtime.block_on(async { Signals::catch() }).unwrap();
    let (listeners, socket) = runtime.block_on(Listeners::bind(&read(&file).unwrap())).unwrap();
    let (ended, end) = channel();
    std::thread::spawn(move || {
        let served = serve(&runtime, &controller, listeners, signals, &Arc::new(Manager::of_environment()));
        close(controller, Closing::start(socket).unwrap());
        runtime.shutdown_background();
        let _ = ended.send(served.is_ok());
    });
    meanwhile(&directory.path().join("api.sock"));
    kill_process(getpid(), Signal::TERM).unwrap();
    assert!(
        end.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("SIGTERM does not end it while a port hangs in {call}"))
    );
    gate.open();
}

#[test]
fn sigterm_ends_it_whatever_a_port_hangs_in() {
    // While the first configuration is carried out, nobody is served yet.
    run_with("receive_queues", |_| {});
    for call in ["link", "drop"] {
        run_with(call, |socket| {
            let begin = Instant::now();
            while !status(socket).is_ok_and(|answer| answer.contains("\"ports-up\"")) {
                assert!(begin.elapsed() < PATIENCE, "the API does not answer while a port hangs in {call}");
                std::thread::sleep(Duration::from_millis(10));
            }
        });
    }
}
