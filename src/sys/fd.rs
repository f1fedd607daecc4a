//! File descriptors.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::EventFd;

use super::log;

/// An eventfd's descriptor with its lifetime (vmm-sys-util offers the number only).
pub(crate) fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd keeps the descriptor open for as long as the borrow of it lives.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// The same for an epoll set.
pub(crate) fn borrow_epoll(set: &Epoll) -> BorrowedFd<'_> {
    // SAFETY: as above.
    unsafe { BorrowedFd::borrow_raw(set.as_raw_fd()) }
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

/// Whether a write of one byte would not block, or would report an error, right now.
pub(crate) fn is_writable(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one initialized pollfd, and the count says so; a zero timeout does not block.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    ready > 0 && poll.revents & (libc::POLLOUT | libc::POLLHUP | libc::POLLERR) != 0
}

/// Whether the description is non-blocking already.
pub(crate) fn is_nonblocking(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: F_GETFL takes no argument and touches no memory of ours.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    flags >= 0 && flags & libc::O_NONBLOCK != 0
}

/// Whether the description was opened for reading, or for writing.
pub(crate) fn permits(fd: BorrowedFd<'_>, write: bool) -> io::Result<bool> {
    // SAFETY: F_GETFL takes no argument and touches no memory of ours.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    let mode = flags & libc::O_ACCMODE;
    Ok(flags & libc::O_PATH == 0 && (mode == libc::O_RDWR || (mode == libc::O_WRONLY) == write))
}

/// Whether every write goes to the end of the file, wherever it is meant to go.
pub(crate) fn appends(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: F_GETFL takes no argument and touches no memory of ours.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    flags >= 0 && flags & libc::O_APPEND != 0
}

/// Kinds of Unix sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnixSocket {
    /// Keeps messages apart.
    Messages,
    /// Does not.
    Stream,
}

/// Which kind of Unix socket it is, if it is one.
pub(crate) fn unix_socket(fd: BorrowedFd<'_>) -> io::Result<Option<UnixSocket>> {
    match option(fd, libc::SO_DOMAIN) {
        Ok(libc::AF_UNIX) => {}
        Err(error) if error.raw_os_error() != Some(libc::ENOTSOCK) => return Err(error),
        _ => return Ok(None),
    }
    Ok(match option(fd, libc::SO_TYPE)? {
        libc::SOCK_DGRAM | libc::SOCK_SEQPACKET => Some(UnixSocket::Messages),
        libc::SOCK_STREAM => Some(UnixSocket::Stream),
        _ => None,
    })
}

/// A number that a socket has of itself.
fn option(fd: BorrowedFd<'_>, name: libc::c_int) -> io::Result<libc::c_int> {
    let (mut value, mut len): (libc::c_int, libc::socklen_t) = (0, size_of::<libc::c_int>() as _);
    let at = std::ptr::from_mut(&mut value).cast();
    // SAFETY: room for one int, and the length says so.
    let done = unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, at, &mut len) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Whether the other end has closed, so that nothing will come any more.
pub(crate) fn is_hung_up(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one initialized pollfd, and the count says so; a zero timeout does not block.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    ready > 0 && poll.revents & libc::POLLHUP != 0
}

/// Flags to open a pipe or a terminal with, so that neither opening nor using it waits, and no terminal
/// becomes the process's own.
pub(crate) const NONBLOCKING_OPEN: i32 = libc::O_NONBLOCK | libc::O_NOCTTY;

/// Sends on a socket without waiting and without SIGPIPE.
pub(crate) fn send(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the pointer and the length are those of one live slice, which the kernel only reads.
    let count = unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Receives from a socket without waiting.
pub(crate) fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let (at, len) = (buffer.as_mut_ptr().cast(), buffer.len());
    // SAFETY: the pointer and the length are those of one live slice, borrowed for writing.
    let count = unsafe { libc::recv(fd.as_raw_fd(), at, len, libc::MSG_DONTWAIT) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Connects to who listens at `path`, without waiting for it to have room: `WouldBlock`.
pub(crate) fn connect_at_once(path: &Path) -> io::Result<OwnedFd> {
    // SAFETY: all zeroes is an address, an empty one.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let bytes = path.as_os_str().as_bytes();
    // The last byte stays 0; one that begins with it is no path.
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: integers go in.
    let socket = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made it, and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let size = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the kernel reads one address, whose size is said.
    let done = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// Adds one to an eventfd's count. Where that is at the top, it rings already; nothing else fails here, unless a filter or a tracer has it fail
/// once: whoever waits for the bell would wait for good.
pub(crate) fn ring(bell: &EventFd) {
    if (0..3).all(|_| bell.write(1).is_err()) {
        log::error!("an eventfd takes nothing");
    }
}

/// A new pseudo-terminal: its master end and its slave end.
#[cfg(test)]
pub(crate) fn pty() -> io::Result<(OwnedFd, OwnedFd)> {
    use std::ptr::null_mut;
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: two valid places for the descriptors; name and settings may be NULL.
    if unsafe { libc::openpty(&mut master, &mut slave, null_mut(), null_mut(), null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above has just made both, and nobody else knows them.
    unsafe { Ok((OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave))) }
}

/// Two connected sockets that keep messages apart and tell when the other end is gone.
#[cfg(test)]
pub(crate) fn sequence_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut pair = [-1; 2];
    // SAFETY: room for two descriptors.
    let made = unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, pair.as_mut_ptr())
    };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above has just made both, and nobody else knows them.
    unsafe { Ok((OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1]))) }
}

/// Waits until a read would not block, at most `timeout`.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, timeout: std::time::Duration) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // Upwards: in the last part of a millisecond a caller in a loop would only spin.
    let timeout = libc::c_int::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(libc::c_int::MAX);
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn nobody_waits_for_a_listener_that_is_busy() {
        let path = std::env::temp_dir().join(format!("vmbed-busy-{}", std::process::id()));
        let nobody = connect_at_once(&path).unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        // SAFETY: integers go in. From here on one may wait to be accepted, and no more.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
        let first = connect_at_once(&path).unwrap();
        assert_eq!(unix_socket(first.as_fd()).unwrap(), Some(UnixSocket::Stream));
        assert_eq!(connect_at_once(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(listener.accept().unwrap());
        drop(connect_at_once(&path).unwrap());
        std::fs::remove_file(path).unwrap();
        for bad in ["", "a\0b", &"x".repeat(108)] {
            assert_eq!(connect_at_once(Path::new(bad)).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
