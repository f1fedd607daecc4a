//! A virtqueue against a model that does the same on paper: good rings and chains, of which some are bent.

use std::collections::{BTreeMap, BTreeSet};

use arbitrary::{Result, Unstructured};
use vmbed::internals::driver::{Buffer, INDIRECT, NEXT, Rings, WRITE};
use vmbed::internals::{BareQueue, Board, RingSetup, Taken};

use super::bent::{MEMORY, bend, break_rings, indirect};

const RINGS: u64 = 0x8_0000;
const TABLE: u64 = 0x4000;
const DATA: u64 = 0x1_0000;
const STEPS: usize = 128;
/// How a ring can be refused, and a chain. A queue that has failed answers `Broken` for ever.
const FAULTS: [&str; 15] = [
    "Size",
    "Rings",
    "AvailAhead",
    "Index",
    "InUse",
    "NotInUse",
    "TooLong",
    "NestedIndirect",
    "IndirectNext",
    "IndirectLength",
    "Table",
    "Wraps",
    "Broken",
    "Outside",
    "Short",
];

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Chains taken, those of them with a table of their own, and those whose buffers are in a wrong order.
    pub taken: u32,
    pub indirect: u32,
    pub unordered: u32,
    /// Chains handed back, and given back.
    pub completed: u32,
    pub given_back: u32,
    /// Bytes moved by cursors.
    pub moved: u64,
    /// Interrupts, and completions of which the driver did not want to know.
    pub raised: u32,
    pub spared: u32,
    /// Wake-ups that ended with everything served, or with more left.
    pub drained: u32,
    pub left: u32,
    /// What was refused, as [`FAULTS`].
    pub faults: [u32; FAULTS.len()],
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("taken", self.taken.into()),
            ("indirect", self.indirect.into()),
            ("unordered", self.unordered.into()),
            ("completed", self.completed.into()),
            ("given_back", self.given_back.into()),
            ("moved", self.moved),
            ("raised", self.raised.into()),
            ("spared", self.spared.into()),
            ("drained", self.drained.into()),
            ("left", self.left.into()),
        ];
        all.extend(FAULTS.iter().zip(self.faults).map(|(name, count)| (*name, u64::from(count))));
        all
    }

    fn refused(&mut self, fault: &str) {
        let at = FAULTS.iter().position(|name| *name == fault);
        self.faults[at.unwrap_or_else(|| panic!("{fault} is new"))] += 1;
    }
}

/// Runs one input. Panics where the queue and the model differ.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let board = Board::new(MEMORY, Vec::new()).unwrap();
    let mut depth = Depth::default();
    let mut steps = STEPS;
    while !u.is_empty() && steps > 0 {
        steps -= 1;
        let setup = setup(&mut u).unwrap_or_default();
        if let Some(mut guest) = Guest::open(&board, setup, &mut depth) {
            while !u.is_empty() && steps > 0 && guest.step(&mut u, &mut depth).unwrap_or(false) {
                steps -= 1;
            }
        }
    }
    depth
}

/// Mostly rings of 16 KiB as a driver has them; sometimes nonsense.
fn setup(u: &mut Unstructured<'_>) -> Result<RingSetup> {
    let size = *u.choose(&[16u16, 16, 4, 1, 2, 8, 256])?;
    let (desc, start) = (RINGS, u.arbitrary::<u16>()?);
    let mut setup = RingSetup {
        max_size: size * *u.choose(&[1u16, 1, 2])?,
        size,
        desc,
        avail: desc + 0x2000,
        used: desc + 0x3000,
        event_idx: u.arbitrary()?,
        next_avail: start,
        next_used: start,
    };
    if u.ratio(1u8, 6u8)? {
        let anywhere = *u.choose(&[0, 8, 1, MEMORY, MEMORY - 64, u64::MAX - 15, u64::MAX, 0x10_0000_0000])?;
        match u.int_in_range(0..=4)? {
            0 => setup.desc = anywhere,
            1 => setup.avail = anywhere,
            2 => setup.used = anywhere,
            3 => setup.size = *u.choose(&[0, 3, 17, 1024, 0x8000, 0xffff])?,
            _ => setup.max_size = *u.choose(&[0, 3, 1, 0xffff])?,
        }
    }
    Ok(setup)
}

