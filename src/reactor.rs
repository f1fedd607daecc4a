#![forbid(unsafe_code)]
//! Event loops, on which devices handle their doorbells and fds: each with a thread, or turned by the embedder.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::{Error, ErrorKind, Result};
use crate::events::{StopCause, StopLine};
use crate::sys::{fd, lock, log};
pub use dispatcher::Dispatcher;
use dispatcher::Mirror;

mod dispatcher;
pub(crate) mod own;

/// What runs on a loop.
///
/// Called by one thread at a time; it must not block for long, since the other workers of that loop wait. A
/// panic ends the VM with a `DeviceFault`.
pub(crate) trait Worker: Send + 'static {
    /// Names the fds that it wants to hear of. Called once, before anything else.
    fn init(&mut self, watch: &mut Watch);

    /// One of them is ready.
    fn process(&mut self, events: Events, watch: &mut Watch);
}

/// A worker's entries in its loop's epoll set.
pub(crate) struct Watch<'a, 'b> {
    ops: &'a mut EventOps<'b>,
    mirror: Option<&'a mut Mirror>,
    leaving: &'a Leaving,
}

/// Set as soon as somebody wants a worker back: one that has much to do looks at it, and returns early.
#[derive(Clone, Default)]
pub(crate) struct Leaving(Arc<AtomicBool>);

impl Leaving {
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Watch<'_, '_> {
    pub fn leaving(&self) -> Leaving {
        self.leaving.clone()
    }

    pub fn add(&mut self, events: Events) -> Result<(), event_manager::Error> {
        self.ops.add(events)?;
        let mirrored = self.mirror.as_mut().map_or(Ok(()), |mirror| mirror.add(&events));
        // Heard of in both sets or in none.
        mirrored.inspect_err(|_| drop(self.ops.remove(events)))
    }

    pub fn modify(&mut self, events: Events) -> Result<(), event_manager::Error> {
        self.ops.modify(events)?;
        self.mirror.as_mut().map_or(Ok(()), |mirror| mirror.modify(&events))
    }

    pub fn remove(&mut self, events: Events) -> Result<(), event_manager::Error> {
        if let Some(mirror) = &mut self.mirror {
            mirror.remove(events.fd());
        }
        self.ops.remove(events)
    }
}

/// What waits for events and calls the workers attached to it.
pub(crate) enum EventLoop {
    /// One thread of its own.
    Thread(LoopThread),
    /// The embedder turns it.
    Caller(Dispatcher),
}

pub(crate) struct LoopThread {
    calls: Arc<Calls>,
    ending: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
    name: String,
}

type Manager = EventManager<Guarded>;
type Call = Box<dyn FnOnce(&mut Manager) + Send>;
/// What a call returned, or its panic, which ends nothing but the call.
type Answer<R> = Receiver<std::thread::Result<R>>;

impl LoopThread {
    /// Waits for what a call came to.
    fn answer<R>(&self, begun: Option<Answer<R>>) -> Result<R> {
        let failed =
            |what: &str| Error::new(ErrorKind::Internal, format!("event loop '{}' {what}", self.name));
        // None comes where the call was dropped with the queue.
        match begun.and_then(|answered| answered.recv().ok()) {
            Some(Ok(done)) => Ok(done),
            Some(Err(panic)) => Err(failed(&format!("panicked: {}", panic_text(&*panic)))),
            None => Err(failed("has ended")),
        }
    }
}

/// What other threads want done on the loop's thread. (event-manager has the like, but the children of a
/// fork inherit its eventfd.)
struct Calls {
    /// `None` once the loop has ended.
    queue: Mutex<Option<Vec<Call>>>,
    bell: EventFd,
}

impl Calls {
    /// Does `f` on the loop's thread, some time: what it returns comes later. `None` when the loop has ended.
    fn begin<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Manager) -> R + Send + 'static,
    ) -> Option<Answer<R>> {
        let (answer, answered) = channel();
        let call: Call = Box::new(move |manager| {
            let _ = answer.send(catch_unwind(AssertUnwindSafe(|| f(manager))));
        });
        lock(&self.queue).as_mut()?.push(call);
        // Full only when it rings anyway.
        fd::ring(&self.bell);
        Some(answered)
    }

    fn take(&self) -> Vec<Call> {
        lock(&self.queue).as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn close(&self) {
        *lock(&self.queue) = None;
    }
}

/// Wakes the loop for its calls. What registering it came to is kept: a loop that cannot be woken is none.
struct Waker(EventFd, Arc<Mutex<Option<event_manager::Error>>>);

impl Worker for Waker {
    fn process(&mut self, _: Events, _: &mut Watch) {
        let _ = self.0.read();
    }

    fn init(&mut self, watch: &mut Watch) {
        *lock(&self.1) = watch.add(Events::new(&self.0, EventSet::IN)).err();
    }
}

