#![forbid(unsafe_code)]
//! A pair of queues that the host's kernel serves (vhost-net): a thread of its own carries frames between the rings and a TAP interface,
//! doorbells and interrupts pass between it and the guest, and nothing comes through here but what is wrong.
//!
//! It serves while all is as it should be. A limit, a cable that is not plugged in, an interface that is gone, a malformed queue: for these
//! the worker serves the same queues, and answers as it always does.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::control::Control;
use crate::config;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Memory;
use crate::net::NetBackend;
use crate::reactor::Place;
use crate::sys::fd;
use crate::sys::log;
use crate::sys::vhost::{Device, Event, PATH, Ring};
use crate::virtio::Queue;

/// What the card offers and the kernel has to know, too. The rest is between the guest and the TAP interface.
const KNOWN: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// What a card does not offer that the kernel may serve: it looks at no address.
pub(super) const UNKNOWN: u64 =
    1 << VIRTIO_NET_F_CTRL_RX | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA | 1 << VIRTIO_NET_F_CTRL_VLAN;

/// How often it is looked whether the interface is still there: the kernel does not say.
const LOOK: Duration = Duration::from_secs(1);

/// The kernel's half of one pair. Field order is drop order: it may write to the memory until the device is gone.
pub(crate) struct Vhost {
    device: Device,
    memory: Option<Memory>,
    control: Arc<Control>,
    serves: bool,
    /// It has found something wrong, and is not asked again before a driver begins, or goes on after a pause.
    failed: bool,
    /// Rung by the kernel where it cannot go on.
    pub errors: EventFd,
    /// Rung where somebody has changed what the card may do.
    pub changes: EventFd,
    /// When to look whether the interface is there.
    pub look: TimerFd,
}

impl Vhost {
    /// One for each of a card's lanes, or none where the kernel cannot serve it and need not.
    ///
    /// # Errors
    /// It must, and is not there, or not ours to use; or a network is no TAP interface.
    pub fn open_all(
        control: &Arc<Control>,
        wanted: config::Vhost,
        lanes: &[(Box<dyn NetBackend>, Place)],
    ) -> Result<Vec<Self>> {
        let open = |(backend, place): &(Box<dyn NetBackend>, Place)| {
            if backend.tap().is_none() {
                let why = format!("{}: vhost is required, and the network is no TAP interface", control.id());
                return Err(Error::new(ErrorKind::InvalidArgument, why));
            }
            Self::open(control, place)
        };
        let all = || -> Result<Vec<Self>> {
            let opened: Vec<_> = lanes.iter().map(open).collect::<Result<_>>()?;
            let failed = |e| Error::os(format!("{}: duplicating an eventfd", control.id()), e);
            let bells: Vec<_> = opened
                .iter()
                .map(|half| half.changes.try_clone())
                .collect::<io::Result<_>>()
                .map_err(failed)?;
            bells.into_iter().for_each(|bell| control.listen(bell));
            Ok(opened)
        };
        match wanted {
            config::Vhost::Off => Ok(Vec::new()),
            config::Vhost::Required => all(),
            config::Vhost::IfPresent => {
                Ok(all().inspect_err(|error| log::debug!("{error}")).unwrap_or_default())
            }
        }
    }

    fn open(control: &Arc<Control>, place: &Place) -> Result<Self> {
        let id = control.id();
        let failed = |what: &str, error: io::Error| Error::os(format!("{id}: {PATH}: {what}"), error);
        let device = Device::open().map_err(|error| not_opened(id, error))?;
        let features =
            device.features().map_err(|e| failed("asking what it knows (VHOST_GET_FEATURES)", e))?;
        if features & KNOWN != KNOWN {
            let missing = KNOWN & !features;
            let why =
                format!("{id}: {PATH} does not know the features {missing:#x}: the host's kernel is too old");
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        // Its thread belongs where the thread that asks does: to the VM's cgroup, if there is one.
        let (device, owned) = place.run(move || {
            let owned = device.set_owner();
            (device, owned)
        })?;
        owned.map_err(|e| failed("starting its thread (VHOST_SET_OWNER)", e))?;
        let bell = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| failed("creating an eventfd", e));
        let (errors, changes) = (bell()?, bell()?);
        let look =
            TimerFd::new().map_err(|e| Error::errno_of(format!("{id}: creating a timer (timerfd)"), e))?;
        let control = control.clone();
        Ok(Self { device, memory: None, control, serves: false, failed: false, errors, changes, look })
    }

    /// A driver begins that has accepted `features`, or goes on.
    pub fn begin(&mut self, features: u64, memory: &Memory) {
        self.failed = false;
        let told = self.device.set_features(features & KNOWN).and_then(|()| self.device.set_memory(memory));
        self.memory = Some(memory.clone());
        if let Err(error) = told {
            self.fail(&error);
        }
    }

