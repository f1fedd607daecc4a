//! The project's table of inputs and faults that have broken VMMs, row by row (`list.rs`; the tests' names carry the rows' numbers).
//!
//! What is in this file is a board without a KVM and its hostile driver, which goes through registers and guest memory only: `rows.rs`,
//! `registers.rs`, `frames.rs`. `driven.rs` has a bare guest do it on a KVM (`../guests/rogue.rs`). `files.rs`, `ends.rs` and `host.rs` have the rows about
//! what is not a device's.
//!
//! Each test shows the defence, that the device (or a VM) works afterwards, and that a second one in this process has not noticed.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vmbed::EventKind;
use vmbed::internals::driver::status::{DRIVER_OK, NEEDS_RESET};
use vmbed::internals::driver::{Buffer, INDIRECT_DESC, Registers, Rings, VERSION_1, WRITE, bytes};
use vmbed::internals::{Board, Part, memory_file};

#[path = "../api/callbacks.rs"]
mod callbacks;
mod driven;
#[path = "../guests/elf.rs"]
mod elf;
mod ends;
mod files;
mod frames;
#[path = "../api/guest.rs"]
mod guest;
#[path = "../guests/mod.rs"]
mod guests;
mod host;
mod list;
mod registers;
#[path = "../guests/rogue.rs"]
mod rogue;
mod rows;

const MEMORY: u64 = 1 << 20;
/// Sectors of the disk.
const SECTORS: u64 = 128;
/// Where the rings of queue 0 lie, and 16 KiB on those of queue 1.
const RINGS: u64 = 0x8_0000;
/// Where requests lie: header, data, status byte.
const HEADER: u64 = 0x1000;
const DATA: u64 = 0x2000;
const STATUS: u64 = 0x7000;
/// Pages that a balloon's driver can do without.
const PAGES: u64 = 0xc_0000;

const IOERR: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Disk,
    Net,
    Rng,
    Console,
    Balloon,
}

const KINDS: [Kind; 5] = [Kind::Disk, Kind::Net, Kind::Rng, Kind::Console, Kind::Balloon];

/// A board with one device, and its driver.
struct Rig {
    kind: Kind,
    board: Board,
    regs: Registers,
    rings: Vec<Rings>,
    disk: File,
    rounds: u8,
}

impl Rig {
    /// Started: the device serves.
    fn new(kind: Kind) -> Self {
        let disk = memory_file(SECTORS * 512).unwrap();
        let part = match kind {
            Kind::Disk => Part::Disk { file: disk.try_clone().unwrap(), readonly: false },
            Kind::Net => Part::Net,
            Kind::Rng => Part::Rng,
            Kind::Console => Part::Console,
            Kind::Balloon => Part::Balloon,
        };
        Self::with(kind, part, disk)
    }

    /// The same with this device; `disk` is the file below it, if it is a disk.
    fn with(kind: Kind, part: Part, disk: File) -> Self {
        let board = Board::new(MEMORY, vec![part]).unwrap();
        let regs = Registers::find(&board, 1).unwrap();
        let mut rig = Self { kind, board, regs, rings: Vec::new(), disk, rounds: 0 };
        rig.restart();
        rig
    }

    /// A reset and the whole way to DRIVER_OK with empty rings.
    fn restart(&mut self) {
        self.restart_with(0);
    }

    /// The same with some of the device's own features more.
    fn restart_with(&mut self, own: u64) {
        self.regs.set_status(&self.board, 0);
        let count = self.regs.get(&self.board, 0x12, 2);
        self.rings = (0..count)
            .map(|i| {
                self.regs.set(&self.board, 0x16, 2, i);
                let size = self.regs.get(&self.board, 0x18, 2) as u16;
                Rings::new(&self.board, RINGS + 0x4000 * i, size)
            })
            .collect();
        let features = (self.regs.offered(&self.board) & !0xffff_ffff) | VERSION_1 | INDIRECT_DESC;
        let features = match self.kind {
            Kind::Net => features | 1 << 15,
            // Everything: it decides which queues there are.
            Kind::Balloon => features | 0x3f,
            _ => features,
        };
        let rings: Vec<_> = self.rings.iter().collect();
        assert!(self.regs.start(&self.board, features | own, &rings), "{:?} does not start", self.kind);
        self.board.process();
        while self.board.raised(1, 0) + self.board.raised(1, 1) + self.board.raised(1, 2) > 0 {}
    }

    /// The queue whose chains the device takes without being given anything by its other end.
    fn victim(&self) -> u16 {
        matches!(self.kind, Kind::Net | Kind::Console).into()
    }

    fn ring(&self) {
        self.regs.ring(&self.board, self.victim());
        self.board.process();
    }

    fn send(&mut self, buffers: &[Buffer]) -> u16 {
        let victim = usize::from(self.victim());
        self.rings[victim].send(&self.board, buffers)
    }

    fn take_used(&mut self) -> Option<(u16, u32)> {
        let victim = usize::from(self.victim());
        self.rings[victim].take_used(&self.board)
    }

    fn status(&self) -> u8 {
        self.regs.status(&self.board)
    }

    fn fill(&self, address: u64, data: &[u8]) {
        self.board.write_memory(address, data).unwrap();
    }

