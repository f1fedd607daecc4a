//! Kernel images: well-made headers with some fields bent, and plain bytes.

use arbitrary::{Result, Unstructured};
use vmbed::internals::load_kernel;

const MEMORY: u64 = 16 << 20;

/// Why an image is refused: a name, and what the error says.
const REASONS: [(&str, &[&str]); 9] = [
    ("foreign", &["is not an x86", "for another architecture", "no 64-bit"]),
    ("old", &["boot protocol"]),
    ("truncated", &["is truncated", "ends within", "is empty"]),
    ("damaged", &["damaged", "empty payload"]),
    ("headers", &["program headers"]),
    ("segments", &["program header ", "no segment"]),
    ("no_entry", &["no PVH entry", "outside of its segments"]),
    ("no_room", &["to unpack itself", "too large"]),
    ("cmdline", &["the command line"]),
];

/// How deep an input went, for the replay of the corpus.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// The image was loaded.
    pub loaded: bool,
    /// By the PVH protocol.
    pub pvh: bool,
    /// It was packed, and was unpacked here.
    pub unpacked: bool,
    /// It was refused, with a text.
    pub refused: bool,
    /// The text was of these reasons.
    pub reasons: [bool; REASONS.len()],
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("loaded", self.loaded.into()),
            ("pvh", self.pvh.into()),
            ("unpacked", self.unpacked.into()),
            ("refused", self.refused.into()),
        ];
        all.extend(REASONS.iter().zip(self.reasons).map(|((name, _), met)| (*name, met.into())));
        all
    }
}

/// Runs one input. Panics where the loader puts something outside of memory.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let Ok((packed, kernel, initrd, cmdline, kaslr)) = image(&mut u) else { return Depth::default() };
    match load_kernel(MEMORY, &kernel, initrd.as_deref(), &cmdline, kaslr) {
        Ok(loaded) => {
            for range in &loaded.filled {
                assert!(range.start <= range.end && range.end <= MEMORY, "{loaded:x?}");
            }
            assert!(loaded.filled[0].contains(&loaded.rip), "{loaded:x?}");
            // The decompressor's own entry is 0x200 further on.
            let unpacked = packed && loaded.rip == 0x10_0000;
            Depth { loaded: true, pvh: loaded.pvh, unpacked, ..Depth::default() }
        }
        Err(error) => {
            let text = error.to_string();
            let reasons = REASONS.map(|(_, texts)| texts.iter().any(|part| text.contains(part)));
            assert!(reasons.contains(&true), "a reason that is not known here: {text}");
            Depth { refused: true, reasons, ..Depth::default() }
        }
    }
}

type Image = (bool, Vec<u8>, Option<Vec<u8>>, String, bool);

fn image(u: &mut Unstructured<'_>) -> Result<Image> {
    let kind = u.int_in_range(0..=9u8)?;
    let kaslr = u.arbitrary()?;
    let initrd = u.arbitrary::<Option<u16>>()?.map(|len| vec![0x55; usize::from(len)]);
    let cmdline = "x".repeat(usize::from(u.arbitrary::<u16>()? % 3000));
    let mut kernel = match kind {
        0..5 => bzimage(u)?,
        5..9 => elf(u)?,
        _ => Vec::new(),
    };
    for _ in 0..u.int_in_range(0..=3)? {
        // Some bytes of the header are something else.
        let at = u.int_in_range(0..=kernel.len().min(0x400))?;
        if let Some(byte) = kernel.get_mut(at) {
            *byte = u.arbitrary()?;
        }
    }
    if kind < 5 && u.ratio(1u8, 12u8)? {
        // Of another version.
        put(&mut kernel, 0x206, &(u.arbitrary::<u16>()? & 0x3ff).to_le_bytes());
    }
    if u.ratio(1u8, 8u8)? {
        kernel.truncate(u.int_in_range(0..=kernel.len())?);
    }
    kernel.extend(u.bytes(u.len())?);
    Ok((kind < 5, kernel, initrd, cmdline, kaslr))
}

pub fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Boot protocol 2.12, whose payload is what follows.
pub fn bzimage(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut image = vec![0x90; 0x400 + 0x2000];
    put(&mut image, 0x1f1, &[0; 0x7f]);
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1f4, &0x200u32.to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x20cu16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x214, &0x10_0000u32.to_le_bytes());
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x234, &[1, 21, 1, 0]);
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x248, &u.int_in_range(0..=0x2400u32)?.to_le_bytes());
    put(&mut image, 0x24c, &u.int_in_range(0..=0x2400u32)?.to_le_bytes());
    put(&mut image, 0x258, &0x10_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x10_0000u32.to_le_bytes());
    if u.ratio(1u8, 2u8)? {
        let payload = lz4(&elf(u)?);
        put(&mut image, 0x248, &0x200u32.to_le_bytes());
        put(&mut image, 0x24c, &(payload.len() as u32).to_le_bytes());
        image.truncate(0x600);
        image.extend(payload);
        image.resize(image.len().next_multiple_of(0x200), 0);
    }
    Ok(image)
}

/// LZ4's legacy format with one block of literals, and the length that Linux' build puts behind it.
fn lz4(bytes: &[u8]) -> Vec<u8> {
    let mut block = vec![0xf0];
    let more = bytes.len() - 15;
    block.extend(vec![255; more / 255]);
    block.push((more % 255) as u8);
    block.extend(bytes);
    let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
    payload.extend((block.len() as u32).to_le_bytes());
    payload.extend(block);
    payload.extend((bytes.len() as u32).to_le_bytes());
    payload
}

/// An ELF image with a PVH note and up to three segments.
pub fn elf(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut image = vec![0; 0x1000];
    put(&mut image, 0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(&mut image, 16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&mut image, 24, &0x10_0000u64.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 52, &[64, 0, 56, 0]);
    let loads = u.int_in_range(1..=3u16)?;
    put(&mut image, 56, &(loads + 1).to_le_bytes());
    for i in 0..loads {
        let (offset, size) = (0x400u64, u.int_in_range(1..=0xc00u64)?);
        let address = 0x10_0000 + 0x1_0000 * u64::from(i);
        let memory = size + u.int_in_range(0..=0x1000u64)?;
        segment(&mut image, i, [1, offset, address, size, memory]);
    }
    segment(&mut image, loads, [4, 0x300, 0, 20, 20]);
    // A kernel out of a bzImage may do without.
    if u.ratio(1u8, 3u8)? {
        return Ok(image);
    }
    put(&mut image, 0x300, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0, 0, 0, 0x10, 0]);
    Ok(image)
}

fn segment(image: &mut [u8], index: u16, [kind, offset, address, size, memory]: [u64; 5]) {
    let at = 64 + 56 * usize::from(index);
    put(image, at, &(kind as u32).to_le_bytes());
    for (field, value) in [(8, offset), (16, address), (24, address), (32, size), (40, memory)] {
        put(image, at + field, &value.to_le_bytes());
    }
}
