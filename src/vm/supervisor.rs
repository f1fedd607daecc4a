#![forbid(unsafe_code)]
//! The two threads of a VM in a sandbox that are not in it. One answers for the others: a call that their filters refuse comes here, and
//! fails. It does nothing else, and takes no memory and frees none: whoever waits for it may hold the allocator's lock. The other tells
//! of it, which ends the VM, and carries records to the embedder's logger.

use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

use event_manager::{EventSet, Events};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::foreign::Opens;
use super::threads::{Duty, ThreadRole, Threads};
use crate::config::SandboxConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::events::{StopCause, StopLine};
use crate::reactor::{Attached, EventLoop, Watch, Worker};
use crate::sys::log::{self, Entry};
use crate::sys::seccomp::{self, Notice};
use crate::sys::{fd, lock};

/// What the sandbox has made ready for one VM. `vm` does not know the sandbox: it is given this.
pub(crate) struct Confinement {
    /// What its threads may open again, on this kernel.
    pub opens: Opens,
    /// Confines the calling thread for good to what that duty needs.
    pub enter: Box<dyn Fn(Duty) -> Result<Entered> + Send + Sync>,
    /// Whether a call that the filter did not let through is made all the same. Allocates nothing, as the thread that waits for
    /// the answer may hold the allocator's lock.
    pub passes: fn(Duty, &Notice) -> bool,
    /// What people call it.
    pub describe: fn(&Notice) -> String,
}

/// What is in force on a thread.
pub(crate) struct Entered {
    /// Its filter's notices.
    pub notices: Option<OwnedFd>,
    /// The version of Landlock.
    pub landlock: Option<u32>,
}

/// What is in force in a VM with a [`SandboxConfig`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SandboxReport {
    /// The threads that are in it, by their names. Others of the VM have the rights of the process.
    pub threads: Vec<String>,
    /// Whether their calls are filtered.
    pub seccomp: bool,
    /// The version of Landlock's interface by which they open no files; `None` where the kernel has none.
    pub landlock: Option<u32>,
}

/// Records that wait for the logger: beyond it they are dropped.
const MOST_RECORDS: usize = 256;

pub(super) struct Supervisor {
    confinement: Confinement,
    config: SandboxConfig,
    pub opens: Opens,
    answers: Arc<EventLoop>,
    tells: Arc<EventLoop>,
    stop: StopLine,
    records: Arc<AtomicUsize>,
    violation: Arc<Violation>,
    /// For each thread in the sandbox.
    attached: Mutex<Vec<(Attached<Listener>, Attached<Teller>)>>,
    report: Mutex<SandboxReport>,
}

impl Supervisor {
    /// Starts both threads, for a VM that has a sandbox.
    pub fn start(confinement: Confinement, config: &SandboxConfig, threads: &Threads) -> Result<Arc<Self>> {
        let start = |index: u32| {
            let name = format!("{}{index}", ThreadRole::Supervisor.prefix());
            EventLoop::start(&name, |body| threads.spawn(ThreadRole::Supervisor, index, body))
        };
        Ok(Arc::new(Self {
            opens: confinement.opens,
            confinement,
            config: config.clone(),
            answers: start(0)?,
            tells: start(1)?,
            stop: threads.stop.clone(),
            records: Arc::default(),
            violation: Arc::default(),
            attached: Mutex::default(),
            report: Mutex::default(),
        }))
    }

    /// Whether threads that serve cards may attach to a TAP interface that comes back.
    pub fn may_attach_again(&self) -> bool {
        self.opens.taps || !self.config.devices
    }

    /// The way into the sandbox for the thread `name`, and who waits at its end; `None` where that duty stays outside.
    pub fn door(self: &Arc<Self>, duty: Duty, name: String) -> Option<(Door, Waiting)> {
        if !duty.is_confined_by(&self.config) {
            return None;
        }
        // Sending allocates nothing, so that the thread makes no call before somebody listens, save for waking who waits.
        let (told, answer) = sync_channel(1);
        let door = Door { supervisor: self.clone(), duty, told };
        Some((door, Waiting { supervisor: self.clone(), duty, name, answer }))
    }

