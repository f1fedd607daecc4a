#![forbid(unsafe_code)]
//! virtio over PCI (virtio 1.2, 4.1), modern devices only: one BAR with everything in it, MSI-X, and a
//! doorbell in the kernel for each queue.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::Doorbells;
use super::core::{Change, Core, NO_VECTOR};
use crate::error::{Error, ErrorKind, Result};
use crate::irq::Routes;
use crate::memory::Memory;
use crate::pci::{ConfigSpace, Function, Msix};
use crate::sys::log;
use crate::sys::{fd, lock};
use crate::virtio::{Signals, VirtioDevice};

mod common;
mod parts;

pub(crate) use parts::BAR_SIZE;

/// A virtio device as a PCI function.
///
/// vCPUs reach it under one lock, which a reset holds until the device has finished its request in
/// progress. The hot path is not among them: doorbells and interrupts pass through the kernel.
pub(crate) struct VirtioPci(Mutex<State>);

struct State {
    core: Core,
    config: ConfigSpace,
    msix: Msix,
    /// The MSI-X entry for configuration changes.
    config_vector: u16,
    doorbells: Doorbells,
    armed: Option<Armed>,
    window: parts::Window,
}

/// Which doorbells are armed, and for a BAR at which base.
struct Armed {
    base: u64,
    queues: Vec<u16>,
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
        let queues = device.queue_sizes().len();
        if queues > parts::MAX_QUEUES {
            let why = format!("{}: {queues} queues, where {} fit", device.id(), parts::MAX_QUEUES);
            return Err(Error::new(ErrorKind::InvalidArgument, why));
        }
        let queues = queues as u16;
        let mut config = ConfigSpace::new(parts::identity(device.device_type()));
        config.set_bar(bar);
        let window = parts::add_capabilities(&mut config, queues)?;
        let (table, pending) = (parts::MSIX_TABLE as u32, parts::MSIX_PENDING as u32);
        let msix = Msix::new(routes, &mut config, queues + 1, table, pending)?;
        let core = Core::new(device, memory.clone(), signals)?;
        let config_vector = NO_VECTOR;
        let state = State { core, config, msix, config_vector, doorbells, armed: None, window };
        Ok(Arc::new(Self(Mutex::new(state))))
    }

    /// The device's own.
    pub fn id(&self) -> String {
        lock(&self.0).core.device_id().to_owned()
    }

    /// Stops the device until [`VirtioPci::resume`]. Waits for its request in progress. Of a device that
    /// is not active: nothing.
    ///
    /// Doorbells that ring meanwhile are heard afterwards. The caller has parked the vCPUs.
    ///
    /// # Errors
    /// `TimedOut` where a request has not ended by the deadline: the device goes on serving.
    pub fn pause(&self, deadline: Instant) -> Result<()> {
        lock(&self.0).core.pause(deadline)
    }

    /// Lets a paused device go on where it stopped.
    pub fn resume(&self) {
        lock(&self.0).core.resume();
    }

    /// Has the device take what was put ready for it. Waits for its request in progress; vCPUs may run, and doorbells that ring
    /// meanwhile are heard afterwards.
    ///
    /// # Errors
    /// As [`VirtioPci::pause`].
    pub fn refit(&self, deadline: Instant) -> Result<()> {
        lock(&self.0).core.refit(deadline)
    }

    /// Stops the device for good. Waits for its request in progress.
    pub fn end(&self) {
        let mut state = lock(&self.0);
        state.core.end();
        state.disarm();
    }

    /// The vector of MSI-X entry `index`.
    #[cfg(any(test, feature = "internals"))]
    pub fn vector(&self, index: u16) -> Option<Arc<crate::irq::Vector>> {
        lock(&self.0).msix.vector(index)
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.end();
    }
}

impl Function for VirtioPci {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut state = lock(&self.0);
        match state.window.target(&state.config, offset, data.len()) {
            Some(at) => state.read(at, data),
            None => state.config.read(offset, data),
        }
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let mut state = lock(&self.0);
        if let Some(at) = state.window.target(&state.config, offset, data.len()) {
            return state.write(at, data);
        }
        state.config.write(offset, data);
        let State { msix, config, .. } = &mut *state;
        msix.config_written(config);
        // A BAR that moves takes its doorbells along.
        state.settle_doorbells();
    }

    fn bar(&self) -> Option<Range<u64>> {
        lock(&self.0).config.bar()
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        lock(&self.0).read(offset, data);
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        lock(&self.0).write(offset, data);
    }
}

impl State {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let (page, within) = (offset & !(parts::PAGE - 1), offset % parts::PAGE);
        match page {
            parts::COMMON => common::read(&mut self.core, self.config_vector, within, data),
            parts::ISR => {
                data.fill(0);
                if let (0, Some(first)) = (within, data.first_mut()) {
                    *first = self.core.signals().take_isr();
                }
            }
            parts::DEVICE => {
                data.fill(0);
                self.core.device().read_config(within, data);
            }
            parts::NOTIFY => data.fill(0),
            parts::MSIX_TABLE => self.msix.read_table(within, data),
            parts::MSIX_PENDING => self.msix.read_pending(within, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (page, within) = (offset & !(parts::PAGE - 1), offset % parts::PAGE);
        match page {
            parts::COMMON => {
                let Self { core, msix, config_vector, .. } = self;
                match common::write(core, msix, config_vector, within, data) {
                    Change::None => {}
                    Change::DriverOk => self.settle_doorbells(),
                    Change::Reset => self.reset(),
                }
            }
            parts::DEVICE => self.core.write_config(within, data),
            parts::NOTIFY => self.notify(parts::notified_queue(within)),
            parts::MSIX_TABLE => self.msix.write_table(within, data),
            _ => {}
        }
    }

    /// The address says which queue is meant; the value repeats it. No queue there: ignored.
    fn notify(&self, queue: usize) {
        if let Some(queue) = self.core.queues().get(queue).filter(|q| q.enabled) {
            // Full only when it rings already.
            fd::ring(&queue.doorbell);
        }
    }

    /// The core was reset: so is what is ours. Every field is named, so that a new one is not forgotten.
    fn reset(&mut self) {
        let Self { core: _, config: _, msix, config_vector, doorbells: _, armed: _, window: _ } = self;
        *config_vector = NO_VECTOR;
        // What the old driver was owed is nobody's business now.
        msix.forget_pending();
        self.disarm();
    }

    /// Brings the kernel's doorbells to where the BAR is now.
    fn settle_doorbells(&mut self) {
        let wanted = self.config.bar().filter(|_| self.core.is_active()).map(|bar| bar.start);
        if self.armed.as_ref().map(|a| a.base) == wanted {
            return;
        }
        self.disarm();
        let Some(base) = wanted else { return };
        let mut armed = Armed { base, queues: Vec::new() };
        for (index, registers) in self.core.queues().iter().enumerate().filter(|(_, q)| q.enabled) {
            let queue = index as u16;
            match self.doorbells.arm(&registers.doorbell, parts::notify_address(base, queue), queue) {
                Ok(()) => armed.queues.push(queue),
                // The write then comes as an ordinary access, and rings all the same.
                Err(error) => log::debug!("{}: {error}", self.core.device().id()),
            }
        }
        self.armed = Some(armed);
    }

    fn disarm(&mut self) {
        let Some(Armed { base, queues }) = self.armed.take() else { return };
        for queue in queues {
            if let Some(registers) = self.core.queues().get(usize::from(queue)) {
                self.doorbells.disarm(&registers.doorbell, parts::notify_address(base, queue), queue);
            }
        }
    }
}

#[cfg(test)]
mod tests;
