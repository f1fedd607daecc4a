#![forbid(unsafe_code)]
//! Networks behind the cards: where frames go to and come from.

use std::io;
use std::os::fd::BorrowedFd;

use crate::error::Result;
use crate::sys::io::IoList;

mod ether;
mod offload;
mod packet;
#[cfg(any(test, feature = "internals"))]
pub(crate) mod pair;
pub(crate) mod switch;
mod tap;

pub(crate) use tap::Tap;

/// The bytes in front of each frame: Linux's `struct virtio_net_hdr_v1`, what a tap interface calls the
/// vnet header. It says what is left to do on the frame (checksums, segmentation).
pub(crate) const HEADER_LEN: usize = 12;

/// An Ethernet header.
pub(crate) const MIN_FRAME: usize = 14;

/// The longest frame without the header in front: an IP packet of 64 KiB, an Ethernet header, two tags.
pub(crate) const MAX_FRAME: usize = 65_535 + MIN_FRAME + 8;

/// Where a card's frames go to and come from.
///
/// One device owns it and calls it on one thread at a time. A frame is one message: a header of
/// [`HEADER_LEN`] bytes and the frame's bytes. Nothing here blocks.
/// What is read is the device's to deliver; what a device does not read stays, as far as the other
/// side has room, and is dropped there beyond it.
pub(crate) trait NetBackend: Send {
    /// Reads the next frame into `room`, whose list is at least as long as the longest frame; its length
    /// with the header. The header asks for nothing that was not offered.
    ///
    /// # Errors
    /// `WouldBlock` when there is none. Anything else: the other side is gone, until [`reopen`](Self::reopen) succeeds.
    fn receive(&mut self, room: &IoList<'_>) -> io::Result<usize>;

    /// Sends one frame.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room: the same frame comes again when the fd is writable. Anything
    /// else: this frame is lost, and the next may well pass.
    fn send(&mut self, frame: &IoList<'_>) -> io::Result<()>;

    /// Polls readable while a frame waits, writable while there is room, and with an error when the
    /// other side is gone. Another one after `reopen`.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Whether the other side is gone for good, so that only `reopen` helps. Asked when a frame was lost.
    fn is_gone(&self) -> bool;

    /// Looks whether the other side is there (again), with the fd in no epoll set. Called about once a second while it is not.
    ///
    /// # Errors
    /// It is not; the text says why.
    fn reopen(&mut self) -> Result<()>;
}
