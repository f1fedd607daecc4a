#![forbid(unsafe_code)]
//! Frames from the driver to the backend, gathered from guest memory as they lie.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use super::control::Control;
use super::header::to_backend;
use super::statistics::Counters;
use crate::memory::Memory;
use crate::net::{HEADER_LEN, MAX_FRAME, MIN_FRAME, NetBackend, Offloads};
use crate::sys::io::Pieces;
use crate::virtio::Signals;
use crate::virtio::queue::{Chain, Queue, QueueFault};

/// The transmit queue.
pub(super) struct Tx {
    pub queue: Queue,
    /// A frame was lost on the host's side.
    pub failed: bool,
    /// What the driver may leave to do.
    may: Offloads,
    chain: Chain,
    pieces: Pieces,
    control: Arc<Control>,
    counters: Arc<Counters>,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// Nothing is left; the doorbell rings for more.
    All,
    /// One wake-up's share is done, and more waits.
    Share,
    /// The backend has no room: again when its fd is writable.
    NoRoom,
    /// The limit is reached: again after that time.
    Limited(Duration),
}

enum Fate {
    /// That many bytes are on their way.
    Sent(u64),
    Dropped,
    NoRoom,
}

impl Tx {
    pub fn new(queue: Queue, may: Offloads, (control, pair): (Arc<Control>, usize)) -> Self {
        let chain = Chain::with_capacity(queue.max_size());
        let pieces = Pieces::with_capacity(usize::from(queue.max_size()) + 1);
        let counters = control.counters[pair].clone();
        Self { queue, failed: false, may, chain, pieces, control, counters }
    }

    /// Sends what waits. Without a backend frames are dropped, as on a cable that is not plugged in.
    pub fn run(
        &mut self,
        memory: &Memory,
        mut backend: Option<&mut (dyn NetBackend + 'static)>,
        signals: &Signals,
    ) -> Result<Sent, QueueFault> {
        let (mut budget, rings) = (self.queue.size(), self.queue.rings(memory));
        loop {
            self.queue.disable_notification(memory)?;
            while budget > 0 {
                // What is beyond it stays where it is.
                if let Some(wait) = self.control.wait(&self.control.send) {
                    return Ok(Sent::Limited(wait));
                }
                if !self.queue.pop_from(&rings, &mut self.chain)? {
                    break;
                }
                budget -= 1;
                let fate = match backend.as_deref_mut() {
                    Some(backend) if self.control.is_up() => self.send(memory, backend, signals),
                    _ => Fate::Dropped,
                };
                match fate {
                    Fate::Sent(bytes) => {
                        self.counters.tx.carried(bytes);
                        self.control.spend(&self.control.send, bytes);
                    }
                    Fate::Dropped => self.counters.tx.dropped(),
                    Fate::NoRoom => {
                        self.queue.give_back(self.chain.head);
                        return Ok(Sent::NoRoom);
                    }
                }
                self.queue.complete(memory, self.chain.head, 0)?;
            }
            if budget == 0 {
                return Ok(Sent::Share);
            }
            if !self.queue.enable_notification(memory)? {
                return Ok(Sent::All);
            }
        }
    }

    /// Sends or drops one frame: a driver that sends nonsense loses it, and nothing else happens.
    fn send(&mut self, memory: &Memory, backend: &mut dyn NetBackend, signals: &Signals) -> Fate {
        let mut reader = self.chain.reader(memory);
        let Ok(header) = reader.read_array::<HEADER_LEN>() else { return Fate::Dropped };
        let len = reader.remaining();
        let Some(header) = to_backend(&header, len, self.may) else { return Fate::Dropped };
        let fits = (MIN_FRAME as u64..=MAX_FRAME as u64).contains(&len);
        if !fits || !self.chain.writable.is_empty() {
            return Fate::Dropped;
        }
        let (failed, pieces) = (&mut self.failed, &mut self.pieces);
        let mut frame = pieces.list();
        frame.push_bytes(&header);
        if reader.rest().slices(len, |slice| frame.push(slice)).is_err() {
            return Fate::Dropped;
        }
        loop {
            match backend.send(&frame) {
                Ok(()) => return Fate::Sent(len),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Fate::NoRoom,
                // The kernel has found that what the driver left to do cannot be done on that frame.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) && header[0] != 0 => {
                    return Fate::Dropped;
                }
                Err(error) => {
                    *failed = true;
                    report(signals, &error);
                    return Fate::Dropped;
                }
            }
        }
    }
}

/// A frame was lost on the host's side.
pub(super) fn report(signals: &Signals, error: &io::Error) {
    signals.backend_error(error.raw_os_error().unwrap_or(libc::EIO), 0);
}
