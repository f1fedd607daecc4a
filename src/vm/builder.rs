#![forbid(unsafe_code)]
//! From a configuration to a VM: the only file that knows every part.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};

use kvm_ioctls::{Kvm, VmFd};

use super::Vm;
use super::accounts;
use super::board::{self, Board, Plan, Wiring};
use super::cgroup::Cgroup;
use super::doorbell::Doorbell;
use super::herd::Herd;
use super::machine::{Control, End, Machine, VmState};
use super::supervisor::Confinement;
use super::threads::{self, Duty, Hook, ThreadInfo, Threads};
use crate::boot::{self, Entry, Identity, Protocol};
use crate::budget::{Claim, Claimed, Headroom, Ledger, Shape, overhead};
use crate::bus::{Access, Bus, Device};
use crate::config::topology::Topology;
use crate::config::{Boot, CpuMode, DiskConfig, DiskEngine, Platform, SandboxConfig, Uuid, VmConfig};
use crate::console::Output;
use crate::error::{Error, ErrorKind, Result};
use crate::events::{EventStream, Reporter, StopCause, VmId};
use crate::memory::{Memory, Roll, layout, lost, slots};
use crate::reactor::{Dispatcher, EventLoop};
use crate::sys;
use crate::sys::log;
use crate::sys::signal::Shield;
use crate::sys::uring;
use crate::units::Bytes;
use crate::vcpu::cpuid::{self, HostCpu};
use crate::vcpu::{Gate, Surroundings, Vcpu, msrs, regs};

/// What the host lends to its VMs.
pub(crate) struct HostParts {
    pub kvm: Kvm,
    pub cpu: HostCpu,
    pub ledger: Arc<Ledger>,
    /// The memory of every VM made from it.
    pub roll: Arc<Roll>,
    /// Every VM made from it.
    pub herd: Arc<Herd>,
    /// The processor walks guests' page tables itself.
    pub nested_paging: bool,
    /// This process may use io_uring, once somebody has asked.
    pub io_uring: OnceLock<bool>,
    /// A sample of the host's memory, for a claim: it costs 0.1 ms, a tenth of a bare VM's making. Empty where it is not
    /// asked for and no reaction time makes it matter all the same.
    pub headroom: Box<dyn Fn(bool) -> Headroom + Send + Sync>,
    /// Makes the sandbox of a VM that wants one.
    pub sandbox: fn(&VmConfig, &SandboxConfig) -> Result<Confinement>,
}

impl HostParts {
    /// Books what a VM of this configuration asks for.
    fn claim(&self, config: &VmConfig) -> Result<Claimed> {
        let claim = self.claim_of(config);
        // Who has nothing guaranteed needs nothing free, unless that is promised to somebody already.
        let matters = claim.guaranteed() > 0 || self.ledger.is_pending();
        let answer = self.ledger.claim(claim, (self.headroom)(matters));
        // A refusal says how everything stands.
        if answer.is_err() && !matters { self.ledger.claim(claim, (self.headroom)(true)) } else { answer }
    }

    /// How many rings of io_uring its disks will have.
    fn rings(&self, config: &VmConfig) -> u64 {
        let by_rings = |d: &&DiskConfig| d.engine != DiskEngine::Sync;
        let rings = config.disks.iter().filter(by_rings).map(|d| u64::from(d.queues)).sum();
        if rings > 0 && *self.io_uring.get_or_init(uring::is_there) { rings } else { 0 }
    }

    /// What a VM of this configuration asks of the ledger.
    pub fn claim_of(&self, config: &VmConfig) -> Claim {
        let count = config.cpus.count.into();
        let (vcpus, dedicated) = if config.cpus.dedicated { (0, count) } else { (count, 0) };
        let threads = match config.platform {
            Platform::Pc => {
                1 + config.disks.iter().map(|d| u64::from(d.queues)).sum::<u64>()
                    + u64::from(config.balloon.is_some())
            }
            Platform::Bare => 0,
        };
        let threads = threads + 3 * u64::from(config.sandbox.is_some());
        let nested_paging = self.nested_paging;
        let shape =
            Shape { memory: config.memory, vcpus: count, threads, rings: self.rings(config), nested_paging };
        Claim {
            memory: config.memory,
            entitlement: config.memory,
            guarantee: config.promise.guarantee,
            // Pages of the pool are there for this VM alone, and never swapped.
            pinned: if config.backing.kind.pool_page().is_some() { config.memory } else { Bytes(0) },
            overhead: overhead(shape),
            victim: config.promise.victim,
            vcpus,
            dedicated,
        }
    }
}

