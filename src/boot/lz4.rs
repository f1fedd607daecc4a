#![forbid(unsafe_code)]
//! LZ4 blocks, unpacked through a small window (LZ4 Block Format Description, in lz4's doc/).
//!
//! The window holds what a match can reach back to, and a piece on its way out: a kernel of 50 MiB passes
//! through memory that stays in the processor's cache; half of it, long stretches of zeroes, is left out.
//! (The crate lz4_flex wants a buffer as large as what comes out, and takes twice the instructions for a
//! kernel.)

use crate::error::{Error, Result};

/// How far back a match reaches: its offset has 16 bits.
const HISTORY: usize = 64 << 10;
/// How much is handed on at a time; more than all headers of an ELF file.
const PIECE: usize = 448 << 10;
/// How much is copied at once: enough, and vector instructions do it; for more the C library takes `rep
/// movsb`, which emulated processors count by the byte.
const COPY: usize = 2 << 10;
/// Up to here the window is filled, so that the fast path may write past the end of what it unpacks.
const LIMIT: usize = HISTORY + PIECE;
const WINDOW: usize = LIMIT + 2 * (MORE + 255) + 64;
/// How much of what is packed is here at a time. Small, so that it stays in the processor's cache, and
/// costs the host few pages.
const INPUT: usize = 64 << 10;
/// A length's four bits all set: more bytes follow.
const MORE: usize = 15;
/// The shortest match.
const MIN_MATCH: usize = 4;
/// The longest match that a token holds without further bytes.
const SHORT_MATCH: usize = MIN_MATCH + MORE - 1;
/// The most that a sequence without a second byte of length may read: literals are copied by 32.
const LONGER_SEQUENCE: usize = 1 + 1 + MORE + 255 + 32 + 2 + 1;

/// By token, how long the match is; for a token that does not say all, more than any offset.
static SHORT: [u32; 256] = {
    let mut table = [1 << 16; 256];
    let mut token = 0;
    while token < 256 {
        let (literals, length) = (token >> 4, token & 15);
        if literals != MORE && length != MORE {
            table[token] = (length + MIN_MATCH) as u32;
        }
        token += 1;
    }
    table
};

/// By an offset below 8: a mask for so many bytes, the factor that repeats them in eight, and how many of
/// the eight are whole periods.
static PERIODS: [(u64, u64, usize); 8] = {
    let mut table = [(0, 0, 0); 8];
    let mut offset = 1;
    while offset < 8 {
        let (mut times, mut shift) = (0, 0);
        while shift < 64 {
            times |= 1 << shift;
            shift += 8 * offset;
        }
        table[offset] = ((1 << (8 * offset)) - 1, times, 8 / offset * offset);
        offset += 1;
    }
    table
};

/// Why a block was not unpacked.
#[derive(Debug)]
pub(super) enum Fault {
    Damaged(&'static str),
    /// Whoever gives what is packed, or takes what comes out, failed.
    Caller(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Caller(error)
    }
}

/// A packed block on its way in.
pub(super) struct Packed<R> {
    buffer: Box<[u8]>,
    /// What is here and not unpacked yet.
    here: std::ops::Range<usize>,
    /// Where the rest of it is.
    left: std::ops::Range<u64>,
    read: R,
}

impl<R: FnMut(u64, &mut [u8]) -> Result<()>> Packed<R> {
    /// `read` fills a buffer with what is at an offset.
    pub fn new(read: R) -> Self {
        Self { buffer: vec![0; INPUT].into_boxed_slice(), here: 0..0, left: 0..0, read }
    }

    /// The next block is there.
    pub fn begin(&mut self, block: std::ops::Range<u64>) {
        (self.here, self.left) = (0..0, block);
    }

    fn is_empty(&self) -> bool {
        self.here.is_empty() && self.left.is_empty()
    }

    /// Reads on where less is here than the fast path wants.
    #[inline(always)]
    fn refill(&mut self) -> Result<()> {
        if self.here.len() < LONGER_SEQUENCE && !self.left.is_empty() { self.read_on() } else { Ok(()) }
    }

    #[cold]
    fn read_on(&mut self) -> Result<()> {
        let kept = self.here.len();
        self.buffer.copy_within(self.here.clone(), 0);
        let more = (self.left.end - self.left.start).min((INPUT - kept) as u64);
        self.here = 0..kept + more as usize;
        (self.read)(self.left.start, &mut self.buffer[kept..self.here.end])?;
        self.left.start += more;
        Ok(())
    }

