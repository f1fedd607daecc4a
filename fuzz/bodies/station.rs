//! A guest with a card on a port of a switch, for `landing.rs`: its driver knows which buffers it has given, and what was sent to it.

use std::collections::VecDeque;

use arbitrary::{Result, Unstructured};
use vmbed::internals::driver::status::NEEDS_RESET;
use vmbed::internals::driver::{
    Buffer, EVENT_IDX, INDIRECT, INDIRECT_DESC, NEXT, Registers, Rings, VERSION_1, WRITE,
};
use vmbed::internals::{Board, Part};
use vmbed::{PortOptions, SwitchPort};

use super::numbered::{Came, number};
use crate::bent::{Faults, MEMORY, bend, break_rings, side, total};

const TABLES: u64 = 0x4000;
const COMMAND: u64 = 0x8000;
const FRAME: u64 = 0x1_0000;
/// Where each buffer is: so many bytes for one, and so many of them.
const BUFFERS: u64 = 0x3_0000;
const ROOM: u64 = 0x1400;
const SLOTS: usize = 21;
/// Descriptors of each buffer.
const PIECES: u16 = 3;
const RX: u64 = 0x8_0000;
const TX: u64 = 0x9_0000;
const COMMANDS: u64 = 0xa_0000;
/// Memory that is never given, and what is in it.
const NOBODYS: u64 = 0xc_0000;
static CANARY: [u8; 0x1_0000] = [0xc5; 0x1_0000];
const MRG_RXBUF: u64 = 1 << 15;
const CONTROL: u64 = 1 << 17 | 1 << 18;
/// CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4.
const SEGMENTS: u64 = 1 | 1 << 1 | 1 << 7 | 1 << 11;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Manners {
    Polite,
    Rude,
}

pub struct Station {
    pub board: Board,
    pub regs: Registers,
    pub port: SwitchPort,
    rx: Rings,
    tx: Rings,
    commands: Rings,
    features: u64,
    /// The pieces of each buffer that the card has.
    given: [Option<Vec<Buffer>>; SLOTS],
    /// Frames that may come, without headers.
    expected: VecDeque<Vec<u8>>,
    /// Only frames to the card's own address, or to all, are wanted.
    picky: bool,
    manners: Manners,
    /// It was rude once.
    has_past: bool,
    /// Buffers that came back empty: without room for a header, and others that hold no frame.
    pub short: u32,
    pub useless: u32,
    pub faults: Faults,
}

impl Station {
    pub fn new(index: u8, port: SwitchPort, manners: Manners) -> Self {
        let board = Board::new(MEMORY, vec![Part::Port(port.clone())]).unwrap();
        board.write_memory(NOBODYS, &CANARY).unwrap();
        let regs = Registers::find(&board, 1).unwrap();
        let [rx, tx, commands] =
            [(RX, 64), (TX, 16), (COMMANDS, 16)].map(|(at, n)| Rings::new(&board, at, n));
        let has_past = manners == Manners::Rude;
        let mut station = Self {
            board,
            regs,
            port,
            rx,
            tx,
            commands,
            features: 0,
            given: Default::default(),
            expected: VecDeque::new(),
            picky: false,
            manners,
            has_past,
            short: 0,
            useless: 0,
            faults: Faults::default(),
        };
        station.start(4 | index);
        station
    }

    /// From a reset on, with what `choice` says.
    pub fn start(&mut self, choice: u8) {
        let [rx, tx, commands] =
            [(RX, 64), (TX, 16), (COMMANDS, 16)].map(|(at, n)| Rings::new(&self.board, at, n));
        (self.rx, self.tx, self.commands) = (rx, tx, commands);
        self.given = Default::default();
        let bits = [EVENT_IDX, INDIRECT_DESC, MRG_RXBUF, SEGMENTS];
        let chosen = bits.iter().enumerate().filter(|(bit, _)| choice >> bit & 1 == 1);
        self.features = chosen.fold(VERSION_1 | CONTROL, |all, (_, feature)| all | feature);
        let rings = [&self.rx, &self.tx, &self.commands];
        assert!(self.regs.start(&self.board, self.features, &rings));
        // A new driver finds the card as it is at first.
        self.picky = false;
        self.board.process_all();
    }

    pub fn is_polite(&self) -> bool {
        self.manners == Manners::Polite
    }

