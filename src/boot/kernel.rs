#![forbid(unsafe_code)]
//! Kernel and initrd files: read, recognized, and put into guest memory.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::{bzimage, elf};
use crate::config::LinuxBoot;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Memory, layout};

/// Where a kernel may begin.
pub(super) const KERNEL_START: u64 = 0x10_0000;
/// No kernel is larger than this: Debian's have 14 MiB packed, a few hundred with debug information.
const MAX_KERNEL: u64 = 1 << 30;
/// Nor an initrd than this, since it must lie below 2 GiB.
const MAX_INITRD: u64 = 2 << 30;
/// What an initrd is aligned to, so that its huge pages hold nothing else.
const INITRD_ALIGN: u64 = 2 << 20;

/// A kernel in guest memory.
pub(super) struct Image {
    pub entry: u64,
    /// Everything that it occupies, including what it clears for itself.
    pub range: Range<u64>,
    /// For the zero page, where the entry follows Linux' 64-bit protocol; else it is a PVH entry.
    pub header: Option<setup_header>,
    /// The longest command line that it takes.
    pub cmdline_max: usize,
    /// The highest address that its initrd may occupy.
    pub initrd_max: u64,
}

/// A file being parsed, for errors that name it.
pub(super) struct Source {
    pub path: PathBuf,
    pub size: u64,
    file: File,
}

impl Source {
    /// Opens a regular file that is neither empty nor larger than `max`.
    pub fn open(path: &Path, what: &str, max: u64) -> Result<Self> {
        let named = |why: &str| format!("{what} '{}' {why}", path.display());
        // Opening a pipe that nobody writes to would wait for ever; a regular file does not care.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(|e| Error::os(named("cannot be opened"), e))?;
        let meta = file.metadata().map_err(|e| Error::os(named("cannot be examined"), e))?;
        let bad = |why: &str| Err(Error::new(ErrorKind::BadImage, named(why)));
        match meta.len() {
            _ if meta.is_dir() => bad("is a directory"),
            _ if !meta.is_file() => bad("is not a regular file"),
            0 => bad("is empty"),
            size if size > max => bad(&format!("has {size} bytes, more than the {max} that are taken")),
            size => Ok(Self { path: path.to_owned(), size, file }),
        }
    }

    /// Reads exactly `bytes.len()` bytes at `offset`.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.check(offset, bytes.len() as u64)?;
        self.file.read_exact_at(bytes, offset).map_err(|e| self.failed(offset, e))
    }

    /// Copies `length` bytes at `offset` into guest memory at `address`; they pass through no buffer of ours.
    pub fn copy(&self, memory: &Memory, offset: u64, length: u64, address: u64) -> Result<()> {
        self.check(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset)).map_err(|e| self.failed(offset, e))?;
        let mut done = 0;
        // A read may come short, as one from a network does.
        while done < length {
            let (at, left) = (GuestAddress(address + done), (length - done) as usize);
            let read = memory.read_volatile_from(at, &mut file, left).map_err(|e| match e {
                GuestMemoryError::IOError(e) => self.failed(offset + done, e),
                other => self.bad(format!("has no place in guest memory at {:#x}: {other}", at.0)),
            })?;
            if read == 0 {
                return Err(self.failed(offset + done, std::io::ErrorKind::UnexpectedEof.into()));
            }
            done += read as u64;
        }
        Ok(())
    }

    /// The file had these bytes when it was opened.
    fn check(&self, offset: u64, length: u64) -> Result<()> {
        let end = offset.saturating_add(length);
        if end > self.size {
            return Err(self.bad(format!("is truncated: it has {} bytes, but {end} are needed", self.size)));
        }
        Ok(())
    }

    /// Reading failed, though the file was long enough when it was opened.
    fn failed(&self, offset: u64, error: std::io::Error) -> Error {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                self.bad(format!("became shorter than {} bytes while it was read", self.size))
            }
            _ => Error::os(format!("reading '{}' at {offset}", self.path.display()), error),
        }
    }

    /// This file's content is wrong.
    pub fn bad(&self, why: impl std::fmt::Display) -> Error {
        Error::new(ErrorKind::BadImage, format!("'{}' {why}", self.path.display()))
    }
}

/// Loads the kernel, whichever of the formats it has.
pub(super) fn load(memory: &Memory, linux: &LinuxBoot) -> Result<Image> {
    let source = Source::open(&linux.kernel, "the kernel", MAX_KERNEL)?;
    let mut magic = [0; 4];
    source.read(0, &mut magic)?;
    if magic == elf::MAGIC {
        return elf::load_file(memory, &source);
    }
    if let Some(image) = bzimage::load(memory, &source, linux.kaslr)? {
        return Ok(image);
    }
    let hint = match magic {
        [0x1f, 0x8b, ..] => "it is a gzip file: unpack it first",
        [b'M', b'Z', ..] => "it is an EFI program without a Linux boot header; an arm64 image, perhaps",
        _ => "a bzImage or an ELF kernel (vmlinux) is wanted",
    };
    Err(source.bad(format!("is not an x86 Linux kernel: {hint}")))
}

/// Puts the initrd as high as the kernel allows. Returns where it lies.
pub(super) fn load_initrd(memory: &Memory, path: &Path, image: &Image) -> Result<Range<u64>> {
    let source = Source::open(path, "the initrd", MAX_INITRD)?;
    let low_end = layout::ram(memory.size()).first().map_or(0, |r| r.end);
    let limit = low_end.min(image.initrd_max.saturating_add(1));
    // Where alignment costs too much of a small memory, a page must do.
    let start = [INITRD_ALIGN, 4096].iter().find_map(|align| {
        let start = limit.checked_sub(source.size)? / align * align;
        (start >= image.range.end.max(KERNEL_START)).then_some(start)
    });
    let Some(start) = start else {
        let room = limit.saturating_sub(image.range.end);
        let why = format!(
            "is too large: it has {} bytes, but only {room} are free between the kernel's end at {:#x} and {limit:#x}",
            source.size, image.range.end
        );
        return Err(Error::new(ErrorKind::BadImage, format!("the initrd '{}' {why}", path.display())));
    };
    let range = start..start + source.size;
    memory.collapse(start / INITRD_ALIGN * INITRD_ALIGN..range.end);
    source.copy(memory, 0, source.size, start)?;
    Ok(range)
}

/// Whether `range` is all guest memory above the first MiB and outside the device window.
pub(super) fn fits(memory: &Memory, range: &Range<u64>) -> bool {
    range.start >= KERNEL_START
        && range.start <= range.end
        && usize::try_from(range.end - range.start)
            .is_ok_and(|length| length > 0 && memory.check_range(GuestAddress(range.start), length))
}
