//! TAP interfaces: the ioctls of /dev/net/tun (linux/if_tun.h).

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// The state of a tun file descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attached {
    pub name: String,
    pub flags: i32,
}

/// Whether the kernel has an interface of that name in this network namespace.
///
/// # Errors
/// It cannot be asked.
pub(crate) fn interface_exists(name: &str) -> io::Result<bool> {
    let Ok(name) = CString::new(name) else { return Ok(false) };
    // SAFETY: a terminated string, which the call only reads.
    if unsafe { libc::if_nametoindex(name.as_ptr()) } != 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENODEV) { Ok(false) } else { Err(error) }
}

/// Attaches the descriptor to an interface (TUNSETIFF). Makes the interface where there is none: look
/// for it before.
pub(crate) fn attach(fd: BorrowedFd<'_>, name: &str, flags: i32) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives until the call returns.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

/// Makes an interface that stays until it is deleted (TUNSETPERSIST), for that user and group. EBUSY where there is one. It could be kept by
/// this descriptor instead, but then nobody else could attach to one with a single queue (EBUSY); and one with several, whose descriptor is
/// set aside (IFF_DETACH_QUEUE), would keep its carrier when no card is on it, so that its bridge went on sending there.
pub(crate) fn make(name: &str, several: bool, owner: Option<u32>, group: Option<u32>) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let queues = if several { libc::IFF_MULTI_QUEUE } else { 0 };
    attach(file.as_fd(), name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_TUN_EXCL | queues)?;
    let set = |request, number: u32| {
        // SAFETY: all of them take an integer.
        check(unsafe { libc::ioctl(file.as_raw_fd(), request, libc::c_ulong::from(number)) })
    };
    owner.map_or(Ok(()), |owner| set(libc::TUNSETOWNER, owner))?;
    group.map_or(Ok(()), |group| set(libc::TUNSETGROUP, group))?;
    set(libc::TUNSETPERSIST, 1)
}

/// What the descriptor is attached to (TUNGETIFF); EBADFD when it no longer is.
pub(crate) fn attached(fd: BorrowedFd<'_>) -> io::Result<Attached> {
    let mut request = request("")?;
    // SAFETY: TUNGETIFF writes one ifreq, which lives until the call returns.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    let name = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| char::from(*c as u8)).collect();
    // SAFETY: TUNGETIFF has set the flags, and any bytes are a valid short.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(Attached { name, flags: i32::from(flags as u16) })
}

/// The bytes of the header in front of each frame (TUNSETVNETHDRSZ).
pub(crate) fn set_header_size(fd: BorrowedFd<'_>, size: i32) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives until the call returns.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })
}

/// What the reader of the frames can finish by itself (TUNSETOFFLOAD).
pub(crate) fn set_offload(fd: BorrowedFd<'_>, offload: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes an integer.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload)) })
}

/// Attaches one of several queues to its interface again, or detaches it (TUNSETQUEUE). EINVAL where it is so already.
pub(crate) fn set_queue(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let mut request = request("")?;
    let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: TUNSETQUEUE reads one ifreq, which lives until the call returns.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) })
}

/// Puts the calling thread into a network namespace of its own, with nothing in it, for tests: what is made there goes with its last thread.
#[cfg(test)]
pub(crate) fn leave_network() -> io::Result<()> {
    // SAFETY: an integer goes in; what changes is this thread's.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an ifreq is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0: the kernel wants it terminated.
    if name.len() >= request.ifr_name.len() || name.bytes().any(|b| b == 0) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
