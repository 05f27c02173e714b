//! The CPU itself: its cycle counter and its prefetch hints.

#![allow(unsafe_code)] // Compiler intrinsics, and the scheduler.

/// The CPU's time stamp counter: constant rate and synchronous over all cores on every CPU of the last 15 years. Counts
/// at the nominal clock, so "cycles" in our figures are cycles of that clock. About 20 cycles to read.
#[inline]
pub fn cycles() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: RDTSC is part of the x86_64 baseline and the kernel leaves it enabled for user space.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
    #[cfg(target_arch = "aarch64")]
    {
        let count: u64;
        // SAFETY: CNTVCT_EL0 is readable from EL0 on Linux; reading it has no side effect.
        unsafe { core::arch::asm!("mrs {}, cntvct_el0", out(reg) count, options(nomem, nostack)) };
        count
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        use std::sync::OnceLock;
        static START: OnceLock<std::time::Instant> = OnceLock::new();
        START.get_or_init(std::time::Instant::now).elapsed().as_nanos() as u64
    }
}

/// How many [`cycles`] a second has; measured once, which takes 10 ms.
pub fn cycles_per_second() -> u64 {
    static RATE: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *RATE.get_or_init(|| {
        let (began, first) = (std::time::Instant::now(), cycles());
        std::thread::sleep(std::time::Duration::from_millis(10));
        let (elapsed, last) = (began.elapsed(), cycles());
        let rate = u128::from(last.wrapping_sub(first)) * 1_000_000_000 / elapsed.as_nanos().max(1);
        u64::try_from(rate).unwrap_or(u64::MAX).max(1)
    })
}

/// How long so many cycles take.
pub fn duration(cycles: u64) -> std::time::Duration {
    let nanos = u128::from(cycles) * 1_000_000_000 / u128::from(cycles_per_second());
    std::time::Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Pins the calling thread to one CPU.
///
/// # Errors
/// The CPU does not exist, is offline, or is not among those that this process may use.
pub fn pin_to(cpu: u16) -> std::io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    if usize::from(cpu) >= rustix::thread::CpuSet::MAX_CPU {
        return Err(std::io::Error::from(std::io::ErrorKind::InvalidInput));
    }
    set.set(usize::from(cpu));
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// Has a thread of this process run as everybody does, and give way to those who do: it gets a tenth of what one of them gets beside it
/// (sched(7): the weights of nice values 0 and 10 are 1024 and 110).
///
/// # Errors
/// It has ended, or the kernel does not let it.
pub fn step_back(thread: i32) -> std::io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: sched_setscheduler(2) reads the structure, which lives through the call.
    if unsafe { libc::sched_setscheduler(thread, libc::SCHED_OTHER, &parameters) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(rustix::process::setpriority_process(rustix::process::Pid::from_raw(thread), 10)?)
}

/// Has the calling thread be so nice to others: -20 to 19, less is more for itself.
///
/// # Errors
/// It has no right to be less nice than it is (CAP_SYS_NICE, RLIMIT_NICE).
pub fn set_nice(nice: i32) -> std::io::Result<()> {
    Ok(rustix::process::setpriority_process(None, nice)?)
}

/// Gives the calling thread SCHED_FIFO priority `priority`, 1 to 99 (sched(7)).
///
/// # Errors
/// The process may not: it takes CAP_SYS_NICE or RLIMIT_RTPRIO.
pub fn run_realtime(priority: u8) -> std::io::Result<()> {
    let parameters = libc::sched_param { sched_priority: priority.into() };
    // SAFETY: the structure lives through the call, which reads it and nothing else.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameters) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Hints that the cache line of `address` will be read soon. The address need not be mapped.
#[inline]
pub fn prefetch_read<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHT0 never faults, whatever the address (Intel SDM, PREFETCHh).
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(address.cast())
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Hints that the cache line of `address` will be written soon. The address need not be mapped.
#[inline]
pub fn prefetch_write<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // By hand, because the compiler makes a prefetch for reading of it unless it is told that the CPU has PREFETCHW, and
    // fetching a line shared that is about to be written costs a second trip to its owner.
    // SAFETY: PREFETCHW never faults, whatever the address; CPUs without it treat the encoding as a NOP (AMD64 APM vol. 3).
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags, readonly))
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
