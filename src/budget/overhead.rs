#![forbid(unsafe_code)]
//! What a VM costs beside its memory, as a model: kernel objects, threads, page tables.
//!
//! Fitted to what a cgroup is charged beside guests' memory, kernel memory included, on Linux 6.18 without nested paging
//! and on 6.1 with it (QEMU's emulation of AMD's); `tests/linux/accounts.rs` requires 10 %. Page tables are counted for
//! memory that is all touched, in 4 KiB pages: the most that there can be.

use crate::units::Bytes;

/// What the model depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub memory: Bytes,
    pub vcpus: u64,
    /// The library's threads beside those of vCPUs.
    pub threads: u64,
    /// Queues of disks that are served by io_uring.
    pub rings: u64,
    /// The processor walks the guest's page tables itself (EPT, NPT). Elsewhere KVM shadows them, and keeps
    /// arrays for every page of a slot.
    pub nested_paging: bool,
}

/// A last-level page table maps 2 MiB and fills a page of 4 KiB.
const TABLE_REACH: u128 = 2 << 20;
/// The next level maps 1 GiB.
const DIRECTORY_REACH: u128 = 1 << 30;
const PAGE: u128 = 4096;
/// The kernel's stack and structures of a vCPU's thread, and what it touches in the process.
const THREAD: u128 = 24 << 10;
/// The same of a thread that serves devices, with a disk's queue and requests.
const DEVICE: u128 = 51 << 10;
/// A ring for a queue's 256 requests: the kernel's half, and what is kept of each until it ends.
const RING: u128 = 50 << 10;

/// The model.
pub(crate) fn overhead(shape: Shape) -> Bytes {
    // The VM in KVM and here; a vCPU with its caches after its first run; what a GiB costs beside page tables: the index of
    // the memfd's pages (a node of 576 bytes for 64 of them), and KVM's own.
    let (vm, vcpu, slots) = if shape.nested_paging {
        (47 << 10, 232 << 10, 2_640 << 10)
    } else {
        (88 << 10, 314 << 10, 2_581 << 10)
    };
    let memory = u128::from(shape.memory.get());
    // Twice: the guest's (nested or shadow), and this process's for the same pages.
    let tables = 2 * (memory.div_ceil(TABLE_REACH) + memory.div_ceil(DIRECTORY_REACH) + 1);
    let per_memory = memory * slots / (1 << 30);
    let (vcpus, threads, rings) =
        (u128::from(shape.vcpus), u128::from(shape.threads), u128::from(shape.rings));
    let sum = vm + vcpus * (vcpu + THREAD) + threads * DEVICE + rings * RING + tables * PAGE + per_memory;
    Bytes(u64::try_from(sum).unwrap_or(u64::MAX))
}
