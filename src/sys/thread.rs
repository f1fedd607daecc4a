//! Threads of the library: named, with every signal blocked from their first instruction on. Which CPUs a thread
//! may run on.

use std::io;
use std::mem::MaybeUninit;
use std::thread::{Builder, JoinHandle};

use super::signal::SignalSet;

/// Starts a thread on which no signal of the embedder's process is ever delivered.
pub(crate) fn spawn(name: String, f: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    // A new thread inherits the mask of its maker: block first, so that there is no gap.
    let old = SignalSet::library_thread().block();
    let thread = Builder::new().name(name).spawn(f);
    old.block();
    thread
}

/// The CPUs that the calling thread may run on.
pub(crate) fn affinity() -> io::Result<Vec<u32>> {
    let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: 0 is the calling thread; there is room for one set, of the size that is said.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroes, and what the kernel wrote over them: bits, any of which are good.
    let set = unsafe { set.assume_init() };
    // SAFETY: the number is below CPU_SETSIZE.
    let has = |cpu: u32| unsafe { libc::CPU_ISSET(cpu as usize, &set) };
    Ok((0..libc::CPU_SETSIZE as u32).filter(|cpu| has(*cpu)).collect())
}

/// Confines the calling thread to these CPUs.
///
/// # Errors
/// EINVAL where none of them is there and this process's to use.
pub(crate) fn set_affinity(cpus: &[u32]) -> io::Result<()> {
    let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
    for cpu in cpus.iter().filter(|cpu| **cpu < libc::CPU_SETSIZE as u32) {
        // SAFETY: all zeroes is a set, and the number is below CPU_SETSIZE.
        unsafe { libc::CPU_SET(*cpu as usize, &mut *set.as_mut_ptr()) };
    }
    // SAFETY: 0 is the calling thread; the set is initialized, and of the size that is said.
    let result = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), set.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
