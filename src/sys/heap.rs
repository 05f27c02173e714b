//! Memory that is there when it is asked for: [`reserve`]; and memory that was allocated for a moment: [`give_back`].
//!
//! The allocator gets memory from the kernel while it holds its own lock, and the kernel keeps it waiting for as long as a session
//! waits for its front end's file (`mapping_turn`): then everybody who allocates would wait. So some of it is asked for at the
//! start, and all that is asked for comes out of that: there is one arena, which all threads have in common and which grows
//! by the whole reserve, and no request short of that is mapped by itself. A part of it has been touched. The rest costs
//! nothing until it is used, and its page faults need no more than the mapping itself (Linux 6.4), unless it is the kernel that first
//! writes to a page.
//!
//! What is given back is what is there beyond the reserve, and the kernel is not asked as long as there is no such thing.

#![allow(unsafe_code)] // mallopt, mallinfo2, malloc_trim.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::threads;

/// Bytes that are asked for ahead, whenever there is need of more.
const RESERVE: usize = 32 << 20;

/// Bytes of it that are touched: some ten times what the control side of a daemon with a hundred ports uses at once.
const TOUCHED: usize = 4 << 20;

/// Bytes that the allocator had from the kernel when the reserve was made.
static AT_START: AtomicUsize = AtomicUsize::new(0);

/// Makes the reserve. For the main thread, before there is another.
pub fn reserve() {
    // Those of other threads are mapped whole.
    threads::touch_stack();
    #[cfg(target_env = "gnu")]
    {
        let bytes = RESERVE as libc::c_int;
        // SAFETY: numbers; nobody else allocates yet. What is refused stays as it is.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1);
            libc::mallopt(libc::M_MMAP_THRESHOLD, bytes);
            libc::mallopt(libc::M_TOP_PAD, bytes);
            libc::mallopt(libc::M_TRIM_THRESHOLD, 2 * bytes);
        }
    }
    drop(black_box(vec![1u8; TOUCHED]));
    AT_START.store(from_kernel(), Ordering::Relaxed);
}

/// Has the allocator return what is free to the kernel, but for the reserve. It keeps it otherwise, wherever something younger
/// lies behind it.
pub fn give_back() {
    if from_kernel() <= AT_START.load(Ordering::Relaxed) {
        return;
    }
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes a number, uses no memory of the caller and may be called by any thread at any time.
    unsafe {
        libc::malloc_trim(RESERVE);
    }
}

/// Bytes that the allocator has from the kernel.
fn from_kernel() -> usize {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallinfo2(3) takes and returns numbers.
    return unsafe { libc::mallinfo2() }.arena;
    #[cfg(not(target_env = "gnu"))]
    0
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// What is changed for a whole process is tried in one of its own, which runs this test alone.
    const CHILD: &str = "LINECARD_TEST_HEAP";

    #[test]
    fn what_is_asked_for_comes_out_of_the_reserve_which_is_not_given_back() {
        if std::env::var(CHILD).is_ok() {
            return use_it();
        }
        let me = "sys::heap::tests::what_is_asked_for_comes_out_of_the_reserve_which_is_not_given_back";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        // A test is no main thread, and would have an arena of its own before it can say that it wants none.
        child.args(["--exact", me, "--test-threads=1", "--nocapture"]).env(CHILD, "yes").env("MALLOC_ARENA_MAX", "1");
        let output = child.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Allocates so many times 2 MiB and some smaller things, in other threads.
    fn allocate(times: usize) {
        let all = || (0..times).map(|at| (vec![1u8; 2 << 20], vec![at; 1000])).collect::<Vec<_>>();
        std::thread::scope(|scope| drop(scope.spawn(all).join().unwrap()));
    }

    /// What the allocator has from the kernel, and how many requests it has had mapped by themselves.
    fn taken() -> (usize, usize) {
        // SAFETY: mallinfo2(3) takes and returns numbers.
        (from_kernel(), unsafe { libc::mallinfo2() }.hblks)
    }

    /// What the process of its own does.
    fn use_it() {
        reserve();
        let at_start = taken();
        allocate(12);
        assert_eq!(taken(), at_start, "the kernel was asked for more");
        give_back();
        assert_eq!(taken(), at_start, "there was nothing to give back");
        allocate(60);
        give_back();
        let (after, _) = taken();
        assert!((RESERVE..=at_start.0).contains(&after), "{after} bytes are kept, of {}", at_start.0);
        allocate(12);
        assert_eq!(taken().0, after, "the reserve was given back");
    }
}
