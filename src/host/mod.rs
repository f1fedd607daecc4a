#![forbid(unsafe_code)]
//! The machine that VMs run on: its KVM, what that can do, and the ledger of what was promised.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm};

use crate::budget::{Headroom, Ledger, Verdict};
use crate::config::VmConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Roll;
use crate::sys::lock;
use crate::vcpu::cpuid::HostCpu;
use crate::vm::{HostParts, SandboxReport, Vm, VmBuilder};

mod probe;
mod reclaim;
mod samples;
mod shares;
mod usage;

pub use probe::{Finding, Probe};
use reclaim::Reclaim;
pub use reclaim::{ReclaimConfig, ReclaimSandbox};
pub use samples::ChargedBy;
use samples::Samples;
pub use shares::HostConfig;
pub use usage::Usage;

/// A machine's KVM and the ledger of the VMs made from it.
///
/// Cheap to clone: clones share the KVM and the ledger. A process may have several hosts, each with its
/// own share; dropping the last clone closes the KVM once its VMs are gone too.
///
/// ```no_run
/// let host = vmbed::Host::open()?;
/// # Ok::<(), vmbed::Error>(())
/// ```
#[derive(Clone)]
pub struct Host {
    parts: Arc<HostParts>,
    samples: Arc<Samples>,
    reaction: Arc<Mutex<Duration>>,
    reclaim: Arc<Reclaim>,
}

impl Host {
    /// Looks at what VMs need of this machine, without building anything.
    ///
    /// ```no_run
    /// print!("{}", vmbed::Host::probe());
    /// ```
    pub fn probe() -> Probe {
        Self::probe_at("/dev/kvm")
    }

    /// The same for a KVM device elsewhere.
    pub fn probe_at(kvm: impl AsRef<Path>) -> Probe {
        probe::look(kvm.as_ref()).0
    }

    /// Opens `/dev/kvm` with the default shares.
    ///
    /// # Errors
    /// What [`Host::probe`] finds wrong, with its remedy: `NotFound`, `PermissionDenied`, `Unsupported`.
    pub fn open() -> Result<Self> {
        Self::open_with(HostConfig::default())
    }

    /// Opens a host with shares of your choice.
    ///
    /// # Errors
    /// As [`Host::open`], and `InvalidArgument` that names every bad field.
    pub fn open_with(config: HostConfig) -> Result<Self> {
        config.validate()?;
        let (probe, kvm) = probe::look(&config.kvm);
        probe.verdict()?;
        let kvm = kvm.ok_or_else(|| Error::new(ErrorKind::Internal, "the probe kept the KVM"))?;
        let (provider, cores) = config.provider()?;
        let ledger = Ledger::new(provider, cores);
        let roll = Arc::new(Roll::default());
        let samples = Arc::new(Samples::open(roll.clone()));
        let reaction = Arc::new(Mutex::new(config.reaction_time));
        let headroom = {
            let (samples, reaction) = (samples.clone(), reaction.clone());
            Box::new(move |matters| {
                let reaction = *lock(&reaction);
                if matters || !reaction.is_zero() { samples.headroom(reaction) } else { Headroom::default() }
            })
        };
        let (cpu, nested_paging) = (host_cpu(&kvm)?, probe::nested_paging());
        let (herd, io_uring, sandbox) = (Arc::default(), OnceLock::new(), crate::sandbox::prepare);
        let parts =
            Arc::new(HostParts { cpu, ledger, kvm, roll, herd, nested_paging, io_uring, headroom, sandbox });
        Ok(Self { parts, samples, reaction, reclaim: Arc::default() })
    }

    /// Starts the making of a VM: attach to the builder what is not data, then build.
    pub fn builder(&self, config: VmConfig) -> VmBuilder {
        VmBuilder::new(self.parts.clone(), config)
    }

    /// Builds a VM from data alone.
    ///
    /// # Errors
    /// As [`VmBuilder::build`].
    pub fn build(&self, config: VmConfig) -> Result<Vm> {
        self.builder(config).build()
    }

    /// What the ledger would answer to a VM of this configuration, with nothing built or booked. Never blocks for
    /// long.
    pub fn verdict(&self, config: &VmConfig) -> Verdict {
        self.parts.ledger.judge(&self.parts.claim_of(config), (self.parts.headroom)(true))
    }

    /// Changes what there is to give while VMs run: all of `config` but the path of the KVM. Less than is
    /// promised is accepted; from then on nothing is booked but what does not worsen that. vCPUs that exist stay on
    /// the CPUs that they have. `generation`, if given,
    /// is the [`Usage::generation`] that the change is based on. Answers the new one. Never blocks for long.
    ///
    /// # Errors
    /// `InvalidArgument` that names every bad field; `InvalidState` when the generation is another one by now.
    pub fn set_shares(&self, config: &HostConfig, generation: Option<u64>) -> Result<u64> {
        config.validate()?;
        let (provider, cores) = config.provider()?;
        let generation = self.parts.ledger.set_provider(generation, provider, cores)?;
        *lock(&self.reaction) = config.reaction_time;
        Ok(generation)
    }

    /// Says what to do with the VMs of this host when its memory gets short; `None`, as in the beginning: nothing. One thread,
    /// `vmbed-reclaim`, does it, until the last clone of this host is dropped, which waits for it (in a callback, it ends soon
    /// after). Each step is an event of the VM that it is about ([`EventKind::MemoryPressure`](crate::EventKind)). With `None`, VMs
    /// that it has paused go on, and balloons are asked for no more than [`Vm::set_balloon`](crate::Vm::set_balloon) said.
    ///
    /// `docs/overcommit.md` has the stages, and who gives first. Blocks for as long as a step takes: a pause up to 10 s. Another
    /// [`sandbox`](ReclaimConfig::sandbox) than before begins with another thread, and the one before ends as with `None`. In a
    /// callback it does not wait for the one before: what is said here of an end comes soon after.
    ///
    /// # Errors
    /// `InvalidArgument` that names every bad field; `Exhausted` where the process is out of threads or file descriptors;
    /// `Unsupported` and `Busy` where this kernel has not, or gives not, what the sandbox takes. What was set before goes on then.
    pub fn set_reclaim(&self, config: Option<&ReclaimConfig>) -> Result<()> {
        self.reclaim.set(config, &self.parts.herd, &self.samples)
    }

    /// What is in force of the sandbox of `vmbed-reclaim`; `None` where it has none ([`ReclaimConfig::sandbox`]), or there is no such
    /// thread. Never blocks.
    pub fn reclaim_sandbox(&self) -> Option<SandboxReport> {
        self.reclaim.sandbox()
    }

    #[cfg(feature = "internals")]
    pub(crate) fn on_reclaim<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> Option<R> {
        self.reclaim.run(f)
    }

    /// What the VMs of this host hold, what there is, and how much of it is really there. Costs two system calls
    /// a VM, and waits for nothing but a VM's making or end.
    pub fn usage(&self) -> Usage {
        Usage::new(self.parts.ledger.promised(), self.parts.herd.loaned(), &self.parts.roll, &self.samples)
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("usage", &self.usage()).finish_non_exhaustive()
    }
}

fn host_cpu(kvm: &Kvm) -> Result<HostCpu> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| Error::errno_of("asking KVM for its CPUID (KVM_GET_SUPPORTED_CPUID)", e))?;
    Ok(HostCpu {
        supported: supported.as_slice().to_vec(),
        tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
    })
}
