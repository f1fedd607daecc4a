//! A VM's life.

use std::sync::Arc;
use std::time::Duration;

use super::arguments::{Out, Sized_, fill, put_optional, slice, slice_mut, structure, timeout};
use super::error::vmbed_error;
use super::events::{VMBED_CAUSE_NONE, cause, vmbed_events};
use super::handle::{self, handle};
use super::{answer, call};
use crate::error::{Error, ErrorKind, Result};
use crate::vm::{Registers, Vm, VmState};

/// A virtual machine in this process. Every function may be called from any thread, at the same time as any other,
/// vmbed_vm_free() included: calls that wait then come back with VMBED_ERR_INVALID_ARGUMENT or the VM's end.
///
/// Functions that wait for the VM answer VMBED_ERR_INVALID_STATE when a callback of this same VM calls them, since
/// they would wait for themselves.
pub struct vmbed_vm(());

handle!(vmbed_vm holds Machine);

/// What a handle of a VM holds.
pub(super) struct Machine(Vm);

impl Machine {
    pub fn new(vm: Vm) -> Self {
        Self(vm)
    }

    pub fn vm(&self) -> &Vm {
        &self.0
    }
}

fn with<R>(
    vm: *const vmbed_vm,
    error: *mut *mut vmbed_error,
    f: impl FnOnce(&Vm) -> Result<R>,
    put: impl FnOnce(R),
) -> i32 {
    call(error, || {
        put(f(&handle::object(vm)?.0)?);
        Ok(())
    })
}

/// Built, and nothing has run.
pub const VMBED_STATE_BUILT: i32 = 1;
/// The guest runs.
pub const VMBED_STATE_RUNNING: i32 = 2;
/// The guest, its clocks and its devices stand still.
pub const VMBED_STATE_PAUSED: i32 = 3;
/// The guest has ended; vmbed_vm_wait() says why.
pub const VMBED_STATE_STOPPED: i32 = 4;

/// A number that no other VM of this process has had; events carry it. 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_id(vm: *const vmbed_vm) -> u64 {
    answer(0, || handle::object(vm).map_or(0, |m| m.0.id().0))
}

/// Where the VM is in its life, one of VMBED_STATE_*; 0 for NULL. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_state(vm: *const vmbed_vm) -> i32 {
    answer(0, || {
        handle::object(vm).map_or(0, |m| match m.0.state() {
            VmState::Built => VMBED_STATE_BUILT,
            VmState::Running => VMBED_STATE_RUNNING,
            VmState::Paused => VMBED_STATE_PAUSED,
            VmState::Stopped(_) => VMBED_STATE_STOPPED,
        })
    })
}

/// Lets the vCPUs run. Does not block. VMBED_ERR_INVALID_STATE unless the VM has just been built.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_start(vm: *mut vmbed_vm, error: *mut *mut vmbed_error) -> i32 {
    with(vm, error, Vm::start, |()| ())
}

/// Stops the guest's time: every vCPU, every device, every clock. Returns when all stand still, usually within a
/// millisecond; a request that a device has begun is finished first, however long the host takes for it.
///
/// VMBED_ERR_INVALID_STATE unless it runs. VMBED_ERR_TIMED_OUT after 10 s when a device or a disk of yours does not
/// answer: then the VM goes on running.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_pause(vm: *mut vmbed_vm, error: *mut *mut vmbed_error) -> i32 {
    with(vm, error, Vm::pause, |()| ())
}

/// Lets a paused guest go on. Its clocks go on from where they stood. Does not block. VMBED_ERR_INVALID_STATE unless it
/// is paused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_resume(vm: *mut vmbed_vm, error: *mut *mut vmbed_error) -> i32 {
    with(vm, error, Vm::resume, |()| ())
}

/// Presses the power button. Does not block; a guest that listens to it ends with VMBED_CAUSE_GUEST_POWEROFF in its own
/// time, another does nothing. VMBED_ERR_INVALID_STATE unless it runs; VMBED_ERR_UNSUPPORTED for a bare guest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_shutdown(vm: *mut vmbed_vm, error: *mut *mut vmbed_error) -> i32 {
    with(vm, error, Vm::shutdown, |()| ())
}

/// Ends the guest now, as pulling the plug would: what it had not flushed is lost. `cause`, where it is not NULL, is set
/// to VMBED_CAUSE_HOST_STOP or to what came before. VMBED_ERR_TIMED_OUT after 10 s when something of the host's hangs (a
/// disk, a device of yours); the end stays requested.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_stop(
    vm: *mut vmbed_vm,
    cause: *mut i32,
    error: *mut *mut vmbed_error,
) -> i32 {
    with(vm, error, Vm::stop, |why| put_optional(cause, self::cause(&why)))
}

/// Asks for the end; for callbacks. Does not block: VMBED_EVENT_STOPPED tells when it is done. Does nothing when the VM
/// has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_request_stop(vm: *mut vmbed_vm, error: *mut *mut vmbed_error) -> i32 {
    call(error, || {
        handle::object(vm)?.0.request_stop();
        Ok(())
    })
}

/// Waits at most `timeout` milliseconds until the guest has ended; for ever where that is negative. `cause`, where it is
/// not NULL, is set to one of VMBED_CAUSE_*. VMBED_ERR_TIMED_OUT where it has not ended by then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_wait(
    vm: *const vmbed_vm,
    timeout: i64,
    cause: *mut i32,
    error: *mut *mut vmbed_error,
) -> i32 {
    let wait = |vm: &Vm| match self::timeout(timeout) {
        Some(time) => vm.wait_timeout(time)?.ok_or_else(|| {
            Error::new(ErrorKind::TimedOut, format!("wait: the guest has not ended within {timeout} ms"))
        }),
        None => vm.wait(),
    };
    put_optional(cause, VMBED_CAUSE_NONE);
    with(vm, error, wait, |why| put_optional(cause, self::cause(&why)))
}

