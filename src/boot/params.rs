#![forbid(unsafe_code)]
//! What a kernel is told: the zero page of Linux' protocol, or PVH's start structure; the memory map.

use std::ops::Range;
use std::path::Path;

use super::{acpi, place, write};
use crate::config::validate::MAX_CMDLINE;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Memory, layout};

/// `E820_TYPE_RAM` and `E820_TYPE_RESERVED`; PVH's map uses the same numbers.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Offsets in the zero page (`struct boot_params`).
mod field {
    pub(super) const ACPI_RSDP: usize = 0x70;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const SETUP_HEADER: usize = 0x1f1;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const E820_TABLE: usize = 0x2d0;
}

/// "Undefined" loader, as the protocol wants of those without a number.
const LOADER_UNDEFINED: u8 = 0xff;
const PVH_MAGIC: u32 = 0x336e_c578;

/// The command line with its NUL.
pub(super) fn terminated(cmdline: &str, max: usize, kernel: &Path) -> Result<Vec<u8>> {
    let max = max.min(MAX_CMDLINE);
    if cmdline.len() > max {
        let why = format!("the command line has {} bytes, '{}' takes {max}", cmdline.len(), kernel.display());
        return Err(Error::new(ErrorKind::InvalidArgument, why));
    }
    Ok([cmdline.as_bytes(), &[0]].concat())
}

/// The guest's memory as firmware would describe it.
fn memory_map(memory: &Memory) -> Vec<(Range<u64>, u32)> {
    let mut map = Vec::new();
    let firmware = layout::FIRMWARE_AREA;
    for ram in layout::ram(memory.size()) {
        if ram.contains(&firmware.start) {
            map.push((ram.start..firmware.start, RAM));
            map.push((firmware.clone(), RESERVED));
            map.push((firmware.end..ram.end, RAM));
        } else {
            map.push((ram, RAM));
        }
    }
    map.push((layout::ECAM, RESERVED));
    map
}

/// Fills the zero page: `header` is the kernel's own setup header.
pub(super) fn write_zero_page(
    memory: &Memory,
    header: &[u8],
    initrd: Option<Range<u64>>,
    cmdline: usize,
) -> Result<()> {
    let mut page = [0u8; 4096];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(field::SETUP_HEADER, header);
    put(field::TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(field::ACPI_RSDP, &acpi::RSDP.to_le_bytes());
    if cmdline > 0 {
        put(field::CMD_LINE_PTR, &(place::CMDLINE as u32).to_le_bytes());
    }
    if let Some(initrd) = initrd {
        // Below 4 GiB: the header's 32-bit limit was kept.
        put(field::RAMDISK_IMAGE, &(initrd.start as u32).to_le_bytes());
        put(field::RAMDISK_SIZE, &((initrd.end - initrd.start) as u32).to_le_bytes());
    }
    let map = memory_map(memory);
    put(field::E820_ENTRIES, &[map.len() as u8]);
    for (i, (range, kind)) in map.iter().enumerate() {
        let at = field::E820_TABLE + i * 20;
        put(at, &range.start.to_le_bytes());
        put(at + 8, &(range.end - range.start).to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    write(memory, place::ZERO_PAGE, &page)
}

/// Writes `hvm_start_info` version 1, its memory map and, for an initrd, its one module.
pub(super) fn write_pvh(memory: &Memory, initrd: Option<Range<u64>>) -> Result<()> {
    let map = memory_map(memory);
    let mut start = Vec::with_capacity(56);
    for word in [PVH_MAGIC, 1, 0, u32::from(initrd.is_some())] {
        start.extend(word.to_le_bytes());
    }
    for address in [place::PVH_MODULES, place::CMDLINE, acpi::RSDP, place::ZERO_PAGE] {
        start.extend(address.to_le_bytes());
    }
    start.extend((map.len() as u32).to_le_bytes());
    start.extend(0u32.to_le_bytes());
    write(memory, place::PVH_START, &start)?;
    let map: Vec<u8> = map
        .iter()
        .flat_map(|(r, kind)| [r.start, r.end - r.start, u64::from(*kind)])
        .flat_map(u64::to_le_bytes)
        .collect();
    write(memory, place::ZERO_PAGE, &map)?;
    let Some(initrd) = initrd else { return Ok(()) };
    let module: Vec<u8> =
        [initrd.start, initrd.end - initrd.start, 0, 0].into_iter().flat_map(u64::to_le_bytes).collect();
    write(memory, place::PVH_MODULES, &module)
}
