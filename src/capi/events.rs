//! What happened to VMs.

use std::ffi::{CString, c_char};
use std::os::fd::AsRawFd;
use std::time::{Duration, UNIX_EPOCH};

use super::arguments::{Out, timeout};
use super::error::{c_text, vmbed_error};
use super::handle::{self, handle};
use super::{answer, call};
use crate::events::{Event, EventKind, EventStream, StopCause};

/// The vCPUs run for the first time.
pub const VMBED_EVENT_STARTED: i32 = 1;
/// Every vCPU and every device stands still.
pub const VMBED_EVENT_PAUSED: i32 = 2;
/// They run again.
pub const VMBED_EVENT_RESUMED: i32 = 3;
/// The VM has ended; vmbed_event_cause() says why. The last event of a VM, and never lost.
pub const VMBED_EVENT_STOPPED: i32 = 4;
/// The guest's driver broke the rules of virtio; the device waits for the driver to reset it.
pub const VMBED_EVENT_DEVICE_NEEDS_RESET: i32 = 5;
/// The host failed a device: the guest got an error status (disk) or lost a frame (network).
pub const VMBED_EVENT_BACKEND_ERROR: i32 = 6;
/// vmbed_event_count() events were dropped because nobody read the stream.
pub const VMBED_EVENT_LOST: i32 = 7;
/// The guest wrote to a doorbell, see vmbed_builder_add_pio_doorbell(). At most one event of each doorbell is unread:
/// while it is, further writes are counted in it, and it tells of the last.
pub const VMBED_EVENT_DOORBELL: i32 = 8;
/// The guest has given up as much memory as vmbed_vm_set_balloon() asked for, or it takes memory back that it was not
/// told it might have; vmbed_event_value() says how much it has given up. At most one is unread: the latest.
pub const VMBED_EVENT_BALLOON: i32 = 9;
/// The host has not enough memory, and something was done about it with this VM (vmbed_host_set_reclaim()):
/// vmbed_event_pressure() says what. At most one of each stage is unread: the latest.
pub const VMBED_EVENT_MEMORY_PRESSURE: i32 = 10;
/// The thread that did something about it when the host's memory got short has ended: vmbed_event_text() says why. Nobody looks after
/// this VM's memory any more, until vmbed_host_set_reclaim() is called again.
pub const VMBED_EVENT_RECLAIM_FAILED: i32 = 11;

/// The VM has not ended.
pub const VMBED_CAUSE_NONE: i32 = 0;
/// The guest powered itself off (ACPI S5).
pub const VMBED_CAUSE_GUEST_POWEROFF: i32 = 1;
/// The guest asked for a reset. vmbed does not reboot it: build anew.
pub const VMBED_CAUSE_GUEST_RESET: i32 = 2;
/// A vCPU met an exception while it delivered a double fault.
pub const VMBED_CAUSE_TRIPLE_FAULT: i32 = 3;
/// The guest's kernel reported a panic through pvpanic.
pub const VMBED_CAUSE_GUEST_PANIC: i32 = 4;
/// Every vCPU of a bare guest has executed HLT: nothing can wake it.
pub const VMBED_CAUSE_GUEST_HALT: i32 = 5;
/// The embedder stopped or freed it.
pub const VMBED_CAUSE_HOST_STOP: i32 = 6;
/// A vCPU cannot go on: KVM refused, guest memory is gone, or vmbed has a defect.
pub const VMBED_CAUSE_VCPU_FAULT: i32 = 7;
/// A device cannot go on: an embedder's callback failed, or vmbed has a defect.
pub const VMBED_CAUSE_DEVICE_FAULT: i32 = 8;
/// The host had not enough memory, and the VM had agreed to be stopped then (vmbed_config_set_promise()). Its memory was given
/// back at once: it reads zero.
pub const VMBED_CAUSE_MEMORY_PRESSURE: i32 = 9;
/// A thread of the VM's, which vmbed_event_device() names, made a system call that its sandbox refuses
/// (vmbed_config_set_sandbox()): vmbed has a defect, or the guest has found one.
pub const VMBED_CAUSE_SANDBOX_VIOLATION: i32 = 10;