    /// The next bytes: at most `wanted`, at least one.
    fn some(&mut self, wanted: usize, otherwise: &'static str) -> Result<&[u8], Fault> {
        self.refill()?;
        let start = self.here.start;
        let count = wanted.min(self.here.len());
        self.here.start += count;
        match self.buffer.get(start..start + count) {
            Some(bytes) if !bytes.is_empty() => Ok(bytes),
            _ => Err(Fault::Damaged(otherwise)),
        }
    }

    #[inline(always)]
    fn byte(&mut self, otherwise: &'static str) -> Result<u8, Fault> {
        if self.here.is_empty() {
            self.refill()?;
        }
        match self.buffer.get(self.here.start) {
            Some(byte) if !self.here.is_empty() => {
                self.here.start += 1;
                Ok(*byte)
            }
            _ => Err(Fault::Damaged(otherwise)),
        }
    }

    /// A token's half, and what follows where that is not all.
    fn length(&mut self, token: u8) -> Result<usize, Fault> {
        let mut length = usize::from(token);
        if length == MORE {
            loop {
                let byte = self.byte("it ends within a length")?;
                length += usize::from(byte);
                if byte != 255 {
                    break;
                }
            }
        }
        Ok(length)
    }
}

/// Unpacks blocks one after another and hands pieces of what comes out to `take`, each with where it
/// belongs. The first is whole; after it, what is left out between two, or at the end, is zeroes.
pub(super) struct Unpacker<F> {
    /// What this block unpacked to, as far back as a match may reach.
    window: Box<[u8]>,
    /// What follows is free.
    end: usize,
    /// What precedes was handed on.
    taken: usize,
    /// What has left the window.
    gone: u64,
    take: F,
}

/// Copies `N` bytes through registers: a call costs more than the copy.
#[inline(always)]
fn copy<const N: usize>(input: &[u8; INPUT], from: usize, window: &mut [u8; WINDOW], to: usize) {
    window[to..to + N].copy_from_slice(&input[from..from + N]);
}

/// Copies `N` bytes within the window.
#[inline(always)]
fn repeat<const N: usize>(window: &mut [u8; WINDOW], from: usize, to: usize) {
    if let Some(bytes) = window[from..].first_chunk::<N>().copied() {
        window[to..to + N].copy_from_slice(&bytes);
    }
}

/// The two bytes of an offset.
#[inline(always)]
fn offset(input: &[u8; INPUT], at: usize) -> usize {
    input[at..].first_chunk().map_or(0, |bytes| u16::from_le_bytes(*bytes).into())
}

/// Sequences of the first two kinds. The first, 90 of 100: their tokens say all, and their matches do not
/// overlap what they make. Returns where they end in both. Copies of fixed lengths, the excess of which is
/// overwritten by what follows. A function of its own, and the second kind in another: all that it works
/// on stays in registers.
#[inline(never)]
fn short_sequences(
    input: &[u8; INPUT],
    mut at: usize,
    last: usize,
    window: &mut [u8; WINDOW],
    mut end: usize,
) -> (usize, usize) {
    // Two comparisons serve for all accesses.
    let last = last.min(INPUT - LONGER_SEQUENCE);
    while at <= last && end < LIMIT {
        let token = usize::from(input[at]);
        let length = SHORT[token] as usize;
        let literals = token >> 4;
        copy::<16>(input, at + 1, window, end);
        let offset = offset(input, at + 1 + literals);
        let start = end + literals;
        let Some(from) = start.checked_sub(offset) else { break };
        if offset < length {
            let (next, stop) = longer_sequence(input, at, window, end);
            if next == at {
                break;
            }
            (at, end) = (next, stop);
            continue;
        }
        repeat::<16>(window, from, start);
        repeat::<{ SHORT_MATCH - 16 }>(window, from + 16, start + 16);
        end = start + length;
        at += 3 + literals;
    }
    (at, end)
}

/// A sequence of the second kind: its lengths have a further byte each at most, its match may overlap what
/// it makes. Returns where it ends in both; where it began if it is of the third kind, or damaged.
#[inline(never)]
fn longer_sequence(
    input: &[u8; INPUT],
    begin: usize,
    window: &mut [u8; WINDOW],
    end: usize,
) -> (usize, usize) {
    let other = (begin, end);
    // As the caller looked at already; known here, it serves for most accesses.
    if begin > INPUT - LONGER_SEQUENCE || end >= LIMIT {
        return other;
    }
    let token = input[begin];
    let (mut literals, mut length) = (usize::from(token >> 4), usize::from(token & 15));
    let mut at = begin + 1;
    if literals == MORE {
        literals += usize::from(input[at]);
        at += 1;
        if literals == MORE + 255 {
            return other;
        }
        // Fewer than these the caller copied.
        copy::<32>(input, at, window, end);
        if literals > 32 {
            window[end + 32..end + literals].copy_from_slice(&input[at + 32..at + literals]);
        }
    }
    at += literals;
    let offset = offset(input, at);
    at += 2;
    if length == MORE {
        length += usize::from(input[at]);
        at += 1;
        if length == MORE + 255 {
            return other;
        }
    }
    length += MIN_MATCH;
    let start = end + literals;
    let Some(from) = start.checked_sub(offset) else { return other };
    let mut done = 0;
    if offset >= 32 {
        while done < length {
            repeat::<32>(window, from + done, start + done);
            done += 32;
        }
    } else if offset >= 8 {
        while done < length {
            repeat::<8>(window, from + done, start + done);
            done += 8;
        }
    } else if offset > 0 {
        // Eight bytes of what repeats; as many whole periods as they hold are right for the next eight, too.
        let Some(bytes) = window[from..].first_chunk() else { return other };
        let (period, times, whole) = PERIODS[offset];
        let bytes = (u64::from_le_bytes(*bytes) & period).wrapping_mul(times).to_le_bytes();
        while done < length {
            let to = start + done;
            window[to..to + 8].copy_from_slice(&bytes);
            done += whole;
        }
    } else {
        return other;
    }
    (at, start + length)
}

impl<F: FnMut(u64, &[u8]) -> Result<()>> Unpacker<F> {
    pub fn new(take: F) -> Self {
        let window = vec![0; WINDOW].into_boxed_slice();
        Self { window, end: 0, taken: 0, gone: 0, take }
    }

