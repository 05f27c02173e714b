//! Which NUMA node pages lie on, and which one this thread runs on.
//!
//! move_pages(2) without a list of target nodes only asks: it looks pages up in our page tables and brings none in. A page
//! that we have not touched yet is therefore unknown, also when its owner has; get_mempolicy(2) would know it, but by mapping
//! it, which allocates one where there was none, and guests share terabytes of nothing.

#![allow(unsafe_code)] // Two system calls that no crate of ours wraps.

use std::io;
use std::ptr;

/// The node of the page at each of these addresses of ours; `None` of one that is not in our page tables. The addresses
/// need not be mapped.
///
/// # Errors
/// The kernel has no NUMA, or a filter of system calls says no.
pub fn nodes_of(addresses: &[usize]) -> io::Result<Vec<Option<u16>>> {
    let mut status = vec![-libc::ENOENT; addresses.len()];
    let (own, flags): (libc::pid_t, libc::c_int) = (0, 0);
    let targets = ptr::null::<libc::c_int>();
    // SAFETY: the kernel reads `addresses.len()` addresses, which it only looks up, and writes as many numbers into `status`,
    // which has that length; both live through the call. Without targets it moves nothing.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            own,
            addresses.len() as libc::c_ulong,
            addresses.as_ptr(),
            targets,
            status.as_mut_ptr(),
            flags,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(status.into_iter().map(|node| u16::try_from(node).ok()).collect())
}

/// The node of the CPU that the calling thread runs on; 0 if the kernel does not say.
pub fn node_here() -> u16 {
    let mut node: libc::c_uint = 0;
    let unused = ptr::null_mut::<libc::c_uint>();
    // SAFETY: the kernel writes one number into `node`, which lives through the call; null pointers it leaves alone.
    let done = unsafe { libc::syscall(libc::SYS_getcpu, unused, &raw mut node, unused) };
    if done == 0 { u16::try_from(node).unwrap_or(0) } else { 0 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use super::*;

    #[test]
    fn a_touched_page_is_on_a_node_of_this_host_and_others_are_unknown() {
        let touched = [1u8; 64];
        let addresses = [touched.as_ptr() as usize, 0];
        match nodes_of(&addresses) {
            Ok(nodes) => {
                let node = nodes[0].expect("it was just written");
                assert!(Path::new(&format!("/sys/devices/system/node/node{node}")).exists());
                assert_eq!(nodes[1], None);
            }
            Err(error) => {
                // Only where there is no NUMA, or where a container's filter says no.
                let code = error.raw_os_error().unwrap();
                assert!([libc::ENOSYS, libc::EPERM].contains(&code), "{error}");
            }
        }
        assert!(nodes_of(&[]).is_ok_and(|nodes| nodes.is_empty()) || nodes_of(&addresses).is_err());
    }

    #[test]
    fn a_thread_is_on_the_node_of_its_cpu() {
        crate::sys::cpu::pin_to(0).unwrap_or(());
        let node = node_here();
        let nodes = Path::new("/sys/devices/system/node");
        assert!(if nodes.exists() { nodes.join(format!("node{node}")).exists() } else { node == 0 });
    }
}
