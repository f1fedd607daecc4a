#![forbid(unsafe_code)]
//! A machine without a KVM, for tests: guest memory, a PCI bus with virtio devices, and what a driver
//! does to find and to drive them. Everything passes through the buses, as a guest's accesses do.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::queue_driver::Driver;
use super::transport::pci::BAR_SIZE;
use super::transport::{Bells, Doorbells, VirtioPci};
use super::{Signals, VirtioDevice};
use crate::bus::Bus;
use crate::config::PciAddress;
use crate::events::{EventStream, Reporter, VmId};
use crate::irq::Routes;
use crate::memory::{Memory, layout};
use crate::pci::{ConfigPorts, Ecam, Function, Root, Window};

pub(crate) mod echo;
pub(crate) mod independent;

pub(crate) const ACKNOWLEDGE: u8 = 1;
pub(crate) const DRIVER: u8 = 2;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const NEEDS_RESET: u8 = 0x40;
pub(crate) const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// Guest memory and a PCI bus whose functions are virtio devices, at 00:01.0 and on.
pub(crate) struct Machine {
    pub memory: Memory,
    pub mmio: Bus,
    pub pio: Bus,
    pub functions: Vec<Arc<VirtioPci>>,
    pub events: EventStream,
    bells: Arc<Bells>,
}

impl Machine {
    pub fn new(memory: &Memory, devices: Vec<Box<dyn VirtioDevice>>) -> Arc<Self> {
        let events = EventStream::new().unwrap();
        let reporter = Reporter::new(VmId(1), events.clone());
        let (routes, doorbells) = (Routes::new(None), Doorbells::new(None));
        let Doorbells::Memory(bells) = &doorbells else { panic!("no KVM was given") };
        let bells = bells.clone();
        let make = |(i, device): (usize, Box<dyn VirtioDevice>)| {
            let start = layout::PCI_MMIO32.start + (i as u64 + 1) * BAR_SIZE;
            let signals = Signals::new(reporter.device(device.id()));
            let bar = start..start + BAR_SIZE;
            VirtioPci::new(device, &bar, memory, signals, &routes, doorbells.clone()).unwrap()
        };
        let functions: Vec<_> = devices.into_iter().enumerate().map(make).collect();
        let placed = functions
            .iter()
            .enumerate()
            .map(|(i, function)| (PciAddress::new(i as u8 + 1), function.clone() as Arc<dyn Function>));
        let root = Root::new(placed.collect()).unwrap();
        let (mut mmio, mut pio) = (Bus::default(), Bus::default());
        let len = layout::ECAM.end - layout::ECAM.start;
        mmio.insert("ecam", layout::ECAM.start, len, Arc::new(Ecam(root.clone()))).unwrap();
        for window in [layout::PCI_MMIO32, layout::pci_mmio64(memory.size())] {
            let device = Arc::new(Window { root: root.clone(), base: window.start });
            mmio.insert("window", window.start, window.end - window.start, device).unwrap();
        }
        pio.insert("ports", ConfigPorts::BASE, ConfigPorts::LEN, Arc::new(ConfigPorts(root))).unwrap();
        Arc::new(Self { memory: memory.clone(), mmio, pio, functions, events, bells })
    }

    pub fn read(&self, address: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.mmio.read(address, 0, &mut data[..len]).unwrap();
        u64::from_le_bytes(data)
    }

    /// Writes as a vCPU does: an armed doorbell takes the write, and no device sees it.
    pub fn write(&self, address: u64, len: usize, value: u64) {
        if !self.bells.ring(address) {
            self.mmio.write(address, 0, &value.to_le_bytes()[..len]).unwrap();
        }
    }

    /// The addresses of the armed doorbells.
    pub fn armed(&self) -> Vec<u64> {
        self.bells.armed()
    }

    /// Configuration space of device `device`.
    pub fn config(&self, device: u8, register: u64, len: usize) -> u64 {
        self.read(ecam(device, register), len)
    }

    pub fn set_config(&self, device: u8, register: u64, len: usize, value: u64) {
        self.write(ecam(device, register), len, value);
    }
}

fn ecam(device: u8, register: u64) -> u64 {
    layout::ECAM.start + (u64::from(device) << 15) + register
}

/// A driver's view of one device: where its structures are.
pub(crate) struct Registers {
    pub machine: Arc<Machine>,
    pub device: u8,
    pub bar: u64,
    pub common: u64,
    pub notify: u64,
    pub notify_stride: u64,
    pub isr: u64,
    pub config: u64,
    /// In configuration space.
    pub msix: u64,
    /// In configuration space.
    pub window: u64,
    pub table: u64,
    pub pending: u64,
}

