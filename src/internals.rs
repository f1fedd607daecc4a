#![forbid(unsafe_code)]
//! The crate's parts without a KVM and without threads, for this project's own tests, fuzz targets and
//! benches. Behind the feature `internals`; nothing here is stable, and nothing here is for embedders.
//!
//! [`Board`] is a PC's devices around guest memory: what a guest can reach is reached through
//! [`Board::read_mmio`] and its like, and devices work when [`Board::process`] is called, on the caller's
//! thread. [`driver`] is a driver that knows registers and guest memory only.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use crate::block::{Backend, RawDisk};
use crate::bus::Bus;
use crate::config::{BalloonConfig, DiskConfig, MacAddress, NetConfig, PciAddress};
use crate::console::Console;
use crate::error::{Error, ErrorKind, Result};
use crate::events::{EventStream, Reporter, StopLine, VmId};
use crate::ioapic::Ioapic;
use crate::irq::Routes;
use crate::legacy::{Cmos, I8042, Power, PvPanic, Serial, ports};
use crate::memory::{Memory, layout};
use crate::net::pair::Pair;
use crate::net::switch::SwitchPort;
use crate::net::{NetBackend, Tap};
use crate::pci::{ConfigPorts, Ecam, Function, Root, Window};
use crate::reactor::{EventLoop, Place};
use crate::sys::lock;
use crate::virtio::Signals;
use crate::virtio::balloon::{self, BalloonStatistics};
use crate::virtio::blk::Blk;
use crate::virtio::console::ConsolePort;
use crate::virtio::net::{self, Net, NetStatistics};
use crate::virtio::rng::Rng;
use crate::virtio::transport::pci::BAR_SIZE;
use crate::virtio::transport::{Bells, Doorbells, VirtioPci};

mod bench;
mod bus;
pub mod driver;
mod interrupts;
mod kernel;
mod ledger;
mod rate;
mod ring;
pub mod sandbox;
mod served;

pub use bench::{BenchBus, BenchQueue, BenchSwitch};
pub use bus::{BareBus, BusExit};
/// What structures of C's have become.
pub mod crossed {
    pub use crate::capi::crossed::{FORMS, Form, config, host, port_options};
}
pub use interrupts::{BareIoapic, BareMsix, IOAPIC_PINS};
pub use kernel::{Loaded, load_kernel};
pub use ledger::{Accounts, FreeMemory, HostTerms, PlacementInventory, PlacementLedger, Promises, VmTerms};
pub use rate::Bucket;
pub use ring::{BareQueue, RingSetup, Taken};
use served::{Device, Handle};

/// Where the memory-mapped configuration space is.
pub const ECAM: Range<u64> = layout::ECAM;
/// Where BARs may lie below 4 GiB.
pub const WINDOW: Range<u64> = layout::PCI_MMIO32;
/// The size of a virtio device's BAR.
pub const BAR: u64 = BAR_SIZE;

/// A virtio device to put on a board.
#[derive(Debug)]
pub enum Part {
    /// A disk with the bytes of that file.
    Disk {
        /// What holds the bytes.
        file: File,
        /// Whether writes are refused.
        readonly: bool,
    },
    /// A disk as a VM has it, on the file that it names.
    Configured(DiskConfig),
    /// The same, served by a thread of its own.
    Threaded(DiskConfig),
    /// A network card; [`Board::network`] is the other end of its cable. One for each board.
    Net,
    /// A card on that queue of a TAP interface.
    Tap(OwnedFd),
    /// A card on that port of a switch.
    Port(SwitchPort),
    /// A source of random numbers.
    Rng,
    /// A console port; [`Board::output`] and [`Board::input`] are its other end, and without it the
    /// serial port's.
    Console,
    /// A balloon with everything; [`Board::balloon`] says what it has moved. One for each board.
    Balloon,
}

impl Part {
    fn id(&self) -> &'static str {
        match self {
            Self::Disk { .. } | Self::Configured(_) | Self::Threaded(_) => "disk",
            Self::Net | Self::Tap(_) | Self::Port(_) => "net",
            Self::Rng => "rng",
            Self::Console => "console",
            Self::Balloon => "balloon",
        }
    }
}

