#![expect(
    unsafe_code,
    reason = "the operating system's interfaces: every raw system call of the crate is below here"
)]
//! Every unsafe system interface: file descriptors, mappings, signals, KVM calls that kvm-ioctls lacks.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) mod clock;
pub(crate) mod fd;
pub(crate) mod file;
pub(crate) mod fork;
#[cfg(test)]
pub(crate) mod guest_pages;
#[cfg(feature = "qcow2")]
pub(crate) mod image;
pub(crate) mod io;
pub(crate) mod kvm;
pub(crate) mod kvm_stats;
pub(crate) mod log;
pub(crate) mod memory;
pub(crate) mod netlink;
pub(crate) mod residency;
pub(crate) mod seccomp;
pub(crate) mod sigbus;
pub(crate) mod signal;
pub(crate) mod sync;
pub(crate) mod tap;
pub(crate) mod thread;
pub(crate) mod tsc;
pub(crate) mod uring;
pub(crate) mod vhost;

/// Locks, also after a panic elsewhere: what our locks guard is left consistent at every step, and a
/// panicking thread has already ended its VM.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fills `bytes` from the kernel's random number generator.
pub(crate) fn random(bytes: &mut [u8]) {
    for piece in bytes.chunks_mut(256) {
        // SAFETY: the pointer and length are those of a live slice. Up to 256 bytes cannot fail or be cut
        // short once the generator is seeded, and until then the call waits.
        unsafe { libc::getrandom(piece.as_mut_ptr().cast(), piece.len(), 0) };
    }
}
