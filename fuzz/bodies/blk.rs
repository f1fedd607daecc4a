//! A disk and its driver: good requests, of which some are bent before the device sees them.

use std::fs::File;
use std::os::unix::fs::FileExt;

use arbitrary::{Result, Unstructured};
use vmbed::internals::driver::status::NEEDS_RESET;
use vmbed::internals::driver::{Buffer, EVENT_IDX, INDIRECT_DESC, Registers, Rings, VERSION_1, WRITE, bytes};
use vmbed::internals::{Board, Part, memory_file};

use super::bent::{
    Faults, MEMORY, bend, break_rings, collect, content, indirect, is_plain, reaches, side, total,
};

const SECTORS: u64 = 64;
const RINGS: u64 = 0x8_0000;
const TABLE: u64 = 0x4000;
const HEADER: u64 = 0x1000;
const DATA: u64 = 0x1_0000;
const STATUS: u64 = 0x7000;
/// DISCARD, WRITE_ZEROES.
const DISCARDS: u64 = 1 << 13 | 1 << 14;
const STEPS: usize = 64;

/// What the device has done with requests of each kind, and why it has answered others with an error.
const ANSWERS: [&str; 16] = [
    "read",
    "written",
    "flushed",
    "named",
    "discarded",
    "zeroed",
    // IOERR: the header is cut off; a piece is outside of memory; what is written is in front of what is read.
    "short",
    "outside",
    "order",
    // Bytes to read where there should be none, and to write; a disk that is only read; past its end; parts of sectors.
    "to_read",
    "to_write",
    "readonly",
    "beyond",
    "ragged",
    // UNSUPP: flags that nobody knows, and kinds.
    "flags",
    "unknown",
];

/// How deep an input went, for the replay of the corpus.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Requests that the device has answered.
    pub completed: u32,
    /// Those of which it is known what was to become of them, as [`ANSWERS`].
    pub answers: [u32; ANSWERS.len()],
    /// Bytes of these that were compared: what the disk has with what the guest sent, and the other way.
    pub bytes: u64,
    /// Those that have no place for a status.
    pub mute: u32,
    /// How often it gave up until the reset, and what it said then.
    pub resets: u32,
    pub faults: Faults,
}

struct Guest {
    board: Board,
    /// What the disk is.
    file: File,
    regs: Registers,
    rings: Rings,
    readonly: bool,
    discards: bool,
    /// Requests that wait.
    waiting: u32,
    /// Nothing was done to the rings that no driver does.
    sound: bool,
    depth: Depth,
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("completed", self.completed.into()),
            ("bytes", self.bytes),
            ("mute", self.mute.into()),
            ("resets", self.resets.into()),
        ];
        all.extend(ANSWERS.into_iter().zip(self.answers.map(u64::from)));
        // A request is answered before the next one is looked at.
        all.extend(self.faults.counters(&["InUse"]));
        all
    }
}

/// Runs one input. Panics where the device misbehaves.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let readonly = u.ratio(1u8, 8u8).unwrap_or(false);
    let mut guest = Guest::new(memory_file(SECTORS * 512).unwrap(), readonly, &mut u);
    for _ in 0..STEPS {
        if u.is_empty() || guest.step(&mut u).is_err() {
            break;
        }
    }
    guest.restart(VERSION_1);
    assert_eq!(guest.identify(), 0, "after a reset it serves");
    guest.depth
}

impl Guest {
    fn new(disk: File, readonly: bool, u: &mut Unstructured<'_>) -> Self {
        let file = disk.try_clone().unwrap();
        let board = Board::new(MEMORY, vec![Part::Disk { file: disk, readonly }]).unwrap();
        let regs = Registers::find(&board, 1).unwrap();
        let rings = Rings::new(&board, RINGS, 16);
        let depth = Depth::default();
        let mut guest =
            Self { board, file, regs, rings, readonly, discards: false, waiting: 0, sound: true, depth };
        let choice = u.arbitrary::<u8>().unwrap_or(0);
        let extra = [0, EVENT_IDX, INDIRECT_DESC, EVENT_IDX | INDIRECT_DESC][usize::from(choice % 4)];
        let flush = if choice & 4 == 0 { 1 << 9 } else { 0 };
        let discards = if choice & 8 == 0 { DISCARDS } else { 0 };
        guest.restart(VERSION_1 | extra | flush | discards);
        guest
    }

    fn restart(&mut self, features: u64) {
        // A disk that is only read offers none.
        let features = features & (self.regs.offered(&self.board) | !DISCARDS);
        self.rings = Rings::new(&self.board, RINGS, 16);
        (self.waiting, self.sound, self.discards) = (0, true, features & DISCARDS != 0);
        assert!(self.regs.start(&self.board, features, &[&self.rings]));
        self.board.process();
    }

