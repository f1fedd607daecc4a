#![forbid(unsafe_code)]
//! An open file or block device, and how it is to be used. All queues of a disk share it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::engine::sync;
use super::{BlockOp, IoRequest};
use crate::config::CacheMode;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::file::{Alignment, alignment};
use crate::sys::io::IoList;

/// Which of two descriptions a request goes through, and when it is durable.
pub(super) struct Target {
    /// Through the page cache.
    cached: File,
    /// Past it.
    direct: Option<(File, Alignment)>,
    cache: CacheMode,
}

impl Target {
    /// `file` in that mode; `name` is for the errors.
    pub fn new(name: &str, file: File, cache: CacheMode, readonly: bool) -> Result<Self> {
        let direct =
            if cache == CacheMode::Direct { Some(past_the_cache(name, &file, readonly)?) } else { None };
        Ok(Self { cached: file, direct, cache })
    }

    /// What large and aligned transfers go through.
    pub fn main(&self) -> &File {
        self.direct.as_ref().map_or(&self.cached, |(file, _)| file)
    }

    pub fn cached(&self) -> &File {
        &self.cached
    }

    /// Where a transfer goes: what `O_DIRECT` cannot take goes through the page cache, which the kernel keeps in step.
    pub fn file_for(&self, offset: u64, buffers: &IoList<'_>) -> &File {
        match &self.direct {
            Some((file, align)) if fits(*align, offset, buffers) => file,
            _ => &self.cached,
        }
    }

    /// Whether the main description can take it.
    pub fn is_main(&self, offset: u64, buffers: &IoList<'_>) -> bool {
        self.direct.as_ref().is_none_or(|(_, align)| fits(*align, offset, buffers))
    }

    /// Whether a flush, or a write that is to be durable, has to wait for the storage.
    pub fn keeps_promises(&self) -> bool {
        self.cache != CacheMode::Unsafe
    }

    /// Does a request, all of it.
    pub fn perform(&self, request: IoRequest<'_>) -> io::Result<()> {
        let IoRequest { op, offset, length, buffers, .. } = request;
        let durable = |asked: bool| asked && self.keeps_promises();
        match op {
            BlockOp::Read => sync::read(self.file_for(offset, &buffers), offset, buffers),
            BlockOp::Write { durable: asked } => {
                sync::write(self.file_for(offset, &buffers), offset, buffers, durable(asked))
            }
            BlockOp::Flush => self.flush(),
            BlockOp::Discard => sync::discard(&self.cached, offset, length),
            BlockOp::WriteZeroes { unmap, durable: asked } => {
                sync::write_zeroes(&self.cached, offset, length, unmap)?;
                if durable(asked) { self.flush() } else { Ok(()) }
            }
        }
    }

    fn flush(&self) -> io::Result<()> {
        if self.keeps_promises() { self.cached.sync_data() } else { Ok(()) }
    }
}

fn fits(align: Alignment, offset: u64, buffers: &IoList<'_>) -> bool {
    // Lengths are multiples of what both want, since the pieces are; their sum counts in the file.
    offset.is_multiple_of(align.offset)
        && (buffers.len() as u64).is_multiple_of(align.offset)
        && buffers.is_aligned(align.memory)
}

/// Another description of the same file: flags of the one that we have may be somebody else's business.
fn past_the_cache(name: &str, file: &File, readonly: bool) -> Result<(File, Alignment)> {
    let refused = || {
        let why = format!("{name}: its file system has no O_DIRECT; choose another cache mode than direct");
        Error::new(ErrorKind::Unsupported, why)
    };
    let align = alignment(file.as_fd()).ok_or_else(refused)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let flags = libc::O_DIRECT | libc::O_NONBLOCK | libc::O_NOCTTY;
    let opened = OpenOptions::new().read(true).write(!readonly).custom_flags(flags).open(path);
    let file = opened.map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) => refused().with_source(e),
        _ => Error::os(format!("{name}: opening it with O_DIRECT"), e),
    })?;
    Ok((file, align))
}