/// Whether a device can serve that: sizes, alignments, and all of it in memory.
fn is_sound(s: &RingSetup, slack: u64) -> bool {
    let sizes = s.max_size.is_power_of_two() && s.size.is_power_of_two() && s.size <= s.max_size;
    let size = u64::from(s.size);
    let inside = |at: u64, len: u64| at.checked_add(len + slack).is_some_and(|end| end <= MEMORY);
    let aligned = s.desc.is_multiple_of(16) && s.avail.is_multiple_of(2) && s.used.is_multiple_of(4);
    sizes
        && aligned
        && inside(s.desc, 16 * size)
        && inside(s.avail, 6 + 2 * size)
        && inside(s.used, 6 + 8 * size)
}

struct Guest<'a> {
    board: &'a Board,
    rings: Rings,
    queue: BareQueue,
    model: Model<'a>,
}

/// What a device has to do with a ring, as the specification has it.
struct Model<'a> {
    board: &'a Board,
    setup: RingSetup,
    /// The available index as it was read last.
    seen: u16,
    told: u16,
    in_use: BTreeSet<u16>,
    broken: bool,
}

impl Model<'_> {
    fn word(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.board.read_memory(at, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn fail<T>(&mut self, fault: &str) -> std::result::Result<T, String> {
        self.broken = true;
        Err(fault.into())
    }

    fn pop(&mut self) -> std::result::Result<Option<(Taken, bool)>, String> {
        if self.broken {
            return Err("Broken".into());
        }
        let RingSetup { avail, size, next_avail: next, .. } = self.setup;
        if next == self.seen {
            let index = self.word(avail + 2);
            if index.wrapping_sub(next) > size {
                return self.fail("AvailAhead");
            }
            self.seen = index;
        }
        if next == self.seen {
            return Ok(None);
        }
        let head = self.word(avail + 4 + 2 * u64::from(next % size));
        if head >= size {
            return self.fail("Index");
        }
        if !self.in_use.insert(head) {
            return self.fail("InUse");
        }
        self.setup.next_avail = next.wrapping_add(1);
        self.walk(head).or_else(|fault| self.fail(fault)).map(Some)
    }

    fn walk(&self, head: u16) -> std::result::Result<(Taken, bool), &'static str> {
        let mut taken = Taken { head, ordered: true, ..Taken::default() };
        let (mut table, mut entries, mut own) = (self.setup.desc, u32::from(self.setup.size), false);
        let mut index = head;
        for _ in 0..=self.setup.max_size {
            if u32::from(index) >= entries {
                return Err("Index");
            }
            let mut raw = [0; 16];
            let at = table.checked_add(16 * u64::from(index)).ok_or("Table")?;
            self.board.read_memory(at, &mut raw).map_err(|_| "Table")?;
            let number = |range: std::ops::Range<usize>| {
                raw[range].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b))
            };
            let (addr, len, flags, next) =
                (number(0..8), number(8..12) as u32, number(12..14) as u16, number(14..16) as u16);
            if flags & INDIRECT != 0 {
                match () {
                    () if own => return Err("NestedIndirect"),
                    () if flags & NEXT != 0 => return Err("IndirectNext"),
                    () if len == 0 || len % 16 != 0 => return Err("IndirectLength"),
                    () => (table, entries, own, index) = (addr, len / 16, true, 0),
                }
                continue;
            }
            if addr.checked_add(len.into()).is_none() {
                return Err("Wraps");
            }
            match flags & WRITE {
                _ if len == 0 => {}
                0 => {
                    taken.ordered &= taken.writable.is_empty();
                    taken.readable.push((addr, len));
                }
                _ => taken.writable.push((addr, len)),
            }
            if flags & NEXT == 0 {
                return Ok((taken, own));
            }
            index = next;
        }
        Err("TooLong")
    }

    /// Hands back, and looks whether the driver can see it.
    fn complete(&mut self, chains: &[(u16, u32)]) -> std::result::Result<(), String> {
        if self.broken {
            return Err("Broken".into());
        }
        // Those in front of a wrong one are the device's no longer, and the driver never hears of them.
        if !chains.iter().all(|(head, _)| self.in_use.remove(head)) {
            return Err("NotInUse".into());
        }
        let RingSetup { used, size, next_used, .. } = self.setup;
        for (&(head, written), i) in chains.iter().zip(0..) {
            let number = next_used.wrapping_add(i);
            let at = used + 4 + 8 * u64::from(number % size);
            let mut element = [0; 8];
            self.board.read_memory(at, &mut element).unwrap();
            let expected = [u32::from(head).to_le_bytes(), written.to_le_bytes()].concat();
            assert_eq!(element[..], expected[..], "the used ring's element {number}");
        }
        self.setup.next_used = next_used.wrapping_add(chains.len() as u16);
        assert_eq!(self.word(used + 2), self.setup.next_used, "the used index");
        Ok(())
    }

    /// Whether the driver wants an interrupt now.
    fn notify(&mut self) -> bool {
        let RingSetup { avail, size, next_used, event_idx, .. } = self.setup;
        let (before, after) = (self.told, next_used);
        self.told = after;
        if event_idx {
            let event = self.word(avail + 4 + 2 * u64::from(size));
            // One of those that were completed since is the one that the driver waits for.
            let count = after.wrapping_sub(before);
            event.wrapping_sub(before) < count
        } else {
            before != after && self.word(avail) & 1 == 0
        }
    }
}

