#![forbid(unsafe_code)]
//! A connected Unix socket that keeps messages apart: one message is one frame.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::NetBackend;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fd;
use crate::sys::io::{IoList, receive_message, send};

/// One end; the embedder has the other.
pub(crate) struct Socket {
    fd: OwnedFd,
    id: String,
}

impl Socket {
    /// `fd`, which is such a socket, for the card `id`.
    pub fn on(id: &str, fd: OwnedFd) -> Self {
        Self { fd, id: id.to_owned() }
    }
}

impl NetBackend for Socket {
    fn receive(&mut self, room: &IoList<'_>) -> io::Result<usize> {
        match receive_message(self.fd.as_fd(), room)? {
            // An empty message, or the end of all.
            0 if self.is_gone() => Err(io::Error::from_raw_os_error(libc::ENOTCONN)),
            len => Ok(len),
        }
    }

    fn send(&mut self, frame: &IoList<'_>) -> io::Result<()> {
        send(self.fd.as_fd(), frame).map(drop)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn is_gone(&self) -> bool {
        fd::is_hung_up(self.fd.as_fd())
    }

    fn reopen(&mut self) -> Result<()> {
        if !self.is_gone() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotFound, format!("{}: the other end of its socket was closed", self.id)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;
    use crate::sys::io::Pieces;

    fn frame_of(socket: &mut Socket) -> io::Result<Vec<u8>> {
        let (mut bytes, mut pieces) = (vec![0; 100], Pieces::default());
        let mut list = pieces.list();
        list.push_room(&mut bytes);
        let len = socket.receive(&list)?;
        bytes.truncate(len);
        Ok(bytes)
    }

    #[test]
    fn a_message_is_a_frame_and_nothing_else_is_adopted() {
        let (near, far) = UnixDatagram::pair().unwrap();
        let mut socket = Socket::on("net0", near.into());
        far.send(b"a frame").unwrap();
        far.send(b"").unwrap();
        assert_eq!(frame_of(&mut socket).unwrap(), b"a frame");
        assert_eq!(frame_of(&mut socket).unwrap(), b"", "an empty message is a runt, not an end");
        far.send(&[7; 300]).unwrap();
        let (mut bytes, mut pieces) = ([0; 100], Pieces::default());
        let mut list = pieces.list();
        list.push_room(&mut bytes);
        assert_eq!(socket.receive(&list).unwrap(), 300, "one that is too long says so");
        assert_eq!(frame_of(&mut socket).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        list.push_bytes(b"back");
        socket.send(&list).unwrap();
        let mut back = [0; 8];
        assert_eq!((far.recv(&mut back).unwrap(), &back[..4]), (4, &b"back"[..]));
        assert!(socket.reopen().is_ok() && !socket.is_gone());

        let kind = |fd: BorrowedFd<'_>| fd::unix_socket(fd).unwrap();
        assert_eq!(kind(far.as_fd()), Some(fd::UnixSocket::Messages));
        assert_eq!(kind(UnixStream::pair().unwrap().0.as_fd()), Some(fd::UnixSocket::Stream));
        assert_eq!(kind(std::fs::File::open("/dev/null").unwrap().as_fd()), None);
        assert_eq!(kind(std::net::UdpSocket::bind("127.0.0.1:0").unwrap().as_fd()), None);
    }

    #[test]
    fn a_peer_that_closes_is_gone_for_good() {
        let (near, far) = fd::sequence_pair().unwrap();
        let mut socket = Socket::on("net0", near);
        assert_eq!(frame_of(&mut socket).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(far);
        assert_eq!(frame_of(&mut socket).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
        assert!(socket.is_gone());
        assert!(socket.reopen().unwrap_err().to_string().contains("net0"));
    }
}
