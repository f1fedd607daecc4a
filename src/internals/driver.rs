#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "test support: what fails here is a failed test")]
//! A virtio driver over a [`Board`]: it finds its device in configuration space, and works it through
//! registers and rings in guest memory. It keeps to the rules, and lets its user break each of them.

use super::{Board, ECAM};

/// Bits of the device status.
pub mod status {
    /// The driver has seen the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// It knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// It is ready.
    pub const DRIVER_OK: u8 = 4;
    /// It has said which features it wants.
    pub const FEATURES_OK: u8 = 8;
    /// The device wants a reset.
    pub const NEEDS_RESET: u8 = 0x40;
}
use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};

/// Feature bit 32.
pub const VERSION_1: u64 = 1 << 32;
/// Feature bit 29.
pub const EVENT_IDX: u64 = 1 << 29;
/// Feature bit 28.
pub const INDIRECT_DESC: u64 = 1 << 28;

/// A descriptor with a next one.
pub const NEXT: u16 = 1;
/// A descriptor that the device writes.
pub const WRITE: u16 = 2;
/// A descriptor of a table of descriptors.
pub const INDIRECT: u16 = 4;

/// `len` bytes at an MMIO address, little-endian.
pub fn read(board: &Board, address: u64, len: usize) -> u64 {
    let mut data = [0; 8];
    board.read_mmio(address, &mut data[..len]).unwrap();
    u64::from_le_bytes(data)
}

/// Writes the low `len` bytes of `value`.
pub fn write(board: &Board, address: u64, len: usize, value: u64) {
    board.write_mmio(address, &value.to_le_bytes()[..len]).unwrap();
}

/// The address of a configuration register.
pub fn ecam(device: u8, register: u64) -> u64 {
    ECAM.start + (u64::from(device) << 15) + register
}

/// `N` bytes of RAM.
pub fn bytes<const N: usize>(board: &Board, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    board.read_memory(address, &mut bytes).unwrap();
    bytes
}

/// Where the structures of one device are.
#[derive(Clone, Debug, Default)]
pub struct Registers {
    /// The device's number on the bus.
    pub device: u8,
    /// Where its BAR is.
    pub bar: u64,
    /// The common configuration.
    pub common: u64,
    /// The first doorbell.
    pub notify: u64,
    /// From one doorbell to the next.
    pub notify_stride: u64,
    /// The interrupt status.
    pub isr: u64,
    /// The device's own configuration.
    pub config: u64,
    /// The MSI-X capability, in configuration space.
    pub msix: u64,
    /// The window onto the BAR, in configuration space.
    pub window: u64,
    /// The MSI-X table.
    pub table: u64,
    /// The MSI-X pending bits.
    pub pending: u64,
}

impl Registers {
    /// Walks the capabilities of 00:`device`.0; `None` where there is no virtio device.
    pub fn find(board: &Board, device: u8) -> Option<Self> {
        let config = |at, len| read(board, ecam(device, at), len);
        if config(0, 2) != 0x1af4 {
            return None;
        }
        let bar = config(0x10, 4) & !0xf | config(0x14, 4) << 32;
        let mut found = Self { device, bar, ..Self::default() };
        let mut at = config(0x34, 1);
        while at != 0 {
            let place = bar + config(at + 8, 4);
            match (config(at, 1), config(at + 3, 1)) {
                (9, 1) => found.common = place,
                (9, 2) => (found.notify, found.notify_stride) = (place, config(at + 16, 4)),
                (9, 3) => found.isr = place,
                (9, 4) => found.config = place,
                (9, 5) => found.window = at,
                (0x11, _) => {
                    found.msix = at;
                    found.table = bar + (config(at + 4, 4) & !7);
                    found.pending = bar + (config(at + 8, 4) & !7);
                }
                _ => {}
            }
            at = config(at + 1, 1);
        }
        Some(found)
    }

    /// A register of the common configuration.
    pub fn get(&self, board: &Board, register: u64, len: usize) -> u64 {
        read(board, self.common + register, len)
    }

    /// Writes one.
    pub fn set(&self, board: &Board, register: u64, len: usize, value: u64) {
        write(board, self.common + register, len, value);
    }

    /// The device status.
    pub fn status(&self, board: &Board) -> u8 {
        self.get(board, 0x14, 1) as u8
    }

    /// Writes it; 0 is a reset.
    pub fn set_status(&self, board: &Board, status: u8) {
        self.set(board, 0x14, 1, status.into());
    }

    /// The features that the device offers.
    pub fn offered(&self, board: &Board) -> u64 {
        let half = |select| {
            self.set(board, 0x00, 4, select);
            self.get(board, 0x04, 4)
        };
        half(0) | half(1) << 32
    }

    /// Writes the driver's features.
    pub fn accept(&self, board: &Board, features: u64) {
        for half in 0..2 {
            self.set(board, 0x08, 4, half);
            self.set(board, 0x0c, 4, features >> (32 * half) & 0xffff_ffff);
        }
    }

