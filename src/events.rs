#![forbid(unsafe_code)]
//! The stream of events that an embedder reads: ordered, bounded, and behind one pollable fd.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::error::{Error, Result};
use crate::sys::fork;
use crate::sys::sync::atomic::{AtomicBool, Ordering};
use crate::sys::sync::{Bell, Condvar, Mutex, lock};
use crate::units::Bytes;

/// Something that happened to a VM.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// Counts the events of one stream from 0, without gaps: what was lost is said by [`EventKind::Lost`].
    pub seq: u64,
    /// When it was reported, by the host's clock.
    pub time: SystemTime,
    /// Which VM, for streams that several VMs share.
    pub vm: VmId,
    /// What happened.
    pub kind: EventKind,
    /// How many equal events were folded into this one because nobody had read it yet, or because they
    /// came too fast; 1 for a single one.
    pub count: u32,
}

/// A number that no other VM of this process has had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(pub u64);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vm{}", self.0)
    }
}

/// What an [`Event`] tells.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum EventKind {
    /// The vCPUs run for the first time.
    Started,
    /// Every vCPU and every device stands still.
    Paused,
    /// They run again.
    Resumed,
    /// The VM has ended and why. The last event of a VM, and never lost.
    Stopped(StopCause),
    /// The guest's driver broke the rules of virtio; the device waits for the driver to reset it.
    DeviceNeedsReset {
        /// The device's id: `disk0`, `net1`, `rng0`, `console0`.
        device: String,
        /// What the driver did.
        why: String,
    },
    /// The host failed a device: the guest got an error status (disk) or lost a frame (network).
    BackendError {
        /// The device's id.
        device: String,
        /// The host's errno.
        errno: i32,
        /// Where on the medium, in bytes; 0 where that means nothing.
        offset: u64,
    },
    /// The guest wrote to a doorbell ([`VmBuilder::pio_doorbell`](crate::VmBuilder::pio_doorbell)). At most one event of
    /// each doorbell is unread: while it is, further writes are counted in it, and it tells of the last.
    Doorbell {
        /// The doorbell's name.
        device: Arc<str>,
        /// Bytes from the start of its range.
        offset: u64,
        /// What the guest wrote, little-endian.
        value: u64,
    },
    /// The guest has given up as much memory as it was asked for, or it takes memory back that it was not told it
    /// might have. At most one is unread: the latest.
    Balloon {
        /// How much it was asked to give up.
        target: Bytes,
        /// How much it says that it has given up.
        actual: Bytes,
    },
    /// The host has not enough memory, and something was done about it with this VM
    /// ([`Host::set_reclaim`](crate::Host::set_reclaim)). At most one of each stage is unread: the latest.
    MemoryPressure {
        /// What was done.
        stage: ReclaimStage,
        /// How much the step is about: what the balloon is asked for now, what is to be paged out, what there is of a VM
        /// that is paused or stopped.
        wanted: Bytes,
        /// What its guest says that it has put into the balloon so far; what was named to the kernel for paging out.
        claimed: Bytes,
        /// What the host has got of that, as it counts it.
        measured: Bytes,
        /// Of a pause: how long it lasts at most. What comes then: a victim is stopped, another VM goes on.
        deadline: Option<Duration>,
    },
    /// The thread that did something about it when the host's memory got short has ended
    /// ([`Host::set_reclaim`](crate::Host::set_reclaim)): nobody looks after this VM's memory any more, until that is called again. VMs
    /// that are built later hear nothing.
    ReclaimFailed {
        /// What happened: it made a call that its sandbox refuses, or vmbed has a defect.
        why: String,
    },
    /// This many events were dropped because nobody read the stream.
    Lost {
        /// How many.
        events: u64,
    },
}

