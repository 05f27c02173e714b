//! From what an operator wrote to what the shards do: desired state → pure diff → ordered actions → published tables.
//!
//! [`desired`] puts the file and the ports made at run time together; [`diff`] finds what to do, without doing it;
//! [`Controller`] does it, one change at a time under one lock, and keeps going when a single port cannot be had:
//! that port is shown as stopped, with its reason, and tried again with the next change. [`http`] is the way in.
//!
//! Looking takes no lock that a change holds (`view`), and what a port is asked or told holds nobody up (`calls`). Nobody
//! waits for the start of a thread (`pool`). Long lists are made page by page (`pages`).
//!
//! Shards never wait for anything here. They see a change when new [`crate::shard::Tables`] are published, and the control
//! side waits for them, never the other way round.

mod calls;
mod conflicts;
mod controller;
pub mod desired;
pub mod diff;
pub mod events;
pub mod http;
mod inspect;
mod kinds;
mod locality;
mod numbers;
mod pages;
mod pool;
mod refusals;
pub mod report;
mod running;
pub mod store;
mod storms;
mod upkeep;
mod view;

#[cfg(test)]
pub(crate) mod stuck;
#[cfg(test)]
mod tests;

pub use controller::{ControlError, Controller, FdbFilter};
pub use events::Tally;
pub use pages::{FdbPlace, Page};
pub use pool::Pool;

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
