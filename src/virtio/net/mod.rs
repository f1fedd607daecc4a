#![forbid(unsafe_code)]
//! virtio-net (5.1): a network card.

use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vmm_sys_util::timerfd::TimerFd;

use super::server::Server;
use super::{Activation, Queue, Signals, VirtioDevice, read_config_space};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Memory;
use crate::net::{NetBackend, Offloads};
use crate::reactor::{Attached, Place};
use crate::sys::log;
use commands::Commander;
use rx::{Overflow, Rx};
use tx::Tx;
use worker::{Parts, Timers, Worker};

mod commands;
mod control;
mod filter;
mod header;
mod rx;
mod statistics;
mod tx;
mod vhost;
mod worker;

pub(crate) use control::Control;
pub use statistics::NetStatistics;
pub(crate) use vhost::Vhost;

/// Between two looks at a frame that is being copied.
const MOMENT: Duration = Duration::from_millis(1);

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;

const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
    | 1 << VIRTIO_NET_F_CTRL_VLAN
    | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;

/// Entries of the control queue: a command at a time is the rule.
const CONTROL_SIZE: u16 = 64;

/// A card of a guest.
pub(crate) struct Net {
    control: Arc<Control>,
    features: u64,
    sizes: Vec<u16>,
    pairs: Vec<Pair>,
    /// Where commands are served.
    place: Place,
    commands: Option<Attached<Server<Commander>>>,
    /// Where the control queue is: behind the pairs that this driver knows of.
    commands_at: usize,
}

/// A receive and a transmit queue.
struct Pair {
    place: Place,
    state: State,
}

enum State {
    Idle(Parts, Overflow),
    Active(Attached<Worker>),
    /// Its backend went down with the loop that it was on.
    Lost,
}

impl Pair {
    fn worker(&self) -> Option<&Attached<Worker>> {
        match &self.state {
            State::Active(worker) => Some(worker),
            State::Idle(..) | State::Lost => None,
        }
    }
}

impl Net {
    /// The card on `lanes`: for each pair of queues a way to the network and a place. Commands are served where the first is.
    pub fn new(control: Arc<Control>, lanes: Vec<(Box<dyn NetBackend>, Place)>) -> Self {
        let known = lanes.iter().map(|(backend, _)| backend.offloads()).reduce(|all, one| all & one);
        // All else wants checksums (5.1.3.1).
        let known = known.filter(|known| known.contains(Offloads::CSUM)).unwrap_or_default();
        control.offer(known);
        let mut features = FEATURES | control.features() | header::offered(known);
        if lanes.len() > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        let mut sizes = vec![QUEUE_SIZE; 2 * lanes.len()];
        sizes.push(CONTROL_SIZE);
        let place = lanes.first().map_or(Place::Caller, |(_, place)| place.clone());
        let pair = |(index, (mut backend, place)): (usize, (Box<dyn NetBackend>, Place))| {
            backend.set_active(index == 0);
            Pair { place, state: State::Idle(Parts { backend, vhost: None }, Overflow::default()) }
        };
        let pairs = lanes.into_iter().enumerate().map(pair).collect();
        Self { control, features, sizes, pairs, place, commands: None, commands_at: 2 }
    }

    /// The same with the kernel's half of each lane, if it has any.
    pub fn with_kernel(mut self, halves: Vec<Vhost>) -> Self {
        if !halves.is_empty() {
            self.features &= !vhost::UNKNOWN;
        }
        for (pair, half) in self.pairs.iter_mut().zip(halves) {
            if let State::Idle(parts, _) = &mut pair.state {
                parts.vhost = Some(half);
            }
        }
        self
    }

    /// One with nothing special.
    #[cfg(test)]
    pub fn simple(
        id: &str,
        mac: crate::config::MacAddress,
        backend: Box<dyn NetBackend>,
        place: Place,
    ) -> Self {
        let config = crate::config::NetConfig::attached();
        Self::new(Arc::new(Control::new(id, mac, &config, None)), vec![(backend, place)])
    }

    /// Serves all queues on the caller's thread: for drivers in this process ([`Place::Caller`]).
    #[cfg(any(test, feature = "internals"))]
    pub fn process_queues(&self) {
        self.pairs.iter().filter_map(Pair::worker).for_each(|worker| worker.with(Worker::process_queues));
        if let Some(commands) = &self.commands {
            commands.with(Server::process_queue);
        }
    }

    fn refused(&self, why: &str) -> Error {
        Error::new(ErrorKind::InvalidState, format!("{}: {why}", self.control.id()))
    }

