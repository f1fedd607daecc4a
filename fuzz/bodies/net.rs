//! A network card, its driver, and what comes over the cable: good frames, of which some are bent.

use arbitrary::{Result, Unstructured};
use vmbed::internals::driver::status::NEEDS_RESET;
use vmbed::internals::driver::{EVENT_IDX, INDIRECT_DESC, Registers, Rings, VERSION_1, WRITE};
use vmbed::internals::{Board, Part};

use super::bent::{MEMORY, bend, break_rings, collect, indirect};

const RX: u64 = 0x8_0000;
const TX: u64 = 0x9_0000;
const TABLE: u64 = 0x4000;
const BUFFERS: u64 = 0x1_0000;
const FRAME: u64 = 0x2_0000;
const MRG_RXBUF: u64 = 1 << 15;
const STEPS: usize = 64;

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Chains that the device has filled.
    pub received: u32,
    /// Frames that it has put on the cable.
    pub sent: u32,
    /// Chains of the sending queue that it has taken.
    pub taken: u32,
    /// How often it gave up until the reset.
    pub resets: u32,
}

impl Depth {
    /// What a campaign sums up.
    #[allow(dead_code, reason = "a replay looks at the fields")]
    pub fn counters(&self) -> [(&'static str, u64); 4] {
        [
            ("received", self.received.into()),
            ("sent", self.sent.into()),
            ("taken", self.taken.into()),
            ("resets", self.resets.into()),
        ]
    }
}

struct Guest {
    board: Board,
    regs: Registers,
    rx: Rings,
    tx: Rings,
    depth: Depth,
}

/// Runs one input. Panics where the device misbehaves.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let board = Board::new(MEMORY, vec![Part::Net]).unwrap();
    let regs = Registers::find(&board, 1).unwrap();
    let (rx, tx) = (Rings::new(&board, RX, 16), Rings::new(&board, TX, 16));
    let mut guest = Guest { board, regs, rx, tx, depth: Depth::default() };
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
    guest.cable(&[0xab; 100]);
    guest.board.process_all();
    assert_eq!(guest.rx.take_used(&guest.board), Some((head, 112)), "and receives");
    guest.depth
}

fn features(choice: u8) -> u64 {
    [(1, EVENT_IDX), (2, INDIRECT_DESC), (4, MRG_RXBUF)]
        .iter()
        .filter(|(bit, _)| choice & bit != 0)
        .fold(VERSION_1, |all, (_, feature)| all | feature)
}

impl Guest {
    fn restart(&mut self, features: u64) {
        self.rx = Rings::new(&self.board, RX, 16);
        self.tx = Rings::new(&self.board, TX, 16);
        assert!(self.regs.start(&self.board, features, &[&self.rx, &self.tx]));
        self.board.process();
        // What waits on the cable was for the driver before.
        self.board.process_all();
    }

    /// Something arrives.
    fn cable(&self, frame: &[u8]) {
        // A cable that is full loses it, as they do.
        let _ = self.board.network().unwrap().send(&[&[0; 12], frame].concat());
    }

    /// Takes what the device has put on the cable; how many frames.
    fn drain(&mut self) -> u32 {
        let (mut frame, mut count) = (vec![0; 1 << 17], 0);
        while let Ok(len) = self.board.network().unwrap().recv(&mut frame) {
            assert!(len >= 12, "each has its header");
            assert_eq!(frame[..10], [0; 10], "no offload is negotiated");
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
        let rings = if incoming { &mut self.rx } else { &mut self.tx };
        if !incoming {
            // A header that asks for nothing, mostly.
            let mut header = [0; 12];
            if u.ratio(1u8, 6u8)? {
                header = u.arbitrary()?;
            }
            self.board.write_memory(FRAME, &header).unwrap();
        }
        let head = if table {
            indirect(&self.board, rings, TABLE, &chain, u)?
        } else {
            rings.chain(&self.board, &chain)
        };
        rings.offer(&self.board, head);
        if u.ratio(1u8, 12u8)? {
            break_rings(&self.board, rings, u)?;
        }
        self.regs.ring(&self.board, u16::from(!incoming));
        if u.ratio(1u8, 2u8)? {
            self.cable(&vec![0x5a; u.int_in_range(0..=3000)?]);
        }
        if u.ratio(3u8, 4u8)? {
            self.board.process();
            self.board.process_all();
        }
        self.depth.received += collect(&self.board, &mut self.rx);
        self.depth.taken += collect(&self.board, &mut self.tx);
        self.drain();
        match u.arbitrary::<u8>()? {
            0..8 => {
                self.board.pause();
                self.board.resume();
            }
            8..16 => self.restart(features(u.arbitrary()?)),
            16..20 => self.regs.set(&self.board, u.int_in_range(0..=0x40)?, 2, u.arbitrary()?),
            _ => {}
        }
        if self.regs.status(&self.board) & (NEEDS_RESET | 4) != 4 {
            self.depth.resets += 1;
            self.restart(features(u.arbitrary()?));
        }
        Ok(())
    }
}
