#![forbid(unsafe_code)]
//! Serves a disk's queue: parse, submit, answer.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use event_manager::{EventSet, Events};
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK};
use vm_memory::GuestAddress;
use vmm_sys_util::timerfd::TimerFd;

use super::control::Control;
use super::request::{Action, HEADER, ID_LEN, Limits, Refusal, parse, status_address};
use super::statistics::{Counters, Kind};
use crate::block::{Backend, BlockOp, IoRequest, Submitted};
use crate::memory::Memory;
use crate::reactor::{self, Leaving, Watch};
use crate::sys::fd::wait_readable;
use crate::sys::io::Pieces;
use crate::sys::log;
use crate::virtio::Signals;
use crate::virtio::queue::{Chain, Next, Queue, QueueFault};

/// Completions between two looks at whether the driver wants an interrupt: a slow disk's first answers
/// do not wait for its last.
const NOTIFY_EVERY: u32 = 8;

/// Completions of a batch between two moments at which a driver that polls sees them.
const PUBLISH_EVERY: u32 = 8;

/// Bytes after which a wake-up ends, so that nobody waits long for the loop: a request can be of 63.5 MiB, and
/// 256 of them may wait.
const SHARE: u64 = 2 << 20;

/// How long a device that comes to its end waits for requests that a backend of the embedder's has not answered.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 200 } else { 5_000 });

/// How long a host is left alone that could not take more.
const BREATH: Duration = Duration::from_millis(1);
/// How often who waits looks whether it still has to.
const LOOK: Duration = Duration::from_millis(100);

/// The data of a read or a write with its place, and nothing for what moves none.
type Extent = (u64, u64);

/// Since a worker began: wide enough for centuries.
type Nanoseconds = u64;

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
    /// Rings when a limit lets the next request pass.
    timer: TimerFd,
}

/// Everything but the queue.
struct Disk {
    backend: Box<dyn Backend>,
    control: Arc<Control>,
    /// The driver knows DISCARD and WRITE_ZEROES.
    discards: bool,
    serial: [u8; ID_LEN],
    /// The driver has no FLUSH: each write is on stable storage when it is answered (5.2.6.2).
    no_flush: bool,
    signals: Signals,
    pieces: Pieces,
    /// What has been submitted and not answered, by its head.
    pending: Box<[Option<Pending>]>,
    in_flight: usize,
    /// Completed since the last notification.
    untold: u32,
    /// The backend says that something has ended.
    rung: bool,
    /// When it began, which times are counted from.
    epoch: Instant,
    /// When the last thing happened: one look at the clock serves a batch.
    now: Nanoseconds,
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
    begun: Nanoseconds,
}

/// What a worker serves.
pub(super) struct Job {
    pub queue: Queue,
    pub index: usize,
    pub memory: Memory,
    pub signals: Signals,
    pub backend: Box<dyn Backend>,
    pub serial: [u8; ID_LEN],
    pub features: u64,
    pub control: Arc<Control>,
}

impl Worker {
    /// # Errors
    /// The host is out of file descriptors; the backend comes back.
    pub fn new(job: Job) -> Result<Self, (io::Error, Box<dyn Backend>)> {
        let Job { queue, index, memory, signals, backend, serial, features, control } = job;
        let timer = match TimerFd::new() {
            Ok(timer) => timer,
            Err(error) => return Err((error.into(), backend)),
        };
        let counters = control.counters(index);
        let disk = Disk {
            backend,
            discards: control.discards() && features & (1 << VIRTIO_BLK_F_DISCARD) != 0,
            control,
            serial,
            no_flush: features & 1 << VIRTIO_BLK_F_FLUSH == 0,
            signals: signals.clone(),
            pieces: Pieces::with_capacity(queue.max_size().into()),
            pending: vec![None; queue.size().into()].into(),
            in_flight: 0,
            untold: 0,
            rung: false,
            epoch: Instant::now(),
            now: 0,
            counters,
        };
        let chain = Chain::with_capacity(queue.max_size());
        let (broken, draining) = (false, false);
        let leaving = Leaving::default();
        Ok(Self { queue, memory, signals, chain, disk, broken, draining, leaving, timer })
    }

