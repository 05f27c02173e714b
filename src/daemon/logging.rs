//! Where messages go: the journal when stderr is connected to it, else stderr. LINECARD_LOG overrides the level of the
//! configuration, with a word (`debug`) or, on stderr, a list (`info,linecard::port=trace`).
//!
//! Whatever a message quotes, it is one line and has no control characters when it gets there.
//!
//! Whoever reads the log may cease to, so one thread writes it and waits for him; all others leave their lines to that (`log_queue.rs`).

use std::cell::RefCell;
use std::io::{self, Write};
use std::panic::PanicHookInfo;
use std::time::Duration;
use std::{backtrace, panic, thread};

use anstream::AutoStream;
use env_logger::Target;
use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use systemd_journal_logger::JournalLog;

use crate::config::LogLevel;
use crate::log_queue::{LOG, Line, Next};
use crate::printable;
use crate::sys::threads::touch_stack;

/// The variable that overrides the configuration.
const VARIABLE: &str = "LINECARD_LOG";

/// How long is waited for whoever reads the log where the process or a thread is about to end.
const PATIENCE: Duration = Duration::from_secs(1);

/// The log, which is written to its end when this is dropped, if somebody reads it.
pub(super) struct Logging;

impl Drop for Logging {
    fn drop(&mut self) {
        LOG.wait_written(PATIENCE);
    }
}

/// Starts logging. A second call in a process has no effect.
pub(super) fn start(level: LogLevel) -> io::Result<Logging> {
    let wanted = std::env::var(VARIABLE).ok().filter(|wanted| !wanted.is_empty());
    let (destination, level) = Destination::find(wanted, filter(level));
    let destination: &'static Destination = Box::leak(Box::new(destination));
    if log::set_logger(destination).is_ok() {
        log::set_max_level(level);
        LOG.reserve();
        thread::Builder::new().name("log".into()).stack_size(256 * 1024).spawn(|| write(destination))?;
        panic::set_hook(Box::new(tell_panic));
    }
    Ok(Logging)
}

/// Writes what is logged, for ever.
fn write(destination: &Destination) {
    touch_stack();
    loop {
        match LOG.next() {
            Next::Line(line) => destination.write(&line),
            Next::Lost(lines) => {
                let mut record = Record::builder();
                let record = record.level(Level::Error).target(module_path!()).module_path_static(Some(module_path!()));
                let text = format!("{lines} lines were lost, because nobody reads the log");
                destination.write(&destination.line(&record.args(format_args!("{text}")).build()));
            }
        }
    }
}

/// Logs that a thread panics, and sees to it that this is written before the thread or the process ends.
fn tell_panic(panic: &PanicHookInfo<'_>) {
    let thread = thread::current();
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    let message = panic.payload_as_str().unwrap_or("no message");
    let text = format!("thread '{}' panicked at {place}: {message}", thread.name().unwrap_or_default());
    if !log::log_enabled!(Level::Error) {
        return say(&(text + "\n"));
    }
    log::error!("{text}");
    let trace = backtrace::Backtrace::capture();
    if trace.status() == backtrace::BacktraceStatus::Captured {
        trace.to_string().lines().for_each(|line| log::error!("{line}"));
    }
    LOG.wait_written(PATIENCE);
}

/// What a line is made for and written to.
enum Destination {
    Stderr(env_logger::Logger),
    Journal(JournalLog),
}

impl Destination {
    /// The one of this process, and what is to be logged.
    fn find(wanted: Option<String>, level: LevelFilter) -> (Self, LevelFilter) {
        if systemd_journal_logger::connected_to_journal()
            && let Ok(journal) = JournalLog::new()
        {
            return (Self::Journal(journal), wanted.and_then(|wanted| wanted.parse().ok()).unwrap_or(level));
        }
        let mut builder = env_logger::Builder::new();
        match wanted {
            Some(wanted) => builder.parse_filters(&wanted),
            None => builder.filter_level(level),
        };
        builder.write_style(AutoStream::choice(&io::stderr()).into()).target(Target::Pipe(Box::new(Made)));
        let logger = builder.format_target(false).build();
        let level = logger.filter();
        (Self::Stderr(logger), level)
    }