    /// Begins to serve a pair, where the driver has both queues of it.
    fn begin_pair(
        &mut self,
        index: usize,
        features: u64,
        (memory, signals): (&Memory, &Signals),
        queues: (Option<Queue>, Option<Queue>),
    ) -> Result<()> {
        let (rx, tx) = match queues {
            (Some(rx), Some(tx)) => (rx, tx),
            (None, None) if index > 0 => return Ok(()),
            _ => return Err(self.refused("the driver has not enabled both queues")),
        };
        let id = self.control.id();
        let timer =
            || TimerFd::new().map_err(|e| Error::errno_of(format!("{id}: creating a timer (timerfd)"), e));
        let timers = Timers { retry: timer()?, limit: timer()? };
        let Some(pair) = self.pairs.get_mut(index) else { return Ok(()) };
        let mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let (may, takes) = header::accepted(features & self.features);
        // Where it is: one that panics stays until the VM goes.
        if let State::Idle(parts, _) = &mut pair.state {
            parts.backend.set_offloads(takes);
            parts.backend.set_active(self.control.uses(index));
        }
        let (mut parts, overflow) = match std::mem::replace(&mut pair.state, State::Lost) {
            State::Idle(parts, overflow) => (parts, overflow),
            other => {
                pair.state = other;
                return Err(self.refused("is active already, or its event loop has ended"));
            }
        };
        if let Some(vhost) = &mut parts.vhost {
            vhost.begin(features, memory);
        }
        let rx = Rx::new(rx, mergeable, takes, overflow, (self.control.clone(), index));
        let tx = Tx::new(tx, may, (self.control.clone(), index));
        let mut worker = Worker::new(rx, tx, memory.clone(), signals.clone(), parts, timers);
        worker.begin(self.control.uses(index));
        pair.state = State::Active(pair.place.attach(worker, self.control.id())?);
        Ok(())
    }

    fn begin(
        &mut self,
        features: u64,
        pairs: usize,
        (memory, signals): (Memory, Signals),
        queues: &mut [Option<Queue>],
    ) -> Result<()> {
        let mut take = |at: usize| queues.get_mut(at).and_then(Option::take);
        let commands = take(self.commands_at);
        for index in 0..pairs {
            let both = (take(2 * index), take(2 * index + 1));
            self.begin_pair(index, features, (&memory, &signals), both)?;
        }
        match commands {
            Some(queue) => self.begin_commands(features, memory, signals, queue),
            None => Ok(()),
        }
    }

    fn begin_commands(
        &mut self,
        features: u64,
        memory: Memory,
        signals: Signals,
        queue: Queue,
    ) -> Result<()> {
        let pairs = self.pairs.iter().map_while(|pair| Some(pair.worker()?.handle())).collect();
        let commander = Commander { control: self.control.clone(), features, pairs };
        let server = Server::new(queue, memory, signals, commander);
        self.commands = Some(self.place.attach(server, self.control.id())?);
        Ok(())
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
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.control.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        // The rings' own are among them, which the kernel's half has to know, too.
        let Activation { features, memory, mut queues, signals } = activation;
        let pairs = if features & 1 << VIRTIO_NET_F_MQ != 0 { self.pairs.len() } else { 1 };
        self.control.agree(features & 1 << VIRTIO_NET_F_CTRL_VLAN != 0);
        self.commands_at = 2 * pairs;
        let begun = self.begin(features, pairs, (memory, signals), &mut queues);
        if begun.is_err() {
            // All or nothing: those that have begun end.
            drop(self.deactivate());
        }
        begun
    }

    fn drain(&mut self, deadline: Instant) -> bool {
        let workers = || self.pairs.iter().filter_map(Pair::worker);
        // Whoever sends copies a frame in a moment, unless he is stopped amid it.
        while !workers().all(|worker| worker.with(Worker::drain)) {
            if Instant::now() >= deadline {
                workers().for_each(|worker| worker.with(Worker::go_on));
                return false;
            }
            std::thread::sleep(MOMENT);
        }
        true
    }

    fn awaited(&self) -> &'static str {
        "whoever sends to it has stopped amid a frame"
    }

    fn is_at_rest(&self) -> bool {
        self.pairs.iter().all(|pair| match &pair.state {
            State::Idle(parts, _) => parts.backend.port().is_none_or(|port| !port.is_filled()),
            State::Active(_) | State::Lost => true,
        })
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        let mut queues: Vec<_> = self.sizes.iter().map(|_| None).collect();
        let Self { control, pairs, commands, commands_at, .. } = self;
        let lost = |error: Error| log::warn!("{}: {error}", control.id());
        // It holds what tells the others.
        if let Some(commander) = commands.take() {
            match commander.detach() {
                Ok(commander) => queues[*commands_at] = Some(commander.queue),
                Err(error) => lost(error),
            }
        }
        for (pair, places) in pairs.iter_mut().zip(queues.chunks_mut(2)) {
            match std::mem::replace(&mut pair.state, State::Lost) {
                State::Active(worker) => match worker.detach() {
                    Ok(worker) => {
                        let ([rx, tx], parts, overflow) = worker.finish();
                        pair.state = State::Idle(parts, overflow);
                        places[0] = Some(rx);
                        if let Some(place) = places.get_mut(1) {
                            *place = Some(tx);
                        }
                    }
                    Err(error) => lost(error),
                },
                other => pair.state = other,
            }
        }
        queues
    }

    fn refit(&mut self) {
        let mut other = self.control.spare();
        // What was there before is left for whoever asked for it.
        for (pair, new) in self.pairs.iter_mut().zip(other.iter_mut()) {
            match &mut pair.state {
                State::Idle(parts, _) => std::mem::swap(&mut parts.backend, new),
                State::Active(_) | State::Lost => {}
            }
        }
    }

    fn reset(&mut self) {
        self.control.forget();
    }
}

#[cfg(test)]
mod tests;