impl<'a> Guest<'a> {
    fn open(board: &'a Board, setup: RingSetup, depth: &mut Depth) -> Option<Self> {
        let mut rings = Rings::new(board, RINGS, setup.size.clamp(1, 256));
        rings.set_avail(board, setup.next_avail);
        match BareQueue::new(board, &setup) {
            Err(fault) => {
                assert!(!is_sound(&setup, 64), "{setup:x?}");
                depth.refused(&fault);
                None
            }
            Ok(queue) => {
                assert!(is_sound(&setup, 0), "{setup:x?}");
                // Elsewhere they may lie over each other, which a model that reads them one by one does not follow.
                if (setup.desc, setup.avail, setup.used) != (RINGS, RINGS + 0x2000, RINGS + 0x3000) {
                    return None;
                }
                let (seen, told) = (setup.next_avail, setup.next_used);
                let model = Model { board, setup, seen, told, in_use: BTreeSet::new(), broken: false };
                Some(Self { board, rings, queue, model })
            }
        }
    }

    /// Whether to go on with this queue.
    fn step(&mut self, u: &mut Unstructured<'_>, depth: &mut Depth) -> Result<bool> {
        // One that has failed does nothing more.
        if self.model.broken && u.ratio(1u8, 3u8)? {
            return Ok(false);
        }
        match u.int_in_range(0..=13u8)? {
            0..5 => self.offer(u)?,
            5..8 => self.pop(u, depth)?,
            8 | 9 => self.complete(u, depth)?,
            10 => {
                let wants = u.arbitrary::<u16>()?;
                let at = self.model.setup.avail + 4 + 2 * u64::from(self.model.setup.size);
                let at = if self.model.setup.event_idx { at } else { self.model.setup.avail };
                self.board.write_memory(at, &wants.to_le_bytes()).unwrap();
            }
            11 => self.enable(depth),
            12 => self.drain(u, depth)?,
            _ => return u.ratio(7u8, 8u8),
        }
        Ok(true)
    }

