//! Locks, atomics, bells and kicks of the code that is model-checked. `tests/models` has another one of these in its place.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::PoisonError;
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::fd;
pub(crate) use super::{lock, signal};

/// Waits to be notified, until `end`; whether that has come.
pub(crate) fn wait_until<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    end: Instant,
) -> (MutexGuard<'a, T>, bool) {
    let left = end.saturating_duration_since(Instant::now());
    let (guard, _) = condvar.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner);
    (guard, left == Duration::ZERO)
}

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
