//! qcow2 images: whole ones of every kind, of which most are bent before they are opened, and a driver's requests to them.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use arbitrary::{Result, Unstructured};
use vmbed::internals::driver::{Registers, Rings, VERSION_1, WRITE, bytes};
use vmbed::internals::{Board, Part};
use vmbed::{DiskConfig, DiskEngine, DiskFormat};

use super::bent::MEMORY;

const RINGS: u64 = 0x8_0000;
const HEADER: u64 = 0x1000;
const DATA: u64 = 0x1_0000;
const STATUS: u64 = 0x7000;
const STEPS: usize = 24;
/// Clusters of the disk, of which one half is described by each of two L2 tables.
const CLUSTERS: u64 = 8;

/// Why an image is refused: a name, and what the error says.
const REASONS: [(&str, &[&str]); 15] = [
    ("foreign", &["Not a qcow2 file", "is not supported"]),
    ("truncated", &["failed to fill whole buffer", "Invalid end offset"]),
    ("features", &["features that are not known", "Unrecognized incompatible feature"]),
    ("compression", &["has compression type"]),
    ("encryption", &["is encrypted with"]),
    ("clusters", &["has clusters of", "Invalid cluster size"]),
    ("header", &["header too big", "Header extensions", "Backing file name"]),
    ("l1", &["L1 table", "Invalid L1 entry"]),
    ("hole", &["has no refcounts for its clusters"]),
    ("refcounts", &["efcount", "reftable"]),
    ("size", &["is a disk of"]),
    ("changes", &["and so can only be read"]),
    ("based", &["is based on", "too many in backing"]),
    ("data_file", &["keeps its data"]),
    ("unreadable", &["reading or writing its metadata"]),
];
/// Requests that were answered with an error: of each kind, and those that change a disk that is only read.
const FAILED: [&str; 4] = ["read_failed", "write_failed", "clear_failed", "readonly"];

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Images that were opened, and those that were not.
    pub opened: u32,
    pub refused: u32,
    /// Requests that were answered with success: reads of whole clusters, writes, discards and zeroes.
    pub read: u32,
    pub written: u32,
    pub cleared: u32,
    /// As [`REASONS`] and [`FAILED`].
    pub reasons: [u32; REASONS.len()],
    pub failed: [u32; FAILED.len()],
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("opened", self.opened.into()),
            ("refused", self.refused.into()),
            ("read", self.read.into()),
            ("written", self.written.into()),
            ("cleared", self.cleared.into()),
        ];
        all.extend(REASONS.iter().zip(self.reasons).map(|((name, _), count)| (*name, count.into())));
        all.extend(FAILED.into_iter().zip(self.failed.map(u64::from)));
        all
    }
}

