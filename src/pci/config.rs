#![forbid(unsafe_code)]
//! A type-0 configuration space: bytes, and which bits of them a driver may change.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};

pub(crate) const SIZE: usize = 256;

/// Offsets of the registers that we use (PCI Local Bus 3.0, 6.1).
mod register {
    pub(super) const VENDOR: usize = 0x00;
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const CACHE_LINE: usize = 0x0c;
    pub(super) const BAR0: usize = 0x10;
    pub(super) const SUBSYSTEM: usize = 0x2c;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
    pub(super) const FIRST_CAPABILITY: usize = 0x40;
}

const COMMAND_MEMORY: u8 = 1 << 1;
/// Memory, bus master, INTx disable: what a driver may switch. Only the first changes anything: devices
/// reach memory through the queues that a driver has given them, and have no INTx.
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 10;
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// A 64-bit, non-prefetchable memory BAR.
const BAR_MEMORY_64: u8 = 0b100;

/// Who a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Class, subclass, programming interface.
    pub class: [u8; 3],
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// The configuration space of one function. Plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bar_size: u64,
    next_capability: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_size: 0,
            next_capability: register::FIRST_CAPABILITY,
            last_pointer: register::CAPABILITIES,
        };
        let [class, subclass, interface] = identity.class;
        space.set(register::VENDOR, &identity.vendor.to_le_bytes());
        space.set(register::VENDOR + 2, &identity.device.to_le_bytes());
        space.set(register::REVISION, &[identity.revision, interface, subclass, class]);
        space.set(register::SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        space.set(register::SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        space.allow(register::COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.allow(register::CACHE_LINE, &[0xff]);
        space.allow(register::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Gives the function its BAR 0, 64 bits wide, at `range`. The length is a power of two, and the start
    /// a multiple of it.
    ///
    /// It is decoded from the start, as firmware leaves it: an operating system takes such a place over
    /// instead of finding one, and need not switch it on.
    pub fn set_bar(&mut self, range: &Range<u64>) {
        self.bar_size = range.end - range.start;
        self.set(register::BAR0, &range.start.to_le_bytes());
        self.bytes[register::BAR0] |= BAR_MEMORY_64;
        // A driver learns the size from the bits that stay zero when it writes ones.
        self.allow(register::BAR0, &(!(self.bar_size - 1)).to_le_bytes());
        self.bytes[register::COMMAND] |= COMMAND_MEMORY;
    }

    /// Where BAR 0 answers, if memory decoding is on and the driver has put it somewhere.
    pub fn bar(&self) -> Option<Range<u64>> {
        if self.bar_size == 0 || self.bytes[register::COMMAND] & COMMAND_MEMORY == 0 {
            return None;
        }
        let base = u64::from_le_bytes(*self.bytes[register::BAR0..].first_chunk()?) & !0xf;
        let end = base.checked_add(self.bar_size)?;
        (base != 0).then_some(base..end)
    }

    /// Appends a capability: its id, then `body` with the bits of it that a driver may change. Returns
    /// its offset.
    ///
    /// # Errors
    /// The space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<usize> {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        if end > SIZE || writable.len() > body.len() {
            return Err(Error::new(ErrorKind::Internal, format!("no room for PCI capability {id:#x}")));
        }
        self.bytes[self.last_pointer] = at as u8;
        self.bytes[register::STATUS] |= STATUS_CAPABILITIES;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        self.last_pointer = at + 1;
        self.next_capability = end.next_multiple_of(4);
        Ok(at)
    }

    /// Reads from `offset`; zeroes past the end.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(i).and_then(|at| self.bytes.get(at)).copied().unwrap_or(0);
        }
    }

    /// Changes the writable bits.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..SIZE).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0x80, 0],
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        space.set_bar(&(0xc000_0000..0xc000_8000));
        space
    }

    fn dword(space: &ConfigSpace, at: usize) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_driver_sizes_and_moves_the_bar() {
        let mut space = space();
        assert_eq!(dword(&space, 0), 0x1042_1af4);
        assert_eq!(dword(&space, 8), 0x0180_0001);
        assert_eq!(space.bar(), Some(0xc000_0000..0xc000_8000));
        space.write(0x10, &[0xff; 8]);
        assert_eq!((dword(&space, 0x10), dword(&space, 0x14)), (0xffff_8004, u32::MAX));
        assert_eq!(space.bar(), None, "the end wraps: it answers nowhere");
        space.write(0x10, &0x1_d000_0000u64.to_le_bytes());
        assert_eq!(space.bar(), Some(0x1_d000_0000..0x1_d000_8000));
        space.write(4, &[0, 0]);
        assert_eq!(space.bar(), None);
    }

    #[test]
    fn what_is_read_only_stays() {
        let mut space = space();
        let before = space.clone();
        for at in (0..4).chain(5..12).chain(0x18..0x3c) {
            space.write(at, &[0xff]);
        }
        space.write(5, &[0]);
        assert_eq!(space, before);
    }

    #[test]
    fn capabilities_are_chained_and_end() {
        let mut space = space();
        let first = space.add_capability(9, &[7; 14], &[]).unwrap();
        let second = space.add_capability(0x11, &[3, 0], &[0, 0xc0]).unwrap();
        assert_eq!((dword(&space, 0x34) & 0xff, first), (0x40, 0x40));
        assert_eq!(dword(&space, first) & 0xffff, 0x5009);
        assert_eq!((second, dword(&space, second) & 0xffff), (0x50, 0x0011));
        space.write(second + 2, &[0xff, 0xff]);
        assert_eq!(dword(&space, second) >> 16, 0xc003);
        assert!(space.add_capability(9, &[0; 200], &[]).is_err());
    }

    #[test]
    fn accesses_past_the_end_do_nothing() {
        let mut space = space();
        space.write(254, &[1; 8]);
        space.write(usize::MAX, &[1; 8]);
        let mut data = [1; 8];
        space.read(usize::MAX - 2, &mut data);
        space.read(SIZE, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
