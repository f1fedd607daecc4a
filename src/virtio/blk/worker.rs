#![forbid(unsafe_code)]
//! Serves a disk's queue: parse, submit, answer.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventSet, Events};
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_S_OK;
use vm_memory::{Bytes, GuestAddress};

use super::request::{Action, HEADER, ID_LEN, Limits, Refusal, parse, status_address};
use super::statistics::{Counters, Kind};
use crate::block::{Backend, BlockOp, IoRequest, Submitted};
use crate::memory::Memory;
use crate::reactor::{self, Leaving, Watch};
use crate::sys::fd::wait_readable;
use crate::sys::io::Pieces;
use crate::virtio::Signals;
use crate::virtio::queue::{Chain, Next, Queue, QueueFault};

/// Completions between two looks at whether the driver wants an interrupt: a slow disk's first answers
/// do not wait for its last.
const NOTIFY_EVERY: u32 = 8;

/// Bytes after which a wake-up ends, so that nobody waits long for the loop: a request can be of 63.5 MiB, and
/// 256 of them may wait.
const SHARE: u64 = 2 << 20;

/// How long a device that comes to its end waits for requests that a backend of the embedder's has not answered.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 200 } else { 5_000 });

/// How often who waits looks whether it still has to.
const LOOK: Duration = Duration::from_millis(100);

/// One queue and what serves it.
pub(super) struct Worker {
    queue: Queue,
    memory: Memory,
    signals: Signals,
    chain: Chain,
    disk: Disk,
    /// The driver broke the rules; nothing is served until the reset.
    broken: bool,
    /// Nothing more is begun.
    draining: bool,
    leaving: Leaving,
}

/// Everything but the queue.
struct Disk {
    backend: Box<dyn Backend>,
    limits: Limits,
    serial: [u8; ID_LEN],
    /// The driver has no FLUSH: each write is on stable storage when it is answered (5.2.6.2).
    writethrough: bool,
    signals: Signals,
    pieces: Pieces,
    /// What has been submitted and not answered, by its head.
    pending: Box<[Option<Pending>]>,
    in_flight: usize,
    /// Completed since the last notification.
    untold: u32,
    counters: Arc<Counters>,
}

/// How to answer a request.
#[derive(Clone, Copy)]
struct Pending {
    status: GuestAddress,
    /// The bytes written when it succeeds, the status among them.
    written: u32,
    offset: u64,
    /// What it is counted as.
    kind: Kind,
}

impl Worker {
    pub fn new(
        queue: Queue,
        memory: Memory,
        signals: Signals,
        backend: Box<dyn Backend>,
        serial: [u8; ID_LEN],
        writethrough: bool,
        counters: Arc<Counters>,
    ) -> Self {
        let limits = Limits { size: backend.size(), readonly: backend.readonly() };
        let disk = Disk {
            backend,
            limits,
            serial,
            writethrough,
            signals: signals.clone(),
            pieces: Pieces::with_capacity(queue.max_size().into()),
            pending: vec![None; queue.size().into()].into(),
            in_flight: 0,
            untold: 0,
            counters,
        };
        let chain = Chain::with_capacity(queue.max_size());
        let (broken, draining) = (false, false);
        Self { queue, memory, signals, chain, disk, broken, draining, leaving: Leaving::default() }
    }

    /// One wake-up's work: answers what the backend has finished, and submits what waits.
    pub fn process_queue(&mut self) {
        if self.broken || self.draining {
            // What the backend reports must be taken all the same, or its fd would never let us sleep.
            return self.collect();
        }
        let Self { queue, memory, chain, disk, leaving, .. } = self;
        let (collected, mut moved) = (disk.collect(queue, memory), 0);
        let serve = |queue: &mut Queue, chain: &Chain| {
            disk.serve(queue, memory, chain)?;
            moved += chain.writable_len() + chain.readable_len();
            // Who takes the queue away gets it after this request, not after all that wait.
            Ok(if moved >= SHARE || leaving.is_set() { Next::Enough } else { Next::More })
        };
        let drained = match collected {
            Ok(()) => queue.drain(memory, chain, serve),
            Err(fault) => Err(fault),
        };
        disk.backend.kick();
        queue.notify(memory);
        match drained {
            Ok(true) => queue.rearm(),
            Ok(false) => {}
            Err(fault) => {
                self.broken = true;
                self.signals.needs_reset(fault);
            }
        }
    }

