#![forbid(unsafe_code)]
//! What surrounds the vCPUs: the devices of the platform, their loops, and the console.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use kvm_ioctls::VmFd;

use super::builder::Buses;
use super::devices;
use super::machine::BOUND;
use super::sources::Sources;
use super::threads::Threads;
use crate::boot::{self, acpi};
use crate::bus::{Access, Device};
use crate::config::topology::Topology;
use crate::config::{ConsoleKind, VmConfig};
use crate::console::{Console, Output, Pump};
use crate::error::{Error, ErrorKind, Result};
use crate::events::{Reporter, StopCause, StopLine};
use crate::ioapic::Ioapic;
use crate::irq::{IOAPIC_PINS, Routes};
use crate::legacy::{Cmos, I8042, Power, PvPanic, Serial, ports};
use crate::memory::{Memory, layout};
use crate::pci::{ConfigPorts, Ecam, Root, Window};
use crate::reactor::{Attached, Dispatcher, EventLoop, panic_text};
use crate::sys::log;
use crate::sys::{kvm, lock};
use crate::virtio::transport::{Doorbells, VirtioPci};
use crate::virtio::{balloon, blk, net};

/// How long the last words of a guest may take to reach the embedder's output.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What the embedder attached: to the console, to disks and cards, and what is to serve them.
#[derive(Default)]
pub(super) struct Wiring {
    pub dispatcher: Option<Dispatcher>,
    pub output: Option<Output>,
    pub input: Option<OwnedFd>,
    pub sources: Sources,
}

/// What a board is made from.
pub(super) struct Plan<'a> {
    pub config: &'a VmConfig,
    pub vm: &'a Arc<VmFd>,
    pub memory: &'a Memory,
    pub reporter: &'a Reporter,
    pub stop: &'a StopLine,
    pub threads: &'a Threads,
}

/// The devices of one VM. A bare platform has none.
#[derive(Default)]
pub(super) struct Board {
    pub console: Console,
    ioapic: Option<Arc<Ioapic>>,
    power: Option<Arc<Power>>,
    virtio: Vec<Arc<VirtioPci>>,
    pump: Mutex<Option<Attached<Pump>>>,
    loops: Vec<Arc<EventLoop>>,
    stop: Option<StopLine>,
    /// Disks, and what cards count, in the order of the configuration.
    pub disks: Vec<Arc<blk::Control>>,
    pub nets: Vec<Arc<net::Control>>,
    pub balloon: Option<Arc<balloon::Control>>,
}

impl Board {
    /// Makes the devices and puts them on the buses. A bare platform has no main loop.
    pub fn make(
        plan: &Plan<'_>,
        main_loop: Option<Arc<EventLoop>>,
        wiring: Wiring,
        buses: &mut Buses,
    ) -> Result<Self> {
        let Some(main_loop) = main_loop else { return Ok(Self::default()) };
        split_irqchip(plan.vm)?;
        let routes = Routes::new(Some(plan.vm.clone()));
        let ioapic = Ioapic::new(routes.clone());
        let window = layout::IOAPIC;
        buses.mmio.insert("ioapic", window.start, window.end - window.start, ioapic.clone())?;
        for (name, range) in layout::KERNELS {
            buses.mmio.insert(name, range.start, range.end - range.start, Arc::new(Nothing))?;
        }
        let console = Console::new();
        let stop = Some(plan.stop.clone());
        let mut board = Self { ioapic: Some(ioapic.clone()), stop, ..Self::default() };
        board.power = Some(legacy(plan, &ioapic, &console, buses)?);
        let pump = console.attach(wiring.output, wiring.input, &main_loop, plan.stop)?;
        board.pump = Mutex::new(Some(pump));
        board.loops.push(main_loop);
        board.console = console;
        board.add_virtio(plan, wiring.sources, &routes, buses)?;
        Ok(board)
    }