    /// What it wants to be woken for.
    pub fn fds(&self) -> [RawFd; 3] {
        [self.errors.as_raw_fd(), self.changes.as_raw_fd(), self.look.as_raw_fd()]
    }

    pub fn serves(&self) -> bool {
        self.serves
    }

    /// Whether it could: nothing was wrong, and there is something for it.
    pub fn can_serve(&self, backend: &dyn NetBackend) -> bool {
        !self.failed && backend.tap().is_some()
    }

    /// Begins or ends to serve the queues, for receiving and for sending, as it may; whether it serves them now. Nobody holds chains of them.
    pub fn turn(&mut self, may: bool, queues: [&mut Queue; 2], backend: &dyn NetBackend) -> bool {
        match (self.serves, may) {
            (false, true) => self.start(queues, backend),
            (true, false) => self.stop(queues),
            _ => {}
        }
        self.serves
    }

    /// The kernel cannot go on by itself.
    pub fn fail(&mut self, why: &dyn std::fmt::Display) {
        self.failed = true;
        log::warn!("{}: vhost-net does not serve it any more: {why}", self.control.id());
    }

    fn start(&mut self, queues: [&mut Queue; 2], backend: &dyn NetBackend) {
        // Another network may have come, for which vmbed has to do it.
        let (Some(memory), Some(tap)) = (&self.memory, backend.tap()) else { return };
        let mut begun = Ok(());
        for (index, queue) in (0..).zip(&queues) {
            begun = begun.and_then(|()| hand_over(&self.device, index, queue, memory, &self.errors));
        }
        for index in 0..2 {
            begun = begun.and_then(|()| self.device.set_backend(index, Some(tap)));
        }
        if let Err(error) = begun {
            self.give_back();
            // It may have begun with one of them.
            queues.into_iter().for_each(|queue| queue.take_over(memory));
            // An interface that has gone this moment is looked for as ever.
            if !backend.is_gone() {
                self.fail(&error);
            }
            return;
        }
        self.serves = true;
        self.control.kernel_serves(true);
        self.look_later();
        // What waits already may have been announced before it listened.
        queues.iter().for_each(|queue| queue.rearm());
    }

    /// Takes the queues back: they go on from where the kernel has stopped. Where it does not serve: nothing.
    pub fn stop(&mut self, queues: [&mut Queue; 2]) {
        if !std::mem::take(&mut self.serves) {
            return;
        }
        self.give_back();
        self.control.kernel_serves(false);
        let _ = self.look.clear();
        let Some(memory) = &self.memory else { return };
        queues.into_iter().for_each(|queue| queue.take_over(memory));
    }

    /// Has the kernel give everything up: what it has begun, it finishes.
    fn give_back(&self) {
        for index in 0..2 {
            let given = [
                self.device.set_backend(index, None),
                self.device.set_event(Event::Kick, index, None),
                self.device.set_event(Event::Call, index, None),
            ];
            // They fail for descriptors that are none, and for who is not the owner.
            given
                .into_iter()
                .filter_map(io::Result::err)
                .for_each(|error| log::error!("stopping vhost-net: {error}"));
        }
    }

    /// Has `look` ring once more.
    pub fn look_later(&mut self) {
        // Fails for invalid times only.
        let _ = self.look.reset(LOOK, None);
    }
}

fn hand_over(
    device: &Device,
    index: u32,
    queue: &Queue,
    memory: &Memory,
    errors: &EventFd,
) -> io::Result<()> {
    let ([desc, avail, used], next_avail) = queue.place();
    let size = usize::from(queue.size());
    let part = |at, len| {
        memory.slice(at, len).ok_or_else(|| io::Error::other("a ring is not in one piece of memory"))
    };
    let (desc, avail, used) = (part(desc, 16 * size)?, part(avail, 6 + 2 * size)?, part(used, 6 + 8 * size)?);
    device.set_ring(index, &Ring { size: queue.size(), next_avail, desc, avail, used })?;
    device.set_event(Event::Error, index, Some(fd::borrow(errors)))?;
    device.set_event(Event::Call, index, queue.interrupt().map(|vector| vector.bell()))?;
    device.set_event(Event::Kick, index, Some(fd::borrow(queue.doorbell())))
}

fn not_opened(id: &str, error: io::Error) -> Error {
    match error.raw_os_error() {
        // The node is there without the module where udev makes it.
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            let what = "is missing; load the kernel's module as root: modprobe vhost_net";
            Error::new(ErrorKind::NotFound, format!("{id}: {PATH} {what}")).with_source(error)
        }
        Some(libc::EACCES | libc::EPERM) => {
            let what = "is not ours to open; give this user read and write access (Debian: the group kvm)";
            Error::os(format!("{id}: {PATH} {what}"), error)
        }
        _ => Error::os(format!("{id}: {PATH} cannot be opened"), error),
    }
}

#[cfg(test)]
mod tests;
