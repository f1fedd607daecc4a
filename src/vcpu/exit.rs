#![forbid(unsafe_code)]
//! The run loop: one match over the exits.

use std::sync::Arc;

use kvm_ioctls::VcpuFd;

use super::gate::Gate;
use crate::bus::{Access, Bus, Range};
use crate::error::Error;
use crate::events::StopCause;
use crate::ioapic::Ioapic;
use crate::sys::kvm::{self, Exit};
use crate::sys::signal;

/// What a vCPU meets outside the guest.
pub(crate) struct Surroundings {
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
    pub ioapic: Option<Arc<Ioapic>>,
}

/// Why a vCPU came back from the guest for longer than an exit.
pub(crate) enum Pause {
    /// The gate wants it.
    Attention,
    /// It executed `HLT`, and nothing in this VM could wake it.
    Halted,
    /// The whole VM must end.
    Ended(StopCause),
}

/// Runs vCPU `index` until it must pause.
pub(crate) fn run(vcpu: &mut VcpuFd, index: u32, around: &Surroundings, gate: &Gate) -> Pause {
    // The device of the last exit, one per bus: most guests talk to one device many times in a row.
    let mut last_port: Option<&Range> = None;
    let mut last_mmio: Option<&Range> = None;
    while !gate.wants_attention() {
        match kvm::run(vcpu) {
            Ok(Exit::Pio { port, size, write, data }) => {
                let range = lookup(&around.pio, &mut last_port, u64::from(port), usize::from(size));
                if let Err(error) = port_io(range, port, size, write, data, index) {
                    return device_fault(range, &error);
                }
            }
            Ok(Exit::Mmio { address, write, data }) => {
                let range = lookup(&around.mmio, &mut last_mmio, address, data.len());
                if let Err(error) = access(range, address, write, data, index) {
                    return device_fault(range, &error);
                }
            }
            Ok(Exit::IoapicEoi(vector)) => {
                if let Some(ioapic) = &around.ioapic {
                    ioapic.end_of_interrupt(vector);
                }
            }
            Ok(Exit::Interrupted) => signal::consume_kick(),
            Ok(Exit::Hlt) => return Pause::Halted,
            Ok(Exit::Shutdown) => return Pause::Ended(StopCause::TripleFault),
            Ok(Exit::Other(reason)) => {
                return Pause::Ended(StopCause::VcpuFault { vcpu: index, why: kvm::describe(vcpu, reason) });
            }
            Err(error) => return Pause::Ended(run_failed(index, &error)),
        }
    }
    Pause::Attention
}

/// Finishes the instruction whose exit was answered last, so that the registers are those after it.
pub(crate) fn complete_instruction(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    // Ends with EINTR before the guest runs; a failure shows again at the next real run.
    let _ = kvm::run(vcpu);
    vcpu.set_kvm_immediate_exit(0);
}

#[inline(always)]
fn lookup<'a>(bus: &'a Bus, last: &mut Option<&'a Range>, addr: u64, len: usize) -> Option<&'a Range> {
    match *last {
        Some(range) if range.holds(addr, len) => *last,
        _ => {
            let found = bus.find(addr, len).and_then(|i| bus.range(i));
            if found.is_some() {
                *last = found;
            }
            found
        }
    }
}

#[inline(always)]
fn port_io(
    range: Option<&Range>,
    port: u16,
    size: u8,
    write: bool,
    data: &mut [u8],
    vcpu: u32,
) -> Result<(), Error> {
    if data.len() == usize::from(size) {
        return access(range, u64::from(port), write, data, vcpu);
    }
    // A string instruction: the kernel hands over many accesses to the same port at once.
    data.chunks_mut(usize::from(size).max(1))
        .try_for_each(|one| access(range, u64::from(port), write, one, vcpu))
}

#[inline(always)]
fn access(range: Option<&Range>, addr: u64, write: bool, data: &mut [u8], vcpu: u32) -> Result<(), Error> {
    match (range, write) {
        (Some(range), true) => range.device.write(Access { offset: addr - range.base, vcpu }, data),
        (Some(range), false) => {
            data.fill(0xff);
            range.device.read(Access { offset: addr - range.base, vcpu }, data)
        }
        (None, true) => Ok(()),
        (None, false) => {
            data.fill(0xff);
            Ok(())
        }
    }
}

#[cold]
fn device_fault(range: Option<&Range>, error: &Error) -> Pause {
    let device = range.map_or("nothing", |r| &r.name).to_owned();
    Pause::Ended(StopCause::DeviceFault { device, why: error.to_string() })
}

#[cold]
fn run_failed(vcpu: u32, error: &std::io::Error) -> StopCause {
    let why = match error.raw_os_error() {
        Some(libc::EFAULT) => {
            "guest memory is gone or cannot be had from the host (EFAULT from KVM_RUN)".to_owned()
        }
        _ => format!("KVM_RUN failed: {error}"),
    };
    StopCause::VcpuFault { vcpu, why }
}
