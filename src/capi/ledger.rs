//! What VMs are promised, what is really there, and what their vCPUs get.

use std::ffi::c_char;
use std::time::Duration;

use super::arguments::{Sized_, fill, invalid, optional, path};
use super::config::{change, vmbed_config};
use super::error::vmbed_error;
use super::handle;
use super::host::{host_config, vmbed_host, vmbed_host_options};
use super::vm::vmbed_vm;
use super::{answer, call};
use crate::budget::{Constraint, Verdict};
use crate::config::CgroupConfig;
use crate::sys::lock;
use crate::units::Bytes;

/// One VM's memory keeps to the least, the most and the step that one VM may have.
pub const VMBED_CONSTRAINT_MEMORY_UNITS: i32 = 0;
/// One VM's shared vCPUs keep to the least, the most and the step that one VM may have.
pub const VMBED_CONSTRAINT_VCPU_UNITS: i32 = 1;
/// The VMs' memory sizes together stay within (total - reserved) x ratio.
pub const VMBED_CONSTRAINT_NOMINAL: i32 = 2;
/// Guarantees and overhead together stay within total - reserved.
pub const VMBED_CONSTRAINT_GUARANTEE: i32 = 3;
/// Everything that guests can touch, and overhead, stays within total - reserved + swap, unless the VM may be stopped.
pub const VMBED_CONSTRAINT_SOLVENCY: i32 = 4;
/// Free memory after the newcomer's guarantee covers what guests touch during the reaction time.
pub const VMBED_CONSTRAINT_HEADROOM: i32 = 5;
/// The VMs' shared vCPUs together stay within cores x ratio.
pub const VMBED_CONSTRAINT_VCPUS: i32 = 6;
/// Each dedicated vCPU has a core of its own.
pub const VMBED_CONSTRAINT_DEDICATED_VCPUS: i32 = 7;

/// How one constraint stands to a claim, in bytes or vCPUs.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_slack {
    /// The most that may be promised. UINT64_MAX: not limited.
    pub limit: u64,
    /// What is promised without this claim.
    pub used: u64,
    /// What the claim asks for.
    pub wanted: u64,
    /// What would be left; negative is how much is missing.
    pub left: i64,
    /// 1 where this alone forbids the claim, else 0.
    pub broken: u64,
}

/// The ledger's answer to a claim.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_verdict {
    /// sizeof(struct vmbed_verdict)
    pub size: usize,
    /// The constraint that forbids the claim, one of VMBED_CONSTRAINT_*; -1 where it fits.
    pub binding: i32,
    /// How many there are in `slack`.
    pub count: u32,
    /// Every constraint, by VMBED_CONSTRAINT_*.
    pub slack: [vmbed_slack; 8],
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_verdict {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_verdict";
}

impl vmbed_verdict {
    pub(super) fn of(verdict: &Verdict) -> Self {
        // In the order of the numbers above.
        let slack = verdict.slack.map(|s| vmbed_slack {
            limit: s.limit,
            used: s.used,
            wanted: s.wanted,
            left: s.left,
            broken: s.broken.into(),
        });
        let place = |c: Constraint| Constraint::ALL.iter().position(|one| *one == c);
        let binding = verdict.binding.and_then(place).and_then(|n| i32::try_from(n).ok());
        Self { size: 0, binding: binding.unwrap_or(-1), count: slack.len() as u32, slack }
    }
}

/// Fills `verdict`, whose size is set, with what the ledger would answer to a VM of this configuration. Nothing is
/// built or booked. Does not block for long.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_host_verdict(
    host: *const vmbed_host,
    config: *const vmbed_config,
    verdict: *mut vmbed_verdict,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let (host, config) = (handle::object(host)?, handle::object(config)?);
        let found = host.verdict(&lock(&*config));
        fill(verdict, &vmbed_verdict::of(&found))
    })
}

/// Fills `verdict`, whose size is set, with the one behind an error of status VMBED_ERR_REFUSED. False for every other
/// error, for NULL and for a wrong size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_error_verdict(error: *const vmbed_error, verdict: *mut vmbed_verdict) -> bool {
    answer(false, || {
        let failure = handle::object(error).ok();
        let found = failure.as_ref().and_then(|f| f.verdict.as_ref());
        found.is_some_and(|found| fill(verdict, found).is_ok())
    })
}