    /// One wake-up's work: answers what the backend has finished, and submits what waits.
    pub fn process_queue(&mut self) {
        if self.broken || self.draining {
            // What the backend reports must be taken all the same, or its fd would never let us sleep.
            return self.collect();
        }
        let Self { queue, memory, chain, disk, leaving, timer, .. } = self;
        disk.now = since(disk.epoch);
        let (collected, mut moved) = (disk.collect(queue, memory), 0);
        if let (Ok(()), Some(wait)) = (collected, disk.control.wait()) {
            queue.notify(memory);
            return sleep(timer, wait);
        }
        let mut throttled = None;
        let serve = |queue: &mut Queue, chain: &Chain| {
            disk.serve(queue, memory, chain)?;
            moved += chain.writable_len() + chain.readable_len();
            // Who takes the queue away gets it after this request, not after all that wait.
            throttled = disk.control.wait();
            let enough = moved >= SHARE || throttled.is_some() || leaving.is_set();
            Ok(if enough { Next::Enough } else { Next::More })
        };
        let drained = match collected {
            Ok(()) => queue.drain(memory, chain, serve),
            Err(fault) => Err(fault),
        };
        let taken = disk.backend.kick();
        // Much has ended by then.
        let drained = drained.and_then(|more| disk.collect(queue, memory).map(|()| more));
        queue.notify(memory);
        if !taken {
            sleep(timer, BREATH);
        }
        match (drained, throttled) {
            (Ok(true), Some(wait)) => sleep(timer, wait),
            (Ok(true), None) => queue.rearm(),
            (Ok(false), _) => {}
            (Err(fault), _) => {
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
        self.go_on();
        false
    }

    /// Serves again after [`drain`](Self::drain).
    pub fn go_on(&mut self) {
        self.draining = false;
        self.queue.rearm();
    }

    /// Waits for every request in flight and gives everything back. They may still write to the guest's memory, so
    /// only the end of the VM makes it give up on any; `last` is until when, for all queues of a device.
    pub fn finish(
        mut self,
        ending: impl Fn() -> bool,
        last: &OnceLock<Instant>,
    ) -> (Queue, Box<dyn Backend>) {
        while !self.settle(Instant::now() + LOOK) {
            if ending() && Instant::now() >= *last.get_or_init(|| Instant::now() + PATIENCE) {
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
        let begun = self.now;
        let pending = |kind, written, offset| Pending { status, written, offset, kind, begun };
        let limits =
            Limits { size: self.control.size(), readonly: self.control.readonly(), discards: self.discards };
        let durable = || self.no_flush || !self.control.writeback();
        match parse(memory, chain, limits) {
            Ok(Action::Read { offset, len }) => {
                let pending = pending(Kind::Read(len), len + 1, offset);
                self.submit(queue, memory, chain, BlockOp::Read, pending, (offset, len.into()))
            }
            Ok(Action::Write { offset, len }) => {
                let pending = pending(Kind::Write(len), 1, offset);
                let op = BlockOp::Write { durable: durable() };
                self.submit(queue, memory, chain, op, pending, (offset, len.into()))
            }
            Ok(Action::Flush) => {
                self.submit(queue, memory, chain, BlockOp::Flush, pending(Kind::Flush, 1, 0), (0, 0))
            }
            Ok(Action::Discard { offset, length }) => {
                let pending = pending(Kind::Discard(length), 1, offset);
                self.submit(queue, memory, chain, BlockOp::Discard, pending, (offset, length))
            }
            Ok(Action::WriteZeroes { offset, length, unmap }) => {
                let pending = pending(Kind::Discard(length), 1, offset);
                let op = BlockOp::WriteZeroes { unmap, durable: durable() };
                self.submit(queue, memory, chain, op, pending, (offset, length))
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
        (offset, length): Extent,
    ) -> Result<(), QueueFault> {
        let moves = matches!(op, BlockOp::Read | BlockOp::Write { .. });
        let data_length = if moves { length } else { 0 };
        self.control.spend(data_length);
        if !matches!(op, BlockOp::Read | BlockOp::Flush) {
            self.control.keep(offset, length);
        }
        let mut buffers = self.pieces.list();
        let mut data = match op {
            BlockOp::Read => chain.writer(memory).rest(),
            _ => chain.reader(memory).rest(),
        };
        let found = match op {
            BlockOp::Write { .. } => data.skip(HEADER),
            _ => Ok(()),
        };
        let found = found.and_then(|()| data.slices(data_length, |slice| buffers.push(slice)));
        if let Err(bad) = found {
            return self.answer(queue, memory, chain.head, pending, Err(bad.into()));
        }
        let tag = u64::from(chain.head);
        match self.backend.submit(IoRequest { op, offset, length, buffers, memory, tag }) {
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
        let Self { backend, pending, in_flight, signals, counters, epoch, now, rung, .. } = self;
        if *in_flight == 0 && !std::mem::take(rung) {
            // Also no system call to find out.
            return result;
        }
        let mut ended = 0;
        backend.completions(&mut |tag, outcome| {
            if ended == 0 {
                *now = since(*epoch);
            }
            ended += 1;
            // A tag that nothing waits for is a backend's mistake, and nobody's request.
            let slot = usize::try_from(tag).ok().and_then(|head| pending.get_mut(head));
            let Some(slot) = slot else { return };
            let Some(request) = slot else { return };
            *in_flight -= 1;
            let outcome = outcome.map_err(|error| failed(signals, &error, request.offset));
            let mut answered = put_answer(queue, memory, tag as u16, request, outcome, counters, *now);
            *slot = None;
            if ended % PUBLISH_EVERY == 0 {
                answered = answered.and_then(|()| queue.publish(memory));
            }
            if let Err(fault) = answered {
                result = Err(fault);
            }
        });
        if ended > 0 {
            result = result.and(queue.publish(memory));
        }
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
        self.now = since(self.epoch);
        put_answer(queue, memory, head, &pending, outcome, &self.counters, self.now)?;
        queue.publish(memory)?;
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

fn since(epoch: Instant) -> Nanoseconds {
    epoch.elapsed().as_nanos() as Nanoseconds
}

/// Has the timer ring when a request may pass, or somebody may have changed the limit.
fn sleep(timer: &mut TimerFd, wait: Duration) {
    if let Err(error) = timer.reset(wait.min(LOOK).max(Duration::from_micros(1)), None) {
        log::error!("setting a timer: {error}");
    }
}

/// A failure of the host's: the guest sees an error, the embedder an event.
fn failed(signals: &Signals, error: &io::Error, offset: u64) -> Refusal {
    signals.backend_error(error.raw_os_error().unwrap_or(libc::EIO), offset);
    Refusal::IoError
}

/// For the driver to see with the next publication.
fn put_answer(
    queue: &mut Queue,
    memory: &Memory,
    head: u16,
    pending: &Pending,
    outcome: Result<(), Refusal>,
    counters: &Counters,
    now: Nanoseconds,
) -> Result<(), QueueFault> {
    counters.count(pending.kind, now.saturating_sub(pending.begun), outcome.is_ok());
    let (status, written) = match outcome {
        Ok(()) => (VIRTIO_BLK_S_OK as u8, pending.written),
        Err(refusal) => (refusal.status(), 1),
    };
    // A status outside memory: the completion with nothing written is all that can be said.
    let put = memory.put(status, pending.status);
    queue.put_back(memory, head, if put { written } else { 0 })
}

impl reactor::Worker for Worker {
    fn init(&mut self, ops: &mut Watch) {
        self.leaving = ops.leaving();
        let mut added = ops.add(Events::new(self.queue.doorbell(), EventSet::IN));
        added = added.and(ops.add(Events::new(&self.timer, EventSet::IN)));
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
        } else if events.fd() == self.timer.as_raw_fd() {
            let _ = self.timer.clear();
        } else {
            self.disk.rung = true;
        }
        self.process_queue();
    }
}
