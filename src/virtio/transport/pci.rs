#![forbid(unsafe_code)]
//! virtio over PCI (virtio 1.2, 4.1), modern devices only: one BAR with everything in it, MSI-X, and a
//! doorbell in the kernel for each queue.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::Doorbells;
use super::core::{Change, Core, QueueRegisters};
use crate::error::Result;
use crate::irq::Routes;
use crate::memory::Memory;
use crate::pci::{ConfigSpace, Function, Identity, Msix};
use crate::sys::lock;
use crate::virtio::{Signals, VirtioDevice};

const VENDOR: u16 = 0x1af4;
/// The device id of type 0 (4.1.2).
const DEVICE_BASE: u16 = 0x1040;
/// Vendor-specific.
const CAP_VENDOR: u8 = 9;
/// `cfg_type` of a virtio capability (4.1.4).
const VIRTIO_PCI_CAP_COMMON_CFG: u8 = 1;
const VIRTIO_PCI_CAP_NOTIFY_CFG: u8 = 2;
const VIRTIO_PCI_CAP_ISR_CFG: u8 = 3;
const VIRTIO_PCI_CAP_DEVICE_CFG: u8 = 4;
const VIRTIO_PCI_CAP_PCI_CFG: u8 = 5;
const NO_VECTOR: u16 = 0xffff;

/// What lies where in the BAR, each part on a page of its own.
mod part {
    pub(super) const COMMON: u64 = 0x0000;
    pub(super) const ISR: u64 = 0x1000;
    pub(super) const DEVICE: u64 = 0x2000;
    pub(super) const NOTIFY: u64 = 0x3000;
    pub(super) const MSIX_TABLE: u64 = 0x4000;
    pub(super) const MSIX_PENDING: u64 = 0x5000;
    pub(super) const SIZE: u64 = 0x1000;
}

/// The BAR's size.
pub(crate) const BAR_SIZE: u64 = 0x8000;
/// Bytes between the notify addresses of two queues.
const NOTIFY_STRIDE: u64 = 4;

/// Offsets of the common configuration structure (4.1.4.3).
mod common {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const DEVICE_STATUS: u64 = 0x14;
    pub(super) const CONFIG_GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
}

/// A virtio device as a PCI function.
pub(crate) struct VirtioPci {
    doorbells: Doorbells,
    state: Mutex<State>,
}

struct State {
    core: Core,
    config: ConfigSpace,
    msix: Msix,
    config_vector: u16,
    /// The BAR's base for which the doorbells are armed.
    armed: Option<u64>,
    /// Where the capability is through which configuration space reaches the BAR.
    window: usize,
}

