#![forbid(unsafe_code)]
//! The state machine of a virtio device (virtio 1.2, 2.1 and 3.1), the same behind every transport:
//! status, features, queue registers, activation, reset, pause.

use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::{Error, ErrorKind, Result};
use crate::irq::Vector;
use crate::memory::Memory;
use crate::virtio::queue::QueueSetup;
use crate::virtio::{Activation, Queue, Signals, VirtioDevice};

const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// The bits that a driver may set (2.1). Setting another one does nothing.
const DRIVER_BITS: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8
    | VIRTIO_CONFIG_S_DRIVER as u8
    | FEATURES_OK
    | DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED as u8;
/// Says that no interrupt is wanted (`VIRTIO_MSI_NO_VECTOR`, 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;
/// What the rings can do, whatever the device.
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The registers of one queue.
pub(super) struct QueueRegisters {
    pub max_size: u16,
    /// 0 after the driver has written a size that cannot be.
    pub size: u16,
    pub enabled: bool,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    /// The entry of the vector table, or [`NO_VECTOR`].
    pub vector: u16,
    pub interrupt: Option<Arc<Vector>>,
    pub doorbell: EventFd,
}

impl QueueRegisters {
    fn new(max_size: u16) -> std::io::Result<Self> {
        let doorbell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let (size, enabled) = (max_size, false);
        let (desc, avail, used, vector, interrupt) = (0, 0, 0, NO_VECTOR, None);
        Ok(Self { max_size, size, enabled, desc, avail, used, vector, interrupt, doorbell })
    }

    /// A size that cannot be is refused: the register reads 0, and the queue cannot be enabled.
    pub fn set_size(&mut self, size: u16) {
        let good = size.is_power_of_two() && size <= self.max_size;
        self.size = if good { size } else { 0 };
    }

    /// Makes it one of the queues that the device gets at DRIVER_OK. There is no way back but a reset.
    pub fn enable(&mut self) {
        self.enabled = self.size != 0;
    }

    /// Back to the beginning. Every field is named, so that a new one is not forgotten.
    fn reset(&mut self) {
        let Self { max_size, size, enabled, desc, avail, used, vector, interrupt, doorbell } = self;
        (*size, *enabled, *vector, *interrupt) = (*max_size, false, NO_VECTOR, None);
        (*desc, *avail, *used) = (0, 0, 0);
        // A bell that still rings belongs to the old driver.
        let _ = doorbell.read();
    }
}

/// Where a device is between two resets.
enum Service {
    /// No queues.
    Idle,
    /// The device has them.
    Active,
    /// We keep them while the VM is paused.
    Paused(Vec<Option<Queue>>),
    /// The VM has ended: nothing is served any more.
    Ended,
}

/// A device and the registers through which its driver sees it.
pub(super) struct Core {
    device: Box<dyn VirtioDevice>,
    signals: Signals,
    memory: Memory,
    service: Service,
    /// A reset is not over: somebody still writes to memory of the driver's. The status says so until it is.
    settling: bool,
    driver_features: u64,
    /// Which half of the features the next access means; a driver may write anything here.
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// What a write to the status register asks of the transport around us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    None,
    /// The driver has done its part. [`Core::is_active`] says if the device has, too.
    DriverOk,
    /// Everything is as it was at first.
    Reset,
}

impl Core {
    pub fn new(device: Box<dyn VirtioDevice>, memory: Memory, signals: Signals) -> Result<Self> {
        let registers = |max_size: &u16| QueueRegisters::new(*max_size);
        let queues = device.queue_sizes().iter().map(registers).collect::<std::io::Result<_>>();
        let queues =
            queues.map_err(|e| Error::os(format!("creating the doorbells of {}", device.id()), e))?;
        Ok(Self {
            device,
            signals,
            memory,
            service: Service::Idle,
            settling: false,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            queues,
        })
    }

    pub fn signals(&self) -> &Signals {
        &self.signals
    }

    pub fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    /// The half of the offered features that was selected; others read 0.
    pub fn device_features(&self) -> u32 {
        half(self.offered(), self.device_feature_select)
    }