    /// It never was rude: what it sends is what it was told to send, and nothing else writes to its memory.
    pub fn is_trusted(&self) -> bool {
        !self.has_past
    }

    /// It keeps to the rules from now on.
    pub fn reform(&mut self) {
        self.manners = Manners::Polite;
    }

    pub fn has_failed(&mut self) -> bool {
        self.faults.add(&self.board);
        self.regs.status(&self.board) & (NEEDS_RESET | 4) != 4
    }

    pub fn leaves_segments(&self) -> bool {
        self.features & SEGMENTS != 0
    }

    /// Gives another buffer, in pieces; `false` where the card has them all.
    pub fn give(&mut self, u: &mut Unstructured<'_>) -> Result<bool> {
        let Some(slot) = self.given.iter().position(Option::is_none) else { return Ok(false) };
        let (mut chain, mut at) = (Vec::new(), BUFFERS + ROOM * slot as u64);
        for _ in 0..u.int_in_range(1..=PIECES)? {
            let length = *u.choose(&[1, 12, 40, 300, 1526, 1526, 1600, 1600])?;
            chain.push((at, length, WRITE));
            at += u64::from(length);
        }
        if !self.is_polite() && u.ratio(1u8, 4u8)? {
            bend(&mut chain, u)?;
            chain.truncate(PIECES.into());
        }
        let table = self.features & INDIRECT_DESC != 0 && u.ratio(1u8, 3u8)?;
        self.put(slot, chain, table);
        Ok(true)
    }

    /// The same in one piece, with room for most frames.
    pub fn give_whole(&mut self) -> bool {
        let Some(slot) = self.given.iter().position(Option::is_none) else { return false };
        self.put(slot, vec![(BUFFERS + ROOM * slot as u64, ROOM as u32, WRITE)], false);
        true
    }

    fn put(&mut self, slot: usize, chain: Vec<Buffer>, table: bool) {
        let head = PIECES * slot as u16;
        let own = TABLES + 0x100 * slot as u64;
        let (at, first) = if table { (own, 0) } else { (self.rx.desc, head) };
        for (index, &(address, length, flags)) in (first..).zip(&chain) {
            let more = usize::from(index - first) + 1 < chain.len();
            let flags = if more { flags | NEXT } else { flags };
            self.rx.descriptor(&self.board, at, index, (address, length, flags), index + 1);
        }
        if table {
            let whole = (own, 16 * chain.len() as u32, INDIRECT);
            self.rx.descriptor(&self.board, self.rx.desc, head, whole, 0);
        }
        self.rx.offer(&self.board, head);
        self.given[slot] = Some(chain);
    }

    /// Says that there are more.
    pub fn kick(&self) {
        self.regs.ring(&self.board, 0);
        self.board.process();
    }

    /// That frame may come here.
    pub fn expect(&mut self, frame: &[u8]) {
        self.expected.push_back(frame[12..].to_vec());
    }

    /// The card sends that frame, from one to three pieces.
    pub fn send(&mut self, frame: &[u8], u: &mut Unstructured<'_>) -> Result<()> {
        self.board.write_memory(FRAME, frame).unwrap();
        let (mut chain, mut at) = (Vec::new(), 0);
        for _ in 0..u.int_in_range(0..=2)? {
            let left = frame.len() - at - 1;
            let length = u.int_in_range(left.min(1)..=left.min(2000))?;
            chain.push((FRAME + at as u64, length as u32, 0));
            at += length;
        }
        chain.push((FRAME + at as u64, (frame.len() - at) as u32, 0));
        if !self.is_polite() && u.ratio(1u8, 8u8)? {
            bend(&mut chain, u)?;
        }
        self.tx.send(&self.board, &chain);
        self.regs.ring(&self.board, 1);
        self.board.process();
        for _ in 0..self.tx.size {
            self.tx.take_used(&self.board);
        }
        Ok(())
    }

    /// Whether the frame of that number lies in a buffer that the driver has not got back.
    pub fn has(&self, wanted: u32) -> bool {
        self.given.iter().flatten().any(|chain| {
            let mut start = Vec::new();
            for &(address, length, _) in chain {
                let mut piece = vec![0; (length as usize).min(100)];
                if self.board.read_memory(address, &mut piece).is_err() {
                    return false;
                }
                start.extend(piece);
                if start.len() > 100 {
                    break;
                }
            }
            let mut frame = start.split_off(start.len().min(12));
            if frame.len() >= 16 && frame[12..14] == [0x81, 0] {
                frame.drain(12..16);
            }
            number(&frame) == Some(wanted)
        })
    }

