#![forbid(unsafe_code)]
//! Disks behind the devices: what holds the bytes, and how they move.
//!
//! A *backend* knows a format (raw), an *engine* knows how to ask the kernel; a device knows neither.

use std::io;
use std::os::fd::BorrowedFd;

use crate::memory::Memory;
use crate::sys::io::IoList;

mod engine;
#[cfg(test)]
pub(crate) mod later;
mod raw;

pub(crate) use raw::RawDisk;

/// What holds a disk's bytes.
///
/// One device owns it and calls it on one thread at a time. [`submit`](Self::submit) may do the work
/// before it returns, or begin it and report it by [`completions`](Self::completions) later, in any
/// order; each tag is reported exactly once, by one of the two. The device keeps offsets and lengths
/// within `size`, multiples of 512, and writes away from a read-only disk; it never has two requests
/// with the same tag, and waits for all of them before it lets go of the backend.
///
/// A backend never zero-fills what it could not read and never reports a write before it is with the
/// kernel. What `Flush` follows is on stable storage when the flush is reported.
pub(crate) trait BlockBackend: Send {
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
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    /// `durable`: on stable storage before it is reported.
    Write {
        durable: bool,
    },
    /// Everything that was reported as written goes to stable storage. No buffers.
    Flush,
}

/// One request.
pub(crate) struct IoRequest<'a> {
    pub op: Op,
    /// In bytes.
    pub offset: u64,
    /// Guest memory, to be filled or written out in order. Lives as long as `memory` does.
    pub buffers: IoList<'a>,
    #[allow(dead_code, reason = "it keeps the buffers alive")]
    /// A request that ends after `submit` holds a clone of this for as long.
    pub memory: &'a Memory,
    #[cfg_attr(not(test), allow(dead_code, reason = "the synchronous engine answers at once"))]
    /// The caller's name for it.
    pub tag: u64,
}

/// What became of a request within `submit`.
#[derive(Debug)]
pub(crate) enum Submitted {
    /// It has ended. An error carries the host's errno.
    Done(io::Result<()>),
    #[cfg_attr(not(test), allow(dead_code, reason = "the synchronous engine answers at once"))]
    /// `completions` will report it.
    Pending,
}