/// What is done with a VM when the host's memory gets short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReclaimStage {
    /// Its guest is asked for memory that it does not use, or may have some back.
    Balloon,
    /// Some of its memory goes to swap.
    PageOut,
    /// It stands still, since it has more than its guarantee.
    Pause,
    /// It ends: it was declared a victim.
    Stop,
}

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopCause {
    /// The guest powered itself off (ACPI S5).
    GuestPoweroff,
    /// The guest asked for a reset (ACPI reset register, i8042 pulse). vmbed does not reboot it: build anew.
    GuestReset,
    /// A vCPU met an exception while it delivered a double fault.
    TripleFault,
    /// The guest's kernel reported a panic through pvpanic.
    GuestPanic,
    /// Every vCPU of a bare guest without interrupt controller has executed `HLT`: nothing can wake it.
    GuestHalt,
    /// The embedder stopped or dropped it.
    HostStop,
    /// The host had not enough memory, and the VM had agreed to be stopped then
    /// ([`PromiseConfig::victim`](crate::PromiseConfig)). Its memory was given back at once: it reads zero.
    MemoryPressure,
    /// A vCPU cannot go on: KVM refused, guest memory is gone, or vmbed has a defect.
    VcpuFault {
        /// The vCPU's index.
        vcpu: u32,
        /// What happened.
        why: String,
    },
    /// A device cannot go on: an embedder's callback failed or panicked, or vmbed has a defect.
    DeviceFault {
        /// The device's id or name.
        device: String,
        /// What happened.
        why: String,
    },
    /// A thread of the VM's made a system call that its sandbox refuses ([`VmConfig::sandbox`](crate::VmConfig)): vmbed has a
    /// defect, or the guest has found one.
    SandboxViolation {
        /// The thread's name: `vmbed-vcpu0`, `vmbed-dev1`.
        thread: String,
        /// The call, with its number and arguments.
        call: String,
    },
}

impl fmt::Display for StopCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuestPoweroff => f.write_str("guest powered off"),
            Self::GuestReset => f.write_str("guest asked for a reset"),
            Self::TripleFault => f.write_str("triple fault"),
            Self::GuestPanic => f.write_str("guest kernel panic"),
            Self::GuestHalt => f.write_str("guest halted"),
            Self::HostStop => f.write_str("stopped by the host"),
            Self::MemoryPressure => f.write_str("stopped because the host has not enough memory"),
            Self::VcpuFault { vcpu, why } => write!(f, "vCPU {vcpu} failed: {why}"),
            Self::DeviceFault { device, why } => write!(f, "device {device} failed: {why}"),
            Self::SandboxViolation { thread, call } => {
                write!(f, "the thread {thread} made a call that its sandbox refuses: {call}")
            }
        }
    }
}

/// Unread events kept per stream; `Stopped` events are kept beyond it.
const CAPACITY: usize = 256;
/// What a VM may have of it in any case, however many share the stream.
const LEAST: usize = 8;

/// The reading end: drain it when its fd polls readable.
///
/// Clones read from the same queue; each event is delivered to one reader.
#[derive(Clone)]
pub struct EventStream(Arc<Shared>);

struct Shared {
    /// Where it was made: in a child of a fork the lock may be held for ever, and the eventfd is the parent's.
    process: u64,
    queue: Mutex<Queue>,
    /// Readable while the queue is not empty, and now and then once more.
    ready: Bell,
    arrived: Condvar,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<Event>,
    /// How many VMs have a writing end.
    vms: usize,
    /// Threads in `wait_event`.
    waiting: usize,
    next_seq: u64,
    lost: u64,
}

impl EventStream {
    /// An empty stream. Every VM has one of its own; make one to share it among VMs.
    ///
    /// # Errors
    /// `Exhausted` when the process has no file descriptor left.
    pub fn new() -> Result<Self> {
        let ready = Bell::new().map_err(|e| Error::os("creating the eventfd of an event stream", e))?;
        Ok(Self(Arc::new(Shared {
            process: fork::process(),
            queue: Mutex::default(),
            ready,
            arrived: Condvar::new(),
        })))
    }

    /// The oldest unread event. Never blocks.
    pub fn next_event(&self) -> Option<Event> {
        if !self.is_here() {
            return None;
        }
        let mut queue = lock(&self.0.queue);
        let event = queue.pop();
        if queue.is_empty() {
            self.0.ready.silence();
        }
        event
    }

    /// The oldest unread event, waiting at most `timeout` for one; `None` when none has come by then.
    pub fn wait_event(&self, timeout: Duration) -> Option<Event> {
        // A deadline beyond the clock's range is none.
        let deadline = Instant::now().checked_add(timeout);
        while self.is_here() {
            if let Some(event) = self.next_event() {
                return Some(event);
            }
            let mut queue = lock(&self.0.queue);
            if !queue.is_empty() {
                continue;
            }
            let left = deadline.map_or(timeout, |d| d.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return None;
            }
            queue.waiting += 1;
            // A spurious wake-up costs one round of the loop.
            let mut queue = match self.0.arrived.wait_timeout(queue, left) {
                Ok((queue, _)) => queue,
                Err(poisoned) => poisoned.into_inner().0,
            };
            queue.waiting -= 1;
        }
        None
    }