impl VirtioPci {
    /// `device` at `bar`, which is [`BAR_SIZE`] long and aligned to that.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        bar: &Range<u64>,
        memory: &Memory,
        signals: Signals,
        routes: &Arc<Routes>,
        doorbells: Doorbells,
    ) -> Result<Arc<Self>> {
        let kind = device.device_type();
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + kind as u16,
            revision: 1,
            class: class(kind),
            subsystem_vendor: VENDOR,
            subsystem: 0x40 + kind as u16,
        });
        config.set_bar(bar);
        let queues = device.queue_sizes().len() as u16;
        let window = add_capabilities(&mut config, u64::from(queues));
        let (table, pending) = (part::MSIX_TABLE as u32, part::MSIX_PENDING as u32);
        let msix = Msix::new(routes, &mut config, queues + 1, table, pending)?;
        let core = Core::new(device, memory.clone(), signals, NO_VECTOR)?;
        let state = State { core, config, msix, config_vector: NO_VECTOR, armed: None, window };
        Ok(Arc::new(Self { doorbells, state: Mutex::new(state) }))
    }

    /// Stops the device until [`VirtioPci::resume`]. Waits for its request in progress.
    pub fn pause(&self) {
        lock(&self.state).core.pause();
    }

    pub fn resume(&self) {
        lock(&self.state).core.resume();
    }

    /// Stops the device for good.
    pub fn end(&self) {
        let mut state = lock(&self.state);
        state.core.end();
        self.disarm(&mut state);
    }

    /// Runs `f` on the device, between two accesses of the driver's.
    #[cfg(test)]
    pub fn with_device<R>(&self, f: impl FnOnce(&dyn VirtioDevice) -> R) -> R {
        f(lock(&self.state).core.device())
    }

    /// Brings the kernel's doorbells to where the BAR is now.
    fn rearm(&self, state: &mut State, active: bool) {
        let wanted = state.config.bar().filter(|_| active).map(|bar| bar.start);
        if state.armed == wanted {
            return;
        }
        self.disarm(state);
        let Some(base) = wanted else { return };
        for (index, queue) in state.core.queues.iter().enumerate() {
            if let Err(error) = self.doorbells.arm(&queue.doorbell, notify_address(base, index)) {
                // The write then comes as an ordinary access, and rings all the same.
                log::warn!("{}: {error}", state.core.device().id());
            }
        }
        state.armed = Some(base);
    }

    fn disarm(&self, state: &mut State) {
        let Some(base) = state.armed.take() else { return };
        for (index, queue) in state.core.queues.iter().enumerate() {
            self.doorbells.disarm(&queue.doorbell, notify_address(base, index));
        }
    }

    fn write_common(&self, state: &mut State, offset: u64, data: &[u8]) {
        // A 64-bit register is written whole or in its two halves.
        if let (common::QUEUE_DESC..=0x30, 8) = (offset, data.len()) {
            self.write_common(state, offset, &data[..4]);
            return self.write_common(state, offset + 4, &data[4..]);
        }
        let value = data.iter().rev().fold(0u32, |v, b| v << 8 | u32::from(*b));
        let core = &mut state.core;
        match (offset, data.len()) {
            (common::DEVICE_FEATURE_SELECT, 4) => core.device_feature_select = value,
            (common::DRIVER_FEATURE_SELECT, 4) => core.driver_feature_select = value,
            (common::DRIVER_FEATURE, 4) => core.set_driver_features(value),
            (common::QUEUE_SELECT, 2) => core.queue_select = value as u16,
            (common::CONFIG_VECTOR, 2) => state.set_config_vector(value as u16),
            (common::DEVICE_STATUS, 1) => match core.set_status(value as u8) {
                Change::None => {}
                Change::Activated => self.rearm(state, true),
                Change::Reset => {
                    state.config_vector = NO_VECTOR;
                    self.disarm(state);
                }
            },
            (_, length) => state.write_queue(offset, length, value),
        }
    }

    fn write_notify(&self, state: &State, offset: u64) {
        // The queue's address says which one it is; the value repeats it. No queue there: ignored.
        let queue = usize::try_from(offset / NOTIFY_STRIDE).ok().and_then(|i| state.core.queues.get(i));
        if let Some(queue) = queue {
            // Full only when it rings already.
            let _ = queue.doorbell.write(1);
        }
    }

    fn read_at(&self, state: &mut State, offset: u64, data: &mut [u8]) {
        let (page, within) = (offset / part::SIZE * part::SIZE, offset % part::SIZE);
        match page {
            part::COMMON => state.read_common(within, data),
            part::ISR if within == 0 && data.len() == 1 => data[0] = state.core.signals().take_isr(),
            part::DEVICE => {
                data.fill(0);
                state.core.device().read_config(within, data);
            }
            part::NOTIFY => data.fill(0),
            part::MSIX_TABLE => state.msix.read_table(within, data),
            part::MSIX_PENDING => state.msix.read_pending(within, data),
            _ => data.fill(0xff),
        }
    }

    fn write_at(&self, state: &mut State, offset: u64, data: &[u8]) {
        let (page, within) = (offset / part::SIZE * part::SIZE, offset % part::SIZE);
        match page {
            part::COMMON => self.write_common(state, within, data),
            part::DEVICE => state.core.write_config(within, data),
            part::NOTIFY => self.write_notify(state, within),
            part::MSIX_TABLE => state.msix.write_table(within, data),
            _ => {}
        }
    }
}

impl Function for VirtioPci {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut state = lock(&self.state);
        if let Some((at, length)) = state.window_access(offset, data.len()) {
            let mut value = [0xff; 4];
            self.read_at(&mut state, at, &mut value[..length]);
            data.copy_from_slice(&value[..length]);
            return;
        }
        state.config.read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let mut state = lock(&self.state);
        if let Some((at, _)) = state.window_access(offset, data.len()) {
            return self.write_at(&mut state, at, data);
        }
        state.config.write(offset, data);
        let State { msix, config, .. } = &mut *state;
        msix.config_written(config);
        // A BAR that moves takes its doorbells along.
        let active = state.armed.is_some() || state.core.is_active();
        self.rearm(&mut state, active);
    }

    fn bar(&self) -> Option<Range<u64>> {
        lock(&self.state).config.bar()
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        self.read_at(&mut lock(&self.state), offset, data);
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        self.write_at(&mut lock(&self.state), offset, data);
    }
}

