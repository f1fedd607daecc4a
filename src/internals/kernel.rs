#![forbid(unsafe_code)]
//! Boot images without a VM.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{memory_file, outside};
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
    /// What the kernel is told, as it finds it by its protocol's pointers.
    pub told: Told,
}

/// What a kernel finds.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Its command line, up to the NUL.
    pub cmdline: Vec<u8>,
    /// Where its initrd is said to be.
    pub initrd: Option<Range<u64>>,
    /// What is there.
    pub initrd_bytes: Vec<u8>,
    /// The memory map; 1 is RAM.
    pub map: Vec<(Range<u64>, u32)>,
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
    let told = told(&memory, &entry.protocol).map_err(|e| outside(0, e))?;
    Ok(Loaded { rip: entry.rip, pvh, filled: entry.filled, told })
}

/// Follows the pointers: those of the zero page (Documentation/arch/x86/zero-page.rst), or of `hvm_start_info`.
fn told(memory: &Memory, protocol: &Protocol) -> std::result::Result<Told, GuestMemoryError> {
    let long = |at: u64| memory.read_obj::<u64>(GuestAddress(at));
    let word = |at: u64| memory.read_obj::<u32>(GuestAddress(at)).map(u64::from);
    let (cmdline, initrd, table, count, step) = match *protocol {
        Protocol::Linux64 { zero_page: at } => {
            let count = memory.read_obj::<u8>(GuestAddress(at + 0x1e8))?.into();
            (word(at + 0x228)?, (word(at + 0x218)?, word(at + 0x21c)?), at + 0x2d0, count, 20)
        }
        Protocol::Pvh { start_info: at } => {
            let modules = long(at + 16)?;
            let initrd = if word(at + 12)? > 0 { (long(modules)?, long(modules + 8)?) } else { (0, 0) };
            (long(at + 24)?, initrd, long(at + 40)?, word(at + 48)?, 24)
        }
        Protocol::Bare { .. } => return Ok(Told::default()),
    };
    let mut found = Told::default();
    for at in cmdline.. {
        match memory.read_obj::<u8>(GuestAddress(at))? {
            0 => break,
            byte => found.cmdline.push(byte),
        }
    }
    for at in (table..).step_by(step).take(count as usize) {
        let start = long(at)?;
        found.map.push((start..start + long(at + 8)?, word(at + 16)? as u32));
    }
    if let (start, length @ 1..) = initrd {
        found.initrd = Some(start..start + length);
        found.initrd_bytes = vec![0; length as usize];
        memory.read_slice(&mut found.initrd_bytes, GuestAddress(start))?;
    }
    Ok(found)
}

/// A file in memory, and a path that opens it while the file lives.
fn file(bytes: &[u8]) -> Result<(File, PathBuf)> {
    let file = memory_file(bytes.len() as u64)?;
    file.write_all_at(bytes, 0).map_err(|e| Error::os("filling a memfd", e))?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    Ok((file, path))
}
