#![forbid(unsafe_code)]
//! LZ4 blocks, unpacked through a small window.
//!
//! The window holds what a match can reach back to, and a piece on its way out: a kernel of 50 MiB passes
//! through memory that stays in the processor's cache, and half of it, stretches of zeroes, through nothing
//! worse than copies. (The crate lz4_flex wants a buffer as large as what comes out, and takes twice the
//! instructions for a kernel.)

use crate::error::{Error, Result};

/// How far back a match reaches: its offset has 16 bits.
const HISTORY: usize = 64 << 10;
/// How much is handed on at a time; more than all headers of an ELF file.
const PIECE: usize = 448 << 10;
/// How much is copied at once: enough, and vector instructions do it; for more the C library takes `rep
/// movsb`, which emulated processors count by the byte.
const COPY: usize = 2 << 10;
/// What the fast path may write past the end: 14 literals, and three times 8 bytes.
const SLACK: usize = 48;
const WINDOW: usize = HISTORY + PIECE + SLACK;
/// A length's four bits all set: more bytes follow.
const MORE: usize = 15;
/// The shortest match.
const MIN_MATCH: usize = 4;
/// The longest match that a token holds without further bytes.
const SHORT_MATCH: usize = MIN_MATCH + MORE - 1;

/// Why a block was not unpacked.
#[derive(Debug)]
pub(super) enum Fault {
    Damaged(&'static str),
    /// Whoever takes the pieces failed.
    Taker(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Taker(error)
    }
}

/// Unpacks blocks one after another and hands pieces of what comes out to `take`.
pub(super) struct Unpacker<F> {
    window: Box<[u8]>,
    /// What follows is free.
    end: usize,
    /// What precedes was handed on.
    taken: usize,
    /// Where this block began, as far as it is still here: nothing reaches further back.
    floor: usize,
    /// What has left the window.
    gone: u64,
    take: F,
}

/// Copies `N` bytes through registers: a call costs more than the copy.
#[inline(always)]
fn copy<const N: usize>(window: &mut [u8; WINDOW], from: usize, to: usize) {
    if let Some(bytes) = window[from..].first_chunk::<N>().copied() {
        window[to..to + N].copy_from_slice(&bytes);
    }
}

impl<F: FnMut(&[u8]) -> Result<()>> Unpacker<F> {
    pub fn new(take: F) -> Self {
        let window = vec![0; WINDOW].into_boxed_slice();
        Self { window, end: 0, taken: 0, floor: 0, gone: 0, take }
    }

    /// How much was unpacked so far.
    pub fn done(&self) -> u64 {
        self.gone + self.end as u64
    }

    /// Unpacks a block, to at most `max` bytes.
    pub fn block(&mut self, block: &[u8], max: u64) -> Result<(), Fault> {
        self.floor = self.end;
        let max = self.done() + max;
        let mut rest = block;
        loop {
            rest = self.short_sequences(rest)?;
            if self.done() > max {
                return Err(Fault::Damaged("it unpacks to too much"));
            }
            let (token, tail) = rest.split_first().ok_or(Fault::Damaged("it ends within a sequence"))?;
            rest = tail;
            let literals = length(usize::from(token >> 4), &mut rest)?;
            let (bytes, tail) =
                rest.split_at_checked(literals).ok_or(Fault::Damaged("it ends within literals"))?;
            self.put(bytes)?;
            // A block ends with literals.
            if tail.is_empty() {
                return if self.done() > max {
                    Err(Fault::Damaged("it unpacks to too much"))
                } else {
                    Ok(())
                };
            }
            let (offset, tail) =
                tail.split_first_chunk::<2>().ok_or(Fault::Damaged("it ends within an offset"))?;
            rest = tail;
            let length = length(usize::from(token & 15), &mut rest)? + MIN_MATCH;
            self.repeat(usize::from(u16::from_le_bytes(*offset)), length)?;
        }
    }

    /// Hands on what is left, after the last block.
    pub fn finish(mut self) -> Result<(), Fault> {
        if self.taken < self.end {
            (self.take)(&self.window[self.taken..self.end])?;
        }
        Ok(())
    }

