//! Ctrl-C and SIGTERM end a measurement between two steps, so that switches are stopped and huge pages come back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::register_signal_handler;

static CAME: AtomicBool = AtomicBool::new(false);

/// Longest sleep without a look.
const SLICE: Duration = Duration::from_millis(50);

/// From here on the two signals are noted instead of ending the process.
pub fn watch() -> Result<(), vmm_sys_util::errno::Error> {
    const SIGINT: i32 = 2;
    const SIGTERM: i32 = 15;
    for signal in [SIGINT, SIGTERM] {
        register_signal_handler(signal, note)?;
    }
    Ok(())
}

extern "C" fn note(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    CAME.store(true, Ordering::Relaxed);
}

/// Whether one came.
pub fn came() -> bool {
    CAME.load(Ordering::Relaxed)
}

/// Sleeps for `span`, or until one came.
pub fn sleep(span: Duration) {
    let end = Instant::now() + span;
    while !came() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left.min(SLICE));
    }
}