/// A file that is gone in the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, content: &[u8]) -> Self {
        let thread = format!("{:?}", std::thread::current().id());
        let number: String = thread.chars().filter(char::is_ascii_digit).collect();
        let path = PathBuf::from(format!("/dev/shm/vmbed-fuzz-{}-{number}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// What an image is to be.
#[derive(Clone, Copy, Debug, Default)]
struct Kind {
    bits: u32,
    extended: bool,
    zstd: bool,
    /// QEMU's method 1, for which any passphrase will do.
    encrypted: bool,
    version: u32,
    based: bool,
}

/// Runs one input. Panics where an image does more than be wrong.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let mut depth = Depth::default();
    let _ = attempt(&mut u, &mut depth);
    depth
}

fn attempt(u: &mut Unstructured<'_>, depth: &mut Depth) -> Result<()> {
    let choice = u.arbitrary::<u8>()?;
    let mut kind = Kind { bits: 9 + u32::from(choice & 3), version: 3, ..Kind::default() };
    match choice >> 2 & 7 {
        0 => (kind.extended, kind.bits) = (true, 14),
        1 => kind.zstd = true,
        2 => kind.encrypted = true,
        3 => kind.version = 2,
        _ => {}
    }
    kind.based = choice & 0x20 != 0;
    let mut image = image(kind);
    let bent = bend(u, &mut image, kind)?;
    let (top, base) = (Scratch::new("image", &image), Scratch::new("base", &[0x5a; 9000]));
    let mut config = DiskConfig::qcow2(&top.0).unlocked_by("any");
    config.engine = DiskEngine::Sync;
    config.readonly = kind.extended || kind.zstd || kind.encrypted || choice & 0x40 != 0;
    if kind.based {
        config = config.based_on(&base.0, DiskFormat::Raw);
    }
    let board = match Board::new(MEMORY, vec![Part::Configured(config.clone())]) {
        Ok(board) => board,
        Err(error) => {
            let text = whole(&error);
            assert!(bent, "a good image is refused: {kind:?}: {text}");
            depth.refused += 1;
            match REASONS.iter().position(|(_, parts)| parts.iter().any(|part| text.contains(part))) {
                Some(reason) => depth.reasons[reason] += 1,
                // The library has more to say.
                None => {
                    assert!(text.contains("is no qcow2 image that can be used"), "not known here: {text}")
                }
            }
            return Ok(());
        }
    };
    depth.opened += 1;
    let mut guest = Guest::new(board);
    for _ in 0..STEPS {
        if u.is_empty() {
            break;
        }
        guest.step(u, depth, bent, (kind, config.readonly))?;
    }
    drop(guest);
    let blocks = File::open(&top.0).unwrap().metadata().unwrap().blocks();
    assert!(blocks < (64 << 20) / 512, "it has grown to {blocks} blocks");
    let mut below = [0; 9000];
    File::open(&base.0).unwrap().read_exact_at(&mut below, 0).unwrap();
    assert_eq!(below, [0x5a; 9000], "nobody writes to what it is based on");
    Ok(())
}

/// An error with all that is below it.
fn whole(error: &vmbed::Error) -> String {
    let mut text = error.to_string();
    let mut below = std::error::Error::source(error);
    while let Some(error) = below {
        text += &format!(": {error}");
        below = error.source();
    }
    text
}

/// Cluster 0: the header; 1: refcount table; 2: its block; 3: L1; 4 and 5: L2; then the disk's: there, packed, zero and missing, in turn.
fn image(kind: Kind) -> Vec<u8> {
    let cluster = 1usize << kind.bits;
    let width = if kind.extended { 16 } else { 8 };
    let clusters = 6 + CLUSTERS as usize * 2;
    let mut image = vec![0; clusters * cluster];
    let mut put = |at: usize, value: &[u8]| image[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb");
    put(4, &kind.version.to_be_bytes());
    put(20, &kind.bits.to_be_bytes());
    // Each L2 table has entries for more; the disk ends in the second one.
    let per_table = (cluster / width) as u64;
    let size = (per_table + CLUSTERS / 2) << kind.bits;
    put(24, &size.to_be_bytes());
    put(32, &u32::from(kind.encrypted).to_be_bytes());
    put(36, &2u32.to_be_bytes());
    put(40, &((3 << kind.bits) as u64).to_be_bytes());
    put(48, &((1 << kind.bits) as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    if kind.version == 3 {
        let features = u64::from(kind.zstd) << 3 | u64::from(kind.extended) << 4;
        put(72, &features.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &112u32.to_be_bytes());
        put(104, &[u8::from(kind.zstd)]);
    }
    if kind.based {
        put(8, &200u64.to_be_bytes());
        put(16, &4u32.to_be_bytes());
        put(200, b"base");
    }
    put(cluster, &((2 << kind.bits) as u64).to_be_bytes());
    for used in 0..clusters {
        put(2 * cluster + 2 * used, &1u16.to_be_bytes());
    }
    for table in 0..2usize {
        put(3 * cluster + 8 * table, &(1 << 63 | ((4 + table) << kind.bits) as u64).to_be_bytes());
    }
    for index in 0..CLUSTERS as usize {
        let (table, slot) = (index / (CLUSTERS as usize / 2), index % (CLUSTERS as usize / 2));
        let at = (4 + table) * cluster + width * slot;
        let place = (6 + index) * cluster;
        let (entry, bitmap) = match index % 4 {
            0 => (1 << 63 | place as u64, 0x0000_0000_ffff_ffffu64),
            // Packed: at the second half of what there is, which is no cluster of anybody else's.
            1 => {
                let packed = packed(kind, 0x31, cluster);
                let place = (6 + CLUSTERS as usize + index) * cluster;
                if packed.len() <= cluster && !kind.encrypted {
                    put(place, &packed);
                    (packed_entry(kind, place as u64, packed.len() as u64), 0)
                } else {
                    (1 << 63 | place as u64, 0x0000_0000_ffff_ffff)
                }
            }
            2 if kind.extended => (0, 0xffff_ffff_0000_0000),
            2 if kind.version == 3 => (1, 0),
            _ => (0, 0),
        };
        put(place, &vec![0x40 + index as u8; cluster]);
        put(at, &entry.to_be_bytes());
        if kind.extended {
            put(at + 8, &bitmap.to_be_bytes());
        }
    }
    image
}

/// A cluster of that byte: one repeated, as both ways of packing know it.
fn packed(kind: Kind, byte: u8, cluster: usize) -> Vec<u8> {
    if kind.zstd {
        // RFC 8878: a frame of one segment, with its size in two bytes; a block of one byte, so many times.
        let size = (cluster - 256) as u16;
        let block = (cluster as u32) << 3 | 1 << 1 | 1;
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x60];
        frame.extend(size.to_le_bytes());
        frame.extend(&block.to_le_bytes()[..3]);
        frame.push(byte);
        return frame;
    }
    // RFC 1951: stored blocks, which take more than the cluster has; so the last bytes are a run.
    let mut bits = Bits::default();
    bits.put(1, 1);
    bits.put(1, 2);
    bits.literal(byte);
    let mut left = cluster - 1;
    while left > 0 {
        // The longest run is of 258 bytes, and no run is shorter than 3.
        let run = if left >= 258 + 3 || left == 258 { 258 } else { left.min(10) };
        if run < 3 {
            (0..run).for_each(|_| bits.literal(byte));
        } else {
            bits.run(run);
        }
        left -= run;
    }
    bits.put(0, 7);
    bits.bytes
}

/// Bits of a deflate stream, with its fixed codes.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    used: u32,
}

impl Bits {
    /// The lowest bit first.
    fn put(&mut self, value: u32, count: u32) {
        for i in 0..count {
            if self.used.is_multiple_of(8) {
                self.bytes.push(0);
            }
            let last = self.bytes.len() - 1;
            self.bytes[last] |= ((value >> i & 1) as u8) << (self.used % 8);
            self.used += 1;
        }
    }

    /// A code, whose highest bit goes first.
    fn code(&mut self, code: u32, count: u32) {
        self.put(code.reverse_bits() >> (32 - count), count);
    }

    fn literal(&mut self, byte: u8) {
        assert!(byte < 144);
        self.code(0x30 + u32::from(byte), 8);
    }

    /// So many bytes of the last one: 3 to 10, or 258.
    fn run(&mut self, count: usize) {
        match count {
            258 => self.code(0xc0 + 285 - 280, 8),
            _ => self.code(count as u32 - 2, 7),
        }
        // From one byte back.
        self.code(0, 5);
    }
}

fn packed_entry(kind: Kind, place: u64, length: u64) -> u64 {
    let bits = 62 - (kind.bits - 8);
    let sectors = (place % 512 + length).div_ceil(512) - 1;
    1 << 62 | sectors << bits | place
}

/// Most images are bent: in the header, the tables, or what is packed. Whether this one is.
fn bend(u: &mut Unstructured<'_>, image: &mut Vec<u8>, kind: Kind) -> Result<bool> {
    let cluster = 1usize << kind.bits;
    let count = u.int_in_range(0..=4)?;
    for _ in 0..count {
        let (from, length) = match u.int_in_range(0..=5)? {
            0 => (0, 112),
            1 => (cluster, 16),
            2 => (2 * cluster, 64),
            3 => (3 * cluster, 24),
            4 => (4 * cluster, 80),
            _ => (6 * cluster, (CLUSTERS as usize * 2) * cluster),
        };
        let at = (from + u.int_in_range(0..=length - 1)?).min(image.len() - 8);
        match u.int_in_range(0..=3)? {
            0 => image[at] = u.arbitrary()?,
            1 => image[at] ^= 1 << u.int_in_range(0..=7)?,
            2 => {
                // A place: somewhere in the image, or just not.
                let place =
                    u.int_in_range(0..=image.len() as u64 * 2)? | u64::from(u.arbitrary::<u8>()?) << 56;
                image[at..at + 8].copy_from_slice(&place.to_be_bytes());
            }
            _ => image[at..at + 8].copy_from_slice(&u.arbitrary::<u64>()?.to_be_bytes()),
        }
    }
    let cut = u.ratio(1u8, 16u8)?;
    if cut {
        let left = u.int_in_range(0..=image.len())?;
        image.truncate(left);
    }
    Ok(count > 0 || cut)
}

struct Guest {
    board: Board,
    regs: Registers,
    rings: Rings,
}

impl Guest {
    fn new(board: Board) -> Self {
        let regs = Registers::find(&board, 1).unwrap();
        let rings = Rings::new(&board, RINGS, 16);
        // DISCARD, WRITE_ZEROES.
        assert!(regs.start(&board, VERSION_1 | (regs.offered(&board) & (1 << 13 | 1 << 14)), &[&rings]));
        board.process();
        Self { board, regs, rings }
    }

    /// One request; its status.
    fn ask(&mut self, kind: u32, sector: u64, data: (u32, u16)) -> u8 {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.board.write_memory(HEADER, &header).unwrap();
        self.board.write_memory(STATUS, &[0xff]).unwrap();
        let chain = [(HEADER, 16, 0), (DATA, data.0, data.1), (STATUS, 1, WRITE)];
        self.rings.send(&self.board, &chain);
        self.regs.ring(&self.board, 0);
        self.board.process();
        assert!(self.rings.take_used(&self.board).is_some(), "every request is answered");
        let status = bytes::<1>(&self.board, STATUS)[0];
        assert!(status <= 2, "{status}");
        status
    }

    fn step(
        &mut self,
        u: &mut Unstructured<'_>,
        depth: &mut Depth,
        bent: bool,
        (kind, readonly): (Kind, bool),
    ) -> Result<()> {
        let cluster = 1u64 << kind.bits;
        let per_table = cluster / if kind.extended { 16 } else { 8 };
        // One of the clusters that are described, and some sectors of it.
        let index = u.int_in_range(0..=CLUSTERS - 1)?;
        let half = CLUSTERS / 2;
        let number = index / half * per_table + index % half;
        let first = u.int_in_range(0..=cluster / 512 - 1)?;
        let count = u.int_in_range(1..=(cluster / 512 - first).min(16))?;
        let (sector, length) = (number * cluster / 512 + first, count as u32 * 512);
        let op = u.int_in_range(0..=7)?;
        let status = match op {
            0..=2 => self.ask(0, sector, (length, WRITE)),
            3..=5 => {
                let byte = u.arbitrary::<u8>()?;
                self.board.write_memory(DATA, &vec![byte; length as usize]).unwrap();
                let status = self.ask(1, sector, (length, 0));
                if status == 0 && !bent {
                    self.board.write_memory(DATA, &vec![!byte; length as usize]).unwrap();
                    assert_eq!(self.ask(0, sector, (length, WRITE)), 0);
                    let mut back = vec![0; length as usize];
                    self.board.read_memory(DATA, &mut back).unwrap();
                    assert!(back.iter().all(|b| *b == byte), "what was written is there");
                }
                status
            }
            _ => {
                let segment = [&sector.to_le_bytes()[..], &(count as u32).to_le_bytes(), &[0; 4]].concat();
                self.board.write_memory(DATA, &segment).unwrap();
                self.ask([11, 13][usize::from(op == 7)], 0, (16, 0))
            }
        };
        match (status, op) {
            (0, 0..=2) => depth.read += 1,
            (0, 3..=5) => depth.written += 1,
            (0, _) => depth.cleared += 1,
            (_, 0..=2) => depth.failed[0] += 1,
            _ if readonly => depth.failed[3] += 1,
            (_, 3..=5) => depth.failed[1] += 1,
            _ => depth.failed[2] += 1,
        }
        assert!(bent || status == 0 || (op > 2 && readonly), "{kind:?}: request {op} at {sector}: {status}");
        Ok(())
    }
}
