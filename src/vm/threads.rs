#![forbid(unsafe_code)]
//! The library's threads of one VM: what they are for, how they begin.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};

use super::Vm;
use super::cgroup::Cgroup;
use super::machine::Machine;
use super::supervisor::{Door, Supervisor, Waiting};
use crate::config::SandboxConfig;
use crate::error::{Error, Result};
use crate::events::{StopCause, StopLine, VmId};
use crate::reactor::{EventLoop, own, panic_text};
use crate::sys;
use crate::vcpu::Vcpu;

/// What a thread of the library is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ThreadRole {
    /// Runs one vCPU.
    Vcpu,
    /// Serves devices.
    Device,
    /// Ends the VM, where the embedder's threads run its vCPUs ([`VmBuilder::caller_vcpus`](super::VmBuilder::caller_vcpus)).
    Control,
    /// Answers for the others where they are in a sandbox ([`VmConfig::sandbox`](crate::VmConfig)), tells of what was refused, or hands
    /// their records to your logger: it is outside.
    Supervisor,
}

impl ThreadRole {
    /// What the names of such threads begin with.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::Vcpu => "vmbed-vcpu",
            Self::Device => "vmbed-dev",
            Self::Control => "vmbed-end",
            Self::Supervisor => "vmbed-guard",
        }
    }
}

/// What a thread in a sandbox does: by that, what it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Duty {
    /// Runs a vCPU, or ends the VM.
    Vcpu,
    /// Serves the console, cards and the random number generator.
    Device,
    /// Serves a queue of a disk.
    Disk,
    /// Serves the balloon.
    Balloon,
    /// Does something about it when the host's memory gets short: of all VMs, not of one.
    Reclaim,
}

impl Duty {
    pub fn is_confined_by(self, config: &SandboxConfig) -> bool {
        match self {
            Self::Vcpu => config.vcpus,
            Self::Device => config.devices,
            Self::Disk => config.disks,
            Self::Balloon => config.balloon,
            // Whoever has none of it makes no door for it.
            Self::Reclaim => true,
        }
    }
}

/// A thread of the library, as the hook of [`VmBuilder::on_thread_start`](super::VmBuilder::on_thread_start) sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ThreadInfo {
    /// The VM that it works for.
    pub vm: VmId,
    /// What it is for.
    pub role: ThreadRole,
    /// Counts the VM's threads of one role from 0: for a vCPU its index.
    pub index: u32,
    /// The kernel's id of the thread, for affinity, cgroups and schedulers.
    pub tid: i32,
}

pub(super) type Hook = Arc<dyn Fn(&ThreadInfo) + Send + Sync>;

/// How the library's threads of one VM begin.
pub(super) struct Threads {
    pub id: VmId,
    pub hook: Option<Hook>,
    pub stop: StopLine,
    pub cgroup: Option<Arc<Cgroup>>,
    pub supervisor: Option<Arc<Supervisor>>,
}

impl Threads {
    /// Starts a thread that counts as the VM's own and has passed the embedder's hook.
    pub fn spawn(
        &self,
        role: ThreadRole,
        index: u32,
        f: impl FnOnce() + Send + 'static,
    ) -> Result<std::thread::JoinHandle<()>> {
        let (id, hook, stop) = (self.id, self.hook.clone(), self.stop.clone());
        let name = format!("{}{index}", role.prefix());
        let cgroup = self.cgroup.clone();
        let (told, answer) = mpsc::channel();
        let body = move || {
            let entered = cgroup.map_or(Ok(()), |own| own.enter());
            let failed = entered.is_err();
            // Nobody waits for it where there is no cgroup.
            let _ = told.send(entered);
            if failed {
                return;
            }
            let _inside = own::enter(id);
            if let Some(hook) = hook {
                let info = ThreadInfo { vm: id, role, index, tid: sys::signal::thread_id() };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| hook(&info))) {
                    let why = format!("the thread hook panicked: {}", panic_text(&*panic));
                    stop.pull(StopCause::DeviceFault { device: "thread hook".to_owned(), why });
                }
            }
            f();
        };
        let thread = sys::thread::spawn(name.clone(), body)
            .map_err(|e| Error::os(format!("starting the thread {name}"), e))?;
        if self.cgroup.is_some() {
            answer.recv().unwrap_or(Ok(()))?;
        }
        Ok(thread)
    }

    /// Starts the `index`th event loop of the VM, in the sandbox if it has one.
    pub fn start_loop(&self, index: u32, duty: Duty) -> Result<Arc<EventLoop>> {
        let started = self.start_free_loop(index)?;
        self.confine_loop(&started, duty, index)?;
        Ok(started)
    }

    /// Starts one that has something to do before it is confined.
    pub fn start_free_loop(&self, index: u32) -> Result<Arc<EventLoop>> {
        let name = format!("{}{index}", ThreadRole::Device.prefix());
        EventLoop::start(&name, |body| self.spawn(ThreadRole::Device, index, body))
    }

    /// The way into the sandbox for a thread that is no loop, if there is one for it.
    fn door(&self, role: ThreadRole, index: usize) -> (Option<Door>, Option<Waiting>) {
        let name = format!("{}{index}", role.prefix());
        self.supervisor.as_ref().and_then(|s| s.door(Duty::Vcpu, name)).unzip()
    }
}

/// Starts one thread a vCPU; they wait at the gate. If one cannot be had, the others leave again.
pub(super) fn start(machine: Arc<Machine>, threads: &Threads) -> Result<Vm> {
    let vm = Vm { machine };
    let machine = &vm.machine;
    let keep = |thread| sys::lock(&machine.control).threads.push(thread);
    if machine.caller_vcpus {
        let own = machine.clone();
        let (door, waiting) = threads.door(ThreadRole::Control, 0);
        let body = move || {
            if door.is_none_or(Door::enter) {
                own.serve_end();
            }
        };
        keep(threads.spawn(ThreadRole::Control, 0, body)?);
        waiting.map_or(Ok(()), Waiting::finish)?;
        return Ok(vm);
    }
    for index in 0..machine.vcpus.len() {
        let own = machine.clone();
        let cpus = machine.confined.get(index).cloned().unwrap_or_default();
        let (told, answer) = mpsc::channel();
        let (door, waiting) = threads.door(ThreadRole::Vcpu, index);
        let body = move || {
            let confined = if cpus.is_empty() { Ok(()) } else { sys::thread::set_affinity(&cpus) };
            // Dropped at once where nobody waits for it.
            let _ = told.send(confined.map_err(|e| {
                Error::os(format!("confining vCPU {index} to the CPUs {cpus:?} (sched_setaffinity)"), e)
            }));
            if door.is_some() {
                own.vcpus.iter().skip(index).take(1).for_each(Vcpu::open_account);
            }
            if door.is_none_or(Door::enter) {
                own.serve_vcpu(index);
            }
        };
        keep(threads.spawn(ThreadRole::Vcpu, index as u32, body)?);
        if !machine.confined.get(index).is_none_or(Vec::is_empty) {
            answer.recv().unwrap_or(Ok(()))?;
        }
        waiting.map_or(Ok(()), Waiting::finish)?;
    }
    Ok(vm)
}