pub(super) fn cause(cause: &StopCause) -> i32 {
    match cause {
        StopCause::GuestPoweroff => VMBED_CAUSE_GUEST_POWEROFF,
        StopCause::GuestReset => VMBED_CAUSE_GUEST_RESET,
        StopCause::TripleFault => VMBED_CAUSE_TRIPLE_FAULT,
        StopCause::GuestPanic => VMBED_CAUSE_GUEST_PANIC,
        StopCause::GuestHalt => VMBED_CAUSE_GUEST_HALT,
        StopCause::HostStop => VMBED_CAUSE_HOST_STOP,
        StopCause::MemoryPressure => VMBED_CAUSE_MEMORY_PRESSURE,
        StopCause::VcpuFault { .. } => VMBED_CAUSE_VCPU_FAULT,
        StopCause::DeviceFault { .. } => VMBED_CAUSE_DEVICE_FAULT,
        StopCause::SandboxViolation { .. } => VMBED_CAUSE_SANDBOX_VIOLATION,
    }
}

/// The reading end of a stream of events, of one VM or of several: poll its fd, then drain it.
pub struct vmbed_events(());

handle!(vmbed_events holds EventStream);

/// Something that happened to a VM.
pub struct vmbed_event(());

handle!(vmbed_event holds Story);

/// What an event holds.
pub(super) struct Story {
    event: Event,
    kind: i32,
    cause: i32,
    device: Option<CString>,
    text: CString,
}

impl Story {
    pub fn event(&self) -> &Event {
        &self.event
    }

    fn new(event: Event) -> Self {
        let (kind, end, device, text) = match &event.kind {
            EventKind::Started => (VMBED_EVENT_STARTED, VMBED_CAUSE_NONE, None, String::new()),
            EventKind::Paused => (VMBED_EVENT_PAUSED, VMBED_CAUSE_NONE, None, String::new()),
            EventKind::Resumed => (VMBED_EVENT_RESUMED, VMBED_CAUSE_NONE, None, String::new()),
            EventKind::Stopped(why) => {
                let device = match why {
                    StopCause::DeviceFault { device, .. } => Some(device.as_str()),
                    StopCause::SandboxViolation { thread, .. } => Some(thread.as_str()),
                    _ => None,
                };
                (VMBED_EVENT_STOPPED, cause(why), device, why.to_string())
            }
            EventKind::DeviceNeedsReset { device, why } => {
                (VMBED_EVENT_DEVICE_NEEDS_RESET, VMBED_CAUSE_NONE, Some(device.as_str()), why.clone())
            }
            EventKind::BackendError { device, errno, .. } => {
                let why = std::io::Error::from_raw_os_error(*errno).to_string();
                (VMBED_EVENT_BACKEND_ERROR, VMBED_CAUSE_NONE, Some(device.as_str()), why)
            }
            EventKind::Doorbell { device, .. } => {
                (VMBED_EVENT_DOORBELL, VMBED_CAUSE_NONE, Some(&**device), String::new())
            }
            EventKind::Balloon { .. } => {
                (VMBED_EVENT_BALLOON, VMBED_CAUSE_NONE, Some("balloon0"), String::new())
            }
            EventKind::MemoryPressure { .. } => {
                (VMBED_EVENT_MEMORY_PRESSURE, VMBED_CAUSE_NONE, None, String::new())
            }
            EventKind::ReclaimFailed { why } => {
                (VMBED_EVENT_RECLAIM_FAILED, VMBED_CAUSE_NONE, None, why.clone())
            }
            EventKind::Lost { .. } => (VMBED_EVENT_LOST, VMBED_CAUSE_NONE, None, String::new()),
        };
        let device = device.map(c_text);
        // A panic's own may have several lines.
        Self { kind, cause: end, device, text: c_text(text.replace('\n', " ")), event }
    }
}

/// A stream of your own, for vmbed_builder_set_events() of several VMs. It is yours to free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_events_new(
    events: *mut *mut vmbed_events,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        Out::new(events, "events")?.put(handle::make(EventStream::new()?));
        Ok(())
    })
}

/// The stream's fd: it polls readable while an event waits; when several threads read, perhaps once too often, so ask
/// vmbed_events_next() with a timeout of 0. For poll() and the like only: it belongs to the stream, and closes with the
/// last of its VMs and handles. -1 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_events_fd(events: *const vmbed_events) -> i32 {
    answer(-1, || handle::object(events).map_or(-1, |e| e.as_raw_fd()))
}

