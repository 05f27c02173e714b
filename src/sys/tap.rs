//! TAP interfaces as the kernel offers them: the ioctls of `/dev/net/tun`, of network interfaces, and a vectored write.
//!
//! Only the calls, each with the kernel's own error; what an operator is told about a failure is `port::tap`'s matter.
//! Constants and argument types are those of linux/if_tun.h and linux/sockios.h.

#![allow(unsafe_code)] // ioctl(2) with its untyped argument, and writev(2) from memory that is no Rust slice.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::str::FromStr;

/// The name of a network interface of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InterfaceName([u8; libc::IFNAMSIZ]);

/// Text that cannot name a network interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not an interface name: use 1 to 15 visible ASCII characters without / : and %")]
pub struct InterfaceNameError(String);

impl InterfaceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|&b| b == 0).unwrap_or(self.0.len());
        std::str::from_utf8(&self.0[..end]).unwrap_or("?")
    }

    /// An interface request that names this interface, its argument all zero.
    fn request(&self) -> libc::ifreq {
        // SAFETY: ifreq is plain old data of integers, arrays and a raw pointer; all zero bytes are valid for each.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.0) {
            *to = from as libc::c_char;
        }
        request
    }
}

impl FromStr for InterfaceName {
    type Err = InterfaceNameError;

    /// The kernel's rules (`dev_valid_name` in net/core/dev.c), without `%`, which TUNSETIFF takes for a pattern, and
    /// without the bytes outside of ASCII that it would tolerate.
    fn from_str(text: &str) -> Result<Self, InterfaceNameError> {
        let good = (1..libc::IFNAMSIZ).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'))
            && text != "."
            && text != "..";
        if !good {
            return Err(InterfaceNameError(text.chars().take(80).collect()));
        }
        let mut name = [0; libc::IFNAMSIZ];
        name[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self(name))
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Attaches `tun`, a fresh descriptor of `/dev/net/tun`, to TAP interface `name` with one queue and virtio-net headers;
/// the interface is made if there is none.
///
/// # Errors
/// `EPERM` without CAP_NET_ADMIN (unless the interface exists and is the caller's), `EBUSY` if another process has the
/// interface's queue, `EINVAL` if the name is that of another kind of interface or of a multi-queue TAP
/// (`tun_set_iff` in drivers/net/tun.c).
pub fn attach(tun: BorrowedFd<'_>, name: &InterfaceName) -> io::Result<()> {
    let mut request = name.request();
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    interface_request(tun, libc::TUNSETIFF, &mut request)
}

/// The interface that `tun` is attached to, under its name of now, and whether it outlives the descriptor.
///
/// # Errors
/// `EBADFD` once the interface was deleted.
pub fn attached(tun: BorrowedFd<'_>) -> io::Result<(InterfaceName, bool)> {
    // SAFETY: ifreq is plain old data; all zero bytes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    interface_request(tun, libc::TUNGETIFF, &mut request)?;
    // SAFETY: TUNGETIFF fills in `ifru_flags` (tun_get_iff); any bit pattern is a valid short.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(request.ifr_name) {
        *to = from as u8;
    }
    Ok((InterfaceName(name), flags & libc::IFF_PERSIST != 0))
}

/// Sets how many bytes of virtio-net header stand before each frame of `tun`.
///
/// # Errors
/// What the kernel says: it takes lengths from 10 on.
pub fn set_header_len(tun: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    int_request(tun, libc::TUNSETVNETHDRSZ, bytes as libc::c_int)
}

/// Makes the fields of those headers little-endian whatever the CPU, as virtio 1 has them.
///
/// # Errors
/// `EINVAL` from kernels before 4.1, where they have the CPU's own order.
pub fn set_header_little_endian(tun: BorrowedFd<'_>) -> io::Result<()> {
    int_request(tun, libc::TUNSETVNETLE, 1)
}

/// Tells the kernel which offloads (`TUN_F_*`) the reader of `tun` can do. With 0 it hands over frames that are complete.
///
/// # Errors
/// `EINVAL` if it does not know one of them.
pub fn set_offloads(tun: BorrowedFd<'_>, offloads: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value (`__tun_chr_ioctl` calls set_offload(tun, arg)); no memory is
    // passed, and `tun` is open for the borrow.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) };
    done(result as isize).map(drop)
}

/// A socket through which the interfaces of the network namespace it was made in can be asked and changed.
#[derive(Debug)]
pub struct InterfaceControl(OwnedFd);

impl InterfaceControl {
    /// A socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// What the kernel says when it cannot make a socket.
    pub fn open() -> io::Result<Self> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
        Ok(Self(socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?))
    }

