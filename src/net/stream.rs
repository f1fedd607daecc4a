#![forbid(unsafe_code)]
//! The stream protocol of QEMU's `-netdev stream`, which passt speaks: over a connected Unix socket, each frame behind its
//! length in four bytes, the most significant first, and without a header of virtio's.

use std::io::{self, ErrorKind::Interrupted, ErrorKind::WouldBlock};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::{HEADER_LEN, MAX_FRAME, MIN_FRAME, NetBackend, Offloads};
use crate::error::{Error, ErrorKind, Result};
use crate::reactor::Place;
use crate::sys::fd;
use crate::sys::io::{IoList, Pieces, receive, send};
use crate::sys::log;

/// The length in front of a frame.
const PREFIX: usize = 4;

/// One end; a user-mode network has the other.
pub(crate) struct Stream {
    fd: OwnedFd,
    id: String,
    /// Where the other end listens, to find it again; `None` where somebody else has connected.
    path: Option<PathBuf>,
    /// Where it is looked for.
    opens: Place,
    /// The frame that is coming: its length, as far as it is there, and then its bytes.
    coming: Vec<u8>,
    /// What is left to send of the frame that was begun last.
    left: Vec<u8>,
    /// That frame will be handed over again when there is room: it was not said to be sent.
    again: bool,
    pieces: Pieces,
}

impl Stream {
    /// Connects the card `id` with who listens at `path`.
    ///
    /// # Errors
    /// Nobody listens there, or it is not ours to connect to.
    pub fn connect(id: &str, path: PathBuf) -> Result<Self> {
        // It may have to wait until somebody takes it, and a signal of the embedder's come between.
        let socket = loop {
            match UnixStream::connect(&path) {
                Err(error) if error.kind() == Interrupted => {}
                result => break result,
            }
        };
        let socket = socket.map_err(|e| not_connected(id, &path, e))?;
        Ok(Self { path: Some(path), ..Self::on(id, socket.into()) })
    }

    /// The same, which connects again there when the other end has gone: whoever serves it may be allowed to connect to nothing.
    pub fn reopened_at(self, opens: Place) -> Self {
        Self { opens, ..self }
    }

    /// `fd`, which is such a socket, for the card `id`.
    pub fn on(id: &str, fd: OwnedFd) -> Self {
        let (coming, left) = (Vec::with_capacity(PREFIX + MAX_FRAME), Vec::new());
        let (id, opens, pieces) = (id.to_owned(), Place::Caller, Pieces::default());
        Self { fd, id, path: None, opens, coming, left, again: false, pieces }
    }

    /// Takes bytes until there are so many of what is coming.
    fn fill_to(&mut self, wanted: usize) -> io::Result<()> {
        while self.coming.len() < wanted {
            let at = self.coming.len();
            self.coming.resize(wanted, 0);
            let got = fd::receive(self.fd.as_fd(), &mut self.coming[at..]);
            self.coming.truncate(at + *got.as_ref().unwrap_or(&0));
            if got? == 0 {
                return Err(io::Error::from_raw_os_error(libc::ENOTCONN));
            }
        }
        Ok(())
    }

    /// Sends what was begun.
    fn send_left(&mut self) -> io::Result<()> {
        while !self.left.is_empty() {
            let count = fd::send(self.fd.as_fd(), &self.left)?;
            self.left.drain(..count);
        }
        Ok(())
    }
}

fn not_connected(id: &str, path: &Path, error: io::Error) -> Error {
    let why = format!("{id}: connecting to {}: nobody listens there, or not for us", path.display());
    Error::os(why, error)
}

