#![forbid(unsafe_code)]
//! The guest's clocks over a pause: they stand still, and go on where they stood.
//!
//! KVM's paravirtual clock has a call of its own; the time stamp counter is moved back by the length of
//! the pause through each vCPU's offset, since guests on real hardware read it directly.

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VmFd;

use crate::error::{Error, Result};
use crate::sys::{kvm, log, tsc};
use crate::vcpu::Vcpu;

/// The clocks at the moment of a pause.
pub(super) struct Stopped {
    nanoseconds: u64,
    host_tsc: u64,
}

/// Reads the clocks, once every vCPU stands.
pub(super) fn stop(vm: &VmFd) -> Result<Stopped> {
    let clock =
        vm.get_clock().map_err(|e| Error::errno_of("reading the guest's clock (KVM_GET_CLOCK)", e))?;
    Ok(Stopped { nanoseconds: clock.clock, host_tsc: tsc::read() })
}

/// Sets the clocks back to where they stood, before any vCPU runs.
pub(super) fn resume(vm: &VmFd, vcpus: &[Vcpu], stopped: &Stopped) -> Result<()> {
    // First the counters, since setting the clock refers to them.
    let elapsed = tsc::read().wrapping_sub(stopped.host_tsc);
    for (done, vcpu) in vcpus.iter().enumerate() {
        vcpu.with(|fd| kvm::move_tsc_back(fd, elapsed)).map_err(|e| {
            undo(&vcpus[..done], elapsed);
            Error::os(format!("setting the TSC offset of vCPU {}", vcpu.index), e)
        })?;
    }
    let clock = kvm_clock_data { clock: stopped.nanoseconds, ..Default::default() };
    vm.set_clock(&clock).map_err(|e| {
        undo(vcpus, elapsed);
        Error::errno_of("setting the guest's clock (KVM_SET_CLOCK)", e)
    })?;
    for vcpu in vcpus {
        // Tells the guest's watchdogs that it was stopped. EINVAL: this guest has no paravirtual clock.
        let _ = vcpu.with(|fd| fd.kvmclock_ctrl());
    }
    Ok(())
}

/// Has counters where they were: the next attempt counts from the same moment.
fn undo(vcpus: &[Vcpu], elapsed: u64) {
    for vcpu in vcpus {
        if let Err(error) = vcpu.with(|fd| kvm::move_tsc_back(fd, elapsed.wrapping_neg())) {
            log::warn!("vCPU {}: its time stamp counter stays behind: {error}", vcpu.index);
        }
    }
}
