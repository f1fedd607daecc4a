#![forbid(unsafe_code)]
//! The synchronous engine: system calls on the caller's thread, until all is done.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use crate::sys::file::{Range, change};
use crate::sys::io::{IoList, read_at, write_at};

/// Fills some of the buffers, from the first on; 0 behind the end of the file.
#[cfg(feature = "qcow2")]
pub(in crate::block) fn read_some(file: &File, offset: u64, buffers: &IoList<'_>) -> io::Result<usize> {
    loop {
        match read_at(file.as_fd(), buffers, offset) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// Fills the buffers: all of them, or an error.
pub(in crate::block) fn read(file: &File, offset: u64, buffers: IoList<'_>) -> io::Result<()> {
    all(offset, buffers, |buffers, offset| read_at(file.as_fd(), buffers, offset))
}

/// Writes the buffers out: all of them, or an error.
pub(in crate::block) fn write(
    file: &File,
    offset: u64,
    buffers: IoList<'_>,
    durable: bool,
) -> io::Result<()> {
    all(offset, buffers, |buffers, offset| write_at(file.as_fd(), buffers, offset, durable))
}

fn all(
    mut offset: u64,
    mut buffers: IoList<'_>,
    mut some: impl FnMut(&IoList<'_>, u64) -> io::Result<usize>,
) -> io::Result<()> {
    let mut left = buffers.remaining();
    while left > 0 {
        match some(&buffers, offset) {
            // The file has become shorter than the disk. Zeroes would be a lie about what was there.
            Ok(0) => return Err(io::Error::from_raw_os_error(libc::EIO)),
            Ok(count) => {
                buffers.advance(count);
                left = left.saturating_sub(count as u64);
                offset += count as u64;
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

/// Gives a range back to the host, as far as it takes it: a discard is advice.
pub(in crate::block) fn discard(file: &File, offset: u64, length: u64) -> io::Result<()> {
    match change(file.as_fd(), Range::Punch, offset, length) {
        Err(error) if is_unsupported(&error) => Ok(()),
        done => done,
    }
}

/// To be written where nothing faster is known.
pub(in crate::block) static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Makes a range read as zeroes: a hole, if so asked and the host knows holes, else allocated as it was.
pub(in crate::block) fn write_zeroes(file: &File, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
    let ways: &[Range] = if unmap { &[Range::Punch, Range::Zero] } else { &[Range::Zero] };
    for way in ways {
        match change(file.as_fd(), *way, offset, length) {
            Err(error) if is_unsupported(&error) => {}
            done => return done,
        }
    }
    let (mut pieces, mut done) = (crate::sys::io::Pieces::default(), 0);
    while done < length {
        let step = (length - done).min(ZEROES.len() as u64);
        let mut list = pieces.list();
        list.push_bytes(&ZEROES[..step as usize]);
        write(file, offset + done, list, false)?;
        done += step;
    }
    Ok(())
}
