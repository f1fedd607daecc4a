#![forbid(unsafe_code)]
//! Boot images without a VM.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::memory_file;
use crate::boot::{self, Identity, Protocol};
use crate::config::{LinuxBoot, Uuid, VmConfig};
use crate::error::{Error, Result};
use crate::memory::Memory;

/// What the loader made of an image.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Where the first vCPU begins.
    pub rip: u64,
    /// Whether by the PVH protocol; else by Linux' own.
    pub pvh: bool,
    /// What was filled: the kernel, then the initrd.
    pub filled: Vec<Range<u64>>,
}

/// Loads a kernel into `size` bytes of fresh guest memory, with its tables, as a build of a VM does.
///
/// # Errors
/// The loader's.
pub fn load_kernel(
    size: u64,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    kaslr: bool,
) -> Result<Loaded> {
    let memory = Memory::new(size)?;
    let (_kernel, path) = file(kernel)?;
    let initrd = initrd.map(file).transpose()?;
    let mut linux = LinuxBoot::new(path);
    linux.initrd = initrd.as_ref().map(|(_, path)| path.clone());
    (linux.cmdline, linux.kaslr) = (cmdline.into(), kaslr);
    let config = VmConfig::linux(linux.clone());
    let machine = crate::vm::describe(&config, &memory);
    let identity = Identity { uuid: Uuid([0; 16]), name: "internals".into() };
    let entry = boot::linux(&memory, &linux, &machine, &identity)?;
    let pvh = matches!(entry.protocol, Protocol::Pvh { .. });
    Ok(Loaded { rip: entry.rip, pvh, filled: entry.filled })
}

/// A file in memory, and a path that opens it while the file lives.
fn file(bytes: &[u8]) -> Result<(File, PathBuf)> {
    let file = memory_file(bytes.len() as u64)?;
    file.write_all_at(bytes, 0).map_err(|e| Error::os("filling a memfd", e))?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    Ok((file, path))
}
