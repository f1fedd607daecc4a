//! What a disk's device costs beside the host's own work. `figure-disk DIRECTORY TURNS` fills a file of 64 MiB there and prints the
//! medians of ratios, each taken in turn within one run:
//!
//! - `depth-1`: time of random reads of 4 KiB through the queue handler (this process's driver, no other thread, synchronous
//!   engine) to that of bare `pread`s;
//! - `depth-32`, `sequential`: IOPS of 4 KiB at depth 32, and of 128 KiB at depth 8, with io_uring, to those of a bare ring;
//! - `qcow2`: IOPS of random reads of 4 KiB that are allocated in a qcow2 image to those of a raw one, synchronous.
#![expect(unsafe_code, reason = "a bare ring is told of memory by its address")]

use std::error::Error;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use io_uring::{IoUring, opcode, types};
use vmbed::internals::driver::{NEXT, Registers, Rings, VERSION_1, WRITE};
use vmbed::internals::{Board, Part};
use vmbed::{Bytes, DiskConfig, DiskEngine, DiskFormat, create_disk};

const SIZE: u64 = 64 << 20;
const FLUSH: u64 = 1 << 9;
const RINGS: u64 = 1 << 20;
const HEADERS: u64 = 2 << 20;
const DATA: u64 = 4 << 20;
const ENTRIES: u16 = 128;

type Done<T> = Result<T, Box<dyn Error>>;

/// Offsets that look random, the same each time.
struct Offsets {
    state: u64,
    block: u64,
    sequential: bool,
}

