//! Waiting: the one polling loop. Deadlines exist to end a broken run, never to judge speed, so they are generous:
//! two emulated guests on a loaded two-core machine are ten times slower than the same on an idle one. A wait ends at once,
//! with the reason, when a process of the scenario dies under it.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::child::check_all;
use crate::{Error, Result};

/// The deadline of steps that take seconds at most on an idle machine.
pub const STEP: Duration = Duration::from_secs(60);

/// The deadline of a guest's boot (2 s under emulation on an idle machine).
pub const BOOT: Duration = Duration::from_secs(120);

/// Polls until `probe` gives a value; its error, or the death of a child, ends the wait.
pub fn until<T>(what: &str, deadline: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        check_all()?;
        if start.elapsed() > deadline {
            return Err(Error::Timeout { what: what.to_owned(), after: deadline });
        }
        sleep(Duration::from_millis(10));
    }
}

/// Polls until `probe` is true.
pub fn until_true(what: &str, deadline: Duration, mut probe: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, deadline, || Ok(probe()?.then_some(())))
}
