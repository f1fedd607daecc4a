#![forbid(unsafe_code)]
//! What keeps a VM's threads to what they need.

/// A sandbox for the library's threads of a VM: each may make the system calls that its work needs and no others (seccomp), and
/// open no file (Landlock). A call that is refused
/// fails with EPERM, and its VM stops with [`StopCause::SandboxViolation`](crate::StopCause); the process and its other VMs go on.
/// `docs/sandbox.md` has the lists, and what a sandbox does not do.
///
/// Code of yours never runs in it: [`build`](crate::VmBuilder::build) answers `InvalidArgument` where you attach some that a thread
/// in the sandbox would call, and names what may be `false` here for it.
///
/// ```
/// use vmbed::{BareBoot, CpuMode, SandboxConfig, VmConfig};
///
/// let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [0xf4]));
/// config.sandbox = Some(SandboxConfig::default());
/// config.validate().unwrap();
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields, default)
)]
#[non_exhaustive]
pub struct SandboxConfig {
    /// Threads that run vCPUs, and the one that ends a VM. They call your [`Device`](crate::Device)s, and some functions of
    /// your [`NetBackend`](crate::NetBackend)s. Default `true`, as all of these.
    pub vcpus: bool,
    /// Threads that serve the console, cards and the random number generator. They call your console callback and your
    /// [`NetBackend`](crate::NetBackend)s.
    pub devices: bool,
    /// Threads that serve disks. They call your [`BlockBackend`](crate::BlockBackend)s.
    pub disks: bool,
    /// The thread that serves the balloon.
    pub balloon: bool,
    /// Goes on with what the kernel has, where it lacks seccomp's notices (before Linux 5.0, or somebody has them already) or
    /// Landlock. Default `false`: building the VM fails there. [`Vm::sandbox`](crate::Vm::sandbox) says what is in force.
    pub best_effort: bool,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self { vcpus: true, devices: true, disks: true, balloon: true, best_effort: false }
    }
}