impl Offsets {
    fn next(&mut self) -> u64 {
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
struct Load {
    block: u64,
    depth: u16,
    sequential: bool,
    count: u32,
}

impl Load {
    fn offsets(self) -> Offsets {
        let state = if self.sequential { 0 } else { 0x9e37_79b9_7f4a_7c15 };
        Offsets { state, block: self.block, sequential: self.sequential }
    }
}

/// A disk and a driver that has its requests laid out beforehand.
struct Rig {
    board: Board,
    regs: Registers,
    rings: Rings,
    /// Where table, available ring, used ring and headers are in this process.
    places: [*mut u8; 4],
    offered: u16,
    taken: u16,
}

impl Rig {
    fn new(config: DiskConfig) -> Done<Self> {
        let board = Board::new(32 << 20, vec![Part::Configured(config)])?;
        let regs = Registers::find(&board, 1).ok_or("no disk")?;
        let rings = Rings::new(&board, RINGS, ENTRIES);
        if !regs.start(&board, VERSION_1 | FLUSH, &[&rings]) {
            return Err("the disk did not start".into());
        }
        let places = [std::ptr::null_mut(); 4];
        let mut rig = Self { board, regs, rings, places, offered: 0, taken: 0 };
        rig.places = [rig.rings.desc, rig.rings.avail, rig.rings.used, HEADERS].map(|at| rig.at(at));
        Ok(rig)
    }

    /// Guest memory there, as a driver in the guest has it.
    fn at<T>(&self, address: u64) -> *mut T {
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
    fn run(&mut self, load: Load) -> Done<u128> {
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
        let begin = Instant::now();
        let (mut sent, mut ended) = (0, 0);
        for slot in 0..load.depth {
            self.put(slot, offsets.next());
            sent += 1;
        }
        self.regs.ring(&self.board, 0);
        while ended < load.count {
            self.board.process_all();
            while let Some(slot) = self.take() {
                ended += 1;
                if sent < load.count {
                    self.put(slot, offsets.next());
                    sent += 1;
                }
            }
        }
        let time = begin.elapsed().as_nanos();
        let mut status = [9];
        self.board.read_memory(HEADERS + 16, &mut status)?;
        if status != [0] { Err("a read failed".into()) } else { Ok(time) }
    }
}

fn preads(file: &File, load: Load) -> Done<u128> {
    let (mut buffer, mut offsets) = (vec![0; load.block as usize], load.offsets());
    let begin = Instant::now();
    for _ in 0..load.count {
        file.read_exact_at(&mut buffer, offsets.next())?;
    }
    Ok(begin.elapsed().as_nanos())
}

/// The same with nothing but a ring, into memory at `buffers`.
fn ring(file: &File, load: Load, buffers: *mut u8) -> Done<u128> {
    let mut ring = IoUring::new(256)?;
    ring.submitter().register_files(&[file.as_raw_fd()])?;
    let mut offsets = load.offsets();
    let begin = Instant::now();
    let (mut sent, mut ended) = (0, 0);
    let mut free: Vec<u16> = (0..load.depth).collect();
    while ended < load.count {
        while sent < load.count
            && let Some(slot) = free.pop()
        {
            let buffer = buffers.wrapping_add(usize::from(slot) * load.block as usize);
            let entry = opcode::Read::new(types::Fixed(0), buffer, load.block as u32);
            let entry = entry.offset(offsets.next()).build().user_data(slot.into());
            // SAFETY: guest memory of a board that outlives the ring, which nobody else uses meanwhile.
            unsafe { ring.submission().push(&entry)? };
            sent += 1;
        }
        ring.submit_and_wait(1)?;
        for entry in ring.completion() {
            if entry.result() != load.block as i32 {
                return Err(format!("a read ended with {}", entry.result()).into());
            }
            free.push(entry.user_data() as u16);
            ended += 1;
        }
    }
    Ok(begin.elapsed().as_nanos())
}

/// The median of `turns` ratios of two times, taken in turn; the first pair finds everything cold.
fn ratio(turns: usize, mut a: impl FnMut() -> Done<u128>, mut b: impl FnMut() -> Done<u128>) -> Done<f64> {
    let mut ratios = Vec::new();
    for turn in 0..=turns {
        let (one, other) = (a()?, b()?);
        if turn > 0 {
            ratios.push(one as f64 / other as f64);
        }
    }
    ratios.sort_by(f64::total_cmp);
    Ok(ratios[ratios.len() / 2])
}

fn config(path: &Path, engine: DiskEngine) -> DiskConfig {
    let mut config = DiskConfig::new(path);
    (config.engine, config.readonly) = (engine, true);
    config
}

fn main() -> Done<()> {
    const USAGE: &str = "usage: figure-disk DIRECTORY TURNS";
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().ok_or(USAGE)?;
    let turns: usize = arguments.next().ok_or(USAGE)?.parse()?;
    let (raw, layered) = (Path::new(&directory).join("disk"), Path::new(&directory).join("disk.qcow2"));
    std::fs::write(&raw, vec![7; SIZE as usize])?;
    let file = File::open(&raw)?;

    let one = Load { block: 4096, depth: 1, sequential: false, count: 20_000 };
    let mut rig = Rig::new(config(&raw, DiskEngine::Sync))?;
    println!("depth-1 {:.3}", ratio(turns, || rig.run(one), || preads(&file, one))?);

    create_disk(&layered, DiskFormat::Qcow2, Bytes(SIZE), None)?;
    fill(&layered)?;
    let mut top = config(&layered, DiskEngine::Sync);
    top.format = DiskFormat::Qcow2;
    let mut other = Rig::new(top)?;
    println!("qcow2 {:.3}", ratio(turns, || rig.run(one), || other.run(one))?);

    let mut rig = Rig::new(config(&raw, DiskEngine::IoUring))?;
    // Where the disk's go as well: how fast the kernel copies depends on where to.
    let buffers: *mut u8 = rig.at(DATA);
    let many = Load { depth: 32, count: 40_000, ..one };
    println!("depth-32 {:.3}", ratio(turns, || ring(&file, many, buffers), || rig.run(many))?);
    let long = Load { block: 128 << 10, depth: 8, sequential: true, count: 2_000 };
    println!("sequential {:.3}", ratio(turns, || ring(&file, long, buffers), || rig.run(long))?);
    Ok(())
}

/// Has every cluster of the image allocated.
fn fill(image: &Path) -> Done<()> {
    let mut writable = DiskConfig::qcow2(image);
    writable.engine = DiskEngine::Sync;
    let mut rig = Rig::new(writable)?;
    rig.board.write_memory(HEADERS, &1u32.to_le_bytes())?;
    for offset in (0..SIZE).step_by(1 << 20) {
        rig.board.write_memory(HEADERS + 8, &(offset / 512).to_le_bytes())?;
        rig.rings.descriptor(&rig.board, RINGS, 0, (HEADERS, 16, NEXT), 1);
        rig.rings.descriptor(&rig.board, RINGS, 1, (DATA, 1 << 20, NEXT), 2);
        rig.rings.descriptor(&rig.board, RINGS, 2, (HEADERS + 16, 1, WRITE), 3);
        rig.rings.offer(&rig.board, 0);
        rig.board.process_all();
        rig.rings.take_used(&rig.board).ok_or("a write did not end")?;
    }
    Ok(())
}
