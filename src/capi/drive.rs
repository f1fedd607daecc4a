//! Who drives a VM: the library's own threads, or the caller's.

use std::os::fd::AsRawFd;

use super::arguments::Out;
use super::config::{attach, vmbed_builder};
use super::error::vmbed_error;
use super::handle::{self, handle};
use super::vm::vmbed_vm;
use super::{answer, call};
use crate::reactor::Dispatcher;
use crate::vm::{VcpuReturn, VmBuilder};

/// An event loop without a thread: serves the devices of VMs on your own loop. Any number of VMs may share one.
pub struct vmbed_dispatcher(());

handle!(vmbed_dispatcher holds Dispatcher);

/// Sets `dispatcher` to a new one, without VMs. It is yours to free. VMBED_ERR_EXHAUSTED where the process has no file
/// descriptor left.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_dispatcher_new(
    dispatcher: *mut *mut vmbed_dispatcher,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        Out::new(dispatcher, "dispatcher")?.put(handle::make(Dispatcher::new()?));
        Ok(())
    })
}

/// The fd to poll for reading; it stays readable while there is work. For poll() and the like only: it belongs to the
/// dispatcher, and closes with the last of its VMs and handles. -1 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_dispatcher_fd(dispatcher: *const vmbed_dispatcher) -> i32 {
    answer(-1, || handle::object(dispatcher).map_or(-1, |d| d.as_raw_fd()))
}

/// Serves what is ready, and returns; callbacks of the VMs on it run within. Does not wait for anything to become
/// ready; for another thread only that dispatches, or while it stops a device. After VMBED_EVENT_STOPPED, one more call
/// takes the guest's last words to its console. VMBED_ERR_INVALID_STATE where a callback calls.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_dispatcher_dispatch(
    dispatcher: *mut vmbed_dispatcher,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(dispatcher)?.dispatch())
}

/// Frees this handle; VMs on the dispatcher go on, and are not served any more. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_dispatcher_free(dispatcher: *mut vmbed_dispatcher) {
    answer((), || drop(handle::take(dispatcher)));
}

/// Serves the VM's console, network cards and random number generator on the dispatcher, instead of starting a thread for
/// them. Disks keep their threads, since their requests wait for the host.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_set_dispatcher(
    builder: *mut vmbed_builder,
    dispatcher: *const vmbed_dispatcher,
    error: *mut *mut vmbed_error,
) -> i32 {
    attach(builder, error, |builder| {
        builder.set_dispatcher(&*handle::object(dispatcher)?);
        Ok(())
    })
}

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