    fn add_virtio(
        &mut self,
        plan: &Plan<'_>,
        sources: Sources,
        routes: &Arc<Routes>,
        buses: &mut Buses,
    ) -> Result<()> {
        let doorbells = Doorbells::new(Some(plan.vm.clone()));
        let mut functions: Vec<(_, Arc<dyn crate::pci::Function>)> = Vec::new();
        let made = devices::make(plan, sources, &self.console, &mut self.loops)?;
        (self.disks, self.nets, self.balloon) = (made.disks, made.nets, made.balloon);
        for planned in made.planned {
            let bar = planned.bar();
            let devices::Planned { address, device, signals } = planned;
            let function = VirtioPci::new(device, &bar, plan.memory, signals, routes, doorbells.clone())?;
            self.virtio.push(function.clone());
            functions.push((address, function));
        }
        let root = Root::new(functions)?;
        let ecam = layout::ECAM;
        buses.mmio.insert("pci ecam", ecam.start, ecam.end - ecam.start, Arc::new(Ecam(root.clone())))?;
        let ports = Arc::new(ConfigPorts(root.clone()));
        buses.pio.insert("pci config", ConfigPorts::BASE, ConfigPorts::LEN, ports)?;
        for (name, window) in
            [("pci window", layout::PCI_MMIO32), ("pci high window", layout::pci_mmio64(plan.memory.size()))]
        {
            let device = Arc::new(Window { root: root.clone(), base: window.start });
            buses.mmio.insert(name, window.start, window.end - window.start, device)?;
        }
        Ok(())
    }

    /// Has the card `index` take the network that was put ready for it.
    ///
    /// # Errors
    /// `TimedOut` where it does not stand within [`BOUND`].
    pub fn refit_net(&self, index: usize) -> Result<()> {
        // Disks come first, then cards.
        let Some(function) = self.virtio.get(self.disks.len() + index) else { return Ok(()) };
        self.guarded(function, |function| function.refit(Instant::now() + BOUND))?
    }

    pub fn ioapic(&self) -> Option<Arc<Ioapic>> {
        self.ioapic.clone()
    }

    /// Stops every device; what is in flight is finished first.
    ///
    /// # Errors
    /// `TimedOut` where something has not ended by the deadline: every device goes on serving.
    pub fn pause(&self, deadline: Instant) -> Result<()> {
        let paused = self.virtio.iter().try_for_each(|d| self.guarded(d, |d| d.pause(deadline))?);
        paused.inspect_err(|_| drop(self.resume()))
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// `Internal` where one panicked: the VM ends, and the others go on until it has.
    pub fn resume(&self) -> Result<()> {
        let mut resumed = Ok(());
        for device in &self.virtio {
            resumed = resumed.and(self.guarded(device, |device| device.resume()));
        }
        resumed
    }

    /// A panic, of vmbed's or of code of the embedder's behind the device, is the end of the VM and of nothing else.
    fn guarded<R>(&self, device: &VirtioPci, f: impl FnOnce(&VirtioPci) -> R) -> Result<R> {
        catch_unwind(AssertUnwindSafe(|| f(device))).map_err(|panic| {
            let (device, why) = (device.id(), format!("panicked: {}", panic_text(&*panic)));
            let error = Error::new(ErrorKind::Internal, format!("{device}: {why}"));
            if let Some(stop) = &self.stop {
                stop.pull(StopCause::DeviceFault { device, why });
            }
            error
        })
    }

    /// Stops every device for good, and lets the console's last words out.
    pub fn stop(&self) {
        for device in &self.virtio {
            // One that panics leaves the others to be ended all the same.
            if let Err(error) = self.guarded(device, |device| device.end()) {
                log::error!("{error}, as it was being stopped");
            }
        }
        self.balloon.iter().for_each(|control| control.end());
        if self.loops.iter().any(|l| l.is_callers()) {
            // Only the embedder can carry them; this has its dispatcher say that there is something to do.
            self.console.flush(Instant::now());
        } else if !self.console.flush(Instant::now() + LAST_WORDS) {
            log::debug!("the console's output did not take all of the guest's last words");
        }
    }

    /// Whether the calling thread is turning the VM's dispatcher.
    pub fn is_turned_here(&self) -> bool {
        self.loops.iter().any(|l| l.is_turned_here())
    }

    /// What `f` answers on the thread of that loop.
    #[cfg(feature = "internals")]
    pub fn on_loop<R: Send + 'static>(
        &self,
        index: usize,
        f: impl FnOnce() -> R + Send + 'static,
    ) -> Option<R> {
        self.loops.get(index)?.meanwhile(f)().ok()
    }

