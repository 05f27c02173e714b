//! The API: HTTP/JSON on a Unix socket (`socket`), its routes (`routes`), the one answer that goes on (`follow`), and how a
//! refusal looks (`refusal`).
//!
//! Handlers check who asks, call the [`Controller`] on a thread that may block, and turn its answer into JSON; they decide
//! nothing. Other modules add routes of their own as [`Routes`], each with its part of the OpenAPI document, so the
//! document at `/openapi.json` is always that of what is served.

mod follow;
mod refusal;
mod routes;
mod socket;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use tokio::sync::watch;

pub use refusal::Refused;
pub use socket::{ApiSocket, Peer, SocketError};

use super::Controller;

/// Routes and what OpenAPI says of them.
pub struct Routes {
    /// The routes.
    pub router: Router,
    /// Their description.
    pub document: utoipa::openapi::OpenApi,
}

impl Routes {
    /// What the controller offers.
    pub fn of(controller: Arc<Controller>) -> Self {
        routes::routes(controller)
    }

    /// These and `others`.
    pub fn and(mut self, others: Self) -> Self {
        self.document.merge(others.document);
        Self { router: self.router.merge(others.router), document: self.document }
    }

    /// Ready to be served: with `/openapi.json`, and JSON answers for what is not there.
    pub fn service(self) -> Router {
        let document: Arc<str> = self.document.to_pretty_json().unwrap_or_default().into();
        let openapi = get(move || async move { ([(CONTENT_TYPE, "application/json")], document.to_string()) });
        self.router
            .route("/openapi.json", openapi)
            .fallback(async || Refused::no_such_route())
            .method_not_allowed_fallback(async || Refused::no_such_method())
            .layer(DefaultBodyLimit::max(crate::config::TEXT_BYTES))
    }
}

/// How long a request that is being answered may still take when the daemon ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// Serves `routes` on `socket` until `stop` becomes true; then the socket's file is gone.
///
/// # Errors
/// The socket is of no use to the kernel any more.
pub async fn serve(socket: ApiSocket, routes: Routes, mut stop: watch::Receiver<bool>) -> std::io::Result<()> {
    let (listener, _file) = socket.into_parts();
    let service = routes.service().into_make_service_with_connect_info::<Peer>();
    let mut ending = stop.clone();
    let ended = async move { drop(ending.wait_for(|stop| *stop).await) };
    let server = axum::serve(listener, service).with_graceful_shutdown(ended);
    let overdue = async move {
        drop(stop.wait_for(|stop| *stop).await);
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        result = server => result,
        () = overdue => Ok(()),
    }
}
