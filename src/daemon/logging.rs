//! Where messages go: the journal when stderr is connected to it, else stderr. LINECARD_LOG overrides the level of the
//! configuration, with a word (`debug`) or, on stderr, a list (`info,linecard::port=trace`).
//!
//! Whatever a message quotes, it is one line and has no control characters when it gets there.

use log::{LevelFilter, Log, Metadata, Record};

use crate::config::LogLevel;
use crate::printable;

/// The variable that overrides the configuration.
const VARIABLE: &str = "LINECARD_LOG";

/// Starts logging. May be called once; a second call has no effect.
pub(super) fn start(level: LogLevel) {
    let wanted = std::env::var(VARIABLE).ok().filter(|wanted| !wanted.is_empty());
    let level = filter(level);
    if systemd_journal_logger::connected_to_journal()
        && let Ok(journal) = systemd_journal_logger::JournalLog::new()
        && log::set_boxed_logger(Box::new(Printable(journal))).is_ok()
    {
        log::set_max_level(wanted.and_then(|wanted| wanted.parse().ok()).unwrap_or(level));
        return;
    }
    let mut builder = env_logger::Builder::new();
    match wanted {
        Some(wanted) => builder.parse_filters(&wanted),
        None => builder.filter_level(level),
    };
    let logger = builder.format_target(false).build();
    let level = logger.filter();
    // Only fails if there is a logger already, which then is used.
    if log::set_boxed_logger(Box::new(Printable(logger))).is_ok() {
        log::set_max_level(level);
    }
}

/// A logger whose messages are made [printable] before they reach it.
struct Printable<L>(L);

impl<L: Log> Log for Printable<L> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let message = record.args().to_string();
            self.0.log(&record.to_builder().args(format_args!("{}", printable::line(&message))).build());
        }
    }

    fn flush(&self) {
        self.0.flush();
    }
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
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
