#![forbid(unsafe_code)]
//! bzImages, as distributions ship kernels (Linux' Documentation/arch/x86/boot.rst).
//!
//! An LZ4 payload is unpacked here: the guest need not do it on memory that it must fault in page by
//! page. Any other goes into memory as it is, and its own decompressor runs first.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::elf;
use super::kernel::{Image, Source, fits};
use super::lz4::{Fault, Packed, Unpacker};
use crate::error::Result;
use crate::memory::Memory;

/// Where the setup header starts in the file, and in the zero page.
pub(super) const SETUP_HEADER: usize = 0x1f1;
/// What the header's jump instruction counts from, to its end.
const JUMPED_FROM: usize = 0x202;
/// The end of the last field that we need (`init_size`), which protocol 2.12 has for sure.
const MIN_END: usize = 0x264;
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The first protocol with a 64-bit entry.
const MIN_VERSION: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry within the protected-mode part.
const ENTRY_64: u64 = 0x200;

/// `lz4 -l`, which the kernel's build uses: this magic, then blocks that unpack to 8 MiB each.
const LZ4_LEGACY: [u8; 4] = 0x184c_2102u32.to_le_bytes();
const LZ4_BLOCK: u64 = 8 << 20;

/// No kernel unpacks to more than this.
const MAX_UNPACKED: u64 = 1 << 30;
/// A setup header, and what follows from it.
struct Header {
    setup: setup_header,
    /// Where the protected-mode part starts in the file.
    kernel_offset: u64,
    /// The packed kernel in the file.
    payload: std::ops::Range<u64>,
}

/// Reads the setup header as far as its own length tells; zeroes follow. `None` where there is none.
fn setup_header(source: &Source) -> Result<Option<setup_header>> {
    let mut setup = setup_header::default();
    let room = (source.size as usize).saturating_sub(SETUP_HEADER).min(size_of::<setup_header>());
    source.read(SETUP_HEADER as u64, &mut setup.as_mut_slice()[..room])?;
    if setup.boot_flag != BOOT_FLAG || setup.header != MAGIC {
        return Ok(None);
    }
    let [_, displacement] = setup.jump.to_le_bytes();
    let end = (JUMPED_FROM + usize::from(displacement)).max(MIN_END) - SETUP_HEADER;
    setup.as_mut_slice().iter_mut().skip(end).for_each(|byte| *byte = 0);
    Ok(Some(setup))
}

/// Loads it, or says `None` where it is no bzImage.
pub(super) fn load(memory: &Memory, source: &Source, kaslr: bool) -> Result<Option<Image>> {
    if source.size <= SETUP_HEADER as u64 {
        return Ok(None);
    }
    let Some(setup) = setup_header(source)? else { return Ok(None) };
    let header = Header::check(source, setup)?;
    let mut magic = [0; 4];
    if header.payload.end - header.payload.start > 8 {
        source.read(header.payload.start, &mut magic)?;
    }
    let mut image = if magic == LZ4_LEGACY && !kaslr {
        unpack(memory, source, &header)?
    } else {
        load_packed(memory, source, &header)?
    };
    (image.cmdline_max, image.initrd_max) = (setup.cmdline_size as usize, setup.initrd_addr_max.into());
    Ok(Some(image))
}

impl Header {
    fn check(source: &Source, setup: setup_header) -> Result<Self> {
        let (version, sectors) = (setup.version, u64::from(setup.setup_sects));
        if version < MIN_VERSION {
            let (major, minor) = (version >> 8, version & 0xff);
            let why = format!("speaks boot protocol {major}.{minor:02}; 2.12 (Linux 3.8) is needed");
            return Err(source.bad(why));
        }
        if source.size < MIN_END as u64 {
            let why = format!("is truncated: it has {} bytes, but {MIN_END} are needed", source.size);
            return Err(source.bad(why));
        }
        if setup.xloadflags & XLF_KERNEL_64 == 0 || setup.loadflags & LOADED_HIGH == 0 {
            return Err(source.bad("is no 64-bit kernel (xloadflags, loadflags)"));
        }
        let kernel_offset = (if sectors == 0 { 4 } else { sectors } + 1) * 512;
        if kernel_offset >= source.size {
            let size = source.size;
            let why = format!("ends within its setup part: setup_sects says {kernel_offset} of {size} bytes");
            return Err(source.bad(why));
        }
        let start = kernel_offset + u64::from(setup.payload_offset);
        let payload = start..start + u64::from(setup.payload_length);
        if payload.end > source.size {
            let (end, size) = (payload.end, source.size);
            return Err(source.bad(format!("is truncated: its payload ends at {end}, the file at {size}")));
        }
        Ok(Self { setup, kernel_offset, payload })
    }
}

