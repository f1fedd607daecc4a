//! What is done when the host's memory gets short.

use std::mem::offset_of;
use std::time::Duration;

use super::arguments::{Sized_, fill, invalid, structure};
use super::error::vmbed_error;
use super::events::vmbed_event;
use super::handle;
use super::host::vmbed_host;
use super::{answer, call};
use crate::error::Result;
use crate::events::{EventKind, ReclaimStage};
use crate::host::{ReclaimConfig, ReclaimSandbox};
use crate::units::Bytes;

/// A guest is asked for memory that it does not use, or may have some back.
pub const VMBED_STAGE_BALLOON: i32 = 0;
/// Some of a VM's memory goes to swap.
pub const VMBED_STAGE_PAGE_OUT: i32 = 1;
/// A VM stands still, since it has more than its guarantee.
pub const VMBED_STAGE_PAUSE: i32 = 2;
/// A VM ends: it was declared a victim.
pub const VMBED_STAGE_STOP: i32 = 3;

/// The thread has the rights of the process.
pub const VMBED_RECLAIM_SANDBOX_OFF: i32 = 0;
/// It is in a sandbox, as far as the kernel has what it takes: vmbed_host_get_reclaim_sandbox() says what is in force.
pub const VMBED_RECLAIM_SANDBOX_IF_PRESENT: i32 = 1;
/// It does not begin where the kernel lacks something of it.
pub const VMBED_RECLAIM_SANDBOX_REQUIRED: i32 = 2;

/// What a host does when its memory gets short. "Free" is what the kernel calls available, or what is left below the own
/// cgroup's limit if that is less, in bytes. Each stage goes on until a quarter more is free than where it begins; one whose
/// threshold is 0 never begins.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_reclaim_options {
    /// sizeof(struct vmbed_reclaim_options)
    pub size: usize,
    /// Below it, guests with a balloon are asked for what they do not use; when there is room again, they have it back.
    pub balloon_below: u64,
    /// Below it, what VMs have above their guarantees is paged out, where there is swap.
    pub page_out_below: u64,
    /// Below it, VMs above their guarantees are paused, one after the other.
    pub pause_below: u64,
    /// Below it, VMs with a victim class (vmbed_config_set_promise()) are stopped, one after the other.
    pub stop_below: u64,
    /// How much of what a guest does not use may be asked for: below 1. The higher, the more an idle guest gives for a busy
    /// one. 0: 0.75.
    pub idle_tax: f64,
    /// How many milliseconds a VM may be paused. Then it goes on, or is stopped if it may be. 0: 10,000.
    pub pause_deadline: u32,
    /// How often the host's memory is looked at, in milliseconds, besides whenever the kernel reports pressure. 0: 1,000.
    pub interval: u32,
    /// Whether the thread is in a sandbox, one of VMBED_RECLAIM_SANDBOX_*: it may make the system calls that its work needs and no
    /// others, and open no file. A call that is refused fails with EPERM and ends the thread: VMs that it has paused go on, and each VM
    /// that there is has an event, VMBED_EVENT_RECLAIM_FAILED. VMs are paused, and your log is called, on threads that are not in it. As
    /// long as it is there, do not change the process's user or groups with the C library's functions, which would end the process.
    pub sandbox: i32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_reclaim_options {
    const FIRST: usize = offset_of!(Self, sandbox);
    const NAME: &'static str = "vmbed_reclaim_options";
}

