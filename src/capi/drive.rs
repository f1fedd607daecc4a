//! Who drives a VM: the library's own threads, or the caller's.

use super::arguments::Out;
use super::call;
use super::config::{attach, vmbed_builder};
use super::error::vmbed_error;
use super::handle;
use super::vm::vmbed_vm;
use crate::vm::{VcpuReturn, VmBuilder};

/// The vCPU will not run any more: the VM has ended, or this vCPU of a bare guest has halted.
pub const VMBED_VCPU_ENDED: i32 = 1;
/// vmbed_vcpu_interrupt() was called, or a signal was delivered to the thread. The guest goes on where it was when the
/// vCPU is run again.
pub const VMBED_VCPU_INTERRUPTED: i32 = 2;

/// Leaves the vCPUs to threads of yours, which call vmbed_vcpu_run(), instead of starting a thread for each. One thread
/// of the library's, VMBED_THREAD_CONTROL, then waits for the VM's end.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_caller_vcpus(
    builder: *mut vmbed_builder,
    error: *mut *mut vmbed_error,
) -> i32 {
    attach(builder, error, |builder: &mut VmBuilder| {
        builder.set_caller_vcpus();
        Ok(())
    })
}

/// Runs vCPU `vcpu` on the calling thread. Blocks until it returns for a reason that `outcome` is set to, one of
/// VMBED_VCPU_*; before the start and through a pause it waits inside. Devices of yours are called on this thread.
///
/// Each vCPU may be run by one thread at a time, by another one the next time (which costs KVM some milliseconds).
/// Signals that the thread does not block come through, and their handlers run. SIGURG is blocked meanwhile: vmbed sends
/// it to the thread.
///
/// VMBED_ERR_INVALID_ARGUMENT where there is no such vCPU. VMBED_ERR_INVALID_STATE where another thread runs it, where the
/// VM's vCPUs have threads of the library's, or where any VM's callback calls.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vcpu_run(
    vm: *mut vmbed_vm,
    vcpu: u32,
    outcome: *mut i32,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let out = Out::new(outcome, "outcome")?;
        out.put(match handle::object(vm)?.vm().run_vcpu(vcpu)? {
            VcpuReturn::Ended => VMBED_VCPU_ENDED,
            VcpuReturn::Interrupted => VMBED_VCPU_INTERRUPTED,
        });
        Ok(())
    })
}

/// Makes vmbed_vcpu_run() return on the thread that runs this vCPU; where none does, on the next one at once. Does not
/// block. Not for signal handlers: a signal alone has the same effect.
///
/// VMBED_ERR_INVALID_ARGUMENT where there is no such vCPU. VMBED_ERR_INVALID_STATE where the VM's vCPUs have threads of
/// the library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vcpu_interrupt(
    vm: *mut vmbed_vm,
    vcpu: u32,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(vm)?.vm().interrupt_vcpu(vcpu))
}
