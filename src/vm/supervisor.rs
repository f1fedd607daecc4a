#![forbid(unsafe_code)]
//! The one thread of a VM in a sandbox that is not in it: it answers for the others. A call that their filters refuse comes
//! here, fails, and ends the VM; records for the embedder's logger come here, too.

use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, Weak};

use event_manager::{EventSet, Events};

use super::foreign::Opens;
use super::threads::{Duty, ThreadRole, Threads};
use crate::config::SandboxConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::events::{StopCause, StopLine};
use crate::reactor::{Attached, EventLoop, Watch, Worker};
use crate::sys::lock;
use crate::sys::log::{self, Entry};
use crate::sys::seccomp::{self, Notice};

/// What the sandbox has made ready for one VM. `vm` does not know the sandbox: it is given this.
pub(crate) struct Confinement {
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
    event_loop: Arc<EventLoop>,
    stop: StopLine,
    records: Arc<AtomicUsize>,
    /// By the thread that each hears.
    listeners: Mutex<Vec<Attached<Listener>>>,
    report: Mutex<SandboxReport>,
}

impl Supervisor {
    /// Starts the thread, for a VM that has a sandbox.
    pub fn start(
        confinement: Confinement,
        (config, opens): (&SandboxConfig, Opens),
        threads: &Threads,
    ) -> Result<Arc<Self>> {
        let spawn = |body| threads.spawn(ThreadRole::Supervisor, 0, body);
        Ok(Arc::new(Self {
            confinement,
            config: config.clone(),
            opens,
            event_loop: EventLoop::start("vmbed-guard0", spawn)?,
            stop: threads.stop.clone(),
            records: Arc::default(),
            listeners: Mutex::default(),
            report: Mutex::default(),
        }))
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

    /// When the threads in the sandbox have ended: ends its own.
    pub fn stop(&self) {
        self.event_loop.stop();
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
        let (event_loop, records) =
            (Arc::downgrade(&self.supervisor.event_loop), self.supervisor.records.clone());
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
            let unheard = Arc::default();
            let listener =
                Listener { notices, thread, duty, passes, describe, stop, unheard: Arc::clone(&unheard) };
            let attached = supervisor.event_loop.attach(listener, "sandbox", &supervisor.stop)?;
            if let Some(error) = lock(&unheard).take() {
                return Err(Error::new(ErrorKind::Exhausted, format!("sandbox: hearing {name}: {error}")));
            }
            lock(&supervisor.listeners).push(attached);
        }
        let mut report = lock(&supervisor.report);
        report.seccomp = filtered && (report.seccomp || report.threads.is_empty());
        report.landlock = entered.landlock;
        report.threads.push(name);
        Ok(())
    }
}

/// Hears of one thread's calls.
struct Listener {
    notices: OwnedFd,
    thread: String,
    duty: Duty,
    passes: fn(Duty, &Notice) -> bool,
    describe: fn(&Notice) -> String,
    stop: StopLine,
    unheard: Arc<Mutex<Option<event_manager::Error>>>,
}

impl Worker for Listener {
    fn init(&mut self, watch: &mut Watch) {
        *lock(&self.unheard) = watch.add(Events::new(&self.notices, EventSet::IN)).err();
    }

    fn process(&mut self, events: Events, watch: &mut Watch) {
        if !events.event_set().contains(EventSet::IN) {
            // The thread has ended.
            let _ = watch.remove(Events::new(&self.notices, EventSet::IN));
            return;
        }
        let fd = self.notices.as_fd();
        let Ok(notice) = seccomp::receive(fd) else { return };
        // The answer comes first: whatever locks the thread holds, it gives them up now.
        if (self.passes)(self.duty, &notice) {
            let _ = seccomp::let_pass(fd, &notice);
            return;
        }
        let _ = seccomp::refuse(fd, &notice, libc::EPERM);
        let (thread, call) = (self.thread.clone(), (self.describe)(&notice));
        self.stop.pull(StopCause::SandboxViolation { thread, call });
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
