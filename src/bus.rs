#![forbid(unsafe_code)]
//! Port-I/O and MMIO dispatch: which device answers at an address.
//!
//! A bus is filled while a VM is built and never changes afterwards, so that vCPUs look addresses up
//! without a lock. What moves at run time (PCI BARs) lies behind one fixed window.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

/// Where in a device an access goes, and which vCPU makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Access {
    /// Bytes from the start of the range that the device was registered with.
    pub offset: u64,
    /// The index of the vCPU whose instruction this is.
    pub vcpu: u32,
}

impl Access {
    /// An access at `offset`, by vCPU 0: for tests of devices without a VM.
    pub fn at(offset: u64) -> Self {
        Self { offset, vcpu: 0 }
    }
}

/// A port-I/O or MMIO device: the place where an embedder plugs in hardware of its own.
///
/// The VM calls it on the thread of the vCPU whose instruction touched the device's range; that vCPU
/// waits for the answer, the others go on and may call at the same time. Accesses never cross the end
/// of the registered range. Widths are what the guest used: 1, 2 or 4 bytes for ports, 1 to 8 for MMIO,
/// little-endian; a string instruction (`rep outsb`) arrives as single accesses in order.
///
/// An `Err` or a panic stops this VM with [`StopCause::DeviceFault`](crate::StopCause::DeviceFault);
/// other VMs and the process go on.
/// The methods may call the VM's non-blocking functions ([`Vm::request_stop`](crate::Vm::request_stop)),
/// but must not wait for this VM to pause or end: it cannot while they run.
pub trait Device: Send + Sync {
    /// The guest reads `data.len()` bytes; `data` holds all-ones on entry.
    ///
    /// # Errors
    /// Any error stops the VM.
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()>;

    /// The guest writes `data`.
    ///
    /// # Errors
    /// Any error stops the VM.
    fn write(&self, access: Access, data: &[u8]) -> Result<()>;
}

/// One device's place on a bus.
pub(crate) struct Range {
    pub base: u64,
    /// The last address that belongs to the device (inclusive: a range may end at the very top).
    pub last: u64,
    pub name: Arc<str>,
    pub device: Arc<dyn Device>,
}

/// A set of devices at addresses that do not overlap.
#[derive(Default)]
pub(crate) struct Bus {
    /// Sorted by base.
    ranges: Vec<Range>,
}

impl Bus {
    /// Puts `device` at `base..base + len`.
    pub fn insert(&mut self, name: &str, base: u64, len: u64, device: Arc<dyn Device>) -> Result<()> {
        let invalid = |why: String| Err(Error::new(ErrorKind::InvalidArgument, why));
        let Some(last) = len.checked_sub(1).and_then(|l| base.checked_add(l)) else {
            return invalid(format!("device '{name}' at {base:#x}: a length of {len:#x} is empty or wraps"));
        };
        let at = self.ranges.partition_point(|r| r.base < base);
        let left = at.checked_sub(1).and_then(|i| self.ranges.get(i)).filter(|r| r.last >= base);
        if let Some(other) = left.or(self.ranges.get(at).filter(|r| r.base <= last)) {
            return invalid(format!(
                "device '{name}' at {base:#x}-{last:#x} overlaps '{}' at {:#x}-{:#x}",
                other.name, other.base, other.last
            ));
        }
        self.ranges.insert(at, Range { base, last, name: name.into(), device });
        Ok(())
    }

    /// The index of the range that holds all of `addr..addr + len`.
    #[inline]
    pub fn find(&self, addr: u64, len: usize) -> Option<usize> {
        let index = self.ranges.partition_point(|r| r.base <= addr).checked_sub(1)?;
        self.range(index)?.holds(addr, len).then_some(index)
    }

    #[inline]
    pub fn range(&self, index: usize) -> Option<&Range> {
        self.ranges.get(index)
    }

    /// The name of the device that answers there.
    pub fn name_at(&self, addr: u64, len: usize) -> Option<String> {
        self.find(addr, len).and_then(|i| self.range(i)).map(|r| r.name.to_string())
    }

    /// Reads through the bus: all-ones where nothing answers. For callers without a vCPU's own cache.
    #[cfg(any(test, feature = "internals"))]
    pub fn read(&self, addr: u64, vcpu: u32, data: &mut [u8]) -> Result<()> {
        data.fill(0xff);
        match self.find(addr, data.len()).and_then(|i| self.range(i)) {
            Some(r) => r.device.read(Access { offset: addr - r.base, vcpu }, data),
            None => Ok(()),
        }
    }

    /// Writes through the bus: nowhere where nothing answers.
    #[cfg(any(test, feature = "internals"))]
    pub fn write(&self, addr: u64, vcpu: u32, data: &[u8]) -> Result<()> {
        match self.find(addr, data.len()).and_then(|i| self.range(i)) {
            Some(r) => r.device.write(Access { offset: addr - r.base, vcpu }, data),
            None => Ok(()),
        }
    }
}

impl Range {
    /// Whether `addr..addr + len` lies in this range. `len` is at least 1.
    #[inline]
    pub fn holds(&self, addr: u64, len: usize) -> bool {
        addr >= self.base && addr <= self.last && self.last - addr >= (len as u64).wrapping_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Device for Log {
        fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
            data.fill(access.offset as u8);
            Ok(())
        }
        fn write(&self, access: Access, data: &[u8]) -> Result<()> {
            self.0.lock().unwrap().push((access.offset, data.to_vec()));
            Ok(())
        }
    }

    fn bus() -> (Bus, Arc<Log>) {
        let log = Arc::new(Log::default());
        let mut bus = Bus::default();
        bus.insert("b", 0x200, 0x10, log.clone()).unwrap();
        bus.insert("a", 0x100, 0x10, log.clone()).unwrap();
        bus.insert("top", u64::MAX - 7, 8, log.clone()).unwrap();
        (bus, log)
    }

    #[test]
    fn an_access_reaches_its_device_with_the_offset() {
        let (bus, log) = bus();
        bus.write(0x204, 0, &[1, 2]).unwrap();
        assert_eq!(*log.0.lock().unwrap(), [(4, vec![1, 2])]);
        let mut data = [0; 8];
        bus.read(u64::MAX - 7, 0, &mut data).unwrap();
        assert_eq!(data, [0; 8]);
    }

    #[test]
    fn nobody_there_and_across_the_end_read_all_ones() {
        let (bus, log) = bus();
        for (addr, len) in [(0, 1), (0x110, 1), (0x10e, 4), (0xff, 2), (u64::MAX, 2), (u64::MAX - 3, 8)] {
            let mut data = vec![0; len];
            bus.read(addr, 0, &mut data).unwrap();
            assert!(data.iter().all(|b| *b == 0xff), "{addr:#x}+{len}");
            bus.write(addr, 0, &data).unwrap();
        }
        assert!(log.0.lock().unwrap().is_empty());
    }

    #[test]
    fn overlaps_and_empty_ranges_are_refused_by_name() {
        let (mut bus, log) = bus();
        for (base, len) in [(0x100, 1), (0x10f, 1), (0xf0, 0x11), (0x80, 0x1000), (0x300, 0), (u64::MAX, 2)] {
            let error = bus.insert("new", base, len, log.clone()).unwrap_err();
            assert!(error.to_string().contains("'new'"), "{error}");
        }
        bus.insert("between", 0x110, 0xf0, log).unwrap();
    }
}
