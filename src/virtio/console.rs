#![forbid(unsafe_code)]
//! virtio-console (5.3): one port, `hvc0` in the guest.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventSet, Events};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{Chain, Cursor, Next, QueueFault};
use super::{Activation, Queue, Signals, VirtioDevice};
use crate::console::Console;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Memory;
use crate::reactor::{self, Attached, Place, Watch};
use crate::sys::fd;
use crate::sys::log;

/// Entries of the receive and of the transmit queue, in that order.
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// Bytes that are copied at once.
const PIECE: usize = 4096;

/// The most output taken from one buffer. A driver sends pages; one that offers 4 GiB keeps no loop.
const MAX_OUTPUT: u64 = 64 << 10;

/// The console port of a guest.
pub(crate) struct ConsolePort {
    id: String,
    console: Console,
    place: Place,
    /// Rung when input has arrived. Made at once: a thread that begins to serve a device may make none.
    input: Arc<EventFd>,
    worker: Option<Attached<Worker>>,
}

impl ConsolePort {
    /// The port `id` on `console`.
    ///
    /// # Errors
    /// `Exhausted` where there is no descriptor left.
    pub fn new(id: &str, console: Console, place: Place) -> Result<Self> {
        let input = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|e| Error::os(format!("{id}: creating an eventfd"), e))?;
        Ok(Self { id: id.into(), console, place, input: Arc::new(input), worker: None })
    }

    /// Serves both queues on the caller's thread: for drivers in this process ([`Place::Caller`]).
    #[cfg(any(test, feature = "internals"))]
    pub fn process_queues(&self) {
        if let Some(worker) = &self.worker {
            worker.with(Worker::process_queues);
        }
    }
}

impl VirtioDevice for ConsolePort {
    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let refused = |why: &str| Error::new(ErrorKind::InvalidState, format!("{}: {why}", self.id));
        let Activation { features: _, memory, queues, signals } = activation;
        let mut queues = queues.into_iter();
        let (Some(Some(rx)), Some(Some(tx))) = (queues.next(), queues.next()) else {
            return Err(refused("the driver has not enabled both queues"));
        };
        if self.worker.is_some() {
            return Err(refused("is active already"));
        }
        let input = self.input.clone();
        let chain = Chain::with_capacity(rx.max_size().max(tx.max_size()));
        let console = self.console.clone();
        let worker = Worker { rx, tx, console, memory, signals, chain, input: input.clone(), broken: false };
        self.worker = Some(self.place.attach(worker, &self.id)?);
        self.console.on_input(Some(Arc::new(move || {
            fd::ring(&input);
        })));
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        let Some(worker) = self.worker.take() else { return Vec::new() };
        self.console.on_input(None);
        match worker.detach() {
            Ok(worker) => vec![Some(worker.rx), Some(worker.tx)],
            Err(error) => {
                log::warn!("{}: {error}", self.id);
                vec![None, None]
            }
        }
    }
}

struct Worker {
    rx: Queue,
    tx: Queue,
    console: Console,
    memory: Memory,
    signals: Signals,
    chain: Chain,
    /// Input has arrived.
    input: Arc<EventFd>,
    broken: bool,
}

impl Worker {
    fn process_queues(&mut self) {
        if self.broken {
            return;
        }
        let served = self.transmit().and_then(|()| self.receive());
        self.rx.notify(&self.memory);
        self.tx.notify(&self.memory);
        if let Err(fault) = served {
            self.broken = true;
            self.signals.needs_reset(fault);
        }
    }

    /// Takes the guest's output.
    fn transmit(&mut self) -> Result<(), QueueFault> {
        let Self { tx, memory, chain, console, .. } = self;
        let more = tx.drain(memory, chain, |queue, chain| {
            put_out(memory, chain, console);
            queue.complete(memory, chain.head, 0).map(|()| Next::More)
        })?;
        if more {
            tx.rearm();
        }
        Ok(())
    }

    /// Gives the guest its input, while both it and buffers are there.
    fn receive(&mut self) -> Result<(), QueueFault> {
        let Self { rx, memory, chain, console, .. } = self;
        let mut budget = rx.size();
        // Input is taken only when there is a buffer: what the guest does not read waits in the console.
        while console.has_input() && budget > 0 {
            if !rx.pop(memory, chain)? {
                if !rx.enable_notification(memory)? {
                    return Ok(());
                }
                continue;
            }
            budget -= 1;
            let written = put_in(memory, chain, console);
            rx.complete(memory, chain.head, written)?;
        }
        if budget == 0 {
            rx.rearm();
        }
        Ok(())
    }
}

/// Hands the readable bytes on; what is not in memory is not output.
fn put_out(memory: &Memory, chain: &Chain, console: &Console) {
    let mut piece = [0; PIECE];
    let mut reader = chain.reader(memory);
    let mut left = reader.remaining().min(MAX_OUTPUT);
    while left > 0 {
        let bytes = &mut piece[..left.min(PIECE as u64) as usize];
        if reader.read(bytes).is_err() {
            return;
        }
        console.write(bytes);
        left -= bytes.len() as u64;
    }
}

/// Moves input to the writable bytes; how much. A buffer that is not in memory gets nothing, and keeps
/// the input for the next.
fn put_in(memory: &Memory, chain: &Chain, console: &Console) -> u32 {
    let room = chain.writable_len().min(PIECE as u64);
    let mut cursor = Cursor::new(memory, &chain.writable);
    if !chain.readable.is_empty() || cursor.slices(room, |_| {}).is_err() {
        return 0;
    }
    let mut piece = [0; PIECE];
    let count = console.read(&mut piece[..room as usize]);
    // Its memory was there a moment ago, and guest memory never goes away.
    chain.writer(memory).write(&piece[..count]).map_or(0, |()| count as u32)
}

