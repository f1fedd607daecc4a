#![forbid(unsafe_code)]
//! What guest memory is made of.

use std::ops::Range;

use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::memory::{Advice, advise, map_inside, reserve, sealed_memfd};

/// The size of a huge page, and so the alignment of guest memory in the process.
pub(crate) const HUGE: u64 = 2 << 20;

/// A memfd of its own for a range of guest memory, mapped shared: its blocks are exactly what the guest
/// has touched. Children do not inherit it, core dumps do not hold it.
///
/// The second part owns the address space; it must outlive the first.
pub(super) fn memfd_region(range: &Range<u64>) -> Result<(GuestRegionMmap, MmapRegion)> {
    let size = range.end - range.start;
    let context = |what: &str| format!("{what} {size} bytes of guest memory at {:#x}", range.start);
    let length =
        usize::try_from(size).map_err(|_| Error::new(ErrorKind::InvalidArgument, context("addressing")))?;
    let file =
        sealed_memfd(c"vmbed-guest", size).map_err(|e| Error::os(context("creating a memfd for"), e))?;
    // The kernel maps huge pages only where addresses and offsets agree, and aligns for that only where
    // huge shared memory is on for everyone.
    let space = reserve(length.saturating_add(HUGE as usize))
        .map_err(|e| Error::new(ErrorKind::Exhausted, context("finding addresses for")).with_source(e))?;
    let region =
        map_inside(&space, HUGE as usize, file, length).map_err(|e| Error::os(context("mapping"), e))?;
    for advice in [Advice::DontFork, Advice::DontDump] {
        advise(&region, 0, length, advice).map_err(|e| Error::os(context("advising on"), e))?;
    }
    let region = GuestRegionMmap::new(region, GuestAddress(range.start))
        .ok_or_else(|| Error::new(ErrorKind::InvalidArgument, context("the end wraps for")))?;
    Ok((region, space))
}

/// Makes huge pages of the pieces that lie wholly within `offsets` of the region, before the guest runs.
///
/// A piece must have a page already (else the kernel answers EINVAL), so one of each is touched. All in one
/// call, since each call waits until every processor has given up its cached pages. Where the kernel will
/// not (before Linux 6.1, no free huge page), small pages do.
pub(super) fn collapse(region: &GuestRegionMmap, offsets: Range<u64>) {
    let start = offsets.start.next_multiple_of(HUGE);
    let end = offsets.end.min(region.len()) / HUGE * HUGE;
    for piece in (start..end).step_by(HUGE as usize) {
        let at = vm_memory::MemoryRegionAddress(piece);
        let touched = region.read_obj::<u8>(at).and_then(|byte| region.write_obj(byte, at));
        if touched.is_err() {
            return;
        }
    }
    if start < end
        && let Err(error) = advise(region, start as usize, (end - start) as usize, Advice::Collapse)
    {
        log::debug!("not all of {start:#x}-{end:#x} of a guest's memory in huge pages: {error}");
    }
}
