#![forbid(unsafe_code)]
//! The host bridge and the ways to its bus: ECAM, the ports 0xcf8-0xcff, and the memory windows.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::Function;
use super::config::{ConfigSpace, Identity, SIZE};
use crate::bus::{Access, Device};
use crate::config::PciAddress;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock;

/// 32 devices with 8 functions each, numbered as in a routing ID.
const PLACES: usize = 32 * 8;
/// Where function 0 says that there are others.
const HEADER_TYPE: usize = 0x0e;
const MULTIFUNCTION: u8 = 0x80;
/// A host bridge that needs no driver (class 06.00).
const BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: [6, 0, 0],
    subsystem_vendor: 0,
    subsystem: 0,
};

/// Segment 0, bus 0.
pub(crate) struct Root {
    bridge: Mutex<ConfigSpace>,
    /// Index 0 is the bridge itself.
    functions: [Option<Arc<dyn Function>>; PLACES],
    /// Where BARs answer now.
    bars: RwLock<Vec<(Range<u64>, usize)>>,
    /// What was last written to port 0xcf8.
    address: AtomicU32,
}

impl Root {
    /// A bus with these functions. The configuration was validated: no place is taken twice.
    pub fn new(functions: Vec<(PciAddress, Arc<dyn Function>)>) -> Result<Arc<Self>> {
        let mut places = [const { None }; PLACES];
        for (address, function) in functions {
            match places.get_mut(address.index()) {
                Some(place @ None) if address.device != 0 => *place = Some(function),
                _ => {
                    let why = format!("PCI address {address} is taken or does not exist");
                    return Err(Error::new(ErrorKind::InvalidArgument, why));
                }
            }
        }
        let bridge = Mutex::new(ConfigSpace::new(BRIDGE));
        let (bars, address) = (RwLock::default(), AtomicU32::new(0));
        let root = Arc::new(Self { bridge, functions: places, bars, address });
        root.rebuild();
        Ok(root)
    }

    /// Reads configuration space of the function at `place`; all-ones where nobody is.
    fn read_config(&self, place: usize, offset: usize, data: &mut [u8]) {
        if offset >= SIZE {
            // Extended space: there, but empty.
            data.fill(if self.exists(place) { 0 } else { 0xff });
        } else if place == 0 {
            lock(&self.bridge).read(offset, data);
        } else if let Some(function) = self.functions.get(place).and_then(Option::as_ref) {
            function.read_config(offset, data);
            let others = place + 1..(place & !7) + 8;
            if place & 7 == 0
                && others.into_iter().any(|other| self.exists(other))
                && let Some(header_type) = HEADER_TYPE.checked_sub(offset).and_then(|at| data.get_mut(at))
            {
                *header_type |= MULTIFUNCTION;
            }
        } else {
            data.fill(0xff);
        }
    }

    fn write_config(&self, place: usize, offset: usize, data: &[u8]) {
        if offset >= SIZE {
            return;
        }
        if place == 0 {
            lock(&self.bridge).write(offset, data);
        } else if let Some(function) = self.functions.get(place).and_then(Option::as_ref) {
            let before = function.bar();
            function.write_config(offset, data);
            if function.bar() != before {
                self.rebuild();
            }
        }
    }

    fn exists(&self, place: usize) -> bool {
        place == 0 || self.functions.get(place).is_some_and(Option::is_some)
    }

    fn rebuild(&self) {
        let mut bars = self.bars.write().unwrap_or_else(PoisonError::into_inner);
        // Asked under the lock: of two vCPUs that move BARs at once, the last one sees both.
        let found = self.functions.iter().enumerate().filter_map(|(i, f)| Some((f.as_ref()?.bar()?, i)));
        *bars = found.collect();
    }

    /// Who answers all of `address..address + len`, and at which offset.
    fn find_bar(&self, address: u64, len: usize) -> Option<(&Arc<dyn Function>, u64)> {
        let end = address.checked_add(len as u64)?;
        let bars = self.bars.read().unwrap_or_else(PoisonError::into_inner);
        let (range, index) = bars.iter().find(|(r, _)| r.start <= address && end <= r.end)?;
        Some((self.functions.get(*index)?.as_ref()?, address - range.start))
    }
}