/// Changes what there is to give while VMs run: all of `options` (NULL for the defaults) but the path of the KVM. Less
/// than is promised is accepted; from then on nothing is booked but what does not worsen that. vCPUs that exist stay on
/// the CPUs that they have. `generation` is the one
/// of the vmbed_usage that the change is based on, UINT64_MAX for any. Does not block for long.
///
/// VMBED_ERR_INVALID_ARGUMENT with every bad field; VMBED_ERR_INVALID_STATE where the generation is another one by now.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_host_set_shares(
    host: *mut vmbed_host,
    options: *const vmbed_host_options,
    generation: u64,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let host = handle::object(host)?;
        host.set_shares(&host_config(options)?, expected(generation))?;
        Ok(())
    })
}

fn expected(generation: u64) -> Option<u64> {
    (generation != u64::MAX).then_some(generation)
}

/// Sets what the ledger promises the VM: `guarantee` bytes of its memory that it will always have, 0 by default, and in
/// `victim`, -1 by default, the class in which it may be stopped when the host runs out of memory, 0 to 255, the lowest
/// first. A VM with a class is admitted where memory and swap could not hold all that guests may touch.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_promise(
    config: *mut vmbed_config,
    guarantee: u64,
    victim: i32,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        c.promise.victim = match victim {
            -1 => None,
            class => Some(u8::try_from(class).map_err(|_| {
                invalid(format!(
                    "victim is {class}: a class from 0 to 255, or -1 for a VM that may not be stopped"
                ))
            })?),
        };
        c.promise.guarantee = Bytes(guarantee);
        Ok(())
    })
}

/// Says whether each vCPU has a core of the host's for itself, of those that vmbed_host_options keeps for such.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_dedicated(
    config: *mut vmbed_config,
    dedicated: bool,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        c.cpus.dedicated = dedicated;
        Ok(())
    })
}

/// Confines vCPU `vcpu` to the host's CPUs with these `length` numbers. Once one is confined, all must be.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_affinity(
    config: *mut vmbed_config,
    vcpu: u32,
    cpus: *const u32,
    length: usize,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        let list = super::arguments::array(cpus, length, "cpus")?.to_vec();
        let at = usize::try_from(vcpu).unwrap_or(usize::MAX);
        if at >= usize::from(crate::config::validate::MAX_VCPUS) {
            return Err(invalid(format!("vcpu is {vcpu}: at most 253")));
        }
        let lists = &mut c.cpus.affinity;
        lists.resize(lists.len().max(at + 1), Vec::new());
        lists[at] = list;
        Ok(())
    })
}

/// Gives the VM's threads a cgroup (version 2) of their own, below `parent`, the directory of a cgroup that the process is in or
/// below and may write to, or below the process's own one where that is NULL. It is gone with the VM.
///
/// `weight`, 1 to 10,000, is the VM's part of the time that its parent has, when more is wanted than there is; 100 is what
/// every cgroup begins with. In each `period` of microseconds, 1,000 to 1,000,000, its threads together run `quota`
/// microseconds at most; 0 for both: there is no limit. Threads of yours that call vmbed_vcpu_run() stay where they are.
///
/// What the kernel refuses is an error of vmbed_builder_build() that names the file.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_cgroup(
    config: *mut vmbed_config,
    parent: *const c_char,
    weight: u32,
    quota: u64,
    period: u64,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        let parent = optional(parent, "parent", path)?.map(Into::into);
        let mut made = CgroupConfig { parent, weight, ..CgroupConfig::default() };
        if (quota, period) != (0, 0) {
            (made.quota, made.period) = (Some(Duration::from_micros(quota)), Duration::from_micros(period));
        }
        c.cgroup = Some(made);
        Ok(())
    })
}

