//! Configurations that are sent: one at a time, so that what they cost is that of one ([`Text`]).
//!
//! A text becomes many times its length while it is read. So nothing of a request's body is taken before its turn has come, and the
//! memory is given back to the kernel after it. Those who may change something have a turn of their own and do not wait for others.

use std::time::Duration;

use axum::extract::{ConnectInfo, FromRequest, Request};
use axum::http::StatusCode;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::{Peer, Refused};
use crate::sys::heap;

/// How long a request waits for its turn.
const TURN: Duration = Duration::from_secs(30);

/// How long the text may take to arrive once it has it.
const ARRIVAL: Duration = Duration::from_secs(5);

static OF_WRITERS: Semaphore = Semaphore::const_new(1);
static OF_READERS: Semaphore = Semaphore::const_new(1);

/// A text whose turn it is, for as long as this is there. Empty if there is none.
pub(super) struct Text {
    text: String,
    turn: SemaphorePermit<'static>,
}

impl<S: Send + Sync> FromRequest<S> for Text {
    type Rejection = Refused;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refused> {
        let peer = request.extensions().get::<ConnectInfo<Peer>>();
        let turns = if peer.is_some_and(|peer| peer.0.may_write) { &OF_WRITERS } else { &OF_READERS };
        let busy = || {
            let error = "other configurations are being read";
            Refused::new(
                StatusCode::SERVICE_UNAVAILABLE,
                error,
                "try again, or use `linecard check`, which needs no daemon",
            )
        };
        let turn = timeout(TURN, turns.acquire()).await.map_err(|_| busy())?.map_err(|_| busy())?;
        let slow = |_| Refused::new(StatusCode::REQUEST_TIMEOUT, "the text did not arrive within 5 s", None);
        let text = timeout(ARRIVAL, String::from_request(request, state)).await.map_err(slow)??;
        Ok(Self { text, turn })
    }
}

impl Text {
    /// Has `read` read the text, which is called `name`; `None` stands for the daemon's own file.
    pub(super) fn read_by<T>(self, name: &str, read: impl FnOnce(Option<(&str, &str)>) -> T) -> T {
        let Self { text, turn } = self;
        let done = read(Some((name, text.as_str())).filter(|_| !text.is_empty()));
        drop(text);
        heap::give_back();
        drop(turn);
        done
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::future::{Future, poll_fn};
    use std::pin::pin;
    use std::task::Poll;

    use super::*;

    async fn text(may_write: bool) -> Result<Text, Refused> {
        let mut request = Request::new("version: 1".into());
        request.extensions_mut().insert(ConnectInfo(Peer { uid: Some(1), may_write }));
        Text::from_request(request, &()).await
    }

    #[test]
    fn who_may_change_something_and_who_may_look_only_wait_for_their_own_turn() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            for (own, others, may_write) in [(&OF_WRITERS, &OF_READERS, true), (&OF_READERS, &OF_WRITERS, false)] {
                let held = others.acquire().await.unwrap();
                assert!(text(may_write).await.is_ok(), "may write: {may_write}; it waits for others");
                drop(held);
                let held = own.acquire().await.unwrap();
                let mut asked = pin!(text(may_write));
                let waits = poll_fn(|context| Poll::Ready(asked.as_mut().poll(context).is_pending())).await;
                assert!(waits, "may write: {may_write}; two texts at a time");
                drop(held);
                assert!(asked.await.is_ok());
            }
        });
    }
}
