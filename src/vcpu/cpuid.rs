#![forbid(unsafe_code)]
//! What the `CPUID` instruction tells the guest: what KVM supports, with the VM's own topology and
//! clock facts, under the embedder's masks.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::config::topology::Topology;
use crate::config::{CpuConfig, CpuidRegister};
use crate::error::{Error, ErrorKind, Result};

/// Facts of the host that the guest's CPUID depends on.
#[derive(Clone, Debug)]
pub(crate) struct HostCpu {
    /// `KVM_GET_SUPPORTED_CPUID`.
    pub supported: Vec<kvm_cpuid_entry2>,
    /// `KVM_CAP_TSC_DEADLINE_TIMER`: older kernels hide it from the supported set.
    pub tsc_deadline: bool,
}

/// Leaf 1, ECX.
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX.
const HTT: u32 = 1 << 28;
/// Leaf 6, EAX: the APIC timer runs in every C-state.
const ARAT: u32 = 1 << 2;
/// Leaf 0x8000_0001, ECX (AMD).
const CMP_LEGACY: u32 = 1 << 1;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
/// "AuthenticAMD" and "HygonGenuine" by their first register, EBX of leaf 0.
const AMD: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];
/// AMD's extended APIC id: where its guests look for threads.
const AMD_TOPOLOGY: u32 = 0x8000_001e;
/// KVM's leaves; its timing leaf follows VMware's.
const KVM_SIGNATURE: u32 = 0x4000_0000;
const TIMING: u32 = 0x4000_0010;
/// The APIC timer's clock in KVM: 1 ns.
const APIC_BUS_KHZ: u32 = 1_000_000;
/// Extended topology.
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;

/// The leaves of vCPU `index`, whose TSC runs at `tsc_khz` (0 when KVM does not say).
pub(crate) fn build(host: &HostCpu, cpus: &CpuConfig, index: u32, tsc_khz: u32) -> Result<CpuId> {
    let topology = Topology::new(cpus);
    // The newer topology leaf would contradict ours: without it guests read the older one.
    let mut leaves: Vec<_> = host
        .supported
        .iter()
        .copied()
        .filter(|e| !matches!(e.function, TOPOLOGY | TOPOLOGY_V2 | TIMING))
        .collect();
    for entry in &mut leaves {
        adjust(entry, host, &topology, index, tsc_khz);
    }
    leaves.extend(topology_leaves(&topology, index));
    if leaves.iter().any(|e| e.function == 0 && AMD.contains(&e.ebx)) {
        offer_amd_topology(&mut leaves, &topology, index);
    }
    if leaves.iter().any(|e| e.function == KVM_SIGNATURE) && tsc_khz != 0 {
        let timing =
            kvm_cpuid_entry2 { function: TIMING, eax: tsc_khz, ebx: APIC_BUS_KHZ, ..Default::default() };
        leaves.push(timing);
    }
    apply_masks(&mut leaves, cpus);
    CpuId::from_entries(&leaves)
        .map_err(|e| Error::new(ErrorKind::Unsupported, format!("{} CPUID leaves: {e:?}", leaves.len())))
}

fn adjust(entry: &mut kvm_cpuid_entry2, host: &HostCpu, topology: &Topology, index: u32, tsc_khz: u32) {
    let apic_id = topology.apic_id(index);
    let threads = topology.threads_per_socket();
    match entry.function {
        0 => entry.eax = entry.eax.max(TOPOLOGY),
        1 => {
            // 16 bits of count and id, after the cache-line size that stays.
            let logical = threads.next_power_of_two().min(255);
            entry.ebx = entry.ebx & 0xffff | logical << 16 | apic_id << 24;
            entry.ecx |= HYPERVISOR | X2APIC | if host.tsc_deadline { TSC_DEADLINE } else { 0 };
            entry.edx = entry.edx & !HTT | if threads > 1 { HTT } else { 0 };
        }
        // Deterministic caches: Intel's leaf, then AMD's in the same format.
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { threads } else { topology.threads_per_core };
            entry.eax = entry.eax & !(0xfff << 14) | (sharing.next_power_of_two() - 1) << 14;
            if entry.function == 4 {
                let cores = topology.cores_per_socket.next_power_of_two().min(64);
                entry.eax = entry.eax & !(0x3f << 26) | (cores - 1) << 26;
            }
        }
        6 => entry.eax |= ARAT,
        KVM_SIGNATURE if tsc_khz != 0 => entry.eax = entry.eax.max(TIMING),
        0x8000_0001 => entry.ecx = entry.ecx & !CMP_LEGACY | if threads > 1 { CMP_LEGACY } else { 0 },
        0x8000_0008 => {
            let width = topology.thread_bits + topology.core_bits;
            entry.ecx = entry.ecx & !0xf0ff | (threads - 1) & 0xff | width << 12;
        }
        _ => {}
    }
}

/// AMD guests know of threads through leaf 0x8000_001e alone, which some KVMs leave out.
fn offer_amd_topology(leaves: &mut Vec<kvm_cpuid_entry2>, topology: &Topology, index: u32) {
    leaves.retain(|e| e.function != AMD_TOPOLOGY);
    for entry in leaves.iter_mut() {
        match entry.function {
            0x8000_0000 => entry.eax = entry.eax.max(AMD_TOPOLOGY),
            0x8000_0001 => entry.ecx |= TOPOLOGY_EXTENSIONS,
            _ => {}
        }
    }
    let (_, core, socket) = topology.place(index);
    leaves.push(kvm_cpuid_entry2 {
        function: AMD_TOPOLOGY,
        eax: topology.apic_id(index),
        ebx: core & 0xff | (topology.threads_per_core - 1) << 8,
        ecx: socket & 0xff,
        ..Default::default()
    });
}

