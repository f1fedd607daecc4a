#![forbid(unsafe_code)]
//! The run loop: one match over the exits.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use kvm_ioctls::VcpuFd;

use super::gate::Gate;
use super::turns::Pause;
use crate::bus::{Access, Bus, Device};
use crate::error::{Error, Result};
use crate::events::StopCause;
use crate::ioapic::Ioapic;
use crate::sys::kvm::{self, Exit};

/// What a vCPU meets outside the guest.
pub(crate) struct Surroundings {
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
    pub ioapic: Option<Arc<Ioapic>>,
    /// When the guest first reached for a device.
    pub first_exit: OnceLock<Instant>,
}

/// Runs vCPU `index` until it must pause. (Not a part of its caller: the loop wants the registers.)
#[inline(never)]
pub(crate) fn run(vcpu: &mut VcpuFd, index: u32, around: &Surroundings, gate: &Gate) -> Pause {
    enter::<false>(vcpu, index, around, gate)
}

/// Finishes the instruction whose exit was answered last, so that the registers are those after it. It may
/// make more accesses: one of 16 bytes comes in two halves.
pub(crate) fn complete_instruction(
    vcpu: &mut VcpuFd,
    index: u32,
    around: &Surroundings,
    gate: &Gate,
) -> Option<StopCause> {
    vcpu.set_kvm_immediate_exit(1);
    let pause = enter::<true>(vcpu, index, around, gate);
    vcpu.set_kvm_immediate_exit(0);
    match pause {
        Pause::Ended(cause) => Some(cause),
        Pause::Attention | Pause::Halted => None,
    }
}

/// Enters the guest and answers its exits, until the gate wants the vCPU; or, `COMPLETING`, until KVM says
/// that the guest would run again. One body, so that both know the same exits.
#[inline(always)]
fn enter<const COMPLETING: bool>(vcpu: &mut VcpuFd, index: u32, around: &Surroundings, gate: &Gate) -> Pause {
    let mut ports = Nearby::new(&around.pio, &around.first_exit);
    let mut mmio = Nearby::new(&around.mmio, &around.first_exit);
    while COMPLETING || !gate.wants_attention() {
        match kvm::run(vcpu) {
            Ok(Exit::Pio { port, size, write, data }) => {
                if let Err(error) = ports.access_all(u64::from(port), size, write, data, index) {
                    return device_fault(ports.bus, u64::from(port), &error);
                }
            }
            Ok(Exit::Mmio { address, write, data }) => {
                if let Err(error) = mmio.access(address, write, data, index) {
                    return device_fault(mmio.bus, address, &error);
                }
            }
            Ok(Exit::IoapicEoi(vector)) => {
                if let Some(ioapic) = &around.ioapic {
                    ioapic.end_of_interrupt(vector);
                }
            }
            Ok(Exit::Interrupted) => break,
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

/// A bus, and the device that answered last: most guests talk to one device many times in a row.
pub(crate) struct Nearby<'a> {
    bus: &'a Bus,
    base: u64,
    /// Bytes of the device's range; 0 before the first access.
    len: u64,
    device: &'a dyn Device,
    first_exit: &'a OnceLock<Instant>,
}

impl<'a> Nearby<'a> {
    pub fn new(bus: &'a Bus, first_exit: &'a OnceLock<Instant>) -> Self {
        Self { bus, base: 0, len: 0, device: &Nobody, first_exit }
    }

    /// The accesses of one exit: a string instruction makes many to the same port at once.
    #[inline(always)]
    pub fn access_all(&mut self, port: u64, size: u8, write: bool, data: &mut [u8], vcpu: u32) -> Result<()> {
        if data.len() == usize::from(size) {
            return self.access(port, write, data, vcpu);
        }
        data.chunks_mut(usize::from(size).max(1)).try_for_each(|one| self.access(port, write, one, vcpu))
    }

    #[inline(always)]
    fn access(&mut self, addr: u64, write: bool, data: &mut [u8], vcpu: u32) -> Result<()> {
        let mut offset = addr.wrapping_sub(self.base);
        // No overflow: a range ends within the address space, and an access is of 8 bytes at most.
        if offset >= self.len || self.len - offset < data.len() as u64 {
            if !self.go_to(addr, data.len()) {
                if !write {
                    data.fill(0xff);
                }
                return Ok(());
            }
            offset = addr - self.base;
        }
        let access = Access { offset, vcpu };
        if write {
            self.device.write(access, data)
        } else {
            all_ones(data);
            self.device.read(access, data)
        }
    }

    #[cold]
    fn go_to(&mut self, addr: u64, len: usize) -> bool {
        self.first_exit.get_or_init(Instant::now);
        let Some(range) = self.bus.find(addr, len).and_then(|i| self.bus.range(i)) else { return false };
        // A range over all 2^64 addresses would not fit; a bus has no such device.
        (self.base, self.len) = (range.base, (range.last - range.base).saturating_add(1));
        self.device = &*range.device;
        true
    }
}

/// Fills what a read finds when its device writes nothing. A byte, the commonest, without a call.
#[inline(always)]
fn all_ones(data: &mut [u8]) {
    match data {
        [byte] => *byte = 0xff,
        wider => wider_ones(wider),
    }
}

#[inline(never)]
fn wider_ones(data: &mut [u8]) {
    data.fill(0xff);
}

/// Answers until the first device is found, and is never called.
struct Nobody;

impl Device for Nobody {
    fn read(&self, _: Access, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write(&self, _: Access, _: &[u8]) -> Result<()> {
        Ok(())
    }
}

#[cold]
fn device_fault(bus: &Bus, addr: u64, error: &Error) -> Pause {
    let device = bus.name_at(addr, 1).unwrap_or_default();
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