    /// A request that cannot go wrong.
    fn identify(&mut self) -> u8 {
        self.board.write_memory(HEADER, &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        self.rings.send(&self.board, &[(HEADER, 16, 0), (DATA, 20, WRITE), (STATUS, 1, WRITE)]);
        self.regs.ring(&self.board, 0);
        self.board.process();
        assert!(self.rings.take_used(&self.board).is_some());
        bytes::<1>(&self.board, STATUS)[0]
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let mut chain = self.request(u)?;
        if u.ratio(1u8, 3u8)? {
            bend(&mut chain, u)?;
        }
        let table = u.ratio(1u8, 4u8)?;
        let head = if table {
            indirect(&self.board, &mut self.rings, TABLE, &chain, u)?
        } else {
            self.rings.chain(&self.board, &chain)
        };
        self.rings.offer(&self.board, head);
        if u.ratio(1u8, 12u8)? {
            break_rings(&self.board, &mut self.rings, u)?;
            self.sound = false;
        }
        let known = self.sound && !table && self.waiting == 0 && is_plain(&chain);
        let answer = if known { self.expected(&chain) } else { None };
        let sent = self.sent(answer, &chain);
        self.sound &= !reaches(&side(&chain, true), RINGS, 0x4000);
        self.waiting += 1;
        // Several requests may wait for one doorbell.
        if u.ratio(3u8, 4u8)? {
            self.regs.ring(&self.board, 0);
            self.board.process();
            self.collect(answer, &chain, sent);
        }
        match u.arbitrary::<u8>()? {
            0..8 => {
                self.board.pause();
                self.board.process();
                self.board.resume();
            }
            8..12 => self.restart(VERSION_1 | EVENT_IDX | INDIRECT_DESC),
            12..20 => {
                self.regs.set(&self.board, u.int_in_range(0..=0x40)?, 2, u.arbitrary()?);
                self.sound = false;
            }
            _ => {}
        }
        if self.regs.status(&self.board) & (NEEDS_RESET | 4) != 4 {
            self.depth.resets += 1;
            self.depth.faults.add(&self.board);
            self.restart(VERSION_1 | EVENT_IDX | INDIRECT_DESC | DISCARDS);
        }
        Ok(())
    }

    /// A good request's chain; its header is in memory.
    fn request(&mut self, u: &mut Unstructured<'_>) -> Result<Vec<Buffer>> {
        let kind = *u.choose(&[0u32, 0, 1, 1, 4, 8, 2, 11, 13])?;
        let sector = match u.arbitrary::<u8>()? {
            0 => u.arbitrary()?,
            n => u64::from(n) % SECTORS,
        };
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.board.write_memory(HEADER, &header).unwrap();
        let flags = if matches!(kind, 0 | 8) { WRITE } else { 0 };
        let mut chain = vec![(HEADER, 16, 0)];
        if matches!(kind, 0 | 1 | 8) {
            for _ in 0..u.int_in_range(1..=3)? {
                let len = 512 * u.int_in_range(1..=8)?;
                chain.push((DATA + 512 * u.int_in_range::<u64>(0..=16)?, len, flags));
            }
        }
        if matches!(kind, 11 | 13) {
            let (count, flags) = (u.int_in_range(0..=8u32)?, u.int_in_range(0..=2u32)?);
            let segment = [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat();
            self.board.write_memory(DATA, &segment).unwrap();
            chain.push((DATA, 16, 0));
        }
        chain.push((STATUS, 1, WRITE));
        Ok(chain)
    }

    /// What a request's status is to be, and why, as [`ANSWERS`]; of one that has a place for it.
    fn expected(&self, chain: &[Buffer]) -> Option<(u8, &'static str)> {
        let (readable, writable) = (side(chain, false), side(chain, true));
        let (to_read, to_write) = (total(&readable), total(&writable).checked_sub(1)?);
        let Some(to_read) = to_read.checked_sub(16) else { return Some((1, "short")) };
        let Some(header) = content(&self.board, &readable, 0, 16) else { return Some((1, "outside")) };
        let last = chain.iter().rposition(|(_, length, flags)| *length > 0 && flags & WRITE == 0);
        let first = chain.iter().position(|(_, length, flags)| *length > 0 && flags & WRITE != 0);
        if first < last {
            return Some((1, "order"));
        }
        let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
        let fits = |length: u64| u128::from(sector) * 512 + u128::from(length) <= u128::from(SECTORS) * 512;
        let inside =
            |buffers: &[(u64, u64)], skip, length| content(&self.board, buffers, skip, length).is_some();
        Some(match kind {
            0 | 1 => {
                let moved = if kind == 0 { to_write } else { to_read };
                match () {
                    () if !fits(moved) => (1, "beyond"),
                    () if moved % 512 != 0 => (1, "ragged"),
                    () if kind == 0 && to_read > 0 => (1, "to_read"),
                    () if kind == 1 && to_write > 0 => (1, "to_write"),
                    () if kind == 1 && self.readonly => (1, "readonly"),
                    () if kind == 0 && !inside(&writable, 0, moved) => (1, "outside"),
                    () if kind == 1 && !inside(&readable, 16, moved) => (1, "outside"),
                    () => (0, ["read", "written"][kind as usize]),
                }
            }
            4 => (0, "flushed"),
            8 if !inside(&writable, 0, to_write.min(20)) => (1, "outside"),
            8 => (0, "named"),
            11 | 13 if self.discards => {
                if self.readonly || to_write > 0 || to_read != 16 {
                    let why = if self.readonly { "readonly" } else { "to_write" };
                    return Some((1, if to_read != 16 { "to_read" } else { why }));
                }
                let Some(segment) = content(&self.board, &readable, 16, 16) else {
                    return Some((1, "outside"));
                };
                let at = u64::from_le_bytes(segment[..8].try_into().unwrap());
                let count = u32::from_le_bytes(segment[8..12].try_into().unwrap());
                let flags = u32::from_le_bytes(segment[12..].try_into().unwrap());
                match () {
                    () if flags > 1 || kind == 11 && flags > 0 => (2, "flags"),
                    () if u128::from(at) + u128::from(count) > SECTORS.into() => (1, "beyond"),
                    () => (0, if kind == 11 { "discarded" } else { "zeroed" }),
                }
            }
            _ => (2, "unknown"),
        })
    }

    /// Where on the disk a good request's bytes go, or come from; and those that are to be there.
    fn sent(&self, answer: Option<(u8, &'static str)>, chain: &[Buffer]) -> Option<(u64, Vec<u8>)> {
        let readable = side(chain, false);
        let header = content(&self.board, &readable, 0, 16)?;
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
        let bytes = match answer? {
            (0, "written") => content(&self.board, &readable, 16, total(&readable) - 16)?,
            (0, "zeroed") => {
                let segment = content(&self.board, &readable, 16, 16)?;
                let begin = u64::from_le_bytes(segment[..8].try_into().unwrap());
                let count = u32::from_le_bytes(segment[8..12].try_into().unwrap());
                return Some((512 * begin, vec![0; 512 * count as usize]));
            }
            (0, "read") => self.on_disk(512 * sector, total(&side(chain, true)) - 1),
            _ => return None,
        };
        Some((512 * sector, bytes))
    }

    fn on_disk(&self, at: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// Those bytes are where they are to be: on the disk, and what was read, in memory.
    fn compare(&mut self, why: &str, chain: &[Buffer], (at, bytes): (u64, Vec<u8>)) {
        assert!(self.on_disk(at, bytes.len() as u64) == bytes, "{why} at {at:#x}: {chain:x?}");
        if why == "read" {
            let mut writable = side(chain, true);
            let found = content(&self.board, &writable, 0, bytes.len() as u64);
            writable.sort_unstable();
            let overlap = writable.windows(2).any(|pair| pair[0].0 + pair[0].1 > pair[1].0);
            // The last of two that lie over each other is seen, and so is what the rings have there.
            if overlap || reaches(&writable, RINGS, 0x4000) {
                return;
            }
            assert!(found.is_some_and(|found| found == bytes), "read at {at:#x}: {chain:x?}");
        }
        self.depth.bytes += bytes.len() as u64;
    }

    /// Looks at what was answered; of a single request, at the answer.
    fn collect(
        &mut self,
        answer: Option<(u8, &'static str)>,
        chain: &[Buffer],
        sent: Option<(u64, Vec<u8>)>,
    ) {
        let completed = collect(&self.board, &mut self.rings);
        self.depth.completed += completed;
        let single = (self.waiting, completed) == (1, 1);
        // Of much, some may wait for its next turn.
        self.waiting = self.waiting.saturating_sub(completed);
        let writable = side(chain, true);
        self.depth.mute += u32::from(single && writable.is_empty());
        let (true, Some((status, why)), Some((at, length))) = (single, answer, writable.last()) else {
            return;
        };
        let mut found = [0xff];
        if self.board.read_memory(at + length - 1, &mut found).is_ok() {
            assert_eq!(found[0], status, "{why}: {chain:x?}");
            self.depth.answers[ANSWERS.iter().position(|known| *known == why).unwrap()] += 1;
            if let Some(sent) = sent {
                self.compare(why, chain, sent);
            }
        }
    }
}
