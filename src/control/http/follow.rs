//! An answer that goes on for as long as events come: JSON lines, a piece for each time that there are new ones.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use hyper::body::{Body, Bytes, Frame};

use crate::control::events::{EventRecord, Follower};

type Step = (Follower, Option<Vec<EventRecord>>);

/// The body. The follower's place is free when the connection has gone and takes this with it.
pub(super) struct Lines(Option<Pin<Box<dyn Future<Output = Step> + Send>>>);

impl Lines {
    /// What `follower` reads.
    pub(super) fn of(follower: Follower) -> Self {
        Self(Some(Box::pin(step(follower))))
    }
}

async fn step(mut follower: Follower) -> Step {
    let records = follower.next().await;
    (follower, records)
}

impl Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Some(step_taken) = &mut self.0 else { return Poll::Ready(None) };
        let (follower, records) = ready!(step_taken.as_mut().poll(cx));
        self.0 = records.is_some().then(|| Box::pin(step(follower)) as _);
        Poll::Ready(records.map(|records| Ok(Frame::data(lines(&records).into()))))
    }
}

/// A line for each record.
fn lines(records: &[EventRecord]) -> String {
    records.iter().filter_map(|record| serde_json::to_string(record).ok()).map(|line| line + "\n").collect()
}
