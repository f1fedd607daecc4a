#![forbid(unsafe_code)]
//! Serving one queue on a loop, chain after chain: all that a small device needs.

use std::os::fd::AsRawFd;

use event_manager::{EventSet, Events};

use super::Signals;
use super::queue::{Chain, Next, Queue, QueueFault};
use crate::memory::Memory;
use crate::reactor::{Watch, Worker};

/// What a device does with a chain.
pub(super) trait Serve: Send + 'static {
    /// Does what the chain says, and hands it back.
    fn serve(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
        chain: &Chain,
        signals: &Signals,
    ) -> Result<Next, QueueFault>;
}

/// A queue, and who serves it.
pub(super) struct Server<S> {
    pub queue: Queue,
    memory: Memory,
    signals: Signals,
    chain: Chain,
    serve: S,
    broken: bool,
}

impl<S: Serve> Server<S> {
    pub fn new(queue: Queue, memory: Memory, signals: Signals, serve: S) -> Self {
        let chain = Chain::with_capacity(queue.max_size());
        Self { queue, memory, signals, chain, serve, broken: false }
    }

    /// One wake-up's work.
    pub fn process_queue(&mut self) {
        if self.broken {
            return;
        }
        let Self { queue, memory, signals, chain, serve, .. } = self;
        let drained = queue.drain(memory, chain, |queue, chain| serve.serve(queue, memory, chain, signals));
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
}

impl<S: Serve> Worker for Server<S> {
    fn init(&mut self, ops: &mut Watch) {
        if let Err(error) = ops.add(Events::new(self.queue.doorbell(), EventSet::IN)) {
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