/// Takes the oldest unread event, waiting at most `timeout` milliseconds for one: 0 does not block, a negative timeout
/// waits for ever. `event` is set to it, and it is yours to free; or to NULL where none has come. Each event goes to one
/// reader.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_events_next(
    events: *const vmbed_events,
    timeout: i64,
    event: *mut *mut vmbed_event,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let out = Out::new(event, "event")?;
        let stream = handle::object(events)?;
        let next = match self::timeout(timeout) {
            Some(Duration::ZERO) => stream.next_event(),
            Some(time) => stream.wait_event(time),
            None => stream.wait_event(Duration::MAX),
        };
        out.put(next.map_or(std::ptr::null_mut(), |event| handle::make(Story::new(event))));
        Ok(())
    })
}

/// Frees this end of a stream. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_events_free(events: *mut vmbed_events) {
    answer((), || drop(handle::take(events)));
}

fn look<T: Copy>(event: *const vmbed_event, otherwise: T, read: impl FnOnce(&Story) -> T) -> T {
    answer(otherwise, || handle::object(event).map_or(otherwise, |story| read(&story)))
}

/// What happened, one of VMBED_EVENT_*; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_kind(event: *const vmbed_event) -> i32 {
    look(event, 0, |e| e.kind)
}

/// Counts the events of one stream from 0, without gaps: what was lost is said by VMBED_EVENT_LOST.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_seq(event: *const vmbed_event) -> u64 {
    look(event, 0, |e| e.event.seq)
}

/// When it was reported, in nanoseconds since 1970 (CLOCK_REALTIME).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_time(event: *const vmbed_event) -> u64 {
    look(event, 0, |e| e.event.time.duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64))
}

/// Which VM: what vmbed_vm_id() answers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_vm_id(event: *const vmbed_event) -> u64 {
    look(event, 0, |e| e.event.vm.0)
}

/// How many equal events were folded into this one; of VMBED_EVENT_LOST, how many are missing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_count(event: *const vmbed_event) -> u64 {
    look(event, 0, |e| match e.event.kind {
        EventKind::Lost { events } => events,
        _ => e.event.count.into(),
    })
}

/// Why the VM ended, one of VMBED_CAUSE_*; VMBED_CAUSE_NONE where it is not VMBED_EVENT_STOPPED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_cause(event: *const vmbed_event) -> i32 {
    look(event, VMBED_CAUSE_NONE, |e| e.cause)
}

/// The device that it is about, `disk0` or the name of one of yours; NULL where it is about none. It belongs to the
/// event.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_device(event: *const vmbed_event) -> *const c_char {
    look(event, std::ptr::null(), |e| e.device.as_ref().map_or(std::ptr::null(), |d| d.as_ptr()))
}

/// The host's errno of VMBED_EVENT_BACKEND_ERROR, else 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_errno(event: *const vmbed_event) -> i32 {
    look(event, 0, |e| match e.event.kind {
        EventKind::BackendError { errno, .. } => errno,
        _ => 0,
    })
}

/// Where on the medium VMBED_EVENT_BACKEND_ERROR came, in bytes; where in its range VMBED_EVENT_DOORBELL was rung, in
/// bytes; 0 where that means nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_offset(event: *const vmbed_event) -> u64 {
    look(event, 0, |e| match e.event.kind {
        EventKind::BackendError { offset, .. } | EventKind::Doorbell { offset, .. } => offset,
        _ => 0,
    })
}

/// What the guest wrote last to the doorbell of VMBED_EVENT_DOORBELL, little-endian; how many bytes of memory the guest of
/// VMBED_EVENT_BALLOON says that it has given up; else 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_value(event: *const vmbed_event) -> u64 {
    look(event, 0, |e| match e.event.kind {
        EventKind::Doorbell { value, .. } => value,
        EventKind::Balloon { actual, .. } => actual.get(),
        _ => 0,
    })
}

/// What happened in words, without a line feed: the cause, what the guest's driver did, or why VMBED_EVENT_RECLAIM_FAILED came. Never
/// NULL; empty where the kind says it all. It belongs to the event.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_text(event: *const vmbed_event) -> *const c_char {
    look(event, c"".as_ptr(), |e| e.text.as_ptr())
}

/// Frees an event. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_event_free(event: *mut vmbed_event) {
    answer((), || drop(handle::take(event)));
}