    pub fn config(&self) -> &SandboxConfig {
        &self.config
    }

    pub fn report(&self) -> SandboxReport {
        lock(&self.report).clone()
    }

    /// The first call that was refused, as the cause of the VM's end. Whatever that call's failure led to meanwhile is none.
    pub fn violation(&self) -> Option<StopCause> {
        self.violation.wait()
    }

    /// When the threads in the sandbox have ended: ends its own.
    pub fn stop(&self) {
        self.answers.stop();
        self.tells.stop();
    }

    /// Takes a record to this VM's supervisor.
    fn carry(event_loop: &Weak<EventLoop>, records: &Arc<AtomicUsize>, entry: Entry) {
        let Some(event_loop) = event_loop.upgrade() else { return };
        if records.fetch_add(1, Ordering::Relaxed) >= MOST_RECORDS {
            records.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let records = records.clone();
        event_loop.tell(move || {
            records.fetch_sub(1, Ordering::Relaxed);
            // A logger that panics loses a record, not the supervisor.
            let _ = catch_unwind(AssertUnwindSafe(|| entry.write()));
        });
    }
}

/// For the thread that is to be confined.
pub(super) struct Door {
    supervisor: Arc<Supervisor>,
    duty: Duty,
    told: SyncSender<Result<Entered>>,
}

impl Door {
    /// Confines the calling thread; whether it is. Where it is not, who made it hears why, and the thread goes no further.
    pub fn enter(self) -> bool {
        let (event_loop, records) = (Arc::downgrade(&self.supervisor.tells), self.supervisor.records.clone());
        log::divert(move |entry| Supervisor::carry(&event_loop, &records, entry));
        let entered = (self.supervisor.confinement.enter)(self.duty);
        let is_in = entered.is_ok();
        let _ = self.told.send(entered);
        is_in
    }
}

/// For who made that thread.
pub(super) struct Waiting {
    supervisor: Arc<Supervisor>,
    duty: Duty,
    name: String,
    answer: Receiver<Result<Entered>>,
}

impl Waiting {
    /// Waits until the thread is confined, and has its notices heard.
    pub fn finish(self) -> Result<()> {
        let Self { supervisor, duty, name, answer } = self;
        let lost = || Error::new(ErrorKind::Internal, "it ended before");
        let entered = answer.recv().unwrap_or_else(|_| Err(lost()));
        let entered = entered.map_err(|e| e.context(format!("sandbox: confining the thread {name}")))?;
        let filtered = entered.notices.is_some();
        if let Some(notices) = entered.notices {
            let (thread, stop) = (name.clone(), supervisor.stop.clone());
            let Confinement { passes, describe, .. } = supervisor.confinement;
            let unheard: Arc<Unheard> = Arc::default();
            let refused = Refused::new(supervisor.violation.clone());
            let refused = Arc::new(refused.map_err(|e| Error::os("sandbox: creating an eventfd", e))?);
            let teller =
                Teller { refused: refused.clone(), thread, describe, stop, unheard: unheard.clone() };
            let teller = supervisor.tells.attach(teller, "sandbox", &supervisor.stop)?;
            let listener = Listener { notices, duty, passes, refused, unheard: unheard.clone() };
            let listener = supervisor.answers.attach(listener, "sandbox", &supervisor.stop)?;
            if let Some(error) = lock(&unheard).take() {
                return Err(Error::new(ErrorKind::Exhausted, format!("sandbox: hearing {name}: {error}")));
            }
            lock(&supervisor.attached).push((listener, teller));
        }
        let mut report = lock(&supervisor.report);
        report.seccomp = filtered && (report.seccomp || report.threads.is_empty());
        report.landlock = entered.landlock;
        report.threads.push(name);
        Ok(())
    }
}

/// Why a loop does not hear of something.
type Unheard = Mutex<Option<event_manager::Error>>;

/// Whether a thread of the VM's was refused a call, and, a moment later, which.
#[derive(Default)]
struct Violation {
    is_there: AtomicBool,
    cause: Mutex<Option<StopCause>>,
    told: Condvar,
}

impl Violation {
    /// A moment: who tells of it is a thread of its own.
    const MOMENT: Duration = Duration::from_secs(1);

