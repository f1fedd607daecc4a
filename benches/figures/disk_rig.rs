//! A disk's device and a driver of it in this process, for figures.

use std::error::Error;
use std::os::fd::AsRawFd;
use std::time::Instant;

use vmbed::internals::driver::{NEXT, Registers, Rings, VERSION_1, WRITE};
use vmbed::internals::{Board, Part};

pub const SIZE: u64 = 64 << 20;
const FLUSH: u64 = 1 << 9;
pub const RINGS: u64 = 1 << 20;
pub const HEADERS: u64 = 2 << 20;
pub const DATA: u64 = 4 << 20;
const ENTRIES: u16 = 128;

pub type Done<T> = Result<T, Box<dyn Error>>;

/// Offsets that look random, the same each time.
pub struct Offsets {
    state: u64,
    block: u64,
    sequential: bool,
}

impl Offsets {
    pub fn next(&mut self) -> u64 {
        if self.sequential {
            self.state += self.block;
            return self.state % SIZE;
        }
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % (SIZE / self.block) * self.block
    }
}

/// What is read: how much at a time, how many at once, in what order.
#[derive(Clone, Copy)]
pub struct Load {
    pub block: u64,
    pub depth: u16,
    pub sequential: bool,
    pub count: u32,
}

impl Load {
    pub fn offsets(self) -> Offsets {
        let state = if self.sequential { 0 } else { 0x9e37_79b9_7f4a_7c15 };
        Offsets { state, block: self.block, sequential: self.sequential }
    }
}

/// A disk and a driver that has its requests laid out beforehand.
pub struct Rig {
    pub board: Board,
    regs: Registers,
    pub rings: Rings,
    /// Where table, available ring, used ring and headers are in this process.
    places: [*mut u8; 4],
    /// Somebody else serves it.
    threaded: bool,
    offered: u16,
    taken: u16,
}

impl Rig {
    pub fn new(part: Part) -> Done<Self> {
        let threaded = matches!(part, Part::Threaded(_));
        let board = Board::new(32 << 20, vec![part])?;
        let regs = Registers::find(&board, 1).ok_or("no disk")?;
        let rings = Rings::new(&board, RINGS, ENTRIES);
        if !regs.start(&board, VERSION_1 | FLUSH, &[&rings]) {
            return Err("the disk did not start".into());
        }
        let places = [std::ptr::null_mut(); 4];
        let mut rig = Self { board, regs, rings, places, offered: 0, taken: 0, threaded };
        rig.places = [rig.rings.desc, rig.rings.avail, rig.rings.used, HEADERS].map(|at| rig.at(at));
        Ok(rig)
    }

    /// Guest memory there, as a driver in the guest has it.
    pub fn at<T>(&self, address: u64) -> *mut T {
        self.board.host_address(address, 8).expect("it is memory").cast()
    }

    /// Offers the request in that slot again, for another place.
    fn put(&mut self, slot: u16, offset: u64) {
        let [_, avail, _, headers] = self.places;
        // SAFETY: aligned places in the rings and headers, which lie in guest memory for as long as the board lives; the
        // device, which is on this thread, reads them later.
        unsafe {
            headers.add(usize::from(slot) * 32 + 8).cast::<u64>().write_volatile(offset / 512);
            let ring = avail.cast::<u16>();
            ring.add(2 + usize::from(self.offered % ENTRIES)).write_volatile(3 * slot);
            self.offered = self.offered.wrapping_add(1);
            ring.add(1).write_volatile(self.offered);
        }
    }

    /// The next slot that the device is done with.
    fn take(&mut self) -> Option<u16> {
        let used = self.places[2];
        // SAFETY: as above.
        unsafe {
            if used.cast::<u16>().add(1).read_volatile() == self.taken {
                return None;
            }
            let element = used.add(4 + 8 * usize::from(self.taken % ENTRIES)).cast::<u32>();
            self.taken = self.taken.wrapping_add(1);
            Some((element.read_volatile() / 3) as u16)
        }
    }

    /// Nanoseconds for all of it.
    pub fn run(&mut self, load: Load) -> Done<u128> {
        let mut offsets = load.offsets();
        for slot in 0..load.depth {
            let (header, data) = (HEADERS + 32 * u64::from(slot), DATA + load.block * u64::from(slot));
            self.board.write_memory(header, &[0; 32])?;
            let chain =
                [(header, 16, NEXT), (data, load.block as u32, NEXT | WRITE), (header + 16, 1, WRITE)];
            for (i, buffer) in chain.into_iter().enumerate() {
                let index = 3 * slot + i as u16;
                self.rings.descriptor(&self.board, RINGS, index, buffer, index + 1);
            }
        }
        let interrupt = self.board.interrupt(1, 1)?;
        if self.threaded {
            // SAFETY: integers only. Whoever runs this ends it should it wait for ever.
            unsafe { libc::fcntl(interrupt.as_raw_fd(), libc::F_SETFL, 0) };
        }
        let begin = Instant::now();
        let (mut sent, mut ended) = (0, 0);
        for slot in 0..load.depth {
            self.put(slot, offsets.next());
            sent += 1;
        }
        self.regs.ring(&self.board, 0);
        while ended < load.count {
            if self.threaded {
                interrupt.read()?;
            } else {
                self.board.process_all();
            }
            while let Some(slot) = self.take() {
                ended += 1;
                if sent < load.count {
                    self.put(slot, offsets.next());
                    sent += 1;
                    if self.threaded {
                        self.regs.ring(&self.board, 0);
                    }
                }
            }
        }
        let time = begin.elapsed().as_nanos();
        let mut status = [9];
        self.board.read_memory(HEADERS + 16, &mut status)?;
        if status != [0] { Err("a read failed".into()) } else { Ok(time) }
    }
}
