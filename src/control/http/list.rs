//! A list that may be long: [`listed`], in pieces, so that no more of it is worked out than its reader takes.
//!
//! Each piece has a turn of its own, so that others have theirs between them. A list that cannot be gone on with ends its connection
//! in the middle: what a reader gets as a whole is whole.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::Response;
use hyper::body::{Body, Bytes, Frame};
use serde::Serialize;

use super::Refused;
use super::turns::{Class, json};
use crate::control::{Page, Pool};

/// A piece as JSON, and the place that it ends at if there is more.
type Piece<P> = Result<(Bytes, Option<P>), Refused>;
type Pending<P> = Pin<Box<dyn Future<Output = Piece<P>> + Send>>;

/// The list that `page` has, which hears what the last piece ended at; the first one may be refused.
pub(super) async fn listed<T: Serialize, P: Send + 'static>(
    class: &'static Class,
    requests: Pool,
    page: impl Fn(Option<&P>) -> Result<Page<T, P>, Refused> + Send + Sync + 'static,
) -> Result<Response, Refused> {
    let work = Arc::new(move |after: Option<P>| {
        let Page { items, end } = page(after.as_ref())?;
        Ok((joined(&json(&items)?, after.is_none(), end.is_none()).into(), end))
    });
    let piece = move |after| -> Pending<P> {
        let (work, requests) = (Arc::clone(&work), requests.clone());
        Box::pin(async move { Ok(class.turn(&requests, move || work(after)).await?.0) })
    };
    let body = match piece(None).await? {
        (whole, None) => axum::body::Body::from(whole),
        (first, Some(end)) => {
            let (first, pending) = (Some(first), Some(piece(end.into())));
            axum::body::Body::new(Pieces { first, pending, piece: Box::new(piece) })
        }
    };
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// A list as a part of one: with the bracket at its own end only if it begins or ends the whole.
fn joined(list: &[u8], begins: bool, ends: bool) -> Vec<u8> {
    let items = list.get(1..list.len().saturating_sub(1)).unwrap_or_default();
    let before: &[u8] = if begins {
        b"["
    } else if items.is_empty() {
        b""
    } else {
        b","
    };
    let after: &[u8] = if ends { b"]" } else { b"" };
    [before, items, after].concat()
}

/// The body.
struct Pieces<P> {
    first: Option<Bytes>,
    pending: Option<Pending<P>>,
    piece: Box<dyn Fn(Option<P>) -> Pending<P> + Send>,
}

impl<P: 'static> Body for Pieces<P> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        let Some(pending) = &mut self.pending else { return Poll::Ready(None) };
        let made = ready!(pending.as_mut().poll(cx));
        self.pending = None;
        Poll::Ready(Some(match made {
            Ok((bytes, end)) => {
                self.pending = end.map(|end| (self.piece)(Some(end)));
                Ok(Frame::data(bytes))
            }
            Err(_) => Err(io::Error::other("the list cannot be gone on with")),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_to_one_list() {
        let whole = |pieces: &[&str]| -> Vec<u8> {
            let last = pieces.len() - 1;
            let joined = |(at, piece): (usize, &&str)| joined(piece.as_bytes(), at == 0, at == last);
            pieces.iter().enumerate().flat_map(joined).collect()
        };
        assert_eq!(whole(&["[]"]), b"[]");
        assert_eq!(whole(&["[1,2]", "[3]", "[4]"]), b"[1,2,3,4]");
        assert_eq!(whole(&["[1]", "[]"]), b"[1]");
    }
}
