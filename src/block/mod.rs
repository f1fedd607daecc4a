#![forbid(unsafe_code)]
//! Disks behind the devices: what holds the bytes, and how they move.
//!
//! A *backend* knows a format (raw) or is the embedder's, an *engine* knows how to ask the kernel; a device knows
//! neither.

use std::io;
use std::os::fd::BorrowedFd;

use crate::memory::Memory;
use crate::sys::io::IoList;

mod engine;
#[cfg(test)]
pub(crate) mod later;
mod own;
mod raw;

pub(crate) use own::OwnDisk;
pub use own::{BlockBackend, BlockRequest};
pub(crate) use raw::RawDisk;

/// What holds a disk's bytes.
///
/// One device owns it and calls it on one thread at a time. [`submit`](Self::submit) may do the work
/// before it returns, or begin it and report it by [`completions`](Self::completions) later, in any
/// order; each tag is reported exactly once, by one of the two. The device keeps offsets and lengths
/// within `size`, multiples of 512, and writes away from a read-only disk; it never has two requests
/// with the same tag, and waits for all of them, or abandons them, before it lets go of the backend.
///
/// A backend never zero-fills what it could not read and never reports a write before it is with the
/// kernel. What `Flush` follows is on stable storage when the flush is reported.
pub(crate) trait Backend: Send {
    /// The size in bytes, a multiple of 512.
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn readonly(&self) -> bool;

    /// Begins a request. Never panics, whatever `request.buffers` holds by the time it is looked at.
    fn submit(&mut self, request: IoRequest<'_>) -> Submitted;

    /// The device has submitted all it had for now: a backend that collects a batch sends it here.
    fn kick(&mut self) {}

    /// Calls `done` with the tag and the outcome of every request that was pending and has ended.
    fn completions(&mut self, _done: &mut dyn FnMut(u64, io::Result<()>)) {}

    /// Polls readable while `completions` has something to report, which clears it. `None` where every
    /// request ends within `submit`.
    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Gives up on all requests that are pending: none of them is reported, whenever it ends. Only of one
    /// that holds their memory itself.
    fn abandon(&mut self) {}
}

/// What a disk is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockOp {
    /// Fill the guest's memory.
    Read,
    /// Write out the guest's memory.
    Write {
        /// It is on stable storage before it is reported as done: the driver has no way to flush.
        durable: bool,
    },
    /// Everything that was reported as written goes to stable storage. There is no data.
    Flush,
}

/// One request.
pub(crate) struct IoRequest<'a> {
    pub op: BlockOp,
    /// In bytes.
    pub offset: u64,
    /// Guest memory, to be filled or written out in order. Lives as long as `memory` does.
    pub buffers: IoList<'a>,
    /// A request that ends after `submit` holds a clone of this for as long.
    pub memory: &'a Memory,
    /// The caller's name for it.
    pub tag: u64,
}

/// What became of a request within `submit`.
#[derive(Debug)]
pub(crate) enum Submitted {
    /// It has ended. An error carries the host's errno.
    Done(io::Result<()>),
    /// `completions` will report it.
    Pending,
}