impl EventLoop {
    /// Starts the thread. `spawn` makes it: the VM's own way, with signals blocked and hooks called.
    pub fn start(
        name: &str,
        spawn: impl FnOnce(Box<dyn FnOnce() + Send>) -> Result<JoinHandle<()>>,
    ) -> Result<Arc<Self>> {
        let failed = |e: io::Error| Error::os(format!("creating event loop '{name}'"), e);
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?;
        let unwatched = Arc::default();
        let waker = Waker(bell.try_clone().map_err(failed)?, Arc::clone(&unwatched));
        let mut manager = Manager::new().map_err(|e| failed(to_io(e)))?;
        manager.add_subscriber(Guarded {
            worker: Arc::new(Mutex::new(waker)),
            device: "event loop".into(),
            stop: StopLine::new(|_| ()),
            failed: false,
            mirror: None,
            leaving: Leaving::default(),
        });
        if let Some(error) = lock(&unwatched).take() {
            return Err(failed(to_io(error)));
        }
        let calls = Arc::new(Calls { queue: Mutex::new(Some(Vec::new())), bell });
        let ending = Arc::new(AtomicBool::new(false));
        let (own, seen) = (calls.clone(), ending.clone());
        let thread = spawn(Box::new(move || {
            while !seen.load(Ordering::Acquire) {
                // An interruption is none of the errors. The flag above ends the loop either way.
                if manager.run().is_err() {
                    std::thread::yield_now();
                }
                own.take().into_iter().for_each(|call| call(&mut manager));
            }
            own.close();
        }))?;
        let thread = Mutex::new(Some(thread));
        Ok(Arc::new(Self::Thread(LoopThread { calls, ending, thread, name: name.to_owned() })))
    }

    /// One that has no thread.
    pub fn turned_by(dispatcher: &Dispatcher) -> Arc<Self> {
        Arc::new(Self::Caller(dispatcher.clone()))
    }

    /// Hands `worker` to the loop; returns when it is being served.
    pub fn attach<W: Worker>(
        self: &Arc<Self>,
        worker: W,
        device: &str,
        stop: &StopLine,
    ) -> Result<Attached<W>> {
        if self.is_turned_here() {
            let why = "a callback that dispatch() calls cannot add devices to its dispatcher";
            return Err(Error::new(ErrorKind::InvalidState, why));
        }
        let worker = Arc::new(Mutex::new(worker));
        let subscriber: Arc<Mutex<dyn Worker>> = worker.clone();
        let mirror = match &**self {
            Self::Thread(_) => None,
            Self::Caller(dispatcher) => Some(dispatcher.0.mirror()),
        };
        let (device, stop) = (device.into(), stop.clone());
        let leaving = Leaving::default();
        let guarded =
            Guarded { worker: subscriber, device, stop, failed: false, mirror, leaving: leaving.clone() };
        let id = self.call(move |manager| manager.add_subscriber(guarded))?;
        Ok(Attached { home: Some((self.clone(), id, leaving)), worker })
    }

    /// Whether it calls its workers on the calling thread right now, so that waiting for it would never end.
    pub fn is_turned_here(&self) -> bool {
        matches!(self, Self::Caller(dispatcher) if dispatcher.0.is_turned_here())
    }

    /// Whether the embedder turns it.
    pub fn is_callers(&self) -> bool {
        matches!(self, Self::Caller(_))
    }

    /// Does `f` between two turns and waits for what it returns.
    fn call<R: Send + 'static>(&self, f: impl FnOnce(&mut Manager) -> R + Send + 'static) -> Result<R> {
        match self {
            Self::Thread(own) => own.answer(own.calls.begin(f)),
            Self::Caller(dispatcher) => Ok(dispatcher.0.call(f)),
        }
    }

    /// Does `f` on the loop's thread, before it serves anything else, while the caller goes on. The second
    /// closure waits for what `f` returns. Dropped instead, nothing waits, and the result is dropped over there.
    /// A loop without a thread does it when it is asked for.
    pub fn meanwhile<'a, R: Send + 'static>(
        &'a self,
        f: impl FnOnce() -> R + Send + 'static,
    ) -> Box<dyn FnOnce() -> Result<R> + 'a> {
        match self {
            Self::Thread(own) => {
                let begun = own.calls.begin(move |_| f());
                Box::new(move || own.answer(begun))
            }
            Self::Caller(_) => Box::new(move || Ok(f())),
        }
    }

    /// Does `f` on the loop's thread, some time. A loop without one does nothing. Nobody hears of its panic.
    pub fn tell(&self, f: impl FnOnce() + Send + 'static) {
        if let Self::Thread(own) = self {
            drop(own.calls.begin(move |_| f()));
        }
    }

    /// Ends the thread and waits for it. What was attached is dropped.
    pub fn stop(&self) {
        let Self::Thread(own) = self else { return };
        own.ending.store(true, Ordering::Release);
        fd::ring(&own.calls.bell);
        if let Some(thread) = lock(&own.thread).take() {
            // A panic was caught inside; joining cannot report anything new.
            let _ = thread.join();
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Where a device's workers run.
#[derive(Clone)]
pub(crate) enum Place {
    /// On that loop; a panic there pulls the stop line.
    Loop(Arc<EventLoop>, StopLine),
    /// Nowhere by themselves: the caller drives them through [`Attached::with`] (fuzzing, benches and
    /// in-process drivers, which want no threads).
    #[cfg_attr(
        not(any(test, feature = "internals")),
        allow(dead_code, reason = "drivers without threads use it")
    )]
    Caller,
}

