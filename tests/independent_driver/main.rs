//! Drivers written by others, the crate `virtio-drivers`, against our devices: what we misread in the
//! specification, they have not misread in the same way.
//!
//! Its own PCI transport dereferences BARs; [`OurPci`] makes the accesses one by one.
#![expect(unsafe_code, reason = "the trait Hal is unsafe: its pages are ours to vouch for")]

use std::cell::RefCell;
use std::path::Path;
use std::ptr::NonNull;
use std::rc::Rc;
use std::time::{Duration, Instant};

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr, Result};
use vmbed::internals::driver::{Registers, ecam, read, write};
use vmbed::internals::{Board, Part, memory_file};
use vmbed::{Bytes, CacheMode, DiskConfig, DiskEngine, DiskFormat, create_disk};
use zerocopy::{FromBytes, Immutable, IntoBytes};

mod net;

/// Where the driver's pages begin, and where they end.
const FIRST_PAGE: u64 = 0x10_0000;
const MEMORY: u64 = 8 << 20;

/// Pages of the thread's board, which the drivers allocate from.
struct Pages {
    board: Rc<Board>,
    next: u64,
    /// First page and count.
    free: Vec<(u64, usize)>,
}

thread_local! {
    static PAGES: RefCell<Option<Pages>> = const { RefCell::new(None) };
}

/// Guest memory, in which the drivers' buffers are bounced: the devices see nothing else of theirs.
struct GuestPages;

impl GuestPages {
    fn take(count: usize) -> (PhysAddr, NonNull<u8>) {
        let at = PAGES.with_borrow_mut(|pages| {
            let pages = pages.as_mut().unwrap();
            if let Some(index) = pages.free.iter().position(|(_, n)| *n == count) {
                return pages.free.swap_remove(index).0;
            }
            let at = pages.next;
            pages.next += (count * PAGE_SIZE) as u64;
            assert!(pages.next <= MEMORY, "guest memory is used up");
            at
        });
        let host = Self::host(at, count * PAGE_SIZE);
        // SAFETY: `host` is guest memory, mapped for that length, and nobody else's until it is given back.
        unsafe { host.write_bytes(0, count * PAGE_SIZE) };
        (at, host)
    }

    fn give_back(at: PhysAddr, count: usize) {
        PAGES.with_borrow_mut(|pages| pages.as_mut().unwrap().free.push((at, count)));
    }

    fn host(at: PhysAddr, length: usize) -> NonNull<u8> {
        PAGES.with_borrow(|pages| {
            NonNull::new(pages.as_ref().unwrap().board.host_address(at, length).unwrap()).unwrap()
        })
    }
}

// SAFETY: every method hands out pages of guest memory that no one else has, page-aligned (the mapping is,
// and guest addresses are) and zeroed, until they are given back. `PAGES` keeps the memory alive.
unsafe impl Hal for GuestPages {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        Self::take(pages)
    }

    unsafe fn dma_dealloc(at: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        Self::give_back(at, pages);
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("registers are accessed through the board")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let (at, host) = Self::take(buffer.len().div_ceil(PAGE_SIZE));
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: the caller's buffer is valid for its length, and the pages hold at least as much.
            unsafe { host.copy_from_nonoverlapping(buffer.cast(), buffer.len()) };
        }
        at
    }

    unsafe fn unshare(at: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        if direction != BufferDirection::DriverToDevice {
            let host = Self::host(at, buffer.len());
            // SAFETY: as in `share`, the other way round.
            unsafe { buffer.cast::<u8>().copy_from_nonoverlapping(host, buffer.len()) };
        }
        Self::give_back(at, buffer.len().div_ceil(PAGE_SIZE));
    }
}

/// The transport. The device works within `notify`, since nobody else would let it.
struct OurPci {
    board: Rc<Board>,
    registers: Registers,
    /// The two rings of a queue each of whose requests is answered.
    answered: Option<(u64, u64)>,
}

fn read_index(board: &Board, at: u64) -> u16 {
    let mut bytes = [0; 2];
    board.read_memory(at, &mut bytes).unwrap();
    u16::from_le_bytes(bytes)
}

impl OurPci {
    fn select(&self, queue: u16) {
        self.registers.set(&self.board, 0x16, 2, queue.into());
    }
}

