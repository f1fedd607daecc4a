//! What every driver of these bodies breaks: chains, tables and rings.

use arbitrary::{Result, Unstructured};
use vmbed::EventKind;
use vmbed::internals::Board;
use vmbed::internals::driver::{Buffer, INDIRECT, NEXT, Rings, WRITE};

/// How much memory the guests of these bodies have.
pub const MEMORY: u64 = 1 << 20;

/// Changes one thing in a chain.
pub fn bend(chain: &mut Vec<Buffer>, u: &mut Unstructured<'_>) -> Result<()> {
    let at = u.choose_index(chain.len())?;
    match u.int_in_range(0..=6)? {
        0 => {
            chain[at].0 = *u.choose(&[0, MEMORY - 1, MEMORY, 0xc000_0000, u64::MAX - 3, 0x8_0000, 0x4000])?
        }
        1 => chain[at].0 = u.arbitrary()?,
        2 => chain[at].1 = *u.choose(&[0, 1, 15, 511, 513, 0x1_0000, u32::MAX])?,
        3 => chain[at].1 = u.arbitrary()?,
        4 => chain[at].2 ^= 1 << u.int_in_range(0..=3)?,
        5 => drop(chain.remove(at)),
        _ => chain.insert(at, chain[at]),
    }
    if chain.is_empty() {
        chain.push((0x1000, 16, 0));
    }
    Ok(())
}

/// The chain in a table of its own; sometimes not quite as long as it says. Its head.
pub fn indirect(
    board: &Board,
    rings: &mut Rings,
    table: u64,
    chain: &[Buffer],
    u: &mut Unstructured<'_>,
) -> Result<u16> {
    for (index, &(addr, len, flags)) in chain.iter().enumerate() {
        let flags = if index + 1 == chain.len() { flags } else { flags | NEXT };
        let mut next = index as u16 + 1;
        if u.ratio(1u8, 20u8)? {
            next = u.arbitrary()?;
            // Back to where it was, often enough.
            next = if next % 2 == 1 { next % chain.len() as u16 } else { next };
        }
        rings.descriptor(board, table, index as u16, (addr, len, flags), next);
    }
    let length = 16 * chain.len() as u32;
    let head = match if u.ratio(1u8, 16u8)? { u.arbitrary()? } else { length } {
        // Not in memory.
        wrong if wrong % 4 == 3 => (MEMORY, length, INDIRECT),
        other => (table, other, INDIRECT),
    };
    Ok(rings.chain(board, &[head]))
}

/// Breaks the rings themselves.
pub fn break_rings(board: &Board, rings: &mut Rings, u: &mut Unstructured<'_>) -> Result<()> {
    match u.int_in_range(0..=3)? {
        0 => rings.set_avail(board, u.arbitrary()?),
        1 => {
            let head = u.int_in_range(0..=17)?;
            rings.offer(board, head);
            rings.offer(board, head);
        }
        2 => {
            let at = rings.desc + u.int_in_range::<u64>(0..=0x3fff)?;
            board.write_memory(at, &u.arbitrary::<[u8; 2]>()?).unwrap_or(());
        }
        _ => {
            let index = u.int_in_range(0..=15)?;
            let buffer = (u.arbitrary()?, u.arbitrary()?, u.arbitrary()?);
            let next = u.arbitrary::<u16>()?;
            // One of those that there are, often enough.
            let next = if next % 2 == 1 { next % 16 } else { next };
            rings.descriptor(board, rings.desc, index, buffer, next);
        }
    }
    Ok(())
}

/// Takes what was completed: no more than the ring holds, even where the used ring was overwritten.
pub fn collect(board: &Board, rings: &mut Rings) -> u32 {
    lengths(board, rings).len() as u32
}

/// The same, with how much of each was filled.
pub fn lengths(board: &Board, rings: &mut Rings) -> Vec<u32> {
    (0..rings.size).map_while(|_| rings.take_used(board)).map(|(_, length)| length).collect()
}

/// How a device finds its rings broken: a name, and what the event says.
const FAULTS: [(&str, &str); 9] = [
    ("AvailAhead", "the available index is"),
    ("Index", "is beyond the table"),
    ("InUse", "made available while it is in use"),
    ("TooLong", "a chain of more than"),
    ("NestedIndirect", "an indirect table in an indirect table"),
    ("IndirectNext", "an indirect descriptor with a next one"),
    ("IndirectLength", "an indirect table of"),
    ("Table", "a descriptor table at"),
    ("Wraps", "whose end wraps"),
];

/// How often each of them was found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults([u32; FAULTS.len()]);

impl Faults {
    /// Adds those of which a board has told since the last time.
    pub fn add(&mut self, board: &Board) {
        while let Some(event) = board.events().next_event() {
            let EventKind::DeviceNeedsReset { why, .. } = event.kind else { continue };
            let at = FAULTS.iter().position(|(_, text)| why.contains(text));
            self.0[at.unwrap_or_else(|| panic!("a reason that is not known here: {why}"))] += 1;
        }
    }

    /// What a campaign sums up, but for those that a device cannot meet.
    pub fn counters(&self, never: &[&str]) -> Vec<(&'static str, u64)> {
        let all = FAULTS.iter().zip(self.0).map(|((name, _), count)| (*name, u64::from(count)));
        all.filter(|(name, count)| {
            let can_be = !never.contains(name);
            assert!(can_be || *count == 0, "{name}");
            can_be
        })
        .collect()
    }
}

/// Whether that is a chain of buffers and nothing else.
pub fn is_plain(chain: &[Buffer]) -> bool {
    chain.iter().all(|(.., flags)| flags & (NEXT | INDIRECT) == 0)
}

/// The buffers of a chain that the device is to write, or to read: those that have any bytes.
pub fn side(chain: &[Buffer], write: bool) -> Vec<(u64, u64)> {
    let mine = chain.iter().filter(|(_, length, flags)| *length > 0 && (flags & WRITE != 0) == write);
    mine.map(|&(address, length, _)| (address, length.into())).collect()
}

/// How many bytes they have.
pub fn total(buffers: &[(u64, u64)]) -> u64 {
    buffers.iter().map(|(_, length)| length).sum()
}

/// Their bytes from `skip` on, `count` of them; `None` where one of these is not in memory.
pub fn content(board: &Board, buffers: &[(u64, u64)], mut skip: u64, mut count: u64) -> Option<Vec<u8>> {
    let mut all = Vec::new();
    for &(address, length) in buffers {
        let skipped = skip.min(length);
        let here = (length - skipped).min(count);
        (skip, count) = (skip - skipped, count - here);
        if here > MEMORY {
            return None;
        }
        let mut piece = vec![0; here as usize];
        // Nothing is nowhere.
        if here > 0 {
            board.read_memory(address.checked_add(skipped)?, &mut piece).ok()?;
        }
        all.extend(piece);
    }
    (count == 0).then_some(all)
}

/// Whether a device that writes to those may write into what lies from `at` on.
pub fn reaches(buffers: &[(u64, u64)], at: u64, length: u64) -> bool {
    buffers.iter().any(|&(start, count)| start < at + length && start.saturating_add(count) > at)
}
