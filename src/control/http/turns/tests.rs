//! Requests over real connections, to a class whose work does not end before it may.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Instant;

use axum::Router;
use axum::routing::get;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use super::super::server::{self, Listener};
use super::super::{ApiSocket, Peer};
use super::*;

/// How long anything may take before a test gives up. Far more than it takes.
const LONG: Duration = Duration::from_secs(60);

/// A server with these routes, in a runtime and a directory of its own.
struct Server {
    directory: tempfile::TempDir,
    runtime: Runtime,
    _stop: watch::Sender<bool>,
}

impl Server {
    fn new(router: Router) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let inside = runtime.enter();
        let (socket, file) = ApiSocket::bind(&path(&directory), 0o600, None).unwrap();
        let (listener, access) = socket.into_parts();
        let (stop, stopped) = watch::channel(false);
        runtime.spawn(async move {
            let _file = file;
            server::serve(Listener::Unix(listener, access), router, stopped).await;
        });
        drop(inside);
        Self { directory, runtime, _stop: stop }
    }

    /// A connection with a request that was sent.
    fn ask(&self, what: &str) -> UnixStream {
        let mut stream = UnixStream::connect(path(&self.directory)).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        write!(stream, "GET {what} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        stream
    }

    /// Tasks for connections, beside the one that accepts them.
    fn connections(&self) -> usize {
        self.runtime.metrics().num_alive_tasks() - 1
    }
}

/// Threads for what is asked, one at first.
fn requests() -> Pool {
    Pool::start("requests", 1).unwrap()
}

fn path(directory: &tempfile::TempDir) -> std::path::PathBuf {
    Path::new(directory.path()).join("api.sock")
}

fn answer(mut stream: UnixStream) -> Vec<u8> {
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..answer.len().min(200)]));
    answer
}

#[track_caller]
fn until(what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < LONG, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn who_asks_and_leaves_takes_no_turn_and_keeps_nobody_else_waiting() {
    static HELD: Class = Class { turns: Semaphore::const_new(3), unread: None };
    static OTHER: Class = Class { turns: Semaphore::const_new(1), unread: None };
    let (begun, gate) = (Arc::<AtomicUsize>::default(), Arc::<RwLock<()>>::default());
    let held = {
        let (begun, gate, requests) = (Arc::clone(&begun), Arc::clone(&gate), requests());
        async move || {
            HELD.json(&requests, move || {
                begun.fetch_add(1, Ordering::Relaxed);
                drop(gate.read());
                Ok::<_, Refused>(())
            })
            .await
        }
    };
    let requests = requests();
    let other = async move || OTHER.json(&requests, || Ok::<_, Refused>(())).await;
    let server = Server::new(Router::new().route("/held", get(held)).route("/other", get(other)));
    let closed = gate.write().unwrap();
    for _ in 0..3 {
        let asked: Vec<_> = (0..64).map(|_| server.ask("/held")).collect();
        until("work has begun", || begun.load(Ordering::Relaxed) > 0);
        answer(server.ask("/other"));
        drop(asked);
        until("the connections have ended", || server.connections() == 0);
    }
    drop(closed);
    // Whoever waits for a turn has it before these.
    let all = server.runtime.block_on(async { timeout(LONG, HELD.turns.acquire_many(3)).await });
    assert_eq!((all.is_ok(), begun.load(Ordering::Relaxed)), (true, 3), "192 have asked and left");
}

#[test]
fn what_lies_unread_is_bounded_and_makes_room_when_its_reader_leaves() {
    static LARGE: Class =
        Class { turns: Semaphore::const_new(1), unread: Some(Semaphore::const_new(UNREAD_KIB as usize)) };
    const BYTES: usize = 40 << 20;
    let begun = Arc::<AtomicUsize>::default();
    let large = {
        let (begun, requests) = (Arc::clone(&begun), requests());
        async move || {
            LARGE
                .answer(&requests, "text/plain", move || {
                    begun.fetch_add(1, Ordering::Relaxed);
                    Ok(vec![b'x'; BYTES])
                })
                .await
        }
    };
    let server = Server::new(Router::new().route("/large", get(large)));
    let left = || LARGE.unread.as_ref().unwrap().available_permits();
    let mut unread = server.ask("/large");
    // Once some of it can be read, all of it is with whoever writes it.
    for part in [1, BYTES / 2] {
        unread.read_exact(&mut vec![0; part]).unwrap();
        assert_eq!(left(), UNREAD_KIB as usize - (BYTES >> 10), "the rest lies there");
    }
    // The next one is worked out, but there is no room for it, nor a turn for the others.
    let waiting: Vec<_> = (0..3).map(|_| server.ask("/large")).collect();
    until("the next one is worked out", || begun.load(Ordering::Relaxed) == 2);
    drop(unread);
    // All are read at once: nobody knows which of them has the room first.
    let read: Vec<_> = waiting.into_iter().map(|stream| std::thread::spawn(move || answer(stream).len())).collect();
    assert!(read.into_iter().all(|length| length.join().unwrap() > BYTES));
    until("all of it was read", || left() == UNREAD_KIB as usize);
    assert_eq!(begun.load(Ordering::Relaxed), 4);
}

#[test]
fn who_may_look_and_who_may_change_have_turns_of_their_own() {
    let class = |peer: Option<bool>| {
        let mut request = axum::http::Request::new(());
        if let Some(may_write) = peer {
            request.extensions_mut().insert(ConnectInfo(Peer { uid: Some(1), may_write }));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let Ok(Asker(class)) = runtime.block_on(Asker::from_request_parts(&mut request.into_parts().0, &()));
        std::ptr::from_ref(class)
    };
    let classes = [class(Some(true)), class(Some(false)), class(None), std::ptr::from_ref(&CHANGES)];
    assert_eq!(classes, [&WRITERS, &READERS, &SCRAPERS, &CHANGES].map(std::ptr::from_ref));
    assert!(READERS.unread.is_some() && SCRAPERS.unread.is_some() && WRITERS.unread.is_none());
}