/// Guest memory and a PC's devices: PCI functions from 00:01.0 on, and those at fixed ports.
pub struct Board {
    memory: Memory,
    mmio: Bus,
    pio: Bus,
    functions: Vec<Arc<VirtioPci>>,
    devices: Vec<Handle>,
    bells: Arc<Bells>,
    events: EventStream,
    console: Console,
    /// The console is behind a virtio device, not behind the serial port.
    port: bool,
    network: Option<Arc<UnixDatagram>>,
    cards: Vec<Arc<net::Control>>,
    balloon: Option<Arc<balloon::Control>>,
    stops: Arc<Mutex<Vec<String>>>,
}

fn opened(id: &str, config: &DiskConfig) -> Result<Box<dyn Backend>> {
    crate::block::open(id, config.path.as_deref().unwrap_or(Path::new("")), config)
}

impl Board {
    /// A board with `size` bytes of memory and these devices, the first at 00:01.0.
    ///
    /// # Errors
    /// The host is out of something, or the file is no disk.
    pub fn new(size: u64, parts: Vec<Part>) -> Result<Self> {
        let memory = Memory::new(size)?;
        let events = EventStream::new()?;
        let reporter = Reporter::new(VmId(1), events.clone());
        let (routes, bells) = (Routes::new(None), Arc::<Bells>::default());
        let mut board = Self {
            memory,
            mmio: Bus::default(),
            pio: Bus::default(),
            functions: Vec::new(),
            devices: Vec::new(),
            bells,
            events,
            console: Console::new(),
            port: false,
            network: None,
            cards: Vec::new(),
            balloon: None,
            stops: Arc::default(),
        };
        let mut functions: Vec<(_, Arc<dyn Function>)> = Vec::new();
        for (part, device) in parts.into_iter().zip(1u8..) {
            let id = part.id();
            let signals = Signals::new(reporter.device(id));
            let (handle, served) = Handle::new(id, board.make(part, &signals)?);
            let start = WINDOW.start + u64::from(device) * BAR;
            let doorbells = Doorbells::Memory(board.bells.clone());
            let bar = start..start + BAR;
            let function =
                VirtioPci::new(Box::new(served), &bar, &board.memory, signals, &routes, doorbells)?;
            board.devices.push(handle);
            board.functions.push(function.clone());
            functions.push((PciAddress::new(device), function));
        }
        board.add_pci(&Root::new(functions)?)?;
        board.add_legacy(&routes)?;
        Ok(board)
    }

    fn make(&mut self, part: Part, signals: &Signals) -> Result<Device> {
        let id = part.id();
        Ok(match part {
            Part::Disk { file, readonly } => {
                let backend = Box::new(RawDisk::plain(id, file, readonly)?);
                Device::Blk(Blk::simple(id, "serial-1", backend, Place::Caller))
            }
            Part::Configured(config) => {
                Device::Blk(Blk::simple(id, "serial-1", opened(id, &config)?, Place::Caller))
            }
            Part::Threaded(config) => {
                let event_loop = EventLoop::start(id, |body| Ok(std::thread::spawn(body)))?;
                let stops = self.stops.clone();
                let stop = StopLine::new(move |cause| lock(&stops).push(format!("{cause:?}")));
                let place = Place::Loop(event_loop, stop);
                Device::Blk(Blk::simple(id, "serial-1", opened(id, &config)?, place))
            }
            Part::Net => {
                let (pair, control) = Pair::open().map_err(|e| Error::os("making a socket pair", e))?;
                self.network = Some(control.far);
                self.card(id, Box::new(pair))
            }
            Part::Tap(queue) => self.card(id, Box::new(Tap::adopt(id, queue)?)),
            Part::Port(port) => self.card(id, Box::new(port.plug()?)),
            Part::Rng => Device::Rng(Rng::new(id, Place::Caller)),
            Part::Console => {
                self.port = true;
                Device::Console(ConsolePort::new(id, self.console.clone(), Place::Caller)?)
            }
            Part::Balloon => {
                let control = Arc::new(balloon::Control::new(id, self.memory.size(), signals.clone())?);
                self.balloon = Some(control.clone());
                let config = BalloonConfig { hinting: true, ..BalloonConfig::default() };
                Device::Balloon(balloon::Balloon::new(id, &config, control, Place::Caller))
            }
        })
    }

