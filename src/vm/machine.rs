#![forbid(unsafe_code)]
//! A built VM and the transitions of its life.
//!
//! ```text
//! Built ── start ──▶ Running ◀── resume ──┐
//!   │                 │   └──── pause ──▶ Paused
//!   └────── stop ─────┴────── stop ────────┴──▶ Stopped(cause)
//! ```
//! The end may come from anyone at any moment (a guest, a device, the embedder): whoever pulls the stop
//! line first names the cause and opens the gate outwards; the last vCPU to leave tidies up.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;

use super::board::Board;
use super::builder::HostParts;
use super::cgroup::Cgroup;
use super::clock;
use super::supervisor::Supervisor;
use crate::budget::Reservation;
use crate::error::{Error, ErrorKind, Result};
use crate::events::{EventKind, EventStream, Reporter, StopCause, StopLine, VmId};
use crate::memory::{Enrolled, Memory};
use crate::reactor::own;
use crate::sys::log;
use crate::sys::signal::SignalSet;
use crate::sys::sync::atomic::{AtomicBool, Ordering};
use crate::sys::{fork, lock};
use crate::vcpu::{Gate, Served, Surroundings, Target, Vcpu};

/// How long a call waits for vCPUs that are inside an embedder's device, or for a disk that hangs.
pub(super) const BOUND: Duration = Duration::from_secs(10);

/// Where a VM is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmState {
    /// Everything is there, nothing has run.
    Built,
    /// The guest runs.
    Running,
    /// The guest, its clocks and its devices stand still.
    Paused,
    /// The guest has ended for this reason.
    Stopped(StopCause),
}

/// Why [`Vm::run_vcpu`](super::Vm::run_vcpu) returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VcpuReturn {
    /// The vCPU will not run any more: the VM has ended, or this vCPU of a bare guest has halted.
    Ended,
    /// Somebody called [`interrupt_vcpu`](super::Vm::interrupt_vcpu), or a signal was delivered to the thread.
    /// The guest goes on where it was when the vCPU is run again.
    Interrupted,
}

/// How a VM ends: the cause that came first, and the gate.
pub(super) struct End {
    pub cause: OnceLock<StopCause>,
    pub gate: Gate,
    /// What every line of the VM shares: it has come to its end.
    pub near: Arc<AtomicBool>,
}

impl End {
    pub fn line(self: &Arc<Self>, id: VmId) -> StopLine {
        let end = self.clone();
        StopLine::of(id, self.near.clone(), move |cause| {
            let said = cause.clone();
            let _ = end.cause.set(cause);
            end.gate.set(Target::End);
            // Last: whatever the embedder's logger does, the VM ends.
            let _ = catch_unwind(|| log::debug!("stop requested: {said}"));
        })
    }
}

/// All parts of one VM. Field order is drop order: what refers to guest memory goes before it.
pub(super) struct Machine {
    pub id: VmId,
    /// Where its threads are: a child of a fork has none.
    pub process: u64,
    /// Whoever had it has dropped it, and waits for calls in progress elsewhere.
    pub dropped: AtomicBool,
    pub end: Arc<End>,
    pub reporter: Reporter,
    pub events: EventStream,
    pub board: Board,
    /// After the board's loops, for which it answers.
    pub supervisor: Option<Arc<Supervisor>>,
    pub around: Surroundings,
    pub vcpus: Vec<Vcpu>,
    /// The embedder's threads run them.
    pub caller_vcpus: bool,
    /// The host's CPUs that each vCPU is confined to; empty for none in particular.
    pub confined: Vec<Vec<u32>>,
    pub meter: Enrolled,
    pub vm: Arc<VmFd>,
    pub memory: Memory,
    /// Gives back what was booked, when it is dropped.
    pub reservation: Reservation,
    /// Its threads are in it: it goes after them.
    pub _cgroup: Option<Arc<Cgroup>>,
    pub host: Arc<HostParts>,
    /// Serializes start, pause and resume. Never taken by the threads of the VM itself.
    pub control: Mutex<Control>,
    pub state: Mutex<VmState>,
    pub state_changed: Condvar,
}

/// What only the transitions need.
#[derive(Default)]
pub(super) struct Control {
    pub clock: Option<clock::Stopped>,
    pub threads: Vec<JoinHandle<()>>,
}

impl Machine {
    /// The body of vCPU `index`'s thread.
    pub fn serve_vcpu(&self, index: usize) {
        let Some(vcpu) = self.vcpus.get(index) else { return };
        if let Served::Left { last: true } =
            vcpu.serve(&self.around, &self.end.gate, &self.end.line(self.id), None)
        {
            self.finish();
        }
    }

    /// The body of the thread that ends a VM whose vCPUs run on threads of the embedder: those may be anywhere.
    pub fn serve_end(&self) {
        self.end.gate.wait_end();
        self.finish();
    }

