//! From what was typed to what is printed.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::CommandFactory;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::client::{Client, ClientError, escaped, with_query};
use super::configuration::{self, FileError};
use super::vm::VmSide;
use super::{
    CpuVerb, FdbSelection, FdbVerb, LibvirtVerb, NetworkVerb, Options, Output, PortSettings, PortVerb, QemuVerb,
    ShardVerb, Verb, events, man, port, tables,
};
use crate::config;
use crate::control::report::{Flushed, NewPort, PlanReport, PortReport, StatusReport};
use crate::host::cpu::{CpuError, Cpus};
use crate::host::cpu_plan::CpuPlan;
use crate::printable;
use crate::sys::regular_file;

/// Exit code: refused or failed.
const FAILED: u8 = 1;
/// Exit code: the daemon does not answer.
const NOT_RUNNING: u8 = 3;
/// Exit code: applied, but some port is stopped or not served as asked.
const PARTLY: u8 = 4;

/// Why nothing, or not the wanted thing, was printed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("cannot read standard input")]
    Input(#[source] regular_file::FileError),
    #[error("standard input is neither YAML nor JSON")]
    Port(#[source] serde_yaml::Error),
    #[error("cannot write it as YAML")]
    Yaml(#[source] serde_yaml::Error),
    #[error("linecardd answered something that this linecard does not know: are both of one version?")]
    Answer(#[source] serde_json::Error),
    #[error("port {0} has no VM behind it: only vhost-user ports have")]
    NoVm(String),
    #[error(transparent)]
    Cpu(#[from] CpuError),
    #[error("cannot write the man pages")]
    Man(#[source] io::Error),
    #[error("cannot print")]
    Print(#[source] io::Error),
}

/// Does what was typed; prints the answer on stdout, or why there is none on stderr.
pub fn run(options: &Options) -> ExitCode {
    let output = options.output.unwrap_or(options.verb.usual_output());
    let code = match options.verb.run(&Session { options, output }) {
        Ok(code) => code,
        // Whoever reads has had enough (`linecard port list | head`).
        Err(RunError::Print(error)) if error.kind() == io::ErrorKind::BrokenPipe => 0,
        Err(error) => {
            complain(&error);
            match error {
                RunError::Client(ClientError::NotRunning { .. } | ClientError::Crowded { .. }) => NOT_RUNNING,
                _ => FAILED,
            }
        }
    };
    ExitCode::from(code)
}

/// Prints an error once: its causes in one line, then the places of mistakes, then the fix.
fn complain(error: &RunError) {
    let stderr = io::stderr();
    match error {
        RunError::File(FileError::Bad(_, wrong)) => eprint!("{}", wrong.render(configuration::color(&stderr))),
        RunError::Client(ClientError::Refused(refusal)) => {
            eprintln!("linecard: {}", printable::text(&refusal.error));
            if refusal.diagnostics.len() > 1 {
                refusal.diagnostics.iter().for_each(|mistake| eprintln!("  {}", printable::line(&told(mistake))));
            }
            if let Some(fix) = &refusal.fix {
                eprintln!("  {}", printable::text(fix));
            }
        }
        other => {
            let causes = std::iter::successors(std::error::Error::source(other), |cause| cause.source());
            let text = causes.fold(other.to_string(), |text, cause| format!("{text}: {cause}"));
            eprintln!("linecard: {}", printable::text(&text));
        }
    }
}

/// A mistake as the API says it, in one line: `file:line:column: path: message (help)`.
fn told(mistake: &Value) -> String {
    let text = |key: &str| mistake.get(key).and_then(Value::as_str);
    let number = |key: &str| mistake.get(key).and_then(Value::as_u64).unwrap_or(0);
    let place =
        text("file").map(|file| format!("{file}:{}:{}: ", number("line"), number("column"))).unwrap_or_default();
    let path = text("path").filter(|path| !path.is_empty()).map(|path| format!("{path}: ")).unwrap_or_default();
    let help = text("help").map(|help| format!(" ({help})")).unwrap_or_default();
    format!("{place}{path}{}{help}", text("message").unwrap_or("?"))
}

/// Where to ask and how to print.
pub(super) struct Session<'a> {
    options: &'a Options,
    pub(super) output: Output,
}

impl Session<'_> {
    pub(super) fn client(&self) -> Result<Client, ClientError> {
        Client::new(&self.options.api)
    }

    /// Prints `answer` as it is, or `text` made of it for people.
    fn print<T: DeserializeOwned>(&self, answer: Value, text: impl FnOnce(&T) -> String) -> Result<T, RunError> {
        let typed = serde_json::from_value(answer.clone()).map_err(RunError::Answer)?;
        self.show(&answer, || text(&typed))?;
        Ok(typed)
    }

    fn show(&self, answer: &Value, text: impl FnOnce() -> String) -> Result<(), RunError> {
        self.write(&match self.output {
            Output::Table => printable::text(&text()).into_owned(),
            Output::Json => format!("{answer:#}\n"),
            Output::Yaml => serde_yaml::to_string(answer).map_err(RunError::Yaml)?,
        })
    }

    pub(super) fn write(&self, text: &str) -> Result<(), RunError> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(RunError::Print)
    }

    fn list<T: DeserializeOwned>(&self, path: &str, text: fn(&[T]) -> String) -> Result<u8, RunError> {
        self.print(self.client()?.get(path)?, |list: &Vec<T>| text(list)).map(|_| 0)
    }

    fn port(&self, name: &str) -> Result<Value, RunError> {
        Ok(self.client()?.get(&format!("/v1/ports/{}", escaped(name)))?)
    }

    fn vm_side(&self, name: &str) -> Result<VmSide, RunError> {
        let port: PortReport = serde_json::from_value(self.port(name)?).map_err(RunError::Answer)?;
        VmSide::of(&port).ok_or_else(|| RunError::NoVm(name.into()))
    }

    /// Says something that is no answer, where it does not get into a program's way.
    fn remark(&self, text: &str) {
        if self.output == Output::Table {
            eprintln!("{text}");
        }
    }
}

impl Verb {
    /// How the answer is printed unless somebody says otherwise: records for programs, all else for people.
    fn usual_output(&self) -> Output {
        if matches!(self, Self::Events { .. }) { Output::Json } else { Output::Table }
    }

    fn run(&self, session: &Session<'_>) -> Result<u8, RunError> {
        match self {
            Self::Status => {
                session.print(session.client()?.get("/v1/status")?, tables::status)?;
                Ok(0)
            }
            Self::Port(verb) => verb.run(session),
            Self::Network(NetworkVerb::List) => session.list("/v1/networks", tables::networks),
            Self::Fdb(FdbVerb::List(which)) => session.list(&which.path(), tables::fdb),
            Self::Fdb(FdbVerb::Flush(which)) => {
                let told = |done: &Flushed| format!("{} forgotten\n", super::format::several(done.flushed, "station"));
                session.print(session.client()?.delete(&which.path())?, told).map(|_| 0)
            }
            Self::Shard(ShardVerb::List) => session.list("/v1/shards", tables::shards),
            Self::Shard(ShardVerb::Moves) => session.list("/v1/shards/moves", tables::moves),
            Self::Cpu(CpuVerb::Plan { file }) => {
                let plan = CpuPlan::of(&configuration::read(file)?.plan, &Cpus::of_this_host()?)?;
                session.show(&json!(plan), || tables::cpus(&plan)).map(|()| 0)
            }
            Self::Drops { port } => session.list(&with_query("/v1/drops", &[("port", port.clone())]), tables::drops),
            Self::Events { follow, since } => events::run(session, *follow, *since),
            Self::Qemu(QemuVerb::Args { port, memory }) => {
                session.write(&session.vm_side(port)?.qemu(memory)).map(|()| 0)
            }
            Self::Libvirt(LibvirtVerb::Xml { port }) => session.write(&session.vm_side(port)?.libvirt()).map(|()| 0),
            Self::Check { file } => check(session, file),
            Self::Plan { file } => {
                let (answer, _) = send(session, "/v1/plan", file.as_deref())?;
                session.print(answer, configuration::steps).map(|_| 0)
            }
            Self::Apply { file } => apply(session, file.as_deref()),
            Self::Completion { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(*shell, &mut Options::command(), "linecard", &mut script);
                session.write(&String::from_utf8_lossy(&script)).map(|()| 0)
            }
            Self::Man { folder } => man::write(folder).map_err(RunError::Man).map(|()| 0),
        }
    }
}

impl PortVerb {
    fn run(&self, session: &Session<'_>) -> Result<u8, RunError> {
        match self {
            Self::List => session.list("/v1/ports", tables::ports),
            Self::Show { name } => session.print(session.port(name)?, port::show).map(|_| 0),
            Self::Add { name, settings } => {
                let new = NewPort { name: name.clone(), port: written(session, settings)? };
                let body = serde_json::to_string(&new).map_err(RunError::Answer)?;
                let told =
                    |port: &PortReport| format!("port {} was added and is {}\n", port.name, tables::state(port.state));
                session.print(session.client()?.post("/v1/ports", body)?, told).map(|_| 0)
            }
            Self::Del { name } => {
                session.client()?.delete(&format!("/v1/ports/{}", escaped(name)))?;
                session.show(&json!({ "removed": name }), || format!("port {name} was removed\n")).map(|()| 0)
            }
        }
    }
}

impl FdbSelection {
    fn path(&self) -> String {
        let mac = self.mac.map(|mac| mac.to_string());
        with_query("/v1/fdb", &[("network", self.network.clone()), ("port", self.port.clone()), ("mac", mac)])
    }
}

/// A new port, from options or from standard input.
fn written(session: &Session<'_>, settings: &PortSettings) -> Result<Value, RunError> {
    if let Some(port) = settings.written() {
        return Ok(port);
    }
    if io::stdin().is_terminal() {
        session.remark("no options given: write the port as in the file, then Ctrl-D");
    }
    let text = regular_file::read_text_from(io::stdin(), config::TEXT_BYTES).map_err(RunError::Input)?;
    // JSON is YAML.
    serde_yaml::from_str(&text).map_err(RunError::Port)
}

fn check(session: &Session<'_>, file: &Path) -> Result<u8, RunError> {
    match configuration::read(file) {
        Ok(checked) => {
            session.show(&json!([]), || configuration::good(&checked))?;
            configuration::warnings(&checked.plan).iter().for_each(|warning| session.remark(warning));
            Ok(0)
        }
        Err(FileError::Bad(_, wrong)) if session.output != Output::Table => {
            let list = serde_json::to_value(&*wrong).map_err(RunError::Answer)?;
            session.show(&list, String::new).map(|()| FAILED)
        }
        Err(error) => Err(error.into()),
    }
}

/// Sends a configuration, or asks for the daemon's own; also returns which file it was.
fn send(session: &Session<'_>, path: &str, file: Option<&Path>) -> Result<(Value, Option<PathBuf>), RunError> {
    let client = session.client()?;
    let Some(file) = file else { return Ok((client.post(path, String::new())?, None)) };
    let checked = configuration::read(file)?;
    let answer = client.post(&with_query(path, &[("file", Some(checked.name))]), checked.text)?;
    Ok((answer, Some(file.into())))
}

fn apply(session: &Session<'_>, file: Option<&Path>) -> Result<u8, RunError> {
    let (answer, file) = send(session, "/v1/apply", file)?;
    let done: PlanReport = session.print(answer, configuration::steps)?;
    if let Some(file) = file {
        let status = session.client()?.get("/v1/status")?;
        let status: StatusReport = serde_json::from_value(status).map_err(RunError::Answer)?;
        if file.canonicalize().ok().is_none_or(|file| file != Path::new(&status.config)) {
            session
                .remark(&format!("this lasts until linecardd restarts or reloads: its own file is {}", status.config));
        }
    }
    Ok(if done.stopped.is_empty() && done.obstacles.is_empty() { 0 } else { PARTLY })
}
