#![forbid(unsafe_code)]
//! The driver's side of a queue, for tests: it builds rings in guest memory, and bends them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{Queue, QueueSetup};
use super::{Activation, Signals};
use crate::events::{EventStream, Reporter, VmId};
use crate::irq::{Routes, Vector};
use crate::memory::Memory;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A queue of a driver: its rings at `base`, one interrupt, one doorbell.
pub(crate) struct Driver {
    pub memory: Memory,
    pub size: u16,
    pub interrupt: Arc<Vector>,
    pub doorbell: EventFd,
    base: u64,
    event_idx: bool,
    next_descriptor: u16,
    avail: u16,
    used: u16,
}

impl Driver {
    pub fn new(memory: &Memory, base: u64, size: u16) -> Self {
        memory.write_slice(&vec![0; 0x4000], GuestAddress(base)).unwrap();
        Self {
            memory: memory.clone(),
            size,
            interrupt: Routes::new(None).vector().unwrap(),
            doorbell: EventFd::new(EFD_NONBLOCK).unwrap(),
            base,
            event_idx: false,
            next_descriptor: 0,
            avail: 0,
            used: 0,
        }
    }

    pub fn with_event_idx(mut self) -> Self {
        self.event_idx = true;
        self
    }

    /// What the transport would hand to the device.
    pub fn setup(&self) -> QueueSetup {
        QueueSetup {
            max_size: self.size,
            size: self.size,
            desc: self.base,
            avail: self.base + 0x2000,
            used: self.base + 0x3000,
            event_idx: self.event_idx,
            next_avail: 0,
            next_used: 0,
            doorbell: self.doorbell.try_clone().unwrap(),
            interrupt: Some(self.interrupt.clone()),
        }
    }

    pub fn queue(&self) -> Queue {
        Queue::new(self.setup(), &self.memory).unwrap()
    }

    /// Starts again from empty rings, as after a reset.
    pub fn reset(&mut self) {
        self.memory.write_slice(&[0; 0x4000], GuestAddress(self.base)).unwrap();
        (self.next_descriptor, self.avail, self.used) = (0, 0, 0);
    }

    pub fn descriptor(&self, table: u64, index: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let at = GuestAddress(table + 16 * u64::from(index));
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, at).unwrap();
    }

    pub fn table(&self) -> u64 {
        self.base
    }

    /// Makes a chain of `(address, length, flags)` available; the flag NEXT is added. Its head.
    pub fn send(&mut self, buffers: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_descriptor;
        for (i, &(addr, len, flags)) in buffers.iter().enumerate() {
            let index = (head + i as u16) % self.size;
            let last = i + 1 == buffers.len();
            let flags = if last { flags } else { flags | NEXT };
            self.descriptor(self.base, index, (addr, len, flags, (index + 1) % self.size));
        }
        self.next_descriptor = (head + buffers.len() as u16) % self.size;
        self.offer(head);
        head
    }

    /// Puts `head` into the available ring.
    pub fn offer(&mut self, head: u16) {
        let ring = self.base + 0x2000;
        let slot = ring + 4 + 2 * u64::from(self.avail % self.size);
        self.memory.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.set_avail(self.avail);
    }

    /// Claims that the available ring goes up to there.
    pub fn set_avail(&mut self, index: u16) {
        self.avail = index;
        self.memory.store(index.to_le(), GuestAddress(self.base + 0x2002), Ordering::Release).unwrap();
    }

    /// The next completion: head and length written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let ring = self.base + 0x3000;
        let index: u16 = self.memory.load(GuestAddress(ring + 2), Ordering::Acquire).unwrap();
        if u16::from_le(index) == self.used {
            return None;
        }
        let slot = ring + 4 + 8 * u64::from(self.used % self.size);
        let element: [u32; 2] = self.memory.read_obj(GuestAddress(slot)).unwrap();
        self.used = self.used.wrapping_add(1);
        if self.event_idx {
            // used_event: wake me at the next one.
            let at = self.base + 0x2000 + 4 + 2 * u64::from(self.size);
            self.memory.write_obj(self.used.to_le(), GuestAddress(at)).unwrap();
        }
        Some((element[0] as u16, element[1]))
    }

    /// Waits for a completion by a device on its own thread.
    pub fn wait_used(&mut self) -> (u16, u32) {
        for _ in 0..10_000 {
            if let Some(used) = self.take_used() {
                return used;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("nothing was completed within 10 s");
    }

    pub fn ring_doorbell(&self) {
        self.doorbell.write(1).unwrap();
    }

    pub fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

/// Signals of a device called `id`, and the stream that its events go to.
pub(crate) fn signals(id: &str) -> (Signals, EventStream) {
    let stream = EventStream::new().unwrap();
    (Signals::new(Reporter::new(VmId(1), stream.clone()).device(id)), stream)
}

/// What the transport hands to a device whose driver accepted `features`.
pub(crate) fn activation(features: u64, drivers: &[&Driver], signals: &Signals) -> Activation {
    Activation {
        features,
        memory: drivers[0].memory.clone(),
        queues: drivers.iter().map(|d| Some(d.queue())).collect(),
        signals: signals.clone(),
    }
}

/// Pseudo-random numbers that are the same at every run (xorshift).
pub(crate) struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.roll() % n
    }
}

/// Writes nonsense of the kind that breaks parsers into a ring: a few descriptors, the available ring,
/// its index.
pub(crate) fn bend(driver: &mut Driver, dice: &mut Dice) {
    let addresses = [0u64, 0x1000, 0x8000, 0xf_fff0, 0xf_ffff, 0x10_0000, 0xc000_0000, u64::MAX - 3];
    let lengths = [0u32, 1, 15, 16, 17, 512, 513, 4096, 65_550, u32::MAX];
    for _ in 0..=dice.below(5) {
        let index = dice.below(u64::from(driver.size)) as u16;
        let addr = addresses[dice.below(addresses.len() as u64) as usize];
        let addr = if dice.below(8) == 0 { driver.table() } else { addr };
        let len = lengths[dice.below(lengths.len() as u64) as usize];
        let next = dice.below(u64::from(driver.size) + 2) as u16;
        driver.descriptor(driver.table(), index, (addr, len, dice.below(8) as u16, next));
    }
    for _ in 0..=dice.below(4) {
        let beyond = u64::from(dice.below(20) == 0);
        let head = dice.below(u64::from(driver.size) + beyond) as u16;
        driver.offer(head);
    }
    if dice.below(200) == 0 {
        driver.set_avail(dice.roll() as u16);
    }
}
