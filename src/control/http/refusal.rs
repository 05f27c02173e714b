//! How the API says no: a status and `{error, fix?, diagnostics?}`, the same for every route.

use axum::Json;
use axum::extract::rejection::{BytesRejection, QueryRejection, StringRejection};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use crate::control::report::Refusal;
use crate::control::{ControlError, chain};

/// A refusal on its way out.
#[derive(Debug)]
pub struct Refused {
    status: StatusCode,
    body: Box<Refusal>,
}

impl Refused {
    pub(super) fn new(status: StatusCode, error: impl Into<String>, fix: impl Into<Option<&'static str>>) -> Self {
        let fix = fix.into().map(String::from);
        Self { status, body: Box::new(Refusal { error: error.into(), fix, diagnostics: Vec::new() }) }
    }

    pub(super) fn no_such_route() -> Self {
        Self::new(StatusCode::NOT_FOUND, "there is nothing at this path", "GET /openapi.json lists what there is")
    }

    pub(super) fn no_such_method() -> Self {
        let error = "this path does not know that method";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, error, "GET /openapi.json lists what there is")
    }

    pub(super) fn too_many_followers() -> Self {
        let error = "too many requests follow events already";
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            error,
            "end another `linecard events --follow`, or ask without follow",
        )
    }

    pub(super) fn not_allowed(uid: Option<u32>) -> Self {
        let who = uid.map_or("an unknown user".into(), |uid| format!("user {uid}"));
        Self::new(
            StatusCode::FORBIDDEN,
            format!("{who} has read-only access"),
            "use sudo, or have the user added to the group of daemon.api-group and log in again",
        )
    }
}

impl From<ControlError> for Refused {
    fn from(error: ControlError) -> Self {
        let status = match &error {
            ControlError::NoSuchPort { .. } | ControlError::NoSuchNetwork { .. } => StatusCode::NOT_FOUND,
            ControlError::Exists(_) | ControlError::FromFile { .. } | ControlError::Open { .. } => StatusCode::CONFLICT,
            ControlError::Cpu(_) | ControlError::Shard(_) => StatusCode::CONFLICT,
            ControlError::Invalid(_) | ControlError::Name(_) => StatusCode::UNPROCESSABLE_ENTITY,
            ControlError::Busy(_) => StatusCode::SERVICE_UNAVAILABLE,
            ControlError::Full(_) => StatusCode::INSUFFICIENT_STORAGE,
            ControlError::Store(_) | ControlError::ReadFile { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let diagnostics = match &error {
            ControlError::Invalid(wrong) => wrong.list().iter().flat_map(serde_json::to_value).collect(),
            _ => Vec::new(),
        };
        let body = Refusal { error: chain(&error), fix: error.fix(), diagnostics };
        Self { status, body: Box::new(body) }
    }
}

impl From<QueryRejection> for Refused {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text(), "GET /openapi.json lists the parameters of each path")
    }
}

impl From<StringRejection> for Refused {
    fn from(rejection: StringRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text(), "send UTF-8 text")
    }
}

impl From<BytesRejection> for Refused {
    fn from(rejection: BytesRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text(), None)
    }
}

impl From<std::fmt::Error> for Refused {
    fn from(_: std::fmt::Error) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be written", None)
    }
}

impl From<serde_json::Error> for Refused {
    fn from(error: serde_json::Error) -> Self {
        let error = format!("the request's body is not what this path takes: {error}");
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, error, "GET /openapi.json describes the body")
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.status, Json(self.body)).into_response()
    }
}