impl Place {
    /// Says whether its VM is coming to its end. Where there is none, nobody could say so: always. For what [`run`](Self::run) does it has
    /// no loop, whose thread must not be the last to have it.
    pub fn ending(&self) -> impl Fn() -> bool + Send + use<> {
        let stop = match self {
            Self::Loop(_, stop) => Some(stop.clone()),
            Self::Caller => None,
        };
        move || stop.as_ref().is_none_or(StopLine::is_pulled)
    }

    /// Does `f` on the thread that calls its workers, where that is the VM's, and waits for what it returns.
    pub fn run<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> Result<R> {
        self.meanwhile(f)()
    }

    /// The same, while the caller goes on: the second closure waits.
    pub fn meanwhile<'a, R: Send + 'static>(
        &'a self,
        f: impl FnOnce() -> R + Send + 'static,
    ) -> Box<dyn FnOnce() -> Result<R> + 'a> {
        match self {
            Self::Loop(event_loop, _) => event_loop.meanwhile(f),
            Self::Caller => Box::new(move || Ok(f())),
        }
    }

    /// What was to be done there for `device` has failed, which is a defect: it ends the VM.
    pub fn fault(&self, device: &str, error: &Error) {
        log::warn!("{device}: {error}");
        if let Self::Loop(_, stop) = self {
            stop.pull(StopCause::DeviceFault { device: device.to_owned(), why: error.to_string() });
        }
    }

    /// Hands `worker` to its place.
    pub fn attach<W: Worker>(&self, worker: W, device: &str) -> Result<Attached<W>> {
        match self {
            Self::Loop(event_loop, stop) => event_loop.attach(worker, device, stop),
            Self::Caller => Ok(Attached { home: None, worker: Arc::new(Mutex::new(worker)) }),
        }
    }
}

/// A worker in its place. Detaching it gives it back, with everything that it owns.
pub(crate) struct Attached<W> {
    home: Option<(Arc<EventLoop>, SubscriberId, Leaving)>,
    worker: Arc<Mutex<W>>,
}

impl<W: Worker> Attached<W> {
    /// Takes the worker off its loop: when this returns, it is not running and will not run.
    ///
    /// Waits for the call in progress, so never call it from the loop's own thread.
    pub fn detach(self) -> Result<W> {
        if let Some((event_loop, id, leaving)) = self.home {
            leaving.0.store(true, Ordering::Relaxed);
            // An error: the loop has ended and dropped its half, and the worker is ours alone all the same.
            drop(event_loop.call(move |manager| manager.remove_subscriber(id)));
        }
        let lost = || Error::new(ErrorKind::Internal, "a worker is still in use after it was detached");
        let mutex = Arc::into_inner(self.worker).ok_or_else(lost)?;
        Ok(mutex.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// The worker, for another one that has something to tell it between its turns. Given up before it is detached.
    pub fn handle(&self) -> Arc<Mutex<W>> {
        self.worker.clone()
    }

    #[cfg(test)]
    pub fn leaving(&self) -> Option<Leaving> {
        self.home.as_ref().map(|(_, _, leaving)| leaving.clone())
    }

    /// Runs `f` on the worker between two calls of the loop.
    pub fn with<R>(&self, f: impl FnOnce(&mut W) -> R) -> R {
        f(&mut lock(&self.worker))
    }
}

/// A worker whose panic ends its VM and nothing else.
struct Guarded {
    worker: Arc<Mutex<dyn Worker>>,
    device: Arc<str>,
    stop: StopLine,
    failed: bool,
    /// Its fds in a dispatcher's set.
    mirror: Option<Mirror>,
    leaving: Leaving,
}

impl Guarded {
    fn call(&mut self, ops: &mut EventOps, f: impl FnOnce(&mut dyn Worker, &mut Watch)) {
        if self.failed {
            return;
        }
        // A loop's own thread is the VM's anyway.
        let _inside = self.mirror.is_some().then(|| own::enter(self.stop.vm()));
        let mut watch = Watch { ops, mirror: self.mirror.as_mut(), leaving: &self.leaving };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| f(&mut *lock(&self.worker), &mut watch))) {
            self.failed = true;
            let why = format!("panicked: {}", panic_text(&*panic));
            self.stop.pull(StopCause::DeviceFault { device: self.device.to_string(), why });
        }
    }
}

