#![forbid(unsafe_code)]
//! What is in memory when the guest's first instruction runs: kernel, initrd, command line, the tables of
//! the platform; or an embedder's own bytes.
//!
//! Everything here is host-side reading of files that may be hostile: each length and offset is checked
//! before it is used, and an error names the file and the field.

use std::ops::Range;

use vm_memory::{Bytes, GuestAddress};

use crate::config::{BareBoot, CpuMode, LinuxBoot};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{HUGE, Memory, layout};

pub(crate) mod acpi;
mod bzimage;
mod elf;
mod kernel;
mod lz4;
mod params;
mod smbios;
mod tests;

pub(crate) use acpi::Machine;
pub(crate) use smbios::Identity;

/// Where things lie below 640 KiB, out of the way of any kernel.
mod place {
    /// Two flat descriptors and a task state segment.
    pub(super) const GDT: u64 = 0x500;
    /// PVH's `hvm_start_info`, then its list of modules.
    pub(super) const PVH_START: u64 = 0x6000;
    pub(super) const PVH_MODULES: u64 = 0x6100;
    /// The zero page (`boot_params`), or PVH's memory map.
    pub(super) const ZERO_PAGE: u64 = 0x7000;
    /// Six pages of identity map.
    pub(super) const PAGE_TABLES: u64 = 0x9000;
    pub(super) const CMDLINE: u64 = 0x2_0000;
}

/// How the first vCPU enters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// Linux' 64-bit boot protocol: the zero page in RSI.
    Linux64 { zero_page: u64 },
    /// Xen's PVH, as KVM's users know it: `hvm_start_info` in EBX, 32-bit, no paging.
    Pvh { start_info: u64 },
    /// An embedder's own code.
    Bare { mode: CpuMode, stack: u64 },
}

/// What was loaded, and where it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub rip: u64,
    pub protocol: Protocol,
    /// The identity map's root, where the protocol wants paging.
    pub page_tables: u64,
    /// Address and limit of the descriptor table; 0 for none.
    pub gdt: (u64, u16),
    /// What the loader filled.
    #[cfg(any(test, feature = "internals"))]
    pub filled: Vec<Range<u64>>,
}

/// Loads a Linux kernel and everything that it is told.
pub(crate) fn linux(
    memory: &Memory,
    linux: &LinuxBoot,
    machine: &Machine,
    identity: &Identity,
) -> Result<Entry> {
    let image = kernel::load(memory, linux)?;
    // Before the initrd, which lies at the end of memory: in huge pages it comes cheaper.
    boot_window(memory, &image.range).into_iter().for_each(|window| memory.collapse(window));
    let initrd = linux.initrd.as_deref().map(|path| kernel::load_initrd(memory, path, &image)).transpose()?;
    write(memory, place::CMDLINE, &params::terminated(&linux.cmdline, image.cmdline_max, &linux.kernel)?)?;
    acpi::write(memory, machine)?;
    smbios::write_tables(memory, identity)?;
    #[cfg(any(test, feature = "internals"))]
    let filled = std::iter::once(image.range.clone()).chain(initrd.clone()).collect();
    let (protocol, page_tables) = match &image.header {
        Some(header) => {
            params::write_zero_page(memory, header, initrd)?;
            identity_map(memory, place::PAGE_TABLES)?;
            (Protocol::Linux64 { zero_page: place::ZERO_PAGE }, place::PAGE_TABLES)
        }
        None => {
            params::write_pvh(memory, initrd)?;
            (Protocol::Pvh { start_info: place::PVH_START }, 0)
        }
    };
    let gdt = write_gdt(memory, place::GDT, page_tables != 0)?;
    Ok(Entry {
        rip: image.entry,
        protocol,
        page_tables,
        gdt,
        #[cfg(any(test, feature = "internals"))]
        filled,
    })
}

/// What every Linux fills before its init runs, beside itself: the memory after its image (early heap,
/// slabs) and the end of its memory (page structures, hash tables, per-CPU data). Seen on Debian's 6.1
/// with 256 MiB, whose first 6,000 page faults these save; less than this it never uses.
fn boot_window(memory: &Memory, kernel: &Range<u64>) -> Vec<Range<u64>> {
    const AFTER: u64 = 18 << 20;
    const LAST: u64 = 10 << 20;
    if memory.size() < 128 << 20 {
        return Vec::new();
    }
    // From the last piece that the kernel shares on: what it shares is huge already.
    let after = kernel.end / HUGE * HUGE..kernel.end + AFTER;
    let last =
        layout::ram(memory.size()).pop().map_or(0..0, |r| r.end.saturating_sub(LAST).max(r.start)..r.end);
    vec![after, last]
}

/// Puts an embedder's bytes where they belong. The configuration was validated.
pub(crate) fn bare(memory: &Memory, bare: &BareBoot) -> Result<Entry> {
    // Six tables, the last 24 KiB of the memory below 3 GiB, as the configuration's documentation says.
    let low_end = layout::ram(memory.size()).first().map_or(0, |r| r.end);
    let page_tables = match bare.mode {
        CpuMode::Long => {
            let at = low_end.saturating_sub(6 << 12);
            identity_map(memory, at)?;
            at
        }
        _ => 0,
    };
    for (address, bytes) in &bare.images {
        write(memory, *address, bytes)?;
    }
    let protocol = Protocol::Bare { mode: bare.mode, stack: bare.stack };
    Ok(Entry {
        rip: bare.entry,
        protocol,
        page_tables,
        gdt: (0, 0),
        #[cfg(any(test, feature = "internals"))]
        filled: Vec::new(),
    })
}

/// Writes to guest memory; everything here was checked to fit before.
fn write(memory: &Memory, address: u64, bytes: &[u8]) -> Result<()> {
    memory.write_slice(bytes, GuestAddress(address)).map_err(|e| {
        let what = format!("{} bytes at {address:#x} do not fit the guest's memory", bytes.len());
        Error::new(ErrorKind::InvalidArgument, what).with_source(e)
    })
}

/// The first 4 GiB mapped onto themselves with 2 MiB pages, in six tables from `at`.
fn identity_map(memory: &Memory, at: u64) -> Result<()> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let page = |n: u64| at + (n << 12);
    let mut tables = Vec::with_capacity(6 << 12);
    let table = |entries: &mut dyn Iterator<Item = u64>| -> Vec<u8> {
        let mut bytes: Vec<u8> = entries.flat_map(u64::to_le_bytes).collect();
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        bytes
    };
    tables.extend(table(&mut std::iter::once(page(1) | PRESENT_WRITABLE)));
    tables.extend(table(&mut (0..4).map(|i| page(2 + i) | PRESENT_WRITABLE)));
    tables.extend(table(&mut (0..2048).map(|i| i << 21 | LARGE | PRESENT_WRITABLE)));
    write(memory, at, &tables)
}

/// A descriptor table with flat code at 0x10, flat data at 0x18 and a task state segment at 0x20.
fn write_gdt(memory: &Memory, at: u64, long: bool) -> Result<(u64, u16)> {
    let code = if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
    let entries: [u64; 5] = [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
    let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
    write(memory, at, &bytes)?;
    Ok((at, bytes.len() as u16 - 1))
}
