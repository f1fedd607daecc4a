#![forbid(unsafe_code)]
//! The synchronous engine: one system call per request, on the caller's thread.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use crate::block::BlockOp;
use crate::sys::io::{IoList, read_at, write_at};

/// Does the request: all of it, or an error.
pub(in crate::block) fn perform(
    file: &File,
    op: BlockOp,
    mut offset: u64,
    mut buffers: IoList<'_>,
) -> io::Result<()> {
    let durable = match op {
        BlockOp::Flush => return file.sync_data(),
        BlockOp::Read => None,
        BlockOp::Write { durable } => Some(durable),
    };
    let mut left = buffers.remaining();
    while left > 0 {
        let step = match durable {
            None => read_at(file.as_fd(), &buffers, offset),
            Some(durable) => write_at(file.as_fd(), &buffers, offset, durable),
        };
        match step {
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
