//! The processor's time stamp counter, which switches count their own work by.

#![allow(unsafe_code, reason = "rdtsc is an intrinsic")]

use std::sync::LazyLock;
use std::time::{Duration, Instant};

static PER_SECOND: LazyLock<f64> = LazyLock::new(|| {
    let (from, start) = (now(), Instant::now());
    std::thread::sleep(Duration::from_millis(50));
    (now() - from) as f64 / start.elapsed().as_secs_f64()
});

/// Its value; not ordered with the instructions around it.
#[inline]
pub fn now() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, and Linux lets user space execute it.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        START.elapsed().as_nanos() as u64
    }
}

/// How fast it runs, found out by the clock when first asked.
pub fn per_second() -> f64 {
    *PER_SECOND
}

/// `duration` in cycles.
pub fn of(duration: Duration) -> u64 {
    (duration.as_secs_f64() * per_second()) as u64
}