impl reactor::Worker for Worker {
    fn init(&mut self, ops: &mut Watch) {
        for event in [self.rx.doorbell(), self.tx.doorbell(), &*self.input] {
            if let Err(error) = ops.add(Events::new(event, EventSet::IN)) {
                self.broken = true;
                self.signals.needs_reset(format_args!("the host cannot watch its doorbells: {error}"));
                return;
            }
        }
        // What waits already may have been announced before we listened.
        self.tx.rearm();
    }

    fn process(&mut self, events: Events, _: &mut Watch) {
        if events.fd() == self.rx.doorbell().as_raw_fd() {
            self.rx.silence();
        } else if events.fd() == self.tx.doorbell().as_raw_fd() {
            self.tx.silence();
        } else {
            // EAGAIN: it was not ringing.
            let _ = self.input.read();
        }
        self.process_queues();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::StopLine;
    use crate::reactor::EventLoop;
    use crate::virtio::queue_driver::{Dice, Driver, WRITE, activation, bend, signals};
    use vm_memory::{Bytes, GuestAddress};

    struct Bench {
        rx: Driver,
        tx: Driver,
        port: ConsolePort,
        console: Console,
        signals: Signals,
    }

    fn bench_on(place: Place) -> Bench {
        let memory = Memory::new(1 << 20).unwrap();
        let (rx, tx) = (Driver::new(&memory, 0x4000, 16), Driver::new(&memory, 0xc000, 16));
        let console = Console::new();
        let (signals, _) = signals("console0");
        let mut port = ConsolePort::new("console0", console.clone(), place).unwrap();
        port.activate(activation(0, &[&rx, &tx], &signals)).unwrap();
        Bench { rx, tx, port, console, signals }
    }

    #[test]
    fn output_reaches_the_console_and_input_the_guest() {
        let mut b = bench_on(Place::Caller);
        b.tx.memory.write_slice(b"hello", GuestAddress(0x2_0000)).unwrap();
        b.tx.send(&[(0x2_0000, 2, 0), (0x2_0002, 3, 0)]);
        b.port.process_queues();
        assert_eq!((b.tx.take_used(), b.console.tail()), (Some((0, 0)), b"hello".to_vec()));
        b.console.push_input(b"abc");
        b.port.process_queues();
        assert_eq!(b.rx.take_used(), None, "it waits in the console");
        b.rx.send(&[(0x3_0000, 1, WRITE), (0x3_1000, 100, WRITE)]);
        b.port.process_queues();
        assert_eq!(b.rx.take_used(), Some((0, 3)));
        assert_eq!((b.rx.bytes::<1>(0x3_0000), b.rx.bytes::<2>(0x3_1000)), (*b"a", *b"bc"));
        assert_eq!((b.rx.interrupt.take_raised(), b.tx.interrupt.take_raised()), (1, 1));
    }

    #[test]
    fn input_wakes_a_port_on_a_loop() {
        let event_loop = EventLoop::start("test", |f| Ok(std::thread::spawn(f))).unwrap();
        let mut b = bench_on(Place::Loop(event_loop, StopLine::new(|cause| panic!("{cause}"))));
        for _ in 0..10 {
            b.rx.send(&[(0x3_0000, 64, WRITE)]);
            b.console.push_input(b"x");
            assert_eq!(b.rx.wait_used().1, 1);
        }
        b.console.push_input(b"y");
        b.rx.send(&[(0x3_0000, 64, WRITE)]);
        b.rx.ring_doorbell();
        assert_eq!(b.rx.wait_used().1, 1);
        assert_eq!(b.port.deactivate().len(), 2);
    }

    #[test]
    fn bad_buffers_are_completed_and_cost_no_input() {
        let mut b = bench_on(Place::Caller);
        b.console.push_input(b"abc");
        let bad: [&[(u64, u32, u16)]; 4] = [
            &[(0xc000_0000, 64, WRITE)],
            &[(0x3_0000, 64, 0)],
            &[(0x3_0000, 0, WRITE)],
            &[((1 << 20) - 1, 64, WRITE)],
        ];
        for chain in bad {
            b.rx.send(chain);
        }
        b.rx.send(&[(0x3_0000, 64, WRITE)]);
        b.tx.send(&[(0, u32::MAX, 0), (0, u32::MAX, 0)]);
        b.tx.send(&[(0x3_0000, 64, WRITE)]);
        b.port.process_queues();
        let used: Vec<_> = std::iter::from_fn(|| b.rx.take_used()).map(|(_, len)| len).collect();
        assert_eq!(used, [0, 0, 0, 0, 3]);
        assert_eq!(std::iter::from_fn(|| b.tx.take_used()).count(), 2);
        assert_eq!(b.console.written(), MAX_OUTPUT);
        assert_eq!(b.signals.status(), 0);
    }

    #[test]
    fn bent_rings_never_stop_the_process_and_a_reset_always_helps() {
        let mut b = bench_on(Place::Caller);
        let mut dice = Dice(5);
        for _ in 0..1000 {
            bend(&mut b.rx, &mut dice);
            bend(&mut b.tx, &mut dice);
            b.console.push_input(b"abcdef");
            b.port.process_queues();
            if b.signals.status() != 0 {
                b.port.deactivate();
                b.signals.set_status(0);
                b.rx.reset();
                b.tx.reset();
                b.port.activate(activation(0, &[&b.rx, &b.tx], &b.signals)).unwrap();
                b.tx.send(&[(0x2_0000, 5, 0)]);
                b.port.process_queues();
                assert_eq!(b.tx.take_used(), Some((0, 0)));
            }
        }
    }
}
