#![forbid(unsafe_code)]
//! Event loops: one thread each, on which devices handle their doorbells and fds.

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
use crate::sys::lock;

/// What runs on a loop: it names its fds in `init` and is called when one is ready.
///
/// Called on the loop's thread only, one call at a time; it must not block for long, since the other
/// workers of that loop wait. A panic ends the VM with a `DeviceFault`.
pub(crate) trait Worker: MutEventSubscriber + Send + 'static {}

impl<T: MutEventSubscriber + Send + 'static> Worker for T {}

/// One thread that waits for events and calls the workers attached to it.
pub(crate) struct EventLoop {
    calls: Arc<Calls>,
    ending: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
    name: String,
}

type Manager = EventManager<Guarded>;
type Call = Box<dyn FnOnce(&mut Manager) + Send>;

/// What other threads want done on the loop's thread. (event-manager has the like, but the children of a
/// fork inherit its eventfd.)
struct Calls {
    /// `None` once the loop has ended.
    queue: Mutex<Option<Vec<Call>>>,
    bell: EventFd,
}

impl Calls {
    /// Does `f` on the loop's thread and waits for what it returns; `None` when the loop has ended.
    fn call<R: Send + 'static>(&self, f: impl FnOnce(&mut Manager) -> R + Send + 'static) -> Option<R> {
        // An error means that the call was dropped with the queue.
        self.begin(f)?.recv().ok()
    }

    /// The same without waiting: what `f` returns comes later.
    fn begin<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Manager) -> R + Send + 'static,
    ) -> Option<Receiver<R>> {
        let (answer, answered) = channel();
        let call: Call = Box::new(move |manager| drop(answer.send(f(manager))));
        lock(&self.queue).as_mut()?.push(call);
        // Full only when it rings anyway.
        let _ = self.bell.write(1);
        Some(answered)
    }

    fn take(&self) -> Vec<Call> {
        lock(&self.queue).as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn close(&self) {
        *lock(&self.queue) = None;
    }
}

/// Wakes the loop for its calls.
struct Waker(EventFd);

impl MutEventSubscriber for Waker {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0, EventSet::IN)) {
            log::error!("an event loop cannot be woken: {error}");
        }
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
        let waker = Waker(bell.try_clone().map_err(failed)?);
        let mut manager = Manager::new().map_err(|e| failed(to_io(e)))?;
        manager.add_subscriber(Guarded {
            worker: Arc::new(Mutex::new(waker)),
            device: "event loop".into(),
            stop: StopLine::new(|_| ()),
            failed: false,
        });
        let calls = Arc::new(Calls { queue: Mutex::new(Some(Vec::new())), bell });
        let ending = Arc::new(AtomicBool::new(false));
        let (own, seen) = (calls.clone(), ending.clone());
        let thread = spawn(Box::new(move || {
            while !seen.load(Ordering::Acquire) {
                // EINTR cannot be told from worse here; the flag above ends the loop either way.
                if manager.run().is_err() {
                    std::thread::yield_now();
                }
                own.take().into_iter().for_each(|call| call(&mut manager));
            }
            own.close();
        }))?;
        Ok(Arc::new(Self { calls, ending, thread: Mutex::new(Some(thread)), name: name.to_owned() }))
    }

    /// Hands `worker` to the loop's thread; returns when it is being served.
    pub fn attach<W: Worker>(
        self: &Arc<Self>,
        worker: W,
        device: &str,
        stop: &StopLine,
    ) -> Result<Attached<W>> {
        let worker = Arc::new(Mutex::new(worker));
        let subscriber: Arc<Mutex<dyn MutEventSubscriber + Send>> = worker.clone();
        let guarded =
            Guarded { worker: subscriber, device: device.into(), stop: stop.clone(), failed: false };
        let id = self.calls.call(move |manager| manager.add_subscriber(guarded));
        let id = id.ok_or_else(|| self.gone())?;
        Ok(Attached { home: Some((self.clone(), id)), worker })
    }

    /// Does `f` on the loop's thread, before it serves anything else, while the caller goes on. The second
    /// closure waits for what `f` returns. Dropped instead, nothing waits, and the result is dropped over there.
    pub fn meanwhile<R: Send + 'static>(
        self: &Arc<Self>,
        f: impl FnOnce() -> R + Send + 'static,
    ) -> impl FnOnce() -> Result<R> {
        let (own, begun) = (self.clone(), self.calls.begin(move |_| f()));
        move || begun.and_then(|answered| answered.recv().ok()).ok_or_else(|| own.gone())
    }

    /// Ends the thread and waits for it. What was attached is dropped.
    pub fn stop(&self) {
        self.ending.store(true, Ordering::Release);
        let _ = self.calls.bell.write(1);
        if let Some(thread) = lock(&self.thread).take() {
            // A panic was caught inside; joining cannot report anything new.
            let _ = thread.join();
        }
    }

    fn gone(&self) -> Error {
        Error::new(ErrorKind::Internal, format!("event loop '{}' has ended", self.name))
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
    home: Option<(Arc<EventLoop>, SubscriberId)>,
    worker: Arc<Mutex<W>>,
}

impl<W: Worker> Attached<W> {
    /// Takes the worker off its loop: when this returns, it is not running and will not run.
    ///
    /// Waits for the call in progress, so never call it from the loop's own thread.
    pub fn detach(self) -> Result<W> {
        if let Some((event_loop, id)) = self.home {
            // `None`: the loop has ended and dropped its half, and the worker is ours alone all the same.
            drop(event_loop.calls.call(move |manager| manager.remove_subscriber(id)));
        }
        let lost = || Error::new(ErrorKind::Internal, "a worker is still in use after it was detached");
        let mutex = Arc::into_inner(self.worker).ok_or_else(lost)?;
        Ok(mutex.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Runs `f` on the worker between two calls of the loop.
    #[cfg(any(test, feature = "internals"))]
    pub fn with<R>(&self, f: impl FnOnce(&mut W) -> R) -> R {
        f(&mut lock(&self.worker))
    }
}

/// A worker whose panic ends its VM and nothing else.
struct Guarded {
    worker: Arc<Mutex<dyn MutEventSubscriber + Send>>,
    device: Arc<str>,
    stop: StopLine,
    failed: bool,
}

impl Guarded {
    fn call(&mut self, f: impl FnOnce(&mut (dyn MutEventSubscriber + Send))) {
        if self.failed {
            return;
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| f(&mut *lock(&self.worker)))) {
            self.failed = true;
            let why = format!("panicked: {}", panic_text(&*panic));
            self.stop.pull(StopCause::DeviceFault { device: self.device.to_string(), why });
        }
    }
}

impl MutEventSubscriber for Guarded {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.call(|w| w.process(events, ops));
        if self.failed {
            // Level-triggered: nobody will drain it any more, so stop listening.
            let _ = ops.remove(events);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.call(|w| w.init(ops));
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

    impl MutEventSubscriber for Echo {
        fn process(&mut self, _: Events, _: &mut EventOps) {
            assert!(!self.panics, "as the test wants");
            let _ = self.heard.send(self.bell.read().unwrap());
        }
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.bell, EventSet::IN)).unwrap();
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
