#![forbid(unsafe_code)]
//! ELF kernels: their segments, and the PVH entry in their notes.
//!
//! The image may come from a file or, piece by piece, out of a decompressor; either way its headers are
//! read once from the first piece and checked before anything is written.

use std::ops::Range;

use linux_loader::loader::bootparam::setup_header;

use super::kernel::{Image, Source, fits};
use super::write;
use crate::config::validate::MAX_CMDLINE;
use crate::error::Result;
use crate::memory::Memory;

pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";
/// The ELF header and as many program headers as we take.
const MAX_HEADERS: usize = 64 + 56 * MAX_SEGMENTS;
const MAX_SEGMENTS: usize = 64;
const MAX_NOTES: u64 = 64 << 10;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: where a PVH guest is entered.
const PHYS32_ENTRY: u32 = 18;
const PAGE: usize = 4096;
/// Segments closer than this share huge pages.
const HUGE: u64 = 2 << 20;
/// The initrd stays below 2 GiB, where every Linux finds it.
const INITRD_MAX: u64 = 0x7fff_ffff;

/// A kernel on its way into memory.
pub(super) struct Loader {
    segments: Vec<Segment>,
    notes: Vec<Note>,
    /// `e_entry`: for Linux the first instruction in 64-bit mode, at its physical address.
    start: u64,
}

/// `PT_LOAD`: these bytes of the image belong there.
struct Segment {
    image: Range<u64>,
    memory: Range<u64>,
}

/// `PT_NOTE`: bytes of the image kept until the end.
struct Note {
    image: Range<u64>,
    bytes: Vec<u8>,
}

/// One entry of the program header table.
struct ProgramHeader {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

impl Loader {
    /// Reads and checks the headers at the start of the image; `head` is its first piece, `size` its
    /// whole length.
    pub fn new(memory: &Memory, source: &Source, head: &[u8], size: u64) -> Result<Self> {
        let table = header_table(source, head)?;
        let start = word(head, 24);
        let mut loader = Self { segments: Vec::new(), notes: Vec::new(), start };
        for (i, bytes) in table.chunks_exact(56).enumerate() {
            let header = ProgramHeader::parse(bytes);
            let image = header.offset..header.offset.saturating_add(header.file_size);
            if matches!(header.kind, PT_LOAD | PT_NOTE) && image.end > size {
                let why = format!("program header {i}: its bytes end at {}, the image at {size}", image.end);
                return Err(source.bad(why));
            }
            match header.kind {
                PT_LOAD if header.memory_size > 0 => loader.add_segment(memory, source, i, &header, image)?,
                PT_NOTE if header.file_size <= MAX_NOTES => {
                    loader.notes.push(Note { bytes: vec![0; header.file_size as usize], image });
                }
                _ => {}
            }
        }
        if loader.segments.is_empty() {
            return Err(source.bad("has no segment to load (PT_LOAD)"));
        }
        Ok(loader)
    }

    fn add_segment(
        &mut self,
        memory: &Memory,
        source: &Source,
        index: usize,
        header: &ProgramHeader,
        image: Range<u64>,
    ) -> Result<()> {
        let wrong = |why: String| source.bad(format!("program header {index}: {why}"));
        if header.file_size > header.memory_size {
            return Err(wrong(format!(
                "{} bytes in the file, {} in memory",
                header.file_size, header.memory_size
            )));
        }
        let end = header.address.checked_add(header.memory_size);
        let target = header.address..end.ok_or_else(|| wrong("address and size wrap".to_owned()))?;
        if !fits(memory, &target) {
            let why = format!(
                "occupies {:#x}-{:#x}, which is not all guest memory above 1 MiB (the guest has {} bytes)",
                target.start,
                target.end,
                memory.size()
            );
            return Err(wrong(why));
        }
        let overlaps = |s: &&Segment| s.memory.start < target.end && target.start < s.memory.end;
        if let Some(other) = self.segments.iter().find(overlaps) {
            let why = format!(
                "occupies {:#x}-{:#x} and overlaps another at {:#x}-{:#x}",
                target.start, target.end, other.memory.start, other.memory.end
            );
            return Err(wrong(why));
        }
        self.segments.push(Segment { image, memory: target });
        Ok(())
    }

    /// Makes huge pages of what the kernel will occupy, but not of far stretches between its segments.
    pub fn collapse(&self, memory: &Memory) {
        let mut parts: Vec<_> = self.segments.iter().map(|s| s.memory.clone()).collect();
        parts.sort_by_key(|r| r.start);
        parts.dedup_by(|next, last| {
            let near = next.start - last.end < HUGE;
            if near {
                last.end = next.end;
            }
            near
        });
        parts.into_iter().for_each(|part| memory.collapse(part));
    }

    /// Takes the piece of the image that starts at `offset`.
    pub fn feed(&mut self, memory: &Memory, offset: u64, piece: &[u8]) -> Result<()> {
        for segment in &self.segments {
            if let Some((at, part)) = overlap(&segment.image, offset, piece) {
                write_sparse(memory, segment.memory.start + at, part)?;
            }
        }
        for note in &mut self.notes {
            if let Some((at, part)) = overlap(&note.image, offset, piece) {
                let at = at as usize;
                note.bytes[at..at + part.len()].copy_from_slice(part);
            }
        }
        Ok(())
    }