/// The memory-mapped configuration space (PCI Express Base, 7.2.2).
pub(crate) struct Ecam(pub Arc<Root>);

/// Place and register of an offset into the window; `None` for buses other than 0.
fn ecam_place(offset: u64) -> Option<(usize, usize)> {
    let (bus, place) = (offset >> 20, offset >> 12 & 0xff);
    (bus == 0).then_some((place as usize, (offset & 0xfff) as usize))
}

impl Device for Ecam {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        if let Some((place, register)) = ecam_place(access.offset) {
            self.0.read_config(place, register, data);
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        if let Some((place, register)) = ecam_place(access.offset) {
            self.0.write_config(place, register, data);
        }
        Ok(())
    }
}

/// Configuration mechanism 1: the address at 0xcf8, four bytes of data at 0xcfc.
pub(crate) struct ConfigPorts(pub Arc<Root>);

impl ConfigPorts {
    pub const BASE: u64 = 0xcf8;
    pub const LEN: u64 = 8;

    /// Place and register that an access to the data ports means; `None` where nothing is.
    fn place(&self, offset: u64) -> Option<(usize, usize)> {
        let address = self.0.address.load(Ordering::Relaxed);
        let (enabled, bus) = (address >> 31 == 1, address >> 16 & 0xff);
        let register = (address & 0xfc) as usize + (offset as usize & 3);
        (enabled && bus == 0).then_some(((address >> 8 & 0xff) as usize, register))
    }
}

