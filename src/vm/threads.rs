#![forbid(unsafe_code)]
//! The library's threads of one VM: what they are for, how they begin.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};

use super::Vm;
use super::cgroup::Cgroup;
use super::machine::Machine;
use crate::error::{Error, Result};
use crate::events::{StopCause, StopLine, VmId};
use crate::reactor::{EventLoop, own, panic_text};
use crate::sys;

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
        let kind = match role {
            ThreadRole::Vcpu => "vcpu",
            ThreadRole::Device => "dev",
            ThreadRole::Control => "end",
        };
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
        let thread = sys::thread::spawn(format!("vmbed-{kind}{index}"), body)
            .map_err(|e| Error::os(format!("starting the thread of {kind} {index}"), e))?;
        if self.cgroup.is_some() {
            answer.recv().unwrap_or(Ok(()))?;
        }
        Ok(thread)
    }

    /// Starts the `index`th event loop of the VM.
    pub fn start_loop(&self, index: u32) -> Result<Arc<EventLoop>> {
        EventLoop::start(&format!("vmbed-dev{index}"), |body| self.spawn(ThreadRole::Device, index, body))
    }
}

/// Starts one thread a vCPU; they wait at the gate. If one cannot be had, the others leave again.
pub(super) fn start(machine: Arc<Machine>, threads: &Threads) -> Result<Vm> {
    let vm = Vm { machine };
    let machine = &vm.machine;
    let keep = |thread| sys::lock(&machine.control).threads.push(thread);
    if machine.caller_vcpus {
        let own = machine.clone();
        keep(threads.spawn(ThreadRole::Control, 0, move || own.serve_end())?);
        return Ok(vm);
    }
    for index in 0..machine.vcpus.len() {
        let own = machine.clone();
        let cpus = machine.confined.get(index).cloned().unwrap_or_default();
        let (told, answer) = mpsc::channel();
        let body = move || {
            let confined = if cpus.is_empty() { Ok(()) } else { sys::thread::set_affinity(&cpus) };
            // Dropped at once where nobody waits for it.
            let _ = told.send(confined.map_err(|e| {
                Error::os(format!("confining vCPU {index} to the CPUs {cpus:?} (sched_setaffinity)"), e)
            }));
            own.serve_vcpu(index);
        };
        keep(threads.spawn(ThreadRole::Vcpu, index as u32, body)?);
        if !machine.confined.get(index).is_none_or(Vec::is_empty) {
            answer.recv().unwrap_or(Ok(()))?;
        }
    }
    Ok(vm)
}