    fn collect(&mut self) {
        if let Err(fault) = self.disk.collect(&mut self.queue, &self.memory) {
            // Nobody can be told any more, or hears of it at the next request.
            log::debug!("{fault}");
        }
        self.queue.notify(&self.memory);
    }

    /// Begins nothing more, and waits for what is in flight. `false` when it has not ended by the deadline: then
    /// the queue is served as before.
    pub fn drain(&mut self, deadline: Instant) -> bool {
        self.draining = true;
        if self.settle(deadline) {
            return true;
        }
        self.draining = false;
        self.queue.rearm();
        false
    }

    /// Waits for every request in flight and gives everything back. They may still write to the guest's memory, so
    /// only the end of the VM makes it give up on any.
    pub fn finish(mut self, ending: impl Fn() -> bool) -> (Queue, Box<dyn Backend>) {
        let mut last = None;
        while !self.settle(Instant::now() + LOOK) {
            if ending() && Instant::now() >= *last.get_or_insert_with(|| Instant::now() + PATIENCE) {
                self.disk.abandon();
            }
        }
        (self.queue, self.disk.backend)
    }

    /// Waits until nothing is in flight, at most until the deadline; whether it is so.
    fn settle(&mut self, deadline: Instant) -> bool {
        while self.disk.in_flight > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.disk.backend.kick();
            if let Some(fd) = self.disk.backend.completion_fd() {
                wait_readable(fd, left.min(LOOK));
            }
            self.collect();
        }
        true
    }
}

impl Disk {
    /// One request: answered now, or remembered until the backend has done it.
    fn serve(&mut self, queue: &mut Queue, memory: &Memory, chain: &Chain) -> Result<(), QueueFault> {
        let Some(status) = status_address(chain) else {
            // No byte to put an error into: its completion with nothing written says it.
            return self.complete(queue, memory, chain.head, 0);
        };
        let pending = |kind, written, offset| Pending { status, written, offset, kind };
        match parse(memory, chain, self.limits) {
            Ok(Action::Read { offset, len }) => {
                let pending = pending(Kind::Read(len), len + 1, offset);
                self.submit(queue, memory, chain, BlockOp::Read, pending, len)
            }
            Ok(Action::Write { offset, len }) => {
                let op = BlockOp::Write { durable: self.writethrough };
                self.submit(queue, memory, chain, op, pending(Kind::Write(len), 1, offset), len)
            }
            Ok(Action::Flush) => {
                self.submit(queue, memory, chain, BlockOp::Flush, pending(Kind::Flush, 1, 0), 0)
            }
            Ok(Action::GetId { len }) => {
                let put = chain.writer(memory).write(&self.serial[..len as usize]);
                let outcome = put.map_err(Refusal::from);
                self.answer(queue, memory, chain.head, pending(Kind::Other, len + 1, 0), outcome)
            }
            Err(refusal) => self.answer(queue, memory, chain.head, pending(Kind::Other, 1, 0), Err(refusal)),
        }
    }

    fn submit(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
        chain: &Chain,
        op: BlockOp,
        pending: Pending,
        len: u32,
    ) -> Result<(), QueueFault> {
        let mut buffers = self.pieces.list();
        let mut data = match op {
            BlockOp::Read => chain.writer(memory).rest(),
            _ => chain.reader(memory).rest(),
        };
        let found = match op {
            BlockOp::Write { .. } => data.skip(HEADER),
            _ => Ok(()),
        };
        let found = found.and_then(|()| data.slices(len.into(), |slice| buffers.push(slice)));
        if let Err(bad) = found {
            return self.answer(queue, memory, chain.head, pending, Err(bad.into()));
        }
        let (offset, tag) = (pending.offset, u64::from(chain.head));
        match self.backend.submit(IoRequest { op, offset, buffers, memory, tag }) {
            Submitted::Done(outcome) => {
                let outcome = outcome.map_err(|error| self.failed(&error, offset));
                self.answer(queue, memory, chain.head, pending, outcome)
            }
            Submitted::Pending => {
                if let Some(slot) = self.pending.get_mut(usize::from(chain.head)) {
                    *slot = Some(pending);
                    self.in_flight += 1;
                }
                Ok(())
            }
        }
    }