    /// Runs vCPU `index` on the embedder's calling thread.
    pub fn run_vcpu(&self, index: u32) -> Result<VcpuReturn> {
        let refused = |why: String| Err(Error::new(ErrorKind::InvalidState, format!("run_vcpu: {why}")));
        self.only_here("run_vcpu")?;
        let vcpu = self.vcpu(index)?;
        if !self.caller_vcpus {
            return refused(
                "vmbed's own threads run this VM's vCPUs: build it with caller_vcpus()".to_owned(),
            );
        }
        if own::is_inside_any() {
            return refused("a callback cannot run vCPUs".to_owned());
        }
        let blocked = SignalSet::block_kick();
        let inside = own::enter(self.id);
        let served = vcpu.serve(&self.around, &self.end.gate, &self.end.line(self.id), Some(&blocked));
        drop(inside);
        blocked.block();
        match served {
            Served::Left { .. } => Ok(VcpuReturn::Ended),
            Served::Returned => Ok(VcpuReturn::Interrupted),
            Served::Busy => refused(format!("another thread runs vCPU {index}")),
        }
    }

    /// Has `run_vcpu` of vCPU `index` return.
    pub fn interrupt_vcpu(&self, index: u32) -> Result<()> {
        self.only_here("interrupt_vcpu")?;
        self.vcpu(index)?;
        if !self.caller_vcpus {
            let why = "interrupt_vcpu: vmbed's own threads run this VM's vCPUs: pause the VM instead";
            return Err(Error::new(ErrorKind::InvalidState, why));
        }
        self.end.gate.interrupt(index as usize);
        Ok(())
    }

    pub(super) fn vcpu(&self, index: u32) -> Result<&Vcpu> {
        self.vcpus.get(index as usize).ok_or_else(|| {
            let why = format!("there is no vCPU {index}: this VM has {}", self.vcpus.len());
            Error::new(ErrorKind::InvalidArgument, why)
        })
    }

    /// Everything that the end of the guest brings with it; when no vCPU runs any more.
    fn finish(&self) {
        self.end.near.store(true, Ordering::Release);
        let tidy = catch_unwind(AssertUnwindSafe(|| self.board.stop()));
        if tidy.is_err() {
            log::error!("{}: the console or the balloon panicked as it was being stopped", self.id);
        }
        // Nobody pulled the line: every vCPU of a bare guest has halted.
        let first = self.end.cause.get_or_init(|| StopCause::GuestHalt);
        let refused = self.supervisor.as_ref().and_then(|supervisor| supervisor.violation());
        let cause = refused.unwrap_or_else(|| first.clone());
        let mut state = lock(&self.state);
        *state = VmState::Stopped(cause.clone());
        // Under the lock: who has waited for the end finds its event in the stream.
        self.reporter.report(EventKind::Stopped(cause));
        self.state_changed.notify_all();
    }

    pub fn state(&self) -> VmState {
        lock(&self.state).clone()
    }

    /// From `Built` to `Running`.
    pub fn start(&self) -> Result<()> {
        let _control = self.control("start")?;
        self.expect(&[VmState::Built], "start", "a VM is started once, after it was built")?;
        self.set_unless_stopped(VmState::Running, EventKind::Started);
        self.end.gate.set(Target::Run);
        Ok(())
    }

