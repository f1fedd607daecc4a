//! Files as the library for disk images (imago) wants them.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::storage::{PreallocateMode, Storage};

use super::file::{Range, change};

/// A file of an image: what lies in it beyond the metadata is moved by the disk's own engines, so nothing about it is kept here.
#[derive(Debug)]
pub(crate) struct Store {
    source: Source,
    /// Its place in the chain of images: 0 is the one on top.
    pub layer: usize,
    helper: CommonStorageHelper,
}

#[derive(Debug)]
enum Source {
    File(File),
    Content(Arc<dyn Content>),
}

/// What stands in for a file that is only read.
pub(crate) trait Content: fmt::Debug + Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;
    /// Fills the buffer; behind the end, with zeroes.
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Store {
    pub fn new(file: File, layer: usize) -> Self {
        Self { source: Source::File(file), layer, helper: CommonStorageHelper::default() }
    }

    /// On no file of its own.
    pub fn of(content: Arc<dyn Content>, layer: usize) -> Self {
        Self { source: Source::Content(content), layer, helper: CommonStorageHelper::default() }
    }

    /// The file, to be written to.
    fn file(&self) -> io::Result<&File> {
        match &self.source {
            Source::File(file) => Ok(file),
            Source::Content(_) => Err(io::Error::from_raw_os_error(libc::EROFS)),
        }
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image {}", self.layer)
    }
}

/// Fills the buffer from a file, behind whose end lie zeroes.
pub(crate) fn read_or_zero(file: &File, mut rest: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !rest.is_empty() {
        match file.read_at(rest, offset) {
            Ok(0) => {
                rest.fill(0);
                return Ok(());
            }
            Ok(count) => {
                offset += count as u64;
                rest = &mut rest[count..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL))
}

// The methods are unsafe for what their callers promise, on which nothing here depends: every access is one of a file.
impl Storage for Store {
    fn size(&self) -> io::Result<u64> {
        match &self.source {
            Source::File(file) => Ok(super::file::status(file.as_fd())?.st_size.unsigned_abs()),
            Source::Content(content) => Ok(content.size()),
        }
    }

    unsafe fn pure_readv(&self, buffers: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        let file = match &self.source {
            Source::File(file) => file,
            Source::Content(content) => {
                for mut buffer in buffers.into_inner() {
                    content.read(&mut buffer, offset)?;
                    offset += buffer.len() as u64;
                }
                return Ok(());
            }
        };
        for mut buffer in buffers.into_inner() {
            read_or_zero(file, &mut buffer, offset)?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, buffers: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        for buffer in buffers.into_inner() {
            self.file()?.write_all_at(&buffer, offset)?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        let there = self.size()?;
        if there < end {
            self.file()?.set_len(end)?;
        }
        match change(self.file()?.as_fd(), Range::Punch, offset, length) {
            Err(error) if is_unsupported(&error) => {}
            done => return done,
        }
        let zeroes = vec![0; length.min(1 << 16) as usize];
        let mut at = offset;
        while at < end {
            let step = (end - at).min(zeroes.len() as u64);
            self.file()?.write_all_at(&zeroes[..step as usize], at)?;
            at += step;
        }
        Ok(())
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        match change(self.file()?.as_fd(), Range::Punch, offset, length) {
            Err(error) if is_unsupported(&error) => Ok(()),
            done => done,
        }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        match &self.source {
            Source::File(file) => file.sync_data(),
            Source::Content(_) => Ok(()),
        }
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, size: u64, mode: PreallocateMode) -> io::Result<()> {
        match mode {
            PreallocateMode::None | PreallocateMode::Zero => self.file()?.set_len(size),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
