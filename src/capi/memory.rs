//! What guests' memory is made of.

use super::arguments::{Sized_, array, invalid, structure};
use super::config::{change, vmbed_config};
use super::error::vmbed_error;
use crate::config::{BackingConfig, BackingKind, HugePages};

/// A memfd, sealed against resizing: exact accounts at the cost of one system call.
pub const VMBED_BACKING_MEMFD: i32 = 0;
/// Anonymous memory, of which the kernel makes huge pages by itself where it is set up so, and which it may merge.
/// Accounts cost a walk over page tables.
pub const VMBED_BACKING_ANONYMOUS: i32 = 1;
/// Pages of 2 MiB from the pool that the host's administrator set aside (vm.nr_hugepages). They are never swapped, so the
/// ledger counts the whole VM as pinned; its memory is a multiple of 2 MiB. A balloon frees whole pages only; when the
/// guest takes one back that the pool has no more, its VM ends with VMBED_CAUSE_DEVICE_FAULT of `memory`.
pub const VMBED_BACKING_HUGE_2M: i32 = 2;
/// The same with pages of 1 GiB.
pub const VMBED_BACKING_HUGE_1G: i32 = 3;

/// Transparent huge pages for what the loader fills, and where a kernel boots; elsewhere as the host's kernel is set up.
pub const VMBED_HUGE_AUTO: i32 = 0;
/// For all of it. Where the kernel makes huge pages of shared memory for nobody (shmem_enabled is "never"), that of a
/// memfd has them where it is prefaulted.
pub const VMBED_HUGE_ALWAYS: i32 = 1;
/// For none of it.
pub const VMBED_HUGE_NEVER: i32 = 2;

/// What a VM's memory is made of. All zeroes but the size are the defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_backing {
    /// sizeof(struct vmbed_backing)
    pub size: usize,
    /// Where its pages come from, one of VMBED_BACKING_*.
    pub kind: i32,
    /// What to ask transparent huge pages for, one of VMBED_HUGE_*.
    pub huge: i32,
    /// Other than 0: all of the memory is there when the VM is built, made by several threads at once.
    pub prefault: u32,
    /// Other than 0: the kernel may merge pages of the same content (KSM), of anonymous memory only. It saves memory, and
    /// lets a guest find out by time what others hold.
    pub mergeable: u32,
    /// The host's NUMA nodes that the pages may come from, by their array, below 1024. NULL for any.
    pub numa_nodes: *const u32,
    /// How many they are.
    pub numa_node_count: usize,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_backing {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_backing";
}

/// Says what the VM's memory is made of; a sealed memfd by default. What `backing` points to is copied.
///
/// What the host has not got is an error of vmbed_builder_build(): VMBED_ERR_EXHAUSTED where the pool of huge pages is too
/// small, VMBED_ERR_INVALID_ARGUMENT for a NUMA node that there is not, VMBED_ERR_UNSUPPORTED for what its kernel lacks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_backing(
    config: *mut vmbed_config,
    backing: *const vmbed_backing,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        let given = structure(backing)?;
        let nodes = array(given.numa_nodes, given.numa_node_count, "vmbed_backing.numa_nodes")?;
        let kind = match given.kind {
            VMBED_BACKING_MEMFD => BackingKind::Memfd,
            VMBED_BACKING_ANONYMOUS => BackingKind::Anonymous,
            VMBED_BACKING_HUGE_2M => BackingKind::Huge2M,
            VMBED_BACKING_HUGE_1G => BackingKind::Huge1G,
            other => {
                return Err(invalid(format!("vmbed_backing.kind is {other}, not one of VMBED_BACKING_*")));
            }
        };
        let huge = match given.huge {
            VMBED_HUGE_AUTO => HugePages::Auto,
            VMBED_HUGE_ALWAYS => HugePages::Always,
            VMBED_HUGE_NEVER => HugePages::Never,
            other => return Err(invalid(format!("vmbed_backing.huge is {other}, not one of VMBED_HUGE_*"))),
        };
        let (prefault, mergeable) = (given.prefault != 0, given.mergeable != 0);
        c.backing = BackingConfig { kind, huge, prefault, mergeable, numa_nodes: nodes.to_vec() };
        Ok(())
    })
}