    fn is_here(&self) -> bool {
        self.0.process == fork::process()
    }

    /// Whether both are the same stream, or clones of one.
    pub fn same_as(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn push(&self, vm: VmId, kind: EventKind, count: u32) {
        let (was_empty, waiting) = {
            let mut queue = lock(&self.0.queue);
            let was_empty = queue.is_empty();
            queue.push(vm, kind, count);
            (was_empty, queue.waiting > 0)
        };
        // Both without the lock, or whom they wake finds it held, and sleeps again. So a reader may have taken the
        // event by now: then the fd is readable in vain, until the next look at the stream.
        if was_empty {
            // The counter is far from full: this cannot fail for want of room.
            self.0.ready.ring();
        }
        // Waking nobody would be a system call, too.
        if waiting {
            self.0.arrived.notify_all();
        }
    }
}

impl AsFd for EventStream {
    /// Polls readable while an event waits; when several threads read, perhaps once too often. For `poll` only: read through [`EventStream::next_event`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.ready.as_fd()
    }
}

impl AsRawFd for EventStream {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl fmt::Debug for EventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStream").field("unread", &lock(&self.0.queue).events.len()).finish()
    }
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.events.is_empty() && self.lost == 0
    }

    fn push(&mut self, vm: VmId, kind: EventKind, count: u32) {
        if let Some(same) = self.events.iter_mut().rev().find(|e| e.vm == vm && e.kind.takes_in(&kind)) {
            same.count = same.count.saturating_add(count);
            same.kind = kind;
            return;
        }
        if !matches!(kind, EventKind::Stopped(_)) && !self.has_room_for(vm) {
            self.lost += 1;
            return;
        }
        // Losses are told where they happened: before what comes next.
        self.settle(vm);
        self.append(vm, kind, count);
    }

    /// Each VM of a stream has its part, which no other can take.
    fn has_room_for(&self, vm: VmId) -> bool {
        let part = (CAPACITY / self.vms.max(1)).max(LEAST);
        self.events.iter().filter(|e| e.vm == vm).count() < part
    }

    fn pop(&mut self) -> Option<Event> {
        if self.events.is_empty() {
            self.settle(VmId(0));
        }
        self.events.pop_front()
    }

    fn settle(&mut self, vm: VmId) {
        let events = std::mem::take(&mut self.lost);
        if events > 0 {
            self.append(vm, EventKind::Lost { events }, 1);
        }
    }

    fn append(&mut self, vm: VmId, kind: EventKind, count: u32) {
        self.events.push_back(Event { seq: self.next_seq, time: SystemTime::now(), vm, kind, count });
        self.next_seq += 1;
    }
}

impl EventKind {
    /// Whether an unread event of this kind stands for a later one, too.
    fn takes_in(&self, later: &Self) -> bool {
        match (self, later) {
            (Self::BackendError { .. }, _) => self == later,
            // Why differs as the guest pleases: one that breaks the rules in ever new ways takes nobody's place.
            (Self::DeviceNeedsReset { device: one, .. }, Self::DeviceNeedsReset { device: other, .. }) => {
                one == other
            }
            (Self::Doorbell { device: one, .. }, Self::Doorbell { device: other, .. }) => one == other,
            (Self::Balloon { .. }, Self::Balloon { .. }) => true,
            (Self::MemoryPressure { stage: one, .. }, Self::MemoryPressure { stage: other, .. }) => {
                one == other
            }
            _ => false,
        }
    }
}

/// The writing end for one VM.
#[derive(Clone)]
pub(crate) struct Reporter(Arc<Member>);

/// A VM's part in a stream.
struct Member {
    vm: VmId,
    stream: EventStream,
}

impl Drop for Member {
    fn drop(&mut self) {
        if self.stream.is_here() {
            lock(&self.stream.0.queue).vms -= 1;
        }
    }
}