    /// The common case, nine of ten: few literals, then a short match. Copies of fixed lengths, the excess of
    /// which is overwritten by what follows. Returns what is left.
    #[inline]
    fn short_sequences<'a>(&mut self, mut rest: &'a [u8]) -> Result<&'a [u8], Fault> {
        // Of known length, so that one comparison serves for all accesses.
        let Some(window) = self.window.first_chunk_mut::<WINDOW>() else { return Ok(rest) };
        let (mut end, floor) = (self.end, self.floor);
        while let Some(head) = rest.first_chunk::<{ 1 + 16 + 2 }>() {
            let (literals, length) = (usize::from(head[0] >> 4), usize::from(head[0] & 15));
            if literals == MORE || length == MORE || end >= WINDOW - SLACK {
                break;
            }
            window[end..end + 16].copy_from_slice(&head[1..17]);
            let Some(offset) = head[1 + literals..].first_chunk() else { break };
            let offset = usize::from(u16::from_le_bytes(*offset));
            let start = end + literals;
            let Some(from) = start.checked_sub(offset) else { break };
            if from < floor || offset == 0 {
                break;
            }
            end = start + length + MIN_MATCH;
            if offset >= SHORT_MATCH {
                copy::<SHORT_MATCH>(window, from, start);
            } else if offset >= 8 {
                [0, 8, 16].iter().for_each(|at| copy::<8>(window, from + at, start + at));
            } else {
                (0..length + MIN_MATCH).for_each(|at| window[start + at] = window[from + at]);
            }
            rest = &rest[3 + literals..];
        }
        self.end = end;
        Ok(rest)
    }

    /// Appends literals.
    fn put(&mut self, mut bytes: &[u8]) -> Result<(), Fault> {
        while !bytes.is_empty() {
            let room = self.room(bytes.len())?;
            let (now, later) = bytes.split_at(room);
            self.window[self.end..self.end + room].copy_from_slice(now);
            self.end += room;
            bytes = later;
        }
        Ok(())
    }

    /// Appends `length` bytes from `offset` back; they overlap what they make where the offset is shorter.
    fn repeat(&mut self, offset: usize, mut length: usize) -> Result<(), Fault> {
        if offset == 0 || offset > self.end - self.floor {
            return Err(Fault::Damaged("an offset reaches before its start"));
        }
        while length > 0 {
            let room = self.room(length)?;
            let stop = self.end + room;
            // What is there repeats, so each copy may reach back twice as far as the last.
            let mut reach = offset;
            while self.end < stop {
                let now = reach.min(stop - self.end).min(COPY);
                let from = self.end - reach;
                self.window.copy_within(from..from + now, self.end);
                self.end += now;
                reach = if now == reach { reach * 2 } else { reach };
            }
            length -= room;
        }
        Ok(())
    }

    /// How many of `wanted` bytes fit, at least one; hands on a piece to make room.
    fn room(&mut self, wanted: usize) -> Result<usize, Fault> {
        let limit = WINDOW - SLACK;
        if self.end >= limit {
            (self.take)(&self.window[self.taken..self.end])?;
            let gone = self.end - HISTORY;
            for at in (0..HISTORY).step_by(COPY) {
                self.window.copy_within(gone + at..gone + at + COPY, at);
            }
            self.gone += gone as u64;
            self.end = HISTORY;
            self.taken = HISTORY;
            self.floor = self.floor.saturating_sub(gone);
        }
        Ok(wanted.min(limit - self.end))
    }
}