    /// How much was unpacked so far.
    pub fn done(&self) -> u64 {
        self.gone + self.end as u64
    }

    /// Unpacks a block, to at most `max` bytes, and hands on the last of it.
    pub fn block<R>(&mut self, packed: &mut Packed<R>, max: u64) -> Result<(), Fault>
    where
        R: FnMut(u64, &mut [u8]) -> Result<()>,
    {
        let max = self.done() + max;
        let room = |done: u64, wanted: usize| match max.checked_sub(done) {
            Some(room) if room >= wanted as u64 => Ok(()),
            _ => Err(Fault::Damaged("it unpacks to too much")),
        };
        loop {
            packed.refill()?;
            self.short_sequences(packed);
            let token = packed.byte("it ends within a sequence")?;
            let mut literals = packed.length(token >> 4)?;
            room(self.done(), literals)?;
            while literals > 0 {
                let bytes = packed.some(literals, "it ends within literals")?;
                literals -= bytes.len();
                self.put(bytes)?;
            }
            // A block ends with literals.
            if packed.is_empty() {
                return Ok(self.hand_on(0)?);
            }
            let offset = [packed.byte("it ends within an offset")?, packed.byte("it ends within an offset")?];
            let length = packed.length(token & 15)? + MIN_MATCH;
            room(self.done(), length)?;
            self.repeat(usize::from(u16::from_le_bytes(offset)), length)?;
        }
    }

    /// The common case: all but the last sequence of a block, and very long ones.
    fn short_sequences<R>(&mut self, packed: &mut Packed<R>) {
        // Of known lengths, so that no access needs a comparison of its own.
        let Some(window) = self.window.first_chunk_mut::<WINDOW>() else { return };
        let Some(input) = packed.buffer.first_chunk::<INPUT>() else { return };
        let Some(last) = packed.here.end.min(INPUT).checked_sub(LONGER_SEQUENCE) else { return };
        (packed.here.start, self.end) = short_sequences(input, packed.here.start, last, window, self.end);
    }