    /// From `Running` to `Paused`.
    pub fn pause(&self) -> Result<()> {
        let mut control = self.control("pause")?;
        // Devices have code of the embedder's.
        let _inside = own::enter(self.id);
        self.expect(&[VmState::Running], "pause", "only a running VM can be paused")?;
        self.end.gate.set(Target::Wait);
        if !self.end.gate.wait_settled(BOUND) {
            self.end.gate.set(Target::Run);
            let why =
                format!("a vCPU has not left a device's callback for {BOUND:?}: the VM goes on running");
            return Err(Error::new(ErrorKind::TimedOut, why).context("pause"));
        }
        if let Err(error) = self.board.pause(Instant::now() + BOUND) {
            self.end.gate.set(Target::Run);
            let late = error.kind() == ErrorKind::TimedOut;
            let late = if late {
                format!(": not within {BOUND:?}, so the VM goes on running")
            } else {
                String::new()
            };
            return Err(error.context(format!("pause{late}")));
        }
        let paused = clock::stop(&self.vm);
        match paused {
            Ok(clock) => control.clock = Some(clock),
            Err(error) => {
                // Nothing changed, as every failed call promises.
                let _ = self.board.resume();
                self.end.gate.set(Target::Run);
                return Err(error.context("pause"));
            }
        }
        if self.set_unless_stopped(VmState::Paused, EventKind::Paused) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::InvalidState, format!("pause: the VM ended meanwhile: {:?}", self.state())))
    }

    /// From `Paused` to `Running`.
    pub fn resume(&self) -> Result<()> {
        let mut control = self.control("resume")?;
        // Devices have code of the embedder's.
        let _inside = own::enter(self.id);
        self.expect(&[VmState::Paused], "resume", "only a paused VM can be resumed")?;
        if let Some(clock) = &control.clock {
            clock::resume(&self.vm, &self.vcpus, clock).map_err(|e| e.context("resume"))?;
        }
        let resumed = self.board.resume();
        control.clock = None;
        resumed.map_err(|e| e.context("resume: the VM ends"))?;
        self.set_unless_stopped(VmState::Running, EventKind::Resumed);
        self.end.gate.set(Target::Run);
        Ok(())
    }

    /// Runs `f` on a vCPU that stands.
    pub fn with_standing_vcpu<R>(&self, index: u32, f: impl FnOnce(&Vcpu) -> Result<R>) -> Result<R> {
        let _control = self.control("access to registers")?;
        let standing = !matches!(self.state(), VmState::Running);
        if !standing {
            let why = "registers are only accessible while the VM does not run: pause it first";
            return Err(Error::new(ErrorKind::InvalidState, why));
        }
        f(self.vcpu(index)?)
    }

    /// Waits for the end.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Option<StopCause>> {
        self.not_from_within("wait")?;
        // A deadline beyond the clock's range is none.
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut state = lock(&self.state);
        loop {
            if let VmState::Stopped(cause) = &*state {
                return Ok(Some(cause.clone()));
            }
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            state = match left {
                Some(left) if left.is_zero() => return Ok(None),
                Some(left) => match self.state_changed.wait_timeout(state, left) {
                    Ok((state, _)) => state,
                    Err(poisoned) => poisoned.into_inner().0,
                },
                None => self.state_changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner),
            };
        }
    }

    /// Pulls the stop line for the embedder. Never blocks.
    pub fn request_stop(&self) {
        if self.is_here() && !matches!(self.state(), VmState::Stopped(_)) {
            self.end.line(self.id).pull(StopCause::HostStop);
        }
    }

    /// Joins every thread. After it, nothing of this VM runs, and nobody works on it.
    pub fn join(&self) {
        self.host.herd.leave(self.id.0);
        let threads = std::mem::take(&mut lock(&self.control).threads);
        for thread in threads {
            // Its panics were caught and reported as the cause.
            let _ = thread.join();
        }
        self.board.join();
        if let Some(supervisor) = &self.supervisor {
            supervisor.stop();
        }
    }

    /// Whether the calling thread is one that the VM needs to come to its end: its own, in a callback, or one
    /// that is turning its dispatcher.
    pub fn is_own_thread(&self) -> bool {
        own::is_inside(self.id) || self.board.is_turned_here()
    }

    /// Whether this is the process that built it, not a child of a fork.
    pub fn is_here(&self) -> bool {
        self.process == fork::process()
    }

    fn only_here(&self, call: &str) -> Result<()> {
        if self.is_here() {
            return Ok(());
        }
        let why = format!("{call}: the VM runs in the process that this one was forked from");
        Err(Error::new(ErrorKind::InvalidState, why))
    }

    pub(super) fn not_from_within(&self, call: &str) -> Result<()> {
        self.only_here(call)?;
        if self.is_own_thread() {
            let why = format!(
                "{call} waits for this VM, so it cannot be called from the VM's own callback, or one that its \
                 dispatcher calls"
            );
            return Err(Error::new(ErrorKind::InvalidState, why));
        }
        Ok(())
    }

    pub(super) fn control(&self, call: &str) -> Result<std::sync::MutexGuard<'_, Control>> {
        self.not_from_within(call)?;
        Ok(lock(&self.control))
    }

    fn expect(&self, allowed: &[VmState], call: &str, rule: &str) -> Result<()> {
        let state = self.state();
        if allowed.contains(&state) && self.end.cause.get().is_none() {
            return Ok(());
        }
        // What pulled the line may have followed from a call that was refused: that is then the cause.
        let why = match (&state, self.end.cause.get()) {
            (VmState::Stopped(cause), _) | (_, Some(cause)) => {
                format!("{call}: the VM has ended ({cause}); {rule}")
            }
            _ => format!("{call}: the VM is {state:?}; {rule}"),
        };
        Err(Error::new(ErrorKind::InvalidState, why))
    }

    /// Enters `state` and reports it, unless the end came first. The lock keeps both in one order.
    fn set_unless_stopped(&self, state: VmState, event: EventKind) -> bool {
        let mut current = lock(&self.state);
        if matches!(*current, VmState::Stopped(_)) {
            return false;
        }
        *current = state;
        self.reporter.report(event);
        self.state_changed.notify_all();
        true
    }
}
