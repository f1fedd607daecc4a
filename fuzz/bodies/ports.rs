//! The random number generator and the console port, and their driver.

use arbitrary::{Result, Unstructured};
use vmbed::internals::driver::status::NEEDS_RESET;
use vmbed::internals::driver::{Buffer, EVENT_IDX, INDIRECT_DESC, Registers, Rings, VERSION_1, WRITE};
use vmbed::internals::{Board, Part};

use super::bent::{
    Faults, MEMORY, bend, break_rings, content, indirect, is_plain, lengths, reaches, side, total,
};

const RINGS: [u64; 3] = [0x8_0000, 0x9_0000, 0xa_0000];
const TABLE: u64 = 0x4000;
const DATA: u64 = 0x1_0000;
/// What the generator gives at once, and the console.
const PIECE: u64 = 4096;
const STEPS: usize = 64;

/// What became of chains: answered, and completed with nothing, since they are of the wrong direction, empty or not in memory.
const FATES: [&str; 12] = [
    "random",
    "random_direction",
    "random_empty",
    "random_outside",
    "read",
    "read_direction",
    "read_empty",
    "read_outside",
    "written",
    "written_direction",
    "written_empty",
    "written_outside",
];

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Requests for random bytes, chains for console input, and of output, that were completed.
    pub completed: [u32; 3],
    /// Those of which it is known what was to become of them, as [`FATES`].
    pub fates: [u32; FATES.len()],
    /// Bytes that came out of the console, up to what it remembers.
    pub said: u64,
    /// How often a device gave up until the reset, and what it said then.
    pub resets: u32,
    pub faults: Faults,
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let names = ["all_random", "all_read", "all_written"];
        let mut all: Vec<_> = names.into_iter().zip(self.completed.map(u64::from)).collect();
        all.extend([("said", self.said), ("resets", self.resets.into())]);
        all.extend(FATES.into_iter().zip(self.fates.map(u64::from)));
        // A request is answered before the next one is looked at.
        all.extend(self.faults.counters(&["InUse"]));
        all
    }
}

struct Guest {
    board: Board,
    regs: [Registers; 2],
    /// The generator's, the console's for input, and for output.
    rings: [Rings; 3],
    /// Chains of each queue that wait.
    waiting: [u32; 3],
    /// Nothing was done to the rings that no driver does.
    sound: [bool; 3],
    depth: Depth,
}

/// Runs one input. Panics where a device misbehaves.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let board = Board::new(MEMORY, vec![Part::Rng, Part::Console]).unwrap();
    let regs = [1, 2].map(|device| Registers::find(&board, device).unwrap());
    let rings = RINGS.map(|base| Rings::new(&board, base, 16));
    let depth = Depth::default();
    let mut guest = Guest { board, regs, rings, waiting: [0; 3], sound: [true; 3], depth };
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
            (self.waiting[*index], self.sound[*index]) = (0, true);
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
        let table = u.ratio(1u8, 4u8)?;
        let head = if table {
            indirect(&self.board, rings, TABLE, &chain, u)?
        } else {
            rings.chain(&self.board, &chain)
        };
        rings.offer(&self.board, head);
        if u.ratio(1u8, 12u8)? {
            break_rings(&self.board, rings, u)?;
            self.sound[index] = false;
        }
        let known = self.sound[index] && !table && self.waiting[index] == 0 && is_plain(&chain);
        self.waiting[index] += 1;
        let writable = side(&chain, true);
        for (sound, at) in self.sound.iter_mut().zip(RINGS) {
            *sound &= !reaches(&writable, at, 0x4000);
        }
        if u.ratio(1u8, 2u8)? {
            let typed = vec![b't'; u.int_in_range(0..=5000)?];
            assert!(self.board.input(&typed) <= typed.len());
        }
        let before = self.board.output();
        self.regs[usize::from(index > 0)].ring(&self.board, u16::from(index == 2));
        self.board.process();
        if u.ratio(1u8, 4u8)? {
            self.board.process_all();
        }
        for which in 0..3 {
            let lengths = lengths(&self.board, &mut self.rings[which]);
            self.depth.completed[which] += lengths.len() as u32;
            let waiting = std::mem::take(&mut self.waiting[which]);
            self.waiting[which] = waiting.saturating_sub(lengths.len() as u32);
            if let ([length], 1, true) = (&lengths[..], waiting, known && which == index) {
                let said = self.board.output() != before;
                self.look(which, &chain, *length > 0 || said);
            }
        }
        self.depth.said = self.board.output().len() as u64;
        assert!(self.depth.said <= 64 << 10);
        match u.arbitrary::<u8>()? {
            0..8 => {
                self.board.pause();
                self.board.resume();
            }
            8..16 => self.restart(usize::from(index > 0), VERSION_1 | EVENT_IDX | INDIRECT_DESC),
            16..20 => {
                let (register, value) = (u.int_in_range(0..=0x40)?, u.arbitrary()?);
                self.regs[usize::from(index > 0)].set(&self.board, register, 2, value);
                self.sound = [false; 3];
            }
            _ => {}
        }
        for which in 0..2 {
            if self.regs[which].status(&self.board) & (NEEDS_RESET | 4) != 4 {
                self.depth.resets += 1;
                self.depth.faults.add(&self.board);
                self.restart(which, VERSION_1 | INDIRECT_DESC);
            }
        }
        Ok(())
    }

    /// A chain was completed; whether something came of it is what was to be.
    fn look(&mut self, which: usize, chain: &[Buffer], something: bool) {
        let (mine, other) = (side(chain, which < 2), side(chain, which == 2));
        // At most so much is moved at once.
        let most = [PIECE, PIECE, 16 * PIECE][which];
        let moved = total(&mine).min(most);
        // Output is taken piece by piece, with what is writable left alone.
        let fate = match () {
            () if !other.is_empty() && (which < 2 || mine.is_empty()) => 1,
            () if mine.is_empty() => 2,
            () if content(&self.board, &mine, 0, moved).is_none() => 3,
            () => 0,
        };
        let fine = fate == 0 || which == 2 && fate == 3;
        assert!(!something || fine, "{}: {chain:x?}", FATES[4 * which + fate]);
        self.depth.fates[4 * which + fate] += 1;
    }
}
