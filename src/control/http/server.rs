//! HTTP/1.1 connections, so that none of them keeps others out: [`serve`].
//!
//! A connection ends when its request takes too long to arrive, when nobody reads its answer, and when there are too many: the one
//! that goes is then the oldest of who has the most, so that somebody who opens hundreds closes only their own. Who may change
//! something has room of their own, which nobody else can take. What waits to be accepted is accepted many at a time: there all share
//! one room, which is empty again sooner than somebody who connects in a loop can fill it.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::{Sleep, sleep, timeout};

use super::socket::{Access, Peer};
use crate::limits::{API_CONNECTIONS, API_CONNECTIONS_READ_ONLY, METRICS_CONNECTIONS};

/// How long the head of a request may take, from the connection or the end of the last answer on.
const HEAD: Duration = Duration::from_secs(10);

/// How long a piece of an answer may wait for its reader.
const UNREAD: Duration = Duration::from_secs(10);

/// Bytes of a request's head, and of what is read of a body at once.
const BUFFER_BYTES: usize = 64 << 10;

/// How long a request that is being answered may still take when the daemon ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long nothing is accepted after that failed, in practice for want of descriptors.
const REST: Duration = Duration::from_millis(100);

/// Connections that are accepted before anything else is looked at.
const BURST: usize = 64;

/// Where connections come from.
pub(super) enum Listener {
    /// The API's socket.
    Unix(UnixListener, Access),
    /// An address for metrics only.
    Tcp(TcpListener),
}

/// Whose a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// A user of this host that may change something.
    Writer(Option<u32>),
    /// One that may look only.
    Reader(Option<u32>),
    /// Somebody at an address.
    Address(IpAddr),
}

impl Owner {
    /// How many connections there may be of its kind.
    fn most(self) -> usize {
        match self {
            Self::Writer(_) => API_CONNECTIONS,
            Self::Reader(_) => API_CONNECTIONS_READ_ONLY,
            Self::Address(_) => METRICS_CONNECTIONS,
        }
    }

    /// Whether the two share that room.
    fn is_like(self, other: Self) -> bool {
        std::mem::discriminant(&self) == std::mem::discriminant(&other)
    }
}

/// A connection that was accepted.
struct Accepted {
    io: Box<dyn Stream>,
    owner: Owner,
    peer: Option<Peer>,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Listener {
    /// Waits for a connection and takes as many as there are then, up to [`BURST`].
    async fn accept(&self) -> io::Result<Vec<Accepted>> {
        let burst = |cx: &mut Context<'_>| {
            let mut accepted = Vec::new();
            for taken in 0..BURST {
                match self.poll_accept(cx) {
                    Poll::Ready(Ok(one)) => accepted.extend(one),
                    // An error is met again.
                    _ if taken > 0 => break,
                    other => return other.map_ok(Vec::from_iter),
                }
            }
            Poll::Ready(Ok(accepted))
        };
        poll_fn(burst).await
    }

    /// The next connection, or `None` in place of one that has ended without a word.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Accepted>>> {
        match self {
            Self::Unix(listener, access) => listener.poll_accept(cx).map_ok(|(stream, _)| {
                if has_ended(&stream) {
                    return None;
                }
                let peer = access.peer(&stream);
                let owner = if peer.may_write { Owner::Writer(peer.uid) } else { Owner::Reader(peer.uid) };
                Some(Accepted { io: Box::new(stream), owner, peer: Some(peer) })
            }),
            Self::Tcp(listener) => listener.poll_accept(cx).map_ok(|(stream, address)| {
                let owner = Owner::Address(address.ip());
                (!has_ended(&stream)).then(|| Accepted { io: Box::new(stream), owner, peer: None })
            }),
        }
    }
}

impl Drop for Listener {
    /// From now on whoever connects is refused. Closing alone would not do: a process that is being started has what is open here,
    /// until it becomes another program, and who connects meanwhile would wait for nobody.
    fn drop(&mut self) {
        let _ = match self {
            Self::Unix(listener, _) => shutdown(listener, Shutdown::Read),
            Self::Tcp(listener) => shutdown(listener, Shutdown::Read),
        };
    }
}

/// Whether its other end sent nothing and will not.
fn has_ended(stream: impl AsFd) -> bool {
    recv(stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT).is_ok_and(|(_, count)| count == 0)
}

/// Serves what `listener` accepts until `stop` becomes true, and what has begun by then for a moment longer.
pub(super) async fn serve(listener: Listener, router: Router, mut stop: watch::Receiver<bool>) {
    let stopped = stop.clone();
    let mut tasks = JoinSet::new();
    let mut connections = Connections::default();
    loop {
        tokio::select! {
            () = told(&mut stop) => break,
            Some(ended) = tasks.join_next_with_id() => connections.forget(&ended),
            accepted = listener.accept() => match accepted {
                Ok(accepted) => for Accepted { io, owner, peer } in accepted {
                    // As many end as begin.
                    while let Some(ended) = tasks.try_join_next_with_id() {
                        connections.forget(&ended);
                    }
                    let handle = tasks.spawn(connection(io, peer, router.clone(), stopped.clone()));
                    connections.admit(owner, handle);
                },
                Err(error) => {
                    log::debug!("cannot accept a connection to the API: {error}");
                    sleep(REST).await;
                }
            }
        }
    }
    // Nobody new comes in.
    drop(listener);
    let all = async { while tasks.join_next().await.is_some() {} };
    let _ = timeout(FAREWELL, all).await;
}