/// Sets `events` to the VM's stream. That handle is yours to free; it works after the VM was freed, too.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_events(
    vm: *const vmbed_vm,
    events: *mut *mut vmbed_events,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let out = Out::new(events, "events")?;
        out.put(handle::make(handle::object(vm)?.0.events().clone()));
        Ok(())
    })
}

/// Copies the last that the guest wrote to its console into `data`: at most `room` bytes, of the 64 KiB that are kept.
/// `length` is set to how many. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_console_tail(
    vm: *const vmbed_vm,
    data: *mut u8,
    room: usize,
    length: *mut usize,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let (out, data) = (Out::new(length, "length")?, slice_mut(data, room, "data")?);
        let tail = handle::object(vm)?.0.console_tail();
        let count = tail.len().min(data.len());
        data[..count].copy_from_slice(&tail[tail.len() - count..]);
        out.put(count);
        Ok(())
    })
}

/// Types `length` bytes of `data` on the guest's console. `taken`, where it is not NULL, is set to how many were taken:
/// what the guest has not read yet is bounded (4 KiB), the rest may be offered again. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_console_input(
    vm: *mut vmbed_vm,
    data: *const u8,
    length: usize,
    taken: *mut usize,
    error: *mut *mut vmbed_error,
) -> i32 {
    with(
        vm,
        error,
        |vm| Ok(vm.console_input(slice(data, length, "data")?)),
        |count| put_optional(taken, count),
    )
}

/// The size of the guest's memory in bytes; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_memory_size(vm: *const vmbed_vm) -> u64 {
    answer(0, || handle::object(vm).map_or(0, |m| m.0.memory_size()))
}

/// When the guest first reached for a device outside of it, a port or an address without memory: nanoseconds of
/// CLOCK_MONOTONIC. 0 until then, and where there is no VM. In every state.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_first_exit(vm: *const vmbed_vm) -> u64 {
    answer(0, || {
        let first = handle::object(vm).ok().and_then(|m| m.0.first_exit());
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: room for one timespec. It cannot fail for this clock, which `Instant` reads, too.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
        let now = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32);
        let then = first.map(|first| now.saturating_sub(first.elapsed()).as_nanos());
        then.and_then(|then| u64::try_from(then).ok()).unwrap_or(0)
    })
}

/// Copies `length` bytes of guest memory from the guest-physical `address` into `data`. The guest may change them
/// meanwhile. Works in every state, and waits for nothing but the host's paging. VMBED_ERR_INVALID_ARGUMENT where the range
/// is not all guest memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_read_memory(
    vm: *const vmbed_vm,
    address: u64,
    data: *mut u8,
    length: usize,
    error: *mut *mut vmbed_error,
) -> i32 {
    with(vm, error, |vm| vm.read_memory(address, slice_mut(data, length, "data")?), |()| ())
}

/// Copies `length` bytes of `data` into guest memory, as vmbed_vm_read_memory() does out of it. Where it fails, none is
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_write_memory(
    vm: *mut vmbed_vm,
    address: u64,
    data: *const u8,
    length: usize,
    error: *mut *mut vmbed_error,
) -> i32 {
    with(vm, error, |vm| vm.write_memory(address, slice(data, length, "data")?), |()| ())
}

/// The general registers of a vCPU.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct vmbed_registers {
    /// sizeof(struct vmbed_registers)
    pub size: usize,
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_registers {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_registers";
}

/// Copies every register by name from one structure into another.
macro_rules! copy_registers {
    ($from:expr => $into:expr) => {{
        let (from, mut into) = ($from, $into);
        copy_registers!(from into: rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags);
        into
    }};
    ($from:ident $into:ident: $($name:ident)*) => { $($into.$name = $from.$name;)* };
}

/// Fills `registers`, whose size is set, with those of vCPU `vcpu`. Waits for a pause or resume in progress, for nothing
/// else. VMBED_ERR_INVALID_STATE while the VM runs; VMBED_ERR_INVALID_ARGUMENT where there is no such vCPU.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_get_registers(
    vm: *const vmbed_vm,
    vcpu: u32,
    registers: *mut vmbed_registers,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        // Of the caller only the size counts.
        let found = handle::object(vm)?.0.registers(vcpu)?;
        // SAFETY: integers: all zeroes is a value.
        let zero: vmbed_registers = unsafe { std::mem::zeroed() };
        fill(registers, &copy_registers!(found => zero))
    })
}

/// Sets the general registers of vCPU `vcpu`, all of them. Waits and fails as vmbed_vm_get_registers() does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_set_registers(
    vm: *mut vmbed_vm,
    vcpu: u32,
    registers: *const vmbed_registers,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let given = structure(registers)?;
        handle::object(vm)?.0.set_registers(vcpu, &copy_registers!(given => Registers::default()))
    })
}

/// Ends everything: the guest, every thread, every file descriptor, its memory. When it returns, no callback of this VM
/// runs or will ever run, and their data were destroyed. Called by one of the VM's own callbacks, it returns at once, and
/// does the same right after the callback has returned. Waits as long as a request that hangs in the host or in a callback.
/// A second call for the same VM, from another thread while the first one waits, returns at once. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_free(vm: *mut vmbed_vm) {
    answer((), || {
        let Some(machine) = handle::take(vm) else { return };
        machine.0.end();
        // Calls in progress elsewhere come back now that it has ended. What the VM's callbacks own is destroyed
        // before this returns, unless it is one of them that calls.
        while !machine.0.is_own_thread() && Arc::strong_count(&machine) > 1 {
            std::thread::sleep(Duration::from_micros(50));
        }
    });
}
