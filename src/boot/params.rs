#![forbid(unsafe_code)]
//! What a kernel is told: the zero page of Linux' protocol, or PVH's start structure; the memory map.

use std::ops::Range;
use std::path::Path;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued;

use super::{acpi, place, write};
use crate::config::validate::MAX_CMDLINE;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Memory, layout};

/// `E820_TYPE_RAM` and `E820_TYPE_RESERVED`; PVH's map uses the same numbers.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

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

/// Fills the zero page: `setup` is the kernel's own setup header.
pub(super) fn write_zero_page(
    memory: &Memory,
    setup: &setup_header,
    initrd: Option<Range<u64>>,
) -> Result<()> {
    let mut page = boot_params { hdr: *setup, acpi_rsdp_addr: acpi::RSDP, ..boot_params::default() };
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = place::CMDLINE as u32;
    // Below 4 GiB: the header's 32-bit limit was kept. What the image says itself is nothing that was loaded.
    let initrd = initrd.unwrap_or(0..0);
    page.hdr.ramdisk_image = initrd.start as u32;
    page.hdr.ramdisk_size = (initrd.end - initrd.start) as u32;
    let map = memory_map(memory);
    page.e820_entries = map.len() as u8;
    for (entry, (range, kind)) in page.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: kind };
    }
    write(memory, place::ZERO_PAGE, page.as_slice())
}

/// Writes `hvm_start_info` version 1, its memory map and, for an initrd, its one module.
pub(super) fn write_pvh(memory: &Memory, initrd: Option<Range<u64>>) -> Result<()> {
    let map = memory_map(memory);
    let start = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: place::PVH_MODULES,
        cmdline_paddr: place::CMDLINE,
        rsdp_paddr: acpi::RSDP,
        memmap_paddr: place::ZERO_PAGE,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    write(memory, place::PVH_START, start.as_slice())?;
    for (at, (range, kind)) in (place::ZERO_PAGE..).step_by(size_of::<hvm_memmap_table_entry>()).zip(map) {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.end - range.start,
            type_: kind,
            reserved: 0,
        };
        write(memory, at, entry.as_slice())?;
    }
    let Some(initrd) = initrd else { return Ok(()) };
    let module = hvm_modlist_entry {
        paddr: initrd.start,
        size: initrd.end - initrd.start,
        ..hvm_modlist_entry::default()
    };
    write(memory, place::PVH_MODULES, module.as_slice())
}