    fn card(&mut self, id: &str, backend: Box<dyn NetBackend>) -> Device {
        let mac = MacAddress([2, 0, 0, 0, 0, 1]);
        let control = Arc::new(net::Control::new(id, mac, &NetConfig::attached(), None));
        self.cards.push(control.clone());
        Device::Net(Net::new(control, vec![(backend, Place::Caller)]))
    }

    fn add_pci(&mut self, root: &Arc<Root>) -> Result<()> {
        self.mmio.insert("ecam", ECAM.start, ECAM.end - ECAM.start, Arc::new(Ecam(root.clone())))?;
        for window in [WINDOW, layout::pci_mmio64(self.memory.size())] {
            let device = Arc::new(Window { root: root.clone(), base: window.start });
            self.mmio.insert("window", window.start, window.end - window.start, device)?;
        }
        let ports = Arc::new(ConfigPorts(root.clone()));
        self.pio.insert("pci config", ConfigPorts::BASE, ConfigPorts::LEN, ports)
    }

    fn add_legacy(&mut self, routes: &Arc<Routes>) -> Result<()> {
        let ioapic = Ioapic::new(routes.clone());
        let at = layout::IOAPIC;
        self.mmio.insert("ioapic", at.start, at.end - at.start, ioapic.clone())?;
        let stops = self.stops.clone();
        let stop = StopLine::new(move |cause| lock(&stops).push(format!("{cause:?}")));
        // As in a VM, one of the two has the console.
        let console = if self.port { Console::new() } else { self.console.clone() };
        let serial = Serial::new(console, ioapic.line(ports::COM1_GSI as u8));
        let power = Arc::new(Power::new(stop.clone(), ioapic.line(ports::GED_GSI as u8)));
        let pio = &mut self.pio;
        pio.insert("serial", ports::COM1.into(), ports::COM1_LEN.into(), serial)?;
        pio.insert("cmos", ports::CMOS.into(), ports::CMOS_LEN.into(), Arc::new(Cmos::default()))?;
        let keyboard = Arc::new(I8042::new(stop.clone()));
        pio.insert("i8042", ports::I8042.into(), ports::I8042_LEN.into(), keyboard)?;
        pio.insert("pvpanic", ports::PVPANIC.into(), 1, Arc::new(PvPanic::new(stop)))?;
        pio.insert("power", ports::POWER.into(), ports::POWER_LEN.into(), power)
    }

    /// A vCPU reads guest-physical address space outside RAM.
    ///
    /// # Errors
    /// The device at fault stops the VM.
    pub fn read_mmio(&self, address: u64, data: &mut [u8]) -> Result<()> {
        self.mmio.read(address, 0, data)
    }

    /// A vCPU writes there. As in the kernel, an armed doorbell takes the write and no device sees it.
    ///
    /// # Errors
    /// The device at fault stops the VM.
    pub fn write_mmio(&self, address: u64, data: &[u8]) -> Result<()> {
        if self.bells.ring(address) { Ok(()) } else { self.mmio.write(address, 0, data) }
    }

    /// A vCPU reads a port.
    ///
    /// # Errors
    /// The device at fault stops the VM.
    pub fn read_pio(&self, port: u16, data: &mut [u8]) -> Result<()> {
        self.pio.read(port.into(), 0, data)
    }

    /// A vCPU writes a port.
    ///
    /// # Errors
    /// The device at fault stops the VM.
    pub fn write_pio(&self, port: u16, data: &[u8]) -> Result<()> {
        self.pio.write(port.into(), 0, data)
    }