/// A token's half, and what follows where that is not all.
fn length(token: usize, rest: &mut &[u8]) -> Result<usize, Fault> {
    let mut length = token;
    if token == MORE {
        loop {
            let (byte, tail) = rest.split_first().ok_or(Fault::Damaged("it ends within a length"))?;
            *rest = tail;
            length += usize::from(*byte);
            if *byte != 255 {
                break;
            }
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpack(blocks: &[&[u8]]) -> Result<Vec<u8>, Fault> {
        let mut out = Vec::new();
        let mut unpacker = Unpacker::new(|piece: &[u8]| {
            out.extend_from_slice(piece);
            Ok(())
        });
        blocks.iter().try_for_each(|block| unpacker.block(block, 1 << 30))?;
        unpacker.finish()?;
        Ok(out)
    }

    fn random(seed: &mut u64) -> u64 {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        *seed
    }

    /// Text of all sorts: runs of every short period, copies from near and far, noise, zeroes.
    fn text(seed: &mut u64, size: usize) -> Vec<u8> {
        let mut text = Vec::new();
        while text.len() < size {
            let length = match random(seed) % 8 {
                0 => (random(seed) % 300_000) as usize,
                1 => (random(seed) % 3000) as usize,
                _ => (random(seed) % 40) as usize,
            };
            let back = 1 + (random(seed) % [24, 65_535][(random(seed) % 2) as usize]) as usize;
            match random(seed) % 3 {
                0 => text.extend((0..length).map(|_| random(seed) as u8)),
                1 if text.len() >= back => {
                    for _ in 0..length {
                        text.push(text[text.len() - back]);
                    }
                }
                _ => text.resize(text.len() + length, 0),
            }
        }
        text
    }

    #[test]
    fn what_lz4_packed_comes_out_again() {
        let mut seed = 0x9e37_79b9_7f4a_7c15;
        for size in [1, 15, 70_000, 400_000, 3 << 20] {
            let parts: Vec<_> = (0..3).map(|_| text(&mut seed, size)).collect();
            let packed: Vec<_> = parts.iter().map(|p| lz4_flex::block::compress(p)).collect();
            let packed: Vec<&[u8]> = packed.iter().map(Vec::as_slice).collect();
            assert!(unpack(&packed).unwrap() == parts.concat(), "{size}");
        }
    }

    #[test]
    fn damage_is_an_error() {
        // One literal, then a match: before the block's start, at offset 0, into the block before it.
        assert_eq!(unpack(&[&[0x10, b'a', 1, 0, 0x10, b'b']]).unwrap(), b"aaaaab");
        for block in [&[0x10, b'a', 2, 0, 0x10, b'b'], &[0x10, b'a', 0, 0, 0x10, b'b']] {
            assert!(matches!(unpack(&[block]), Err(Fault::Damaged(_))), "{block:?}");
            assert!(matches!(unpack(&[&[0x20, 1, 2], block]), Err(Fault::Damaged(_))), "{block:?}");
        }
        for block in
            [&[][..], &[0x10], &[0xf0, 255], &[0x10, b'a', 1], &[0x1f, b'a', 1, 0], &[0x10, b'a', 1, 0]]
        {
            assert!(matches!(unpack(&[block]), Err(Fault::Damaged(_))), "{block:?}");
        }
    }

    /// Bent blocks unpack to something, the same that lz4_flex makes of them, or not at all.
    #[test]
    fn bent_blocks_mean_what_they_mean_elsewhere() {
        let mut seed = 77;
        let mut unpacked = 0;
        for _ in 0..2000 {
            let mut packed = lz4_flex::block::compress(&text(&mut seed, 2000));
            for _ in 0..1 + random(&mut seed) % 3 {
                let at = (random(&mut seed) % packed.len() as u64) as usize;
                packed[at] = random(&mut seed) as u8;
            }
            let theirs = lz4_flex::block::decompress(&packed, 1 << 20);
            if let (Ok(ours), Ok(theirs)) = (unpack(&[&packed]), theirs) {
                assert!(ours == theirs);
                unpacked += 1;
            }
        }
        assert!(unpacked > 100, "{unpacked}: the test has lost its bite");
    }

    #[test]
    fn a_block_that_grows_past_its_limit_is_an_error() {
        let packed = lz4_flex::block::compress(&vec![0; 1 << 20]);
        let mut unpacker = Unpacker::new(|_: &[u8]| Ok(()));
        unpacker.block(&packed, 1 << 20).unwrap();
        assert!(matches!(unpacker.block(&packed, (1 << 20) - 1), Err(Fault::Damaged(_))));
    }

    #[test]
    fn an_error_of_the_taker_ends_it() {
        let packed = lz4_flex::block::compress(&vec![0; 1 << 20]);
        let mut unpacker = Unpacker::new(|_: &[u8]| Err(Error::new(crate::ErrorKind::Os, "full")));
        assert!(matches!(unpacker.block(&packed, 1 << 30), Err(Fault::Taker(_))));
    }
}