/// Says what to do with the VMs of a host when its memory gets short; NULL, as in the beginning: nothing. One thread,
/// `vmbed-reclaim`, does it, until the last end of this host is freed, which waits for it. Each step is an event of the VM
/// that it is about, VMBED_EVENT_MEMORY_PRESSURE. With NULL, VMs that it has paused go on, and balloons are asked for no more
/// than vmbed_vm_set_balloon() said. Blocks for as long as a step takes: a pause up to 10 s. Another `sandbox` than before begins with
/// another thread, and the one before ends as with NULL. In a callback it does not wait for the one before: what is said here of
/// an end comes soon after.
///
/// VMBED_ERR_INVALID_ARGUMENT with every bad field; VMBED_ERR_EXHAUSTED where the process is out of threads or descriptors;
/// VMBED_ERR_UNSUPPORTED and VMBED_ERR_BUSY where this kernel has not, or gives not, what the sandbox takes. What was set before goes
/// on then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_host_set_reclaim(
    host: *mut vmbed_host,
    options: *const vmbed_reclaim_options,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let host = handle::object(host)?;
        if options.is_null() {
            return host.set_reclaim(None);
        }
        let given = structure(options)?;
        let mut config = ReclaimConfig {
            balloon_below: Bytes(given.balloon_below),
            page_out_below: Bytes(given.page_out_below),
            pause_below: Bytes(given.pause_below),
            stop_below: Bytes(given.stop_below),
            ..ReclaimConfig::default()
        };
        if given.idle_tax != 0.0 {
            config.idle_tax = given.idle_tax;
        }
        let or_default = |milliseconds: u32, time: &mut Duration| {
            if milliseconds != 0 {
                *time = Duration::from_millis(milliseconds.into());
            }
        };
        or_default(given.pause_deadline, &mut config.pause_deadline);
        or_default(given.interval, &mut config.interval);
        config.sandbox = sandbox_of(given.sandbox)?;
        super::config::reserved("vmbed_reclaim_options", given.reserved)?;
        host.set_reclaim(Some(&config))
    })
}

fn sandbox_of(number: i32) -> Result<ReclaimSandbox> {
    match number {
        VMBED_RECLAIM_SANDBOX_OFF => Ok(ReclaimSandbox::Off),
        VMBED_RECLAIM_SANDBOX_IF_PRESENT => Ok(ReclaimSandbox::IfPresent),
        VMBED_RECLAIM_SANDBOX_REQUIRED => Ok(ReclaimSandbox::Required),
        other => {
            let why = format!("vmbed_reclaim_options.sandbox is {other}, not one of VMBED_RECLAIM_SANDBOX_*");
            Err(invalid(why))
        }
    }
}

/// What an event of the kind VMBED_EVENT_MEMORY_PRESSURE says, in bytes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_pressure {
    /// sizeof(struct vmbed_pressure)
    pub size: usize,
    /// What the step is about: what the balloon is asked for now, what is to be paged out, what there is of a VM that is
    /// paused or stopped.
    pub wanted: u64,
    /// What the guest says that it has put into the balloon so far; what was named to the kernel for paging out.
    pub claimed: u64,
    /// What the host has got of that, as it counts it.
    pub measured: u64,
    /// Of a pause: how many milliseconds it lasts at most. What comes then: a victim is stopped, another VM goes on.
    pub deadline: u64,
    /// What was done, one of VMBED_STAGE_*.
    pub stage: i32,
    /// Zero.
    pub unused: u32,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_pressure {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_pressure";
}

/// Fills `pressure`, whose size is set, with what an event of the kind VMBED_EVENT_MEMORY_PRESSURE says. False for every other
/// event, for NULL and for a wrong size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_pressure(
    event: *const vmbed_event,
    pressure: *mut vmbed_pressure,
) -> bool {
    answer(false, || {
        let story = handle::object(event).ok();
        let value = story.as_ref().and_then(|story| match story.event().kind {
            EventKind::MemoryPressure { stage, wanted, claimed, measured, deadline } => {
                Some(vmbed_pressure {
                    size: 0,
                    wanted: wanted.get(),
                    claimed: claimed.get(),
                    measured: measured.get(),
                    deadline: deadline.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
                    stage: match stage {
                        ReclaimStage::Balloon => VMBED_STAGE_BALLOON,
                        ReclaimStage::PageOut => VMBED_STAGE_PAGE_OUT,
                        ReclaimStage::Pause => VMBED_STAGE_PAUSE,
                        ReclaimStage::Stop => VMBED_STAGE_STOP,
                    },
                    unused: 0,
                })
            }
            _ => None,
        });
        value.is_some_and(|value| fill(pressure, &value).is_ok())
    })
}