impl State {
    fn set_config_vector(&mut self, index: u16) {
        let vector = self.msix.vector(index);
        self.config_vector = if vector.is_some() { index } else { NO_VECTOR };
        self.core.signals().set_config_interrupt(vector);
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let core = &self.core;
        let queue = |read: fn(&QueueRegisters) -> u64| core.queue().map_or(0, read);
        let value = match offset {
            common::DEVICE_FEATURE_SELECT => core.device_feature_select.into(),
            common::DEVICE_FEATURE => core.device_features().into(),
            common::DRIVER_FEATURE_SELECT => core.driver_feature_select.into(),
            common::DRIVER_FEATURE => core.driver_features().into(),
            common::CONFIG_VECTOR => self.config_vector.into(),
            common::NUM_QUEUES => core.queues.len() as u64,
            common::DEVICE_STATUS => core.signals().status().into(),
            common::CONFIG_GENERATION => core.signals().config_generation().into(),
            common::QUEUE_SELECT => core.queue_select.into(),
            common::QUEUE_SIZE => queue(|q| q.size.into()),
            common::QUEUE_VECTOR => core.queue().map_or(NO_VECTOR, |q| q.vector).into(),
            common::QUEUE_ENABLE => queue(|q| q.enabled.into()),
            common::QUEUE_NOTIFY_OFF => core.queue().map_or(0, |_| core.queue_select.into()),
            common::QUEUE_DESC => queue(|q| q.desc),
            0x24 => queue(|q| q.desc >> 32),
            common::QUEUE_DRIVER => queue(|q| q.avail),
            0x2c => queue(|q| q.avail >> 32),
            common::QUEUE_DEVICE => queue(|q| q.used),
            0x34 => queue(|q| q.used >> 32),
            _ => return,
        };
        // A driver reads registers in their own width; a wider access reads zeroes behind it.
        let bytes = value.to_le_bytes();
        let length = data.len().min(8);
        data[..length].copy_from_slice(&bytes[..length]);
    }

    fn write_queue(&mut self, offset: u64, length: usize, value: u32) {
        let vector = (offset == common::QUEUE_VECTOR).then(|| self.msix.vector(value as u16));
        let Some(queue) = self.core.queue_mut() else { return };
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match (offset, length) {
            (common::QUEUE_SIZE, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max_size {
                    queue.size = size;
                } else {
                    // Refused: such a queue cannot be enabled until a good size comes.
                    queue.size = 0;
                }
            }
            (common::QUEUE_VECTOR, 2) => {
                queue.interrupt = vector.flatten();
                queue.vector = if queue.interrupt.is_some() { value as u16 } else { NO_VECTOR };
            }
            (common::QUEUE_ENABLE, 2) => queue.enabled = value == 1 && queue.size != 0,
            (common::QUEUE_DESC, 4) => queue.desc = low(queue.desc),
            (0x24, 4) => queue.desc = high(queue.desc),
            (common::QUEUE_DRIVER, 4) => queue.avail = low(queue.avail),
            (0x2c, 4) => queue.avail = high(queue.avail),
            (common::QUEUE_DEVICE, 4) => queue.used = low(queue.used),
            (0x34, 4) => queue.used = high(queue.used),
            _ => {}
        }
    }

    /// Whether a configuration access is one through `VIRTIO_PCI_CAP_PCI_CFG` (4.1.4.9): then where in
    /// the BAR it goes, and how long it is.
    fn window_access(&self, offset: usize, length: usize) -> Option<(u64, usize)> {
        const DATA: usize = 16;
        if offset != self.window + DATA || self.window == 0 {
            return None;
        }
        let mut cap = [0; DATA];
        self.config.read(self.window, &mut cap);
        let word = |at: usize| u32::from_le_bytes([cap[at], cap[at + 1], cap[at + 2], cap[at + 3]]);
        let (bar, at, wanted) = (cap[4], u64::from(word(8)), word(12) as usize);
        let good =
            bar == 0 && matches!(wanted, 1 | 2 | 4) && wanted == length && at.is_multiple_of(wanted as u64);
        (good && at + wanted as u64 <= BAR_SIZE).then_some((at, wanted))
    }
}

fn notify_address(base: u64, queue: usize) -> u64 {
    base + part::NOTIFY + queue as u64 * NOTIFY_STRIDE
}

/// Adds the five virtio capabilities (4.1.4). Returns where the window's is.
fn add_capabilities(config: &mut ConfigSpace, queues: u64) -> usize {
    let mut add = |kind: u8, offset: u64, length: u64, more: &[u8], writable: &[u8]| {
        // Length of the capability, type, BAR 0, id, padding, offset and length of the part.
        let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((length as u32).to_le_bytes());
        body.extend(more);
        config.add_capability(CAP_VENDOR, &body, writable).unwrap_or(0)
    };
    add(VIRTIO_PCI_CAP_COMMON_CFG, part::COMMON, 0x38, &[], &[]);
    add(VIRTIO_PCI_CAP_ISR_CFG, part::ISR, 1, &[], &[]);
    add(VIRTIO_PCI_CAP_DEVICE_CFG, part::DEVICE, part::SIZE, &[], &[]);
    let stride = (NOTIFY_STRIDE as u32).to_le_bytes();
    add(VIRTIO_PCI_CAP_NOTIFY_CFG, part::NOTIFY, queues * NOTIFY_STRIDE, &stride, &[]);
    // BAR, offset, length and data are the driver's.
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    add(VIRTIO_PCI_CAP_PCI_CFG, 0, 0, &[0; 4], &writable)
}

/// Class, subclass and interface, by which an operating system names the device.
fn class(kind: u32) -> [u8; 3] {
    match kind {
        1 => [0x02, 0x00, 0x00],
        2 => [0x01, 0x80, 0x00],
        3 => [0x07, 0x80, 0x00],
        _ => [0xff, 0x00, 0x00],
    }
}
