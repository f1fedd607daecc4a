#![forbid(unsafe_code)]
//! A device that the transport owns and that the board drives all the same.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};
use crate::sys::lock;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::console::ConsolePort;
use crate::virtio::net::{Net, NetStatistics};
use crate::virtio::rng::Rng;
use crate::virtio::{Activation, Queue, VirtioDevice};

/// A device whose place is [`Place::Caller`](crate::reactor::Place::Caller).
pub(super) enum Device {
    Blk(Blk),
    Net(Net),
    Rng(Rng),
    Console(ConsolePort),
    Balloon(Balloon),
}

impl Device {
    fn get(&self) -> &dyn VirtioDevice {
        match self {
            Self::Blk(d) => d,
            Self::Net(d) => d,
            Self::Rng(d) => d,
            Self::Console(d) => d,
            Self::Balloon(d) => d,
        }
    }

    fn get_mut(&mut self) -> &mut dyn VirtioDevice {
        match self {
            Self::Blk(d) => d,
            Self::Net(d) => d,
            Self::Rng(d) => d,
            Self::Console(d) => d,
            Self::Balloon(d) => d,
        }
    }

    fn process(&self) {
        match self {
            Self::Blk(d) => d.process_queue(),
            Self::Net(d) => d.process_queues(),
            Self::Rng(d) => d.process_queue(),
            Self::Console(d) => d.process_queues(),
            Self::Balloon(d) => d.process_queues(),
        }
    }
}

/// The board's half.
pub(super) struct Handle {
    device: Arc<Mutex<Device>>,
    /// The doorbells of the queues that the device has now.
    bells: Arc<Mutex<Vec<EventFd>>>,
}

impl Handle {
    pub fn new(id: &str, device: Device) -> (Self, Served) {
        let sizes = device.get().queue_sizes().to_vec();
        let (device, bells) = (Arc::new(Mutex::new(device)), Arc::default());
        let served = Served { id: id.into(), sizes, device: device.clone(), bells: Arc::clone(&bells) };
        (Self { device, bells }, served)
    }

    /// Hears the doorbells, and serves the queues if one rang.
    pub fn process(&self) -> bool {
        let rang = lock(&self.bells).iter().filter(|b| b.read().is_ok()).count() > 0;
        if rang {
            self.run();
        }
        rang
    }

    pub fn run(&self) {
        lock(&self.device).process();
    }

    /// What a card has carried.
    pub fn carried(&self) -> Option<NetStatistics> {
        match &*lock(&self.device) {
            Device::Net(card) => Some(card.carried()),
            _ => None,
        }
    }
}

/// The transport's half.
pub(super) struct Served {
    id: String,
    sizes: Vec<u16>,
    device: Arc<Mutex<Device>>,
    bells: Arc<Mutex<Vec<EventFd>>>,
}

impl VirtioDevice for Served {
    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> u32 {
        lock(&self.device).get().device_type()
    }

    fn features(&self) -> u64 {
        lock(&self.device).get().features()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        lock(&self.device).get().read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        lock(&self.device).get_mut().write_config(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let queues = activation.queues.iter().flatten();
        // What waits already may have been announced before: the loops do the same.
        queues.clone().for_each(Queue::rearm);
        let bells = queues.map(|q| q.doorbell().try_clone()).collect::<std::io::Result<_>>();
        let bells = bells.map_err(|e| Error::os(format!("{}: copying a doorbell", self.id), e))?;
        lock(&self.device).get_mut().activate(activation)?;
        *lock(&self.bells) = bells;
        Ok(())
    }

    fn drain(&mut self, deadline: Instant) -> bool {
        lock(&self.device).get_mut().drain(deadline)
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        lock(&self.bells).clear();
        lock(&self.device).get_mut().deactivate()
    }

    fn reset(&mut self) {
        lock(&self.device).get_mut().reset();
    }
}
