//! Memory that was allocated for a moment: [`give_back`].

#![allow(unsafe_code)] // malloc_trim.

/// Has the allocator return what is free to the kernel. It keeps it otherwise, wherever something younger lies behind it.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes a number, uses no memory of the caller and may be called by any thread at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
