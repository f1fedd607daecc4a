//! vmbed: the virtual machine monitor that you embed.
//!
//! A program that links this crate runs KVM virtual machines inside its own process: no daemon, no global
//! state, no opinion about the process. The README has the programs to begin with.
//!
//! # The way through the API
//!
//! 1. [`Host::open`] opens `/dev/kvm` and the ledger of what its VMs are promised; [`Host::probe`] says
//!    what a machine lacks and how to mend it.
//! 2. [`VmConfig`] says what a VM is to be. It is plain data (with the feature `serde`, also to and from
//!    files), and [`VmConfig::validate`] names every bad field at once.
//! 3. [`Host::builder`] gives a [`VmBuilder`]. What is not data is attached there: a [`Device`], the
//!    console, an [`EventStream`] shared by several VMs, a port of a [`Switch`], a hook for new threads.
//! 4. [`VmBuilder::build`] makes the [`Vm`], and [`Vm::start`] lets it run. Its [`Event`]s come in order
//!    behind one pollable fd; the last is [`EventKind::Stopped`] with the [`StopCause`]. Dropping the `Vm`
//!    ends everything that belongs to it.
//!
//! Every call that can fail answers an [`Error`]: an [`ErrorKind`] to decide on, a text that says what
//! failed and where, and the source. Every method of [`Vm`] may be called from any thread; its
//! documentation says whether it blocks, and for how long at most.
//!
//! # The layers
//!
//! Each module uses only those above it (`tests/layers.rs` enforces that; `ARCHITECTURE.md` explains it):
//!
//! ```text
//! sys  error  units  config  budget                          system calls, plain data, the ledger
//! memory  irq  ioapic  reactor  events  console  bus  rate   what devices stand on
//! block  net  pci  legacy                                    disks, networks, the bus, fixed ports
//! virtio                                                     virtio devices and their transport
//! vcpu  boot                                                 the run loop; what runs first
//! vm                                                         one machine: its parts and its life
//! sandbox                                                    what its threads may ask of the kernel
//! host                                                       /dev/kvm and the VMs made from it
//! capi                                                       the same for C: include/vmbed.h
//! internals                                                  the project's own tests; behind a feature
//! ```
// Product code neither panics nor prints. Tests, benches and examples may.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable,
        clippy::print_stdout,
        clippy::print_stderr
    )
)]

mod block;
mod boot;
mod budget;
mod bus;
#[allow(dead_code, reason = "C calls it, by name")]
mod capi;
mod config;
mod console;
mod error;
mod events;
mod host;
#[doc(hidden)]
#[cfg(feature = "internals")]
pub mod internals;
mod ioapic;
mod irq;
mod legacy;
mod memory;
mod net;
mod pci;
mod rate;
mod reactor;
mod sandbox;
mod sys;
mod units;
mod vcpu;
mod virtio;
mod vm;

// The machine that VMs run on: what it can do, and what it has promised.
pub use budget::{Constraint, Slack, Verdict};
pub use host::{ChargedBy, Finding, Host, HostConfig, Probe, ReclaimConfig, ReclaimSandbox, Usage};

// What it has in the process that is not of one host: its handler for lost memory.
pub use memory::handle_sigbus;

// What a VM is to be: plain data.
pub use config::{
    BackingConfig, BackingKind, BalloonConfig, BareBoot, Boot, CacheMode, CgroupConfig, ConsoleKind,
    CpuConfig, CpuMode, CpuidMask, CpuidRegister, DiskBacking, DiskConfig, DiskEngine, DiskFormat, HugePages,
    LinuxBoot, MacAddress, NetConfig, Passphrase, PciAddress, Platform, PromiseConfig, RateLimit,
    SandboxConfig, Uuid, Vhost, VmConfig,
};
pub use units::Bytes;

// A VM in the making, and its life.
pub use vm::{
    BalloonStatistics, DiskStatistics, GivenBack, GuestMemory, NetStatistics, Network, Registers,
    SandboxReport, ThreadInfo, ThreadRole, VcpuReturn, VcpuStatistics, Vm, VmBuilder, VmMemory, VmState,
};

// Networks inside of this process.
pub use net::switch::{
    Capture, CaptureSummary, DropReason, Guard, IpPrefix, PortOptions, PortStatistics, PortVlan, Switch,
    SwitchOptions, SwitchPort, Traffic,
};

// What the host does for them.
pub use net::wiring::{BridgeOptions, TapOptions, Wiring};

// The embedder's event loop, where its devices may be served.
pub use reactor::Dispatcher;

// What happened to it.
pub use events::{Event, EventKind, EventStream, ReclaimStage, StopCause, VmId};

// Where an embedder plugs in hardware, disks and networks of its own.
pub use block::{BlockBackend, BlockOp, BlockRequest, create_disk};
pub use bus::{Access, Device};
pub use net::{NetBackend, Offloads};
pub use sys::io::IoList;

// What every call answers when it fails.
pub use error::{Error, ErrorKind, FieldError, Result};

/// Compiles the README's programs, and runs those that can run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmePrograms;

/// Compiles those of docs/storage.md.
#[cfg(doctest)]
#[doc = include_str!("../docs/storage.md")]
struct StoragePrograms;

/// Compiles those of docs/networking.md.
#[cfg(doctest)]
#[doc = include_str!("../docs/networking.md")]
struct NetworkingPrograms;

/// Compiles those of docs/sandbox.md.
#[cfg(doctest)]
#[doc = include_str!("../docs/sandbox.md")]
struct SandboxPrograms;