impl Transport for OurPci {
    fn device_type(&self) -> DeviceType {
        let id = read(&self.board, ecam(self.registers.device, 2), 2) as u16;
        DeviceType::try_from(id - 0x1040).unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        self.registers.offered(&self.board)
    }

    fn write_driver_features(&mut self, features: u64) {
        self.registers.accept(&self.board, features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.select(queue);
        self.registers.get(&self.board, 0x18, 2) as u32
    }

    fn notify(&mut self, queue: u16) {
        self.registers.ring(&self.board, queue);
        assert_eq!(self.board.process(), 1, "its doorbell rings");
        // The driver then spins, so what ends later ends now: only its disks answer everything.
        let Some((avail, used)) = self.answered else { return };
        let index = |ring: u64| read_index(&self.board, ring + 2);
        let end = Instant::now() + Duration::from_secs(60);
        while index(avail) != index(used) {
            assert!(Instant::now() < end, "waited a minute for a request to end");
            self.board.process_all();
        }
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.registers.status(&self.board).into())
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.registers.set_status(&self.board, status.bits() as u8);
        if status.contains(DeviceStatus::DRIVER_OK) {
            // What the device looks at by itself when it begins.
            self.board.process();
        }
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, desc: PhysAddr, avail: PhysAddr, used: PhysAddr) {
        self.select(queue);
        if self.device_type() == DeviceType::Block {
            self.answered = Some((avail, used));
        }
        for (register, len, value) in [
            (0x18, 2, size.into()),
            (0x1a, 2, 0xffff),
            (0x20, 8, desc),
            (0x28, 8, avail),
            (0x30, 8, used),
            (0x1c, 2, 1),
        ] {
            self.registers.set(&self.board, register, len, value);
        }
    }

    fn queue_unset(&mut self, _: u16) {
        // Over PCI there is no way back but a reset of the device.
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.select(queue);
        self.registers.get(&self.board, 0x1c, 2) == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::from_bits_retain(read(&self.board, self.registers.isr, 1) as u32)
    }

    fn read_config_generation(&self) -> u32 {
        self.registers.get(&self.board, 0x15, 1) as u32
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        let mut value = T::new_zeroed();
        let step = width(size_of::<T>());
        let places = (self.registers.config + offset as u64..).step_by(step);
        for (piece, at) in value.as_mut_bytes().chunks_mut(step).zip(places) {
            piece.copy_from_slice(&read(&self.board, at, step).to_le_bytes()[..step]);
        }
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) -> Result<()> {
        let step = width(size_of::<T>());
        let places = (self.registers.config + offset as u64..).step_by(step);
        for (piece, at) in value.as_bytes().chunks(step).zip(places) {
            let value = piece.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b));
            write(&self.board, at, step, value);
        }
        Ok(())
    }
}

impl Drop for OurPci {
    fn drop(&mut self) {
        // The drivers free their rings after this: nobody may serve them any more.
        self.registers.set_status(&self.board, 0);
    }
}

/// The width in which a field is accessed (4.1.3.1): its own up to four bytes, arrays byte by byte.
fn width(size: usize) -> usize {
    match size {
        2 => 2,
        n if n.is_multiple_of(4) => 4,
        _ => 1,
    }
}

/// A board with one device, whose memory the drivers of this thread use from now on.
fn board(part: Part) -> Rc<Board> {
    board_with(vec![part])
}

/// The same with several.
fn board_with(parts: Vec<Part>) -> Rc<Board> {
    let board = Rc::new(Board::new(MEMORY, parts).unwrap());
    PAGES.set(Some(Pages { board: board.clone(), next: FIRST_PAGE, free: Vec::new() }));
    board
}

fn transport(board: &Rc<Board>) -> OurPci {
    transport_of(board, 1)
}

/// To that device.
fn transport_of(board: &Rc<Board>, device: u8) -> OurPci {
    OurPci { board: board.clone(), registers: Registers::find(board, device).unwrap(), answered: None }
}

