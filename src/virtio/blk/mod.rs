#![forbid(unsafe_code)]
//! virtio-blk (5.2): a disk.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{Activation, Queue, VirtioDevice, read_config_space};
use crate::block::Backend;
#[cfg(any(test, feature = "internals"))]
use crate::config::DiskConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::reactor::{Attached, Place};
use crate::sys::log;
use crate::units::Sectors;
use request::{ID_LEN, MAX_DISCARD, MAX_ZEROES, SEG_MAX, SIZE_MAX};
use worker::{Job, Worker};

mod control;
mod request;
mod statistics;
mod worker;

pub(crate) use control::Control;
pub use statistics::DiskStatistics;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;

/// `struct virtio_blk_config` up to `write_zeroes_may_unmap` and its padding (5.2.4).
const CONFIG_LEN: usize = 60;
/// Where the driver chooses between writeback and writethrough.
const WRITEBACK: u64 = 32;
/// What hosts' file systems and disks like best: 2^3 sectors.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// A disk of a guest.
pub(crate) struct Blk {
    serial: [u8; ID_LEN],
    features: u64,
    control: Arc<Control>,
    /// One for each queue.
    sizes: Vec<u16>,
    lanes: Vec<Lane>,
}

/// One queue's place and backend.
struct Lane {
    place: Place,
    state: State,
}

enum State {
    Idle(Box<dyn Backend>),
    Active(Attached<Worker>),
    /// Its backend went down with the loop that it was on.
    Lost,
}

impl Lane {
    /// Its worker, which runs no more.
    fn take(&mut self, id: &str) -> Option<Worker> {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Active(worker) => worker.detach().inspect_err(|error| log::warn!("{id}: {error}")).ok(),
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Begins to end it; the closure waits for its queue. `last` is of all the disk's lanes.
    fn end<'a>(
        &'a mut self,
        id: &'a str,
        worker: Worker,
        last: Arc<OnceLock<Instant>>,
    ) -> impl FnOnce() -> Option<Queue> + 'a {
        let (place, state) = (&self.place, &mut self.state);
        let ending = place.ending();
        let finished = place.meanwhile(move || worker.finish(ending, &last));
        move || {
            let (queue, backend) = finished().inspect_err(|error| place.fault(id, error)).ok()?;
            *state = State::Idle(backend);
            Some(queue)
        }
    }
}

impl Blk {
    /// The disk on `lanes`: a backend and a place for each queue, all of the same disk. `serial` is cut at 20 bytes.
    pub fn new(control: Arc<Control>, serial: &str, lanes: Vec<(Box<dyn Backend>, Place)>) -> Self {
        let mut features = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        if control.readonly() {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        if control.discards() {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        if lanes.len() > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        let mut padded = [0; ID_LEN];
        let len = serial.len().min(ID_LEN);
        padded[..len].copy_from_slice(&serial.as_bytes()[..len]);
        let sizes = vec![QUEUE_SIZE; lanes.len()];
        let lanes =
            lanes.into_iter().map(|(backend, place)| Lane { place, state: State::Idle(backend) }).collect();
        Self { serial: padded, features, control, sizes, lanes }
    }

    /// One with a single queue and nothing special.
    #[cfg(any(test, feature = "internals"))]
    pub fn simple(id: &str, serial: &str, backend: Box<dyn Backend>, place: Place) -> Self {
        let control = Arc::new(Control::new(id, &DiskConfig::default(), &*backend, 1, None));
        Self::new(control, serial, vec![(backend, place)])
    }

    /// Serves the queues on the caller's thread: for drivers in this process ([`Place::Caller`]).
    #[cfg(any(test, feature = "internals"))]
    pub fn process_queue(&self) {
        for lane in &self.lanes {
            if let State::Active(worker) = &lane.state {
                worker.with(Worker::process_queue);
            }
        }
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.control.size() / Sectors::SIZE).to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(Sectors::SIZE as u32).to_le_bytes());
        put(24, &[PHYSICAL_BLOCK_EXP, 0]);
        put(26, &(1u16 << PHYSICAL_BLOCK_EXP).to_le_bytes());
        put(WRITEBACK as usize, &[self.control.writeback().into()]);
        if self.lanes.len() > 1 {
            put(34, &(self.lanes.len() as u16).to_le_bytes());
        }
        if self.control.discards() {
            put(36, &MAX_DISCARD.to_le_bytes());
            put(40, &1u32.to_le_bytes());
            put(44, &(1u32 << PHYSICAL_BLOCK_EXP).to_le_bytes());
            put(48, &MAX_ZEROES.to_le_bytes());
            put(52, &1u32.to_le_bytes());
            put(56, &[1]);
        }
        config
    }

