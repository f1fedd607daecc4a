#![forbid(unsafe_code)]
//! The three threads that are not in the sandbox of those for which they are: a VM's, or the one that reclaims memory. One answers for
//! those (`answers.rs`). One tells of what was
//! refused, which ends the VM, and does what they may not: opens networks again that went away, pauses VMs for want of memory. It waits for
//! the kernel alone, which may have to wait for whoever
//! changes the host's interfaces, and for devices. One hands records to the embedder's logger,
//! for which nobody else waits.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

use event_manager::{EventSet, Events};

use super::answers::{Answers, Body, Judge, Listener, Refused, Violation};
use super::threads::{Duty, ThreadRole, Threads};
use crate::config::SandboxConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::events::{StopCause, StopLine};
use crate::reactor::{Attached, EventLoop, Place, Watch, Worker};
use crate::sys::lock;
use crate::sys::log::{self, Entry};
use crate::sys::seccomp::Notice;

/// What the sandbox has made ready for threads. `vm` does not know the sandbox: it is given this.
pub(crate) struct Confinement {
    /// Confines the calling thread for good to what that duty needs.
    pub enter: Box<dyn Fn(Duty) -> Result<Entered> + Send + Sync>,
    /// What becomes of a call that the filter did not let through.
    pub judge: Judge,
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

/// What is in force in a VM with a [`SandboxConfig`], or of a host's thread with a
/// [`ReclaimSandbox`](crate::ReclaimSandbox).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SandboxReport {
    /// The threads that are in it, by their names. Others have the rights of the process.
    pub threads: Vec<String>,
    /// Whether their calls are filtered.
    pub seccomp: bool,
    /// The version of Landlock's interface by which they open no files; `None` where the kernel has none.
    pub landlock: Option<u32>,
}

/// Records that wait for the logger: beyond it they are dropped.
const MOST_RECORDS: usize = 256;

pub(crate) struct Supervisor {
    confinement: Confinement,
    config: SandboxConfig,
    answers: Answers,
    tells: Arc<EventLoop>,
    logs: Arc<EventLoop>,
    stop: StopLine,
    records: Arc<AtomicUsize>,
    violation: Arc<Violation>,
    /// For each thread in the sandbox.
    attached: Mutex<Vec<Attached<Teller>>>,
    report: Mutex<SandboxReport>,
}

impl Supervisor {
    /// Starts the three threads: `spawn` makes each by its number, and `name` is what theirs begin with. `stop` hears of calls that were
    /// refused.
    pub fn start(
        confinement: Confinement,
        config: &SandboxConfig,
        stop: &StopLine,
        name: &str,
        spawn: impl Fn(u32, Body) -> Result<JoinHandle<()>>,
    ) -> Result<Arc<Self>> {
        let start = |index: u32| EventLoop::start(&format!("{name}{index}"), |body| spawn(index, body));
        let answers = Answers::start(confinement.judge, |body| spawn(0, body))?;
        let (tells, logs) = (start(1)?, start(2)?);
        let records: Arc<AtomicUsize> = Arc::default();
        let (carrier, count) = (Arc::downgrade(&logs), records.clone());
        tells.tell(move || log::divert(move |entry| Self::carry(&carrier, &count, entry)));
        Ok(Arc::new(Self {
            confinement,
            config: config.clone(),
            answers,
            tells,
            logs,
            stop: stop.clone(),
            records,
            violation: Arc::default(),
            attached: Mutex::default(),
            report: Mutex::default(),
        }))
    }

    /// Where what the sandbox does not allow is done: a network that went away is opened again.
    pub fn outside(&self) -> Place {
        Place::Loop(self.tells.clone(), self.stop.clone())
    }

    /// The way into the sandbox for the thread `name`, and who waits at its end; `None` where that duty stays outside.
    pub fn door(self: &Arc<Self>, duty: Duty, name: String) -> Option<(Door, Waiting)> {
        if !duty.is_confined_by(&self.config) {
            return None;
        }
        let meeting: Arc<Meeting> = Arc::default();
        let door = Door { supervisor: self.clone(), duty, meeting: meeting.clone() };
        Some((door, Waiting { supervisor: self.clone(), duty, name, meeting }))
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
        self.logs.stop();
    }