/// A VM's memory in bytes: what was promised, and what is there.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_memory {
    /// sizeof(struct vmbed_memory)
    pub size: usize,
    /// The most that the VM may ever have: its configured size.
    pub max: u64,
    /// What its guest can touch without anybody's consent.
    pub entitlement: u64,
    /// What it will always have.
    pub guarantee: u64,
    /// What the VM costs beside its memory, as the ledger's model has it.
    pub overhead: u64,
    /// Counts the changes of the promises, from 1 on.
    pub generation: u64,
    /// What exists: what was ever touched, in memory or in swap. Exact to the page.
    pub backing: u64,
    /// What of it is in memory.
    pub resident: u64,
    /// What of it is in swap.
    pub swapped: u64,
    /// What of it this process maps with huge pages.
    pub huge: u64,
    /// What of it cannot be paged out. vmbed pins nothing so far.
    pub pinned: u64,
    /// What KVM has mapped for the guest; 0 where its statistics say nothing.
    pub stage2: u64,
    /// What the guest says that it has given up to its balloon: advisory, no promise depends on it.
    pub loaned: u64,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_memory {
    const FIRST: usize = std::mem::offset_of!(Self, loaned);
    const NAME: &'static str = "vmbed_memory";
}

/// Fills `memory`, whose size is set. In every state. Costs microseconds and a walk over page tables: milliseconds for
/// each GiB that is there in small pages.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_get_memory(
    vm: *const vmbed_vm,
    memory: *mut vmbed_memory,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let now = handle::object(vm)?.vm().memory();
        let value = vmbed_memory {
            size: 0,
            max: now.max.get(),
            entitlement: now.entitlement.get(),
            guarantee: now.guarantee.get(),
            overhead: now.overhead.get(),
            generation: now.generation,
            backing: now.backing.get(),
            resident: now.resident.get(),
            swapped: now.swapped.get(),
            huge: now.huge.get(),
            pinned: now.pinned.get(),
            stage2: now.stage2.get(),
            loaned: now.loaned.get(),
        };
        fill(memory, &value)
    })
}

/// Changes how many bytes of memory the VM will always have. Less than before always passes. `generation` is the one of
/// the vmbed_memory that the change is based on, UINT64_MAX for any. Does not block for long.
///
/// VMBED_ERR_INVALID_ARGUMENT for more than the VM's memory; VMBED_ERR_REFUSED by the ledger; VMBED_ERR_INVALID_STATE where
/// the generation is another one by now. Then nothing has changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_set_guarantee(
    vm: *mut vmbed_vm,
    guarantee: u64,
    generation: u64,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        handle::object(vm)?.vm().set_guarantee(Bytes(guarantee), expected(generation))?;
        Ok(())
    })
}

/// What a vCPU got of the host.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_vcpu_statistics {
    /// sizeof(struct vmbed_vcpu_statistics)
    pub size: usize,
    /// The kernel's id of the thread that runs it; 0 while none does.
    pub thread: i32,
    /// The host's CPU that it is confined to; -1 where there is none, or more than one.
    pub cpu: i32,
    /// How long its threads ran, in the guest or for it, in nanoseconds.
    pub run_time: u64,
    /// How long its threads were ready to run and had no CPU, in nanoseconds. What a guest knows as stolen time.
    pub run_delay: u64,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_vcpu_statistics {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_vcpu_statistics";
}

/// Fills `statistics`, whose size is set, with what vCPU `vcpu` got. In every state; the times stand still once it runs
/// no more. Does not block for long. VMBED_ERR_INVALID_ARGUMENT where there is no such vCPU.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_get_vcpu_statistics(
    vm: *const vmbed_vm,
    vcpu: u32,
    statistics: *mut vmbed_vcpu_statistics,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let now = handle::object(vm)?.vm().vcpu_statistics(vcpu)?;
        let cpu = match now.cpus[..] {
            [one] => i32::try_from(one).unwrap_or(-1),
            _ => -1,
        };
        let nanoseconds = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let value = vmbed_vcpu_statistics {
            size: 0,
            thread: now.thread.unwrap_or(0),
            cpu,
            run_time: nanoseconds(now.run_time),
            run_delay: nanoseconds(now.run_delay),
        };
        fill(statistics, &value)
    })
}
