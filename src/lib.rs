//! vmbed: the virtual machine monitor that you embed.

mod block;
mod boot;
mod budget;
mod bus;
mod config;
mod console;
mod error;
mod events;
mod host;
mod ioapic;
mod irq;
mod legacy;
mod memory;
mod net;
mod pci;
mod reactor;
mod sys;
mod units;
mod vcpu;
mod virtio;
mod vm;

pub use budget::Usage;
pub use bus::{Access, Device};
pub use config::{
    BareBoot, Boot, ConsoleKind, CpuConfig, CpuMode, CpuidMask, CpuidRegister, DiskConfig, LinuxBoot,
    MacAddress, NetConfig, PciAddress, Platform, Uuid, VmConfig,
};
pub use error::{Error, ErrorKind, FieldError, Result};
pub use events::{Event, EventKind, EventStream, StopCause, VmId};
pub use host::{Finding, Host, HostConfig, Probe};
pub use units::Bytes;
pub use vm::{Registers, ThreadInfo, ThreadRole, Vm, VmBuilder, VmState};
