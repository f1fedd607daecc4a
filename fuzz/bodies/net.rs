//! A network card, its driver, and what comes over the cable: good frames, of which some are bent.

use arbitrary::{Result, Unstructured};
use vmbed::NetStatistics;
use vmbed::internals::driver::status::NEEDS_RESET;
use vmbed::internals::driver::{EVENT_IDX, INDIRECT_DESC, Registers, Rings, VERSION_1, WRITE};
use vmbed::internals::{Board, Part};

use super::bent::{
    Faults, MEMORY, bend, break_rings, collect, content, indirect, is_plain, lengths, reaches, side, total,
};

const RX: u64 = 0x8_0000;
const TX: u64 = 0x9_0000;
const TABLE: u64 = 0x4000;
const BUFFERS: u64 = 0x1_0000;
const FRAME: u64 = 0x2_0000;
const MRG_RXBUF: u64 = 1 << 15;
/// CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4.
const LEFT_TO_DO: u64 = 1 | 1 << 1 | 1 << 7 | 1 << 11;
const STEPS: usize = 64;

/// What became of a chain that was sent, or given for frames, and of a frame that came.
const FATES: [&str; 17] = [
    "went",
    // With something left to do.
    "left",
    // Not sent: cut off within the header; the header asks for what was not negotiated, or for nonsense; too short, and too long, for
    // a frame; something to write; outside of memory.
    "no_header",
    "asks",
    "nonsense",
    "runt",
    "giant",
    "to_write",
    "outside",
    // Buffers that go back empty: something to read, no room for a header, outside of memory.
    "to_read",
    "small",
    "nowhere",
    // Frames that came: into a buffer, the same with something left to do, dropped for leaving nonsense to do, for being no frame, for
    // being longer than the buffer.
    "landed",
    "left_to_me",
    "no_sense",
    "no_frame",
    "too_long",
];
const MIN_FRAME: u64 = 14;
const MAX_FRAME: u64 = 65_535 + MIN_FRAME + 8;

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Chains that the device has filled.
    pub received: u32,
    /// Frames that it has put on the cable.
    pub sent: u32,
    /// Of them, those that left something to do.
    pub passed: u32,
    /// Chains of the sending queue that it has taken.
    pub taken: u32,
    /// Those of which it is known what was to become of them, as [`FATES`].
    pub fates: [u32; FATES.len()],
    /// How often it gave up until the reset, and what it said then.
    pub resets: u32,
    pub faults: Faults,
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("received", self.received.into()),
            ("sent", self.sent.into()),
            ("passed", self.passed.into()),
            ("taken", self.taken.into()),
            ("resets", self.resets.into()),
        ];
        all.extend(FATES.into_iter().zip(self.fates.map(u64::from)));
        all.extend(self.faults.counters(&[]));
        all
    }

    fn met(&mut self, fate: &str) {
        self.fates[FATES.iter().position(|known| *known == fate).unwrap()] += 1;
    }
}

struct Guest {
    board: Board,
    regs: Registers,
    rx: Rings,
    tx: Rings,
    /// Chains of each queue that wait, and frames on the cable.
    waiting: [u32; 2],
    coming: u64,
    /// Nothing was done to the rings that no driver does.
    sound: bool,
    features: u64,
    depth: Depth,
}

/// Runs one input. Panics where the device misbehaves.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let board = Board::new(MEMORY, vec![Part::Net]).unwrap();
    let regs = Registers::find(&board, 1).unwrap();
    let (rx, tx) = (Rings::new(&board, RX, 16), Rings::new(&board, TX, 16));
    let depth = Depth::default();
    let mut guest =
        Guest { board, regs, rx, tx, waiting: [0; 2], coming: 0, sound: true, features: 0, depth };
    let choice = u.arbitrary::<u8>().unwrap_or(0);
    guest.restart(features(choice));
    for _ in 0..STEPS {
        if u.is_empty() || guest.step(&mut u).is_err() {
            break;
        }
    }
    // Whatever happened: after a reset a frame goes out and one comes in.
    guest.restart(VERSION_1);
    guest.drain();
    guest.send(&[(FRAME, 12 + 60, 0)]);
    assert_eq!(guest.drain(), 1, "after a reset it sends");
    let head = guest.empty_cable();
    guest.cable(&[0; 12], &[0xab; 100]);
    guest.board.process_all();
    assert_eq!(guest.rx.take_used(&guest.board), Some((head, 112)), "and receives");
    guest.depth
}

fn features(choice: u8) -> u64 {
    [(1, EVENT_IDX), (2, INDIRECT_DESC), (4, MRG_RXBUF), (8, LEFT_TO_DO)]
        .iter()
        .filter(|(bit, _)| choice & bit != 0)
        .fold(VERSION_1, |all, (_, feature)| all | feature)
}