    /// Reads RAM.
    ///
    /// # Errors
    /// It is not all RAM.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) -> Result<()> {
        self.memory.read_slice(data, GuestAddress(address)).map_err(|e| outside(address, e))
    }

    /// Writes RAM.
    ///
    /// # Errors
    /// It is not all RAM.
    pub fn write_memory(&self, address: u64, data: &[u8]) -> Result<()> {
        self.memory.write_slice(data, GuestAddress(address)).map_err(|e| outside(address, e))
    }

    /// Where in this process `length` bytes of RAM at `address` are, for drivers written with pointers.
    /// The pointer is good for as long as the board lives.
    ///
    /// # Errors
    /// It is not all RAM in one piece.
    pub fn host_address(&self, address: u64, length: usize) -> Result<*mut u8> {
        let first = GuestAddress(address);
        self.memory.get_slice(first, length).map_err(|e| outside(address, e))?;
        self.memory.get_host_address(first).map_err(|e| outside(address, e))
    }

    /// What the threads of a VM do: each device one of whose doorbells rings serves its queues once.
    /// How many did.
    pub fn process(&self) -> usize {
        self.devices.iter().filter(|d| d.process()).count()
    }

    /// Every device looks at its queues and at its other end, whether a doorbell rings or not.
    pub fn process_all(&self) {
        self.devices.iter().for_each(Handle::run);
    }

    /// Takes the queues away from the devices, as a pause of the VM does.
    pub fn pause(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        self.functions.iter().for_each(|f| drop(f.pause(deadline)));
    }

    /// Gives them back.
    pub fn resume(&self) {
        self.functions.iter().for_each(|f| f.resume());
    }

    /// How often entry `vector` of the MSI-X table of 00:`device`.0 was raised since the last call.
    pub fn raised(&self, device: u8, vector: u16) -> u64 {
        let function = self.functions.get(usize::from(device).wrapping_sub(1));
        function.and_then(|f| f.vector(vector)).map_or(0, |v| v.take_raised())
    }

    /// The eventfd behind it.
    ///
    /// # Errors
    /// There is no such entry; the host is out of file descriptors.
    pub fn interrupt(&self, device: u8, vector: u16) -> Result<EventFd> {
        let function = self.functions.get(usize::from(device).wrapping_sub(1));
        let vector = function.and_then(|f| f.vector(vector));
        let none = || Error::new(ErrorKind::NotFound, format!("00:{device:02x}.0 has no such vector"));
        vector.ok_or_else(none)?.event()
    }

    /// The addresses at which doorbells are armed in the kernel's place.
    pub fn armed(&self) -> Vec<u64> {
        self.bells.armed()
    }

    /// What an embedder is told.
    pub fn events(&self) -> &EventStream {
        &self.events
    }

    /// Why devices wanted the VM to stop.
    pub fn stops(&self) -> Vec<String> {
        lock(&self.stops).clone()
    }

    /// The other end of the network card's cable: frames with 12 bytes of header in front.
    pub fn network(&self) -> Option<&UnixDatagram> {
        self.network.as_deref()
    }

    /// What the network cards have carried and dropped, in their order.
    pub fn net_statistics(&self) -> Vec<NetStatistics> {
        self.cards.iter().map(|card| card.statistics()).collect()
    }

    /// What the balloon has moved.
    pub fn balloon(&self) -> Option<BalloonStatistics> {
        self.balloon.as_ref().map(|control| control.statistics())
    }

    /// Asks the balloon's driver for `target` bytes, for an account of its memory, and for its free pages.
    ///
    /// # Errors
    /// More than there is.
    pub fn ask_balloon(&self, target: u64) -> Result<()> {
        let Some(control) = &self.balloon else { return Ok(()) };
        control.ask();
        // Nobody waits for the end of it. Busy, where it has not come since the last time.
        let _ = control.begin_hints();
        control.set_target(crate::Bytes(target))
    }

    /// What the guest has said on its console, the last 64 KiB.
    pub fn output(&self) -> Vec<u8> {
        self.console.tail()
    }

    /// Types on the console; how much of it there was room for.
    pub fn input(&self, bytes: &[u8]) -> usize {
        self.console.push_input(bytes)
    }
}

fn outside(address: u64, error: vm_memory::GuestMemoryError) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("{address:#x} is not RAM")).with_source(error)
}

/// A file of `size` zeroes that is in no directory.
///
/// # Errors
/// The host is out of memory or of fds.
pub fn memory_file(size: u64) -> Result<File> {
    crate::sys::memory::sealed_memfd(c"vmbed-internals", size).map_err(|e| Error::os("creating a memfd", e))
}
