//! A balloon and its driver: lists of pages, ranges, accounts and hints, of which some are bent.

use arbitrary::{Result, Unstructured};
use vmbed::internals::driver::status::NEEDS_RESET;
use vmbed::internals::driver::{
    Buffer, EVENT_IDX, INDIRECT_DESC, Registers, Rings, VERSION_1, WRITE, read, write,
};
use vmbed::internals::{Board, Part};

use super::bent::{
    Faults, MEMORY, bend, break_rings, collect, content, indirect, is_plain, reaches, side, total,
};

const RINGS: u64 = 0x6_0000;
const TABLE: u64 = 0x4000;
/// Where lists, accounts and numbers lie.
const LIST: u64 = 0x1_0000;
/// Pages that the driver can do without: the last quarter.
const FIRST: u64 = 0xc0;
const COUNT: u64 = 0x40;
/// Every feature of the device's own.
const ALL: u64 = 0x3f;
const STEPS: usize = 64;

/// Why something was ignored: pages that are not memory, given and taken; ranges that are not whole pages, or not in memory, hinted at
/// and reported; lists that are too short for anything, and not in memory.
const IGNORED: [&str; 8] = [
    "inflate_outside",
    "deflate_outside",
    "hint_ragged",
    "hint_outside",
    "report_ragged",
    "report_outside",
    "no_list",
    "list_outside",
];

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Requests that the device has completed.
    pub completed: u32,
    /// Pages that the host has got, by each of the three ways.
    pub inflated: u64,
    pub reported: u64,
    pub hinted: u64,
    /// What was named and is not the guest's memory, and requests that name nothing, as [`IGNORED`].
    pub ignored: [u64; IGNORED.len()],
    /// How often it gave up until the reset, and what it said then.
    pub resets: u32,
    pub faults: Faults,
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("completed", self.completed.into()),
            ("inflated", self.inflated),
            ("reported", self.reported),
            ("hinted", self.hinted),
            ("resets", self.resets.into()),
        ];
        all.extend(IGNORED.into_iter().zip(self.ignored));
        all.extend(self.faults.counters(&[]));
        all
    }
}

struct Guest {
    board: Board,
    regs: Registers,
    rings: Vec<Rings>,
    /// Requests that wait, and were not broken.
    waiting: u32,
    sound: bool,
    /// Lists that were written: each where none that waits is.
    lists: u64,
    depth: Depth,
}

/// Runs one input. Panics where the device misbehaves.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let board = Board::new(MEMORY, vec![Part::Balloon]).unwrap();
    let regs = Registers::find(&board, 1).unwrap();
    let (rings, depth) = (Vec::new(), Depth::default());
    let mut guest = Guest { board, regs, rings, waiting: 0, sound: true, lists: 0, depth };
    guest.restart(u.arbitrary().unwrap_or(0));
    for _ in 0..STEPS {
        if u.is_empty() || guest.step(&mut u).is_err() {
            break;
        }
    }
    let moved = guest.board.balloon().unwrap();
    for given in [moved.inflated, moved.reported, moved.hinted] {
        assert!(given.measured <= given.claimed, "{moved:?}");
    }
    assert!(moved.actual.get() <= MEMORY && moved.target.get() <= MEMORY, "{moved:?}");
    let pages = |bytes: vmbed::Bytes| bytes.get() >> 12;
    guest.depth.inflated = pages(moved.inflated.measured);
    guest.depth.reported = pages(moved.reported.measured);
    guest.depth.hinted = pages(moved.hinted.measured);
    // Whatever happened: after a reset a page that is given up is gone, and its neighbour is not.
    guest.restart(0);
    let page = FIRST << 12;
    guest.board.write_memory(page, &[7; 8192]).unwrap();
    guest.board.write_memory(LIST, &(FIRST as u32).to_le_bytes()).unwrap();
    let head = guest.rings[0].send(&guest.board, &[(LIST, 4, 0)]);
    guest.regs.ring(&guest.board, 0);
    guest.board.process();
    assert_eq!(guest.rings[0].take_used(&guest.board), Some((head, 0)), "after a reset it inflates");
    let mut bytes = [1; 8192];
    guest.board.read_memory(page, &mut bytes).unwrap();
    assert!(bytes[..4096] == [0; 4096] && bytes[4096..] == [7; 4096]);
    guest.depth
}

impl Guest {
    /// A driver that accepts everything, but the rings' features as it likes.
    fn restart(&mut self, choice: u8) {
        self.regs.set_status(&self.board, 0);
        self.rings = (0..5).map(|i| Rings::new(&self.board, RINGS + 0x4000 * i, 16)).collect();
        (self.waiting, self.sound) = (0, true);
        let features = [(1, EVENT_IDX), (2, INDIRECT_DESC)].iter();
        let features =
            features.filter(|(bit, _)| choice & bit != 0).fold(VERSION_1 | ALL, |all, (_, f)| all | f);
        let rings: Vec<_> = self.rings.iter().collect();
        assert!(self.regs.start(&self.board, features, &rings));
        self.board.process();
    }

