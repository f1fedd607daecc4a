#![forbid(unsafe_code)]
//! Serves a card's two queues and its backend on one loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use event_manager::{EventSet, Events};
use vmm_sys_util::timerfd::TimerFd;

use super::rx::{Overflow, Received, Rx};
use super::tx::{Sent, Tx, report};
use super::vhost::Vhost;
use crate::memory::Memory;
use crate::net::NetBackend;
use crate::reactor::{self, Watch};
use crate::sys::{fd, log};
use crate::virtio::Signals;
use crate::virtio::queue::{Queue, QueueFault};

/// How often a backend that is gone is looked for.
const RETRY: Duration = Duration::from_secs(1);

pub(super) struct Worker {
    rx: Rx,
    tx: Tx,
    memory: Memory,
    signals: Signals,
    backend: Box<dyn NetBackend>,
    /// The kernel's half, which serves instead of us where it may.
    vhost: Option<Vhost>,
    /// The driver uses this pair.
    active: bool,
    link: Link,
    /// What the backend's fd is to wake us for.
    wants: EventSet,
    /// What it is registered for.
    watched: Option<(RawFd, EventSet)>,
    /// The doorbells are registered.
    hears: bool,
    timers: Timers,
    /// How long until a limit lets a frame pass.
    limited: Option<Duration>,
    broken: bool,
}

/// What it serves a pair with, which outlives it.
pub(super) struct Parts {
    pub backend: Box<dyn NetBackend>,
    pub vhost: Option<Vhost>,
}

/// What wakes it besides its descriptors.
pub(super) struct Timers {
    /// To look for a backend that is gone.
    pub retry: TimerFd,
    /// When a limit lets the next frame pass.
    pub limit: TimerFd,
}

/// How long a limit is waited for at most: it may be changed.
const LOOK: Duration = Duration::from_millis(100);

/// Whether there is anybody at the other side.
enum Link {
    Up,
    Gone { look: Instant },
}

impl Worker {
    pub fn new(
        rx: Rx,
        tx: Tx,
        memory: Memory,
        signals: Signals,
        Parts { backend, vhost }: Parts,
        timers: Timers,
    ) -> Self {
        Self {
            rx,
            tx,
            memory,
            signals,
            backend,
            vhost,
            active: true,
            link: Link::Up,
            wants: EventSet::empty(),
            watched: None,
            hears: false,
            timers,
            limited: None,
            broken: false,
        }
    }

    /// The driver begins to use this pair, or ends. What it sends meanwhile is dropped.
    pub fn set_active(&mut self, active: bool) {
        self.backend.set_active(active);
        self.begin(active);
    }

    /// The same, of which the network knows.
    pub fn begin(&mut self, active: bool) {
        self.active = active;
        self.stop_kernel();
        // Its own loop looks at everything again.
        self.rx.queue.rearm();
        if let Some(vhost) = &self.vhost {
            fd::ring(&vhost.changes);
        }
    }

    /// One wake-up's work, both ways.
    pub fn process_queues(&mut self) {
        if self.broken {
            return;
        }
        if self.kernel_serves() {
            self.wants = EventSet::empty();
            return;
        }
        let served = self.receive().and_then(|()| self.send());
        self.rx.queue.notify(&self.memory);
        self.tx.queue.notify(&self.memory);
        self.set_limit_timer();
        if let Err(fault) = served {
            self.broken = true;
            self.wants = EventSet::empty();
            // No frame is to come into the buffers of a driver that has to begin anew.
            self.rx.let_go(&self.memory, &*self.backend);
            self.signals.needs_reset(fault);
        }
    }

    /// Has the network begin nothing more in buffers of the driver's: whether nothing that was begun is left.
    pub fn drain(&mut self) -> bool {
        self.rx.drain(&*self.backend)
    }

    /// The pause that was near does not come.
    pub fn go_on(&mut self) {
        self.rx.draining = false;
        self.rx.queue.rearm();
    }

    /// Gives everything back, in the order of the queues.
    pub fn finish(mut self) -> ([Queue; 2], Parts, Overflow) {
        self.stop_kernel();
        self.rx.let_go(&self.memory, &*self.backend);
        let Self { rx, tx, backend, vhost, .. } = self;
        ([rx.queue, tx.queue], Parts { backend, vhost }, rx.overflow)
    }

    /// Whether the kernel serves the pair: brings that in line with what may be.
    fn kernel_serves(&mut self) -> bool {
        let can = self.vhost.as_ref().is_some_and(|vhost| vhost.can_serve(&*self.backend));
        let may = can && self.active && self.rx.may_pass() && self.find_backend();
        let Some(vhost) = &mut self.vhost else { return false };
        if may && !vhost.serves() {
            self.rx.let_go(&self.memory, &*self.backend);
        }
        vhost.turn(may, [&mut self.rx.queue, &mut self.tx.queue], &*self.backend)
    }

