//! Files as the library for disk images (imago) wants them.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::storage::{PreallocateMode, Storage};

use super::file::{Range, change};

/// A file of an image: what lies in it beyond the metadata is moved by the disk's own engines, so nothing about it is kept here.
#[derive(Debug)]
pub(crate) struct Store {
    file: File,
    /// Its place in the chain of images: 0 is the one on top.
    pub layer: usize,
    helper: CommonStorageHelper,
}

impl Store {
    pub fn new(file: File, layer: usize) -> Self {
        Self { file, layer, helper: CommonStorageHelper::default() }
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image {}", self.layer)
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL))
}

// The methods are unsafe for what their callers promise, on which nothing here depends: every access is one of a file.
impl Storage for Store {
    fn size(&self) -> io::Result<u64> {
        self.file.metadata().map(|m| m.len())
    }

    unsafe fn pure_readv(&self, buffers: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut buffer in buffers.into_inner() {
            let mut rest: &mut [u8] = &mut buffer;
            while !rest.is_empty() {
                match self.file.read_at(rest, offset) {
                    Ok(0) => {
                        rest.fill(0);
                        offset += rest.len() as u64;
                        rest = &mut [];
                    }
                    Ok(count) => {
                        offset += count as u64;
                        rest = &mut rest[count..];
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, buffers: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        for buffer in buffers.into_inner() {
            self.file.write_all_at(&buffer, offset)?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        let there = self.size()?;
        if there < end {
            self.file.set_len(end)?;
        }
        match change(self.file.as_fd(), Range::Punch, offset, length) {
            Err(error) if is_unsupported(&error) => {}
            done => return done,
        }
        let zeroes = vec![0; length.min(1 << 16) as usize];
        let mut at = offset;
        while at < end {
            let step = (end - at).min(zeroes.len() as u64);
            self.file.write_all_at(&zeroes[..step as usize], at)?;
            at += step;
        }
        Ok(())
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        match change(self.file.as_fd(), Range::Punch, offset, length) {
            Err(error) if is_unsupported(&error) => Ok(()),
            done => done,
        }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, size: u64, mode: PreallocateMode) -> io::Result<()> {
        match mode {
            PreallocateMode::None | PreallocateMode::Zero => self.file.set_len(size),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
