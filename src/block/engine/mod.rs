#![forbid(unsafe_code)]
//! How bytes move between guest memory and an open file. Engines know no format.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::target::Target;
use super::{IoRequest, Submitted};
use crate::config::DiskEngine;
use crate::error::{Error, ErrorKind, Result};

pub(super) mod sync;
pub(super) mod uring;

/// One queue's way to its file.
pub(super) enum Engine {
    Sync(Arc<Target>),
    Uring(Box<uring::Uring>),
}

impl Engine {
    /// The one that was asked for, or what the host has; `name` is for the errors.
    pub fn choose(name: &str, wanted: DiskEngine, target: &Arc<Target>) -> Result<Self> {
        if wanted == DiskEngine::Sync {
            return Ok(Self::Sync(target.clone()));
        }
        match uring::Uring::new(target.clone()) {
            Ok(uring) => Ok(Self::Uring(Box::new(uring))),
            Err(error) if wanted == DiskEngine::Auto => {
                log::debug!("{name}: no io_uring, its requests are done one by one: {error}");
                Ok(Self::Sync(target.clone()))
            }
            Err(error) => {
                let why = format!("{name}: io_uring is not to be had; choose the engine auto or sync");
                Err(Error::new(ErrorKind::Unsupported, why).with_source(error))
            }
        }
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
