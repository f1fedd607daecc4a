//! A process that is killed in the middle of its work: what a disk has said to be flushed is there, and a qcow2 image's metadata is sound.
//!
//! A child writes to its disk, flushes now and then and says so; it is killed at a random moment. Then the image is looked at by
//! `qemu-img check` and through a disk of ours. What lies in the page cache survives a process, so this is about what vmbed and the
//! library for qcow2 still hold in memory. 40 times for each format, 200 with `VMBED_CUTS=200`.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use vmbed::internals::driver::{Registers, Rings, VERSION_1, WRITE};
use vmbed::internals::{Board, Part};
use vmbed::{Bytes, CacheMode, DiskConfig, DiskEngine, DiskFormat, create_disk};

const CHILD: &str = "VMBED_POWERCUT_CHILD";
const BLOCK: u64 = 4096;
/// Blocks that are written and looked at; as many behind them are written, zeroed and discarded.
const BLOCKS: u64 = 200;
/// Far apart: each write that is the first makes room.
const STRIDE: u64 = 40 << 10;
const SIZE: u64 = 2 * BLOCKS * STRIDE;
const FEATURES: u64 = 1 << 9 | 1 << 13 | 1 << 14; // FLUSH, DISCARD, WRITE_ZEROES

fn main() -> ExitCode {
    if let Ok(job) = std::env::var(CHILD) {
        let (kind, path) = job.split_once(' ').expect("a format and a path");
        work(&config(kind, Path::new(path)));
    }
    let trial = |kind: &'static str| {
        Trial::test(format!("a_{kind}_disk_keeps_what_it_flushed"), move || {
            (0..cuts()).for_each(|seed| cut(kind, seed));
            Ok(())
        })
    };
    libtest_mimic::run(&Arguments::from_args(), ["raw", "qcow2", "layer"].map(trial).into()).exit_code()
}

fn cuts() -> u64 {
    std::env::var("VMBED_CUTS").map_or(40, |n| n.parse().expect("VMBED_CUTS is a number"))
}

/// Numbers that look random, the same each time.
fn dice(n: u64) -> u64 {
    let mut x = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ x >> 27
}

/// Where write `n` goes.
fn block_of(n: u64) -> u64 {
    dice(n) % BLOCKS
}

fn config(kind: &str, path: &Path) -> DiskConfig {
    let mut config = match kind {
        "raw" => DiskConfig::new(path),
        "qcow2" => DiskConfig::qcow2(path),
        _ => DiskConfig::qcow2(path).based_on(path.with_extension("base"), DiskFormat::Raw),
    };
    // The killed one's ring may outlive it for a moment, and its locks with it.
    (config.cache, config.engine, config.lock) = (CacheMode::Writeback, DiskEngine::Sync, false);
    config
}

/// A disk and a driver that waits for each request.
struct Rig {
    board: Board,
    rings: Rings,
}

const HEADER: u64 = 0x8000;
const DATA: u64 = 0x1_0000;

impl Rig {
    fn new(config: &DiskConfig) -> Self {
        let board = Board::new(1 << 20, vec![Part::Configured(config.clone())]).unwrap();
        let regs = Registers::find(&board, 1).unwrap();
        let rings = Rings::new(&board, 0x2_0000, 64);
        assert!(regs.start(&board, VERSION_1 | FEATURES, &[&rings]));
        Self { board, rings }
    }

    fn request(&mut self, kind: u32, offset: u64, data: &[(u64, u32, u16)]) {
        self.board.write_memory(HEADER, &u64::from(kind).to_le_bytes()).unwrap();
        self.board.write_memory(HEADER + 8, &(offset / 512).to_le_bytes()).unwrap();
        self.board.write_memory(HEADER + 16, &[9]).unwrap();
        let chain = [&[(HEADER, 16, 0)], data, &[(HEADER + 16, 1, WRITE)]].concat();
        self.rings.send(&self.board, &chain);
        self.board.process_all();
        assert!(self.rings.take_used(&self.board).is_some(), "a synchronous disk answers at once");
        let mut status = [9];
        self.board.read_memory(HEADER + 16, &mut status).unwrap();
        assert_eq!(status, [0], "request {kind} at {offset}");
    }