    /// Whether its driver has said that it does not want such a frame.
    pub fn is_unwanted(&self, frame: &[u8]) -> bool {
        self.picky && frame[12] & 1 == 0
    }

    /// The next frame that the driver is handed. (A rude guest's ring may have no end.)
    pub fn take(&mut self) -> Option<Came> {
        for _ in 0..self.rx.size {
            let (mut bytes, buffers) = self.buffer()?;
            // A buffer that comes back empty.
            if bytes.is_empty() {
                continue;
            }
            for _ in 1..buffers {
                let more = self.buffer();
                assert!(more.is_some() || !self.is_polite(), "all of a frame's buffers at once");
                bytes.extend(more?.0);
            }
            assert!(bytes.len() >= 12 + 14 || self.has_past, "{} bytes", bytes.len());
            let gso = bytes.get(1).copied().unwrap_or(0);
            let bytes = bytes.split_off(bytes.len().min(12));
            return Some(Came { bytes, buffers, gso });
        }
        None
    }

    /// A buffer that is the driver's again: what was put into it, and how many the header says that there are.
    fn buffer(&mut self) -> Option<(Vec<u8>, u16)> {
        let (head, length) = self.rx.take_used(&self.board)?;
        let slot = self.given.get_mut(usize::from(head / PIECES)).and_then(Option::take);
        assert!(slot.is_some() || !self.is_polite(), "buffer {head} was not given");
        if let (Some(chain), 0) = (&slot, length) {
            let is_short = total(&side(chain, false)) == 0 && total(&side(chain, true)) < 12;
            *(if is_short { &mut self.short } else { &mut self.useless }) += 1;
        }
        let (mut bytes, mut left) = (Vec::new(), length as usize);
        for (address, length, _) in slot.unwrap_or_default() {
            let mut piece = vec![0; left.min(length as usize).min(MEMORY as usize)];
            left -= piece.len();
            if self.board.read_memory(address, &mut piece).is_ok() {
                bytes.extend(piece);
            }
        }
        assert!(left == 0 || !self.is_polite(), "more than there is room for");
        let count = bytes.get(10..12).map_or(1, |n| u16::from_le_bytes([n[0], n[1]]));
        // A rude guest's header is anything.
        Some((bytes, count.min(self.rx.size)))
    }

    /// That frame was sent here, after those that came before. Others may have been dropped for want of room.
    pub fn was_sent(&mut self, frame: &[u8]) {
        let at = self.expected.iter().position(|expected| expected == frame);
        let Some(at) = at else {
            panic!("{} bytes that were not sent, or not now: {:x?}", frame.len(), &frame[..22])
        };
        self.expected.drain(..=at);
    }

    /// Wants all frames, or those that are meant for it.
    pub fn filter(&mut self, picky: bool) {
        self.board.write_memory(COMMAND, &[0, 0, u8::from(!picky), 0xff]).unwrap();
        self.commands.send(&self.board, &[(COMMAND, 3, 0), (COMMAND + 3, 1, WRITE)]);
        self.regs.ring(&self.board, 2);
        self.board.process();
        let done = self.commands.take_used(&self.board).is_some();
        assert!(done || !self.is_polite(), "the command was not obeyed");
        self.picky = picky;
    }

    /// Its port has other options.
    pub fn tell(&self, u: &mut Unstructured<'_>) -> Result<()> {
        let options = match u.int_in_range(0..=5u8)? {
            0 => PortOptions::access(2),
            1 | 2 => PortOptions::trunk([1]),
            _ => PortOptions::access(1),
        };
        self.port.set_options(&options).unwrap();
        Ok(())
    }

    /// A rude guest.
    pub fn breaks(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        break_rings(&self.board, &mut self.rx, u)?;
        self.kick();
        Ok(())
    }

    /// A guest that has kept to the rules has its memory as it was, but for its buffers.
    pub fn is_untouched(&self) {
        let mut bytes = vec![0; CANARY.len()];
        self.board.read_memory(NOBODYS, &mut bytes).unwrap();
        assert!(bytes == CANARY || self.has_past, "memory was changed that was not given");
    }
}
