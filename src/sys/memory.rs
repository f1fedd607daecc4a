//! memfd, madvise and seals.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

/// A new memfd of `size` bytes that nobody can resize any more: a guest's memory cannot be cut off
/// under it, and no fault on it raises SIGBUS for being past the end.
pub(crate) fn sealed_memfd(name: &CStr, size: u64) -> io::Result<File> {
    sealed(name, size, 0)
}

/// The same of pages of `page` bytes, a power of two, from the administrator's pool.
pub(crate) fn sealed_pool(name: &CStr, size: u64, page: u64) -> io::Result<File> {
    sealed(name, size, libc::MFD_HUGETLB | page.ilog2() << libc::MFD_HUGE_SHIFT)
}

fn sealed(name: &CStr, size: u64, more: libc::c_uint) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | more;
    // SAFETY: `name` is a terminated string; the flags are integers.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above has just made this descriptor, and nobody else knows it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer and touches no memory of ours.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// What [`advise`] may be asked for: advice that changes no content.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Advice {
    /// Children of a fork do not get the guest's memory.
    DontFork,
    /// Core dumps of the embedder do not hold it.
    DontDump,
    /// Make 2 MiB pages of what is there, now (Linux 6.1).
    Collapse,
    /// Page out what is there, now (Linux 5.4).
    PageOut,
    /// Transparent huge pages wherever there can be some.
    HugePage,
    /// None.
    NoHugePage,
    /// Pages of the same content may be merged (KSM).
    Mergeable,
    /// Have every page there, now (Linux 5.14).
    Populate,
}

/// Not in the libc crate's stable surface for every target (linux/mman.h).
const MADV_COLLAPSE: libc::c_int = 25;

