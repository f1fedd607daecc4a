#![forbid(unsafe_code)]
//! What a host may give to its VMs.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use super::samples;
use crate::budget::{Inventory, Provider};
use crate::config::validate::MAX_HOST_CPUS;
use crate::error::{Error, FieldError, Result};
use crate::units::Bytes;

/// What a [`Host`](crate::Host) may give to its VMs, and where its KVM is.
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
    /// How often the rest may be promised (OpenStack's `ram_allocation_ratio`). Default 1.0. Above it, name swap
    /// space or victims too, since guests may touch all that they have.
    pub memory_ratio: f64,
    /// The least memory that one VM may have (Placement's `min_unit`). Default 1 byte.
    pub memory_min_unit: Bytes,
    /// The most memory that one VM may have, whatever the ratio (`max_unit`). Default `None`: `memory`, as
    /// OpenStack Nova has it.
    pub memory_max_unit: Option<Bytes>,
    /// A VM's memory is a multiple of it (`step_size`). Default 1 byte.
    pub memory_step: Bytes,
    /// Swap space that guests may be paged out to. Default 0.
    pub swap: Bytes,
    /// How many vCPUs a core may carry (`cpu_allocation_ratio`). Default `None`: as many as you like.
    pub vcpu_ratio: Option<f64>,
    /// The host's CPUs that are kept for VMs with [dedicated](crate::CpuConfig::dedicated) vCPUs, one each, by
    /// their numbers. vCPUs of other VMs do not run there. Default: none.
    pub dedicated_cpus: Vec<u32>,
    /// How long the host takes to react when memory gets short: what guests have lately touched in such a time
    /// must stay free beside a newcomer's guarantee. Default 0: the guarantee alone must be free.
    pub reaction_time: Duration,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            kvm: "/dev/kvm".into(),
            memory: None,
            memory_reserved: Bytes::mib(512),
            memory_ratio: 1.0,
            memory_min_unit: Bytes(1),
            memory_max_unit: None,
            memory_step: Bytes(1),
            swap: Bytes(0),
            vcpu_ratio: None,
            dedicated_cpus: Vec::new(),
            reaction_time: Duration::ZERO,
        }
    }
}

impl HostConfig {
    pub(super) fn validate(&self) -> Result<()> {
        let mut fields = Vec::new();
        let mut add = |field: &str, problem: String, remedy: &str| {
            fields.push(FieldError::new(field, problem, remedy));
        };
        for (field, ratio) in
            [("memory_ratio", self.memory_ratio), ("vcpu_ratio", self.vcpu_ratio.unwrap_or(1.0))]
        {
            if !(ratio.is_finite() && ratio > 0.0) {
                add(field, format!("is {ratio}"), "a finite number above 0");
            }
        }
        if let Some(memory) = self.memory.filter(|m| *m < self.memory_reserved) {
            let problem = format!("{} of {memory} are reserved", self.memory_reserved);
            add("memory_reserved", problem, "at most memory");
        }
        if self.memory_step.get() == 0 {
            add("memory_step", "is 0".to_owned(), "at least 1 byte");
        }
        if let Some(most) = self.memory_max_unit.filter(|most| *most < self.memory_min_unit) {
            add("memory_max_unit", format!("is {most}"), "at least memory_min_unit");
        }
        if let Some(cpu) = self.dedicated_cpus.iter().find(|cpu| **cpu >= MAX_HOST_CPUS) {
            add("dedicated_cpus", format!("names CPU {cpu}"), "below 1024");
        }
        if fields.is_empty() { Ok(()) } else { Err(Error::invalid_fields(fields)) }
    }

    /// The same for the ledger.
    ///
    /// # Errors
    /// It says nothing of memory, and nor does the machine.
    pub(super) fn provider(&self) -> Result<(Provider, BTreeSet<u32>)> {
        let total = self.memory.map_or_else(samples::memory_total, |memory| Ok(memory.get()))?;
        let memory = Inventory {
            total,
            reserved: self.memory_reserved.get(),
            ratio: self.memory_ratio,
            min_unit: self.memory_min_unit.get(),
            max_unit: self.memory_max_unit.map_or(total, Bytes::get),
            step_size: self.memory_step.get(),
        };
        let cores: BTreeSet<u32> = self.dedicated_cpus.iter().copied().collect();
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let shared = cpus.saturating_sub(cores.len() as u64);
        let vcpus = self.vcpu_ratio.map(|ratio| Inventory { ratio, ..Inventory::new(shared) });
        Ok((Provider { memory, swap: self.swap.get(), vcpus, dedicated: cores.len() as u64 }, cores))
    }
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
            memory_step: Bytes(0),
            memory_min_unit: Bytes(2),
            memory_max_unit: Some(Bytes(1)),
            dedicated_cpus: vec![0, 1024],
            ..HostConfig::default()
        };
        let error = crate::Host::open_with(config).err().unwrap();
        let fields: Vec<_> = error.fields().iter().map(|f| f.field.as_str()).collect();
        let expected = [
            "memory_ratio",
            "vcpu_ratio",
            "memory_reserved",
            "memory_step",
            "memory_max_unit",
            "dedicated_cpus",
        ];
        assert_eq!(fields, expected);
    }
}
