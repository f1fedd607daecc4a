#![forbid(unsafe_code)]
//! bzImages, as distributions ship kernels (Linux' Documentation/arch/x86/boot.rst).
//!
//! An LZ4 payload is unpacked here: the guest need not do it on memory that it must fault in page by
//! page. Any other goes into memory as it is, and its own decompressor runs first.

use super::elf;
use super::kernel::{Image, Source, fits};
use super::write;
use crate::error::Result;
use crate::memory::Memory;

/// Offsets in the setup header.
mod field {
    pub(super) const SETUP_SECTS: usize = 0x1f1;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    pub(super) const JUMP: usize = 0x200;
    pub(super) const MAGIC: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const INITRD_ADDR_MAX: usize = 0x22c;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const PAYLOAD_OFFSET: usize = 0x248;
    pub(super) const PAYLOAD_LENGTH: usize = 0x24c;
    pub(super) const PREF_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
    /// The end of what we read.
    pub(super) const END: usize = 0x268;
}

/// The first protocol with a 64-bit entry.
const MIN_VERSION: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry within the protected-mode part.
const ENTRY_64: u64 = 0x200;

/// `lz4 -l`, which the kernel's build uses: this magic, then blocks that unpack to 8 MiB each.
const LZ4_LEGACY: [u8; 4] = 0x184c_2102u32.to_le_bytes();
const LZ4_BLOCK: usize = 8 << 20;

/// The checked parts of a setup header.
struct Header {
    /// The first sectors of the file up to the header's end, for the zero page.
    raw: Vec<u8>,
    /// Where the protected-mode part starts in the file.
    kernel_offset: u64,
    payload: (u64, u64),
    pref_address: u64,
    init_size: u64,
    cmdline_max: usize,
    initrd_max: u64,
}

/// Whether the file has a Linux setup header.
pub(super) fn recognize(source: &Source) -> Result<bool> {
    let mut head = [0; field::MAGIC + 4];
    if source.size < head.len() as u64 {
        return Ok(false);
    }
    source.read(0, &mut head)?;
    Ok(head[field::BOOT_FLAG..field::BOOT_FLAG + 2] == [0x55, 0xaa] && &head[field::MAGIC..] == b"HdrS")
}

/// Loads it: unpacked where it is LZ4 and the embedder does not want `kaslr`.
pub(super) fn load(memory: &Memory, source: &Source, kaslr: bool) -> Result<Image> {
    let header = Header::read(source)?;
    let (offset, length) = header.payload;
    let mut magic = [0; 4];
    if length > 8 {
        source.read(offset, &mut magic)?;
    }
    if magic == LZ4_LEGACY && !kaslr {
        let mut image = unpack(memory, source, &header)?;
        (image.cmdline_max, image.initrd_max) = (header.cmdline_max, header.initrd_max);
        return Ok(image);
    }
    load_packed(memory, source, header)
}

