//! The routes of the API. One handler each: who may, what to call, what to answer.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{ConnectInfo, DefaultBodyLimit, FromRequestParts, Path, Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, OpenApi};

use super::follow::Lines;
use super::list::listed;
use super::text::Text;
use super::turns::{Asker, CHANGES, Class};
use super::{Peer, Refused, Routes};
use crate::control::events::EventRecord;
use crate::control::report::{
    DropReport, FdbReport, Flushed, MoveReport, NetworkReport, NewPort, PlanReport, PortReport, Refusal, ShardReport,
    StatusReport,
};
use crate::control::{ControlError, Controller, FdbFilter};
use crate::ident::MacAddr;

#[derive(OpenApi)]
#[openapi(
    info(title = "Linecard", description = "What `linecard` can do, over HTTP on the daemon's Unix socket."),
    paths(
        status,
        ports,
        add_port,
        port,
        remove_port,
        networks,
        fdb,
        flush_fdb,
        shards,
        moves,
        drops,
        events,
        check,
        plan,
        apply
    ),
    components(schemas(Refusal))
)]
struct Document;

/// The controller's routes.
pub(super) fn routes(controller: Arc<Controller>) -> Routes {
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/ports", get(ports).post(add_port).layer(DefaultBodyLimit::max(PORT_BYTES)))
        .route("/v1/ports/{name}", get(port).merge(delete(remove_port)))
        .route("/v1/networks", get(networks))
        .route("/v1/fdb", get(fdb).merge(delete(flush_fdb)))
        .route("/v1/shards", get(shards))
        .route("/v1/shards/moves", get(moves))
        .route("/v1/drops", get(drops))
        .route("/v1/events", get(events))
        .route("/v1/check", post(check))
        .route("/v1/plan", post(plan))
        .route("/v1/apply", post(apply))
        .with_state(controller);
    Routes { router, document: Document::openapi() }
}

/// Bytes of a request for one port. One with every key and label there can be has a third of it.
const PORT_BYTES: usize = 64 << 10;

type Answer = Result<Response, Refused>;
type Shared = State<Arc<Controller>>;

/// What the controller has to say, when the turn of whoever asks has come.
async fn look<T: Serialize + 'static>(
    Asker(class): Asker,
    controller: Arc<Controller>,
    ask: impl FnOnce(&Controller) -> Result<T, ControlError> + Send + 'static,
) -> Answer {
    let requests = controller.requests().clone();
    class.json(&requests, move || ask(&controller)).await
}

/// Has the controller change something.
async fn change<T: Send + 'static>(
    controller: Arc<Controller>,
    ask: impl FnOnce(&Controller) -> Result<T, ControlError> + Send + 'static,
) -> Result<T, Refused> {
    let requests = controller.requests().clone();
    CHANGES.turn(&requests, move || Ok(ask(&controller)?)).await.map(|(done, _)| done)
}

/// Proof that the peer may change something.
struct MayWrite;

impl<S: Send + Sync> FromRequestParts<S> for MayWrite {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refused> {
        let peer = ConnectInfo::<Peer>::from_request_parts(parts, state).await;
        match peer {
            Ok(ConnectInfo(peer)) if peer.may_write => Ok(Self),
            Ok(ConnectInfo(peer)) => Err(Refused::not_allowed(peer.uid)),
            Err(_) => Err(Refused::not_allowed(None)),
        }
    }
}

/// The daemon as a whole.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = StatusReport)))]
async fn status(asker: Asker, State(controller): Shared) -> Answer {
    look(asker, controller, |c| Ok(c.status())).await
}

/// Every port.
#[utoipa::path(get, path = "/v1/ports", responses((status = 200, body = [PortReport])))]
async fn ports(asker: Asker, State(controller): Shared) -> Answer {
    look(asker, controller, |c| Ok(c.ports())).await
}

