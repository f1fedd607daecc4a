#![forbid(unsafe_code)]
//! An embedder's fd, read or written without waiting, and without touching its flags.
//!
//! `O_NONBLOCK` belongs to the open file description, which the embedder goes on using, and often its
//! shell too. So each kind of file has its own way:
//! - sockets: `MSG_DONTWAIT`, per call;
//! - pipes, FIFOs and terminals: opened a second time through `/proc/self/fd`, which makes a description
//!   of our own that may be non-blocking;
//! - where that is refused (no `/proc`, another owner), and for the master end of a pseudo-terminal
//!   (opening it again makes another terminal): `poll` first, then no more than a file that polls
//!   writable takes at once. Somebody else who fills it between the two makes our write wait for room;
//!   nothing that Linux 6.1 offers prevents that (`RWF_NOWAIT` works on pipes from 6.4 on only);
//! - regular files, disks, `/dev/null`: directly; they do not wait for anybody, and epoll refuses them.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use crate::sys::fd;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

pub(super) struct Stream {
    file: File,
    way: Way,
}

#[derive(Debug, PartialEq, Eq)]
enum Way {
    Socket,
    /// The description is non-blocking.
    NonBlocking,
    /// Ask first, and write at most this much.
    Poll(usize),
    Direct,
}

/// What a pipe that polls writable takes without waiting: a whole page, `PIPE_BUF`.
const PIPE_PIECE: usize = 4096;
/// A terminal that polls writable has room for at least this much.
const TERMINAL_PIECE: usize = 1;

/// `st_rdev` of the master ends of pseudo-terminals (5:2).
const PTMX: u64 = 5 << 8 | 2;
/// The major number of `/dev/null`, `/dev/zero` and `/dev/full`.
const MEMORY_DEVICES: u64 = 1;

impl Stream {
    pub fn new(fd: OwnedFd, direction: Direction) -> Self {
        let file = File::from(fd);
        let Ok(metadata) = file.metadata() else {
            return Self { file, way: Way::Poll(TERMINAL_PIECE) };
        };
        match fd::permits(file.as_fd(), direction == Direction::Write) {
            Ok(true) => {}
            // Opening it again could give more than we were given. This way the first call fails.
            Ok(false) => return Self { file, way: Way::Direct },
            Err(_) => return Self { file, way: Way::Poll(TERMINAL_PIECE) },
        }
        let kind = metadata.file_type();
        let is_terminal = file.is_terminal() && metadata.rdev() != PTMX;
        if (kind.is_fifo() || is_terminal)
            && let Some(file) = reopen(&file, &metadata, direction)
        {
            return Self { file, way: Way::NonBlocking };
        }
        let way = if kind.is_socket() {
            Way::Socket
        } else if kind.is_file() || kind.is_block_device() || metadata.rdev() >> 8 == MEMORY_DEVICES {
            Way::Direct
        } else if fd::is_nonblocking(file.as_fd()) {
            Way::NonBlocking
        } else if kind.is_fifo() {
            Way::Poll(PIPE_PIECE)
        } else {
            Way::Poll(TERMINAL_PIECE)
        };
        Self { file, way }
    }

    /// Writes some of `bytes`; `WouldBlock` when nothing can be written now.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self.way {
            Way::Socket => fd::send(self.file.as_fd(), bytes),
            Way::Poll(_) if !fd::is_writable(self.file.as_fd()) => Err(ErrorKind::WouldBlock.into()),
            Way::Poll(piece) => (&self.file).write(&bytes[..bytes.len().min(piece)]),
            Way::NonBlocking | Way::Direct => (&self.file).write(bytes),
        }
    }

    /// Reads some bytes; 0 at the end, `WouldBlock` when there is nothing now.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.way {
            Way::Socket => fd::receive(self.file.as_fd(), buffer),
            Way::Poll(_) if !fd::is_readable(self.file.as_fd()) => Err(ErrorKind::WouldBlock.into()),
            Way::Poll(_) | Way::NonBlocking | Way::Direct => (&self.file).read(buffer),
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// The same file with a description of our own.
fn reopen(file: &File, metadata: &Metadata, direction: Direction) -> Option<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let again = OpenOptions::new()
        .read(direction == Direction::Read)
        .write(direction == Direction::Write)
        .custom_flags(fd::NONBLOCKING_OPEN)
        .open(path)
        .ok()?;
    // A /proc of somebody else's, in a container, would give somebody else's file.
    let found = again.metadata().ok()?;
    (found.dev() == metadata.dev() && found.ino() == metadata.ino()).then_some(again)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(fd: impl Into<OwnedFd>, direction: Direction) -> Way {
        Stream::new(fd.into(), direction).way
    }

    #[test]
    fn each_kind_of_file_has_its_way() {
        let (reader, writer) = io::pipe().unwrap();
        assert_eq!(way(writer, Direction::Write), Way::NonBlocking);
        assert_eq!(way(reader.try_clone().unwrap(), Direction::Read), Way::NonBlocking);
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(way(socket, Direction::Write), Way::Socket);
        assert_eq!(way(File::open("/dev/null").unwrap(), Direction::Read), Way::Direct);
        let (master, slave) = fd::pty().unwrap();
        assert_eq!(way(master.try_clone().unwrap(), Direction::Write), Way::Poll(TERMINAL_PIECE));
        assert_eq!(way(slave, Direction::Read), Way::NonBlocking);
    }

    #[test]
    fn the_embedders_flags_stay() {
        let (reader, writer) = io::pipe().unwrap();
        let stream = Stream::new(writer.try_clone().unwrap().into(), Direction::Write);
        assert!(fd::is_nonblocking(stream.file.as_fd()));
        assert!(!fd::is_nonblocking(writer.as_fd()) && !fd::is_nonblocking(reader.as_fd()));
    }

    #[test]
    fn no_access_is_gained_by_opening_again() {
        let (reader, _writer) = io::pipe().unwrap();
        let stream = Stream::new(reader.into(), Direction::Write);
        assert_eq!(stream.write(b"x").unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    /// Without the second description: a pipe of another owner, the master end of a terminal.
    #[test]
    fn a_polled_pipe_and_terminal_never_wait() {
        let (_reader, writer) = io::pipe().unwrap();
        let (master, _slave) = fd::pty().unwrap();
        let pipe = Stream { file: File::from(OwnedFd::from(writer)), way: Way::Poll(PIPE_PIECE) };
        let written: usize = std::iter::from_fn(|| pipe.write(&[b'x'; 5000]).ok()).sum();
        assert!(written >= PIPE_PIECE, "{written}");
        assert_eq!(pipe.write(b"x").unwrap_err().kind(), ErrorKind::WouldBlock);
        let terminal = Stream { file: File::from(master), way: Way::Poll(TERMINAL_PIECE) };
        for _ in 0..5000 {
            if let Err(error) = terminal.write(&[b'x'; 5000]) {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
            }
        }
    }
}