    /// A disk's header.
    fn header(&self, kind: u32, sector: u64) {
        self.fill(HEADER, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    }

    /// A disk request over these data buffers; its status byte.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
        self.header(kind, sector);
        self.fill(STATUS, &[0xff]);
        let chain = [&[(HEADER, 16, 0)], data, &[(STATUS, 1, WRITE)]].concat();
        let head = self.send(&chain);
        self.ring();
        assert_eq!(self.take_used().map(|u| u.0), Some(head), "it is answered");
        bytes::<1>(&self.board, STATUS)[0]
    }

    /// The device does what it is for.
    fn good(&mut self) {
        self.rounds += 1;
        let round = self.rounds;
        match self.kind {
            Kind::Disk => {
                self.fill(DATA, &[round; 4096]);
                assert_eq!(self.request(1, 8, &[(DATA, 4096, 0)]), 0);
                self.fill(DATA, &[0; 4096]);
                assert_eq!(self.request(0, 8, &[(DATA, 1000, WRITE), (DATA + 1000, 3096, WRITE)]), 0);
                assert_eq!(bytes::<4096>(&self.board, DATA), [round; 4096]);
                let mut stored = [0; 4096];
                self.disk.read_exact_at(&mut stored, 4096).unwrap();
                assert_eq!(stored, [round; 4096]);
            }
            Kind::Net => {
                self.fill(DATA, &[&[0; 12][..], &[round; 60]].concat());
                self.complete(&[(DATA, 12, 0), (DATA + 12, 60, 0)], 0);
                let (mut frame, far) = ([0; 100], self.board.network().unwrap());
                while let Ok(length) = far.recv(&mut frame) {
                    assert!(length >= 12);
                }
                assert_eq!(frame[12..72], [round; 60]);
            }
            Kind::Rng => self.complete(&[(DATA, 64, WRITE)], 64),
            Kind::Console => {
                self.fill(DATA, &[round; 7]);
                self.complete(&[(DATA, 7, 0)], 0);
                assert!(self.board.output().ends_with(&[round; 7]));
            }
            Kind::Balloon => {
                self.fill(PAGES, &[round; 4096]);
                self.fill(DATA, &((PAGES >> 12) as u32).to_le_bytes());
                self.complete(&[(DATA, 4, 0)], 0);
                assert_eq!(bytes::<4096>(&self.board, PAGES), [0; 4096], "it was given back");
            }
        }
        assert_eq!(self.status() & NEEDS_RESET, 0);
    }

    fn complete(&mut self, buffers: &[Buffer], written: u32) {
        let head = self.send(buffers);
        self.ring();
        assert_eq!(self.take_used(), Some((head, written)));
    }

    /// The device has asked for a reset, told the embedder, interrupted the driver, and stopped serving.
    /// What it told.
    fn broken(&mut self, why: &str) -> String {
        assert_eq!(self.status() & (NEEDS_RESET | DRIVER_OK), NEEDS_RESET | DRIVER_OK, "{why}");
        assert_eq!(self.board.raised(1, 0), 1, "{why}: the configuration interrupt");
        let event = self.board.events().next_event().unwrap();
        let EventKind::DeviceNeedsReset { why: told, .. } = event.kind else { panic!("{why}: {event:?}") };
        while self.take_used().is_some() {}
        let victim = usize::from(self.victim());
        let good = Rings::new(&self.board, self.rings[victim].desc, self.rings[victim].size);
        self.rings[victim] = good;
        self.send(&[(DATA, 16, 0)]);
        self.ring();
        assert_eq!(self.board.events().next_event(), None, "{why}: it is told once");
        assert_eq!(bytes::<2>(&self.board, self.rings[victim].used + 2), [0; 2], "{why}: nothing is served");
        // A driver cannot clear it but by a reset.
        self.regs.set_status(&self.board, 0xf);
        assert_eq!(self.status() & NEEDS_RESET, NEEDS_RESET, "{why}");
        self.restart();
        self.good();
        told
    }
}

/// A second board, which is silent, so that anything done to it is seen. (What hinders a VM that works is seen by `driven.rs`.)
struct Bystander {
    rig: Rig,
    memory: Vec<u8>,
}

impl Bystander {
    fn new(kind: Kind) -> Self {
        let mut rig = Rig::new(kind);
        rig.good();
        while rig.board.raised(1, 0) + rig.board.raised(1, 1) + rig.board.raised(1, 2) > 0 {}
        let mut memory = vec![0; MEMORY as usize];
        rig.board.read_memory(0, &mut memory).unwrap();
        Self { rig, memory }
    }

    fn undisturbed(mut self) {
        let mut memory = vec![0; MEMORY as usize];
        self.rig.board.read_memory(0, &mut memory).unwrap();
        assert!(memory == self.memory, "its memory has changed");
        assert_eq!((0..3).map(|v| self.rig.board.raised(1, v)).sum::<u64>(), 0, "it was interrupted");
        assert_eq!(self.rig.board.process(), 0, "its doorbell rang");
        assert_eq!(self.rig.board.events().next_event(), None);
        assert!(self.rig.board.stops().is_empty());
        self.rig.good();
    }
}

/// One board for the attack and one that must not notice.
fn attack(kind: Kind, f: impl FnOnce(&mut Rig)) {
    let bystander = Bystander::new(kind);
    let mut rig = Rig::new(kind);
    rig.good();
    rig.board.raised(1, 0);
    f(&mut rig);
    rig.good();
    bystander.undisturbed();
}
