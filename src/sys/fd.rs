//! File descriptors.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

/// An eventfd's descriptor with its lifetime (vmm-sys-util offers the number only).
pub(crate) fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd keeps the descriptor open for as long as the borrow of it lives.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Whether a read would not block, or would report an error or the end, right now.
pub(crate) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one initialized pollfd, and the count says so; a zero timeout does not block.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    ready > 0 && poll.revents & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0
}

/// A close-on-exec duplicate: what an embedder hands us stays the embedder's.
pub(crate) fn duplicate(fd: impl AsFd) -> std::io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}

/// Waits until a read would not block, at most `timeout`.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, timeout: std::time::Duration) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let timeout = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: one initialized pollfd, and the count says so.
    unsafe { libc::poll(&mut poll, 1, timeout) > 0 }
}

/// Makes reads and writes return at once. Of an adopted descriptor: its owner shares that setting.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> std::io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL pass integers only.
    let done = unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        if flags < 0 { flags } else { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) }
    };
    if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}
