#![forbid(unsafe_code)]
//! The thread that answers for those in the sandbox: a call that their filters refuse comes here, and fails. It does nothing else, and
//! takes no memory and frees none: whoever waits for it may hold the allocator's lock.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::threads::Duty;
use crate::error::{Error, Result};
use crate::events::StopCause;
use crate::sys::lock;
use crate::sys::seccomp::{self, Notice, Peek};

/// What becomes of a call that a filter did not let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is made all the same.
    #[cfg_attr(not(feature = "internals"), expect(dead_code, reason = "the project's tests learn so"))]
    Passes,
    /// It fails, and nothing else comes of it.
    Fails,
    /// It fails, and the VM ends.
    Violates,
}

/// What a thread does.
pub(crate) type Body = Box<dyn FnOnce() + Send>;

/// Allocates nothing.
pub(crate) type Judge = fn(Duty, &Notice, &Peek) -> Verdict;

/// The thread.
pub(super) struct Answers {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// One listener comes at a time.
    coming: Mutex<()>,
}

struct Shared {
    epoll: Epoll,
    bell: EventFd,
    ending: AtomicBool,
    listeners: Mutex<Vec<Arc<Listener>>>,
    judge: Judge,
    peek: Peek,
}

/// The bell's, in the epoll set; the others are the listeners' places.
const BELL: u64 = u64::MAX;

impl Answers {
    pub fn start(judge: Judge, spawn: impl FnOnce(Body) -> Result<JoinHandle<()>>) -> Result<Self> {
        let failed = |what: &str, e| Error::os(format!("sandbox: creating {what}"), e);
        let epoll = Epoll::new().map_err(|e| failed("an epoll set", e))?;
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| failed("an eventfd", e))?;
        let event = EpollEvent::new(EventSet::IN, BELL);
        epoll.ctl(ControlOperation::Add, bell.as_raw_fd(), event).map_err(|e| failed("an epoll set", e))?;
        let peek = Peek::new().map_err(|e| failed("a pipe", e))?;
        let (ending, listeners) = (AtomicBool::new(false), Mutex::default());
        let shared = Arc::new(Shared { epoll, bell, ending, listeners, judge, peek });
        let own = shared.clone();
        let thread = spawn(Box::new(move || own.serve()))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)), coming: Mutex::default() })
    }

    /// From here on it answers for that thread.
    pub fn hear(&self, listener: Listener) -> std::io::Result<()> {
        let fd = listener.notices.as_raw_fd();
        let _one = lock(&self.coming);
        // Made, and given back, while nobody has to wait for the lock: the thread that answers would.
        let place = lock(&self.shared.listeners).len();
        let mut more = Vec::with_capacity(place + 1);
        let listener = Arc::new(listener);
        let mut known = lock(&self.shared.listeners);
        more.append(&mut known);
        more.push(listener);
        std::mem::swap(&mut *known, &mut more);
        drop(known);
        let event = EpollEvent::new(EventSet::IN, place as u64);
        self.shared.epoll.ctl(ControlOperation::Add, fd, event).inspect_err(|_| {
            // Closed: where nobody can hear them, the calls fail by themselves.
            let unheard = lock(&self.shared.listeners).pop();
            drop(unheard);
        })
    }

    /// Ends the thread and waits for it.
    pub fn stop(&self) {
        self.shared.ending.store(true, Ordering::Release);
        ring(&self.shared.bell);
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn serve(&self) {
        let mut events = [EpollEvent::default(); 8];
        while !self.ending.load(Ordering::Acquire) {
            // An interruption is a wake-up like any other.
            let count = self.epoll.wait(-1, &mut events).unwrap_or(0);
            for event in events.iter().take(count) {
                // Not the last that has it: those who listen stay until this thread has ended.
                let listener = lock(&self.listeners).get(event.data() as usize).cloned();
                if let Some(listener) = listener {
                    self.answer(&listener, event.event_set());
                }
            }
        }
    }

    fn answer(&self, listener: &Listener, events: EventSet) {
        let Listener { notices, duty, refused } = listener;
        if !events.contains(EventSet::IN) {
            // The thread has ended.
            let event = EpollEvent::default();
            let _ = self.epoll.ctl(ControlOperation::Delete, notices.as_raw_fd(), event);
            return;
        }
        let fd = notices.as_fd();
        let Ok(notice) = seccomp::receive(fd) else { return };
        match (self.judge)(*duty, &notice, &self.peek) {
            Verdict::Passes => drop(seccomp::let_pass(fd, &notice)),
            Verdict::Fails => drop(seccomp::refuse(fd, &notice, libc::EPERM)),
            Verdict::Violates => {
                // Before the thread goes on, and perhaps ends the VM itself.
                refused.violation.is_there.store(true, Ordering::SeqCst);
                let _ = seccomp::refuse(fd, &notice, libc::EPERM);
                lock(&refused.notice).get_or_insert(notice);
                ring(&refused.bell);
            }
        }
    }
}

/// As `fd::ring`, but says nothing: the logger takes memory.
fn ring(bell: &EventFd) {
    let _ = (0..3).any(|_| bell.write(1).is_ok());
}

/// One thread's calls.
pub(super) struct Listener {
    pub notices: OwnedFd,
    pub duty: Duty,
    pub refused: Arc<Refused>,
}

/// The first call of a thread's that was refused, on its way to who tells of it.
pub(super) struct Refused {
    pub notice: Mutex<Option<Notice>>,
    pub bell: EventFd,
    pub violation: Arc<Violation>,
}

impl Refused {
    pub fn new(violation: Arc<Violation>) -> std::io::Result<Self> {
        Ok(Self { notice: Mutex::default(), bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, violation })
    }
}

/// Whether a thread of the VM's was refused a call, and, a moment later, which.
#[derive(Default)]
pub(super) struct Violation {
    is_there: AtomicBool,
    cause: Mutex<Option<StopCause>>,
    told: Condvar,
}

impl Violation {
    /// A moment: who tells of it is a thread of its own.
    const MOMENT: Duration = Duration::from_secs(1);

    pub fn tell(&self, cause: &StopCause) {
        lock(&self.cause).get_or_insert_with(|| cause.clone());
        self.told.notify_all();
    }

    pub fn wait(&self) -> Option<StopCause> {
        if !self.is_there.load(Ordering::SeqCst) {
            return None;
        }
        let told = self.told.wait_timeout_while(lock(&self.cause), Self::MOMENT, |cause| cause.is_none());
        told.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}