    fn wait(&self) -> Option<StopCause> {
        if !self.is_there.load(Ordering::SeqCst) {
            return None;
        }
        let told = self.told.wait_timeout_while(lock(&self.cause), Self::MOMENT, |cause| cause.is_none());
        told.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}

/// The first call of a thread's that was refused, on its way to who tells of it.
struct Refused {
    notice: Mutex<Option<Notice>>,
    bell: EventFd,
    violation: Arc<Violation>,
}

impl Refused {
    fn new(violation: Arc<Violation>) -> std::io::Result<Self> {
        Ok(Self { notice: Mutex::default(), bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, violation })
    }
}

/// Hears of one thread's calls, and answers.
struct Listener {
    notices: OwnedFd,
    duty: Duty,
    passes: fn(Duty, &Notice) -> bool,
    refused: Arc<Refused>,
    unheard: Arc<Unheard>,
}

impl Worker for Listener {
    fn init(&mut self, watch: &mut Watch) {
        hear(&self.unheard, watch, Events::new(&self.notices, EventSet::IN));
    }

    fn process(&mut self, events: Events, watch: &mut Watch) {
        if !events.event_set().contains(EventSet::IN) {
            // The thread has ended.
            let _ = watch.remove(Events::new(&self.notices, EventSet::IN));
            return;
        }
        let fd = self.notices.as_fd();
        let Ok(notice) = seccomp::receive(fd) else { return };
        if (self.passes)(self.duty, &notice) {
            let _ = seccomp::let_pass(fd, &notice);
            return;
        }
        // Before the thread goes on, and perhaps ends the VM itself.
        self.refused.violation.is_there.store(true, Ordering::SeqCst);
        let _ = seccomp::refuse(fd, &notice, libc::EPERM);
        lock(&self.refused.notice).get_or_insert(notice);
        fd::ring(&self.refused.bell);
    }
}

/// Tells of what was refused: the VM ends with it.
struct Teller {
    refused: Arc<Refused>,
    thread: String,
    describe: fn(&Notice) -> String,
    stop: StopLine,
    unheard: Arc<Unheard>,
}

impl Worker for Teller {
    fn init(&mut self, watch: &mut Watch) {
        hear(&self.unheard, watch, Events::new(&self.refused.bell, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut Watch) {
        let _ = self.refused.bell.read();
        let Some(notice) = lock(&self.refused.notice).take() else { return };
        let (thread, call) = (self.thread.clone(), (self.describe)(&notice));
        let cause = StopCause::SandboxViolation { thread, call };
        let violation = &self.refused.violation;
        lock(&violation.cause).get_or_insert_with(|| cause.clone());
        violation.told.notify_all();
        self.stop.pull(cause);
    }
}

fn hear(unheard: &Unheard, watch: &mut Watch, events: Events) {
    if let Err(error) = watch.add(events) {
        lock(unheard).get_or_insert(error);
    }
}

impl Threads {
    /// Has the thread of a loop enter the sandbox, where there is one for it.
    pub fn confine_loop(&self, event_loop: &EventLoop, duty: Duty, index: u32) -> Result<()> {
        let supervisor = self.supervisor.as_ref().filter(|_| !event_loop.is_callers());
        let name = format!("{}{index}", ThreadRole::Device.prefix());
        let Some((door, waiting)) = supervisor.and_then(|s| s.door(duty, name)) else { return Ok(()) };
        let entered = event_loop.meanwhile(move || door.enter());
        waiting.finish()?;
        entered().map(drop)
    }
}