    pub fn driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_feature_select)
    }

    /// Sets the selected half, until the driver has said that it is done.
    pub fn set_driver_features(&mut self, value: u32) {
        if self.signals.status() & FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    pub fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    /// The registers of the selected queue; none when the selector is out of range.
    pub fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The same for writing: only before DRIVER_OK, and before this queue was enabled.
    pub fn queue_mut(&mut self) -> Option<&mut QueueRegisters> {
        self.queue_vector_mut().filter(|q| !q.enabled)
    }

    /// The same for its interrupt, which a driver may choose until DRIVER_OK: NetBSD enables queues first.
    pub fn queue_vector_mut(&mut self) -> Option<&mut QueueRegisters> {
        if self.signals.status() & DRIVER_OK != 0 {
            return None;
        }
        self.queues.get_mut(usize::from(self.queue_select))
    }

    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// Reads the status register: 0 once a reset is over (4.1.4.3.1).
    pub fn status(&mut self) -> u8 {
        if self.settling && self.device.is_at_rest() {
            self.settling = false;
            self.signals.set_status(0);
        }
        self.signals.status()
    }

    /// Writes the status register. Bits are only ever added, save by a reset, until whose end nothing is heard.
    pub fn set_status(&mut self, value: u8) -> Change {
        if value == 0 {
            self.reset();
            return Change::Reset;
        }
        let old = self.status();
        if self.settling {
            return Change::None;
        }
        let mut status = (old | value) & DRIVER_BITS;
        if status & !old & FEATURES_OK != 0 && !self.features_are_good() {
            status &= !FEATURES_OK;
        }
        if status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        self.signals.set_status(status);
        if status & !old & DRIVER_OK == 0 {
            return Change::None;
        }
        self.activate();
        Change::DriverOk
    }

    fn offered(&self) -> u64 {
        self.device.features() | RING_FEATURES
    }

    fn features_are_good(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        let broken = self.signals.status() & NEEDS_RESET != 0;
        if broken || !matches!(self.service, Service::Idle) {
            return;
        }
        match self.build_queues() {
            Ok(queues) => self.serve(queues),
            Err(why) => self.signals.needs_reset(why),
        }
    }

    fn build_queues(&self) -> std::result::Result<Vec<Option<Queue>>, String> {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let build = |(index, q): (usize, &QueueRegisters)| {
            if !q.enabled {
                return Ok(None);
            }
            let doorbell = q.doorbell.try_clone().map_err(|e| format!("queue {index}: {e}"))?;
            let setup = QueueSetup {
                max_size: q.max_size,
                size: q.size,
                desc: q.desc,
                avail: q.avail,
                used: q.used,
                event_idx,
                next_avail: 0,
                next_used: 0,
                doorbell,
                interrupt: q.interrupt.clone(),
            };
            Queue::new(setup, &self.memory).map(Some).map_err(|fault| format!("queue {index}: {fault}"))
        };
        self.queues.iter().enumerate().map(build).collect()
    }

    fn serve(&mut self, queues: Vec<Option<Queue>>) {
        let activation = Activation {
            features: self.driver_features,
            memory: self.memory.clone(),
            queues,
            signals: self.signals.clone(),
        };
        match self.device.activate(activation) {
            Ok(()) => self.service = Service::Active,
            Err(error) => {
                self.service = Service::Idle;
                self.signals.needs_reset(error);
            }
        }
    }

    /// Back to the beginning. Every field is named, so that a new one is not forgotten.
    fn reset(&mut self) {
        let Self {
            device,
            signals,
            memory: _,
            service,
            settling,
            driver_features,
            device_feature_select,
            driver_feature_select,
            queue_select,
            queues,
        } = self;
        if !matches!(service, Service::Ended) {
            drop(device.deactivate());
            device.reset();
            *service = Service::Idle;
        }
        signals.set_config_interrupt(None);
        *settling = !device.is_at_rest();
        signals.set_status(if *settling { NEEDS_RESET } else { 0 });
        *driver_features = 0;
        (*device_feature_select, *driver_feature_select, *queue_select) = (0, 0, 0);
        queues.iter_mut().for_each(QueueRegisters::reset);
    }

    /// Whether the driver has handed its queues over, paused or not.
    pub fn is_active(&self) -> bool {
        matches!(self.service, Service::Active | Service::Paused(_))
    }

    pub fn device_id(&self) -> &str {
        self.device.id()
    }

    /// Takes the queues back from the device until [`Core::resume`].
    ///
    /// # Errors
    /// `TimedOut` where a request has not ended by the deadline: the device goes on serving.
    pub fn pause(&mut self, deadline: Instant) -> Result<()> {
        while self.settling && self.status() != 0 {
            if Instant::now() >= deadline {
                return Err(self.late());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if matches!(self.service, Service::Active) {
            if !self.device.drain(deadline) {
                return Err(self.late());
            }
            self.service = Service::Paused(self.device.deactivate());
        }
        Ok(())
    }

    fn late(&self) -> Error {
        let why = format!("{}: {}", self.device.id(), self.device.awaited());
        Error::new(ErrorKind::TimedOut, why)
    }

    /// Gives them to the device again. Of a device that is not paused: nothing.
    pub fn resume(&mut self) {
        match std::mem::replace(&mut self.service, Service::Idle) {
            // What broke before the pause stays broken until the driver resets it.
            Service::Paused(_) if self.signals.status() & NEEDS_RESET != 0 => {}
            Service::Paused(queues) => self.serve(queues),
            other => self.service = other,
        }
    }

    /// Has the device take what was put ready for it, between two requests.
    ///
    /// # Errors
    /// As [`Core::pause`].
    pub fn refit(&mut self, deadline: Instant) -> Result<()> {
        let serves = matches!(self.service, Service::Active);
        self.pause(deadline)?;
        self.device.refit();
        if serves {
            self.resume();
        }
        Ok(())
    }

    /// Serves nothing from now on, whatever the driver does. Waits for the request in progress.
    pub fn end(&mut self) {
        drop(self.device.deactivate());
        self.service = Service::Ended;
    }
}

/// 32 of 64 feature bits; beyond them there are none.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
