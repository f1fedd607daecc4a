#![forbid(unsafe_code)]
//! The same requests through every engine and cache mode, and what hosts do to them.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::engine::Engine;
use super::{Backend, BlockOp, IoRequest, RawDisk, Submitted};
use crate::config::{CacheMode, DiskConfig, DiskEngine};
use crate::error::ErrorKind;
use crate::memory::Memory;
use crate::sys::fd;
use crate::sys::io::Pieces;

#[cfg(feature = "qcow2")]
mod qcow2;

const SIZE: u64 = 1 << 20;

struct Scratch(PathBuf);

impl Scratch {
    /// A file of a disk's in the build's own directory: `/tmp` may be a file system without O_DIRECT.
    fn new(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target");
        let path = path.join(format!("vmbed-block-{}-{name}", std::process::id()));
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn config(engine: DiskEngine, cache: CacheMode) -> DiskConfig {
    DiskConfig { engine, cache, ..DiskConfig::default() }
}

/// A disk with a driver that waits.
struct Rig<B> {
    disk: B,
    memory: Memory,
    pieces: Pieces,
    ended: BTreeMap<u64, Option<i32>>,
}

impl Rig<RawDisk> {
    fn open(file: &Scratch, config: &DiskConfig) -> Self {
        Self::on(RawDisk::open("disk0", &file.0, config).unwrap())
    }
}

impl<B: Backend> Rig<B> {
    fn on(disk: B) -> Self {
        Self {
            disk,
            memory: Memory::new(1 << 20).unwrap(),
            pieces: Pieces::default(),
            ended: BTreeMap::new(),
        }
    }

    fn submit(&mut self, tag: u64, op: BlockOp, offset: u64, length: u64, pieces: &[(u64, usize)]) {
        let mut buffers = self.pieces.list();
        pieces
            .iter()
            .for_each(|(at, len)| buffers.push(self.memory.get_slice(GuestAddress(*at), *len).unwrap()));
        let request = IoRequest { op, offset, length, buffers, memory: &self.memory, tag };
        if let Submitted::Done(outcome) = self.disk.submit(request) {
            self.ended.insert(tag, outcome.err().map(|e| e.raw_os_error().unwrap()));
        }
    }

    fn wait(&mut self, count: usize) -> BTreeMap<u64, Option<i32>> {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let taken = self.disk.kick();
            let ended = &mut self.ended;
            self.disk.completions(&mut |tag, outcome| {
                let errno = outcome.err().map(|e| e.raw_os_error().unwrap());
                assert!(ended.insert(tag, errno).is_none(), "told twice");
            });
            if self.ended.len() >= count {
                return std::mem::take(&mut self.ended);
            }
            assert!(Instant::now() < end, "waited for {count} requests: {:?} have ended", self.ended);
            if !taken {
                std::thread::sleep(Duration::from_millis(1));
            } else if let Some(fd) = self.disk.completion_fd() {
                let told = fd::wait_readable(fd, Duration::from_secs(30));
                assert!(told, "nothing is said of what has ended: {:?}", self.ended);
            }
        }
    }

    fn one(&mut self, op: BlockOp, offset: u64, length: u64, pieces: &[(u64, usize)]) -> Option<i32> {
        self.submit(7, op, offset, length, pieces);
        self.wait(1)[&7]
    }
}

const WRITE: BlockOp = BlockOp::Write { durable: false };
const MODES: [CacheMode; 4] =
    [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Direct, CacheMode::Unsafe];

#[test]
fn every_engine_and_cache_mode_moves_the_same_bytes() {
    for engine in [DiskEngine::Sync, DiskEngine::IoUring] {
        for cache in MODES {
            let file = Scratch::new(&format!("{engine:?}-{cache:?}"));
            let mut rig = Rig::open(&file, &config(engine, cache));
            assert!(rig.disk.discards());
            // Aligned and not, in one piece and in several, all at a time.
            let fill: Vec<u8> = (0..0x8000u32).map(|i| (i % 251) as u8).collect();
            rig.memory.write_slice(&fill, GuestAddress(0x1_0000)).unwrap();
            for (tag, durable) in [(0u64, false), (1, true)] {
                let op = BlockOp::Write { durable };
                rig.submit(2 * tag, op, tag * 0x4000, 0x2000, &[(0x1_0000, 0x1000), (0x1_1000, 0x1000)]);
                rig.submit(
                    2 * tag + 1,
                    op,
                    tag * 0x4000 + 0x2000,
                    0x1000,
                    &[(0x1_2000, 1000), (0x1_23e8, 3096)],
                );
            }
            assert!(rig.wait(4).values().all(Option::is_none));
            assert_eq!(rig.one(BlockOp::Flush, 0, 0, &[]), None);
            let there = std::fs::read(&file.0).unwrap();
            assert!(
                there[..0x3000] == fill[..0x3000] && there[0x4000..0x7000] == fill[..0x3000],
                "{engine:?} {cache:?}"
            );
            rig.submit(0, BlockOp::Read, 0x1000, 0x1000, &[(0x2_0000, 0x1000)]);
            rig.submit(1, BlockOp::Read, 0x4200, 0x200, &[(0x2_1001, 0x200)]);
            assert!(rig.wait(2).values().all(Option::is_none));
            let mut back = [0; 0x1000];
            rig.memory.read_slice(&mut back, GuestAddress(0x2_0000)).unwrap();
            assert!(back == fill[0x1000..0x2000]);
            rig.memory.read_slice(&mut back[..0x200], GuestAddress(0x2_1001)).unwrap();
            assert!(back[..0x200] == fill[0x200..0x400]);
            let zeroes = BlockOp::WriteZeroes { unmap: false, durable: true };
            assert_eq!(rig.one(zeroes, 0x200, 0x400, &[]), None);
            assert_eq!(rig.one(BlockOp::Discard, 0x4000, 0x1000, &[]), None);
            assert_eq!(
                rig.one(BlockOp::WriteZeroes { unmap: true, durable: false }, 0x5000, 0x1000, &[]),
                None
            );
            let there = std::fs::read(&file.0).unwrap();
            assert!(
                there[0x200..0x600].iter().all(|b| *b == 0) && there[0x600..0x3000] == fill[0x600..0x3000]
            );
            assert!(there[0x4000..0x6000].iter().all(|b| *b == 0) && there.len() as u64 == SIZE);
        }
    }
}

#[test]
fn many_requests_are_on_their_way_at_a_time_on_several_queues() {
    let file = Scratch::new("queues");
    let mut rig = Rig::open(&file, &config(DiskEngine::IoUring, CacheMode::Direct));
    let mut second = rig.disk.another().unwrap().unwrap();
    assert!(second.size() == SIZE && second.completion_fd().is_some());
    for tag in 0..200 {
        rig.submit(tag, WRITE, tag * 4096 % SIZE, 4096, &[(4096 * (tag % 64), 4096)]);
    }
    assert!(
        matches!(&rig.disk.completion_fd(), Some(fd) if !fd::is_readable(*fd)),
        "nothing began before the kick"
    );
    assert!(rig.wait(200).values().all(Option::is_none));
    let mut list = rig.pieces.list();
    list.push(rig.memory.get_slice(GuestAddress(0), 512).unwrap());
    let request =
        IoRequest { op: BlockOp::Read, offset: 0, length: 512, buffers: list, memory: &rig.memory, tag: 1 };
    assert!(matches!(second.submit(request), Submitted::Pending | Submitted::Done(Ok(()))));
}

/// Rows 12 and 28: what the kernel has no room for is done all the same, what it fails is an error, and nothing is lost.
#[test]
fn what_the_ring_cannot_do_is_done_without_it() {
    let file = Scratch::new("faults");
    let mut rig = Rig::open(&file, &config(DiskEngine::IoUring, CacheMode::Writeback));
    rig.memory.write_slice(&[9; 512], GuestAddress(0)).unwrap();
    for (errno, outcome) in [
        (libc::EAGAIN, None),
        (libc::ENOMEM, None),
        (libc::EINTR, None),
        (libc::ENOSPC, Some(libc::ENOSPC)),
        (libc::EIO, Some(libc::EIO)),
    ] {
        let RawDisk { engine: Engine::Uring(uring), .. } = &mut rig.disk else { panic!("it has a ring") };
        uring.faults.push(errno);
        assert_eq!(rig.one(WRITE, 512, 512, &[(0, 512)]), outcome, "{errno}");
    }
    assert_eq!(std::fs::read(&file.0).unwrap()[512..1024], [9; 512]);
    // The file shrinks: half of a request is there, then nothing.
    File::options().write(true).open(&file.0).unwrap().set_len(4096 + 512).unwrap();
    assert_eq!(rig.one(BlockOp::Read, 4096, 1024, &[(0, 1024)]), Some(libc::EIO));
    assert_eq!(rig.one(BlockOp::Read, 8192, 512, &[(0, 512)]), Some(libc::EIO));
    // Memory of another guest's is not touched.
    let other = Memory::new(1 << 20).unwrap();
    let mut list = rig.pieces.list();
    list.push(other.get_slice(GuestAddress(0), 512).unwrap());
    let request =
        IoRequest { op: BlockOp::Read, offset: 0, length: 512, buffers: list, memory: &rig.memory, tag: 1 };
    let Submitted::Done(Err(error)) = rig.disk.submit(request) else { panic!("it is refused") };
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
}

#[test]
fn a_flush_that_is_not_promised_is_not_waited_for() {
    for (cache, promised) in [(CacheMode::Unsafe, false), (CacheMode::Writeback, true)] {
        let file = Scratch::new(&format!("flush-{promised}"));
        let mut rig = Rig::open(&file, &config(DiskEngine::IoUring, cache));
        rig.submit(7, BlockOp::Flush, 0, 0, &[]);
        assert_eq!(rig.ended.is_empty(), promised);
        rig.wait(1);
    }
}

/// On this thread, as containers do it.
fn forbid_io_uring() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
    let setup = [(libc::SYS_io_uring_setup, Vec::new())].into_iter().collect();
    let errno = SeccompAction::Errno(libc::EPERM as u32);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(setup, SeccompAction::Allow, errno, arch).unwrap();
    apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

#[test]
fn a_host_without_io_uring_is_served_one_by_one() {
    let file = Scratch::new("forbidden");
    let path = file.0.clone();
    // The filter is of that thread alone.
    let body = move || {
        forbid_io_uring();
        let error =
            RawDisk::open("disk3", &path, &config(DiskEngine::IoUring, CacheMode::Writeback)).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("disk3") && error.to_string().contains("sync"), "{error}");
        let disk = RawDisk::open("disk3", &path, &config(DiskEngine::Auto, CacheMode::Writeback)).unwrap();
        assert!(disk.completion_fd().is_none());
    };
    std::thread::spawn(body).join().unwrap();
    let disk = RawDisk::open("disk3", &file.0, &config(DiskEngine::Auto, CacheMode::Writeback)).unwrap();
    assert!(disk.completion_fd().is_some());
}