/// A VM in the making: its configuration, and what is not data.
///
/// ```no_run
/// # struct Debug; impl vmbed::Device for Debug {
/// #     fn read(&self, _: vmbed::Access, _: &mut [u8]) -> vmbed::Result<()> { Ok(()) }
/// #     fn write(&self, _: vmbed::Access, _: &[u8]) -> vmbed::Result<()> { Ok(()) }
/// # }
/// use std::sync::Arc;
/// use vmbed::{BareBoot, CpuMode, Host, VmConfig};
///
/// // mov al, 'x'; out 0xe9, al; hlt
/// let config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [0xb0, b'x', 0xe6, 0xe9, 0xf4]));
/// let vm = Host::open()?.builder(config).pio_device("debug", 0xe9, 1, Arc::new(Debug)).build()?;
/// vm.start()?;
/// println!("{}", vm.wait()?);
/// # Ok::<(), vmbed::Error>(())
/// ```
#[must_use = "nothing exists before build() is called"]
pub struct VmBuilder {
    host: Arc<HostParts>,
    pub(super) config: VmConfig,
    pub(super) pio: Vec<Attached>,
    pub(super) mmio: Vec<Attached>,
    doorbells: Vec<Arc<Doorbell>>,
    events: Option<EventStream>,
    pub(super) wiring: Wiring,
    hook: Option<Hook>,
    pub(super) caller_vcpus: bool,
    /// Code of this project's own tests runs in the sandbox.
    #[cfg(feature = "internals")]
    pub(crate) trusted: bool,
}

pub(super) struct Attached {
    pub name: String,
    /// Not of the embedder's.
    pub ours: bool,
    base: u64,
    len: u64,
    device: Arc<dyn Device>,
}

impl VmBuilder {
    pub(crate) fn new(host: Arc<HostParts>, config: VmConfig) -> Self {
        let (pio, mmio) = (Vec::new(), Vec::new());
        let (doorbells, wiring) = (Vec::new(), Wiring::default());
        Self {
            host,
            config,
            pio,
            mmio,
            doorbells,
            events: None,
            wiring,
            hook: None,
            caller_vcpus: false,
            #[cfg(feature = "internals")]
            trusted: false,
        }
    }

    /// Attaches a device of your own to `len` ports from `port`; `name` is for messages and causes.
    ///
    /// [`build`](Self::build) answers `InvalidArgument` where the ports are none, go past 0xffff, or overlap
    /// another device's.
    pub fn pio_device(
        mut self,
        name: impl Into<String>,
        port: u16,
        len: u16,
        device: Arc<dyn Device>,
    ) -> Self {
        self.add_pio(name.into(), port, len, device);
        self
    }

    /// What the chained methods do, for those who hold the builder by reference.
    pub(crate) fn add_pio(&mut self, name: String, port: u16, len: u16, device: Arc<dyn Device>) {
        self.pio.push(Attached { name, ours: false, base: port.into(), len: len.into(), device });
    }

    pub(crate) fn add_mmio(&mut self, name: String, address: u64, len: u64, device: Arc<dyn Device>) {
        self.mmio.push(Attached { name, ours: false, base: address, len, device });
    }

    pub(crate) fn add_pio_doorbell(&mut self, name: String, port: u16, len: u16) {
        let device = self.doorbell(&name);
        self.pio.push(Attached { name, ours: true, base: port.into(), len: len.into(), device });
    }

