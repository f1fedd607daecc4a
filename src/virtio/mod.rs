#![forbid(unsafe_code)]
//! virtio devices (virtio 1.2): what a device and a transport owe each other.
//!
//! Devices know nothing of PCI, transports nothing of disks: they meet in [`VirtioDevice`], in the
//! queues that pass between them, and in [`Signals`].

use std::fmt::Display;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use virtio_bindings::bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;

use crate::error::Result;
use crate::events::{DeviceReporter, EventKind};
use crate::irq::Vector;
use crate::memory::Memory;
use crate::sys::lock;

pub(crate) mod balloon;
pub(crate) mod blk;
mod chain;
pub(crate) mod console;
pub(crate) mod net;
pub(crate) mod queue;
#[cfg(test)]
pub(crate) mod queue_driver;
pub(crate) mod rng;
mod server;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod transport;

pub(crate) use queue::Queue;

/// One virtio device, without the transport in front of it.
///
/// The transport calls it with its own lock held, one call at a time, on any thread but the device's
/// event loop. `activate` and `deactivate` alternate; between them the device serves its queues on its
/// loop, or, without one, whenever its `process_queue` is called.
/// No method panics or waits for the guest, whatever the guest has written.
pub(crate) trait VirtioDevice: Send {
    /// The device's id in events and errors: `disk0`, `net1`.
    fn id(&self) -> &str;

    /// The device type (section 5).
    fn device_type(&self) -> u32;

    /// The device-specific feature bits offered. The transport adds `VIRTIO_F_VERSION_1`,
    /// `VIRTIO_F_EVENT_IDX` and `VIRTIO_F_INDIRECT_DESC`.
    fn features(&self) -> u64;

    /// The largest size of each queue, each a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads device configuration space; `data` holds zeroes on entry, which stay where nothing is.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration space; most devices have nothing to write there.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Begins to serve the queues (DRIVER_OK, or the end of a pause): also what already waits in them,
    /// since its doorbell may have been heard before.
    ///
    /// # Errors
    /// The device stays inactive, and the transport sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<()>;

    /// Finishes what was begun, and begins nothing more until it is deactivated. `false` where something has not
    /// ended by the deadline: then it goes on serving. Only a device whose requests end elsewhere has any to
    /// wait for.
    fn drain(&mut self, _deadline: Instant) -> bool {
        true
    }

    /// Stops serving: waits for the request in progress, and returns the queues in their places.
    /// Serves pause, reset and unplug. Of an inactive device: nothing, and no harm.
    fn deactivate(&mut self) -> Vec<Option<Queue>>;

    /// What `drain` waits for, for an error.
    fn awaited(&self) -> &'static str {
        "its backend has not answered a request"
    }

    /// Whether memory that the driver has given is the driver's again, after `deactivate`. Only a device into whose buffers others copy
    /// has any to wait for; until then a reset is not over.
    fn is_at_rest(&self) -> bool {
        true
    }

    /// Takes what was put ready for it (another network) while it is inactive.
    fn refit(&mut self) {}

    /// Forgets what this driver has said, after `deactivate`: another one begins.
    fn reset(&mut self) {}
}

/// What a device gets to work with.
pub(crate) struct Activation {
    /// The features that the driver accepted.
    pub features: u64,
    pub memory: Memory,
    /// One for each of [`VirtioDevice::queue_sizes`]; `None` where the driver has not enabled it.
    pub queues: Vec<Option<Queue>>,
    pub signals: Signals,
}

/// How a device reaches its driver and the embedder outside the queues. Clones share everything.
#[derive(Clone)]
pub(crate) struct Signals(Arc<Shared>);

struct Shared {
    status: AtomicU8,
    isr: AtomicU8,
    generation: AtomicU8,
    config_interrupt: Mutex<Option<Arc<Vector>>>,
    reporter: Mutex<DeviceReporter>,
}

const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// The device configuration has changed (4.1.4.5).
const ISR_CONFIG: u8 = 2;

impl Signals {
    pub fn new(reporter: DeviceReporter) -> Self {
        Self(Arc::new(Shared {
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_interrupt: Mutex::new(None),
            reporter: Mutex::new(reporter),
        }))
    }

