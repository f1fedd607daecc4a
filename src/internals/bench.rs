#![forbid(unsafe_code)]
//! Single parts, for measuring them.

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Board;
use super::driver::Rings;
use crate::bus::{Access, Bus, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::irq::{Routes, Vector};
use crate::memory::Memory;
use crate::net::switch::{Plug, PortOptions, PortStatistics, Switch, SwitchOptions, SwitchPort};
use crate::net::{NetBackend, Offloads};
use crate::sys::io::Pieces;
use crate::virtio::Queue;
use crate::virtio::queue::{Chain, QueueSetup};

/// A bus with devices that do next to nothing.
pub struct BenchBus(Bus);

struct Null;

impl Device for Null {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        data.fill(access.offset as u8);
        Ok(())
    }

    fn write(&self, _: Access, _: &[u8]) -> Result<()> {
        Ok(())
    }
}

impl BenchBus {
    /// `count` devices of 16 bytes, one at every 256 bytes.
    ///
    /// # Errors
    /// They do not fit.
    pub fn new(count: u64) -> Result<Self> {
        let mut bus = Bus::default();
        for at in (0..count).map(|i| i << 8) {
            bus.insert("null", at, 16, Arc::new(Null))?;
        }
        Ok(Self(bus))
    }

    /// Four bytes at `address`.
    ///
    /// # Errors
    /// None here.
    pub fn read(&self, address: u64) -> Result<u32> {
        let mut data = [0; 4];
        self.0.read(address, 0, &mut data)?;
        Ok(u32::from_le_bytes(data))
    }
}

/// A switch whose ports have no devices on them.
pub struct BenchSwitch {
    ports: Vec<SwitchPort>,
    plugs: Vec<Plug>,
    pieces: Pieces,
    room: Vec<u8>,
}

impl BenchSwitch {
    /// With so many access ports of one VLAN.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn new(ports: usize) -> Result<Self> {
        Self::with(&vec![PortOptions::access(1); ports], 2048)
    }

    /// With these ports, for frames of so many bytes.
    ///
    /// # Errors
    /// Bad options; the host is out of file descriptors.
    pub fn with(ports: &[PortOptions], room: usize) -> Result<Self> {
        let switch = Switch::new(&SwitchOptions::default())?;
        let add = |(i, options): (usize, &PortOptions)| switch.add_port(format!("p{i}"), options);
        let ports = ports.iter().enumerate().map(add).collect::<Result<Vec<_>>>()?;
        let plugs = ports.iter().map(SwitchPort::plug).collect::<Result<_>>()?;
        Ok(Self { ports, plugs, pieces: Pieces::default(), room: vec![0; room] })
    }

    /// Tells a port something else.
    ///
    /// # Errors
    /// Bad options.
    pub fn set(&self, port: usize, options: &PortOptions) -> Result<()> {
        self.ports[port].set_options(options)
    }

    /// What the station of a port takes undone.
    pub fn set_takes(&mut self, port: usize, offloads: Offloads) {
        self.plugs[port].set_offloads(offloads);
    }

    /// What a port has carried.
    pub fn statistics(&self, port: usize) -> PortStatistics {
        self.ports[port].statistics()
    }

    /// Takes a frame out of a port, with its header.
    pub fn take(&mut self, port: usize) -> Option<&[u8]> {
        let mut list = self.pieces.list();
        list.push_room(&mut self.room);
        let length = self.plugs[port].receive(&list).ok()?;
        Some(&self.room[..length])
    }

    /// A frame with its header comes in at that port.
    pub fn send(&mut self, port: usize, frame: &[u8]) {
        let mut list = self.pieces.list();
        list.push_bytes(frame);
        let _ = self.plugs[port].send(&list);
    }

    /// Takes a frame out of it; whether there was one.
    pub fn receive(&mut self, port: usize) -> bool {
        let mut list = self.pieces.list();
        list.push_room(&mut self.room);
        self.plugs[port].receive(&list).is_ok()
    }
}

/// A queue without a device and a transport.
pub struct BenchQueue {
    queue: Queue,
    memory: Memory,
    chain: Chain,
    interrupt: Arc<Vector>,
}

impl BenchQueue {
    /// Serves the rings in that board's memory.
    ///
    /// # Errors
    /// They cannot be; or the host is out of fds.
    pub fn new(board: &Board, rings: &Rings) -> Result<Self> {
        let doorbell = EventFd::new(EFD_NONBLOCK).map_err(|e| Error::os("making an eventfd", e))?;
        let interrupt = Routes::new(None).vector()?;
        let setup = QueueSetup {
            max_size: rings.size,
            size: rings.size,
            desc: rings.desc,
            avail: rings.avail,
            used: rings.used,
            event_idx: false,
            next_avail: 0,
            next_used: 0,
            doorbell,
            interrupt: Some(interrupt.clone()),
        };
        let memory = board.memory.clone();
        let queue = Queue::new(setup, &memory).map_err(failed)?;
        Ok(Self { queue, memory, chain: Chain::with_capacity(rings.size), interrupt })
    }

    /// Takes a chain, hands it back with `written` bytes, and notifies. Whether there was one.
    ///
    /// # Errors
    /// The rings are broken.
    pub fn serve_one(&mut self, written: u32) -> Result<bool> {
        let found = self.queue.pop(&self.memory, &mut self.chain).map_err(failed)?;
        if found {
            self.queue.complete(&self.memory, self.chain.head, written).map_err(failed)?;
            self.queue.notify(&self.memory);
        }
        Ok(found)
    }

    /// How often the interrupt was raised since the last call.
    pub fn raised(&self) -> u64 {
        self.interrupt.take_raised()
    }
}

fn failed(fault: crate::virtio::queue::QueueFault) -> Error {
    Error::new(ErrorKind::InvalidState, fault.to_string())
}
