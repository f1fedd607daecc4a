#![forbid(unsafe_code)]
//! What the VMs of a host hold, what there is, and how much of it is really there.

use super::samples::{ChargedBy, Samples};
use crate::budget::Promised;
use crate::memory::Roll;
use crate::units::Bytes;

/// What the VMs of a host hold, and what there is. Promises are exact; what is really there is read one VM after
/// the other while guests run.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Usage {
    /// Counts every change of the ledger, for [`Host::set_shares`](crate::Host::set_shares).
    pub generation: u64,
    /// How many VMs there are, or are being built.
    pub vms: u64,
    /// The sum of the VMs' memory sizes.
    pub memory: Bytes,
    /// (total − reserved) × ratio.
    pub memory_capacity: Bytes,
    /// Total − reserved: what guarantees and overhead must fit into.
    pub memory_usable: Bytes,
    /// Swap space that guests may be paged out to.
    pub swap: Bytes,
    /// The sum of what guests can touch without anybody's consent.
    pub entitlement: Bytes,
    /// The sum of what VMs will always have.
    pub guarantee: Bytes,
    /// The sum of what VMs cost beside their memory, as the ledger's model has it.
    pub overhead: Bytes,
    /// The sum of the VMs' vCPUs that share cores.
    pub vcpus: u64,
    /// cores × ratio; `None` when vCPUs are not limited.
    pub vcpu_capacity: Option<u64>,
    /// vCPUs that have a core each.
    pub dedicated_vcpus: u64,
    /// Cores that are kept for such.
    pub dedicated_cpus: u64,
    /// Guest memory that exists, resident or swapped out.
    pub backing: Bytes,
    /// Guest memory that KVM has mapped for guests, as its statistics say; 0 where they say nothing.
    pub stage2: Bytes,
    /// Guest memory that cannot be paged out: all of VMs on huge pages of the administrator's pool.
    pub pinned: Bytes,
    /// The sum of what guests say that they have given up to their balloons: advisory, no promise depends on it.
    pub loaned: Bytes,
    /// This process's own resident memory beside its guests'.
    pub process: Bytes,
    /// What the kernel charges.
    pub charged: Bytes,
    /// To whom.
    pub charged_by: ChargedBy,
    /// What is charged less backing and process, in bytes: kernel memory, files, other processes. Negative while guests
    /// are swapped out, which nobody is charged for as memory.
    pub unattributed: i64,
}

impl Usage {
    pub(super) fn new(promised: Promised, loaned: Bytes, roll: &Roll, samples: &Samples) -> Self {
        let short = |n: u128| u64::try_from(n).unwrap_or(u64::MAX);
        let (memory, there, process) = (&promised.provider.memory, roll.sum(), samples.process());
        let (charged, charged_by) = samples.charged();
        let known = i128::from(there.backing.get()) + i128::from(process);
        Self {
            generation: promised.generation,
            vms: promised.consumers,
            memory: promised.memory,
            memory_capacity: Bytes(short(memory.capacity())),
            memory_usable: Bytes(memory.usable()),
            swap: Bytes(promised.provider.swap),
            entitlement: promised.entitlement,
            guarantee: promised.guarantee,
            overhead: promised.overhead,
            vcpus: promised.vcpus,
            vcpu_capacity: promised.provider.vcpus.map(|v| short(v.capacity())),
            dedicated_vcpus: promised.dedicated,
            dedicated_cpus: promised.provider.dedicated,
            backing: there.backing,
            stage2: there.stage2,
            pinned: promised.pinned,
            loaned,
            process: Bytes(process),
            charged: Bytes(charged),
            charged_by,
            unattributed: i64::try_from(i128::from(charged) - known).unwrap_or(i64::MAX),
        }
    }
}