/// Unpacks an LZ4 payload block by block into the ELF image that it is.
fn unpack(memory: &Memory, source: &Source, header: &Header) -> Result<Image> {
    let mut blocks = Blocks::new(source, header)?;
    let size = blocks.unpacked_size;
    let mut loader: Option<elf::Loader> = None;
    let mut unpacker = Unpacker::new(|at, piece: &[u8]| {
        let loader = match &mut loader {
            Some(loader) => loader,
            none => {
                let new = elf::Loader::new(memory, source, piece, size)?;
                new.collapse(memory);
                none.insert(new)
            }
        };
        loader.feed(memory, at, piece)
    });
    let fault = |fault, done| match fault {
        Fault::Caller(error) => error,
        Fault::Damaged(why) => source
            .bad(format!("has a damaged LZ4 payload, in the block at {done} of the unpacked image: {why}")),
    };
    let mut packed = Packed::new(|offset, buffer: &mut [u8]| source.read(offset, buffer));
    while unpacker.done() < size {
        let start = unpacker.done();
        packed.begin(blocks.next(start)?);
        unpacker.block(&mut packed, LZ4_BLOCK.min(size - start)).map_err(|f| fault(f, start))?;
        // All but the last are full: a few bytes each would keep us busy for ever.
        if unpacker.done() != size.min(start + LZ4_BLOCK) {
            return Err(blocks.wrong_size(&format!("{} by the block at {start}", unpacker.done())));
        }
    }
    loader.ok_or_else(|| source.bad("has an empty payload"))?.finish(source, Some(&header.setup))
}

/// The blocks of a payload: each is its length and so many bytes.
struct Blocks<'a> {
    source: &'a Source,
    /// Where in the file the next one is, and where the last one ends.
    rest: std::ops::Range<u64>,
    /// What the payload's last four bytes tell, which is what the kernel's own decompressor goes by.
    unpacked_size: u64,
}

impl<'a> Blocks<'a> {
    fn new(source: &'a Source, header: &Header) -> Result<Self> {
        let rest = header.payload.start + 4..header.payload.end - 4;
        let mut size = [0; 4];
        source.read(rest.end, &mut size)?;
        let unpacked_size = u64::from(u32::from_le_bytes(size));
        let blocks = Self { source, rest, unpacked_size };
        if unpacked_size > MAX_UNPACKED {
            return Err(blocks.wrong_size(&format!("at most {MAX_UNPACKED}")));
        }
        Ok(blocks)
    }

    /// Where in the file the next block is; `done` is what those before it unpacked to.
    fn next(&mut self, done: u64) -> Result<std::ops::Range<u64>> {
        let mut length = [0; 4];
        if self.rest.end - self.rest.start < 4 {
            return Err(self.wrong_size(&done.to_string()));
        }
        self.source.read(self.rest.start, &mut length)?;
        let length = u64::from(u32::from_le_bytes(length));
        let block = self.rest.start + 4..self.rest.start + 4 + length;
        if length == 0 || block.end > self.rest.end {
            let left = self.rest.end - block.start;
            let why = format!(
                "has a damaged LZ4 payload: the block at {} of the file has {length} of the {left} bytes left",
                block.start
            );
            return Err(self.source.bad(why));
        }
        self.rest.start = block.end;
        Ok(block)
    }

    fn wrong_size(&self, got: &str) -> crate::Error {
        let size = self.unpacked_size;
        self.source.bad(format!("is damaged: its payload unpacks to {got}, but says {size} bytes"))
    }
}

/// Puts the packed kernel where it wants to be, to unpack itself.
fn load_packed(memory: &Memory, source: &Source, header: &Header) -> Result<Image> {
    let length = source.size - header.kernel_offset;
    let start = header.setup.pref_address;
    let range = start..start.saturating_add(u64::from(header.setup.init_size).max(length));
    // The entry lies within what was read, too.
    if !fits(memory, &range) || length <= ENTRY_64 {
        let why = format!(
            "needs {:#x}-{:#x} to unpack itself, which is not all guest memory (the guest has {} bytes)",
            range.start,
            range.end,
            memory.size()
        );
        return Err(source.bad(why));
    }
    memory.collapse(range.clone());
    source.copy(memory, header.kernel_offset, length, start)?;
    Ok(Image { entry: start + ENTRY_64, range, header: Some(header.setup), cmdline_max: 0, initrd_max: 0 })
}
