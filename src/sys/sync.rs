//! Locks, atomics, bells and kicks of the code that is model-checked. `tests/models` has another one of these in its place.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::fd;
pub(crate) use super::{lock, signal};

/// What wakes whoever polls: an eventfd that is readable while something waits.
pub(crate) struct Bell(EventFd);

impl Bell {
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    pub fn ring(&self) {
        fd::ring(&self.0);
    }

    /// It is not readable any more; how often it was rung since it was silent.
    pub fn silence(&self) -> u64 {
        // EAGAIN: it was silent.
        self.0.read().unwrap_or(0)
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        fd::borrow(&self.0)
    }
}
