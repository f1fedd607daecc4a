#![forbid(unsafe_code)]
//! What a VM costs beside its memory, as a model: kernel objects, threads, page tables.
//!
//! Measured on Linux 6.18 without nested paging and on 6.1 with it (QEMU's emulation of AMD's), as the
//! growth of what the kernel had in use, one step of a VM's making after the other. Page tables are counted for
//! memory that is all touched, in 4 KiB pages: the most that there can be.

use crate::units::Bytes;

/// What the model depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub memory: Bytes,
    pub vcpus: u64,
    /// The library's threads beside those of vCPUs.
    pub threads: u64,
    /// The processor walks the guest's page tables itself (EPT, NPT). Elsewhere KVM shadows them, and keeps
    /// arrays for every page of a slot.
    pub nested_paging: bool,
}

/// A last-level page table maps 2 MiB and fills a page of 4 KiB.
const TABLE_REACH: u128 = 2 << 20;
/// The next level maps 1 GiB.
const DIRECTORY_REACH: u128 = 1 << 30;
const PAGE: u128 = 4096;
/// The kernel's stack and structures of a thread, and the stack pages that it touches in the process.
const THREAD: u128 = 24 << 10;
/// The console's ring, the devices, the event stream: this crate's own share.
const PROCESS: u128 = 128 << 10;

/// The model.
pub(crate) fn overhead(shape: Shape) -> Bytes {
    // KVM's VM with its split interrupt controller; a vCPU with its caches after its first run.
    let (vm, vcpu, slots) =
        if shape.nested_paging { (65 << 10, 227 << 10, 3 << 10) } else { (88 << 10, 314 << 10, 2_581 << 10) };
    let memory = u128::from(shape.memory.get());
    // Twice: the guest's (nested or shadow), and this process's for the same pages.
    let tables = 2 * (memory.div_ceil(TABLE_REACH) + memory.div_ceil(DIRECTORY_REACH) + 1);
    let per_memory = memory * slots / (1 << 30);
    let (vcpus, threads) = (u128::from(shape.vcpus), u128::from(shape.threads));
    let sum = vm + PROCESS + vcpus * (vcpu + THREAD) + threads * THREAD + tables * PAGE + per_memory;
    Bytes(u64::try_from(sum).unwrap_or(u64::MAX))
}
