//! The API: HTTP/JSON on a Unix socket (`socket`), its connections (`server`), its routes (`routes`), the one answer that goes on
//! (`follow`), lists that come in pieces (`list`), whose turn it is (`turns`), and how a refusal looks (`refusal`).
//!
//! Handlers check who asks, call the [`Controller`] on a thread that may block, and turn its answer into JSON; they decide
//! nothing. Other modules add routes of their own as [`Routes`], each with its part of the OpenAPI document, so the
//! document at `/openapi.json` is always that of what is served.

mod follow;
mod list;
mod refusal;
mod routes;
mod server;
mod socket;
mod text;
mod turns;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use refusal::Refused;
pub use socket::{ApiSocket, Peer, SocketError};
pub use turns::Asker;

use super::Controller;
use server::Listener;

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

/// Serves `routes` on `socket` until `stop` becomes true.
pub async fn serve(socket: ApiSocket, routes: Routes, stop: watch::Receiver<bool>) {
    let (listener, access) = socket.into_parts();
    server::serve(Listener::Unix(listener, access), routes.service(), stop).await;
}

/// Serves `routes`, which must be for everybody, on an address until `stop` becomes true.
pub async fn serve_everybody(listener: TcpListener, routes: Routes, stop: watch::Receiver<bool>) {
    server::serve(Listener::Tcp(listener), routes.service(), stop).await;
}
