//! The test's own ends of interfaces: a queue of a TAP interface that somebody else has opened, and frames from the host.
#![expect(unsafe_code, reason = "libc's structures")]

use std::fs::File;
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd};

fn done(result: i32, what: &str) -> i32 {
    assert!(result >= 0, "{what}: {}", Error::last_os_error());
    result
}

/// A queue of the TAP interface of that name, which is made.
pub fn tap(name: &str) -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: all zeroes is one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as libc::c_char);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives until the call returns.
    done(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }, "TUNSETIFF");
    file
}

/// What is written there goes out of the interface of that name: to whoever has it open.
pub fn packets(name: &str) -> File {
    let flags = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: integers go in, and the kernel gives a new descriptor, that nobody else knows.
    let file = unsafe { File::from_raw_fd(done(libc::socket(libc::AF_PACKET, flags, 0), "a packet socket")) };
    // SAFETY: all zeroes is one.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let name = std::ffi::CString::new(name).unwrap();
    address.sll_family = libc::AF_PACKET as u16;
    // SAFETY: a terminated string, which the call only reads.
    address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is of the length that is said, and lives until the call returns.
    done(unsafe { libc::bind(file.as_raw_fd(), (&raw const address).cast(), length) }, "binding it");
    file
}

/// Has the kernel keep as little as it can of what is sent there.
pub fn narrow(socket: &impl AsRawFd) {
    let (least, size): (libc::c_int, _) = (1, size_of::<libc::c_int>() as libc::socklen_t);
    let (fd, at) = (socket.as_raw_fd(), (&raw const least).cast());
    // SAFETY: one int, of the size that is said, which lives until the call returns.
    done(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, at, size) }, "SO_SNDBUF");
}

/// Whether the kernel keeps as much as it may of what was sent there, and the next one would have to wait.
pub fn is_full(socket: &impl AsRawFd) -> bool {
    let (mut kept, mut room): (libc::c_int, libc::c_int) = (0, 0);
    let mut size = size_of::<libc::c_int>() as libc::socklen_t;
    let (fd, at) = (socket.as_raw_fd(), (&raw mut room).cast());
    // SAFETY: one int for each, of the size that is said, which live until the calls return.
    unsafe {
        done(libc::ioctl(fd, libc::TIOCOUTQ, &raw mut kept), "SIOCOUTQ");
        done(libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, at, &raw mut size), "SO_SNDBUF");
    }
    kept >= room
}