    pub(crate) fn add_mmio_doorbell(&mut self, name: String, address: u64, len: u64) {
        let device = self.doorbell(&name);
        self.mmio.push(Attached { name, ours: true, base: address, len, device });
    }

    fn doorbell(&mut self, name: &str) -> Arc<Doorbell> {
        let doorbell = Arc::new(Doorbell::new(name));
        self.doorbells.push(doorbell.clone());
        doorbell
    }

    pub(crate) fn set_events(&mut self, stream: &EventStream) {
        self.events = Some(stream.clone());
    }

    pub(crate) fn set_console_output(&mut self, fd: impl AsFd) -> Result<()> {
        let fd = sys::fd::duplicate(fd).map_err(|e| Error::os("duplicating the console's output fd", e))?;
        self.wiring.output = Some(Output::Fd(fd));
        Ok(())
    }

    pub(crate) fn set_console_callback(&mut self, callback: impl FnMut(&[u8]) + Send + 'static) {
        self.wiring.output = Some(Output::Callback(Box::new(callback)));
    }

    pub(crate) fn set_console_input(&mut self, fd: impl AsFd) -> Result<()> {
        let fd = sys::fd::duplicate(fd).map_err(|e| Error::os("duplicating the console's input fd", e))?;
        self.wiring.input = Some(fd);
        Ok(())
    }

    pub(crate) fn set_dispatcher(&mut self, dispatcher: &Dispatcher) {
        self.wiring.dispatcher = Some(dispatcher.clone());
    }

    pub(crate) fn set_caller_vcpus(&mut self) {
        self.caller_vcpus = true;
    }

    pub(crate) fn set_thread_hook(&mut self, hook: impl Fn(&ThreadInfo) + Send + Sync + 'static) {
        self.hook = Some(Arc::new(hook));
    }

    /// Attaches a device of your own to `len` bytes of guest-physical addresses from `address`, where
    /// there is no memory; `name` is for messages and causes.
    ///
    /// [`build`](Self::build) answers `InvalidArgument` where the range is empty, wraps, or overlaps memory or
    /// another device.
    pub fn mmio_device(
        mut self,
        name: impl Into<String>,
        address: u64,
        len: u64,
        device: Arc<dyn Device>,
    ) -> Self {
        self.add_mmio(name.into(), address, len, device);
        self
    }

    /// Reports what the guest writes to `len` ports from `port` as [`EventKind::Doorbell`](crate::EventKind::Doorbell) of
    /// that `name` in the VM's events: how a guest calls for the thread that polls them, with data in its memory or in
    /// the value. The guest does not wait for a reader. Reads find all-ones.
    ///
    /// ```
    /// use std::time::Duration;
    /// use vmbed::{BareBoot, CpuMode, EventKind, Host, VmConfig};
    ///
    /// // mov al, 7; out 0x10, al; jmp $
    /// let config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [0xb0, 7, 0xe6, 0x10, 0xeb, 0xfe]));
    /// let vm = Host::open()?.builder(config).pio_doorbell("done", 0x10, 1).build()?;
    /// vm.start()?;
    /// while let Some(event) = vm.events().wait_event(Duration::from_secs(60)) {
    ///     if let EventKind::Doorbell { value, .. } = event.kind {
    ///         assert_eq!(value, 7);
    ///         break;
    ///     }
    /// }
    /// # Ok::<(), vmbed::Error>(())
    /// ```
    ///
    /// [`build`](Self::build) fails as for [`pio_device`](Self::pio_device).
    pub fn pio_doorbell(mut self, name: impl Into<String>, port: u16, len: u16) -> Self {
        self.add_pio_doorbell(name.into(), port, len);
        self
    }

    /// The same for `len` bytes of guest-physical addresses from `address`, where there is no memory.
    ///
    /// [`build`](Self::build) fails as for [`mmio_device`](Self::mmio_device).
    pub fn mmio_doorbell(mut self, name: impl Into<String>, address: u64, len: u64) -> Self {
        self.add_mmio_doorbell(name.into(), address, len);
        self
    }