    fn write(&mut self, offset: u64, word: u64) {
        self.board.write_memory(DATA, &word.to_le_bytes().repeat(BLOCK as usize / 8)).unwrap();
        self.request(1, offset, &[(DATA, BLOCK as u32, 0)]);
    }

    fn read(&mut self, offset: u64) -> Vec<u64> {
        self.request(0, offset, &[(DATA, BLOCK as u32, WRITE)]);
        let mut bytes = vec![0; BLOCK as usize];
        self.board.read_memory(DATA, &mut bytes).unwrap();
        bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
    }
}

/// Writes for ever. The parent hears how far it has flushed.
fn work(config: &DiskConfig) -> ! {
    let (mut rig, mut out) = (Rig::new(config), std::io::stdout());
    for n in 1.. {
        rig.write(block_of(n) * STRIDE, n);
        let churn = (BLOCKS + dice(n ^ 0x5555) % BLOCKS) * STRIDE;
        match dice(n ^ 0xaaaa) % 8 {
            0 => rig.write(churn, n),
            kind @ (1 | 2) => {
                let range = [&(churn / 512).to_le_bytes()[..], &64u32.to_le_bytes(), &[0; 4]].concat();
                rig.board.write_memory(DATA, &range).unwrap();
                rig.request(if kind == 1 { 11 } else { 13 }, 0, &[(DATA, 16, 0)]);
            }
            3 => {
                rig.request(4, 0, &[]);
                out.write_all(format!("{n}\n").as_bytes()).unwrap();
                out.flush().unwrap();
            }
            _ => {}
        }
    }
    unreachable!("the parent ends it")
}

/// Ends with the test, however that ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Files(PathBuf);

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
        let _ = std::fs::remove_file(self.0.with_extension("base"));
    }
}

fn cut(kind: &str, seed: u64) {
    let name = format!("powercut-{kind}-{}", std::process::id());
    let files = Files(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name));
    let (path, base) = (&files.0, files.0.with_extension("base"));
    match kind {
        "raw" => create_disk(path, DiskFormat::Raw, Bytes(SIZE), None).unwrap(),
        "qcow2" => create_disk(path, DiskFormat::Qcow2, Bytes(SIZE), None).unwrap(),
        _ => {
            create_disk(&base, DiskFormat::Raw, Bytes(SIZE), None).unwrap();
            let below = vmbed::DiskBacking { path: base.clone(), format: DiskFormat::Raw };
            create_disk(path, DiskFormat::Qcow2, Bytes(0), Some(&below)).unwrap();
        }
    }
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    command.env(CHILD, format!("{kind} {}", path.display())).stdout(Stdio::piped());
    let mut child = Running(command.spawn().unwrap());
    let mut said = BufReader::new(child.0.stdout.take().unwrap()).lines();
    // So many flushes, and then some time between nothing and a few writes.
    let first = said.by_ref().take(1 + (dice(seed) % 20) as usize).last();
    std::thread::sleep(Duration::from_micros(dice(seed ^ 0x1234) % 3000));
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    let flushed = said.map_while(Result::ok).last().or(first.and_then(Result::ok));
    let flushed: u64 = flushed.expect("it flushed").parse().unwrap();
    if kind != "raw" {
        let check = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(path).output().unwrap();
        // 3: clusters that nobody uses, which cost room and nothing else.
        let sound = matches!(check.status.code(), Some(0 | 3));
        assert!(sound, "{kind} {seed}: {}", String::from_utf8_lossy(&check.stderr));
    }
    let mut rig = Rig::new(&config(kind, path));
    for block in 0..BLOCKS {
        let last = (1..=flushed).rev().find(|n| block_of(*n) == block).unwrap_or(0);
        for word in rig.read(block * STRIDE) {
            // What came after the flush may be there, too.
            let good = word == last || word > flushed && block_of(word) == block;
            assert!(good, "{kind} {seed}: block {block} has {word}; {last} was flushed, with {flushed}");
        }
    }
}