impl MutEventSubscriber for Guarded {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.call(ops, |worker, watch| worker.process(events, watch));
        if self.failed {
            // Level-triggered: nobody will drain it any more, so stop listening.
            let _ = Watch { ops, mirror: self.mirror.as_mut(), leaving: &self.leaving }.remove(events);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.call(ops, |worker, watch| worker.init(watch));
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

fn to_io(error: event_manager::Error) -> io::Error {
    match error {
        event_manager::Error::Epoll(errno) => io::Error::from_raw_os_error(errno.errno()),
        other => io::Error::other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Sender;
    use std::time::Duration;

    use super::*;

    struct Echo {
        bell: EventFd,
        heard: Sender<u64>,
        panics: bool,
    }

    impl Worker for Echo {
        fn process(&mut self, _: Events, _: &mut Watch) {
            assert!(!self.panics, "as the test wants");
            let _ = self.heard.send(self.bell.read().unwrap());
        }
        fn init(&mut self, watch: &mut Watch) {
            watch.add(Events::new(&self.bell, EventSet::IN)).unwrap();
        }
    }

    fn start() -> Arc<EventLoop> {
        EventLoop::start("test", |f| Ok(std::thread::spawn(f))).unwrap()
    }

    #[test]
    fn a_call_meanwhile_waits_for_nobody_until_it_is_asked_for() {
        let event_loop = start();
        let (go, gone) = channel();
        let caller = std::thread::current().id();
        let finish = event_loop.meanwhile(move || {
            let told = gone.recv_timeout(Duration::from_secs(10)).is_ok();
            (told, std::thread::current().id() != caller)
        });
        // Not reached before the call has ended, had it been waited for.
        go.send(()).unwrap();
        assert_eq!(finish().unwrap(), (true, true), "(told by its caller, on another thread)");
        event_loop.stop();
        assert!(event_loop.meanwhile(|| ())().is_err(), "the loop has ended");
    }

    #[test]
    fn a_call_that_panics_fails_and_the_loop_goes_on() {
        let event_loop = start();
        let failed = event_loop.meanwhile(|| panic!("as the test wants"))().unwrap_err();
        assert_eq!(failed.to_string(), "event loop 'test' panicked: as the test wants");
        event_loop.tell(|| panic!("nobody hears"));
        assert_eq!(event_loop.meanwhile(|| 3)().unwrap(), 3, "the next one is served");
        event_loop.stop();
        let gone = event_loop.meanwhile(|| ())().unwrap_err();
        assert_eq!(gone.to_string(), "event loop 'test' has ended");
    }

    #[test]
    fn a_worker_is_called_then_given_back() {
        let (heard, hears) = channel();
        let (bell, ring) = {
            let bell = EventFd::new(EFD_NONBLOCK).unwrap();
            (bell.try_clone().unwrap(), bell)
        };
        let event_loop = start();
        let stop = StopLine::new(|cause| panic!("{cause}"));
        let attached = event_loop.attach(Echo { bell, heard, panics: false }, "echo", &stop).unwrap();
        ring.write(3).unwrap();
        assert_eq!(hears.recv_timeout(Duration::from_secs(10)), Ok(3));
        let echo = attached.detach().unwrap();
        ring.write(4).unwrap();
        assert_eq!(echo.bell.read().unwrap(), 4, "nobody but us reads it now");
        event_loop.stop();
    }

    #[test]
    fn a_panic_pulls_the_stop_line_and_the_loop_goes_on() {
        let (heard, hears) = channel();
        let (causes, cause) = channel();
        let stop = StopLine::new(move |c| causes.send(c).unwrap());
        let event_loop = start();
        let bad = EventFd::new(EFD_NONBLOCK).unwrap();
        let good = EventFd::new(EFD_NONBLOCK).unwrap();
        let echo =
            |bell: &EventFd, panics| Echo { bell: bell.try_clone().unwrap(), heard: heard.clone(), panics };
        let first = event_loop.attach(echo(&bad, true), "bad", &stop).unwrap();
        let _second = event_loop.attach(echo(&good, false), "good", &stop).unwrap();
        bad.write(1).unwrap();
        let cause = cause.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(
            cause,
            StopCause::DeviceFault { device: "bad".into(), why: "panicked: as the test wants".into() }
        );
        good.write(9).unwrap();
        assert_eq!(hears.recv_timeout(Duration::from_secs(10)), Ok(9));
        first.detach().unwrap();
    }
}
