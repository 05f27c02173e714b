//! Talks to the daemon: one connection for each request, HTTP/1.1 over its Unix socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use serde_json::Value;

use crate::control::report::Refusal;

/// Why there is no answer, or not the wanted one.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    /// Nobody listens.
    #[error(
        "linecardd does not answer on {}: is it running? ({why}; try `systemctl status linecardd`, or name its socket with --api)",
        socket.display()
    )]
    NotRunning {
        /// Where it was looked for.
        socket: PathBuf,
        /// What the kernel said.
        why: io::Error,
    },
    /// What it has not accepted yet has no room for one more.
    #[error(
        "linecardd could not accept a connection to {} within {} s: others connect to it again and again; daemon.api-mode and \
         daemon.api-group say who may",
        socket.display(), patience.as_secs()
    )]
    Crowded {
        /// Its socket.
        socket: PathBuf,
        /// How long we waited.
        patience: Duration,
    },
    /// The socket's mode does not let us in.
    #[error("user {} may not use {}: use sudo, or join the group of daemon.api-group", rustix::process::geteuid().as_raw(), .0.display())]
    NotAllowed(PathBuf),
    /// The daemon says no.
    #[error("{}", .0.error)]
    Refused(Box<Refusal>),
    /// The connection broke, or what came was not HTTP.
    #[error("linecardd broke off; its log says why (`journalctl -u linecardd`)")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No answer in time.
    #[error("linecardd took the request but did not answer within {} s; its log may say why", PATIENCE.as_secs())]
    Silent,
}

/// How long an answer may take. Applying a configuration with every port there can be takes a few seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon, by its socket.
pub(super) struct Client {
    socket: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// A client of the daemon on `socket`, which is not asked yet.
    pub(super) fn new(socket: &Path) -> Result<Self, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Self { socket: socket.into(), runtime: runtime.map_err(|error| ClientError::Broken(error.into()))? })
    }

    /// What is at `path`.
    pub(super) fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.request(Method::GET, path, String::new())
    }

    /// Sends `body` to `path`.
    pub(super) fn post(&self, path: &str, body: String) -> Result<Value, ClientError> {
        self.request(Method::POST, path, body)
    }

    /// Deletes what is at `path`.
    pub(super) fn delete(&self, path: &str) -> Result<Value, ClientError> {
        self.request(Method::DELETE, path, String::new())
    }

    /// Hands each line of what is at `path` to `line`, as it comes, until the daemon ends it.
    pub(super) fn follow<E: From<ClientError>>(
        &self,
        path: &str,
        mut line: impl FnMut(&str) -> Result<(), E>,
    ) -> Result<(), E> {
        let stream = connect(&self.socket, PATIENCE)?;
        self.runtime.block_on(async {
            let begun = tokio::time::timeout(PATIENCE, begin(stream, Method::GET, path, String::new())).await;
            let mut answer = begun.unwrap_or(Err(ClientError::Silent))?;
            if !answer.status().is_success() {
                let body = answer.body_mut().collect().await.map_err(broken)?;
                return Err(refused(answer.status(), &body.to_bytes()).into());
            }
            let mut begun = Vec::new();
            while let Some(frame) = answer.body_mut().frame().await {
                begun.extend_from_slice(frame.map_err(broken)?.data_ref().map_or(&[][..], |data| data));
                while let Some(end) = begun.iter().position(|byte| *byte == b'\n') {
                    let whole: Vec<u8> = begun.drain(..=end).collect();
                    line(String::from_utf8_lossy(&whole).trim_end())?;
                }
            }
            Ok(())
        })
    }

    fn request(&self, method: Method, path: &str, body: String) -> Result<Value, ClientError> {
        let stream = connect(&self.socket, PATIENCE)?;
        let answer = async {
            let answer = tokio::time::timeout(PATIENCE, exchange(stream, method, path, body)).await;
            answer.unwrap_or(Err(ClientError::Silent))
        };
        let (status, body) = self.runtime.block_on(answer)?;
        if !status.is_success() {
            return Err(refused(status, &body));
        }
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).map_err(|error| ClientError::Broken(error.into()))
    }
}