impl NetBackend for Stream {
    fn receive(&mut self, room: &IoList<'_>) -> io::Result<usize> {
        self.fill_to(PREFIX)?;
        let length = self.coming[..PREFIX].try_into().map_or(0, u32::from_be_bytes) as usize;
        if !(MIN_FRAME..=MAX_FRAME).contains(&length) {
            // Where the next begins, nobody knows.
            let error =
                format!("{}: its peer sends a frame of {length} bytes: it is no such network", self.id);
            log::warn!("{error}");
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        room.copy_from(0, &[0; HEADER_LEN])?;
        if self.coming.len() == PREFIX && room.len() >= HEADER_LEN + length {
            // Straight to where it belongs, if all of it is there.
            let got = receive(self.fd.as_fd(), &room.part(&mut self.pieces, HEADER_LEN, length))?;
            if got == length {
                self.coming.clear();
                return Ok(HEADER_LEN + length);
            }
            if got == 0 {
                return Err(io::Error::from_raw_os_error(libc::ENOTCONN));
            }
            self.coming.resize(PREFIX + got, 0);
            room.copy_to(HEADER_LEN, &mut self.coming[PREFIX..]);
        }
        self.fill_to(PREFIX + length)?;
        room.copy_from(HEADER_LEN, &self.coming[PREFIX..])?;
        self.coming.clear();
        Ok(HEADER_LEN + length)
    }

    fn send(&mut self, frame: &IoList<'_>) -> io::Result<()> {
        self.send_left()?;
        if std::mem::take(&mut self.again) {
            return Ok(());
        }
        let length = frame.len().saturating_sub(HEADER_LEN);
        let prefix = (length as u32).to_be_bytes();
        let mut list = frame.part(&mut self.pieces, HEADER_LEN, length);
        list.push_front_bytes(&prefix);
        let sent = send(self.fd.as_fd(), &list)?;
        if sent == PREFIX + length {
            return Ok(());
        }
        // Kept here, since the driver may change it; it is said to be sent when it is.
        self.left.resize(PREFIX + length, 0);
        self.left[..PREFIX].copy_from_slice(&prefix);
        frame.copy_to(HEADER_LEN, &mut self.left[PREFIX..]);
        self.left.drain(..sent);
        self.again = true;
        Err(WouldBlock.into())
    }

    /// A driver begins: the frame that was begun is not one of its.
    fn set_offloads(&mut self, _: Offloads) {
        self.again = false;
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn is_gone(&self) -> bool {
        fd::is_hung_up(self.fd.as_fd())
    }

    fn reopen(&mut self) -> Result<()> {
        let Some(path) = self.path.clone() else {
            let why = format!(
                "{}: the other end of its socket was closed, or does not keep to the protocol",
                self.id
            );
            return Err(Error::new(ErrorKind::NotFound, why));
        };
        let to = path.clone();
        // Where who listens there is busy, it is tried again later: nobody waits for that.
        let socket = self.opens.run(move || fd::connect_at_once(&to))?;
        let socket = socket.map_err(|e| not_connected(&self.id, &path, e))?;
        *self = Self { path: Some(path), opens: self.opens.clone(), ..Self::on(&self.id, socket) };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    fn pair() -> (Stream, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Stream::on("net0", near.into()), far)
    }

    /// What is received, in pieces of that size and a last one with room for all.
    fn received(stream: &mut Stream, piece: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0xee; HEADER_LEN + MAX_FRAME];
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        let (first, last) = bytes.split_at_mut(10 * piece);
        first.chunks_mut(piece).for_each(|piece| list.push_room(piece));
        list.push_room(last);
        let length = stream.receive(&list)?;
        bytes.truncate(length);
        assert_eq!(bytes[..HEADER_LEN], [0; HEADER_LEN]);
        Ok(bytes.split_off(HEADER_LEN))
    }

    fn sends(stream: &mut Stream, frame: &[u8]) -> io::Result<()> {
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        list.push_bytes(&[0; HEADER_LEN]);
        list.push_bytes(frame);
        stream.send(&list)
    }

    fn behind_its_length(frame: &[u8]) -> Vec<u8> {
        [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
    }

    fn frame(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i * 7) as u8).collect()
    }

    fn is_empty(result: &io::Result<Vec<u8>>) -> bool {
        matches!(result, Err(error) if error.kind() == WouldBlock)
    }

