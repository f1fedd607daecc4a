//! The random number generator and the console port, and their driver.

use arbitrary::{Result, Unstructured};
use vmbed::internals::driver::status::NEEDS_RESET;
use vmbed::internals::driver::{EVENT_IDX, INDIRECT_DESC, Registers, Rings, VERSION_1, WRITE};
use vmbed::internals::{Board, Part};

use super::bent::{MEMORY, bend, break_rings, indirect, lengths};

const RINGS: [u64; 3] = [0x8_0000, 0x9_0000, 0xa_0000];
const TABLE: u64 = 0x4000;
const DATA: u64 = 0x1_0000;
const STEPS: usize = 64;

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Requests for random bytes that were answered.
    pub random: u32,
    /// Chains that got console input.
    pub read: u32,
    /// Chains of console output that were taken.
    pub written: u32,
    /// Requests for random bytes that got none, and for input: their buffers are nowhere, empty, or to be read.
    pub no_random: u32,
    pub no_input: u32,
    /// Bytes that came out of the console, up to what it remembers.
    pub said: u64,
    /// How often a device gave up until the reset.
    pub resets: u32,
}

impl Depth {
    /// What a campaign sums up.
    #[allow(dead_code, reason = "a replay looks at the fields")]
    pub fn counters(&self) -> [(&'static str, u64); 7] {
        [
            ("random", self.random.into()),
            ("read", self.read.into()),
            ("written", self.written.into()),
            ("no_random", self.no_random.into()),
            ("no_input", self.no_input.into()),
            ("said", self.said),
            ("resets", self.resets.into()),
        ]
    }
}

struct Guest {
    board: Board,
    regs: [Registers; 2],
    /// The generator's, the console's for input, and for output.
    rings: [Rings; 3],
    depth: Depth,
}

/// Runs one input. Panics where a device misbehaves.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let board = Board::new(MEMORY, vec![Part::Rng, Part::Console]).unwrap();
    let regs = [1, 2].map(|device| Registers::find(&board, device).unwrap());
    let rings = RINGS.map(|base| Rings::new(&board, base, 16));
    let mut guest = Guest { board, regs, rings, depth: Depth::default() };
    guest.restart(0, VERSION_1);
    guest.restart(1, VERSION_1);
    for _ in 0..STEPS {
        if u.is_empty() || guest.step(&mut u).is_err() {
            break;
        }
    }
    guest.restart(0, VERSION_1);
    guest.restart(1, VERSION_1);
    guest.rings[0].send(&guest.board, &[(DATA, 32, WRITE)]);
    guest.regs[0].ring(&guest.board, 0);
    guest.board.process();
    assert!(matches!(guest.rings[0].take_used(&guest.board), Some((_, 32))), "after a reset it serves");
    guest.board.write_memory(DATA, b"after all").unwrap();
    guest.rings[2].send(&guest.board, &[(DATA, 9, 0)]);
    guest.regs[1].ring(&guest.board, 1);
    guest.board.process();
    assert!(guest.board.output().ends_with(b"after all"), "after a reset it writes");
    guest.depth
}

impl Guest {
    fn restart(&mut self, which: usize, features: u64) {
        let queues: &[usize] = if which == 0 { &[0] } else { &[1, 2] };
        for index in queues {
            self.rings[*index] = Rings::new(&self.board, RINGS[*index], 16);
        }
        let rings: Vec<_> = queues.iter().map(|index| &self.rings[*index]).collect();
        assert!(self.regs[which].start(&self.board, features, &rings));
        self.board.process();
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let index = u.int_in_range(0..=2usize)?;
        let flags = if index == 2 { 0 } else { WRITE };
        let mut chain = Vec::new();
        for _ in 0..u.int_in_range(1..=3)? {
            chain.push((DATA + u.int_in_range::<u64>(0..=0x4000)?, u.int_in_range(0..=0x3000)?, flags));
        }
        if u.ratio(1u8, 3u8)? {
            bend(&mut chain, u)?;
        }
        let rings = &mut self.rings[index];
        let head = if u.ratio(1u8, 4u8)? {
            indirect(&self.board, rings, TABLE, &chain, u)?
        } else {
            rings.chain(&self.board, &chain)
        };
        rings.offer(&self.board, head);
        if u.ratio(1u8, 12u8)? {
            break_rings(&self.board, rings, u)?;
        }
        if u.ratio(1u8, 2u8)? {
            let typed = vec![b't'; u.int_in_range(0..=5000)?];
            assert!(self.board.input(&typed) <= typed.len());
        }
        self.regs[usize::from(index > 0)].ring(&self.board, u16::from(index == 2));
        self.board.process();
        if u.ratio(1u8, 4u8)? {
            self.board.process_all();
        }
        let [random, read, written] = &mut self.rings;
        for length in lengths(&self.board, random) {
            self.depth.random += 1;
            self.depth.no_random += u32::from(length == 0);
        }
        for length in lengths(&self.board, read) {
            self.depth.read += 1;
            self.depth.no_input += u32::from(length == 0);
        }
        self.depth.written += lengths(&self.board, written).len() as u32;
        self.depth.said = self.board.output().len() as u64;
        assert!(self.depth.said <= 64 << 10);
        match u.arbitrary::<u8>()? {
            0..8 => {
                self.board.pause();
                self.board.resume();
            }
            8..16 => self.restart(usize::from(index > 0), VERSION_1 | EVENT_IDX | INDIRECT_DESC),
            16..20 => self.regs[usize::from(index > 0)].set(
                &self.board,
                u.int_in_range(0..=0x40)?,
                2,
                u.arbitrary()?,
            ),
            _ => {}
        }
        for which in 0..2 {
            if self.regs[which].status(&self.board) & (NEEDS_RESET | 4) != 4 {
                self.depth.resets += 1;
                self.restart(which, VERSION_1 | INDIRECT_DESC);
            }
        }
        Ok(())
    }
}
