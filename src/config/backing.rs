#![forbid(unsafe_code)]
//! What a VM's memory is made of.

/// What a VM's memory is made of. `docs/overcommit.md` says what each kind is good for.
///
/// ```
/// use vmbed::{BackingConfig, BackingKind, LinuxBoot, VmConfig};
///
/// let mut config = VmConfig::linux(LinuxBoot::new("/boot/vmlinuz"));
/// config.backing.kind = BackingKind::Huge2M;
/// config.backing.numa_nodes = vec![0];
/// config.validate().unwrap();
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields, default)
)]
#[non_exhaustive]
pub struct BackingConfig {
    /// Where its pages come from. Default: a memfd.
    pub kind: BackingKind,
    /// Whether to ask for transparent huge pages. Default: for what is loaded.
    pub huge: HugePages,
    /// All of the memory is there when the VM is built, made by several short-lived threads at once (no hook is called on
    /// them): no guest ever waits for a page. Default `false`.
    pub prefault: bool,
    /// The kernel may merge pages of the same content (KSM), of anonymous memory only: it saves memory, and lets a guest
    /// find out by time what others hold. Accounts count a merged page for each VM that has it. Default `false`.
    pub mergeable: bool,
    /// The host's NUMA nodes that its pages may come from, by their numbers, below 1024; empty for any. Default: any.
    pub numa_nodes: Vec<u32>,
}

/// Where the pages of a VM come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum BackingKind {
    /// A memfd, sealed against resizing: exact accounts at the cost of one system call.
    #[default]
    Memfd,
    /// Anonymous memory, of which the kernel makes huge pages by itself where it is set up so, and which it may merge.
    /// Accounts cost a walk over page tables.
    Anonymous,
    /// Pages of 2 MiB from the pool that the host's administrator set aside (`vm.nr_hugepages`). They are never swapped,
    /// so the ledger counts the whole VM as pinned; `memory` is a multiple of 2 MiB. A balloon frees whole pages only; when
    /// the guest takes one back that the pool has no more, its VM ends with a `DeviceFault` of `memory`.
    #[cfg_attr(feature = "serde", serde(rename = "huge_2m"))]
    Huge2M,
    /// The same with pages of 1 GiB.
    #[cfg_attr(feature = "serde", serde(rename = "huge_1g"))]
    Huge1G,
}

impl BackingKind {
    /// The size of a page from the administrator's pool.
    pub(crate) fn pool_page(self) -> Option<u64> {
        match self {
            Self::Memfd | Self::Anonymous => None,
            Self::Huge2M => Some(2 << 20),
            Self::Huge1G => Some(1 << 30),
        }
    }
}

/// Which of a VM's memory to ask transparent huge pages for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum HugePages {
    /// What the loader fills, and where a kernel boots; elsewhere as the host's kernel is set up.
    #[default]
    Auto,
    /// All of it. Where the kernel makes huge pages of shared memory for nobody (`shmem_enabled` is `never`), that of a
    /// memfd has them where it is prefaulted.
    Always,
    /// None.
    Never,
}