    fn offer(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let mut chain: Vec<Buffer> = Vec::new();
        for _ in 0..u.int_in_range(1..=3)? {
            let (at, len) = (DATA + u.int_in_range::<u64>(0..=0x4000)?, u.int_in_range(0..=0x300)?);
            chain.push((at, len, 0));
        }
        // First those that the device reads.
        let first = u.int_in_range(0..=chain.len())?;
        chain[first..].iter_mut().for_each(|buffer| buffer.2 = WRITE);
        if u.ratio(1u8, 3u8)? {
            bend(&mut chain, u)?;
        }
        let (board, rings) = (self.board, &mut self.rings);
        let head = if u.ratio(1u8, 4u8)? {
            let head = indirect(board, rings, TABLE, &chain, u)?;
            if u.ratio(1u8, 8u8)? {
                // A table in the table, one that goes on, or one that is nowhere.
                match u.int_in_range(0..=2)? {
                    0 => rings.descriptor(board, TABLE, 0, (TABLE, 16, INDIRECT), 0),
                    1 => rings.descriptor(board, rings.desc, head, (TABLE, 16, INDIRECT | NEXT), 0),
                    _ => rings.descriptor(board, rings.desc, head, (u64::MAX - 15, 32, INDIRECT), 0),
                }
            }
            head
        } else {
            rings.chain(board, &chain)
        };
        rings.offer(board, head);
        if u.ratio(1u8, 12u8)? {
            break_rings(board, rings, u)?;
        }
        Ok(())
    }

    fn pop(&mut self, u: &mut Unstructured<'_>, depth: &mut Depth) -> Result<()> {
        let expected = self.model.pop();
        let found = self.queue.pop();
        let own = matches!(&expected, Ok(Some((_, true))));
        assert_eq!(found, expected.map(|found| found.map(|(taken, _)| taken)));
        match found {
            Ok(None) => {}
            Ok(Some(taken)) => {
                depth.taken += 1;
                depth.indirect += u32::from(own);
                depth.unordered += u32::from(!taken.ordered);
                self.copy(&taken, u, depth)?;
                if u.ratio(1u8, 8u8)? {
                    self.queue.give_back(taken.head);
                    self.model.in_use.remove(&taken.head);
                    self.model.setup.next_avail = self.model.setup.next_avail.wrapping_sub(1);
                    depth.given_back += 1;
                }
            }
            Err(fault) => depth.refused(&fault),
        }
        Ok(())
    }

    /// Moves bytes through the chain's buffers, however they are split.
    fn copy(&mut self, taken: &Taken, u: &mut Unstructured<'_>, depth: &mut Depth) -> Result<()> {
        let skip = u.int_in_range(0..=40u64)?;
        let pieces: Vec<usize> =
            (0..u.int_in_range(0..=3)?).map(|_| u.int_in_range(0..=500)).collect::<Result<_>>()?;
        let wanted: usize = pieces.iter().sum();
        match (place(&taken.readable, skip, wanted), self.queue.read(skip, &pieces)) {
            (Ok(places), Ok(bytes)) => {
                let mut expected = vec![0; wanted];
                for (byte, at) in expected.iter_mut().zip(places) {
                    self.board.read_memory(at, std::slice::from_mut(byte)).unwrap();
                }
                assert_eq!(bytes, expected);
                depth.moved += wanted as u64;
            }
            (expected, found) => refused(expected, found.map(drop), depth),
        }
        let fill = u.arbitrary::<u8>()?;
        let bytes: Vec<u8> = (0..wanted).map(|i| fill.wrapping_add(i as u8)).collect();
        let (mut rest, mut parts) = (&bytes[..], Vec::new());
        for length in pieces {
            let (part, further) = rest.split_at(length);
            parts.push(part);
            rest = further;
        }
        match (place(&taken.writable, skip, wanted), self.queue.write(skip, &parts)) {
            (Ok(places), Ok(())) => {
                // Where buffers lie over each other, what comes later stays.
                let last: BTreeMap<u64, u8> = places.into_iter().zip(bytes.iter().copied()).collect();
                for (at, expected) in last {
                    let mut byte = 0;
                    self.board.read_memory(at, std::slice::from_mut(&mut byte)).unwrap();
                    assert_eq!(byte, expected, "at {at:#x}");
                }
                depth.moved += wanted as u64;
            }
            (expected, found) => refused(expected, found, depth),
        }
        Ok(())
    }