impl Header {
    fn read(source: &Source) -> Result<Self> {
        let raw = source.read_vec(0, field::END as u64)?;
        let number = |at: usize, length: usize| {
            raw[at..at + length].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let version = number(field::VERSION, 2) as u16;
        if version < MIN_VERSION {
            let why = format!(
                "speaks boot protocol {}.{:02}; 2.12 (Linux 3.8) is needed",
                version >> 8,
                version & 0xff
            );
            return Err(source.bad(why));
        }
        if number(field::XLOADFLAGS, 2) as u16 & XLF_KERNEL_64 == 0
            || raw[field::LOADFLAGS] & LOADED_HIGH == 0
        {
            return Err(source.bad("is no 64-bit kernel (xloadflags, loadflags)"));
        }
        let sectors = match raw[field::SETUP_SECTS] {
            0 => 4,
            n => u64::from(n),
        };
        let kernel_offset = (sectors + 1) * 512;
        if kernel_offset >= source.size {
            let why = format!(
                "ends within its setup part: setup_sects says {kernel_offset} of {} bytes",
                source.size
            );
            return Err(source.bad(why));
        }
        let payload = (kernel_offset + number(field::PAYLOAD_OFFSET, 4), number(field::PAYLOAD_LENGTH, 4));
        if payload.0 + payload.1 > source.size {
            let why = format!(
                "is truncated: its payload ends at {}, the file at {}",
                payload.0 + payload.1,
                source.size
            );
            return Err(source.bad(why));
        }
        Ok(Self {
            kernel_offset,
            payload,
            pref_address: number(field::PREF_ADDRESS, 8),
            init_size: number(field::INIT_SIZE, 4),
            cmdline_max: number(field::CMDLINE_SIZE, 4) as usize,
            initrd_max: number(field::INITRD_ADDR_MAX, 4),
            raw,
        })
    }

    /// The setup header alone, from 0x1f1 to the end that its jump instruction tells.
    fn for_zero_page(&self) -> Vec<u8> {
        let end = field::MAGIC + usize::from(self.raw[field::JUMP + 1]);
        self.raw[field::SETUP_SECTS..end.clamp(field::SETUP_SECTS, field::END)].to_vec()
    }
}

/// Unpacks an LZ4 payload block by block into the ELF image that it is.
fn unpack(memory: &Memory, source: &Source, header: &Header) -> Result<Image> {
    let (start, length) = header.payload;
    // The payload's last four bytes say how long the image is; they are a hint, and bound what we take.
    let packed = source.read_vec(start, length)?;
    let (body, size) = packed.split_last_chunk::<4>().ok_or_else(|| source.bad("has an empty payload"))?;
    let size = u64::from(u32::from_le_bytes(*size));
    let mut blocks = &body[4..];
    let mut buffer = vec![0; LZ4_BLOCK];
    let mut loader: Option<elf::Loader> = None;
    let mut offset = 0u64;
    while let Some((block, rest)) = next_block(blocks) {
        let got = lz4_flex::block::decompress_into(block, &mut buffer).map_err(|e| {
            source.bad(format!("has a damaged LZ4 payload at {offset} of the unpacked image: {e}"))
        })?;
        let piece = &buffer[..got];
        if loader.is_none() {
            let new = elf::Loader::new(memory, source, piece, size)?;
            memory.collapse(new.range().clone());
            loader = Some(new);
        }
        if let Some(loader) = &mut loader {
            loader.feed(memory, offset, piece)?;
        }
        offset += got as u64;
        blocks = rest;
    }
    if offset != size {
        return Err(
            source.bad(format!("is damaged: its payload unpacks to {offset} bytes instead of {size}"))
        );
    }
    loader.ok_or_else(|| source.bad("has an empty payload"))?.finish(source)
}

/// A block is its length and so many bytes; a length of 0, or one past the end, ends the list.
fn next_block(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let length = u32::from_le_bytes(*length) as usize;
    (length > 0).then(|| rest.split_at_checked(length)).flatten()
}

/// Puts the packed kernel where it wants to be, to unpack itself.
fn load_packed(memory: &Memory, source: &Source, header: Header) -> Result<Image> {
    let length = source.size - header.kernel_offset;
    let range = header.pref_address..header.pref_address.saturating_add(header.init_size.max(length));
    if !fits(memory, &range) {
        let why = format!(
            "needs {:#x}-{:#x} to unpack itself, which is not all guest memory (the guest has {} bytes)",
            range.start,
            range.end,
            memory.size()
        );
        return Err(source.bad(why));
    }
    memory.collapse(range.clone());
    write(memory, range.start, &source.read_vec(header.kernel_offset, length)?)?;
    Ok(Image {
        entry: range.start + ENTRY_64,
        range,
        cmdline_max: header.cmdline_max,
        initrd_max: header.initrd_max,
        header: Some(header.for_zero_page()),
    })
}
