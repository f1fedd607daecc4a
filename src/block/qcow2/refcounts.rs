#![forbid(unsafe_code)]
//! What must be seen of an image's refcounts before the library may write to it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::sys::image::read_or_zero;

/// QEMU takes no larger table.
const MOST: u64 = 8 << 20;

/// A block of refcounts that is missing, and not behind all others: the library would look for room for it among the clusters that it
/// is to describe, and so for the block again, and so on, or put it over the header.
///
/// # Errors
/// There is one, or the table cannot be read.
pub(super) fn check(file: &File) -> io::Result<()> {
    let mut head = [0; 60];
    file.read_exact_at(&mut head, 0)?;
    let u32_at = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (bits, clusters) = (u32_at(20), u64::from(u32_at(56)));
    let offset = u64::from(u32_at(48)) << 32 | u64::from(u32_at(52));
    // What else is wrong with the header, the library says.
    let length = if bits <= 21 { clusters << bits } else { 0 };
    if length > MOST {
        return Err(io::Error::other(format!("has a refcount table of {length} bytes")));
    }
    let mut table = vec![0; length as usize];
    read_or_zero(file, &mut table, offset)?;
    let mut missing = table.chunks_exact(8).map(|entry| entry.iter().all(|byte| *byte == 0));
    let there = missing.by_ref().take_while(|missing| !missing).count();
    if there == 0 || missing.any(|missing| !missing) {
        return Err(io::Error::other(format!(
            "has no refcounts for its clusters from entry {there} of their table on, and some behind: qemu-img convert makes them anew"
        )));
    }
    Ok(())
}