    fn stop_kernel(&mut self) {
        if let Some(vhost) = &mut self.vhost {
            vhost.stop([&mut self.rx.queue, &mut self.tx.queue]);
        }
    }

    /// Whether that is one of the kernel's half, which has something to say.
    fn hear_kernel(&mut self, fd: RawFd) -> bool {
        let Some(vhost) = &mut self.vhost else { return false };
        if !vhost.fds().contains(&fd) {
            return false;
        }
        // Either may ring, whichever this turn is for.
        let _ = vhost.changes.read();
        let failed = vhost.errors.read().is_ok();
        if !vhost.serves() {
            // Rung before it was stopped. A timer that has run out would ring on.
            let _ = vhost.look.clear();
            return true;
        }
        vhost.look_later();
        // It sees no difference between an interface that is gone and a queue that it cannot read.
        if self.backend.is_gone() {
            self.gone(&io::Error::from_raw_os_error(libc::ENETDOWN));
        } else if failed {
            vhost.fail(&"it has found a queue malformed, or memory missing");
        }
        true
    }

    fn receive(&mut self) -> Result<(), QueueFault> {
        self.wants = EventSet::empty();
        if !self.active || !self.find_backend() {
            return Ok(());
        }
        match self.rx.run(&self.memory, &mut *self.backend)? {
            Received::NoBuffers => {}
            Received::NoFrames => self.wants |= EventSet::IN,
            Received::Limited(wait) => self.wait(wait),
            Received::Gone(error) => self.gone(&error),
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), QueueFault> {
        let backend = match self.link {
            Link::Up if self.active => Some(&mut *self.backend),
            _ => None,
        };
        match self.tx.run(&self.memory, backend, &self.signals)? {
            Sent::All => {}
            Sent::Share => self.tx.queue.rearm(),
            Sent::NoRoom => self.wants |= EventSet::OUT,
            Sent::Limited(wait) => self.wait(wait),
        }
        if std::mem::take(&mut self.tx.failed) && self.backend.is_gone() {
            self.wants = EventSet::empty();
            self.look_later();
        }
        Ok(())
    }

    /// Whether the backend is there; looks for it from time to time when it was not.
    fn find_backend(&mut self) -> bool {
        match self.link {
            Link::Up => true,
            Link::Gone { look } if Instant::now() < look => false,
            Link::Gone { .. } => match self.backend.reopen() {
                Ok(()) => {
                    self.link = Link::Up;
                    true
                }
                Err(error) => {
                    log::debug!("{error}");
                    self.look_later();
                    false
                }
            },
        }
    }

    fn gone(&mut self, error: &io::Error) {
        report(&self.signals, error);
        self.wants = EventSet::empty();
        self.look_later();
    }

    /// A limit lets the next frame pass after that time.
    fn wait(&mut self, wait: Duration) {
        self.limited = Some(self.limited.map_or(wait, |other| other.min(wait)));
    }

    fn set_limit_timer(&mut self) {
        let Some(wait) = self.limited.take() else { return };
        if let Err(error) = self.timers.limit.reset(wait.clamp(Duration::from_micros(1), LOOK), None) {
            log::error!("setting a timer: {error}");
        }
    }

    fn look_later(&mut self) {
        self.link = Link::Gone { look: Instant::now() + RETRY };
        // Fails for invalid times only. A little later than the instant, so that it has passed.
        let _ = self.timers.retry.reset(RETRY + Duration::from_millis(1), None);
    }

    /// Hears the doorbells unless the kernel does.
    fn watch_doorbells(&mut self, ops: &mut Watch) {
        let wanted = !self.vhost.as_ref().is_some_and(Vhost::serves);
        if std::mem::replace(&mut self.hears, wanted) == wanted {
            return;
        }
        for bell in [&self.rx.queue, &self.tx.queue].map(|queue| queue.doorbell().as_raw_fd()) {
            let bell = Events::new_raw(bell, EventSet::IN);
            let done = if wanted { ops.add(bell) } else { ops.remove(bell) };
            if let Err(error) = done {
                return self.unwatchable(error);
            }
        }
    }

    /// Brings the loop's registration in line with what is wanted. What wants nothing is not registered
    /// at all: epoll reports errors unasked, for ever.
    fn watch(&mut self, ops: &mut Watch) {
        self.watch_doorbells(ops);
        let fd = self.backend.fd().as_raw_fd();
        let wanted = (!self.wants.is_empty()).then_some((fd, self.wants));
        if wanted == self.watched {
            return;
        }
        let done = match (self.watched, wanted) {
            (Some((old, _)), Some((new, set))) if old == new => ops.modify(Events::new_raw(new, set)),
            (old, new) => {
                if let Some((old, set)) = old {
                    // It may have been closed, and so be gone from the set already.
                    let _ = ops.remove(Events::new_raw(old, set));
                }
                new.map_or(Ok(()), |(new, set)| ops.add(Events::new_raw(new, set)))
            }
        };
        self.watched = wanted;
        if let Err(error) = done {
            self.unwatchable(error);
        }
    }

    fn unwatchable(&mut self, error: event_manager::Error) {
        self.broken = true;
        self.stop_kernel();
        self.rx.let_go(&self.memory, &*self.backend);
        self.signals.needs_reset(format_args!("the host cannot watch its descriptors: {error}"));
    }
}

impl reactor::Worker for Worker {
    fn init(&mut self, ops: &mut Watch) {
        let timers = [self.timers.retry.as_raw_fd(), self.timers.limit.as_raw_fd()];
        let kernel = self.vhost.iter().flat_map(Vhost::fds);
        for fd in kernel.chain(timers).collect::<Vec<_>>() {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                return self.unwatchable(error);
            }
        }
        self.watch_doorbells(ops);
        // What waits already may have been announced before we listened.
        self.rx.queue.rearm();
    }

