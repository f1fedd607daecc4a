#![forbid(unsafe_code)]
//! A VM's share of the host's processors.

use std::path::PathBuf;
use std::time::Duration;

/// A cgroup (version 2) of its own for a VM's threads, which gives it a share of the processors, and a limit. It is made
/// below the process's own one, or another that the process is in or below, and gone with the VM.
///
/// The kernel divides the time that a parent has among the VMs below it by their weights, whenever they want more than there is.
///
/// ```
/// use std::time::Duration;
/// use vmbed::{CgroupConfig, LinuxBoot, VmConfig};
///
/// let mut share = CgroupConfig::default();
/// share.weight = 300;
/// share.quota = Some(Duration::from_millis(150)); // of 100 ms each: a processor and a half
/// let mut config = VmConfig::linux(LinuxBoot::new("/boot/vmlinuz"));
/// config.cgroup = Some(share);
/// config.validate().unwrap();
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields, default)
)]
#[non_exhaustive]
pub struct CgroupConfig {
    /// The directory of the parent, which the process may write to. Default: the process's own cgroup.
    pub parent: Option<PathBuf>,
    /// The VM's part of what is wanted by all (`cpu.weight`), 1 to 10,000. Default 100.
    pub weight: u32,
    /// The most that its threads together may run in a period (`cpu.max`), at least 1 ms. Default: no limit.
    pub quota: Option<Duration>,
    /// That period, 1 ms to 1 s. Default 100 ms.
    pub period: Duration,
}

impl Default for CgroupConfig {
    fn default() -> Self {
        Self { parent: None, weight: 100, quota: None, period: Duration::from_millis(100) }
    }
}