    /// The device status register (2.1).
    pub fn status(&self) -> u8 {
        self.0.status.load(Ordering::SeqCst)
    }

    /// What the driver wrote there. 0 resets everything; nothing else clears DEVICE_NEEDS_RESET.
    pub fn set_status(&self, status: u8) {
        if status == 0 {
            self.0.isr.store(0, Ordering::SeqCst);
            self.0.status.store(0, Ordering::SeqCst);
            return;
        }
        let keep = |old: u8| Some(status | (old & NEEDS_RESET));
        // The closure never answers None, so this cannot fail.
        let _ = self.0.status.fetch_update(Ordering::SeqCst, Ordering::SeqCst, keep);
    }

    /// The ISR status, cleared by reading it (4.1.4.5). Only its configuration bit is ever set: queues
    /// signal through MSI-X.
    pub fn take_isr(&self) -> u8 {
        self.0.isr.swap(0, Ordering::SeqCst)
    }

    /// Where configuration changes are signalled to.
    pub fn set_config_interrupt(&self, vector: Option<Arc<Vector>>) {
        *lock(&self.0.config_interrupt) = vector;
    }

    /// The driver broke the rules: DEVICE_NEEDS_RESET, a configuration interrupt and an event, once
    /// until the next reset. The device has stopped serving before it calls this.
    pub fn needs_reset(&self, why: impl Display) {
        if self.0.status.fetch_or(NEEDS_RESET, Ordering::SeqCst) & NEEDS_RESET != 0 {
            return;
        }
        lock(&self.0.reporter).needs_reset(why);
        self.interrupt();
    }

    /// Tells the driver that the configuration space reads differently now.
    pub fn config_changed(&self) {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        self.interrupt();
    }

    /// Changes whenever the configuration space does (2.5.1).
    pub fn config_generation(&self) -> u8 {
        self.0.generation.load(Ordering::SeqCst)
    }

    /// The host failed a request: a rate-limited event.
    pub fn backend_error(&self, errno: i32, offset: u64) {
        lock(&self.0.reporter).backend_error(errno, offset);
    }

    /// An event of this device's VM.
    pub fn report(&self, kind: EventKind) {
        lock(&self.0.reporter).report(kind);
    }

    fn interrupt(&self) {
        self.0.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        if let Some(vector) = &*lock(&self.0.config_interrupt) {
            vector.trigger();
        }
    }
}

/// The piece of a configuration space (`space`, little-endian) that an access asks for. What lies
/// beyond it reads as it was: zero.
pub(crate) fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    let Some(rest) = usize::try_from(offset).ok().and_then(|o| space.get(o..)) else { return };
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{EventKind, EventStream, Reporter, VmId};
    use crate::irq::Routes;

    #[test]
    fn needs_reset_is_told_once_until_the_reset() {
        let stream = EventStream::new().unwrap();
        let signals = Signals::new(Reporter::new(VmId(1), stream.clone()).device("disk0"));
        let vector = Routes::new(None).vector().unwrap();
        signals.set_config_interrupt(Some(vector.clone()));
        signals.set_status(0xf);
        for _ in 0..3 {
            signals.needs_reset("avail ring");
        }
        signals.set_status(0xf);
        assert_eq!(signals.status(), 0xf | NEEDS_RESET, "a driver cannot clear it but by a reset");
        assert_eq!((vector.take_raised(), signals.take_isr(), signals.take_isr()), (1, 2, 0));
        assert!(matches!(stream.next_event().unwrap().kind, EventKind::DeviceNeedsReset { .. }));
        assert_eq!(stream.next_event(), None);
        signals.set_status(0);
        assert_eq!(signals.status(), 0);
        signals.needs_reset("again");
        assert!(stream.next_event().is_some());
    }

    #[test]
    fn configuration_space_ends_where_it_ends() {
        let space = [1, 2, 3, 4];
        for (offset, len, want) in
            [(0, 4, vec![1, 2, 3, 4]), (3, 2, vec![4, 0]), (4, 1, vec![0]), (u64::MAX, 4, vec![0; 4])]
        {
            let mut data = vec![0; len];
            read_config_space(&space, offset, &mut data);
            assert_eq!(data, want, "{offset}");
        }
    }
}
