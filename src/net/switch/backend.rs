#![forbid(unsafe_code)]
//! The end of a port that a card holds.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::Shared;
use super::forward::{Memory, forward};
use super::port::{Map, Port};
use super::queue::{Buffer, Queue as PortQueue};
use super::statistics::DropReason;
use crate::error::{Error, ErrorKind, Result};
use crate::net::NetBackend;
use crate::net::offload::Offloads;
use crate::sys::io::IoList;

/// One end of a cable whose other end is in the switch. Sending forwards the frame, on the caller's thread;
/// where a receiver has no room it is dropped there, and counted.
pub(crate) struct Plug {
    shared: Arc<Shared>,
    port: Arc<Port>,
    /// The ports as they were when we last looked, and what the switch's generation was.
    map: Arc<Map>,
    generation: u64,
    /// The buffer of the last frame that was read.
    used: Option<Buffer>,
    memory: Memory,
}

impl Plug {
    /// Takes the port's end.
    ///
    /// # Errors
    /// `Busy` where somebody has it, `NotFound` where the port was removed.
    pub(super) fn new(shared: &Arc<Shared>, port: &Arc<Port>) -> Result<Self> {
        let (map, generation) = shared.map();
        if map.get(port).is_none() {
            let why = format!("port '{}' was removed from its switch", port.name);
            return Err(Error::new(ErrorKind::NotFound, why));
        }
        if !port.plug() {
            let why = format!("port '{}' is in use by another card", port.name);
            return Err(Error::new(ErrorKind::Busy, why));
        }
        Ok(Self {
            shared: shared.clone(),
            port: port.clone(),
            map,
            generation,
            used: None,
            memory: Memory::default(),
        })
    }

    /// A frame that was read could not be handed on.
    pub fn lost(&self) {
        self.port.counters.drop(DropReason::Uplink);
    }

    /// What whoever reads here can finish by itself: nothing until this is called.
    pub fn set_takes(&self, offloads: Offloads) {
        self.port.set_takes(offloads);
    }
}

impl Drop for Plug {
    fn drop(&mut self) {
        self.port.unplug();
        if self.shared.map().0.get(&self.port).is_some() {
            self.shared.table.forget(self.port.number);
        }
    }
}

impl NetBackend for Plug {
    fn receive(&mut self, room: &IoList<'_>) -> io::Result<usize> {
        let Some(item) = self.port.queue.pop(self.used.take()) else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let filled = room.copy_from(0, item.bytes());
        self.used = Some(item.into_buffer());
        filled
    }

    fn send(&mut self, frame: &IoList<'_>) -> io::Result<()> {
        if self.shared.generation() != self.generation {
            (self.map, self.generation) = self.shared.map();
            self.memory.forget();
        }
        forward(&self.shared, &self.map, &self.port, &mut self.memory, frame);
        Ok(())
    }

    fn offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn set_offloads(&mut self, taken: Offloads) {
        self.set_takes(taken);
    }

    fn port(&self) -> Option<&PortQueue> {
        Some(&self.port.queue)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.port.queue.bell().as_fd()
    }

    fn is_gone(&self) -> bool {
        false
    }

    fn reopen(&mut self) -> Result<()> {
        Ok(())
    }
}