    /// Every lane's worker goes back, and its queue. What is in flight is waited for, and ended, on the lane's own thread: whoever
    /// stops a disk, as a vCPU does whose driver resets it, makes no call for it.
    fn stop(&mut self) -> Vec<Option<Queue>> {
        let (id, last) = (self.control.id(), Arc::<OnceLock<_>>::default());
        // All stop before any is waited for.
        let taken: Vec<_> = self.lanes.iter_mut().map(|lane| lane.take(id)).collect();
        let end = |(lane, worker): (_, Option<Worker>)| Some(Lane::end(lane, id, worker?, last.clone()));
        let ended: Vec<_> = self.lanes.iter_mut().zip(taken).map(end).collect();
        ended.into_iter().map(|wait| wait?()).collect()
    }

    fn begin(&mut self, index: usize, queue: Queue, features: u64, parts: &Activation) -> Result<()> {
        let refused =
            |why: &str| Error::new(ErrorKind::InvalidState, format!("{}: {why}", self.control.id()));
        let Some(lane) = self.lanes.get_mut(index) else { return Err(refused("it has no such queue")) };
        let backend = match std::mem::replace(&mut lane.state, State::Lost) {
            State::Idle(backend) => backend,
            other => {
                lane.state = other;
                return Err(refused("is active already, or its event loop has ended"));
            }
        };
        let job = Job {
            queue,
            index,
            memory: parts.memory.clone(),
            signals: parts.signals.clone(),
            backend,
            serial: self.serial,
            features,
            control: self.control.clone(),
        };
        match Worker::new(job) {
            Ok(worker) => lane.state = State::Active(lane.place.attach(worker, self.control.id())?),
            Err((error, backend)) => {
                lane.state = State::Idle(backend);
                return Err(Error::os(format!("{}: creating a timer", self.control.id()), error));
            }
        }
        Ok(())
    }
}

impl VirtioDevice for Blk {
    fn id(&self) -> &str {
        self.control.id()
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK, [value]) = (offset, data) {
            self.control.set_writeback(*value != 0);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<()> {
        let queues = std::mem::take(&mut activation.queues);
        if queues.iter().all(Option::is_none) {
            let why = format!("{}: the driver has not enabled a queue", self.control.id());
            return Err(Error::new(ErrorKind::InvalidState, why));
        }
        let features = activation.features;
        let enabled = queues.into_iter().enumerate().filter_map(|(i, queue)| Some((i, queue?)));
        let begun =
            enabled.map(|(i, queue)| self.begin(i, queue, features, &activation)).find(Result::is_err);
        begun.unwrap_or(Ok(())).inspect_err(|_| drop(self.stop()))
    }

    fn drain(&mut self, deadline: Instant) -> bool {
        let workers = || {
            self.lanes.iter().filter_map(|lane| match &lane.state {
                State::Active(worker) => Some(worker),
                _ => None,
            })
        };
        let drained = workers().all(|worker| worker.with(|worker| worker.drain(deadline)));
        if !drained {
            workers().for_each(|worker| worker.with(Worker::go_on));
        }
        drained
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        self.stop()
    }

    fn reset(&mut self) {
        self.control.reset();
    }
}

#[cfg(test)]
mod tests;