/// Advises on `len` bytes at `offset` of a mapping.
pub(crate) fn advise(region: &MmapRegion, offset: usize, len: usize, advice: Advice) -> io::Result<()> {
    if offset.checked_add(len).is_none_or(|end| end > region.size()) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let advice = match advice {
        Advice::DontFork => libc::MADV_DONTFORK,
        Advice::DontDump => libc::MADV_DONTDUMP,
        Advice::Collapse => MADV_COLLAPSE,
        Advice::PageOut => libc::MADV_PAGEOUT,
        Advice::HugePage => libc::MADV_HUGEPAGE,
        Advice::NoHugePage => libc::MADV_NOHUGEPAGE,
        Advice::Mergeable => libc::MADV_MERGEABLE,
        Advice::Populate => libc::MADV_POPULATE_WRITE,
    };
    // Miri knows no advice, and nothing depends on any being followed.
    if cfg!(miri) {
        return Ok(());
    }
    // SAFETY: the range lies within a live mapping (checked above), and none of these advices changes
    // its content or unmaps anything.
    let result = unsafe { libc::madvise(region.as_ptr().add(offset).cast(), len, advice) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The size of a transparent huge page.
const HUGE: usize = 2 << 20;

/// Gives `len` bytes at `offset` of an anonymous private mapping back to the kernel: they read zero from now on.
pub(crate) fn discard_anonymous(region: &MmapRegion, offset: usize, len: usize) -> io::Result<()> {
    if offset.checked_add(len).is_none_or(|end| end > region.size()) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let at = region.as_ptr().wrapping_add(offset);
    // Of a huge page that is discarded in part, the kernel keeps all until it is short of memory; unless it
    // is split, which this advice does on its way, and which may fail.
    if !at.addr().is_multiple_of(HUGE) || !len.is_multiple_of(HUGE) {
        // SAFETY: the range lies within a live mapping (checked above). The content that this allows the kernel to
        // take is what the next call takes.
        let _ = unsafe { libc::madvise(at.cast(), len, libc::MADV_FREE) };
    }
    // SAFETY: the range lies within a live mapping (checked above) of guest memory, which is accessed as
    // volatile bytes only: that they turn to zero is what the caller asks for.
    let result = unsafe { libc::madvise(at.cast(), len, libc::MADV_DONTNEED) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has the pages of a mapping come from these NUMA nodes of the host only (`MPOL_BIND`). Before any of them is there.
pub(crate) fn bind(region: &MmapRegion, nodes: &[u32]) -> io::Result<()> {
    const BITS: u32 = libc::c_ulong::BITS;
    let words = nodes.iter().max().map_or(0, |most| most / BITS + 1);
    let mut mask = vec![0 as libc::c_ulong; words as usize];
    for node in nodes {
        mask[(node / BITS) as usize] |= 1 << (node % BITS);
    }
    // SAFETY: the range is a live mapping, of which this changes where later pages come from; the mask has the number
    // of bits that is said (the kernel takes one off, mbind(2)).
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            region.as_ptr(),
            region.size(),
            libc::MPOL_BIND,
            mask.as_ptr(),
            libc::c_ulong::from(words * BITS) + 1,
            0,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives `len` bytes at `offset` of a file back to its file system: they read zero from now on. Its size stays.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

/// Has `len` bytes at `offset` of a file be there: of zeroes, where they were not.
///
/// # Errors
/// ENOSPC where there is no room, or no page in the pool.
pub(crate) fn fill_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, 0, offset, len)
}

fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let wraps = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let (offset, len) = (offset.try_into().map_err(wraps)?, len.try_into().map_err(wraps)?);
    loop {
        // SAFETY: takes integers and touches no memory of ours.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Address space with nothing in it. What is mapped inside goes with it when it is dropped.
pub(crate) fn reserve(size: usize) -> io::Result<MmapRegion> {
    // Miri maps whole memory only, and nothing over it: so it is there from the start.
    let (prot, more) = if cfg!(miri) {
        (libc::PROT_READ | libc::PROT_WRITE, 0)
    } else {
        (libc::PROT_NONE, libc::MAP_NORESERVE)
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | more;
    MmapRegion::build(None, size, prot, flags).map_err(io::Error::other)
}

/// What [`map_inside`] maps.
pub(crate) enum Source {
    /// The file's first bytes, shared.
    File(File),
    /// The same, of huge pages: as many as there are bytes are set aside for it in the administrator's pool, or it fails.
    Pool(File),
    /// Nothing but zeroes.
    Anonymous,
}

/// Maps `size` bytes at the first multiple of `align` within `reserved`.
///
/// The caller keeps `reserved` for as long as anyone may touch the result.
pub(crate) fn map_inside(
    reserved: &MmapRegion,
    align: usize,
    source: Source,
    size: usize,
) -> io::Result<MmapRegion> {
    let start = reserved.as_ptr().addr().next_multiple_of(align) - reserved.as_ptr().addr();
    if start.checked_add(size).is_none_or(|end| end > reserved.size()) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let (flags, file) = match source {
        Source::File(file) => (libc::MAP_SHARED | libc::MAP_NORESERVE, Some(file)),
        Source::Pool(file) => (libc::MAP_SHARED, Some(file)),
        Source::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, None),
    };
    let fd = file.as_ref().map_or(-1, File::as_raw_fd);
    let at = reserved.as_ptr().wrapping_add(start);
    // SAFETY: MAP_FIXED replaces pages of our own empty reservation only (checked above), which nobody
    // has a pointer into.
    let map = || unsafe { libc::mmap(at.cast(), size, prot, flags | libc::MAP_FIXED, fd, 0) };
    let mapped = if cfg!(miri) { at.cast() } else { map() };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let mut builder = MmapRegionBuilder::new(size).with_mmap_prot(prot).with_mmap_flags(flags);
    if let Some(file) = file {
        builder = builder.with_file_offset(FileOffset::new(file, 0));
    }
    // SAFETY: the mapping made above, of this size; it lives as long as `reserved`, as the caller promises.
    unsafe { builder.with_raw_mmap_pointer(mapped.cast()) }.build().map_err(io::Error::other)
}