/// What a header leaves to do on a frame of so many bytes, where checksums and segments of TCP over IPv4 may be left.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leaves {
    Nothing,
    Something,
    Nonsense,
}

fn leaves(header: &[u8], length: u64) -> Leaves {
    let word = |at: usize| u64::from(header[at]) + (u64::from(header[at + 1]) << 8);
    let fits = word(6) + word(8) + 2 <= length;
    match (header[0] & 1, header[1]) {
        (0, 0) => Leaves::Nothing,
        (1, 0) if fits => Leaves::Something,
        (1, 1) if fits && word(4) > 0 => Leaves::Something,
        _ => Leaves::Nonsense,
    }
}

/// Headers that leave something to do, near and at the ends of frames.
fn left(u: &mut Unstructured<'_>) -> Result<[u8; 12]> {
    let mut header = [1, u.int_in_range(0..=2)?, 54, 0, u.arbitrary()?, 0, 0, 0, 16, 0, 0, 0];
    let start = *u.choose(&[34, 40, 60, 100, 1000, 4000, 0xffff])?;
    header[6..8].copy_from_slice(&u16::to_le_bytes(start));
    if u.ratio(1u8, 4u8)? {
        header[8..10].copy_from_slice(&u.arbitrary::<[u8; 2]>()?);
    }
    Ok(header)
}

impl Guest {
    fn restart(&mut self, features: u64) {
        // First: until then a device may give back what it has.
        self.regs.set_status(&self.board, 0);
        self.rx = Rings::new(&self.board, RX, 16);
        self.tx = Rings::new(&self.board, TX, 16);
        (self.waiting, self.sound, self.features) = ([0; 2], true, features);
        assert!(self.regs.start(&self.board, features, &[&self.rx, &self.tx]));
        self.board.process();
        // What waits on the cable was for the driver before.
        self.board.process_all();
    }

    fn leaves_something(&self) -> bool {
        self.features & LEFT_TO_DO != 0
    }

    /// Something arrives.
    fn cable(&mut self, header: &[u8; 12], frame: &[u8]) {
        // A cable that is full loses it, as they do.
        self.coming += u64::from(self.board.network().unwrap().send(&[header, frame].concat()).is_ok());
    }

    /// Takes what the device has put on the cable; how many frames.
    fn drain(&mut self) -> u32 {
        let (mut frame, mut count) = (vec![0; 1 << 17], 0);
        while let Ok(len) = self.board.network().unwrap().recv(&mut frame) {
            assert!(len >= 12, "each has its header");
            match leaves(&frame, len as u64 - 12) {
                // Of what was sent before a reset, too.
                Leaves::Something => self.depth.passed += 1,
                _ => assert_eq!(frame[..12], [0; 12], "nothing is left to do"),
            }
            count += 1;
        }
        self.depth.sent += count;
        count
    }

    /// Receives what waits, until a buffer is left over: its head.
    fn empty_cable(&mut self) -> u16 {
        for _ in 0..1000 {
            let head = self.rx.send(&self.board, &[(BUFFERS, 4096, WRITE)]);
            self.regs.ring(&self.board, 0);
            self.board.process_all();
            if self.rx.take_used(&self.board).is_none() {
                return head;
            }
        }
        panic!("more frames than a cable holds");
    }

