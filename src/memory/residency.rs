#![forbid(unsafe_code)]
//! What is really there of guests' memory.
//!
//! The blocks of a memfd are what its guest has touched, in memory or in swap, exactly and at the cost of an
//! `fstat`; so is KVM's count of what it has mapped. Everything else walks page tables, and is asked for one VM.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::sync::{Arc, Mutex, OnceLock};

use kvm_ioctls::VmFd;
use vm_memory::mmap::GuestRegionMmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Memory;
use crate::sys::kvm_stats::StageTwo;
use crate::sys::{lock, residency};
use crate::units::Bytes;

/// What two system calls tell of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Quick {
    pub backing: Bytes,
    pub stage2: Bytes,
}

/// All that can be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Residency {
    pub quick: Quick,
    pub resident: Bytes,
    pub swapped: Bytes,
    pub huge: Bytes,
}

/// Reads what is there of one VM. Field order is drop order: what keeps the VM in the kernel goes before its memory.
struct Meter {
    /// Opened when somebody asks first; `None` where KVM says nothing.
    stage2: OnceLock<Option<StageTwo>>,
    vm: Option<Arc<VmFd>>,
    memory: Memory,
}

impl Meter {
    fn quick(&self) -> Quick {
        let open = || self.vm.as_ref().and_then(|vm| StageTwo::open(vm).ok());
        let mapped = self.stage2.get_or_init(open).as_ref().map_or(0, StageTwo::mapped);
        Quick { backing: Bytes(self.memory.backing()), stage2: Bytes(mapped) }
    }

    fn all(&self) -> Residency {
        let quick = self.quick();
        let backing = quick.backing.get();
        let resident = self.memory.resident(backing);
        let swapped = Bytes(backing.saturating_sub(resident));
        Residency { quick, resident: Bytes(resident), swapped, huge: Bytes(self.memory.huge(backing)) }
    }
}

/// What this process maps of that memory with huge pages.
pub(super) fn huge(memory: &Memory) -> u64 {
    let Ok(pagemap) = File::open("/proc/self/pagemap") else { return 0 };
    let of = |region: &GuestRegionMmap| {
        residency::count(&pagemap, region, 0, region.len() as usize, residency::Pages::Huge)
    };
    let scanned: Result<Vec<u64>, _> = memory.iter().map(of).collect();
    match scanned {
        Ok(each) => each.into_iter().sum(),
        Err(_) => {
            // Before Linux 6.7: the same number, for every mapping of the process.
            let smaps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
            let of = |region: &GuestRegionMmap| huge_in(&smaps, region.as_ptr().addr());
            memory.iter().map(of).sum()
        }
    }
}

/// What smaps says about huge pages of the mapping that starts at `address`.
fn huge_in(smaps: &str, address: usize) -> u64 {
    let start = format!("{address:x}-");
    let mut mapping = smaps.lines().skip_while(|line| !line.starts_with(&start));
    let kinds = |line: &&str| line.starts_with("ShmemPmdMapped:") || line.starts_with("AnonHugePages:");
    let in_one = mapping.by_ref().take_while(|line| !line.starts_with("VmFlags:")).filter(kinds);
    let kib = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
    in_one.filter_map(kib).sum::<u64>() * 1024
}

/// The memory of every VM of a host.
#[derive(Default)]
pub(crate) struct Roll(Mutex<BTreeMap<u64, Arc<Meter>>>);

impl Roll {
    /// Puts a VM on the roll, until what is returned is dropped.
    pub fn enrol(self: &Arc<Self>, id: u64, memory: &Memory, vm: &Arc<VmFd>) -> Enrolled {
        let meter = Arc::new(Meter { stage2: OnceLock::new(), vm: Some(vm.clone()), memory: memory.clone() });
        lock(&self.0).insert(id, meter.clone());
        Enrolled { roll: self.clone(), id, meter }
    }

    /// What is backed in all.
    pub fn backing(&self) -> u64 {
        lock(&self.0).values().map(|meter| meter.memory.backing()).fold(0, u64::saturating_add)
    }

    /// What two system calls a VM tell in all.
    pub fn sum(&self) -> Quick {
        lock(&self.0).values().map(|meter| meter.quick()).fold(Quick::default(), |sum, one| Quick {
            backing: Bytes(sum.backing.get().saturating_add(one.backing.get())),
            stage2: Bytes(sum.stage2.get().saturating_add(one.stage2.get())),
        })
    }
}

/// A VM's place on the roll. It holds the VM's memory, and keeps the VM in the kernel: drop it before both.
pub(crate) struct Enrolled {
    roll: Arc<Roll>,
    id: u64,
    meter: Arc<Meter>,
}

impl Enrolled {
    /// What exists of its memory, in memory or in swap. Costs one system call for each region.
    pub fn backing(&self) -> u64 {
        self.meter.memory.backing()
    }

    /// What of it is in memory: the same, unless something of the machine's is swapped out; then a walk over page tables.
    pub fn resident(&self) -> u64 {
        self.meter.memory.resident(self.meter.memory.backing())
    }

    /// All that can be told of this VM. Walks page tables: 4 ms for a GiB of small pages.
    pub fn read(&self) -> Residency {
        self.meter.all()
    }
}

impl Drop for Enrolled {
    fn drop(&mut self) {
        // Who reads the roll holds its lock: from here on this is the only one that holds the meter.
        lock(&self.roll.0).remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;

    fn meter(memory: &Memory) -> Meter {
        Meter { stage2: OnceLock::new(), vm: None, memory: memory.clone() }
    }

    #[test]
    fn what_is_touched_is_backed_to_the_page() {
        let memory = Memory::new(64 << 20).unwrap();
        let meter = meter(&memory);
        assert_eq!(meter.all(), Residency::default());
        for page in [0u64, 1, 5, 4000, 16_383] {
            memory.write_obj(1u8, GuestAddress(page << 12)).unwrap();
        }
        let now = meter.all();
        assert_eq!(now.quick, Quick { backing: Bytes(5 << 12), stage2: Bytes(0) });
        assert_eq!(Bytes(now.resident.get() + now.swapped.get()), now.quick.backing);
    }

    #[test]
    fn pages_in_memory_are_counted_however_they_are_mapped() {
        let memory = Memory::new(600 << 20).unwrap();
        for page in (0..600u64 << 8).step_by(7) {
            memory.write_obj(1u8, GuestAddress(page << 12)).unwrap();
        }
        let backing = memory.backing();
        let resident: u64 = memory.iter().map(|region| residency::resident(region).unwrap()).sum();
        assert_eq!(backing, (600u64 << 8).div_ceil(7) << 12);
        assert!(
            resident <= backing && (residency::swap_is_used() || resident == backing),
            "{resident} of {backing}"
        );
    }

    #[test]
    fn both_ways_to_count_huge_pages_agree() {
        let memory = Memory::new(16 << 20).unwrap();
        memory.collapse(0..8 << 20);
        let region = memory.iter().next().unwrap();
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let counted = huge_in(&smaps, region.as_ptr().addr());
        assert_eq!(huge(&memory), counted);
        assert!(counted == 8 << 20 || counted == 0, "{counted}: all, or the kernel has none");
    }
}