#[test]
fn its_disk_driver_writes_flushes_and_reads_back() {
    let file = memory_file(1 << 20).unwrap();
    let board = board(Part::Disk { file, readonly: false });
    for round in 1..4u8 {
        let mut blk = VirtIOBlk::<GuestPages, _>::new(transport(&board)).unwrap();
        assert_eq!((blk.capacity(), blk.readonly()), (2048, false));
        let mut back = [0; 4096];
        blk.read_blocks(2040, &mut back).unwrap();
        assert_eq!(back, [round - 1; 4096], "what the last round left");
        for sector in [0, 1, 1000, 2040] {
            blk.write_blocks(sector, &[round; 4096]).unwrap();
        }
        blk.flush().unwrap();
        blk.read_blocks(2040, &mut back).unwrap();
        assert_eq!(back, [round; 4096]);
        assert!(blk.read_blocks(2041, &mut back).is_err(), "past the end");
        assert!(blk.write_blocks(usize::MAX / 512, &back).is_err(), "far past the end");
        blk.read_blocks(1001, &mut back[..512]).unwrap();
        let mut id = [0; 20];
        let len = blk.device_id(&mut id).unwrap();
        assert_eq!(&id[..len], b"serial-1");
    }
}

/// As a VM has its disks: every engine and cache mode of every format.
#[test]
fn its_disk_driver_finds_every_engine_alike() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("vmbed-driver-{}", std::process::id()));
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        create_disk(&path, format, Bytes::mib(1), None).unwrap();
        let mut last = [0; 4096];
        let modes = [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Direct, CacheMode::Unsafe];
        for (round, (engine, cache)) in [DiskEngine::Sync, DiskEngine::IoUring]
            .into_iter()
            .flat_map(|engine| modes.map(|cache| (engine, cache)))
            .enumerate()
        {
            let mut config = DiskConfig::new(&path);
            (config.format, config.engine, config.cache) = (format, engine, cache);
            let board = board(Part::Configured(config));
            let mut blk = VirtIOBlk::<GuestPages, _>::new(transport(&board)).unwrap();
            let (mut back, now) = ([9; 4096], [round as u8 + 1; 4096]);
            assert_eq!(blk.capacity(), 2048);
            blk.read_blocks(2040, &mut back).unwrap();
            assert_eq!(back, last, "what the last one left: {format:?} {engine:?} {cache:?}");
            for sector in [2040, 7, 1024] {
                blk.write_blocks(sector, &now).unwrap();
            }
            blk.flush().unwrap();
            for sector in [1024, 7, 2040] {
                blk.read_blocks(sector, &mut back).unwrap();
                assert_eq!(back, now, "{format:?} {engine:?} {cache:?}");
            }
            blk.write_blocks(9, &[0x55; 512]).unwrap();
            blk.read_blocks(7, &mut back).unwrap();
            assert_eq!((&back[..1024], &back[1024..1536]), (&now[..1024], &[0x55; 512][..]));
            assert!(blk.read_blocks(2041, &mut back).is_err(), "past the end");
            last = now;
            drop(blk);
            PAGES.set(None);
        }
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn its_disk_driver_sees_a_readonly_disk() {
    let board = board(Part::Disk { file: memory_file(4096).unwrap(), readonly: true });
    let mut blk = VirtIOBlk::<GuestPages, _>::new(transport(&board)).unwrap();
    assert!(blk.readonly());
    assert!(blk.write_blocks(0, &[1; 512]).is_err());
    let mut back = [1; 512];
    blk.read_blocks(0, &mut back).unwrap();
    assert_eq!(back, [0; 512]);
}

#[test]
fn its_rng_driver_gets_numbers() {
    let board = board(Part::Rng);
    let mut rng = VirtIORng::<GuestPages, _>::new(transport(&board)).unwrap();
    let mut last = [0; 64];
    for _ in 0..100 {
        let mut bytes = [0; 64];
        assert_eq!(rng.request_entropy(&mut bytes).unwrap(), 64);
        assert_ne!(bytes, last);
        last = bytes;
    }
}

#[test]
fn its_console_driver_talks_both_ways() {
    let board = board(Part::Console);
    let mut console = VirtIOConsole::<GuestPages, _>::new(transport(&board)).unwrap();
    console.send_bytes(b"hello, ").unwrap();
    for byte in b"world" {
        console.send(*byte).unwrap();
    }
    assert_eq!(board.output(), b"hello, world");
    for round in 0..50u8 {
        assert_eq!(console.recv(true).unwrap(), None);
        assert_eq!(board.input(&[round; 3]), 3);
        board.process_all();
        for _ in 0..3 {
            assert_eq!(console.recv(true).unwrap(), Some(round));
        }
    }
}
