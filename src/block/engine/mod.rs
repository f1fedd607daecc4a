#![forbid(unsafe_code)]
//! How bytes move between guest memory and an open file. Engines know no format.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::target::Target;
use super::{IoRequest, Submitted};
use crate::config::DiskEngine;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Memory;
use crate::sys::log;
use crate::sys::uring::Ring;

pub(super) mod sync;
pub(super) mod uring;

/// The most transfers on their way: as many as a queue has entries.
const ENTRIES: u16 = 256;

/// A ring with those files for one queue, where that is wanted and the host has it; `name` is for the errors.
pub(super) fn ring(name: &str, wanted: DiskEngine, files: &[BorrowedFd<'_>]) -> Result<Option<Ring<Memory>>> {
    if wanted == DiskEngine::Sync {
        return Ok(None);
    }
    match Ring::new(files, ENTRIES) {
        Ok(ring) => Ok(Some(ring)),
        Err(error) if wanted == DiskEngine::Auto => {
            log::debug!("{name}: no io_uring, its requests are done one by one: {error}");
            Ok(None)
        }
        Err(error) => {
            let why = format!("{name}: io_uring is not to be had; choose the engine auto or sync");
            Err(Error::new(ErrorKind::Unsupported, why).with_source(error))
        }
    }
}

/// From where on a transfer is gone on with that ended so: from its beginning where the kernel was out of something.
///
/// # Errors
/// It has failed.
pub(super) fn again(error: &io::Error) -> io::Result<usize> {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR | libc::ENOMEM | libc::EBUSY) => Ok(0),
        code => Err(io::Error::from_raw_os_error(code.unwrap_or(libc::EIO))),
    }
}

/// One queue's way to its file.
pub(super) enum Engine {
    Sync(Arc<Target>),
    Uring(Box<uring::Uring>),
}

impl Engine {
    /// The one that was asked for, or what the host has; `name` is for the errors.
    pub fn choose(name: &str, wanted: DiskEngine, target: &Arc<Target>) -> Result<Self> {
        let target = target.clone();
        Ok(match ring(name, wanted, &[target.main().as_fd()])? {
            Some(ring) => Self::Uring(Box::new(uring::Uring::new(target, ring))),
            None => Self::Sync(target),
        })
    }

    pub fn submit(&mut self, request: IoRequest<'_>) -> Submitted {
        match self {
            Self::Sync(target) => Submitted::Done(target.perform(request)),
            Self::Uring(uring) => uring.submit(request),
        }
    }

    pub fn kick(&mut self) -> bool {
        match self {
            Self::Sync(_) => true,
            Self::Uring(uring) => uring.kick(),
        }
    }

    pub fn completions(&mut self, done: &mut dyn FnMut(u64, io::Result<()>)) {
        if let Self::Uring(uring) = self {
            uring.completions(done);
        }
    }

    pub fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Sync(_) => None,
            Self::Uring(uring) => Some(uring.completion_fd()),
        }
    }

    pub fn abandon(&mut self) {
        if let Self::Uring(uring) = self {
            uring.abandon();
        }
    }
}