    fn process(&mut self, events: Events, ops: &mut Watch) {
        let fd = events.fd();
        if self.hear_kernel(fd) {
            // The kernel goes on, or we do.
        } else if fd == self.rx.queue.doorbell().as_raw_fd() {
            self.rx.queue.silence();
        } else if fd == self.tx.queue.doorbell().as_raw_fd() {
            self.tx.queue.silence();
        } else if fd == self.timers.limit.as_raw_fd() {
            let _ = self.timers.limit.clear();
        } else if fd == self.timers.retry.as_raw_fd() {
            // A doorbell of the same turn may have set it anew: then there is nothing to read, and the loop
            // would sleep until there is.
            if !matches!(self.link, Link::Gone { look } if Instant::now() < look) {
                let _ = self.timers.retry.wait();
            }
        } else if events.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP)
            && matches!(self.link, Link::Up)
            && self.active
        {
            self.gone(&io::Error::from_raw_os_error(libc::ENETDOWN));
        }
        self.process_queues();
        self.watch(ops);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::config::{MacAddress, NetConfig};
    use crate::events::StopLine;
    use crate::net::Offloads;
    use crate::net::pair::Pair;
    use crate::reactor::{Dispatcher, EventLoop};
    use crate::virtio::net::control::Control;
    use crate::virtio::net::rx::Overflow;
    use crate::virtio::queue_driver::{Driver, signals};

    #[test]
    fn a_doorbell_and_the_timer_in_one_turn_do_not_put_the_loop_to_sleep() {
        let memory = Memory::new(1 << 20).unwrap();
        let (near, far) = (Driver::new(&memory, 0x4000, 16), Driver::new(&memory, 0xc000, 16));
        let mac = MacAddress([2, 0, 0, 0, 0, 1]);
        let control = Arc::new(Control::new("net0", mac, &NetConfig::attached(), None));
        let rx = Rx::new(near.queue(), false, Offloads::empty(), Overflow::default(), (control.clone(), 0));
        let (backend, pair) = Pair::new();
        pair.errno.store(libc::EBADFD, Ordering::SeqCst);
        let timers = Timers { retry: TimerFd::new().unwrap(), limit: TimerFd::new().unwrap() };
        let mut worker = Worker::new(
            rx,
            Tx::new(far.queue(), Offloads::empty(), (control, 0)),
            memory,
            signals("net0").0,
            Parts { backend: Box::new(backend), vhost: None },
            timers,
        );
        worker.link = Link::Gone { look: Instant::now() };
        let dispatcher = Dispatcher::new().unwrap();
        let stop = StopLine::new(|cause| panic!("{cause}"));
        let worker = EventLoop::turned_by(&dispatcher).attach(worker, "net0", &stop).unwrap();
        // The doorbell, which activation rings, is first in the turn; then the timer.
        worker.with(|worker| worker.timers.retry.reset(Duration::from_millis(1), None).unwrap());
        std::thread::sleep(Duration::from_millis(20));
        dispatcher.dispatch().unwrap();
        // Who waited for the timer has slept until it ran out, and looked once more.
        assert_eq!(pair.looks.load(Ordering::SeqCst), 1);
    }
}
