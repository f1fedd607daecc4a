#![forbid(unsafe_code)]
//! A network of two ends, for tests: frames put in at one end come out at the other. It can be cut.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use super::{NetBackend, Offloads};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::io::{IoList, read, write};
use crate::sys::lock;

/// The device's end.
pub(crate) struct Pair {
    socket: UnixDatagram,
    control: Control,
}

/// The far end, and the scissors.
#[derive(Clone)]
pub(crate) struct Control {
    pub far: Arc<UnixDatagram>,
    /// What every call fails with; 0 for none.
    pub errno: Arc<AtomicI32>,
    /// What the next `reopen` finds.
    pub next: Arc<Mutex<Option<UnixDatagram>>>,
    /// What it knows, in bits, and what a driver takes of it.
    pub known: Arc<AtomicU32>,
    #[cfg_attr(not(test), allow(dead_code, reason = "tests look"))]
    pub taken: Arc<AtomicU32>,
    /// How often it was called.
    #[cfg_attr(not(test), allow(dead_code, reason = "tests count"))]
    pub looks: Arc<AtomicU32>,
}

impl Pair {
    #[cfg(test)]
    pub fn new() -> (Self, Control) {
        Self::open().unwrap()
    }

    pub fn open() -> io::Result<(Self, Control)> {
        let (near, far) = UnixDatagram::pair()?;
        near.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        let (errno, next, looks, taken) = Default::default();
        let known = Arc::new(AtomicU32::new(Offloads::all().bits()));
        let control = Control { far: Arc::new(far), errno, next, known, taken, looks };
        Ok((Self { socket: near, control: control.clone() }, control))
    }

    fn check(&self) -> io::Result<()> {
        match self.control.errno.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

#[cfg(test)]
impl Control {
    /// A frame of the far end's: a header of zeroes and these bytes.
    pub fn put(&self, frame: &[u8]) {
        self.far.send(&[&[0; 12], frame].concat()).unwrap();
    }

    /// The next frame that the device has sent, with its header.
    pub fn get(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 70_000];
        let len = self.far.recv(&mut bytes).ok()?;
        bytes.truncate(len);
        Some(bytes)
    }
}

impl NetBackend for Pair {
    fn receive(&mut self, room: &IoList<'_>) -> io::Result<usize> {
        self.check()?;
        read(self.socket.as_fd(), room)
    }

    fn send(&mut self, frame: &IoList<'_>) -> io::Result<()> {
        self.check()?;
        write(self.socket.as_fd(), frame).map(drop)
    }

    fn offloads(&self) -> Offloads {
        Offloads::from_bits_truncate(self.control.known.load(Ordering::SeqCst))
    }

    fn set_offloads(&mut self, taken: Offloads) {
        self.control.taken.store(taken.bits(), Ordering::SeqCst);
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn is_gone(&self) -> bool {
        self.control.errno.load(Ordering::SeqCst) == libc::EBADFD
    }

    fn reopen(&mut self) -> Result<()> {
        self.control.looks.fetch_add(1, Ordering::SeqCst);
        match lock(&self.control.next).take() {
            Some(socket) => {
                let ready = socket.set_nonblocking(true);
                ready.map_err(|e| Error::os("opening the pair again", e))?;
                self.socket = socket;
                self.control.errno.store(0, Ordering::SeqCst);
                Ok(())
            }
            None if self.check().is_ok() => Ok(()),
            None => Err(Error::new(ErrorKind::NotFound, "cut")),
        }
    }
}