    /// The line for a message, which is made [printable] here.
    fn line(&self, record: &Record<'_>) -> Line {
        let message = record.args().to_string();
        let message = printable::line(&message);
        let text = match self {
            Self::Journal(_) => message.into_owned().into_bytes(),
            Self::Stderr(logger) => {
                logger.log(&record.to_builder().args(format_args!("{message}")).build());
                MADE.try_with(RefCell::take).unwrap_or_default()
            }
        };
        let place = (record.file_static(), record.line());
        Line { text, level: record.level(), module: record.module_path_static(), place }
    }

    /// Writes a line. What fails is lost, as there is nowhere to say so.
    fn write(&self, line: &Line) {
        match self {
            Self::Stderr(_) => write_to_stderr(&line.text),
            Self::Journal(journal) => journal.log(
                &Record::builder()
                    .level(line.level)
                    .target(line.module.unwrap_or_default())
                    .module_path_static(line.module)
                    .file_static(line.place.0)
                    .line(line.place.1)
                    .args(format_args!("{}", String::from_utf8_lossy(&line.text)))
                    .build(),
            ),
        }
    }
}

impl Log for Destination {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        match self {
            Self::Stderr(logger) => logger.enabled(metadata),
            Self::Journal(journal) => journal.enabled(metadata),
        }
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            LOG.push(self.line(record));
        }
    }

    fn flush(&self) {
        LOG.wait_written(PATIENCE);
    }
}

thread_local! {
    static MADE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Where `env_logger` leaves the line that it has made for the calling thread: in [`MADE`].
struct Made;

impl Write for Made {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        MADE.try_with(|made| made.borrow_mut().write(text)).map_err(io::Error::other)?
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Says why the process ends on stderr, unless that takes nothing for a second.
pub fn say(text: &str) {
    if stderr_is_ready(Some(PATIENCE)) {
        write_to_stderr(text.as_bytes());
    }
}

/// Writes beside the standard library, whose lock whoever else writes to stderr would wait for.
fn write_to_stderr(mut text: &[u8]) {
    while !text.is_empty() {
        match rustix::io::write(io::stderr(), text) {
            Ok(0) => return,
            Ok(written) => text = &text[written..],
            Err(Errno::INTR) => {}
            // It does not block where another process that has it wants it so.
            Err(Errno::AGAIN) if stderr_is_ready(None) => {}
            Err(_) => return,
        }
    }
}

/// Waits until stderr takes something, or fails. Returns whether that was so within this time.
fn stderr_is_ready(patience: Option<Duration>) -> bool {
    let patience = patience.and_then(|patience| Timespec::try_from(patience).ok());
    let stderr = io::stderr();
    retry_on_intr(|| poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], patience.as_ref())).is_ok_and(|ready| ready > 0)
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::Error,
        LogLevel::Warn => LevelFilter::Warn,
        LogLevel::Info => LevelFilter::Info,
        LogLevel::Debug => LevelFilter::Debug,
        LogLevel::Trace => LevelFilter::Trace,
    }
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::process::{Command, abort};

    use super::*;

    /// In the environment of the process that panics.
    const TASK: &str = "LINECARD_TEST_PANIC";

    #[test]
    fn what_is_logged_before_a_panic_and_the_panic_are_written_before_the_process_ends() {
        if std::env::var_os(TASK).is_some() {
            let _log = start(LogLevel::Info).unwrap();
            (0..1000).for_each(|n| log::info!("line {n}"));
            let thread = thread::Builder::new().name("one".into()).spawn(|| panic!("a\nb"));
            assert!(thread.unwrap().join().is_err());
            abort();
        }
        let me =
            "daemon::logging::tests::what_is_logged_before_a_panic_and_the_panic_are_written_before_the_process_ends";
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", me, "--nocapture"]).env(TASK, "").env("RUST_BACKTRACE", "0").env_remove(VARIABLE);
        let output = child.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let last: Vec<&str> = said.lines().rev().take(2).collect();
        assert!(last[0].contains("ERROR] thread 'one' panicked at src/daemon/logging.rs:"), "{said}");
        assert!(last[0].ends_with(": a\\nb") && last[1].ends_with("INFO ] line 999"), "{said}");
        assert!(!said.contains("were lost"), "{said}");
    }
}
