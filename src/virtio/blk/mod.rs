#![forbid(unsafe_code)]
//! virtio-blk (5.2): a disk.

use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{Activation, Queue, VirtioDevice, read_config_space};
use crate::block::Backend;
use crate::error::{Error, ErrorKind, Result};
use crate::reactor::{Attached, Place};
use crate::units::Sectors;
use request::{ID_LEN, SEG_MAX, SIZE_MAX};
use worker::Worker;

mod request;
mod statistics;
mod worker;

pub(crate) use statistics::Counters;
pub use statistics::DiskStatistics;

/// Entries of the one queue.
const QUEUE_SIZE: u16 = 256;

/// `struct virtio_blk_config` up to `blk_size` (5.2.4).
const CONFIG_LEN: usize = 24;

/// A disk of a guest.
pub(crate) struct Blk {
    id: String,
    serial: [u8; ID_LEN],
    features: u64,
    config: [u8; CONFIG_LEN],
    place: Place,
    state: State,
    counters: Arc<Counters>,
}

enum State {
    Idle(Box<dyn Backend>),
    Active(Attached<Worker>),
    /// Its backend went down with the loop that it was on.
    Lost,
}

impl Blk {
    /// The disk `id` on `backend`. `serial` is cut at 20 bytes.
    pub fn new(id: &str, serial: &str, backend: Box<dyn Backend>, place: Place) -> Self {
        let mut features =
            1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        features |= 1 << VIRTIO_BLK_F_FLUSH;
        if backend.readonly() {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        let mut config = [0; CONFIG_LEN];
        config[..8].copy_from_slice(&(backend.size() / Sectors::SIZE).to_le_bytes());
        config[8..12].copy_from_slice(&SIZE_MAX.to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&(Sectors::SIZE as u32).to_le_bytes());
        let mut padded = [0; ID_LEN];
        let len = serial.len().min(ID_LEN);
        padded[..len].copy_from_slice(&serial.as_bytes()[..len]);
        let (state, counters) = (State::Idle(backend), Arc::default());
        Self { id: id.into(), serial: padded, features, config, place, state, counters }
    }

    /// What it counts, whoever owns it by then.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Serves the queue on the caller's thread: for drivers in this process ([`Place::Caller`]).
    #[cfg(any(test, feature = "internals"))]
    pub fn process_queue(&self) {
        if let State::Active(worker) = &self.state {
            worker.with(Worker::process_queue);
        }
    }
}

impl VirtioDevice for Blk {
    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let refused = |why: &str| Error::new(ErrorKind::InvalidState, format!("{}: {why}", self.id));
        let Activation { features, memory, mut queues, signals } = activation;
        let Some(queue) = queues.first_mut().and_then(Option::take) else {
            return Err(refused("the driver has not enabled the queue"));
        };
        let backend = match std::mem::replace(&mut self.state, State::Lost) {
            State::Idle(backend) => backend,
            other => {
                self.state = other;
                return Err(refused("is active already, or its event loop has ended"));
            }
        };
        let writethrough = features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        let counters = self.counters.clone();
        let worker = Worker::new(queue, memory, signals, backend, self.serial, writethrough, counters);
        self.state = State::Active(self.place.attach(worker, &self.id)?);
        Ok(())
    }

    fn drain(&mut self, deadline: Instant) -> bool {
        match &self.state {
            State::Active(worker) => worker.with(|worker| worker.drain(deadline)),
            _ => true,
        }
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Active(worker) => match worker.detach() {
                Ok(worker) => {
                    let (queue, backend) = worker.finish(|| self.place.is_ending());
                    self.state = State::Idle(backend);
                    vec![Some(queue)]
                }
                Err(error) => {
                    log::warn!("{}: {error}", self.id);
                    vec![None]
                }
            },
            other => {
                self.state = other;
                Vec::new()
            }
        }
    }
}

#[cfg(test)]
mod tests;
