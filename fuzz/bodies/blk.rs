//! A disk and its driver: good requests, of which some are bent before the device sees them.

use std::fs::File;

use arbitrary::{Result, Unstructured};
use vmbed::internals::driver::status::NEEDS_RESET;
use vmbed::internals::driver::{Buffer, EVENT_IDX, INDIRECT_DESC, Registers, Rings, VERSION_1, WRITE, bytes};
use vmbed::internals::{Board, Part, memory_file};

use super::bent::{MEMORY, bend, break_rings, collect, indirect};

const SECTORS: u64 = 64;
const RINGS: u64 = 0x8_0000;
const TABLE: u64 = 0x4000;
const HEADER: u64 = 0x1000;
const DATA: u64 = 0x1_0000;
const STATUS: u64 = 0x7000;
const STEPS: usize = 64;

/// How deep an input went, for the replay of the corpus.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Requests that the device has answered.
    pub completed: u32,
    /// Of those, with the status OK, IOERR and UNSUPP, of the last one at each look.
    pub succeeded: u32,
    pub failed: u32,
    pub unsupported: u32,
    /// Those that have no place for a status.
    pub mute: u32,
    /// How often it gave up until the reset.
    pub resets: u32,
}

struct Guest {
    board: Board,
    regs: Registers,
    rings: Rings,
    depth: Depth,
}

impl Depth {
    /// What a campaign sums up.
    #[allow(dead_code, reason = "a replay looks at the fields")]
    pub fn counters(&self) -> [(&'static str, u64); 6] {
        [
            ("completed", self.completed.into()),
            ("succeeded", self.succeeded.into()),
            ("failed", self.failed.into()),
            ("unsupported", self.unsupported.into()),
            ("mute", self.mute.into()),
            ("resets", self.resets.into()),
        ]
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
        let board = Board::new(MEMORY, vec![Part::Disk { file: disk, readonly }]).unwrap();
        let regs = Registers::find(&board, 1).unwrap();
        let rings = Rings::new(&board, RINGS, 16);
        let mut guest = Self { board, regs, rings, depth: Depth::default() };
        let choice = u.arbitrary::<u8>().unwrap_or(0);
        let extra = [0, EVENT_IDX, INDIRECT_DESC, EVENT_IDX | INDIRECT_DESC][usize::from(choice % 4)];
        let flush = if choice & 4 == 0 { 1 << 9 } else { 0 };
        guest.restart(VERSION_1 | extra | flush);
        guest
    }

    fn restart(&mut self, features: u64) {
        self.rings = Rings::new(&self.board, RINGS, 16);
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
        let head = if u.ratio(1u8, 4u8)? {
            indirect(&self.board, &mut self.rings, TABLE, &chain, u)?
        } else {
            self.rings.chain(&self.board, &chain)
        };
        self.rings.offer(&self.board, head);
        if u.ratio(1u8, 12u8)? {
            break_rings(&self.board, &mut self.rings, u)?;
        }
        // Several requests may wait for one doorbell.
        if u.ratio(3u8, 4u8)? {
            self.board.write_memory(STATUS, &[0xff]).unwrap();
            self.regs.ring(&self.board, 0);
            self.board.process();
            self.collect();
        }
        match u.arbitrary::<u8>()? {
            0..8 => {
                self.board.pause();
                self.board.process();
                self.board.resume();
            }
            8..12 => self.restart(VERSION_1 | EVENT_IDX | INDIRECT_DESC),
            12..20 => self.regs.set(&self.board, u.int_in_range(0..=0x40)?, 2, u.arbitrary()?),
            _ => {}
        }
        if self.regs.status(&self.board) & (NEEDS_RESET | 4) != 4 {
            self.depth.resets += 1;
            self.restart(VERSION_1 | EVENT_IDX | INDIRECT_DESC);
        }
        Ok(())
    }

    /// A good request's chain; its header is in memory.
    fn request(&mut self, u: &mut Unstructured<'_>) -> Result<Vec<Buffer>> {
        let kind = *u.choose(&[0u32, 0, 1, 1, 4, 8, 2, 11])?;
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
        chain.push((STATUS, 1, WRITE));
        Ok(chain)
    }

    fn collect(&mut self) {
        let completed = collect(&self.board, &mut self.rings);
        self.depth.completed += completed;
        match bytes::<1>(&self.board, STATUS)[0] {
            0 => self.depth.succeeded += 1,
            1 => self.depth.failed += 1,
            2 => self.depth.unsupported += 1,
            _ => self.depth.mute += u32::from(completed > 0),
        }
    }
}
