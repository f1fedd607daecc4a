#![expect(
    unsafe_code,
    reason = "the operating system's interfaces: every raw system call of the crate is below here"
)]
//! Every unsafe system interface: file descriptors, mappings, signals, KVM calls that kvm-ioctls lacks.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) mod fd;
pub(crate) mod io;
pub(crate) mod memory;
pub(crate) mod tap;

/// Locks, also after a panic elsewhere: what our locks guard is left consistent at every step, and a
/// panicking thread has already ended its VM.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
