//! Turns: how many requests are worked on at once, so that what they cost is bounded and nobody's work waits behind that of others
//! ([`Class`]).
//!
//! Work that may block is done by a pool of threads (`control/pool.rs`), which are as many as there is work. It is not given to them
//! before its turn has come, and a turn is waited for in the request itself: a connection that ends leaves the queue, while work that has begun goes on
//! to its end and keeps its turn until then. Those who change something, those who could and look, those who may look only, and scrapers
//! each have turns of their own.
//!
//! What others fill (ports, queues, conflicts, drops) makes answers large, so an answer is written where it was worked out, and what
//! lies there until somebody reads it is bounded for each class but that of those who may change something.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::{ConnectInfo, FromRequestParts};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::http::request::Parts;
use axum::response::Response;
use hyper::body::{Body, Bytes, Frame, SizeHint};
use serde::Serialize;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::{Peer, Refused};
use crate::control::Pool;

/// How long a request waits for its turn, and for room for its answer.
const TURN: Duration = Duration::from_secs(30);

/// KiB of answers to those who may look only that may lie unread, and the same to scrapers. An answer that is larger has all of it.
const UNREAD_KIB: u32 = 64 << 10;

/// Requests that share turns.
pub struct Class {
    turns: Semaphore,
    /// KiB of answers that may lie unread, if they are bounded.
    unread: Option<Semaphore>,
}

/// What changes something. A change that hangs keeps one turn; those behind it are refused after a while and give theirs back.
pub(super) static CHANGES: Class = Class { turns: Semaphore::const_new(4), unread: None };

/// Looking, by those who may change something.
static WRITERS: Class = Class { turns: Semaphore::const_new(4), unread: None };

/// Looking, by those who may do nothing else. One of them may wait for a change: what a configuration would do is held against
/// what there is after it.
static READERS: Class =
    Class { turns: Semaphore::const_new(3), unread: Some(Semaphore::const_new(UNREAD_KIB as usize)) };

/// Whoever is at an address for metrics.
static SCRAPERS: Class =
    Class { turns: Semaphore::const_new(2), unread: Some(Semaphore::const_new(UNREAD_KIB as usize)) };

/// Whoever asks, by the turns that they have.
#[derive(Clone, Copy)]
pub struct Asker(pub(super) &'static Class);

impl<S: Send + Sync> FromRequestParts<S> for Asker {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self(match parts.extensions.get::<ConnectInfo<Peer>>() {
            Some(ConnectInfo(peer)) if peer.may_write => &WRITERS,
            Some(_) => &READERS,
            None => &SCRAPERS,
        }))
    }
}

impl Asker {
    /// Has `work` done when the asker's turn has come.
    ///
    /// # Errors
    /// It did not come, or the work's own.
    pub async fn text<E: Into<Refused> + Send + 'static>(
        self,
        requests: &Pool,
        content: &'static str,
        work: impl FnOnce() -> Result<String, E> + Send + 'static,
    ) -> Result<Response, Refused> {
        self.0.answer(requests, content, move || work().map(String::into_bytes).map_err(Into::into)).await
    }
}

impl Class {
    /// What `work` makes, as JSON.
    pub(super) async fn json<T: Serialize, E: Into<Refused>>(
        &'static self,
        requests: &Pool,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<Response, Refused> {
        self.answer(requests, "application/json", move || json(&work().map_err(Into::into)?)).await
    }

    /// What `work` makes, once its turn has come; with no more of it unread than there may be.
    async fn answer(
        &'static self,
        requests: &Pool,
        content: &'static str,
        work: impl FnOnce() -> Result<Vec<u8>, Refused> + Send + 'static,
    ) -> Result<Response, Refused> {
        let (bytes, turn) = self.turn(requests, work).await?;
        let body = Unread { place: self.room(&bytes).await?, bytes: Some(bytes.into()) };
        drop(turn);
        let mut response = Response::new(axum::body::Body::new(body));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content));
        Ok(response)
    }

    /// What `work` makes, once its turn has come. The turn goes when it is dropped.
    pub(super) async fn turn<T: Send + 'static>(
        &'static self,
        requests: &Pool,
        work: impl FnOnce() -> Result<T, Refused> + Send + 'static,
    ) -> Result<(T, SemaphorePermit<'static>), Refused> {
        let turn = within(self.turns.acquire()).await?;
        // The turn is the work's: should the request end, it lasts until the work has.
        let done = requests.call(move || (work(), turn)).await;
        let broken = || Refused::new(StatusCode::INTERNAL_SERVER_ERROR, "linecardd failed at this", "look at its log");
        let (made, turn) = done.ok_or_else(broken)?;
        Ok((made?, turn))
    }

    /// A place for an answer until it was read.
    async fn room(&'static self, bytes: &[u8]) -> Result<Option<SemaphorePermit<'static>>, Refused> {
        let Some(unread) = &self.unread else { return Ok(None) };
        let kib = u32::try_from(bytes.len() >> 10).unwrap_or(UNREAD_KIB).clamp(1, UNREAD_KIB);
        within(unread.acquire_many(kib)).await.map(Some)
    }
}

async fn within<T, E>(turn: impl Future<Output = Result<T, E>>) -> Result<T, Refused> {
    match timeout(TURN, turn).await {
        Ok(Ok(turn)) => Ok(turn),
        _ => Err(Refused::new(StatusCode::SERVICE_UNAVAILABLE, "other requests are being answered", "try again")),
    }
}

/// Something of ours as JSON.
pub(super) fn json(value: &impl Serialize) -> Result<Vec<u8>, Refused> {
    let failed = |_| Refused::new(StatusCode::INTERNAL_SERVER_ERROR, "linecardd failed at this", "look at its log");
    serde_json::to_vec(value).map_err(failed)
}

/// An answer that is there as a whole, and has its place until it was written to its reader or the connection has ended.
struct Unread {
    bytes: Option<Bytes>,
    place: Option<SemaphorePermit<'static>>,
}

impl Body for Unread {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Some(bytes) = self.bytes.take() else { return Poll::Ready(None) };
        let held = Held { bytes, _place: self.place.take() };
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_owner(held)))))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}

/// Bytes with their place: who writes them drops them when the last is written.
struct Held {
    bytes: Bytes,
    _place: Option<SemaphorePermit<'static>>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests;