/// Connects to the daemon on `socket`. Where many do at the same time it waits until the daemon has accepted others, as long as
/// `patience`: connect(2) does that for a socket that blocks, and its time to send is the limit (unix(7), socket(7)).
fn connect(socket: &Path, patience: Duration) -> Result<UnixStream, ClientError> {
    let connected = || -> io::Result<UnixStream> {
        let address = SocketAddrUnix::new(socket)?;
        let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&stream, Timeout::Send, Some(patience))?;
        rustix::io::retry_on_intr(|| rustix::net::connect(&stream, &address))?;
        let stream = UnixStream::from(stream);
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    connected().map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => ClientError::NotAllowed(socket.into()),
        io::ErrorKind::WouldBlock => ClientError::Crowded { socket: socket.into(), patience },
        _ => ClientError::NotRunning { socket: socket.into(), why: error },
    })
}

async fn exchange(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: String,
) -> Result<(StatusCode, Bytes), ClientError> {
    let answer = begin(stream, method, path, body).await?;
    let status = answer.status();
    Ok((status, answer.into_body().collect().await.map_err(broken)?.to_bytes()))
}

/// An answer of which only the head has come.
async fn begin(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: String,
) -> Result<Response<Incoming>, ClientError> {
    let stream = tokio::net::UnixStream::from_std(stream).map_err(broken)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    tokio::spawn(connection);
    let request = Request::builder().method(method).uri(path).header(HOST, "linecardd");
    let request = request.body(Full::new(Bytes::from(body))).map_err(broken)?;
    sender.send_request(request).await.map_err(broken)
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
    ClientError::Broken(error.into())
}

/// The daemon's refusal, or what stands for it if the answer is not one of the API's.
fn refused(status: StatusCode, body: &[u8]) -> ClientError {
    let other = |_| Refusal { error: format!("linecardd answered {status}"), fix: None, diagnostics: Vec::new() };
    ClientError::Refused(Box::new(serde_json::from_slice(body).unwrap_or_else(other)))
}

/// A path or a value of a query, with everything escaped that could be taken for something else (RFC 3986, 2.3).
pub(super) fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// A path with a query of those parameters that have a value.
pub(super) fn with_query(path: &str, parameters: &[(&str, Option<String>)]) -> String {
    let given = parameters.iter().filter_map(|(key, value)| Some(format!("{key}={}", escaped(value.as_ref()?))));
    let query = given.collect::<Vec<_>>().join("&");
    if query.is_empty() { path.into() } else { format!("{path}?{query}") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::socket_file;

    #[test]
    fn a_daemon_that_many_connect_to_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let listener = socket_file::unbound().unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let waiting: Vec<_> = std::iter::from_fn(|| socket_file::connect(&path).ok()).collect();
        assert!(!waiting.is_empty());
        let refused = connect(&path, Duration::from_millis(100)).unwrap_err();
        assert!(matches!(refused, ClientError::Crowded { .. }), "{refused}");
        assert!(refused.to_string().contains("daemon.api-mode"), "{refused}");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                rustix::net::accept(&listener).unwrap();
            });
            connect(&path, PATIENCE).unwrap();
        });
    }

    #[test]
    fn what_was_typed_cannot_change_the_path() {
        assert_eq!(format!("/v1/ports/{}", escaped("a/../b?c d")), "/v1/ports/a%2F..%2Fb%3Fc%20d");
        let query = [("network", None), ("port", Some("a&b".into())), ("mac", Some("02:00".into()))];
        assert_eq!(with_query("/v1/fdb", &query), "/v1/fdb?port=a%26b&mac=02%3A00");
        assert_eq!(with_query("/v1/fdb", &[("port", None)]), "/v1/fdb");
    }
}
