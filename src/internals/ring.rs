#![forbid(unsafe_code)]
//! A virtqueue without a device and a transport, for a fuzz target that holds it against a model.

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Board;
use crate::irq::{Routes, Vector};
use crate::memory::Memory;
use crate::virtio::Queue;
use crate::virtio::queue::{BadBuffer, Chain, Next, QueueFault, QueueSetup, Span};

/// What a transport's registers say of a queue.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct RingSetup {
    pub max_size: u16,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub event_idx: bool,
    pub next_avail: u16,
    pub next_used: u16,
}

/// A chain that was taken: its buffers are addresses and lengths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Taken {
    pub head: u16,
    pub readable: Vec<(u64, u32)>,
    pub writable: Vec<(u64, u32)>,
    pub ordered: bool,
}

/// The queue. What it refuses is named as the variants of its errors are.
pub struct BareQueue {
    queue: Queue,
    memory: Memory,
    chain: Chain,
    interrupt: Arc<Vector>,
}

fn fault(fault: QueueFault) -> String {
    let text = format!("{fault:?}");
    text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
}

fn bad(buffer: BadBuffer) -> String {
    format!("{buffer:?}")
}

fn taken(chain: &Chain) -> Taken {
    let list = |spans: &[Span]| spans.iter().map(|span| (span.addr.0, span.len)).collect();
    Taken {
        head: chain.head,
        readable: list(&chain.readable),
        writable: list(&chain.writable),
        ordered: chain.ordered,
    }
}

impl BareQueue {
    /// Serves rings in that board's memory.
    ///
    /// # Errors
    /// They cannot be. It panics where the host is out of file descriptors.
    #[expect(clippy::unwrap_used, reason = "test support: what fails here is a failed test")]
    pub fn new(board: &Board, setup: &RingSetup) -> Result<Self, String> {
        let interrupt = Routes::new(None).vector().unwrap();
        let setup = QueueSetup {
            max_size: setup.max_size,
            size: setup.size,
            desc: setup.desc,
            avail: setup.avail,
            used: setup.used,
            event_idx: setup.event_idx,
            next_avail: setup.next_avail,
            next_used: setup.next_used,
            doorbell: EventFd::new(EFD_NONBLOCK).unwrap(),
            interrupt: Some(interrupt.clone()),
        };
        let memory = board.memory.clone();
        let queue = Queue::new(setup, &memory).map_err(fault)?;
        let chain = Chain::with_capacity(queue.max_size());
        Ok(Self { queue, memory, chain, interrupt })
    }

    /// The next chain.
    ///
    /// # Errors
    /// The rings are broken.
    pub fn pop(&mut self) -> Result<Option<Taken>, String> {
        let found = self.queue.pop(&self.memory, &mut self.chain).map_err(fault)?;
        Ok(found.then(|| taken(&self.chain)))
    }

    /// It was not used.
    pub fn give_back(&mut self, head: u16) {
        self.queue.give_back(head);
    }

    /// Hands chains back, all or none.
    ///
    /// # Errors
    /// One was not taken; the rings are broken.
    pub fn complete(&mut self, chains: &[(u16, u32)]) -> Result<(), String> {
        self.queue.complete_all(&self.memory, chains).map_err(fault)
    }

    /// Tells the driver; how often the interrupt was raised since the last call.
    pub fn notify(&mut self) -> u64 {
        self.queue.notify(&self.memory);
        self.interrupt.take_raised()
    }

    /// Asks for the doorbell; whether chains wait.
    ///
    /// # Errors
    /// The rings are broken.
    pub fn enable_notification(&mut self) -> Result<bool, String> {
        self.queue.enable_notification(&self.memory).map_err(fault)
    }

    /// One wake-up: `serve` sees each chain, which is completed then with so many bytes, and says whether to go on.
    ///
    /// # Errors
    /// The rings are broken.
    pub fn drain(&mut self, mut serve: impl FnMut(&Taken) -> (u32, bool)) -> Result<bool, String> {
        let Self { queue, memory, chain, .. } = self;
        let drained = queue.drain(memory, chain, |queue, chain| {
            let (written, more) = serve(&taken(chain));
            queue.complete(memory, chain.head, written)?;
            Ok(if more { Next::More } else { Next::Enough })
        });
        drained.map_err(fault)
    }

    /// What the buffers of the chain that was taken last hold, `skip` bytes on, in pieces of so many bytes.
    ///
    /// # Errors
    /// They are not in memory, or shorter.
    pub fn read(&self, skip: u64, pieces: &[usize]) -> Result<Vec<u8>, String> {
        let mut reader = self.chain.reader(&self.memory);
        reader.skip(skip).map_err(bad)?;
        let mut all = Vec::new();
        for length in pieces {
            let mut piece = vec![0; *length];
            reader.read(&mut piece).map_err(bad)?;
            all.extend(piece);
        }
        Ok(all)
    }

    /// Fills them from `skip` on.
    ///
    /// # Errors
    /// They are not in memory, or shorter.
    pub fn write(&self, skip: u64, pieces: &[&[u8]]) -> Result<(), String> {
        let mut writer = self.chain.writer(&self.memory);
        writer.skip(skip).map_err(bad)?;
        pieces.iter().try_for_each(|piece| writer.write(piece)).map_err(bad)
    }
}
