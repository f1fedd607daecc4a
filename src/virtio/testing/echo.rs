#![forbid(unsafe_code)]
//! The least device there is: it answers each request with its own bytes.

use std::sync::{Arc, Mutex};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock;
use crate::virtio::queue::{Chain, Next, Queue};
use crate::virtio::{Activation, VirtioDevice, read_config_space};

pub(crate) const QUEUE_SIZES: [u16; 2] = [16, 8];
/// A feature that it offers and ignores.
pub(crate) const FEATURE: u64 = 1 << 7;

/// A device with two queues. Clones are the same one: a test keeps one to drive it with.
#[derive(Clone, Default)]
pub(crate) struct Echo(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    active: Option<Activation>,
    config: [u8; 4],
    /// Fail the next activation.
    refuse: bool,
    /// Somebody writes to the driver's memory.
    written: bool,
    activations: u32,
}

impl Echo {
    pub fn boxed(&self) -> Box<dyn VirtioDevice> {
        Box::new(self.clone())
    }

    pub fn refuse_once(&self) {
        lock(&self.0).refuse = true;
    }

    /// Whether somebody writes to the driver's memory, also after a reset.
    pub fn set_written(&self, written: bool) {
        lock(&self.0).written = written;
    }

    pub fn activations(&self) -> u32 {
        lock(&self.0).activations
    }

    /// The features that the driver accepted, while it is active.
    pub fn features(&self) -> Option<u64> {
        lock(&self.0).active.as_ref().map(|a| a.features)
    }

    /// What the device says without being asked.
    pub fn change_config(&self, config: [u8; 4]) {
        let mut inner = lock(&self.0);
        inner.config = config;
        if let Some(active) = &inner.active {
            active.signals.config_changed();
        }
    }

    /// Serves the queues whose doorbells ring; how many requests.
    pub fn process(&self) -> u32 {
        let mut inner = lock(&self.0);
        let Some(Activation { memory, queues, signals, .. }) = &mut inner.active else { return 0 };
        let mut served = 0;
        for queue in queues.iter_mut().flatten() {
            let rings = crate::sys::fd::is_readable(crate::sys::fd::borrow(queue.doorbell()));
            if !rings {
                continue;
            }
            queue.silence();
            let mut chain = Chain::with_capacity(16);
            let done = queue.drain(memory, &mut chain, |queue, chain| {
                let mut bytes = vec![0; chain.readable_len() as usize];
                let _ = chain.reader(memory).read(&mut bytes);
                let _ = chain.writer(memory).write(&bytes);
                served += 1;
                queue.complete(memory, chain.head, bytes.len() as u32).map(|()| Next::More)
            });
            queue.notify(memory);
            if let Err(fault) = done {
                signals.needs_reset(fault);
            }
        }
        served
    }
}

impl VirtioDevice for Echo {
    fn id(&self) -> &str {
        "echo0"
    }

    fn device_type(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn is_at_rest(&self) -> bool {
        !lock(&self.0).written
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&lock(&self.0).config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut inner = lock(&self.0);
        for (byte, at) in data.iter().zip(offset as usize..4) {
            inner.config[at] = *byte;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let mut inner = lock(&self.0);
        assert!(inner.active.is_none(), "activated twice");
        if std::mem::take(&mut inner.refuse) {
            return Err(Error::new(ErrorKind::Busy, "echo0: not now"));
        }
        // What waits already is served at the next `process`.
        activation.queues.iter().flatten().for_each(Queue::rearm);
        inner.activations += 1;
        inner.active = Some(activation);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        lock(&self.0).active.take().map_or_else(Vec::new, |active| active.queues)
    }
}
