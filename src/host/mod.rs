#![forbid(unsafe_code)]
//! The machine that VMs run on: its KVM, what that can do, and the ledger of what was promised.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm};

use crate::budget::{Inventory, Ledger, Usage};
use crate::config::VmConfig;
use crate::error::{Error, ErrorKind, FieldError, Result};
use crate::units::Bytes;
use crate::vcpu::cpuid::HostCpu;
use crate::vm::{HostParts, Vm, VmBuilder};

mod limits;
mod probe;

pub use probe::{Finding, Probe};

/// A machine's KVM and the ledger of the VMs made from it.
///
/// Cheap to clone: clones share the KVM and the ledger. A process may have several hosts, each with its
/// own share; dropping the last clone closes the KVM once its VMs are gone too.
///
/// ```no_run
/// let host = vmbed::Host::open()?;
/// # Ok::<(), vmbed::Error>(())
/// ```
#[derive(Clone)]
pub struct Host(Arc<HostParts>);

/// What a [`Host`] may give to its VMs, and where its KVM is.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct HostConfig {
    /// The KVM device. Default `/dev/kvm`.
    pub kvm: PathBuf,
    /// Memory to share out. Default: the smaller of the machine's and of the limits of this process's
    /// cgroup and those above it.
    pub memory: Option<Bytes>,
    /// What of it is kept for the host itself. Default 512 MiB.
    pub memory_reserved: Bytes,
    /// How often the rest may be promised (OpenStack's `ram_allocation_ratio`). Default 1.0.
    pub memory_ratio: f64,
    /// How many vCPUs a core may carry (`cpu_allocation_ratio`). Default `None`: as many as you like.
    pub vcpu_ratio: Option<f64>,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            kvm: "/dev/kvm".into(),
            memory: None,
            memory_reserved: Bytes::mib(512),
            memory_ratio: 1.0,
            vcpu_ratio: None,
        }
    }
}

impl HostConfig {
    fn validate(&self) -> Result<()> {
        let mut fields = Vec::new();
        let good = |ratio: f64| ratio.is_finite() && ratio > 0.0;
        let mut check = |field: &str, ratio: f64| {
            if !good(ratio) {
                fields.push(FieldError::new(field, format!("is {ratio}"), "a finite number above 0"));
            }
        };
        check("memory_ratio", self.memory_ratio);
        check("vcpu_ratio", self.vcpu_ratio.unwrap_or(1.0));
        if let Some(memory) = self.memory.filter(|m| *m < self.memory_reserved) {
            let problem = format!("{} of {memory} are reserved", self.memory_reserved);
            fields.push(FieldError::new("memory_reserved", problem, "at most memory"));
        }
        if fields.is_empty() { Ok(()) } else { Err(Error::invalid_fields(fields)) }
    }
}

impl Host {
    /// Looks at what VMs need of this machine, without building anything.
    ///
    /// ```no_run
    /// print!("{}", vmbed::Host::probe());
    /// ```
    pub fn probe() -> Probe {
        Self::probe_at("/dev/kvm")
    }

    /// The same for a KVM device elsewhere.
    pub fn probe_at(kvm: impl AsRef<Path>) -> Probe {
        probe::look(kvm.as_ref()).0
    }

    /// Opens `/dev/kvm` with the default shares.
    ///
    /// # Errors
    /// What [`Host::probe`] finds wrong, with its remedy: `NotFound`, `PermissionDenied`, `Unsupported`.
    pub fn open() -> Result<Self> {
        Self::open_with(HostConfig::default())
    }

    /// Opens a host with shares of your choice.
    ///
    /// # Errors
    /// As [`Host::open`], and `InvalidArgument` that names every bad field.
    pub fn open_with(config: HostConfig) -> Result<Self> {
        config.validate()?;
        let (probe, kvm) = probe::look(&config.kvm);
        probe.verdict()?;
        let kvm = kvm.ok_or_else(|| Error::new(ErrorKind::Internal, "the probe kept the KVM"))?;
        let total = config.memory.map_or_else(limits::memory_total, Bytes::get);
        let reserved = config.memory_reserved.get();
        let memory = Inventory { total, reserved, ratio: config.memory_ratio };
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let vcpus = config.vcpu_ratio.map(|ratio| Inventory { total: cores, reserved: 0, ratio });
        let cpu = host_cpu(&kvm)?;
        Ok(Self(Arc::new(HostParts { cpu, ledger: Ledger::new(memory, vcpus), kvm })))
    }

    /// Starts the making of a VM: attach to the builder what is not data, then build.
    pub fn builder(&self, config: VmConfig) -> VmBuilder {
        VmBuilder::new(self.0.clone(), config)
    }

    /// Builds a VM from data alone.
    ///
    /// # Errors
    /// As [`VmBuilder::build`].
    pub fn build(&self, config: VmConfig) -> Result<Vm> {
        self.builder(config).build()
    }

    /// What the VMs of this host hold, and what there is. Cheap; never blocks for long.
    pub fn usage(&self) -> Usage {
        self.0.ledger.usage()
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("usage", &self.usage()).finish_non_exhaustive()
    }
}

fn host_cpu(kvm: &Kvm) -> Result<HostCpu> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| Error::errno_of("asking KVM for its CPUID (KVM_GET_SUPPORTED_CPUID)", e))?;
    Ok(HostCpu {
        supported: supported.as_slice().to_vec(),
        tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_shares_are_named_together() {
        let config = HostConfig {
            memory: Some(Bytes::mib(1)),
            memory_ratio: f64::NAN,
            vcpu_ratio: Some(-1.0),
            ..HostConfig::default()
        };
        let error = Host::open_with(config).err().unwrap();
        let fields: Vec<_> = error.fields().iter().map(|f| f.field.as_str()).collect();
        assert_eq!(fields, ["memory_ratio", "vcpu_ratio", "memory_reserved"]);
    }
}