    #[test]
    fn frames_come_however_they_are_cut() {
        let (mut stream, mut far) = pair();
        for length in [14, 60, 1514, MAX_FRAME] {
            let bytes = behind_its_length(&frame(length));
            far.write_all(&bytes).unwrap();
            assert_eq!(received(&mut stream, 9).unwrap(), frame(length));
            for cut in [1, 3, 4, 5, 14, length + 3] {
                far.write_all(&bytes[..cut]).unwrap();
                assert!(is_empty(&received(&mut stream, 100)), "{length} cut at {cut}");
                assert!(is_empty(&received(&mut stream, 100)), "nothing waits, so that nobody is woken");
                far.write_all(&bytes[cut..]).unwrap();
                assert_eq!(received(&mut stream, 7).unwrap(), frame(length), "cut at {cut}");
            }
        }
        let two = [behind_its_length(&frame(20)), behind_its_length(&frame(30))].concat();
        far.write_all(&two).unwrap();
        assert_eq!([20, 30].map(|n| received(&mut stream, 5).unwrap() == frame(n)), [true; 2]);
        assert!(is_empty(&received(&mut stream, 5)));
    }

    #[test]
    fn frames_go_however_little_room_there_is() {
        let (mut stream, mut far) = pair();
        let mut sent = 0;
        let mut expected = Vec::new();
        // Until there is no room: then the same frame again, until there is.
        while sends(&mut stream, &frame(1000 + sent)).is_ok() {
            expected.extend(behind_its_length(&frame(1000 + sent)));
            sent += 1;
        }
        let held = frame(1000 + sent);
        expected.extend(behind_its_length(&held));
        let mut got = vec![0; expected.len()];
        let mut at = 0;
        let mut told = 0;
        while at < expected.len() {
            let end = (at + 5000).min(expected.len());
            far.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
            at += far.read(&mut got[at..end]).unwrap();
            if told == 0 && sends(&mut stream, &held).is_ok() {
                told += 1;
            }
        }
        assert!(got == expected && told == 1 && stream.left.is_empty());
        sends(&mut stream, &frame(60)).unwrap();
        far.read_exact(&mut got[..64]).unwrap();
        assert_eq!(got[..64], behind_its_length(&frame(60)));
    }

    #[test]
    fn a_peer_that_sends_nonsense_or_ends_is_gone() {
        for length in [0u32, 13, MAX_FRAME as u32 + 1, u32::MAX] {
            let (mut stream, mut far) = pair();
            far.write_all(&length.to_be_bytes()).unwrap();
            assert_eq!(received(&mut stream, 9).unwrap_err().raw_os_error(), Some(libc::EPROTO));
        }
        let (mut stream, mut far) = pair();
        far.write_all(&behind_its_length(&frame(60))[..30]).unwrap();
        drop(far);
        assert_eq!(received(&mut stream, 9).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
        assert!(sends(&mut stream, &frame(60)).is_err() && stream.is_gone());
        assert!(stream.reopen().unwrap_err().to_string().contains("net0"));
    }

    #[test]
    fn who_listens_again_is_found_again() {
        let path = std::env::temp_dir().join(format!("vmbed-stream-{}", std::process::id()));
        let error = Stream::connect("net0", path.clone()).err().unwrap();
        assert!(
            error.kind() == ErrorKind::NotFound && error.to_string().contains("nobody listens"),
            "{error}"
        );
        let listener = UnixListener::bind(&path).unwrap();
        let mut stream = Stream::connect("net0", path.clone()).unwrap();
        drop(listener.accept().unwrap());
        assert!(stream.is_gone() && received(&mut stream, 9).is_err());
        stream.reopen().unwrap();
        let (mut far, _) = listener.accept().unwrap();
        far.write_all(&behind_its_length(&frame(60))).unwrap();
        assert_eq!(received(&mut stream, 9).unwrap(), frame(60));
        std::fs::remove_file(path).unwrap();
    }
}