impl Registers {
    /// Walks the capabilities of device `device`.
    pub fn find(machine: &Arc<Machine>, device: u8) -> Self {
        let config = |at, len| machine.config(device, at, len);
        assert_eq!(config(0, 2), 0x1af4, "a virtio device");
        let bar = config(0x10, 4) & !0xf | config(0x14, 4) << 32;
        let mut found = Self {
            machine: machine.clone(),
            device,
            bar,
            common: 0,
            notify: 0,
            notify_stride: 0,
            isr: 0,
            config: 0,
            msix: 0,
            window: 0,
            table: 0,
            pending: 0,
        };
        let mut at = config(0x34, 1);
        while at != 0 {
            match (config(at, 1), config(at + 3, 1)) {
                (9, 1) => found.common = bar + config(at + 8, 4),
                (9, 2) => {
                    found.notify = bar + config(at + 8, 4);
                    found.notify_stride = config(at + 16, 4);
                }
                (9, 3) => found.isr = bar + config(at + 8, 4),
                (9, 4) => found.config = bar + config(at + 8, 4),
                (9, 5) => found.window = at,
                (0x11, _) => {
                    found.msix = at;
                    found.table = bar + (config(at + 4, 4) & !7);
                    found.pending = bar + (config(at + 8, 4) & !7);
                }
                (id, kind) => panic!("capability {id:#x} {kind}"),
            }
            at = config(at + 1, 1);
        }
        found
    }

    /// A register of the common configuration.
    pub fn get(&self, register: u64, len: usize) -> u64 {
        self.machine.read(self.common + register, len)
    }

    pub fn set(&self, register: u64, len: usize, value: u64) {
        self.machine.write(self.common + register, len, value);
    }

    pub fn status(&self) -> u8 {
        self.get(0x14, 1) as u8
    }

    pub fn set_status(&self, status: u8) {
        self.set(0x14, 1, status.into());
    }

    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.set(0x00, 4, select);
            self.get(0x04, 4)
        };
        half(0) | half(1) << 32
    }

    pub fn accept(&self, features: u64) {
        for half in 0..2 {
            self.set(0x08, 4, half);
            self.set(0x0c, 4, features >> (32 * half) & 0xffff_ffff);
        }
    }

    /// Everything up to FEATURES_OK. Whether the device agrees.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set_status(0);
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        self.accept(features);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    /// Sets queue `index` up, with MSI-X entry `vector`.
    pub fn set_queue(&self, index: u16, rings: &Driver, vector: u16) {
        let setup = rings.setup();
        self.set(0x16, 2, index.into());
        self.set(0x18, 2, setup.size.into());
        self.set(0x1a, 2, vector.into());
        for (register, address) in [(0x20, setup.desc), (0x28, setup.avail), (0x30, setup.used)] {
            self.set(register, 4, address & 0xffff_ffff);
            self.set(register + 4, 4, address >> 32);
        }
        self.set(0x1c, 2, 1);
    }

    /// The whole way to DRIVER_OK, with an interrupt for each queue and one for the configuration.
    pub fn start(&self, features: u64, queues: &[&Driver]) {
        assert!(self.negotiate(features), "features refused");
        self.enable_msix(queues.len() as u16 + 1);
        self.set(0x10, 2, 0);
        for (index, rings) in queues.iter().enumerate() {
            self.set_queue(index as u16, rings, index as u16 + 1);
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Opens the first `count` entries of the MSI-X table.
    pub fn enable_msix(&self, count: u16) {
        for entry in (0..u64::from(count)).map(|i| self.table + 16 * i) {
            self.machine.write(entry, 8, 0xfee0_0000);
            self.machine.write(entry + 8, 4, 0x40);
            self.machine.write(entry + 12, 4, 0);
        }
        self.machine.set_config(self.device, self.msix + 2, 2, 1 << 15);
    }

    /// Where queue `index`'s doorbell is.
    pub fn doorbell(&self, index: u16) -> u64 {
        self.set(0x16, 2, index.into());
        self.notify + self.get(0x1e, 2) * self.notify_stride
    }

    pub fn ring(&self, index: u16) {
        self.machine.write(self.doorbell(index), 2, index.into());
    }

    /// How often MSI-X entry `index` was raised since the last call.
    pub fn raised(&self, index: u16) -> u64 {
        let function = &self.machine.functions[usize::from(self.device) - 1];
        function.vector(index).unwrap().take_raised()
    }
}
