//! What the kernel knows about the pages of a mapping.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use vm_memory::mmap::MmapRegion;

const PAGE: usize = 4096;

/// The bytes that a file occupies (`st_blocks`): of a memfd, what was ever touched and not given back, in memory or
/// in swap.
pub(crate) fn occupied(file: &File) -> io::Result<u64> {
    let blocks = super::file::status(file.as_fd())?.st_blocks;
    // Of 512 bytes, whatever the file system's own are (stat(2)).
    Ok(u64::try_from(blocks).unwrap_or(0) * 512)
}

/// The bytes of a shared mapping of a file whose pages are in memory, mapped or not.
pub(crate) fn resident(region: &MmapRegion) -> io::Result<u64> {
    resident_in(region, 0, region.size())
}

/// The same for `len` bytes at `offset`, both in whole pages.
pub(crate) fn resident_in(region: &MmapRegion, offset: usize, len: usize) -> io::Result<u64> {
    let end = offset.checked_add(len).filter(|end| *end <= region.size());
    let end = end.ok_or(io::ErrorKind::InvalidInput)?;
    let mut pages = 0u64;
    let mut states = vec![0u8; (len / PAGE + 1).min(1 << 16)];
    let step = states.len() * PAGE;
    for start in (offset..end).step_by(step) {
        let length = step.min(end - start);
        let at = region.as_ptr().wrapping_add(start);
        // SAFETY: the range lies within a live mapping, whose pages it does not touch; there is a byte for each.
        if unsafe { libc::mincore(at.cast(), length, states.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        pages += states[..length.div_ceil(PAGE)].iter().filter(|state| **state & 1 != 0).count() as u64;
    }
    Ok(pages * PAGE as u64)
}

/// The machine's swap space, and what is left of it, in bytes; `None` where it does not say.
fn swap() -> Option<(u64, u64)> {
    let mut info = MaybeUninit::<libc::sysinfo>::uninit();
    // SAFETY: there is room for one structure.
    if unsafe { libc::sysinfo(info.as_mut_ptr()) } < 0 {
        return None;
    }
    // SAFETY: the call above has filled it.
    let info = unsafe { info.assume_init() };
    let unit = u64::from(info.mem_unit);
    Some((info.totalswap.saturating_mul(unit), info.freeswap.saturating_mul(unit)))
}

/// Whether anything at all of this machine is swapped out.
pub(crate) fn swap_is_used() -> bool {
    swap().is_none_or(|(total, free)| total != free)
}

/// The swap space that is left.
pub(crate) fn swap_free() -> u64 {
    swap().map_or(0, |(_, free)| free)
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// The kernel's one page of zeroes: nobody's.
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_HUGE: u64 = 1 << 6;

/// `struct pm_scan_arg` (linux/fs.h).
#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// What [`count`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    /// What this process maps with huge pages.
    Huge,
    /// What is in memory, of an anonymous private mapping.
    Present,
    /// What is in memory or in swap, of the same.
    Backed,
}

/// The bytes of `len` at `offset` of a mapping that are so. `pagemap` is `/proc/self/pagemap`.
///
/// # Errors
/// ENOTTY before Linux 6.7.
pub(crate) fn count(
    pagemap: &File,
    region: &MmapRegion,
    offset: usize,
    len: usize,
    what: Pages,
) -> io::Result<u64> {
    let end =
        offset.checked_add(len).filter(|end| *end <= region.size()).ok_or(io::ErrorKind::InvalidInput)?;
    let (all, any, not) = match what {
        Pages::Huge => (PAGE_IS_HUGE, 0, 0),
        Pages::Present => (PAGE_IS_PRESENT, 0, PAGE_IS_PFNZERO),
        Pages::Backed => (0, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, PAGE_IS_PFNZERO),
    };
    let mut found = [PageRegion::default(); 64];
    let start = region.as_ptr().addr();
    let (mut at, end, mut bytes) = ((start + offset) as u64, (start + end) as u64, 0);
    while at < end {
        let mut scan = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            flags: 0,
            start: at,
            end,
            walk_end: 0,
            vec: found.as_mut_ptr().expose_provenance() as u64,
            vec_len: found.len() as u64,
            max_pages: 0,
            category_inverted: not,
            category_mask: all | not,
            category_anyof_mask: any,
            // Told of each range; what is the same for all makes the ranges long.
            return_mask: if not == 0 { all } else { not },
        };
        // SAFETY: the kernel reads and writes the structure, and at most `vec_len` regions behind `vec`; both live
        // here. It looks at page tables and changes none.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut scan) };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        bytes += found[..(count as usize).min(found.len())].iter().map(|r| r.end - r.start).sum::<u64>();
        if scan.walk_end <= at {
            break;
        }
        at = scan.walk_end;
    }
    Ok(bytes)
}

/// The same as [`count`] of what is present or backed, for older kernels; the page of zeroes counts, too.
pub(crate) fn count_entries(
    pagemap: &File,
    region: &MmapRegion,
    offset: usize,
    len: usize,
    what: Pages,
) -> io::Result<u64> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    let wanted = if what == Pages::Backed { PRESENT | SWAPPED } else { PRESENT };
    let end =
        offset.checked_add(len).filter(|end| *end <= region.size()).ok_or(io::ErrorKind::InvalidInput)?;
    let mut entries = [0u8; 8 * 512];
    let mut pages = 0;
    for start in (offset..end).step_by(512 * PAGE) {
        let part = &mut entries[..8 * ((end - start) / PAGE).min(512)];
        pagemap.read_exact_at(part, ((region.as_ptr().addr() + start) / PAGE * 8) as u64)?;
        let (entries, _) = part.as_chunks::<8>();
        pages += entries.iter().filter(|e| u64::from_ne_bytes(**e) & wanted != 0).count() as u64;
    }
    Ok(pages * PAGE as u64)
}