    /// Appends literals.
    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
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
        if offset == 0 || offset > self.end {
            return Err(Fault::Damaged("an offset reaches before its start"));
        }
        while length > 0 {
            if length >= LIMIT
                && self.gone > 0
                && self.window[self.end - offset..self.end].iter().all(|b| *b == 0)
            {
                return Ok(self.leave_out(length)?);
            }
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

    /// Appends so many zeroes, without handing them on; the window needs only what a match may reach.
    fn leave_out(&mut self, length: usize) -> Result<()> {
        self.hand_on(0)?;
        self.window[..HISTORY].fill(0);
        self.gone += (length - HISTORY) as u64;
        (self.end, self.taken) = (HISTORY, HISTORY);
        Ok(())
    }

    /// How many of `wanted` bytes fit, at least one; hands on a piece to make room.
    fn room(&mut self, wanted: usize) -> Result<usize> {
        if self.end >= LIMIT {
            self.hand_on(HISTORY)?;
        }
        Ok(wanted.min(LIMIT - self.end))
    }

    /// Hands on what is there, and keeps the last `kept` bytes for matches to come.
    fn hand_on(&mut self, kept: usize) -> Result<()> {
        if self.taken < self.end {
            (self.take)(self.gone + self.taken as u64, &self.window[self.taken..self.end])?;
        }
        let gone = self.end - kept;
        for at in (0..kept).step_by(COPY) {
            self.window.copy_within(gone + at..gone + at + COPY, at);
        }
        self.gone += gone as u64;
        (self.end, self.taken) = (kept, kept);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpack(blocks: &[&[u8]]) -> Result<Vec<u8>, Fault> {
        let mut out = Vec::new();
        let mut unpacker = Unpacker::new(|at, piece: &[u8]| {
            assert!(at >= out.len() as u64);
            out.resize(at as usize, 0);
            out.extend_from_slice(piece);
            Ok(())
        });
        let input = blocks.concat();
        let mut packed = Packed::new(from(&input));
        let mut at = 0;
        for block in blocks {
            packed.begin(at..at + block.len() as u64);
            unpacker.block(&mut packed, 1 << 30)?;
            at += block.len() as u64;
        }
        let done = unpacker.done() as usize;
        assert!(out.len() <= done);
        out.resize(done, 0);
        Ok(out)
    }

    /// Reads from `input`.
    fn from(input: &[u8]) -> impl FnMut(u64, &mut [u8]) -> Result<()> {
        |at, buffer| {
            buffer.copy_from_slice(&input[at as usize..at as usize + buffer.len()]);
            Ok(())
        }
    }

    /// Unpacks a MiB of zeroes to at most `max` bytes, with this taker.
    fn zeroes(max: u64, take: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<(), Fault> {
        let block = lz4_flex::block::compress(&vec![0; 1 << 20]);
        let mut packed = Packed::new(from(&block));
        packed.begin(0..block.len() as u64);
        Unpacker::new(take).block(&mut packed, max)
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

    /// Megabytes of zeroes pass without being copied, and matches reach back into them.
    #[test]
    fn long_stretches_of_zeroes_are_left_out() {
        let mut seed = 5;
        let noise = text(&mut seed, 700_000);
        let zeroes = vec![0; 3 << 20];
        let all = [&noise[..], &zeroes, &noise, &zeroes, b"the end", &zeroes[..70_000], &noise].concat();
        let block = lz4_flex::block::compress(&all);
        assert!(unpack(&[&block, &block]).unwrap() == [&all[..], &all].concat());
        let mut handed = 0;
        let mut unpacker = Unpacker::new(|_, piece: &[u8]| {
            handed += piece.len();
            Ok(())
        });
        let mut packed = Packed::new(from(&block));
        packed.begin(0..block.len() as u64);
        unpacker.block(&mut packed, 1 << 30).unwrap();
        assert_eq!(unpacker.done(), all.len() as u64);
        assert!(handed < 4 << 20, "{handed} bytes handed on");
    }

    #[test]
    fn a_match_reaches_back_into_what_was_left_out() {
        let more = |length: usize| [vec![255; length / 255], vec![(length % 255) as u8]].concat();
        // Letters, more than the window holds, and a zero; that a million times; a hundred from far back.
        let mut block = [vec![0xff], more(700_001 - MORE), vec![b'a'; 700_000], vec![0, 1, 0]].concat();
        block.extend(more(1_000_000 - MORE - MIN_MATCH));
        block.extend([0x0f, 0x50, 0xc3, 100 - (MORE + MIN_MATCH) as u8, 0x50]);
        block.extend(b"enden");
        let all = [&vec![b'a'; 700_000][..], &vec![0; 1_000_101], b"enden"].concat();
        assert!(unpack(&[&block]).unwrap() == all);
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
        zeroes(1 << 20, |_, _| Ok(())).unwrap();
        assert!(matches!(zeroes((1 << 20) - 1, |_, _| Ok(())), Err(Fault::Damaged(_))));
    }

    #[test]
    fn an_error_of_whoever_gives_or_takes_ends_it() {
        let full = || Err(Error::new(crate::ErrorKind::Os, "full"));
        assert!(matches!(zeroes(1 << 30, |_, _| full()), Err(Fault::Caller(_))));
        let mut packed = Packed::new(|_: u64, _: &mut [u8]| full());
        packed.begin(0..1);
        assert!(matches!(Unpacker::new(|_, _: &[u8]| Ok(())).block(&mut packed, 9), Err(Fault::Caller(_))));
    }
}
