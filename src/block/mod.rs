#![forbid(unsafe_code)]
//! Disks behind the devices: what holds the bytes, and how they move.
//!
//! A *backend* knows a format (raw) or is the embedder's, an *engine* knows how to ask the kernel; a device knows
//! neither.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use crate::config::{DiskBacking, DiskConfig, DiskFormat};
use crate::error::Result;
#[cfg(not(feature = "qcow2"))]
use crate::error::{Error, ErrorKind};
use crate::memory::Memory;
use crate::sys::io::IoList;

mod create;
mod engine;
#[cfg(test)]
pub(crate) mod later;
mod own;
#[cfg(feature = "qcow2")]
mod qcow2;
mod raw;
mod save;
mod target;
#[cfg(test)]
mod tests;

pub use create::create_disk;
pub(crate) use own::OwnDisk;
pub use own::{BlockBackend, BlockRequest};
#[cfg(feature = "qcow2")]
use qcow2::{Qcow2Disk, format_qcow2, qcow2_size};
pub(crate) use raw::RawDisk;
pub(crate) use save::{Saving, cannot};

/// Opens the file at `path` for the disk `id`, in the format that the configuration says.
///
/// # Errors
/// As the format's own; `Unsupported` where this build does not know it.
pub(crate) fn open(id: &str, path: &Path, config: &DiskConfig) -> Result<Box<dyn Backend>> {
    match config.format {
        DiskFormat::Raw => Ok(Box::new(RawDisk::open(id, path, config)?)),
        #[cfg(feature = "qcow2")]
        DiskFormat::Qcow2 => Ok(Box::new(Qcow2Disk::open(id, path, config)?)),
        #[cfg(not(feature = "qcow2"))]
        DiskFormat::Qcow2 => Err(unknown(path)),
    }
}

#[cfg(not(feature = "qcow2"))]
fn unknown(path: &Path) -> Error {
    let why =
        format!("{}: this build knows no qcow2: build vmbed with the cargo feature qcow2", path.display());
    Error::new(ErrorKind::Unsupported, why)
}

#[cfg(not(feature = "qcow2"))]
fn format_qcow2(path: &Path, _: &std::fs::File, _: u64, _: Option<&DiskBacking>) -> Result<()> {
    Err(unknown(path))
}

#[cfg(not(feature = "qcow2"))]
fn qcow2_size(path: &Path) -> Result<u64> {
    Err(unknown(path))
}

/// The size of the disk in that image.
fn size_of(image: &DiskBacking) -> Result<u64> {
    match image.format {
        DiskFormat::Raw => {
            let config = DiskConfig { readonly: true, lock: false, ..DiskConfig::new(&image.path) };
            Ok(RawDisk::open("backing", &image.path, &config)?.size())
        }
        DiskFormat::Qcow2 => qcow2_size(&image.path),
    }
}

/// What holds a disk's bytes.
///
/// One queue of a device owns it and calls it on one thread at a time. [`submit`](Self::submit) may do the work
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

    /// Whether `Discard` and `WriteZeroes` are of use.
    fn discards(&self) -> bool {
        false
    }

    /// The same disk for one more queue, on another thread; `None` where it can serve only one.
    ///
    /// # Errors
    /// The host is out of something.
    fn another(&self) -> Result<Option<Box<dyn Backend>>> {
        Ok(None)
    }

    /// What changes the size of what holds the bytes; `None` where that is somebody else's business.
    fn resizer(&self) -> Option<Arc<dyn Resize>> {
        None
    }

    /// Begins a request. Never panics, whatever `request.buffers` holds by the time it is looked at.
    fn submit(&mut self, request: IoRequest<'_>) -> Submitted;

    /// The device has submitted all it had for now: a backend that collects a batch sends it here. `false` where the host could not
    /// take all of it yet: kick again soon.
    fn kick(&mut self) -> bool {
        true
    }

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

#[cfg(test)]
impl Backend for Box<dyn Backend> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn readonly(&self) -> bool {
        (**self).readonly()
    }

    fn another(&self) -> Result<Option<Box<dyn Backend>>> {
        (**self).another()
    }

    fn resizer(&self) -> Option<Arc<dyn Resize>> {
        (**self).resizer()
    }

    fn discards(&self) -> bool {
        (**self).discards()
    }

    fn submit(&mut self, request: IoRequest<'_>) -> Submitted {
        (**self).submit(request)
    }

    fn kick(&mut self) -> bool {
        (**self).kick()
    }

    fn completions(&mut self, done: &mut dyn FnMut(u64, io::Result<()>)) {
        (**self).completions(done);
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        (**self).completion_fd()
    }

    fn abandon(&mut self) {
        (**self).abandon();
    }
}

/// What may be done with what holds a disk's bytes, on any thread, while it is served.
pub(crate) trait Resize: Send + Sync {
    /// Makes room for a disk of that many bytes. What lies beyond a smaller one may stay.
    ///
    /// # Errors
    /// It cannot have that size.
    fn resize(&self, bytes: u64) -> Result<()>;

    /// One more handle to the same bytes, for reading them on any thread.
    fn reader(self: Arc<Self>) -> Box<dyn Backend>;
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
    /// The guest no longer needs what is there, and takes whatever it reads from there afterwards. There is no data.
    Discard,
    /// Reads as zeroes afterwards. There is no data.
    WriteZeroes {
        /// What is there may be given back to the host.
        unmap: bool,
        /// It is on stable storage before it is reported as done.
        durable: bool,
    },
}

/// One request.
pub(crate) struct IoRequest<'a> {
    pub op: BlockOp,
    /// In bytes.
    pub offset: u64,
    /// In bytes; the buffers' where there are any.
    pub length: u64,
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
