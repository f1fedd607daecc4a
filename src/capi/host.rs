//! The machine that VMs run on.

use std::ffi::{CString, c_char};
use std::mem::offset_of;
use std::time::Duration;

use super::arguments::{Out, Sized_, array, fill, optional, path, structure};
use super::error::{c_text, vmbed_error};
use super::handle::{self, handle};
use super::{answer, call};
use crate::error::Result;
use crate::host::{ChargedBy, Host, HostConfig, Probe};
use crate::units::Bytes;

struct Finding {
    optional: bool,
    what: CString,
    problem: Option<CString>,
    remedy: CString,
}

/// What a probe holds.
pub(super) struct Findings(Vec<Finding>);

/// What this machine can and cannot do, and how to mend what it cannot.
pub struct vmbed_probe(());

handle!(vmbed_probe holds Findings);

/// Looks at what VMs need of this machine, without building anything. `kvm` is the device's path, NULL for
/// `/dev/kvm`. The probe is yours to free. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_probe_new(
    kvm: *const c_char,
    probe: *mut *mut vmbed_probe,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let out = Out::new(probe, "probe")?;
        let found: Probe = match optional(kvm, "kvm", path)? {
            Some(path) => Host::probe_at(path),
            None => Host::probe(),
        };
        let findings = found.findings.into_iter().map(|f| Finding {
            optional: f.optional,
            what: c_text(f.what),
            problem: f.problem.map(c_text),
            remedy: c_text(f.remedy),
        });
        out.put(handle::make(Findings(findings.collect())));
        Ok(())
    })
}

fn finding<T: Copy>(
    probe: *const vmbed_probe,
    index: usize,
    otherwise: T,
    read: impl FnOnce(&Finding) -> Option<T>,
) -> T {
    answer(otherwise, || {
        let found = handle::object(probe).ok().and_then(|f| f.0.get(index).and_then(read));
        found.unwrap_or(otherwise)
    })
}

/// What was looked at, in the order in which it matters, from 0. NULL past the last, and for NULL. It belongs to the
/// probe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_probe_what(probe: *const vmbed_probe, index: usize) -> *const c_char {
    finding(probe, index, std::ptr::null(), |f| Some(f.what.as_ptr()))
}

/// Why the `index`th finding will not do; NULL where it will. VMs may be had all the same, where only a sandbox needs it:
/// vmbed_probe_is_usable() knows. It belongs to the probe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_probe_problem(probe: *const vmbed_probe, index: usize) -> *const c_char {
    finding(probe, index, std::ptr::null(), |f| Some(f.problem.as_ref()?.as_ptr()))
}

/// How to mend the `index`th finding; empty where there is nothing to mend. NULL past the last. It belongs to the
/// probe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_probe_remedy(probe: *const vmbed_probe, index: usize) -> *const c_char {
    finding(probe, index, std::ptr::null(), |f| Some(f.remedy.as_ptr()))
}

/// Whether VMs can be built here: no finding is a problem, but perhaps for those that ask for a sandbox. Not for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_probe_is_usable(probe: *const vmbed_probe) -> bool {
    answer(false, || {
        handle::object(probe).is_ok_and(|f| f.0.iter().all(|f| f.optional || f.problem.is_none()))
    })
}

/// Frees a probe. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_probe_free(probe: *mut vmbed_probe) {
    answer((), || drop(handle::take(probe)));
}

/// The machine's KVM, and the ledger of what the VMs made from it are promised. A process may have several, each
/// with its own share. It may be freed before its VMs are.
pub struct vmbed_host(());

handle!(vmbed_host holds Host);

/// What a host may give to its VMs. Zero a field, or all but the size, for its default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_host_options {
    /// sizeof(struct vmbed_host_options)
    pub size: usize,
    /// The path of the KVM device. NULL: `/dev/kvm`.
    pub kvm: *const c_char,
    /// Memory to share out, in bytes. 0: the smaller of the machine's and of the limits of this process's cgroup and
    /// those above it.
    pub memory: u64,
    /// What of it is kept for the host itself, in bytes. 0: 512 MiB; 1 for none.
    pub memory_reserved: u64,
    /// How often the rest may be promised (OpenStack's ram_allocation_ratio). 0: 1.0.
    pub memory_ratio: f64,
    /// How many vCPUs a core may carry (cpu_allocation_ratio). 0: as many as you like.
    pub vcpu_ratio: f64,
    /// The least memory that one VM may have, in bytes (Placement's min_unit). 0: 1.
    pub memory_min_unit: u64,
    /// The most memory that one VM may have, whatever the ratio, in bytes (max_unit). 0: `memory`.
    pub memory_max_unit: u64,
    /// A VM's memory is a multiple of it, in bytes (step_size). 0: 1.
    pub memory_step: u64,
    /// Swap space that guests may be paged out to, in bytes.
    pub swap: u64,
    /// How long the host takes to react when memory gets short, in milliseconds: what guests have lately touched in
    /// such a time must stay free beside a newcomer's guarantee.
    pub reaction_time: u64,
    /// The numbers of the host's CPUs that are kept for VMs with dedicated vCPUs. NULL: none.
    pub dedicated_cpus: *const u32,
    /// How many they are.
    pub dedicated_count: usize,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_host_options {
    const FIRST: usize = offset_of!(Self, memory_min_unit);
    const NAME: &'static str = "vmbed_host_options";
}