    /// Sends this VM's events to a stream that it may share with others, instead of one of its own.
    pub fn events(mut self, stream: &EventStream) -> Self {
        self.set_events(stream);
        self
    }

    /// Writes the guest's console to `fd`, which is duplicated: a file, pipe, terminal or socket. Its flags
    /// stay as they are. When nobody takes the output, the oldest is dropped; the guest never waits for it.
    ///
    /// # Errors
    /// `Exhausted` when the process has no file descriptor left.
    pub fn console_output(mut self, fd: impl AsFd) -> Result<Self> {
        self.set_console_output(fd)?;
        Ok(self)
    }

    /// Hands the guest's console output to `callback` instead, on a device thread of the VM's. It must not
    /// wait for this VM; a panic in it stops the VM.
    pub fn console_callback(mut self, callback: impl FnMut(&[u8]) + Send + 'static) -> Self {
        self.set_console_callback(callback);
        self
    }

    /// Reads the guest's console input from `fd`, which is duplicated. What the guest does not read stays
    /// there.
    ///
    /// # Errors
    /// `Exhausted` when the process has no file descriptor left.
    pub fn console_input(mut self, fd: impl AsFd) -> Result<Self> {
        self.set_console_input(fd)?;
        Ok(self)
    }

    /// Calls `hook` on each thread of the library before it does anything else: the place to set its
    /// affinity, cgroup or scheduler. A panic in it ends that VM.
    pub fn on_thread_start(mut self, hook: impl Fn(&ThreadInfo) + Send + Sync + 'static) -> Self {
        self.set_thread_hook(hook);
        self
    }

    /// Serves the VM's console, network cards and random number generator on your event loop, instead of
    /// starting a thread for them.
    pub fn dispatcher(mut self, dispatcher: &Dispatcher) -> Self {
        self.set_dispatcher(dispatcher);
        self
    }

    /// Leaves the vCPUs to threads of yours, which call [`Vm::run_vcpu`], instead of starting a thread for each.
    /// One thread of the library's, [`ThreadRole::Control`](crate::ThreadRole::Control), then waits for the VM's end.
    pub fn caller_vcpus(mut self) -> Self {
        self.set_caller_vcpus();
        self
    }

    /// Makes the VM: books its memory and vCPUs in the host's ledger, opens its disks and network
    /// interfaces, loads what it boots. Nothing runs yet. Blocks for milliseconds, most of them for loading,
    /// or for as long as the host needs to read the files.
    ///
    /// # Errors
    /// `InvalidArgument` with every bad field; `Refused` by the ledger; `NotFound`, `PermissionDenied`,
    /// `Busy` or `BadImage` with the device or file at fault. Whatever had been made is taken back.
    pub fn build(self) -> Result<Vm> {
        self.config.validate()?;
        self.wiring.sources.check(&self.config)?;
        self.check_foreign_code()?;
        let name = if self.config.name.is_empty() {
            "the VM".to_owned()
        } else {
            format!("VM '{}'", self.config.name)
        };
        self.build_valid().map_err(|e| e.context(format!("building {name}")))
    }

