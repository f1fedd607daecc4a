#![forbid(unsafe_code)]
//! virtio-net (5.1): a network card with one pair of queues.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vmm_sys_util::timerfd::TimerFd;

use super::{Activation, Queue, VirtioDevice, read_config_space};
use crate::error::{Error, ErrorKind, Result};
use crate::net::NetBackend;
use crate::reactor::{Attached, Place};
use rx::{Overflow, Rx};
use tx::Tx;
use worker::{Timers, Worker};

mod control;
mod header;
mod rx;
mod statistics;
mod tx;
mod worker;

pub(crate) use control::Control;
pub use statistics::NetStatistics;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;

const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A card of a guest.
pub(crate) struct Net {
    control: Arc<Control>,
    features: u64,
    place: Place,
    state: State,
}

enum State {
    Idle(Box<dyn NetBackend>, Overflow),
    Active(Attached<Worker>),
    /// Its backend went down with the loop that it was on.
    Lost,
}

impl Net {
    /// The card on `backend`.
    pub fn new(control: Arc<Control>, backend: Box<dyn NetBackend>, place: Place) -> Self {
        let features = FEATURES | control.features() | header::offered(backend.offloads());
        Self { control, features, place, state: State::Idle(backend, Overflow::default()) }
    }

    /// One with nothing special.
    #[cfg(any(test, feature = "internals"))]
    pub fn simple(
        id: &str,
        mac: crate::config::MacAddress,
        backend: Box<dyn NetBackend>,
        place: Place,
    ) -> Self {
        let config = crate::config::NetConfig::attached();
        Self::new(Arc::new(Control::new(id, mac, &config, None)), backend, place)
    }

    /// Serves both queues on the caller's thread: for drivers in this process ([`Place::Caller`]).
    #[cfg(any(test, feature = "internals"))]
    pub fn process_queues(&self) {
        if let State::Active(worker) = &self.state {
            worker.with(Worker::process_queues);
        }
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> &str {
        self.control.id()
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.control.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let refused =
            |why: &str| Error::new(ErrorKind::InvalidState, format!("{}: {why}", self.control.id()));
        let Activation { features, memory, queues, signals } = activation;
        let mut queues = queues.into_iter();
        let (Some(Some(rx)), Some(Some(tx))) = (queues.next(), queues.next()) else {
            return Err(refused("the driver has not enabled both queues"));
        };
        let timer = || {
            let id = self.control.id();
            TimerFd::new().map_err(|e| Error::errno_of(format!("{id}: creating a timer (timerfd)"), e))
        };
        let timers = Timers { retry: timer()?, limit: timer()? };
        let (mut backend, overflow) = match std::mem::replace(&mut self.state, State::Lost) {
            State::Idle(backend, overflow) => (backend, overflow),
            other => {
                self.state = other;
                return Err(refused("is active already, or its event loop has ended"));
            }
        };
        let mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let (may, takes) = header::accepted(features & self.features);
        backend.set_offloads(takes);
        let rx = Rx::new(rx, mergeable, takes, overflow, self.control.clone());
        let tx = Tx::new(tx, may, self.control.clone());
        let worker = Worker::new(rx, tx, memory, signals, backend, timers);
        self.state = State::Active(self.place.attach(worker, self.control.id())?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Active(worker) => match worker.detach() {
                Ok(worker) => {
                    let (queues, backend, overflow) = worker.finish();
                    self.state = State::Idle(backend, overflow);
                    queues
                }
                Err(error) => {
                    log::warn!("{}: {error}", self.control.id());
                    vec![None, None]
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