pub(super) fn host_config(options: *const vmbed_host_options) -> Result<HostConfig> {
    let mut config = HostConfig::default();
    if options.is_null() {
        return Ok(config);
    }
    let options = structure(options)?;
    if let Some(kvm) = optional(options.kvm, "kvm", path)? {
        config.kvm = kvm.to_owned();
    }
    config.memory = (options.memory != 0).then_some(Bytes(options.memory));
    if options.memory_reserved != 0 {
        config.memory_reserved = Bytes(options.memory_reserved);
    }
    if options.memory_ratio != 0.0 {
        config.memory_ratio = options.memory_ratio;
    }
    for (given, field) in [
        (options.memory_min_unit, &mut config.memory_min_unit),
        (options.memory_step, &mut config.memory_step),
    ] {
        if given != 0 {
            *field = Bytes(given);
        }
    }
    config.memory_max_unit = (options.memory_max_unit != 0).then_some(Bytes(options.memory_max_unit));
    config.swap = Bytes(options.swap);
    config.reaction_time = Duration::from_millis(options.reaction_time);
    config.dedicated_cpus =
        array(options.dedicated_cpus, options.dedicated_count, "dedicated_cpus")?.to_vec();
    config.vcpu_ratio = (options.vcpu_ratio != 0.0).then_some(options.vcpu_ratio);
    Ok(config)
}

/// Opens a host, with `options` NULL for the defaults. It is yours to free. Does not block.
///
/// VMBED_ERR_NOT_FOUND, VMBED_ERR_PERMISSION_DENIED or VMBED_ERR_UNSUPPORTED with the remedy that vmbed_probe_new()
/// finds; VMBED_ERR_INVALID_ARGUMENT with every bad field.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_host_open(
    options: *const vmbed_host_options,
    host: *mut *mut vmbed_host,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let out = Out::new(host, "host")?;
        out.put(handle::make(Host::open_with(host_config(options)?)?));
        Ok(())
    })
}

/// Memory is charged to the process's cgroup: everything of all processes in it.
pub const VMBED_CHARGED_BY_CGROUP: i32 = 1;
/// No cgroup counts: everything of the machine's that is not available to others.
pub const VMBED_CHARGED_BY_MACHINE: i32 = 2;

/// What the VMs of a host hold, what there is, and how much of it is really there. Sizes are in bytes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_usage {
    /// sizeof(struct vmbed_usage)
    pub size: usize,
    /// The sum of the VMs' memory sizes, in bytes.
    pub memory: u64,
    /// (total - reserved) x ratio, in bytes.
    pub memory_capacity: u64,
    /// The sum of the VMs' vCPUs.
    pub vcpus: u64,
    /// cores x ratio; UINT64_MAX where vCPUs are not limited.
    pub vcpu_capacity: u64,
    /// vCPUs that have a core each.
    pub dedicated_vcpus: u64,
    /// Cores that are kept for such.
    pub dedicated_cpus: u64,
    /// Counts every change of the ledger, for vmbed_host_set_shares().
    pub generation: u64,
    /// How many VMs there are, or are being built.
    pub vms: u64,
    /// total - reserved: what guarantees and overhead must fit into.
    pub memory_usable: u64,
    /// Swap space that guests may be paged out to.
    pub swap: u64,
    /// The sum of what guests can touch without anybody's consent.
    pub entitlement: u64,
    /// The sum of what VMs will always have.
    pub guarantee: u64,
    /// The sum of what VMs cost beside their memory, as the ledger's model has it.
    pub overhead: u64,
    /// Guest memory that exists, resident or swapped out.
    pub backing: u64,
    /// Guest memory that KVM has mapped for guests; 0 where its statistics say nothing.
    pub stage2: u64,
    /// Guest memory that cannot be paged out.
    pub pinned: u64,
    /// This process's own resident memory beside its guests'.
    pub process: u64,
    /// What the kernel charges.
    pub charged: u64,
    /// What is charged less backing and process: kernel memory, files, other processes. Negative while guests are
    /// swapped out, which nobody is charged for as memory.
    pub unattributed: i64,
    /// To whom it is charged, one of VMBED_CHARGED_BY_*.
    pub charged_by: i32,
    /// 0.
    pub unused: i32,
    /// The sum of what guests say that they have given up to their balloons: advisory, no promise depends on it.
    pub loaned: u64,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_usage {
    const FIRST: usize = offset_of!(Self, dedicated_vcpus);
    const NAME: &'static str = "vmbed_usage";
}

/// Fills `usage`, whose size is set. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_host_usage(
    host: *const vmbed_host,
    usage: *mut vmbed_usage,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let now = handle::object(host)?.usage();
        let value = vmbed_usage {
            size: 0,
            memory: now.memory.get(),
            memory_capacity: now.memory_capacity.get(),
            vcpus: now.vcpus,
            vcpu_capacity: now.vcpu_capacity.unwrap_or(u64::MAX),
            dedicated_vcpus: now.dedicated_vcpus,
            dedicated_cpus: now.dedicated_cpus,
            generation: now.generation,
            vms: now.vms,
            memory_usable: now.memory_usable.get(),
            swap: now.swap.get(),
            entitlement: now.entitlement.get(),
            guarantee: now.guarantee.get(),
            overhead: now.overhead.get(),
            backing: now.backing.get(),
            stage2: now.stage2.get(),
            pinned: now.pinned.get(),
            process: now.process.get(),
            charged: now.charged.get(),
            unattributed: now.unattributed,
            charged_by: match now.charged_by {
                ChargedBy::Cgroup => VMBED_CHARGED_BY_CGROUP,
                ChargedBy::Machine => VMBED_CHARGED_BY_MACHINE,
            },
            unused: 0,
            loaned: now.loaned.get(),
        };
        fill(usage, &value)
    })
}

/// Frees a host. Its VMs go on, and keep what they need of it. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_host_free(host: *mut vmbed_host) {
    answer((), || drop(handle::take(host)));
}