    /// A reset, and everything up to FEATURES_OK. Whether the device agrees.
    pub fn negotiate(&self, board: &Board, features: u64) -> bool {
        self.set_status(board, 0);
        self.set_status(board, ACKNOWLEDGE);
        self.set_status(board, ACKNOWLEDGE | DRIVER);
        self.accept(board, features);
        self.set_status(board, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status(board) & FEATURES_OK != 0
    }

    /// Puts queue `index` into the registers, with MSI-X entry `vector`, and enables it.
    pub fn set_queue(&self, board: &Board, index: u16, rings: &Rings, vector: u16) {
        self.set(board, 0x16, 2, index.into());
        self.set(board, 0x18, 2, rings.size.into());
        self.set(board, 0x1a, 2, vector.into());
        for (register, address) in [(0x20, rings.desc), (0x28, rings.avail), (0x30, rings.used)] {
            self.set(board, register, 4, address & 0xffff_ffff);
            self.set(board, register + 4, 4, address >> 32);
        }
        self.set(board, 0x1c, 2, 1);
    }

    /// Opens the first `count` entries of the MSI-X table.
    pub fn enable_msix(&self, board: &Board, count: u16) {
        for entry in (0..u64::from(count)).map(|i| self.table + 16 * i) {
            write(board, entry, 8, 0xfee0_0000);
            write(board, entry + 8, 4, 0x40);
            write(board, entry + 12, 4, 0);
        }
        write(board, ecam(self.device, self.msix + 2), 2, 1 << 15);
    }

    /// The whole way from a reset to DRIVER_OK: MSI-X entry 0 for the configuration, `n + 1` for queue
    /// `n`. Whether the device serves.
    pub fn start(&self, board: &Board, features: u64, queues: &[&Rings]) -> bool {
        if !self.negotiate(board, features) {
            return false;
        }
        self.enable_msix(board, queues.len() as u16 + 1);
        self.set(board, 0x10, 2, 0);
        for (rings, index) in queues.iter().zip(0..) {
            self.set_queue(board, index, rings, index + 1);
        }
        self.set_status(board, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        self.status(board) == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    }

    /// Rings the doorbell of queue `index`, by MMIO.
    pub fn ring(&self, board: &Board, index: u16) {
        write(board, self.notify + u64::from(index) * self.notify_stride, 2, index.into());
    }
}

/// The driver's side of one queue: 16 KiB of rings.
#[derive(Clone, Debug)]
pub struct Rings {
    /// Entries.
    pub size: u16,
    /// The descriptor table.
    pub desc: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
    next_descriptor: u16,
    offered: u16,
    taken: u16,
}

/// A descriptor: address, length, flags.
pub type Buffer = (u64, u32, u16);

impl Rings {
    /// Empty rings of at most 256 entries from `base` on.
    pub fn new(board: &Board, base: u64, size: u16) -> Self {
        board.write_memory(base, &[0; 0x4000]).unwrap();
        let (avail, used) = (base + 0x2000, base + 0x3000);
        Self { size, desc: base, avail, used, next_descriptor: 0, offered: 0, taken: 0 }
    }

    /// Writes entry `index` of the table at `table`, which need not be ours.
    pub fn descriptor(&self, board: &Board, table: u64, index: u16, (addr, len, flags): Buffer, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        board.write_memory(table + 16 * u64::from(index), &bytes).unwrap();
    }

    /// Writes a chain into the table and does not offer it; the flag NEXT is added. Its head.
    pub fn chain(&mut self, board: &Board, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (i, &(addr, len, flags)) in buffers.iter().enumerate() {
            let index = (head + i as u16) % self.size;
            let flags = if i + 1 == buffers.len() { flags } else { flags | NEXT };
            self.descriptor(board, self.desc, index, (addr, len, flags), (index + 1) % self.size);
        }
        self.next_descriptor = (head + buffers.len() as u16) % self.size;
        head
    }

    /// Puts `head` into the available ring.
    pub fn offer(&mut self, board: &Board, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.offered % self.size);
        board.write_memory(slot, &head.to_le_bytes()).unwrap();
        self.set_avail(board, self.offered.wrapping_add(1));
    }

    /// Claims that the available ring goes up to there.
    pub fn set_avail(&mut self, board: &Board, index: u16) {
        self.offered = index;
        board.write_memory(self.avail + 2, &index.to_le_bytes()).unwrap();
    }

    /// A chain, offered.
    pub fn send(&mut self, board: &Board, buffers: &[Buffer]) -> u16 {
        let head = self.chain(board, buffers);
        self.offer(board, head);
        head
    }

    /// The next completion: head and length written.
    pub fn take_used(&mut self, board: &Board) -> Option<(u16, u32)> {
        if u16::from_le_bytes(bytes(board, self.used + 2)) == self.taken {
            return None;
        }
        let [a, b, _, _, len @ ..] = bytes::<8>(board, self.used + 4 + 8 * u64::from(self.taken % self.size));
        self.taken = self.taken.wrapping_add(1);
        // used_event, which means something with EVENT_IDX only: interrupt at the next one.
        let event = self.avail + 4 + 2 * u64::from(self.size);
        board.write_memory(event, &self.taken.to_le_bytes()).unwrap();
        Some((u16::from_le_bytes([a, b]), u32::from_le_bytes(len)))
    }
}
