#![forbid(unsafe_code)]
//! Virtual processors: one thread each, between the gate and the guest.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use kvm_ioctls::{VcpuFd, VmFd};

use crate::error::{Error, Result};
use crate::events::{StopCause, StopLine};
use crate::reactor::panic_text;
use crate::sys::signal::{KICK, SignalSet};
use crate::sys::{self, lock};

pub(crate) mod cpuid;
mod exit;
mod gate;
pub(crate) mod msrs;
pub(crate) mod regs;

pub(crate) use exit::Surroundings;
pub(crate) use gate::{Gate, Target};

/// A virtual processor. Its lock is held by its thread while the guest runs, and free while it stands
/// at the gate.
pub(crate) struct Vcpu {
    pub index: u32,
    fd: Mutex<VcpuFd>,
}

impl Vcpu {
    /// Creates vCPU `index` of `vm`; KVM knows it by its APIC id.
    pub fn create(vm: &VmFd, index: u32, apic_id: u32) -> Result<Self> {
        let fd = vm
            .create_vcpu(u64::from(apic_id))
            .map_err(|e| Error::errno_of(format!("creating vCPU {index} (KVM_CREATE_VCPU)"), e))?;
        let mut inside = SignalSet::full();
        inside.remove(KICK);
        sys::kvm::set_signal_mask(&fd, &inside).map_err(|e| {
            Error::os(format!("setting the signal mask of vCPU {index} (KVM_SET_SIGNAL_MASK)"), e)
        })?;
        Ok(Self { index, fd: Mutex::new(fd) })
    }

    /// Access to the vCPU's state. Only while it stands: blocks while the guest runs.
    pub fn with<R>(&self, f: impl FnOnce(&mut VcpuFd) -> R) -> R {
        f(&mut lock(&self.fd))
    }

    /// The body of the vCPU's thread: from the gate into the guest and back until the end. Returns whether
    /// it was the last vCPU to leave.
    pub fn serve(&self, around: &Surroundings, gate: &Gate, stop: &StopLine) -> bool {
        let index = self.index as usize;
        gate.enter(index);
        let body = AssertUnwindSafe(|| {
            while gate.pass() {
                let mut fd = lock(&self.fd);
                match exit::run(&mut fd, self.index, around, gate) {
                    exit::Pause::Attention => {
                        if let Some(cause) = exit::complete_instruction(&mut fd, self.index, around, gate) {
                            stop.pull(cause);
                            return;
                        }
                    }
                    exit::Pause::Halted => return,
                    exit::Pause::Ended(cause) => {
                        stop.pull(cause);
                        return;
                    }
                }
            }
        });
        if let Err(panic) = catch_unwind(body) {
            stop.pull(self.blame(around, panic_text(&*panic)));
        }
        gate.leave(index)
    }

    /// Who panicked: the device that the last exit went to, else the vCPU.
    fn blame(&self, around: &Surroundings, text: &str) -> StopCause {
        let why = format!("panicked: {text}");
        let device = sys::kvm::last_access(&mut lock(&self.fd)).and_then(|access| match access {
            sys::kvm::LastAccess::Port(port, size) => around.pio.name_at(u64::from(port), usize::from(size)),
            sys::kvm::LastAccess::Mmio(address, size) => around.mmio.name_at(address, size),
        });
        match device {
            Some(device) => StopCause::DeviceFault { device, why },
            None => StopCause::VcpuFault { vcpu: self.index, why },
        }
    }
}