    /// Answers what the backend has finished since the last time.
    fn collect(&mut self, queue: &mut Queue, memory: &Memory) -> Result<(), QueueFault> {
        let mut result = Ok(());
        let Self { backend, pending, in_flight, signals, counters, .. } = self;
        backend.completions(&mut |tag, outcome| {
            // A tag that nothing waits for is a backend's mistake, and nobody's request.
            let slot = usize::try_from(tag).ok().and_then(|head| pending.get_mut(head));
            let Some(request) = slot.and_then(Option::take) else { return };
            *in_flight -= 1;
            let outcome = outcome.map_err(|error| failed(signals, &error, request.offset));
            let answered = put_answer(queue, memory, tag as u16, request, outcome, counters);
            result = result.and(answered);
        });
        result
    }

    /// Gives up on what is in flight.
    fn abandon(&mut self) {
        self.backend.abandon();
        self.pending.fill(None);
        let given_up = std::mem::take(&mut self.in_flight);
        log::warn!("{given_up} requests were not answered within {PATIENCE:?}, and are given up");
        self.signals.backend_error(libc::ETIMEDOUT, 0);
    }

    fn failed(&self, error: &io::Error, offset: u64) -> Refusal {
        failed(&self.signals, error, offset)
    }

    fn answer(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
        head: u16,
        pending: Pending,
        outcome: Result<(), Refusal>,
    ) -> Result<(), QueueFault> {
        put_answer(queue, memory, head, pending, outcome, &self.counters)?;
        self.told(queue, memory);
        Ok(())
    }

    fn complete(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueFault> {
        queue.complete(memory, head, written)?;
        self.told(queue, memory);
        Ok(())
    }

    fn told(&mut self, queue: &mut Queue, memory: &Memory) {
        self.untold += 1;
        if self.untold >= NOTIFY_EVERY {
            self.untold = 0;
            queue.notify(memory);
        }
    }
}

/// A failure of the host's: the guest sees an error, the embedder an event.
fn failed(signals: &Signals, error: &io::Error, offset: u64) -> Refusal {
    signals.backend_error(error.raw_os_error().unwrap_or(libc::EIO), offset);
    Refusal::IoError
}

fn put_answer(
    queue: &mut Queue,
    memory: &Memory,
    head: u16,
    pending: Pending,
    outcome: Result<(), Refusal>,
    counters: &Counters,
) -> Result<(), QueueFault> {
    counters.count(pending.kind, outcome.is_ok());
    let (status, written) = match outcome {
        Ok(()) => (VIRTIO_BLK_S_OK as u8, pending.written),
        Err(refusal) => (refusal.status(), 1),
    };
    // A status outside memory: the completion with nothing written is all that can be said.
    let put = memory.write_obj(status, pending.status);
    queue.complete(memory, head, if put.is_ok() { written } else { 0 })
}

impl reactor::Worker for Worker {
    fn init(&mut self, ops: &mut Watch) {
        self.leaving = ops.leaving();
        let mut added = ops.add(Events::new(self.queue.doorbell(), EventSet::IN));
        if let Some(fd) = self.disk.backend.completion_fd() {
            added = added.and(ops.add(Events::new_raw(fd.as_raw_fd(), EventSet::IN)));
        }
        if let Err(error) = added {
            self.broken = true;
            self.signals.needs_reset(format_args!("the host cannot watch its doorbell: {error}"));
        }
        // What waits already may have been announced before we listened.
        self.queue.rearm();
    }

    fn process(&mut self, events: Events, _: &mut Watch) {
        if events.fd() == self.queue.doorbell().as_raw_fd() {
            self.queue.silence();
        }
        self.process_queue();
    }
}
