//! This process's command line, which every user of the host may ask for: [`hide`].
//!
//! Who reads `/proc/PID/cmdline` has the kernel hold that process's table of mappings meanwhile (fs/proc/base.c: get_mm_cmdline), and
//! that is as long as the reader is kept from its CPU: a few readers of the lowest priority have the process wait seconds to
//! map a VM's memory or to start a thread, again and again, and need no rights for it. Of a process without arguments the kernel reads
//! nothing and holds nothing. The name stays: ps(1) shows it in brackets.

#![allow(unsafe_code)] // prctl, sbrk.

use std::{fs, io};

/// What the kernel is told of where things lie (linux/prctl.h: struct prctl_mm_map).
#[repr(C)]
struct MemoryMap {
    start_code: u64,
    end_code: u64,
    start_data: u64,
    end_data: u64,
    start_brk: u64,
    brk: u64,
    start_stack: u64,
    arg_start: u64,
    arg_end: u64,
    env_start: u64,
    env_end: u64,
    auxv: *const u64,
    auxv_size: u32,
    exe_fd: u32,
}

/// Has the kernel take this process for one that was started without arguments. Those that it has can be read here as before. For the
/// main thread, before there is another.
///
/// # Errors
/// The kernel does not do it (no CONFIG_CHECKPOINT_RESTORE, or a filter of system calls).
pub fn hide() -> io::Result<()> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let map = memory_map(&stat).ok_or(io::ErrorKind::InvalidData)?;
    let size = std::mem::size_of::<MemoryMap>();
    // SAFETY: the map is of the size that is told and lives through the call. What it says is what the kernel has said, but for the
    // end of the arguments and the break, which nobody moves meanwhile: it changes nothing but what /proc shows, and the break
    // is where it was.
    match unsafe { libc::prctl(libc::PR_SET_MM, libc::PR_SET_MM_MAP, &raw const map, size, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What the kernel says of this process (proc_pid_stat(5)), with arguments that end where they begin.
fn memory_map(stat: &str) -> Option<MemoryMap> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // The first one behind the name is the third.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    // SAFETY: sbrk(3) with zero moves nothing.
    let brk = unsafe { libc::sbrk(0) } as u64;
    Some(MemoryMap {
        start_code: field(26)?,
        end_code: field(27)?,
        start_data: field(45)?,
        end_data: field(46)?,
        start_brk: field(47)?,
        brk,
        start_stack: field(28)?,
        arg_start: field(48)?,
        arg_end: field(48)?,
        env_start: field(50)?,
        env_end: field(51)?,
        auxv: std::ptr::null(),
        auxv_size: 0,
        exe_fd: u32::MAX,
    })
}
