//! What every driver of these bodies breaks: chains, tables and rings.

use arbitrary::{Result, Unstructured};
use vmbed::internals::Board;
use vmbed::internals::driver::{Buffer, INDIRECT, NEXT, Rings};

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
        }
        rings.descriptor(board, table, index as u16, (addr, len, flags), next);
    }
    let length = 16 * chain.len() as u32;
    let length = if u.ratio(1u8, 16u8)? { u.arbitrary()? } else { length };
    Ok(rings.chain(board, &[(table, length, INDIRECT)]))
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
            rings.descriptor(board, rings.desc, index, buffer, u.arbitrary()?);
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