    /// A good request for that queue.
    fn request(&mut self, queue: usize, u: &mut Unstructured<'_>) -> Result<Vec<Buffer>> {
        let mut list = Vec::new();
        match queue {
            0 | 1 => {
                let (first, count) = (u.int_in_range(0..=COUNT - 1)?, u.int_in_range(1..=40)?);
                for i in 0..count {
                    let page = if u.ratio(1u8, 30u8)? { u.arbitrary()? } else { FIRST + (first + i) % COUNT };
                    list.extend((page as u32).to_le_bytes());
                }
            }
            2 => {
                for _ in 0..u.int_in_range(1..=12)? {
                    list.extend(u.int_in_range(0..=16u16)?.to_le_bytes());
                    list.extend(u.arbitrary::<u64>()?.to_le_bytes());
                }
            }
            // The number that the device asks with, mostly, or another one.
            3 if u.ratio(1u8, 2u8)? => {
                let asked = u32::try_from(read(&self.board, self.regs.config + 8, 4)).unwrap_or(0);
                let id = if u.ratio(1u8, 4u8)? { u.int_in_range(0..=3)? } else { asked };
                list.extend(id.to_le_bytes());
            }
            _ => {
                let mut ranges = Vec::new();
                for _ in 0..u.int_in_range(1..=3)? {
                    let first = u.int_in_range(0..=COUNT - 1)?;
                    let pages = u.int_in_range(1..=COUNT - first)?;
                    ranges.push(((FIRST + first) << 12, (pages << 12) as u32, WRITE));
                }
                return Ok(ranges);
            }
        }
        let at = LIST + 0x100 * (self.lists % 128);
        self.lists += 1;
        self.board.write_memory(at, &list).unwrap();
        Ok(vec![(at, list.len() as u32, 0)])
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let queue = u.int_in_range(0..=4usize)?;
        // Something to be had.
        self.board.write_memory(FIRST << 12, &vec![u.arbitrary::<u8>()?; (COUNT << 12) as usize]).unwrap();
        let mut chain = self.request(queue, u)?;
        if u.ratio(1u8, 3u8)? {
            bend(&mut chain, u)?;
        }
        let table = u.ratio(1u8, 4u8)?;
        let rings = &mut self.rings[queue];
        let head = if table {
            indirect(&self.board, rings, TABLE, &chain, u)?
        } else {
            rings.chain(&self.board, &chain)
        };
        rings.offer(&self.board, head);
        if u.ratio(1u8, 12u8)? {
            break_rings(&self.board, rings, u)?;
            self.sound = false;
        }
        // Of an account nothing is ignored, and it is kept.
        let known = self.sound && !table && self.waiting == 0 && is_plain(&chain) && queue != 2;
        self.waiting += u32::from(queue != 2);
        let list = side(&chain, false);
        let named = content(&self.board, &list, 0, total(&list));
        // What it gives up of its rings is gone.
        let pages = named.iter().flat_map(|list| list.as_chunks::<4>().0).map(|pfn| u32::from_le_bytes(*pfn));
        let rings: Vec<_> = pages.map(|pfn| (u64::from(pfn) << 12, 0x1000)).collect();
        self.sound &= !reaches(&side(&chain, true), RINGS, 0x4000 * 5) && !reaches(&rings, RINGS, 0x4000 * 5);
        self.regs.ring(&self.board, queue as u16);
        let before = self.board.balloon().unwrap().ignored;
        if u.ratio(3u8, 4u8)? {
            self.board.process();
        }
        for (index, rings) in self.rings.iter_mut().enumerate() {
            let completed = collect(&self.board, rings);
            self.depth.completed += completed;
            if index != 2 {
                self.waiting = self.waiting.saturating_sub(completed);
            }
        }
        let ignored = self.board.balloon().unwrap().ignored - before;
        if known && self.waiting == 0 {
            self.look(queue, &chain, named, ignored);
        }
        match u.arbitrary::<u8>()? {
            0..8 => {
                self.board.pause();
                self.board.resume();
            }
            8..16 => self.restart(u.arbitrary()?),
            16..64 => {
                self.board.ask_balloon(u.int_in_range(0..=MEMORY)?).unwrap();
                if u.ratio(1u8, 2u8)? {
                    self.board.process_all();
                }
            }
            64..80 => write(&self.board, self.regs.config + *u.choose(&[4, 12])?, 4, u.arbitrary()?),
            80..84 => {
                self.regs.set(&self.board, u.int_in_range(0..=0x40)?, 2, u.arbitrary()?);
                self.sound = false;
            }
            _ => {}
        }
        if self.regs.status(&self.board) & (NEEDS_RESET | 4) != 4 {
            self.depth.resets += 1;
            self.depth.faults.add(&self.board);
            self.restart(u.arbitrary()?);
        }
        Ok(())
    }

    /// Looks at what one request has named and did not get.
    fn look(&mut self, queue: usize, chain: &[Buffer], named: Option<Vec<u8>>, ignored: u64) {
        let length = total(&side(chain, false));
        let mut met = |name: &str, often| {
            self.depth.ignored[IGNORED.iter().position(|known| *known == name).unwrap()] += often;
        };
        let ranges = side(chain, true);
        let ragged = ranges.iter().any(|(start, length)| (start | length) & 0xfff != 0);
        match queue {
            0 | 1 if length < 4 => {
                assert_eq!(ignored, 0);
                met("no_list", 1);
            }
            0 | 1 if named.is_none() => met("list_outside", 1),
            0 | 1 => {
                let list = named.unwrap_or_default();
                let pages = list.as_chunks::<4>().0.iter().map(|pfn| u32::from_le_bytes(*pfn));
                let outside = pages.filter(|pfn| u64::from(*pfn) >= MEMORY >> 12).count() as u64;
                // One that broke its queue has named nothing.
                // Of a long list, the end is not looked at.
                let whole = length <= 4096 && self.regs.status(&self.board) & NEEDS_RESET == 0;
                assert!(ignored == outside || !whole, "{ignored} of {outside}");
                met(["inflate_outside", "deflate_outside"][queue], ignored);
            }
            _ => {
                let names = [["hint_outside", "hint_ragged"], ["report_outside", "report_ragged"]];
                met(names[queue - 3][usize::from(ragged)], ignored);
            }
        }
    }
}
