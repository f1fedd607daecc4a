#![forbid(unsafe_code)]
//! What a VM was promised, what of it is really there, and what its vCPUs got of the host.

use std::collections::BTreeSet;
use std::time::Duration;

use super::machine::Machine;
use crate::config::CpuConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::thread;
use crate::units::Bytes;

/// A VM's memory: what was promised, and what is there. The two are read one after the other while the guest
/// runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmMemory {
    /// The most that the VM may ever have: its configured size.
    pub max: Bytes,
    /// What its guest can touch without anybody's consent.
    pub entitlement: Bytes,
    /// What it will always have.
    pub guarantee: Bytes,
    /// What the VM costs beside its memory, as the ledger's model has it.
    pub overhead: Bytes,
    /// Counts the changes of the promises, from 1 on.
    pub generation: u64,
    /// What exists: what was ever touched, by the guest or for it, in memory or in swap. Exact to the page.
    pub backing: Bytes,
    /// What of it is in memory.
    pub resident: Bytes,
    /// What of it is in swap.
    pub swapped: Bytes,
    /// What of it this process maps with huge pages.
    pub huge: Bytes,
    /// What of it cannot be paged out. vmbed pins nothing so far.
    pub pinned: Bytes,
    /// What the guest says that it has given up to its balloon: advisory, no promise depends on it.
    pub loaned: Bytes,
    /// What KVM has mapped for the guest, as its statistics say; 0 where they say nothing (before Linux 5.14, or
    /// without nested paging).
    pub stage2: Bytes,
}

/// What a vCPU got of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VcpuStatistics {
    /// The kernel's id of the thread that runs it; `None` while none does.
    pub thread: Option<i32>,
    /// The host's CPUs that it is confined to by the configuration or the ledger; empty where it is not.
    pub cpus: Vec<u32>,
    /// How long its threads ran, in the guest or for it.
    pub run_time: Duration,
    /// How long its threads were ready to run and had no CPU. What a guest knows as stolen time.
    pub run_delay: Duration,
}

impl Machine {
    pub(super) fn memory_accounts(&self) -> VmMemory {
        let (claim, generation) = self.reservation.terms();
        let there = self.meter.read();
        VmMemory {
            max: claim.memory,
            entitlement: claim.entitlement,
            guarantee: claim.guarantee,
            overhead: claim.overhead,
            generation,
            backing: there.quick.backing,
            resident: there.resident,
            swapped: there.swapped,
            huge: there.huge,
            pinned: claim.pinned,
            loaned: self.board.balloon.as_ref().map_or(Bytes(0), |balloon| balloon.actual()),
            stage2: there.quick.stage2,
        }
    }

    pub(super) fn set_guarantee(&self, guarantee: Bytes, generation: Option<u64>) -> Result<u64> {
        let most = self.memory.size();
        if guarantee.get() > most {
            let why = format!("a guarantee of {guarantee}: at most the VM's memory, {}", Bytes(most));
            return Err(Error::new(ErrorKind::InvalidArgument, why));
        }
        self.reservation.change(generation, (self.host.headroom)(true), |claim| claim.guarantee = guarantee)
    }

    pub(super) fn vcpu_accounts(&self, index: u32) -> Result<VcpuStatistics> {
        let (thread, times) = self.vcpu(index)?.times();
        let cpus = self.confined.get(index as usize).cloned().unwrap_or_default();
        Ok(VcpuStatistics { thread, cpus, run_time: times.run, run_delay: times.delay })
    }
}

/// The CPUs that each vCPU is confined to; empty lists where they run wherever the process may.
///
/// `own` are the cores that the ledger gave to this VM, `aside` those that it keeps for dedicated vCPUs.
pub(super) fn confine(cpus: &CpuConfig, own: &[u32], aside: &BTreeSet<u32>) -> Result<Vec<Vec<u32>>> {
    let count = usize::from(cpus.count);
    if cpus.dedicated {
        return Ok(own.iter().map(|core| vec![*core]).collect());
    }
    for (i, list) in cpus.affinity.iter().enumerate() {
        if let Some(cpu) = list.iter().find(|cpu| aside.contains(cpu)) {
            let why = format!("cpus.affinity[{i}] names CPU {cpu}, which the host keeps for dedicated vCPUs");
            return Err(Error::new(ErrorKind::InvalidArgument, why));
        }
    }
    if !cpus.affinity.is_empty() || aside.is_empty() {
        let lists = cpus.affinity.iter().cloned().chain(std::iter::repeat_with(Vec::new));
        return Ok(lists.take(count).collect());
    }
    let may = thread::affinity().map_err(|e| Error::os("asking for this thread's CPUs", e))?;
    let rest: Vec<u32> = may.into_iter().filter(|cpu| !aside.contains(cpu)).collect();
    if rest.is_empty() {
        let why =
            "the host keeps every CPU that this thread may use for dedicated vCPUs: none is left to share";
        return Err(Error::new(ErrorKind::InvalidArgument, why));
    }
    Ok(vec![rest; count])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_vcpus_keep_off_dedicated_cpus() {
        let mut cpus = CpuConfig { count: 2, ..CpuConfig::default() };
        let none = BTreeSet::new();
        assert_eq!(confine(&cpus, &[], &none).unwrap(), vec![Vec::<u32>::new(); 2]);
        let mine = thread::affinity().unwrap();
        let aside = BTreeSet::from([mine[0]]);
        match confine(&cpus, &[], &aside) {
            Ok(lists) => assert_eq!(lists, vec![mine[1..].to_vec(); 2]),
            Err(error) => assert!(mine.len() == 1 && error.to_string().contains("none is left"), "{error}"),
        }
        cpus.affinity = vec![vec![900], vec![mine[0]]];
        assert!(confine(&cpus, &[], &aside).unwrap_err().to_string().contains("affinity[1]"));
        assert_eq!(confine(&cpus, &[], &none).unwrap(), cpus.affinity);
        cpus = CpuConfig { count: 2, dedicated: true, ..CpuConfig::default() };
        assert_eq!(confine(&cpus, &[4, 7], &aside).unwrap(), [[4], [7]]);
    }
}