    fn complete(&mut self, u: &mut Unstructured<'_>, depth: &mut Depth) -> Result<()> {
        let mut chains = Vec::new();
        let held: Vec<_> = self.model.in_use.iter().copied().collect();
        for head in held.iter().take(u.int_in_range(1..=4)?) {
            chains.push((*head, u.arbitrary()?));
        }
        if chains.is_empty() || u.ratio(1u8, 10u8)? {
            chains.push((u.int_in_range(0..=300)?, 0));
        }
        let found = self.queue.complete(&chains);
        assert_eq!(found, self.model.complete(&chains));
        match found {
            Ok(()) => depth.completed += chains.len() as u32,
            Err(fault) => depth.refused(&fault),
        }
        if u.ratio(2u8, 3u8)? {
            let told = self.model.told;
            let wanted = self.model.notify();
            assert_eq!(self.queue.notify() > 0, wanted, "the driver's wish");
            depth.raised += u32::from(wanted);
            depth.spared += u32::from(!wanted && told != self.model.told);
        }
        Ok(())
    }

    fn enable(&mut self, depth: &mut Depth) {
        let found = self.queue.enable_notification();
        if self.model.broken {
            assert_eq!(found, Err("Broken".into()));
            return depth.refused("Broken");
        }
        let RingSetup { avail, used, size, next_avail, event_idx, .. } = self.model.setup;
        assert_eq!(found, Ok(self.model.word(avail + 2) != next_avail));
        if event_idx {
            assert_eq!(
                self.model.word(used + 4 + 8 * u64::from(size)),
                next_avail,
                "where the doorbell is wanted"
            );
        } else {
            assert_eq!(self.model.word(used) & 1, 0, "the doorbell is wanted");
        }
    }

    fn drain(&mut self, u: &mut Unstructured<'_>, depth: &mut Depth) -> Result<()> {
        let enough = u.int_in_range(1..=300u32)?;
        let (model, mut served, mut last) = (&mut self.model, 0, None);
        let done = self.queue.drain(|taken| {
            // The one before was completed meanwhile.
            if let Some(head) = last.replace(taken.head) {
                model.complete(&[(head, served)]).unwrap();
            }
            assert_eq!(model.pop().map(|found| found.map(|(taken, _)| taken)), Ok(Some(taken.clone())));
            served += 1;
            (served, served < enough)
        });
        if let Some(head) = last {
            model.complete(&[(head, served)]).unwrap();
        }
        depth.taken += served;
        depth.completed += served;
        assert!(served <= u32::from(model.setup.size), "one wake-up");
        match done {
            Ok(true) => {
                assert!(served == enough || served == u32::from(model.setup.size));
                depth.left += 1;
            }
            Ok(false) => {
                assert_eq!(model.pop().map(|found| found.is_some()), Ok(false));
                depth.drained += 1;
            }
            // It may be broken from before, which its first look at the ring finds.
            Err(fault) => {
                assert_eq!(model.pop().map(|found| found.is_some()), Err(fault.to_string()));
                depth.refused(&fault);
            }
        }
        Ok(())
    }
}

fn refused<T: std::fmt::Debug>(
    expected: std::result::Result<T, &str>,
    found: std::result::Result<(), String>,
    depth: &mut Depth,
) {
    let (expected, found) = (expected.expect_err("the queue refuses"), found.expect_err("the model refuses"));
    assert_eq!(expected, found);
    depth.refused(&found);
}

/// Where `count` bytes behind `skip` are; or why they are not.
fn place(spans: &[(u64, u32)], skip: u64, count: usize) -> std::result::Result<Vec<u64>, &'static str> {
    let (mut skip, mut places) = (skip, Vec::new());
    for &(at, len) in spans {
        let passed = skip.min(len.into());
        skip -= passed;
        let now = (u64::from(len) - passed).min((count - places.len()) as u64);
        // A buffer is looked at when bytes of it are wanted.
        if now > 0 && at + passed + now > MEMORY {
            return Err("Outside");
        }
        places.extend((0..now).map(|i| at + passed + i));
    }
    if skip > 0 || places.len() < count { Err("Short") } else { Ok(places) }
}
