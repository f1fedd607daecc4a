#![forbid(unsafe_code)]
//! Virtual processors, each on a thread of its own or of the embedder's, between the gate and the guest.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard};

use kvm_ioctls::{VcpuFd, VmFd};

use crate::error::{Error, Result};
use crate::events::{StopCause, StopLine};
use crate::reactor::panic_text;
use crate::sys::signal::{KICK, SignalSet};
use crate::sys::{self, lock};

pub(crate) mod cpuid;
mod exit;
mod gate;
pub(crate) mod msrs;
pub(crate) mod regs;
mod times;
mod turns;

#[cfg(feature = "internals")]
pub(crate) use exit::Nearby;
pub(crate) use exit::Surroundings;
use gate::Entered;
pub(crate) use gate::{Gate, Target};

/// A virtual processor. Its lock is held by the thread that runs it while the guest runs, and free while it stands
/// at the gate.
pub(crate) struct Vcpu {
    pub index: u32,
    fd: Mutex<VcpuFd>,
    account: times::Account,
}

/// Why [`Vcpu::serve`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// The vCPU has left for good, perhaps long ago; `last` for the last one of all.
    Left { last: bool },
    /// Its thread was wanted back; the vCPU goes on where it is served next.
    Returned,
    /// Another thread serves it.
    Busy,
}

impl Vcpu {
    /// Creates vCPU `index` of `vm`; KVM knows it by its APIC id.
    pub fn create(vm: &VmFd, index: u32, apic_id: u32) -> Result<Self> {
        let fd = vm
            .create_vcpu(u64::from(apic_id))
            .map_err(|e| Error::errno_of(format!("creating vCPU {index} (KVM_CREATE_VCPU)"), e))?;
        let vcpu = Self { index, fd: Mutex::new(fd), account: times::Account::default() };
        vcpu.with(|fd| vcpu.block_inside(fd, &SignalSet::full()))?;
        Ok(vcpu)
    }

    /// Access to the vCPU's state. Only while it stands: blocks while the guest runs.
    pub fn with<R>(&self, f: impl FnOnce(&mut VcpuFd) -> R) -> R {
        f(&mut lock(&self.fd))
    }

    /// On the thread that will serve it, before that may open no more files: makes its account ready.
    pub fn open_account(&self) {
        self.account.prepare();
    }

    /// The thread that serves it, and how long its threads ran and waited.
    pub fn times(&self) -> (Option<i32>, times::Times) {
        self.account.read()
    }

    /// Runs the guest on the calling thread: from the gate into the guest and back, until the vCPU leaves
    /// for good. On a thread of the embedder, which blocks the signals of `theirs`, any other signal makes
    /// it come back, too.
    pub fn serve(
        &self,
        around: &Surroundings,
        gate: &Gate,
        stop: &StopLine,
        theirs: Option<&SignalSet>,
    ) -> Served {
        let index = self.index as usize;
        match gate.enter(index) {
            Entered::Yes => {}
            Entered::Busy => return Served::Busy,
            Entered::Left => return Served::Left { last: false },
        }
        let open = self.account.open(theirs.is_none());
        let returns = match catch_unwind(AssertUnwindSafe(|| self.run(around, gate, stop, theirs))) {
            Ok(returns) => returns,
            Err(panic) => {
                stop.pull(self.blame(around, panic_text(&*panic)));
                false
            }
        };
        drop(open);
        if returns {
            gate.give_back(index);
            Served::Returned
        } else {
            Served::Left { last: gate.leave(index) }
        }
    }

    /// Whether the thread returns for now; else the vCPU leaves.
    fn run(&self, around: &Surroundings, gate: &Gate, stop: &StopLine, theirs: Option<&SignalSet>) -> bool {
        if let Some(Err(error)) = theirs.map(|blocked| self.with(|fd| self.block_inside(fd, blocked))) {
            stop.pull(StopCause::VcpuFault { vcpu: self.index, why: error.to_string() });
            return false;
        }
        let take = || Inside { fd: lock(&self.fd), index: self.index, around, gate };
        turns::run(gate, self.index as usize, stop, theirs.is_some(), take)
    }

    /// While the guest runs, `blocked` is blocked but for the kick.
    fn block_inside(&self, fd: &VcpuFd, blocked: &SignalSet) -> Result<()> {
        let mut inside = blocked.clone();
        inside.remove(KICK);
        sys::kvm::set_signal_mask(fd, &inside).map_err(|e| {
            Error::os(format!("setting the signal mask of vCPU {} (KVM_SET_SIGNAL_MASK)", self.index), e)
        })
    }

    /// Who panicked: the device that the last exit went to, else the vCPU.
    fn blame(&self, around: &Surroundings, text: &str) -> StopCause {
        let why = format!("panicked: {text}");
        let device = sys::kvm::last_access(&mut lock(&self.fd)).and_then(|access| match access {
            sys::kvm::LastAccess::Port(port, size) => around.pio.name_at(u64::from(port), usize::from(size)),
            sys::kvm::LastAccess::Mmio(address, size) => around.mmio.name_at(address, size),
        });
        match device {
            Some(device) => StopCause::DeviceFault { device, why },
            None => StopCause::VcpuFault { vcpu: self.index, why },
        }
    }
}

/// A vCPU in the hands of the thread that runs it.
struct Inside<'a> {
    fd: MutexGuard<'a, VcpuFd>,
    index: u32,
    around: &'a Surroundings,
    gate: &'a Gate,
}

impl turns::Guest for Inside<'_> {
    fn run(&mut self) -> turns::Pause {
        exit::run(&mut self.fd, self.index, self.around, self.gate)
    }

    fn complete_instruction(&mut self) -> Option<StopCause> {
        exit::complete_instruction(&mut self.fd, self.index, self.around, self.gate)
    }
}