/// Leaf 0xb: threads, cores, and the end of the list.
fn topology_leaves(topology: &Topology, index: u32) -> [kvm_cpuid_entry2; 3] {
    let leaf = |level: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index: level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: level | kind << 8,
        edx: topology.apic_id(index),
        ..Default::default()
    };
    [
        leaf(0, topology.thread_bits, topology.threads_per_core, 1),
        leaf(1, topology.thread_bits + topology.core_bits, topology.threads_per_socket(), 2),
        leaf(2, 0, 0, 0),
    ]
}

fn apply_masks(leaves: &mut Vec<kvm_cpuid_entry2>, cpus: &CpuConfig) {
    for mask in &cpus.masks {
        let at = leaves.iter().position(|e| e.function == mask.leaf && e.index == mask.subleaf);
        let entry = match at {
            Some(at) => &mut leaves[at],
            None => {
                let flags = if mask.subleaf == 0 { 0 } else { KVM_CPUID_FLAG_SIGNIFCANT_INDEX };
                let (function, index) = (mask.leaf, mask.subleaf);
                leaves.push(kvm_cpuid_entry2 { function, index, flags, ..Default::default() });
                let last = leaves.len() - 1;
                &mut leaves[last]
            }
        };
        let register = match mask.register {
            CpuidRegister::Eax => &mut entry.eax,
            CpuidRegister::Ebx => &mut entry.ebx,
            CpuidRegister::Ecx => &mut entry.ecx,
            CpuidRegister::Edx => &mut entry.edx,
        };
        *register = *register & !mask.clear | mask.set;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CpuidMask;

    fn host() -> HostCpu {
        let leaf = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        HostCpu {
            supported: vec![
                leaf(0, 7, AMD[0], 0, 0),
                leaf(1, 0, 0xff00_0800, 0, HTT),
                kvm_cpuid_entry2 { function: 4, eax: 0xffff_c021 | 3 << 5, ..Default::default() },
                leaf(KVM_SIGNATURE, KVM_SIGNATURE + 1, 0, 0, 0),
                leaf(TOPOLOGY_V2, 9, 9, 9, 9),
                leaf(0x8000_0008, 0x3030, 0, 0xffff, 0),
                leaf(0x8000_0000, 0x8000_0008, 0, 0, 0),
                leaf(0x8000_0001, 0, 0, 0, 0),
            ],
            tsc_deadline: true,
        }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn the_guest_sees_its_own_topology() {
        let cpus = CpuConfig { count: 12, threads_per_core: 2, sockets: 2, ..CpuConfig::default() };
        let cpuid = build(&host(), &cpus, 9, 2_000_000).unwrap();
        // Socket 1, core 1, thread 1: 0b1_01_1.
        let id = 0b1011;
        let leaf = find(&cpuid, 1, 0);
        assert_eq!((leaf.ebx >> 24, leaf.ebx >> 16 & 0xff, leaf.ebx & 0xffff), (id, 8, 0x800));
        assert_eq!(leaf.ecx & (X2APIC | TSC_DEADLINE | HYPERVISOR), X2APIC | TSC_DEADLINE | HYPERVISOR);
        assert_eq!(find(&cpuid, 0, 0).eax, TOPOLOGY);
        let (smt, core, end) = (find(&cpuid, 0xb, 0), find(&cpuid, 0xb, 1), find(&cpuid, 0xb, 2));
        assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (1, 2, 0x100, id));
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, id));
        assert_eq!((end.ebx, end.ecx), (0, 2));
        assert_eq!(find(&cpuid, 4, 0).eax >> 14 & 0xfff, 7, "the third level is shared by the socket");
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx & 0xf0ff, 3 << 12 | 5);
        assert_eq!(find(&cpuid, 0x8000_0000, 0).eax, AMD_TOPOLOGY);
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx, TOPOLOGY_EXTENSIONS | CMP_LEGACY);
        let amd = find(&cpuid, 0x8000_001e, 0);
        assert_eq!((amd.eax, amd.ebx, amd.ecx), (id, 1 | 1 << 8, 1));
        assert!(cpuid.as_slice().iter().all(|e| e.function != TOPOLOGY_V2));
        assert_eq!(find(&cpuid, TIMING, 0).eax, 2_000_000);
    }

    #[test]
    fn a_single_vcpu_has_no_siblings() {
        let cpuid = build(&host(), &CpuConfig::default(), 0, 0).unwrap();
        assert_eq!(find(&cpuid, 1, 0).edx & HTT, 0);
        assert_eq!(find(&cpuid, 0xb, 1).ebx, 1);
    }

    #[test]
    fn masks_come_last_and_make_missing_leaves() {
        let mask = |leaf, register, clear, set| CpuidMask { leaf, subleaf: 0, register, clear, set };
        let masks = vec![mask(1, CpuidRegister::Ecx, HYPERVISOR, 1), mask(7, CpuidRegister::Ebx, 0, 4)];
        let cpuid = build(&host(), &CpuConfig { masks, ..CpuConfig::default() }, 0, 0).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ecx & (HYPERVISOR | 1), 1);
        assert_eq!(find(&cpuid, 7, 0).ebx, 4);
    }
}
