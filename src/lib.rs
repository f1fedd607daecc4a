//! vmbed: the virtual machine monitor that you embed.

mod block;
mod bus;
mod config;
mod error;
mod events;
mod irq;
mod memory;
mod net;
mod reactor;
mod sys;
mod units;
mod virtio;

pub use bus::{Access, Device};
pub use config::{
    BareBoot, Boot, ConsoleKind, CpuConfig, CpuMode, CpuidMask, CpuidRegister, DiskConfig, LinuxBoot,
    MacAddress, NetConfig, PciAddress, Platform, Uuid, VmConfig,
};
pub use error::{Error, ErrorKind, FieldError, Result};
pub use events::{Event, EventKind, EventStream, StopCause, VmId};
pub use units::Bytes;