/// Makes a port that outlives the daemon.
#[utoipa::path(post, path = "/v1/ports", request_body = NewPort, responses(
    (status = 201, body = PortReport),
    (status = 403, body = Refusal),
    (status = 409, description = "It exists already or cannot be opened", body = Refusal),
    (status = 422, description = "It does not hold together", body = Refusal),
))]
async fn add_port(
    _: MayWrite,
    State(controller): Shared,
    body: Result<axum::body::Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<PortReport>), Refused> {
    let new: NewPort = serde_json::from_slice(&body?)?;
    let added = change(controller, move |c| c.add_port(&new.name, new.port).and_then(|()| c.port(&new.name))).await?;
    Ok((StatusCode::CREATED, Json(added)))
}

/// One port, with what its kind has to tell.
#[utoipa::path(get, path = "/v1/ports/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = PortReport),
    (status = 404, body = Refusal),
))]
async fn port(asker: Asker, State(controller): Shared, Path(name): Path<String>) -> Answer {
    look(asker, controller, move |c| c.port(&name)).await
}

/// Removes a port that was made at run time.
#[utoipa::path(delete, path = "/v1/ports/{name}", params(("name" = String, Path)), responses(
    (status = 204),
    (status = 403, body = Refusal),
    (status = 404, body = Refusal),
    (status = 409, description = "It is one of the file's", body = Refusal),
))]
async fn remove_port(_: MayWrite, State(controller): Shared, Path(name): Path<String>) -> Result<StatusCode, Refused> {
    change(controller, move |c| c.remove_port(&name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Every network.
#[utoipa::path(get, path = "/v1/networks", responses((status = 200, body = [NetworkReport])))]
async fn networks(asker: Asker, State(controller): Shared) -> Answer {
    look(asker, controller, |c| Ok(c.networks())).await
}

/// Which FDB entries: those that match everything given.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct FdbQuery {
    /// Only those of this network.
    network: Option<String>,
    /// Only those behind this port.
    port: Option<String>,
    /// Only this address.
    #[param(value_type = Option<String>)]
    mac: Option<MacAddr>,
}

impl From<FdbQuery> for FdbFilter {
    fn from(FdbQuery { network, port, mac }: FdbQuery) -> Self {
        Self { network, port, mac }
    }
}

/// FDB entries, by network and address.
///
/// A long list comes in pieces, each as it is when its turn comes. An entry that is learned or forgotten meanwhile may be in it or not.
#[utoipa::path(get, path = "/v1/fdb", params(FdbQuery), responses(
    (status = 200, body = [FdbReport]),
    (status = 404, description = "No such network or port", body = Refusal),
))]
async fn fdb(Asker(class): Asker, State(controller): Shared, query: Result<Query<FdbQuery>, QueryRejection>) -> Answer {
    let filter = FdbFilter::from(query?.0);
    let requests = controller.requests().clone();
    listed(class, requests, move |after| Ok(controller.fdb(&filter, after)?)).await
}

/// Forgets learned FDB entries.
#[utoipa::path(delete, path = "/v1/fdb", params(FdbQuery), responses(
    (status = 200, body = Flushed),
    (status = 403, body = Refusal),
    (status = 404, description = "No such network or port", body = Refusal),
))]
async fn flush_fdb(
    _: MayWrite,
    State(controller): Shared,
    query: Result<Query<FdbQuery>, QueryRejection>,
) -> Result<Json<Flushed>, Refused> {
    let filter = FdbFilter::from(query?.0);
    change(controller, move |c| c.flush_fdb(&filter)).await.map(|flushed| Json(Flushed { flushed }))
}

/// Every worker thread.
#[utoipa::path(get, path = "/v1/shards", responses((status = 200, body = [ShardReport])))]
async fn shards(asker: Asker, State(controller): Shared) -> Answer {
    look(asker, controller, |c| Ok(c.shards())).await
}

/// Queues that were moved to another shard lately, oldest first.
#[utoipa::path(get, path = "/v1/shards/moves", responses((status = 200, body = [MoveReport])))]
async fn moves(asker: Asker, State(controller): Shared) -> Answer {
    look(asker, controller, |c| Ok(c.moves())).await
}