    fn build_valid(self) -> Result<Vm> {
        let Self { host, mut config, pio, mmio, doorbells, events, wiring, hook, caller_vcpus, .. } = self;
        let _shield = Shield::raise();
        let id = next_id();
        config.uuid.get_or_insert_with(random_uuid);
        let claimed = host.claim(&config)?;
        log::debug!("VM {id:?} may have {}: {:?}", claimed.memory(), claimed.verdict());
        if caller_vcpus && !config.cpus.affinity.is_empty() {
            let why = "cpus.affinity is for vmbed's own threads: confine those that call run_vcpu yourself";
            return Err(Error::new(ErrorKind::InvalidArgument, why));
        }
        let confined = accounts::confine(&config.cpus, claimed.cores(), &host.ledger.cores())?;
        let events = events.map_or_else(EventStream::new, Ok)?;
        let reporter = Reporter::new(id, events.clone());
        doorbells.iter().for_each(|doorbell| doorbell.connect(&reporter));

        let memory = Memory::on(claimed.memory().get(), &config.backing)?;
        let end = Arc::new(End {
            cause: OnceLock::new(),
            gate: Gate::new(config.cpus.count.into()),
            near: Arc::default(),
        });
        let cgroup = config.cgroup.as_ref().map(|own| Cgroup::make(id, own)).transpose()?.map(Arc::new);
        let mut threads = Threads { id, hook, stop: end.line(id), cgroup: cgroup.clone(), supervisor: None };
        if let Some(wanted) = &config.sandbox {
            let made = (host.sandbox)(&config, wanted)?;
            threads.supervisor = Some(threads.supervise(made, wanted)?);
        }
        let main_loop = match (config.platform, &wiring.dispatcher) {
            (Platform::Bare, _) => None,
            (Platform::Pc, Some(dispatcher)) => Some(EventLoop::turned_by(dispatcher)),
            (Platform::Pc, None) => Some(threads.start_free_loop(0)?),
        };
        let (vm, entry) = match &main_loop {
            // KVM_CREATE_VM waits for grace periods of the host's kernel, several milliseconds; loading a kernel
            // takes longer, and needs nothing but memory.
            Some(main_loop) => {
                let own = host.clone();
                let created = main_loop.meanwhile(move || create_vm(&own.kvm));
                let entry = load(&config, &memory)?;
                let vm = created()??;
                threads.confine_loop(main_loop, Duty::Device, 0)?;
                (vm, entry)
            }
            None => (create_vm(&host.kvm)?, load(&config, &memory)?),
        };
        let vm = Arc::new(vm);
        slots::plug(&vm, &memory)?;

        let mut buses = Buses::default();
        let stop = end.line(id);
        memory.on_loss({
            let stop = stop.clone();
            move |at| stop.pull(StopCause::DeviceFault { device: "memory".to_owned(), why: lost(at) })
        });
        let plan = Plan {
            config: &config,
            vm: &vm,
            memory: &memory,
            reporter: &reporter,
            stop: &stop,
            threads: &threads,
        };
        let board = Board::make(&plan, main_loop, wiring, &mut buses)?;
        buses.attach(pio, mmio, &memory)?;

        let vcpus = create_vcpus(&host, &vm, &config)?;
        place_vcpus(&vcpus, &config, &entry)?;
        memory.intact()?;

        let around = Surroundings {
            pio: Arc::new(buses.pio),
            mmio: Arc::new(buses.mmio),
            ioapic: board.ioapic(),
            first_exit: OnceLock::new(),
        };
        let machine = Arc::new(Machine {
            id,
            process: sys::fork::process(),
            dropped: AtomicBool::new(false),
            end,
            reporter,
            events,
            board,
            supervisor: threads.supervisor.clone(),
            around,
            vcpus,
            caller_vcpus,
            confined,
            meter: host.roll.enrol(id.0, &memory, &vm),
            vm,
            memory,
            reservation: claimed.commit(),
            _cgroup: cgroup,
            host,
            control: Mutex::new(Control::default()),
            state: Mutex::new(VmState::Built),
            state_changed: Condvar::new(),
        });
        let herd = machine.host.herd.clone();
        let vm = threads::start(machine, &threads)?;
        herd.join(&vm.machine);
        Ok(vm)
    }
}

impl fmt::Debug for VmBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmBuilder").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The two address spaces while they are being filled.
#[derive(Default)]
pub(super) struct Buses {
    pub pio: Bus,
    pub mmio: Bus,
}

impl Buses {
    /// The embedder's devices come last, so that they find vmbed's in place and hear of an overlap.
    fn attach(&mut self, pio: Vec<Attached>, mmio: Vec<Attached>, memory: &Memory) -> Result<()> {
        for ram in layout::ram(memory.size()) {
            self.mmio.insert("memory", ram.start, ram.end - ram.start, Arc::new(Lost(ram.start)))?;
        }
        for d in pio {
            if d.len > 0 && d.base + d.len > 1 << 16 {
                let why = format!("device '{}': ports {:#x}+{} go past 0xffff", d.name, d.base, d.len);
                return Err(Error::new(ErrorKind::InvalidArgument, why));
            }
            self.pio.insert(&d.name, d.base, d.len, d.device)?;
        }
        for d in mmio {
            self.mmio.insert(&d.name, d.base, d.len, d.device)?;
        }
        Ok(())
    }
}

