//! What the kernel knows about the pages of a mapping.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use vm_memory::mmap::MmapRegion;

const PAGE: usize = 4096;

/// The bytes that a file occupies (`st_blocks`): of a memfd, what was ever touched and not given back, in memory or
/// in swap.
pub(crate) fn occupied(file: &File) -> io::Result<u64> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the descriptor is open for as long as the borrow lives, and there is room for one structure.
    if unsafe { libc::fstat(file.as_raw_fd(), stat.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above has filled it.
    let blocks = unsafe { stat.assume_init() }.st_blocks;
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

/// The bytes of a mapping that this process maps with huge pages. `pagemap` is `/proc/self/pagemap`.
///
/// # Errors
/// ENOTTY before Linux 6.7.
pub(crate) fn huge(pagemap: &File, region: &MmapRegion) -> io::Result<u64> {
    let mut found = [PageRegion::default(); 64];
    let start = region.as_ptr().addr() as u64;
    let (mut at, end, mut bytes) = (start, start + region.size() as u64, 0);
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
            category_inverted: 0,
            category_mask: PAGE_IS_HUGE,
            category_anyof_mask: 0,
            return_mask: PAGE_IS_HUGE,
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