/// Returns when `stop` becomes true, or nobody is left to make it so.
async fn told(stop: &mut watch::Receiver<bool>) {
    drop(stop.wait_for(|stop| *stop).await);
}

/// One connection, to its end.
async fn connection(io: Box<dyn Stream>, peer: Option<Peer>, router: Router, mut stop: watch::Receiver<bool>) {
    let service = TowerToHyperService::new(router);
    let service = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
        if let Some(peer) = &peer {
            request.extensions_mut().insert(ConnectInfo(peer.clone()));
        }
        service.call(request)
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(BUFFER_BYTES);
    let mut served = std::pin::pin!(builder.serve_connection(TokioIo::new(Impatient { io, waiting: None }), service));
    // How it ends is the peer's business: it hung up, was too slow, or sent what is not HTTP and was told so.
    tokio::select! {
        _ = served.as_mut() => return,
        () = told(&mut stop) => served.as_mut().graceful_shutdown(),
    }
    let _ = served.await;
}

/// The connections that there are, oldest first.
#[derive(Default)]
struct Connections(Vec<(Owner, AbortHandle)>);

impl Connections {
    /// Takes note of a connection, and ends another if it is one too many.
    fn admit(&mut self, owner: Owner, handle: AbortHandle) {
        self.0.push((owner, handle));
        if let Some(at) = surplus(&self.0.iter().map(|(owner, _)| *owner).collect::<Vec<_>>(), owner) {
            self.0.remove(at).1.abort();
        }
    }

    fn forget(&mut self, ended: &Result<(tokio::task::Id, ()), JoinError>) {
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, ())| *id);
        self.0.retain(|(_, handle)| handle.id() != id);
    }
}

/// Which of the connections of these owners, oldest first, is to go if `last` has got one more: the oldest of who has the most.
fn surplus(owners: &[Owner], last: Owner) -> Option<usize> {
    let alike = || owners.iter().copied().enumerate().filter(move |(_, owner)| owner.is_like(last));
    if alike().count() <= last.most() {
        return None;
    }
    let count = |owner| alike().filter(|(_, other)| *other == owner).count();
    // Of several, `min_by_key` takes the first, which is the oldest.
    alike().min_by_key(|(_, owner)| std::cmp::Reverse(count(*owner))).map(|(at, _)| at)
}

/// A stream whose writes fail when nobody reads them. It takes several buffers at once, as what is below it does: for one that
/// does not, hyper copies whole answers, and drops them with the places that they have ([`super::turns`]) before anybody has read them.
struct Impatient {
    io: Box<dyn Stream>,
    /// When the write that waits has waited for too long.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    /// The outcome of a write, unless it has waited for too long.
    fn bound<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.waiting = None;
            return written;
        }
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(UNREAD)));
        waiting.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        self.bound(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.bound(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.bound(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::ApiSocket;
    use super::*;

    #[tokio::test]
    async fn nobody_comes_in_after_the_end_though_a_child_has_the_sockets_still() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let (socket, _file) = ApiSocket::bind(&path, 0o600, None).unwrap();
        let (unix, access) = socket.into_parts();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let _child = [unix.as_fd(), tcp.as_fd()].map(|listener| listener.try_clone_to_owned().unwrap());
        for listener in [Listener::Unix(unix, access), Listener::Tcp(tcp)] {
            serve(listener, Router::new(), watch::channel(true).1).await;
        }
        let refused =
            [std::os::unix::net::UnixStream::connect(&path).map(drop), std::net::TcpStream::connect(address).map(drop)];
        for error in refused {
            assert_eq!(error.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        }
    }

    #[test]
    fn who_has_the_most_connections_loses_the_oldest_of_them() {
        let (root, greedy, other) = (Owner::Writer(Some(0)), Owner::Reader(Some(1)), Owner::Reader(Some(2)));
        let mut owners = vec![other, root];
        owners.extend(vec![greedy; API_CONNECTIONS_READ_ONLY - 1]);
        assert_eq!(surplus(&owners, greedy), None, "there is room");
        assert_eq!(surplus(&owners, root), None);
        owners.push(greedy);
        assert_eq!(surplus(&owners, greedy), Some(2), "the first of the greedy one");
        owners.push(other);
        assert_eq!(surplus(&owners, other), Some(2), "whoever comes");
        let many: Vec<_> = vec![root; API_CONNECTIONS + 1];
        assert_eq!(surplus(&many, root), Some(0), "even root ends only its own");
    }
}
