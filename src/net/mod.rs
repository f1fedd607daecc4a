#![forbid(unsafe_code)]
//! Networks behind the cards: where frames go to and come from.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::error::{Error, Result};
use crate::reactor::Place;
use crate::sys::fd::{self, UnixSocket};
use crate::sys::io::IoList;

mod ether;
mod offload;
mod packet;
#[cfg(any(test, feature = "internals"))]
pub(crate) mod pair;
mod socket;
mod stream;
pub(crate) mod switch;
mod tap;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod wiring;

pub use offload::Offloads;
use socket::Socket;
pub(crate) use stream::Stream;
pub(crate) use tap::Tap;

/// What is behind a descriptor of somebody else's, for the card or port `id`: a socket of messages, one of a stream, or a queue of a TAP
/// interface, which is attached to again by its name there when it has gone.
///
/// # Errors
/// It is none of them.
pub(crate) fn adopt(id: &str, fd: OwnedFd, opens: &Place) -> Result<Box<dyn NetBackend>> {
    let kind = fd::unix_socket(fd.as_fd())
        .map_err(|e| Error::os(format!("{id}: asking what its descriptor is (getsockopt)"), e))?;
    Ok(match kind {
        Some(UnixSocket::Messages) => Box::new(Socket::on(id, fd)),
        Some(UnixSocket::Stream) => Box::new(Stream::on(id, fd)),
        None => Box::new(Tap::adopt(id, fd)?.reopened_at(opens.clone())),
    })
}

/// The bytes in front of each frame: Linux's `struct virtio_net_hdr_v1`, what a tap interface calls the
/// vnet header. It says what is left to do on the frame (checksums, segmentation).
pub(crate) const HEADER_LEN: usize = 12;

/// An Ethernet header.
pub(crate) const MIN_FRAME: usize = 14;

/// The longest frame without the header in front: an IP packet of 64 KiB, an Ethernet header, two tags.
pub(crate) const MAX_FRAME: usize = 65_535 + MIN_FRAME + 8;

/// Where a card's frames go to and come from: what stands behind every card, and a network of your own, attached
/// with [`VmBuilder::net_backend`](crate::VmBuilder::net_backend).
///
/// A frame is one message: a header of 12 bytes (`struct virtio_net_hdr_v1`, virtio 1.2, 5.1.6) and the frame from its
/// Ethernet header on, without its checksum; at most 65,557 bytes behind the header. A header says what is left to do on its frame:
/// nothing, so that it is all zero, but for the [`offloads`](Self::offloads) that both sides know.
///
/// One device owns it and calls it on a device thread of the VM's, one call at a time. Nothing here may block, since
/// other devices of the VM wait. A panic stops the VM. What is read is the device's to deliver; what a device does
/// not read stays, as far as the other side has room, and is dropped there beyond it.
///
/// Where frames come from other threads, a pair of connected sockets does all of this:
/// [`VmBuilder::net_fd`](crate::VmBuilder::net_fd).
pub trait NetBackend: Send + 'static {
    /// Puts the next frame into `room`, which is long enough for the longest, with its header in front; how many bytes it
    /// has with it. One that is too long for it is cut off, and says how long it was: it is dropped.
    ///
    /// # Errors
    /// `WouldBlock` when there is none: then `fd` is not readable before there is one. Anything else: the
    /// other side is gone, until [`reopen`](Self::reopen) succeeds.
    fn receive(&mut self, room: &IoList<'_>) -> io::Result<usize>;

    /// Sends one frame with the header in front.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room: the same frame comes again when the fd is writable. Anything
    /// else: this frame is lost, and the next may well pass.
    fn send(&mut self, frame: &IoList<'_>) -> io::Result<()>;

    /// What it does itself on frames that a guest sends, and may leave to do on those for a guest. The same all the time: it is asked whenever that matters.
    fn offloads(&self) -> Offloads {
        Offloads::empty()
    }

    /// What of it the guest's driver takes: a frame for it that leaves anything else to do is dropped. Called when a driver begins, before
    /// anything else, on the thread that has the device serve it: a vCPU's, yours within [`Vm::resume`](crate::Vm::resume) and
    /// [`Vm::change_net`](crate::Vm::change_net), or one of the library's that has the VM go on, which was paused for want of memory. It
    /// must not call into the VM.
    fn set_offloads(&mut self, _taken: Offloads) {}

    /// Whether frames for the guest are to come through here from now on: of a TAP interface with several queues, of which the guest
    /// uses some.
    fn set_active(&mut self, _active: bool) {}

    /// Where buffers for frames may be posted before there are any: a port of vmbed's own switch.
    #[doc(hidden)]
    fn port(&self) -> Option<&switch::PortQueue> {
        None
    }

    /// The queue of a TAP interface that it is, where the host's kernel may carry frames between that and a guest by itself
    /// ([`NetConfig::vhost`](crate::NetConfig::vhost)): meanwhile nothing is received or sent here.
    fn tap(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Polls readable while a frame waits, writable while there is room, and with an error when the
    /// other side is gone. The same one all the time; another one after `reopen`.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Whether the other side is gone for good, so that only `reopen` helps. Asked when a frame was lost, and
    /// about once a second while the host's kernel carries the frames.
    fn is_gone(&self) -> bool {
        false
    }

    /// Looks whether the other side is there (again), with the fd in no epoll set. Called about once a second while
    /// it is not.
    ///
    /// # Errors
    /// It is not; the text says why.
    fn reopen(&mut self) -> Result<()> {
        Ok(())
    }
}