    /// The interface's flags, `IFF_*`.
    ///
    /// # Errors
    /// `ENODEV` if there is no such interface.
    pub fn flags(&self, name: &InterfaceName) -> io::Result<libc::c_int> {
        let mut request = name.request();
        interface_request(self.0.as_fd(), libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: SIOCGIFFLAGS fills in `ifru_flags` (netdevice(7)); any bit pattern is a valid short.
        Ok(libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags }))
    }

    /// Replaces the interface's flags.
    ///
    /// # Errors
    /// `EPERM` without CAP_NET_ADMIN, `ENODEV` if there is no such interface.
    pub fn set_flags(&self, name: &InterfaceName, flags: libc::c_int) -> io::Result<()> {
        let mut request = name.request();
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        interface_request(self.0.as_fd(), libc::SIOCSIFFLAGS, &mut request)
    }

    /// The interface's MTU, in bytes.
    ///
    /// # Errors
    /// `ENODEV` if there is no such interface.
    pub fn mtu(&self, name: &InterfaceName) -> io::Result<u32> {
        let mut request = name.request();
        interface_request(self.0.as_fd(), libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: SIOCGIFMTU fills in `ifru_mtu` (netdevice(7)); any bit pattern is a valid int.
        Ok(unsafe { request.ifr_ifru.ifru_mtu } as u32)
    }

    /// Sets the interface's MTU, in bytes.
    ///
    /// # Errors
    /// `EPERM` without CAP_NET_ADMIN, `EINVAL` if the interface cannot have it, `ENODEV` if there is no such interface.
    pub fn set_mtu(&self, name: &InterfaceName, mtu: u16) -> io::Result<()> {
        let mut request = name.request();
        request.ifr_ifru.ifru_mtu = libc::c_int::from(mtu);
        interface_request(self.0.as_fd(), libc::SIOCSIFMTU, &mut request)
    }
}

/// An ioctl whose argument is a `struct ifreq`. Private, and every caller above passes such a request.
fn interface_request(fd: BorrowedFd<'_>, request: libc::Ioctl, argument: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the requests used in this file read and write at most one ifreq behind the pointer; `argument` is one,
    // exclusively borrowed for the call. `fd` is open for the borrow; a descriptor of another kind answers ENOTTY.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    done(result as isize).map(drop)
}

/// An ioctl that reads one int. Private, and every caller above passes such a request.
fn int_request(fd: BorrowedFd<'_>, request: libc::Ioctl, argument: libc::c_int) -> io::Result<()> {
    // SAFETY: the requests used in this file read one int behind the pointer, which is valid for the call. `fd` is open
    // for the borrow.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_ref(&argument)) };
    done(result as isize).map(drop)
}

/// The result of a system call, or its error.
fn done(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Moves the calling thread, and only it, into a fresh network namespace, which ends with the thread and the children
/// and sockets it leaves behind.
///
/// # Panics
/// Without CAP_SYS_ADMIN: tests that need a namespace run as root.
#[cfg(test)]
pub(crate) fn enter_fresh_network_namespace() {
    // SAFETY: CLONE_NEWNET changes what the thread's later sockets belong to, nothing that memory safety rests on (the
    // call is unsafe because of CLONE_FILES).
    let result = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
    if let Err(error) = result {
        panic!("this test needs a network namespace of its own, so run it as root (unshare: {error})");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_those_that_the_kernel_takes() {
        for good in ["lc0", "a", "tap-vm1.eth0_x", "123456789012345"] {
            assert_eq!(good.parse::<InterfaceName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "1234567890123456", "a/b", "a:1", "tap%d", "a b", "ä", "a\n"] {
            assert!(bad.parse::<InterfaceName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_missing_interface_is_the_kernels_error() {
        let control = InterfaceControl::open().unwrap();
        let name = "lc-not-here".parse().unwrap();
        assert_eq!(control.flags(&name).unwrap_err().raw_os_error(), Some(libc::ENODEV));
        assert_eq!(control.mtu(&name).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }
}
