#![forbid(unsafe_code)]
//! What guest memory is made of.

use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{FileOffset, GuestAddress};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::memory::{Advice, advise, sealed_memfd};

/// A memfd of its own for a range of guest memory, mapped shared: its blocks are exactly what the guest
/// has touched. Children do not inherit it, core dumps do not hold it.
pub(super) fn memfd_region(at: GuestAddress, size: u64) -> Result<GuestRegionMmap> {
    let context = |what: &str| format!("{what} {size} bytes of guest memory at {:#x}", at.0);
    let length =
        usize::try_from(size).map_err(|_| Error::new(ErrorKind::InvalidArgument, context("addressing")))?;
    let file =
        sealed_memfd(c"vmbed-guest", size).map_err(|e| Error::os(context("creating a memfd for"), e))?;
    let region = MmapRegion::from_file(FileOffset::new(file, 0), length)
        .map_err(|e| Error::new(ErrorKind::Exhausted, context("mapping")).with_source(e))?;
    for advice in [Advice::DontFork, Advice::DontDump] {
        advise(&region, 0, length, advice).map_err(|e| Error::os(context("advising on"), e))?;
    }
    GuestRegionMmap::new(region, at)
        .ok_or_else(|| Error::new(ErrorKind::InvalidArgument, context("the end wraps for")))
}
