//! The time stamp counter.

/// The host's time stamp counter now.
pub(crate) fn read() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux lets programs execute it.
    unsafe { core::arch::x86_64::_rdtsc() }
}