impl Device for ConfigPorts {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        match access.offset {
            0 if data.len() == 4 => {
                data.copy_from_slice(&self.0.address.load(Ordering::Relaxed).to_le_bytes())
            }
            4.. => {
                if let Some((place, register)) = self.place(access.offset) {
                    self.0.read_config(place, register, data);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        match (access.offset, data) {
            // Only whole words address anything; bytes at 0xcf8-0xcfb belong to other hardware.
            (0, [a, b, c, d]) => {
                self.0.address.store(u32::from_le_bytes([*a, *b, *c, *d]), Ordering::Relaxed)
            }
            (4.., _) => {
                if let Some((place, register)) = self.place(access.offset) {
                    self.0.write_config(place, register, data);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// A range of guest-physical addresses in which BARs lie.
pub(crate) struct Window {
    pub root: Arc<Root>,
    pub base: u64,
}

impl Device for Window {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        if let Some((function, offset)) = self.root.find_bar(self.base + access.offset, data.len()) {
            function.read_bar(offset, data);
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        if let Some((function, offset)) = self.root.find_bar(self.base + access.offset, data.len()) {
            function.write_bar(offset, data);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function whose BAR remembers the last byte written.
    struct Plain(Mutex<(ConfigSpace, u8)>);

    impl Plain {
        fn new(at: u64) -> Arc<Self> {
            let mut space = ConfigSpace::new(Identity { device: 0x1234, ..BRIDGE });
            space.set_bar(&(at..at + 0x1000));
            Arc::new(Self(Mutex::new((space, 0))))
        }
    }

    impl Function for Plain {
        fn read_config(&self, offset: usize, data: &mut [u8]) {
            lock(&self.0).0.read(offset, data);
        }
        fn write_config(&self, offset: usize, data: &[u8]) {
            lock(&self.0).0.write(offset, data);
        }
        fn bar(&self) -> Option<Range<u64>> {
            lock(&self.0).0.bar()
        }
        fn read_bar(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write_bar(&self, _: u64, data: &[u8]) {
            lock(&self.0).1 = data[0];
        }
    }

    const BASE: u64 = 0xc000_0000;

    fn root() -> (Arc<Root>, Arc<Plain>) {
        let plain = Plain::new(BASE + 0x1000);
        (Root::new(vec![(PciAddress::new(3), plain.clone())]).unwrap(), plain)
    }

    fn read(device: &dyn Device, offset: u64, len: usize) -> u64 {
        let mut data = [0xff; 8];
        device.read(Access::at(offset), &mut data[..len]).unwrap();
        data[len..].fill(0);
        u64::from_le_bytes(data)
    }

    fn write(device: &dyn Device, offset: u64, data: &[u8]) {
        device.write(Access::at(offset), data).unwrap();
    }

    #[test]
    fn both_ways_reach_the_same_registers() {
        let (root, _) = root();
        let (ecam, ports) = (Ecam(root.clone()), ConfigPorts(root));
        assert_eq!(read(&ecam, 0, 4), 0x0008_1b36);
        assert_eq!(read(&ecam, 3 << 15, 4), 0x1234_1b36);
        write(&ports, 0, &(0x8000_0000u32 | 3 << 11).to_le_bytes());
        assert_eq!(read(&ports, 4, 4), 0x1234_1b36);
        assert_eq!(read(&ports, 6, 2), 0x1234);
        assert_eq!(read(&ports, 7, 1), 0x12);
        assert_eq!(read(&ports, 0, 4), 0x8000_1800);
    }

    #[test]
    fn nobody_there_reads_all_ones() {
        let (root, _) = root();
        let (ecam, ports) = (Ecam(root.clone()), ConfigPorts(root.clone()));
        assert_eq!(read(&ecam, 4 << 15, 4), 0xffff_ffff);
        assert_eq!(read(&ecam, 3 << 15 | 1 << 12, 4), 0xffff_ffff, "function 1");
        assert_eq!(read(&ecam, 3 << 15 | 0x100, 4), 0, "no extended capabilities");
        assert_eq!(read(&ecam, 4 << 15 | 0x100, 4), 0xffff_ffff);
        for address in [0u32, 0x8001_1800, 0x8000_1900, 3 << 11, 0x8000_2000] {
            write(&ports, 0, &address.to_le_bytes());
            assert_eq!(read(&ports, 4, 4), 0xffff_ffff, "{address:#x}");
            write(&ports, 4, &[0; 4]);
        }
        write(&ports, 1, &[0x80]);
        assert_eq!(read(&Window { root, base: BASE }, 0, 8), u64::MAX);
    }

    #[test]
    fn a_bar_answers_where_the_driver_puts_it() {
        let (root, plain) = root();
        let (ecam, window) = (Ecam(root.clone()), Window { root, base: BASE });
        assert_eq!(read(&window, 0x1002, 2), 0x0202);
        write(&ecam, 3 << 15 | 0x10, &(BASE as u32 + 0x5000).to_le_bytes());
        assert_eq!((read(&window, 0x1002, 1), read(&window, 0x5003, 1)), (0xff, 3));
        assert_eq!(read(&window, 0x5ffe, 4), 0xffff_ffff, "across its end");
        write(&window, 0x5000, &[9]);
        assert_eq!(lock(&plain.0).1, 9);
        write(&ecam, 3 << 15 | 4, &[0]);
        assert_eq!(read(&window, 0x5003, 1), 0xff, "decoding is off");
    }

    #[test]
    fn functions_of_one_device_are_found_by_its_first() {
        let at = |function| (PciAddress { device: 3, function }, Plain::new(0) as Arc<dyn Function>);
        let root = Root::new(vec![at(0), at(7), (PciAddress::new(4), Plain::new(0) as _)]).unwrap();
        let ecam = Ecam(root);
        let header = |place: u64| read(&ecam, place << 12 | 0x0e, 1);
        assert_eq!((header(3 << 3), header(3 << 3 | 7), header(4 << 3)), (0x80, 0, 0));
        assert_eq!((read(&ecam, 3 << 15 | 0x0c, 4) >> 16, read(&ecam, 3 << 15 | 0x0f, 1)), (0x80, 0));
        assert_eq!(read(&ecam, 3 << 15 | 6 << 12, 4), 0xffff_ffff);
    }

    #[test]
    fn a_place_is_taken_once() {
        let functions = || (PciAddress::new(3), Plain::new(0) as Arc<dyn Function>);
        assert!(Root::new(vec![functions(), functions()]).is_err());
        assert!(Root::new(vec![(PciAddress::new(0), Plain::new(0) as Arc<dyn Function>)]).is_err());
        assert!(Root::new(vec![(PciAddress::new(32), Plain::new(0) as Arc<dyn Function>)]).is_err());
    }
}
