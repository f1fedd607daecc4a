//! A sandbox for the threads of a VM.

use super::arguments::{Sized_, fill, invalid};
use super::config::{change, vmbed_config};
use super::error::vmbed_error;
use super::host::vmbed_host;
use super::vm::vmbed_vm;
use super::{call, handle};
use crate::config::SandboxConfig;
use crate::vm::SandboxReport;

/// Threads that run vCPUs, and the one that ends a VM. They call your devices, and some functions of your networks.
pub const VMBED_SANDBOX_VCPUS: u32 = 1;
/// Threads that serve the console, cards and the random number generator. They call your console callback and your networks.
pub const VMBED_SANDBOX_DEVICES: u32 = 2;
/// Threads that serve disks. They call your disks.
pub const VMBED_SANDBOX_DISKS: u32 = 4;
/// The thread that serves the balloon.
pub const VMBED_SANDBOX_BALLOON: u32 = 8;
/// All of them.
pub const VMBED_SANDBOX_ALL: u32 = 15;

/// Puts threads of the VM into a sandbox: each may make the system calls that its work needs and no others, and opens no files.
/// `threads` is the sum of VMBED_SANDBOX_* but not of none; 0: there is no sandbox, as in the beginning. A call that is refused
/// fails with EPERM, and its VM stops with VMBED_CAUSE_SANDBOX_VIOLATION; the process and its other VMs go on.
///
/// Code of yours never runs in it: vmbed_builder_build() answers VMBED_ERR_INVALID_ARGUMENT where such a thread would call some,
/// and names it. It answers VMBED_ERR_UNSUPPORTED where the kernel lacks seccomp's notices or Landlock, unless `best_effort`:
/// then it goes on with what there is, and vmbed_vm_get_sandbox() says what that is.
///
/// Once such a VM is built, do not change the process's user or groups with the C library's functions: they would have each
/// thread do the same, which is refused, and end the process.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_sandbox(
    config: *mut vmbed_config,
    threads: u32,
    best_effort: bool,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        if threads & !VMBED_SANDBOX_ALL != 0 {
            return Err(invalid(format!("threads is {threads:#x}: it has bits that are no VMBED_SANDBOX_*")));
        }
        let has = |bit| threads & bit != 0;
        c.sandbox = (threads != 0).then(|| SandboxConfig {
            vcpus: has(VMBED_SANDBOX_VCPUS),
            devices: has(VMBED_SANDBOX_DEVICES),
            disks: has(VMBED_SANDBOX_DISKS),
            balloon: has(VMBED_SANDBOX_BALLOON),
            best_effort,
        });
        Ok(())
    })
}

/// What is in force of a sandbox.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_sandbox {
    /// sizeof(struct vmbed_sandbox)
    pub size: usize,
    /// How many threads are in it; 0 where there is none.
    pub threads: u32,
    /// Whether their calls are filtered: 0 or 1.
    pub seccomp: u32,
    /// The version of Landlock's interface by which they open no files; 0 where the kernel has none.
    pub landlock: u32,
    /// 0
    pub reserved: u32,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_sandbox {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_sandbox";
}

impl From<SandboxReport> for vmbed_sandbox {
    fn from(now: SandboxReport) -> Self {
        Self {
            size: 0,
            threads: now.threads.len() as u32,
            seccomp: now.seccomp.into(),
            landlock: now.landlock.unwrap_or(0),
            reserved: 0,
        }
    }
}

/// Fills `sandbox`, whose size is set. In every state. Never blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_get_sandbox(
    vm: *const vmbed_vm,
    sandbox: *mut vmbed_sandbox,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let now = handle::object(vm)?.vm().sandbox().unwrap_or_default();
        fill(sandbox, &vmbed_sandbox::from(now))
    })
}

/// Fills `sandbox`, whose size is set, with what is in force for `vmbed-reclaim`; zeroes where it is in no sandbox, or is not there.
/// Never blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_host_get_reclaim_sandbox(
    host: *const vmbed_host,
    sandbox: *mut vmbed_sandbox,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let now = handle::object(host)?.reclaim_sandbox().unwrap_or_default();
        fill(sandbox, &vmbed_sandbox::from(now))
    })
}