    /// Ends the loops' threads.
    pub fn join(&self) {
        if let Some(Err(error)) = lock(&self.pump).take().map(Attached::detach) {
            log::debug!("{error}");
        }
        self.loops.iter().for_each(|l| l.stop());
    }

    pub fn press_power_button(&self) -> Result<()> {
        match &self.power {
            Some(power) => {
                power.press_button();
                Ok(())
            }
            None => Err(Error::new(ErrorKind::Unsupported, "shutdown: a bare platform has no power button")),
        }
    }
}

/// What a guest finds where the kernel's half of the machine is, should it ever get here, as after moving its APIC.
struct Nothing;

impl Device for Nothing {
    fn read(&self, _: Access, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write(&self, _: Access, _: &[u8]) -> Result<()> {
        Ok(())
    }
}

/// Local APICs in the kernel, the IOAPIC here: what the guest does often stays in the kernel, and an end
/// of the VM costs 0.1 ms instead of 16.
fn split_irqchip(vm: &VmFd) -> Result<()> {
    kvm::set_intel_pages(vm, layout::KVM_TSS, layout::KVM_IDENTITY_MAP)
        .map_err(|e| Error::os("giving KVM its pages (KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_TSS_ADDR)", e))?;
    let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    cap.args[0] = IOAPIC_PINS.into();
    vm.enable_cap(&cap).map_err(|e| Error::errno_of("making local APICs (KVM_CAP_SPLIT_IRQCHIP)", e))
}

/// The devices at fixed ports.
fn legacy(plan: &Plan<'_>, ioapic: &Arc<Ioapic>, console: &Console, buses: &mut Buses) -> Result<Arc<Power>> {
    if plan.config.console == ConsoleKind::Serial {
        let serial = Serial::new(console.clone(), ioapic.line(ports::COM1_GSI as u8));
        buses.pio.insert("serial", ports::COM1.into(), ports::COM1_LEN.into(), serial)?;
    }
    buses.pio.insert("cmos", ports::CMOS.into(), ports::CMOS_LEN.into(), Arc::new(Cmos::default()))?;
    buses.pio.insert(
        "i8042",
        ports::I8042.into(),
        ports::I8042_LEN.into(),
        Arc::new(I8042::new(plan.stop.clone())),
    )?;
    buses.pio.insert("pvpanic", ports::PVPANIC.into(), 1, Arc::new(PvPanic::new(plan.stop.clone())))?;
    let power = Arc::new(Power::new(plan.stop.clone(), ioapic.line(ports::GED_GSI as u8)));
    buses.pio.insert("power", ports::POWER.into(), ports::POWER_LEN.into(), power.clone())?;
    Ok(power)
}

/// The board as its tables tell it.
pub(crate) fn describe(config: &VmConfig, memory: &Memory) -> boot::Machine {
    let topology = Topology::new(&config.cpus);
    boot::Machine {
        // At most 254: the configuration was validated.
        apic_ids: (0..u32::from(config.cpus.count)).map(|i| topology.apic_id(i) as u8).collect(),
        ioapic: layout::IOAPIC.start,
        lapic: layout::LAPIC,
        ecam: layout::ECAM,
        pci_mmio32: layout::PCI_MMIO32,
        pci_mmio64: layout::pci_mmio64(memory.size()),
        serial: (config.console == ConsoleKind::Serial).then_some((ports::COM1, ports::COM1_GSI)),
        rtc: ports::CMOS,
        pvpanic: ports::PVPANIC,
        power: acpi::Power {
            sleep_control: ports::SLEEP_CONTROL,
            sleep_status: ports::SLEEP_STATUS,
            reset: ports::RESET,
            reset_value: ports::RESET_VALUE,
            s5: ports::S5_SLEEP_TYPE,
            event_select: ports::GED_EVENT_SELECT,
            event_gsi: ports::GED_GSI,
        },
    }
}
