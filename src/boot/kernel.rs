#![forbid(unsafe_code)]
//! Kernel and initrd files: read, recognized, and put into guest memory.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{bzimage, elf, write};
use crate::config::LinuxBoot;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Memory, layout};

/// Where a kernel may begin.
pub(super) const KERNEL_START: u64 = 0x10_0000;
/// No kernel or initrd is larger than this.
const MAX_FILE: u64 = 2 << 30;
/// What an initrd is aligned to, so that its huge pages hold nothing else.
const INITRD_ALIGN: u64 = 2 << 20;

/// A kernel in guest memory.
pub(super) struct Image {
    pub entry: u64,
    /// Everything that it occupies, including what it clears for itself.
    pub range: Range<u64>,
    /// The setup header of a bzImage that unpacks itself: then the entry follows Linux' 64-bit protocol,
    /// else it is a PVH entry.
    pub header: Option<Vec<u8>>,
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
    /// Opens a regular file that is neither empty nor absurdly large.
    pub fn open(path: &Path, what: &str) -> Result<Self> {
        let named = |why: &str| format!("{what} '{}' {why}", path.display());
        let file = File::open(path).map_err(|e| Error::os(named("cannot be opened"), e))?;
        let meta = file.metadata().map_err(|e| Error::os(named("cannot be examined"), e))?;
        let bad = |why: &str| Err(Error::new(ErrorKind::BadImage, named(why)));
        match meta.len() {
            _ if meta.is_dir() => bad("is a directory"),
            _ if !meta.is_file() => bad("is not a regular file"),
            0 => bad("is empty"),
            size if size > MAX_FILE => bad("is larger than 2 GiB"),
            size => Ok(Self { path: path.to_owned(), size, file }),
        }
    }

    /// Reads exactly `bytes.len()` bytes at `offset`.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(bytes, offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                let end = offset.saturating_add(bytes.len() as u64);
                self.bad(format!("is truncated: it has {} bytes, but {end} are needed", self.size))
            }
            _ => Error::os(format!("reading '{}' at {offset}", self.path.display()), e),
        })
    }

    /// Reads `length` bytes at `offset`.
    pub fn read_vec(&self, offset: u64, length: u64) -> Result<Vec<u8>> {
        if offset.checked_add(length).is_none_or(|end| end > self.size) {
            let end = offset.saturating_add(length);
            return Err(self.bad(format!("is truncated: it has {} bytes, but {end} are needed", self.size)));
        }
        let mut bytes = Vec::new();
        let at = std::os::unix::fs::FileExt::read_exact_at;
        bytes.resize(length as usize, 0);
        at(&self.file, &mut bytes, offset)
            .map_err(|e| Error::os(format!("reading '{}' at {offset}", self.path.display()), e))?;
        Ok(bytes)
    }

    /// This file's content is wrong.
    pub fn bad(&self, why: impl std::fmt::Display) -> Error {
        Error::new(ErrorKind::BadImage, format!("'{}' {why}", self.path.display()))
    }
}

/// Loads the kernel, whichever of the formats it has.
pub(super) fn load(memory: &Memory, linux: &LinuxBoot) -> Result<Image> {
    let source = Source::open(&linux.kernel, "the kernel")?;
    let mut magic = [0; 4];
    source.read(0, &mut magic)?;
    if magic == elf::MAGIC {
        return elf::load_file(memory, &source);
    }
    if bzimage::recognize(&source)? {
        return bzimage::load(memory, &source, linux.kaslr);
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
    let mut source = Source::open(path, "the initrd")?;
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
    copy(memory, &mut source, start)?;
    Ok(range)
}

/// Copies a whole file to `start`, a piece at a time.
fn copy(memory: &Memory, source: &mut Source, start: u64) -> Result<()> {
    let mut piece = vec![0; 256 << 10];
    let mut done = 0;
    while done < source.size {
        let want = (source.size - done).min(piece.len() as u64) as usize;
        let bytes = &mut piece[..want];
        source.file.read_exact(bytes).map_err(|e| {
            Error::os(
                format!("reading '{}' at {done}: it changed while it was read", source.path.display()),
                e,
            )
        })?;
        write(memory, start + done, bytes)?;
        done += want as u64;
    }
    Ok(())
}

/// Whether `range` is all guest memory above the first MiB and outside the device window.
pub(super) fn fits(memory: &Memory, range: &Range<u64>) -> bool {
    range.start >= KERNEL_START
        && range.start <= range.end
        && usize::try_from(range.end - range.start)
            .is_ok_and(|length| length > 0 && memory.check_range(GuestAddress(range.start), length))
}