    /// Takes a record to the thread that may call the logger.
    fn carry(event_loop: &Weak<EventLoop>, records: &Arc<AtomicUsize>, entry: Entry) {
        let Some(event_loop) = event_loop.upgrade() else { return };
        if records.fetch_add(1, Ordering::Relaxed) >= MOST_RECORDS {
            records.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let records = records.clone();
        event_loop.tell(move || {
            records.fetch_sub(1, Ordering::Relaxed);
            // A logger that panics loses a record, not the thread.
            let _ = catch_unwind(AssertUnwindSafe(|| entry.write()));
        });
    }
}

/// Where a thread that is to be confined and who made it meet.
#[derive(Default)]
struct Meeting {
    step: Mutex<Step>,
    changed: Condvar,
}

#[derive(Default)]
enum Step {
    #[default]
    Outside,
    /// The thread is in, or why not: it waits until somebody hears what is refused to it.
    Entered(Result<Entered>),
    /// Whoever made it has that result.
    Known,
    /// It may go on, or it is to end.
    Done(bool),
}

impl Meeting {
    /// The thread has entered, or could not: whether it may go on.
    ///
    /// Takes no memory and frees none: what the allocator asks the kernel then would wait for who listens, who may be waiting for
    /// the allocator's lock.
    fn enter(&self, entered: Result<Entered>) -> bool {
        let mut step = lock(&self.step);
        if matches!(*step, Step::Outside) {
            *step = Step::Entered(entered);
            self.changed.notify_all();
        }
        loop {
            match *step {
                Step::Done(goes_on) => return goes_on,
                _ => step = self.changed.wait(step).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Waits for that.
    fn entered(&self) -> Result<Entered> {
        let step = self.changed.wait_while(lock(&self.step), |step| matches!(step, Step::Outside));
        match std::mem::replace(&mut *step.unwrap_or_else(PoisonError::into_inner), Step::Known) {
            Step::Entered(entered) => entered,
            _ => Err(Error::new(ErrorKind::Internal, "it ended before")),
        }
    }

    /// Nothing is waited for any more, unless it was before.
    fn end(&self, goes_on: bool) {
        let mut step = lock(&self.step);
        if !matches!(*step, Step::Done(_)) {
            *step = Step::Done(goes_on);
            self.changed.notify_all();
        }
    }
}

/// For the thread that is to be confined.
pub(crate) struct Door {
    supervisor: Arc<Supervisor>,
    duty: Duty,
    meeting: Arc<Meeting>,
}

impl Door {
    /// Confines the calling thread, and returns when what it is refused is heard; whether it is confined. Where it is not, who made it
    /// hears why, and the thread goes no further.
    pub fn enter(self) -> bool {
        let (event_loop, records) = (Arc::downgrade(&self.supervisor.logs), self.supervisor.records.clone());
        log::divert(move |entry| Supervisor::carry(&event_loop, &records, entry));
        let entered = (self.supervisor.confinement.enter)(self.duty);
        self.meeting.enter(entered)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Nothing, where it has been entered.
        self.meeting.end(false);
    }
}

/// For who made that thread.
pub(crate) struct Waiting {
    supervisor: Arc<Supervisor>,
    duty: Duty,
    name: String,
    meeting: Arc<Meeting>,
}

impl Waiting {
    /// Waits until the thread is confined, and has its notices heard.
    pub fn finish(self) -> Result<()> {
        let entered = self.meeting.entered();
        let entered =
            entered.map_err(|e| e.context(format!("sandbox: confining the thread {}", self.name)))?;
        let filtered = entered.notices.is_some();
        if let Some(notices) = entered.notices {
            self.hear(notices)?;
        }
        self.meeting.end(true);
        let mut report = lock(&self.supervisor.report);
        report.seccomp = filtered && (report.seccomp || report.threads.is_empty());
        report.landlock = entered.landlock;
        report.threads.push(self.name.clone());
        Ok(())
    }

    fn hear(&self, notices: OwnedFd) -> Result<()> {
        let Self { supervisor, duty, name, .. } = self;
        let (thread, stop) = (name.clone(), supervisor.stop.clone());
        let describe = supervisor.confinement.describe;
        let unheard: Arc<Unheard> = Arc::default();
        let refused = Refused::new(supervisor.violation.clone());
        let refused = Arc::new(refused.map_err(|e| Error::os("sandbox: creating an eventfd", e))?);
        let teller = Teller { refused: refused.clone(), thread, describe, stop, unheard: unheard.clone() };
        let teller = supervisor.tells.attach(teller, "sandbox", &supervisor.stop)?;
        if let Some(error) = lock(&unheard).take() {
            return Err(Error::new(ErrorKind::Exhausted, format!("sandbox: hearing {name}: {error}")));
        }
        let heard = supervisor.answers.hear(Listener { notices, duty: *duty, refused });
        heard.map_err(|e| Error::os(format!("sandbox: hearing {name}: adding to an epoll set"), e))?;
        lock(&supervisor.attached).push(teller);
        Ok(())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // Nothing, where it may go on.
        self.meeting.end(false);
    }
}

/// Why a loop does not hear of something.
type Unheard = Mutex<Option<event_manager::Error>>;

/// Tells of what was refused: that ends the VM, or the thread.
struct Teller {
    refused: Arc<Refused>,
    thread: String,
    describe: fn(&Notice) -> String,
    stop: StopLine,
    unheard: Arc<Unheard>,
}

impl Worker for Teller {
    fn init(&mut self, watch: &mut Watch) {
        if let Err(error) = watch.add(Events::new(&self.refused.bell, EventSet::IN)) {
            lock(&self.unheard).get_or_insert(error);
        }
    }

    fn process(&mut self, _: Events, _: &mut Watch) {
        let _ = self.refused.bell.read();
        let Some(notice) = lock(&self.refused.notice).take() else { return };
        let (thread, call) = (self.thread.clone(), (self.describe)(&notice));
        let cause = StopCause::SandboxViolation { thread, call };
        self.refused.violation.tell(&cause);
        self.stop.pull(cause);
    }
}

impl Threads {
    /// A supervisor of this VM.
    pub fn supervise(&self, confinement: Confinement, config: &SandboxConfig) -> Result<Arc<Supervisor>> {
        let spawn = |index, body: Body| self.spawn(ThreadRole::Supervisor, index, body);
        Supervisor::start(confinement, config, &self.stop, ThreadRole::Supervisor.prefix(), spawn)
    }

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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    fn enters(meeting: &Arc<Meeting>, entered: Result<Entered>) -> std::sync::mpsc::Receiver<bool> {
        let (meeting, (told, answer)) = (meeting.clone(), channel());
        std::thread::spawn(move || told.send(meeting.enter(entered)));
        answer
    }

    fn free() -> Result<Entered> {
        Ok(Entered { notices: None, landlock: None })
    }

    #[test]
    fn a_thread_goes_on_when_it_is_heard_and_not_before() {
        let meeting = Arc::default();
        let goes_on = enters(&meeting, free());
        assert_eq!(meeting.entered().unwrap().landlock, None);
        assert_eq!(goes_on.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout));
        meeting.end(true);
        // Whoever made it leaves afterwards.
        meeting.end(false);
        assert_eq!(goes_on.recv_timeout(LONG), Ok(true));
    }

    #[test]
    fn a_thread_that_nobody_hears_ends_and_so_does_the_wait_for_one_that_never_came() {
        for known in [false, true] {
            let meeting = Arc::default();
            let goes_on = enters(&meeting, free());
            if known {
                meeting.entered().unwrap();
            }
            meeting.end(false);
            assert_eq!(goes_on.recv_timeout(LONG), Ok(false), "{known}");
        }
        let meeting: Arc<Meeting> = Arc::default();
        meeting.end(false);
        assert_eq!(meeting.entered().err().unwrap().to_string(), "it ended before");
        let meeting = Arc::default();
        let refused = enters(&meeting, Err(Error::new(ErrorKind::Os, "as the test wants")));
        assert_eq!(meeting.entered().err().unwrap().to_string(), "as the test wants");
        meeting.end(false);
        assert_eq!(refused.recv_timeout(LONG), Ok(false));
    }
}