#[test]
fn an_image_has_one_writer_or_readers_and_is_free_as_soon_as_its_disk_is() {
    let file = Scratch::new("locked");
    let writer = config(DiskEngine::IoUring, CacheMode::Direct);
    let reader = DiskConfig { readonly: true, ..writer.clone() };
    for _ in 0..4 {
        let mut rig = Rig::open(&file, &writer);
        rig.one(WRITE, 0, 4096, &[(0, 4096)]);
        for other in [&writer, &reader] {
            let error = RawDisk::open("disk1", &file.0, other).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::InvalidState);
            assert!(error.to_string().contains("in use"), "{error}");
        }
        let unlocked = DiskConfig { lock: false, ..writer.clone() };
        assert!(RawDisk::open("disk1", &file.0, &unlocked).is_ok());
        drop(rig);
        let readers = [0, 1].map(|_| RawDisk::open("disk1", &file.0, &reader).unwrap());
        assert!(RawDisk::open("disk1", &file.0, &writer).is_err());
        drop(readers);
    }
}

#[test]
fn a_disk_grows_with_its_file() {
    let file = Scratch::new("grows");
    let disk = RawDisk::open("disk0", &file.0, &config(DiskEngine::Sync, CacheMode::Writeback)).unwrap();
    let other = disk.another().unwrap().unwrap();
    let resizer = disk.resizer().unwrap();
    resizer.resize(4 * SIZE).unwrap();
    assert_eq!(
        (disk.size(), other.size(), std::fs::metadata(&file.0).unwrap().len()),
        (4 * SIZE, 4 * SIZE, 4 * SIZE)
    );
    resizer.resize(SIZE).unwrap();
    assert_eq!(
        (disk.size(), std::fs::metadata(&file.0).unwrap().len()),
        (SIZE, 4 * SIZE),
        "what was there stays"
    );
    // More than the file system can have.
    let error = resizer.resize(i64::MAX as u64 & !511).unwrap_err();
    assert!(error.to_string().contains("growing"), "{error}");
    assert_eq!(disk.size(), SIZE);
}

#[test]
fn a_direct_disk_on_what_has_no_direct_access_says_so() {
    let file = crate::sys::memory::sealed_memfd(c"vmbed-nodirect", SIZE).unwrap();
    let config = config(DiskEngine::Sync, CacheMode::Direct);
    match RawDisk::from_file("disk0", file, &config) {
        // Since Linux 6.6 tmpfs takes O_DIRECT and does as it always did.
        Ok(disk) => assert_eq!(disk.size(), SIZE),
        Err(error) => assert!(error.to_string().contains("O_DIRECT"), "{error}"),
    }
}