    fn send(&mut self, chain: &[(u64, u32, u16)]) {
        self.board.write_memory(FRAME, &[0; 12]).unwrap();
        self.tx.send(&self.board, chain);
        self.regs.ring(&self.board, 1);
        self.board.process();
        self.depth.taken += collect(&self.board, &mut self.tx);
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let incoming = u.arbitrary::<bool>()?;
        let mut chain = Vec::new();
        for i in 0..u.int_in_range(1..=3u64)? {
            let (base, flags) = if incoming { (BUFFERS, WRITE) } else { (FRAME, 0) };
            chain.push((base + 0x1000 * i, u.int_in_range(1..=0x1000)?, flags));
        }
        if u.ratio(1u8, 3u8)? {
            bend(&mut chain, u)?;
        }
        let table = u.ratio(1u8, 4u8)?;
        if !incoming {
            // A header that asks for nothing, mostly.
            let mut header = [0; 12];
            if u.ratio(1u8, 6u8)? {
                header = u.arbitrary()?;
            } else if self.leaves_something() && u.ratio(1u8, 2u8)? {
                header = left(u)?;
            }
            self.board.write_memory(FRAME, &header).unwrap();
        }
        let rings = if incoming { &mut self.rx } else { &mut self.tx };
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
        let queue = usize::from(!incoming);
        let known = self.sound && !table && self.waiting[queue] == 0 && is_plain(&chain);
        self.waiting[queue] += 1;
        let fate = if known { self.fate(&chain, incoming) } else { None };
        let writable = side(&chain, true);
        self.sound &= !reaches(&writable, RX, 0x4000) && !reaches(&writable, TX, 0x4000);
        self.regs.ring(&self.board, queue as u16);
        let arrives = if u.ratio(1u8, 2u8)? { Some(u.int_in_range(0..=3000)?) } else { None };
        let alone = self.is_empty();
        let mut header = [0; 12];
        if let Some(length) = arrives {
            if self.leaves_something() && u.ratio(1u8, 2u8)? {
                header = left(u)?;
            }
            self.cable(&header, &vec![0x5a; length]);
        }
        let before = self.board.net_statistics()[0];
        if u.ratio(3u8, 4u8)? {
            self.board.process();
            self.board.process_all();
        }
        self.look(fate, incoming, &before);
        if let (Some(length), true, true) = (arrives, alone, self.is_empty()) {
            let landed = self.board.net_statistics()[0].rx_frames > before.rx_frames;
            let leaves = leaves(&header, length as u64);
            assert!(!landed || leaves != Leaves::Nonsense, "{header:?} of {length}");
            self.depth.met(match landed {
                true if leaves == Leaves::Something => "left_to_me",
                true => "landed",
                false if (length as u64) < MIN_FRAME => "no_frame",
                false if leaves == Leaves::Nonsense => "no_sense",
                false => "too_long",
            });
        }
        self.drain();
        match u.arbitrary::<u8>()? {
            0..8 => {
                self.board.pause();
                self.board.resume();
            }
            8..16 => self.restart(features(u.arbitrary()?)),
            16..20 => {
                self.regs.set(&self.board, u.int_in_range(0..=0x40)?, 2, u.arbitrary()?);
                self.sound = false;
            }
            _ => {}
        }
        if self.regs.status(&self.board) & (NEEDS_RESET | 4) != 4 {
            self.depth.resets += 1;
            self.depth.faults.add(&self.board);
            self.restart(features(u.arbitrary()?));
        }
        Ok(())
    }

    /// Whether every frame that came has been delivered or dropped.
    fn is_empty(&self) -> bool {
        let now = self.board.net_statistics()[0];
        now.rx_frames + now.rx_dropped == self.coming
    }

    /// What is to become of a chain, as [`FATES`]; of a buffer, where it is none.
    fn fate(&self, chain: &[(u64, u32, u16)], incoming: bool) -> Option<&'static str> {
        let (readable, writable) = (side(chain, false), side(chain, true));
        let starts = |buffers: &[(u64, u64)], most: u64| {
            content(&self.board, buffers, 0, total(buffers).min(most)).is_some()
        };
        if incoming {
            return match () {
                () if !readable.is_empty() => Some("to_read"),
                () if total(&writable) < 12 => Some("small"),
                // No frame takes more of it.
                () if !starts(&writable, 12 + MAX_FRAME) => Some("nowhere"),
                () => None,
            };
        }
        let Some(length) = total(&readable).checked_sub(12) else { return Some("no_header") };
        let Some(header) = content(&self.board, &readable, 0, 12) else { return Some("outside") };
        let leaves = leaves(&header, length);
        Some(match () {
            () if leaves != Leaves::Nothing && !self.leaves_something() => "asks",
            () if leaves == Leaves::Nonsense => "nonsense",
            () if length < MIN_FRAME => "runt",
            () if length > MAX_FRAME => "giant",
            () if !writable.is_empty() => "to_write",
            () if !starts(&readable, u64::MAX) => "outside",
            () if leaves == Leaves::Something => "left",
            () => "went",
        })
    }

    /// Looks at what was completed; of a single chain, whether it is what it was to be.
    fn look(&mut self, fate: Option<&'static str>, incoming: bool, before: &NetStatistics) {
        let received = lengths(&self.board, &mut self.rx);
        let taken = collect(&self.board, &mut self.tx);
        self.depth.received += received.len() as u32;
        self.depth.taken += taken;
        let single = |waiting: &mut u32, completed| {
            *waiting = waiting.saturating_sub(completed);
            completed == 1 && *waiting == 0
        };
        let single =
            [single(&mut self.waiting[0], received.len() as u32), single(&mut self.waiting[1], taken)];
        let now = self.board.net_statistics()[0];
        match fate {
            // Of a frame that was kept, no more than it needs.
            Some("nowhere") if single[0] && received[0] != 0 => {}
            Some(fate) if incoming && single[0] => {
                assert_eq!(received[0], 0, "{fate}");
                self.depth.met(fate);
            }
            Some(fate) if !incoming && single[1] => {
                let (frames, dropped) =
                    (now.tx_frames - before.tx_frames, now.tx_dropped - before.tx_dropped);
                let goes = ["went", "left"].contains(&fate);
                assert_eq!((frames, dropped), if goes { (1, 0) } else { (0, 1) }, "{fate}");
                self.depth.met(fate);
            }
            _ => {}
        }
    }
}
