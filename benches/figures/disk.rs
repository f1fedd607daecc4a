//! What a disk's device costs beside the host's own work. `figure-disk DIRECTORY TURNS` fills a file of 64 MiB there and prints the
//! medians of ratios, each taken in turn within one run; with `doorbell` behind them, that one alone:
//!
//! - `depth-1`: time of random reads of 4 KiB through the queue handler (this process's driver, no other thread, synchronous
//!   engine) to that of bare `pread`s;
//! - `doorbell`: time of such reads by a thread that a doorbell wakes and that raises an interrupt, to that of `pread`s by a thread
//!   that is asked and answers by eventfds. To be run on one CPU: how long another one takes to wake up is the machine's affair;
//! - `depth-32`, `sequential`: IOPS of 4 KiB at depth 32, and of 128 KiB at depth 8, with io_uring, to those of a bare ring;
//! - `qcow2`: IOPS of random reads of 4 KiB that are allocated in a qcow2 image to those of a raw one, synchronous.
#![expect(unsafe_code, reason = "a bare ring is told of memory by its address")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use io_uring::{IoUring, opcode, types};
use vmbed::internals::Part;
use vmbed::internals::driver::{NEXT, WRITE};
use vmbed::{Bytes, DiskConfig, DiskEngine, DiskFormat, create_disk};
use vmm_sys_util::eventfd::EventFd;

#[path = "ratio.rs"]
mod ratio;
use ratio::{Done, ratio};
#[path = "disk_rig.rs"]
mod rig;
use rig::{DATA, HEADERS, Load, RINGS, Rig, SIZE};

fn preads(file: &File, load: Load) -> Done<u128> {
    let (mut buffer, mut offsets) = (vec![0; load.block as usize], load.offsets());
    let begin = Instant::now();
    for _ in 0..load.count {
        file.read_exact_at(&mut buffer, offsets.next())?;
    }
    Ok(begin.elapsed().as_nanos())
}

/// The same by another thread, which is asked and answers by an eventfd each.
fn ping_pong(file: &File, load: Load) -> Done<u128> {
    let (ask, answer) = (EventFd::new(0)?, EventFd::new(0)?);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| -> std::io::Result<()> {
            let (mut buffer, mut offsets) = (vec![0; load.block as usize], load.offsets());
            for _ in 0..load.count {
                ask.read()?;
                file.read_exact_at(&mut buffer, offsets.next())?;
                answer.write(1)?;
            }
            Ok(())
        });
        let begin = Instant::now();
        for _ in 0..load.count {
            ask.write(1)?;
            answer.read()?;
        }
        let time = begin.elapsed().as_nanos();
        server.join().map_err(|_| "the server panicked")??;
        Ok(time)
    })
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

fn on(path: &Path, engine: DiskEngine) -> Part {
    Part::Configured(config(path, engine))
}

fn config(path: &Path, engine: DiskEngine) -> DiskConfig {
    let mut config = DiskConfig::new(path);
    (config.engine, config.readonly) = (engine, true);
    config
}

fn main() -> Done<()> {
    const USAGE: &str = "usage: figure-disk DIRECTORY TURNS [doorbell]";
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().ok_or(USAGE)?;
    let turns: usize = arguments.next().ok_or(USAGE)?.parse()?;
    let (raw, layered) = (Path::new(&directory).join("disk"), Path::new(&directory).join("disk.qcow2"));
    std::fs::write(&raw, vec![7; SIZE as usize])?;
    let file = File::open(&raw)?;

    let one = Load { block: 4096, depth: 1, sequential: false, count: 20_000 };
    if arguments.next().as_deref() == Some("doorbell") {
        let mut rig = Rig::new(Part::Threaded(config(&raw, DiskEngine::Sync)))?;
        println!("doorbell {:.3}", ratio(turns, || rig.run(one), || ping_pong(&file, one))?);
        return Ok(());
    }
    let mut rig = Rig::new(on(&raw, DiskEngine::Sync))?;
    println!("depth-1 {:.3}", ratio(turns, || rig.run(one), || preads(&file, one))?);

    create_disk(&layered, DiskFormat::Qcow2, Bytes(SIZE), None)?;
    fill(&layered)?;
    let mut top = config(&layered, DiskEngine::Sync);
    top.format = DiskFormat::Qcow2;
    let mut other = Rig::new(Part::Configured(top))?;
    println!("qcow2 {:.3}", ratio(turns, || rig.run(one), || other.run(one))?);

    let mut rig = Rig::new(on(&raw, DiskEngine::IoUring))?;
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
    let mut rig = Rig::new(Part::Configured(writable))?;
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