/// Which drops.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct DropQuery {
    /// Only those of this port.
    port: Option<String>,
}

/// Dropped frames by port and reason, most frequent first.
#[utoipa::path(get, path = "/v1/drops", params(DropQuery), responses(
    (status = 200, body = [DropReport]),
    (status = 404, description = "No such port", body = Refusal),
))]
async fn drops(asker: Asker, State(controller): Shared, query: Result<Query<DropQuery>, QueryRejection>) -> Answer {
    let DropQuery { port } = query?.0;
    look(asker, controller, move |c| c.drops(port.as_deref())).await
}

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct EventQuery {
    /// Only those after this number.
    since: Option<u64>,
    /// Goes on with what happens from now on, until the daemon ends.
    #[serde(default)]
    follow: bool,
}

/// What happened, oldest first: a list, or with `follow` one record a line, for as long as the connection lasts.
#[utoipa::path(get, path = "/v1/events", params(EventQuery), responses(
    (status = 200, content(
        ([EventRecord] = "application/json"),
        (EventRecord = "application/x-ndjson"),
    )),
    (status = 503, description = "Too many follow already", body = Refusal),
))]
async fn events(
    asker: Asker,
    State(controller): Shared,
    may_write: Result<MayWrite, Refused>,
    query: Result<Query<EventQuery>, QueryRejection>,
) -> Answer {
    let EventQuery { since, follow } = query?.0;
    let since = since.unwrap_or(0);
    if !follow {
        return look(asker, controller, move |c| Ok(c.events().since(since))).await;
    }
    let follower = controller.events().follow(since, may_write.is_ok()).ok_or_else(Refused::too_many_followers)?;
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::new(Lines::of(follower))).into_response())
}

/// What the text in the body is called.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct TextQuery {
    /// Name for the text in diagnostics.
    file: Option<String>,
}

type Called = Result<Query<TextQuery>, QueryRejection>;

/// Has the text read by the controller, when its turn has come; what comes of it, as JSON.
async fn read<T: Serialize + 'static>(
    class: &'static Class,
    controller: Arc<Controller>,
    text: Text,
    called: Called,
    ask: impl FnOnce(&Controller, Option<(&str, &str)>) -> Result<T, ControlError> + Send + 'static,
) -> Answer {
    let name = called?.0.file.unwrap_or_else(|| "configuration".into());
    let requests = controller.requests().clone();
    class.json(&requests, move || text.read_by(&name, |text| ask(&controller, text))).await
}

/// Checks a configuration: YAML in the body, or the daemon's file if there is none.
#[utoipa::path(post, path = "/v1/check", params(TextQuery), request_body(content = String, content_type = "application/yaml"), responses(
    (status = 204, description = "It is good"),
    (status = 422, body = Refusal),
))]
async fn check(
    Asker(class): Asker,
    State(controller): Shared,
    called: Called,
    text: Text,
) -> Result<StatusCode, Refused> {
    read(class, controller, text, called, Controller::check).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What a configuration would change: YAML in the body, or the daemon's file if there is none.
#[utoipa::path(post, path = "/v1/plan", params(TextQuery), request_body(content = String, content_type = "application/yaml"), responses(
    (status = 200, body = PlanReport),
    (status = 422, body = Refusal),
))]
async fn plan(Asker(class): Asker, State(controller): Shared, called: Called, text: Text) -> Answer {
    read(class, controller, text, called, Controller::plan).await
}

/// Carries a configuration out: YAML in the body, or the daemon's file if there is none.
#[utoipa::path(post, path = "/v1/apply", params(TextQuery), request_body(content = String, content_type = "application/yaml"), responses(
    (status = 200, body = PlanReport),
    (status = 403, body = Refusal),
    (status = 422, body = Refusal),
))]
async fn apply(_: MayWrite, State(controller): Shared, called: Called, text: Text) -> Answer {
    read(&CHANGES, controller, text, called, Controller::apply).await
}
