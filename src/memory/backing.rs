#![forbid(unsafe_code)]
//! What guest memory is made of.

use std::fs::{self, File};
use std::io;
use std::ops::Range;

use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress};

use crate::config::{BackingConfig, BackingKind, HugePages};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::log;
use crate::sys::memory::{Advice, Source, advise, bind, map_inside, reserve, sealed_memfd, sealed_pool};

/// The size of a huge page, and so the alignment of guest memory in the process.
pub(crate) const HUGE: u64 = 2 << 20;

/// Makes the memory for a range of the guest's addresses: a memfd of its own, mapped shared, whose blocks are exactly
/// what the guest has touched; or what else was asked for. Children do not inherit it, core dumps do not hold it.
///
/// The second part owns the address space; it must outlive the first.
pub(super) fn region(range: &Range<u64>, config: &BackingConfig) -> Result<(GuestRegionMmap, MmapRegion)> {
    let size = range.end - range.start;
    let context = |what: &str| format!("{what} {size} bytes of guest memory at {:#x}", range.start);
    let length =
        usize::try_from(size).map_err(|_| Error::new(ErrorKind::InvalidArgument, context("addressing")))?;
    let pool_page = config.kind.pool_page();
    let made = match pool_page {
        Some(page) => sealed_pool(c"vmbed-guest", size, page).map(Source::Pool),
        None if config.kind == BackingKind::Anonymous => Ok(Source::Anonymous),
        None => sealed_memfd(c"vmbed-guest", size).map(Source::File),
    };
    let source = made.map_err(|e| match pool_page {
        Some(page) => no_pool(&context("making"), page, e),
        None if e.raw_os_error() == Some(libc::EFBIG) => {
            let why = "RLIMIT_FSIZE of this process, or a limit of the kernel's, is lower: raise it";
            Error::os(format!("{}: {why}", context("creating a memfd for")), e)
        }
        None => Error::os(context("creating a memfd for"), e),
    })?;
    // The kernel maps huge pages only where addresses and offsets agree, and aligns for that only where
    // huge shared memory is on for everyone.
    let align = pool_page.unwrap_or(HUGE).max(HUGE) as usize;
    let space = reserve(length.saturating_add(align))
        .map_err(|e| Error::new(ErrorKind::Exhausted, context("finding addresses for")).with_source(e))?;
    let region = map_inside(&space, align, source, length).map_err(|e| match pool_page {
        Some(page) => no_pool(&context("mapping"), page, e),
        None => Error::os(context("mapping"), e),
    })?;
    for advice in [Advice::DontFork, Advice::DontDump] {
        advise(&region, 0, length, advice).map_err(|e| Error::os(context("advising on"), e))?;
    }
    set_up(&region, length, config)?;
    let region = GuestRegionMmap::new(region, GuestAddress(range.start))
        .ok_or_else(|| Error::new(ErrorKind::InvalidArgument, context("the end wraps for")))?;
    Ok((region, space))
}

/// What says where later pages come from.
fn set_up(region: &MmapRegion, length: usize, config: &BackingConfig) -> Result<()> {
    let huge = match config.huge {
        HugePages::Auto => None,
        HugePages::Always => Some(Advice::HugePage),
        HugePages::Never => Some(Advice::NoHugePage),
    };
    if let Some(Err(error)) = huge.map(|advice| advise(region, 0, length, advice)) {
        // A kernel without them: small pages do, as everywhere.
        log::debug!("backing.huge is {:?}: {error}", config.huge);
    }
    if config.mergeable {
        let why = "backing.mergeable: this host's kernel merges no pages (CONFIG_KSM)";
        advise(region, 0, length, Advice::Mergeable).map_err(|e| match e.raw_os_error() {
            Some(libc::EINVAL) => Error::new(ErrorKind::Unsupported, why).with_source(e),
            _ => Error::os("backing.mergeable: having the memory merged (MADV_MERGEABLE)", e),
        })?;
    }
    if config.numa_nodes.is_empty() {
        return Ok(());
    }
    bind(region, &config.numa_nodes).map_err(|e| {
        let online = fs::read_to_string("/sys/devices/system/node/online").unwrap_or_default();
        let nodes = &config.numa_nodes;
        let why =
            format!("backing.numa_nodes is {nodes:?}: this host's nodes are {:?} (mbind)", online.trim());
        match e.raw_os_error() {
            Some(libc::EINVAL) => Error::new(ErrorKind::InvalidArgument, why).with_source(e),
            Some(libc::ENOSYS | libc::EPERM) => Error::new(ErrorKind::Unsupported, why).with_source(e),
            _ => Error::os(why, e),
        }
    })
}

/// The administrator's pool has not enough pages, or there is none of that size.
fn no_pool(context: &str, page: u64, error: io::Error) -> Error {
    if !matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EINVAL | libc::ENODEV | libc::ENOENT)) {
        return Error::os(format!("{context} of huge pages"), error);
    }
    let pool = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page >> 10);
    let read = |file: &str| fs::read_to_string(format!("{pool}/{file}")).ok();
    let (kind, state) = match (read("free_hugepages"), read("nr_hugepages")) {
        (Some(free), Some(all)) => {
            let state = format!("{} of {} pages are free in {pool}", free.trim(), all.trim());
            (ErrorKind::Exhausted, format!("{state}; write the number wanted to its nr_hugepages"))
        }
        _ => (ErrorKind::Unsupported, "this host's kernel has no huge pages of that size".to_owned()),
    };
    Error::new(kind, format!("{context} of huge pages: {state}")).with_source(error)
}

/// Has every page of `offsets` of the region there.
pub(super) fn prefault(region: &GuestRegionMmap, offsets: Range<u64>) -> io::Result<()> {
    const PAGE: usize = 4096;
    let (start, len) = (offsets.start as usize, (offsets.end - offsets.start) as usize);
    match advise(region, start, len, Advice::Populate) {
        // Before Linux 5.14.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            offsets.step_by(PAGE).map(MemoryRegionAddress).try_for_each(|at| {
                let touched = region.read_obj::<u8>(at).and_then(|byte| region.write_obj(byte, at));
                touched.map_err(io::Error::other)
            })
        }
        other => other,
    }
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
        let at = MemoryRegionAddress(piece);
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

/// What reads the page tables of this process, where only they know what is there.
pub(super) fn pagemap(config: &BackingConfig) -> Result<Option<File>> {
    // Miri has no page tables to read.
    if config.kind != BackingKind::Anonymous || cfg!(miri) {
        return Ok(None);
    }
    let why = "backing.kind is Anonymous: what is there of it is read from /proc/self/pagemap";
    File::open("/proc/self/pagemap").map(Some).map_err(|e| Error::os(why, e))
}