/// What answers where memory should: KVM asks for an access to memory that it cannot get at while it emulates the
/// instruction.
struct Lost(u64);

impl Device for Lost {
    fn read(&self, access: Access, _: &mut [u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Exhausted, lost(self.0 + access.offset)))
    }

    fn write(&self, access: Access, _: &[u8]) -> Result<()> {
        self.read(access, &mut [])
    }
}

/// A random identity (RFC 9562, version 4).
fn random_uuid() -> Uuid {
    let mut bytes = [0; 16];
    sys::random(&mut bytes);
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Uuid(bytes)
}

fn next_id() -> VmId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    VmId(NEXT.fetch_add(1, Ordering::Relaxed))
}

fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other.map_err(|e| Error::errno_of("creating a VM (KVM_CREATE_VM)", e)),
        }
    }
}

fn create_vcpus(host: &HostParts, vm: &VmFd, config: &VmConfig) -> Result<Vec<Vcpu>> {
    let topology = Topology::new(&config.cpus);
    (0..u32::from(config.cpus.count))
        .map(|index| {
            let vcpu = Vcpu::create(vm, index, topology.apic_id(index))?;
            vcpu.with(|fd| {
                let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
                let cpuid = cpuid::build(&host.cpu, &config.cpus, index, tsc_khz)?;
                fd.set_cpuid2(&cpuid).map_err(|e| Error::errno_of("setting CPUID (KVM_SET_CPUID2)", e))?;
                if config.platform == Platform::Pc { msrs::set_boot(fd) } else { Ok(()) }
            })
            .map_err(|e: Error| e.context(format!("vCPU {index}")))?;
            Ok(vcpu)
        })
        .collect()
}

fn load(config: &VmConfig, memory: &Memory) -> Result<Entry> {
    match &config.boot {
        Boot::Linux(linux) => {
            let identity = Identity { uuid: config.uuid.unwrap_or(Uuid([0; 16])), name: config.name.clone() };
            boot::linux(memory, linux, &board::describe(config, memory), &identity)
        }
        Boot::Bare(bare) => boot::bare(memory, bare),
    }
}

/// The registers of vCPU `index` at its first instruction.
fn first_registers(entry: &Entry, index: u32) -> regs::Start {
    let base =
        regs::Start { rip: entry.rip, cr3: entry.page_tables, gdt: entry.gdt, ..regs::Start::default() };
    match entry.protocol {
        Protocol::Linux64 { zero_page } => regs::Start { mode: CpuMode::Long, rsi: zero_page, ..base },
        Protocol::Pvh { start_info } => regs::Start { mode: CpuMode::Protected, rbx: start_info, ..base },
        Protocol::Bare { mode, stack } => {
            let rsp = stack.wrapping_sub(if stack == 0 { 0 } else { u64::from(index) << 12 });
            regs::Start { mode, rsp, rdi: index.into(), ..base }
        }
    }
}

fn place_vcpus(vcpus: &[Vcpu], config: &VmConfig, entry: &Entry) -> Result<()> {
    let bare = matches!(config.boot, Boot::Bare(_));
    for vcpu in vcpus.iter().take(if bare { vcpus.len() } else { 1 }) {
        vcpu.with(|fd| {
            regs::set_start(fd, &first_registers(entry, vcpu.index))?;
            // Under an interrupt controller the others would wait for a SIPI that no bare guest expects.
            if vcpu.index > 0 && config.platform == Platform::Pc { regs::set_runnable(fd) } else { Ok(()) }
        })
        .map_err(|e| e.context(format!("vCPU {}", vcpu.index)))?;
    }
    Ok(())
}
