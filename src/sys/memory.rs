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
    // SAFETY: `name` is a terminated string; the flags are constants.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
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
    };
    // SAFETY: the range lies within a live mapping (checked above), and none of these advices changes
    // its content or unmaps anything.
    let result = unsafe { libc::madvise(region.as_ptr().add(offset).cast(), len, advice) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives `len` bytes at `offset` of a file back to its file system: they read zero from now on. Its size stays.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let wraps = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let (offset, len) = (offset.try_into().map_err(wraps)?, len.try_into().map_err(wraps)?);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
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
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    MmapRegion::build(None, size, libc::PROT_NONE, flags).map_err(io::Error::other)
}

/// Maps the first `size` bytes of `file` shared, at the first multiple of `align` within `reserved`.
///
/// The caller keeps `reserved` for as long as anyone may touch the result.
pub(crate) fn map_inside(
    reserved: &MmapRegion,
    align: usize,
    file: File,
    size: usize,
) -> io::Result<MmapRegion> {
    let start = reserved.as_ptr().addr().next_multiple_of(align) - reserved.as_ptr().addr();
    if start.checked_add(size).is_none_or(|end| end > reserved.size()) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
    let at = reserved.as_ptr().wrapping_add(start);
    // SAFETY: MAP_FIXED replaces pages of our own empty reservation only (checked above), which nobody
    // has a pointer into.
    let mapped = unsafe { libc::mmap(at.cast(), size, prot, flags | libc::MAP_FIXED, file.as_raw_fd(), 0) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let builder = MmapRegionBuilder::new(size)
        .with_mmap_prot(prot)
        .with_mmap_flags(flags)
        .with_file_offset(FileOffset::new(file, 0));
    // SAFETY: the mapping made above, of this size; it lives as long as `reserved`, as the caller promises.
    unsafe { builder.with_raw_mmap_pointer(mapped.cast()) }.build().map_err(io::Error::other)
}