impl Reporter {
    pub fn new(vm: VmId, stream: EventStream) -> Self {
        lock(&stream.0.queue).vms += 1;
        Self(Arc::new(Member { vm, stream }))
    }

    pub fn report(&self, kind: EventKind) {
        self.report_many(kind, 1);
    }

    fn report_many(&self, kind: EventKind, count: u32) {
        self.0.stream.push(self.0.vm, kind, count);
    }

    /// The same for one device, with its errors held to one event a second.
    pub fn device(&self, device: &str) -> DeviceReporter {
        DeviceReporter {
            reporter: self.clone(),
            device: device.into(),
            errors: Vec::new(),
            resets: Resets::default(),
        }
    }
}

/// Reports what befalls one device.
pub(crate) struct DeviceReporter {
    reporter: Reporter,
    device: Arc<str>,
    /// When each errno was reported last, and how many came since.
    errors: Vec<Told>,
    resets: Resets,
}

/// The `DeviceNeedsReset` of one device in the second that began at `since`.
#[derive(Default)]
struct Resets {
    since: Option<Instant>,
    told: u32,
    held: u32,
}

struct Told {
    errno: i32,
    at: Instant,
    held: u32,
}

/// The least time between two `BackendError` events with the same errno of one device.
const ERROR_INTERVAL: Duration = Duration::from_secs(1);

/// The most `DeviceNeedsReset` events of one device in that time: a driver can break it, and reset it, all day.
const RESETS_AT_ONCE: u32 = 64;

impl DeviceReporter {
    pub fn report(&self, kind: EventKind) {
        self.reporter.report(kind);
    }

    pub fn needs_reset(&mut self, why: impl fmt::Display) {
        let (now, resets) = (Instant::now(), &mut self.resets);
        if resets.since.is_none_or(|since| now.duration_since(since) >= ERROR_INTERVAL) {
            (resets.since, resets.told) = (Some(now), 0);
        }
        if resets.told >= RESETS_AT_ONCE {
            resets.held = resets.held.saturating_add(1);
            return;
        }
        resets.told += 1;
        let count = std::mem::take(&mut resets.held).saturating_add(1);
        let device = self.device.to_string();
        self.reporter.report_many(EventKind::DeviceNeedsReset { device, why: why.to_string() }, count);
    }

    pub fn backend_error(&mut self, errno: i32, offset: u64) {
        let now = Instant::now();
        let told = self.errors.iter_mut().find(|told| told.errno == errno);
        let count = match told {
            Some(told) if now.duration_since(told.at) < ERROR_INTERVAL => {
                told.held = told.held.saturating_add(1);
                return;
            }
            Some(told) => {
                told.at = now;
                std::mem::take(&mut told.held).saturating_add(1)
            }
            // There are no more of them than errnos.
            None => {
                self.errors.push(Told { errno, at: now, held: 0 });
                1
            }
        };
        let kind = EventKind::BackendError { device: self.device.to_string(), errno, offset };
        self.reporter.report_many(kind, count);
    }
}

/// How any part of a VM asks for the VM's end: the first cause wins, the call never blocks.
#[derive(Clone)]
pub(crate) struct StopLine {
    vm: VmId,
    pulled: Arc<AtomicBool>,
    pull: Arc<dyn Fn(StopCause) + Send + Sync>,
}

impl StopLine {
    /// That of no VM.
    pub fn new(pull: impl Fn(StopCause) + Send + Sync + 'static) -> Self {
        Self::of(VmId(0), Arc::default(), pull)
    }

    /// One of several of a VM: they share `pulled`.
    pub fn of(vm: VmId, pulled: Arc<AtomicBool>, pull: impl Fn(StopCause) + Send + Sync + 'static) -> Self {
        Self { vm, pulled, pull: Arc::new(pull) }
    }

    pub fn pull(&self, cause: StopCause) {
        self.pulled.store(true, Ordering::Release);
        (self.pull)(cause);
    }

    /// Whether the VM is coming to its end: who waits for something need not wait for long any more.
    pub fn is_pulled(&self) -> bool {
        self.pulled.load(Ordering::Acquire)
    }

    /// Whose end it asks for.
    pub fn vm(&self) -> VmId {
        self.vm
    }
}

// Named, since tests/models has this file under another path.
#[cfg(test)]
#[path = "events/tests.rs"]
mod tests;