    /// After the last piece: the kernel's PVH entry. A kernel without one, out of a bzImage with this
    /// `header`, is entered as its own decompressor would: at its start, with a zero page.
    pub fn finish(self, source: &Source, header: Option<&setup_header>) -> Result<Image> {
        let pvh = self.notes.iter().find_map(|note| pvh_entry(&note.bytes));
        let (what, entry, header) = match (pvh, header) {
            (Some(entry), _) => ("PVH entry", entry, None),
            (None, Some(header)) => ("entry (e_entry)", self.start, Some(*header)),
            (None, None) => {
                let why = "has no PVH entry (a Xen note of type 18): build the kernel with CONFIG_PVH";
                return Err(source.bad(why));
            }
        };
        if !self.segments.iter().any(|s| s.memory.contains(&entry)) {
            return Err(source.bad(format!("{what} {entry:#x} is outside of its segments")));
        }
        let start = self.segments.iter().map(|s| s.memory.start).min().unwrap_or(0);
        let end = self.segments.iter().map(|s| s.memory.end).max().unwrap_or(0);
        Ok(Image { entry, range: start..end, header, cmdline_max: MAX_CMDLINE, initrd_max: INITRD_MAX })
    }
}

/// Writes to memory that holds zeroes so far, and leaves out pages of zeroes: half of a kernel's image may
/// be that, and the guest may never touch them.
fn write_sparse(memory: &Memory, address: u64, bytes: &[u8]) -> Result<()> {
    // Most pages that are not zeroes show it at once; the others are looked through in strides long enough
    // for vector instructions.
    let zeroes = |bytes: &[u8]| bytes.iter().fold(0, |all, byte| all | byte) == 0;
    let zero = |page: &[u8]| zeroes(&page[..page.len().min(64)]) && page.chunks(1024).all(zeroes);
    // A page at a time: that much the C library copies with vector instructions, more with `rep movsb`,
    // which emulated processors count by the byte.
    for (page, at) in bytes.chunks(PAGE).zip((address..).step_by(PAGE)) {
        if !zero(page) {
            for (half, at) in page.chunks(PAGE / 2).zip((at..).step_by(PAGE / 2)) {
                write(memory, at, half)?;
            }
        }
    }
    Ok(())
}

/// Loads an ELF file, reading only what its segments and notes hold.
pub(super) fn load_file(memory: &Memory, source: &Source) -> Result<Image> {
    let mut head = vec![0; source.size.min(MAX_HEADERS as u64) as usize];
    source.read(0, &mut head)?;
    let mut loader = Loader::new(memory, source, &head, source.size)?;
    loader.collapse(memory);
    for segment in &loader.segments {
        let length = segment.image.end - segment.image.start;
        source.copy(memory, segment.image.start, length, segment.memory.start)?;
    }
    for note in &mut loader.notes {
        source.read(note.image.start, &mut note.bytes)?;
    }
    loader.finish(source, None)
}

/// The program header table within `head`, after the ELF header was found to be ours.
fn header_table<'a>(source: &Source, head: &'a [u8]) -> Result<&'a [u8]> {
    let truncated = || source.bad("ends within its ELF header");
    let header: &[u8; 64] = head.first_chunk().ok_or_else(truncated)?;
    if header[4] != 2 || header[5] != 1 {
        return Err(source.bad("is no 64-bit little-endian ELF file (e_ident)"));
    }
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    if half(18) != EM_X86_64 {
        return Err(
            source.bad(format!("is for another architecture: e_machine is {}, x86-64 is 62", half(18)))
        );
    }
    let offset = word(header, 32);
    let (entry_size, count) = (half(54), usize::from(half(56)));
    if entry_size != 56 || count == 0 || count > MAX_SEGMENTS {
        let why = format!(
            "has {count} program headers of {entry_size} bytes; 1 to {MAX_SEGMENTS} of 56 are wanted"
        );
        return Err(source.bad(why));
    }
    let start = usize::try_from(offset).ok();
    let end = start.and_then(|s| s.checked_add(count * 56));
    let table = start.zip(end).and_then(|(start, end)| head.get(start..end));
    table.ok_or_else(|| {
        source.bad(format!("its program headers at {offset:#x} are not at its start (e_phoff)"))
    })
}

impl ProgramHeader {
    /// `bytes` has 56 of them.
    fn parse(bytes: &[u8]) -> Self {
        Self {
            kind: word(bytes, 0) as u32,
            offset: word(bytes, 8),
            address: word(bytes, 24),
            file_size: word(bytes, 32),
            memory_size: word(bytes, 40),
        }
    }
}

/// Eight little-endian bytes; zeroes past the end.
fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

/// The part of `piece` (which starts at `offset` of the image) that lies in `wanted`, and its place there.
fn overlap<'a>(wanted: &Range<u64>, offset: u64, piece: &'a [u8]) -> Option<(u64, &'a [u8])> {
    let start = wanted.start.max(offset);
    let end = wanted.end.min(offset.saturating_add(piece.len() as u64));
    (start < end).then(|| (start - wanted.start, &piece[(start - offset) as usize..(end - offset) as usize]))
}

/// Looks for Xen's `PHYS32_ENTRY` in a segment of ELF notes (names and values padded to 4 bytes).
fn pvh_entry(mut notes: &[u8]) -> Option<u64> {
    while let Some((header, rest)) = notes.split_first_chunk::<12>() {
        let field =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (name_size, value_size, kind) = (field(0) as usize, field(4) as usize, field(8));
        let value_at = name_size.checked_next_multiple_of(4)?;
        let next = value_at.checked_add(value_size.checked_next_multiple_of(4)?)?;
        if kind == PHYS32_ENTRY && rest.get(..name_size)? == b"Xen\0" {
            let value = rest.get(value_at..value_at.checked_add(value_size)?)?;
            let low: &[u8; 4] = value.first_chunk()?;
            return Some(u32::from_le_bytes(*low).into());
        }
        notes = rest.get(next..)?;
    }
    None
}
