#![forbid(unsafe_code)]
//! The thread that does something about it when the host's memory gets short. What, the policy says (`budget::reclaim`).

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use ::log::Level;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::samples::Samples;
use crate::config::SandboxConfig;
use crate::error::{Error, Result};
use crate::events::StopLine;
use crate::reactor::own;
use crate::sandbox;
use crate::sys::{fd, fork, lock, log, thread};
use crate::vm::{Door, Duty, Herd, SandboxReport, Supervisor, Waiting};
pub use config::{ReclaimConfig, ReclaimSandbox};
use worker::{Watch, Worker};

mod config;
mod worker;

const NAME: &str = "vmbed-reclaim";
/// What the names of the threads begin with that are outside for it.
const GUARDS: &str = "vmbed-rguard";
/// Who its records are from, whichever file they are made in.
const TARGET: &str = module_path!();

/// Whatever a host has of it. Dropping it ends the thread.
#[derive(Default)]
pub(super) struct Reclaim {
    running: Mutex<Option<Running>>,
    /// Of each thread there was whether it is over, as far as it may not be; and of which process they are.
    past: Mutex<(u64, Vec<Over>)>,
}

/// Whether a thread will do nothing any more.
type Over = Arc<AtomicBool>;

struct Running {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Of a thread in a sandbox.
    supervisor: Option<Arc<Supervisor>>,
    sandbox: ReclaimSandbox,
    process: u64,
}

struct Shared {
    config: Mutex<ReclaimConfig>,
    /// Those before it: until they are over, nothing is done.
    before: Vec<Over>,
    ending: AtomicBool,
    failed: AtomicBool,
    bell: EventFd,
    herd: Arc<Herd>,
    samples: Arc<Samples>,
    /// VMs that were paused here, with their deadlines.
    paused: Mutex<BTreeMap<u64, Duration>>,
    /// What the project's tests want done on the thread.
    #[cfg(feature = "internals")]
    calls: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
}

impl Reclaim {
    /// Begins, goes on otherwise, or ends.
    pub fn set(
        &self,
        config: Option<&ReclaimConfig>,
        herd: &Arc<Herd>,
        samples: &Arc<Samples>,
    ) -> Result<()> {
        config.map_or(Ok(()), ReclaimConfig::validate)?;
        let Some(config) = config else {
            let ended = lock(&self.running).take();
            drop(ended);
            return Ok(());
        };
        if let Some(running) = &*lock(&self.running)
            && running.goes_on_with(config)
        {
            *lock(&running.shared.config) = config.clone();
            fd::ring(&running.shared.bell);
            return Ok(());
        }
        let begun = Running::begin(config, herd, samples, self.next())?;
        // Without the lock, as above: who ends a thread waits for it.
        let ended = lock(&self.running).replace(begun);
        drop(ended);
        Ok(())
    }

    /// Those that may not be over, and the place of one more.
    fn next(&self) -> (Vec<Over>, Over) {
        let mut past = lock(&self.past);
        let (process, all) = &mut *past;
        // A child of a fork has none of its parent's.
        if *process != fork::process() {
            (*process, *all) = (fork::process(), Vec::new());
        }
        all.retain(|over| !over.load(Ordering::Acquire));
        let (before, own) = (all.clone(), Over::default());
        all.push(own.clone());
        (before, own)
    }

    /// What is in force of its sandbox, if it has one.
    pub fn sandbox(&self) -> Option<SandboxReport> {
        let running = lock(&self.running);
        let running = running.as_ref().filter(|running| !running.shared.is_ending())?;
        running.supervisor.as_ref().map(|supervisor| supervisor.report())
    }

    /// Runs `f` on the thread, if there is one; what it answers.
    #[cfg(feature = "internals")]
    pub fn run<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> Option<R> {
        let (answer, answered) = std::sync::mpsc::channel();
        {
            let running = lock(&self.running);
            let shared = &running.as_ref()?.shared;
            lock(&shared.calls).push(Box::new(move || drop(answer.send(f()))));
            fd::ring(&shared.bell);
        }
        answered.recv_timeout(std::time::Duration::from_secs(60)).ok()
    }
}

impl Running {
    fn begin(
        config: &ReclaimConfig,
        herd: &Arc<Herd>,
        samples: &Arc<Samples>,
        (before, over): (Vec<Over>, Over),
    ) -> Result<Self> {
        // Also where it never begins.
        let ends = Ends(over);
        let failed = |what: &str, e| Error::os(format!("{what} of {NAME}"), e);
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| failed("creating the eventfd", e))?;
        let shared = Arc::new(Shared {
            config: Mutex::new(config.clone()),
            before,
            ending: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            bell,
            herd: herd.clone(),
            samples: samples.clone(),
            paused: Mutex::default(),
            #[cfg(feature = "internals")]
            calls: Mutex::default(),
        });
        let watch = Watch::open(&shared.bell).map_err(|e| failed("creating the epoll set", e))?;
        let supervisor = supervise(config.sandbox, &shared)?;
        let door = supervisor.as_ref().and_then(|s| s.door(Duty::Reclaim, NAME.to_owned()));
        let (door, waiting) = door.unzip();
        let worker = Worker::new(shared.clone(), watch, supervisor.clone());
        let body = move || {
            let _ends = ends;
            if door.is_none_or(Door::enter) {
                worker.run();
            }
        };
        let thread = thread::spawn(NAME.to_owned(), body).map_err(|e| failed("starting the thread", e))?;
        let (thread, sandbox, process) = (Some(thread), config.sandbox, fork::process());
        let begun = Self { shared, thread, supervisor, sandbox, process };
        waiting.map_or(Ok(()), Waiting::finish)?;
        Ok(begun)
    }

    /// Whether its thread can do that from now on. One that is confined stays so, and one that has failed does nothing.
    fn goes_on_with(&self, config: &ReclaimConfig) -> bool {
        self.sandbox == config.sandbox && !self.shared.is_ending() && self.process == fork::process()
    }
}

/// The threads for one that is in a sandbox.
fn supervise(wanted: ReclaimSandbox, shared: &Arc<Shared>) -> Result<Option<Arc<Supervisor>>> {
    let best_effort = match wanted {
        ReclaimSandbox::Off => return Ok(None),
        ReclaimSandbox::IfPresent => true,
        ReclaimSandbox::Required => false,
    };
    let confinement = sandbox::prepare_reclaim(best_effort)?;
    let failed = shared.clone();
    let stop = StopLine::new(move |cause| failed.fail(&cause.to_string()));
    let spawn = |index, body: Box<dyn FnOnce() + Send>| {
        // Callbacks run there that nobody whom they wait for may wait for.
        let inside = move || {
            let _inside = own::enter_for_all();
            body();
        };
        let name = format!("{GUARDS}{index}");
        thread::spawn(name.clone(), inside).map_err(|e| Error::os(format!("starting the thread {name}"), e))
    };
    let config = SandboxConfig { best_effort, ..SandboxConfig::default() };
    Supervisor::start(confinement, &config, &stop, GUARDS, spawn).map(Some)
}

impl Drop for Running {
    fn drop(&mut self) {
        let (thread, supervisor) = (self.thread.take(), self.supervisor.take());
        if self.process != fork::process() {
            // A child has no such threads: their handles are nothing that could be given back.
            std::mem::forget((thread, supervisor));
            return;
        }
        self.shared.end();
        let Some(thread) = thread else { return };
        // A callback that it may be waiting for must not wait for it.
        let is_own = thread.thread().id() == std::thread::current().id();
        if !own::is_inside_any() && !is_own {
            return end(thread, supervisor);
        }
        let kept = supervisor.clone();
        let reaper = thread::spawn("vmbed-reaper".to_owned(), move || end(thread, supervisor));
        if let Err(error) = reaper {
            // To drop the last of it here would wait for this thread.
            std::mem::forget(kept);
            log::error!("no thread to end {NAME}, which a callback has ended: {error}");
        }
    }
}

/// Waits for the thread, then for those that are there for it.
fn end(thread: JoinHandle<()>, supervisor: Option<Arc<Supervisor>>) {
    let _ = thread.join();
    if let Some(supervisor) = supervisor {
        supervisor.stop();
    }
}

/// The thread's last act, however it ends.
struct Ends(Over);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Shared {
    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// Has the thread end, soon.
    fn end(&self) {
        self.ending.store(true, Ordering::Release);
        fd::ring(&self.bell);
    }

    fn may_begin(&self) -> bool {
        self.before.iter().all(|over| over.load(Ordering::Acquire))
    }

    /// The same, since it cannot be trusted to go on. VMs hear of it, unless it was to end anyway. Where everything may be done.
    fn fail(&self, why: &str) {
        if self.failed.swap(true, Ordering::SeqCst) {
            return;
        }
        let was_to_end = self.ending.swap(true, Ordering::SeqCst);
        fd::ring(&self.bell);
        // Before VMs, on one of which it may hold on. Of a sandbox's, another thread hands it to the logger.
        let said = format_args!("{NAME} has ended: {why}");
        let _ = catch_unwind(AssertUnwindSafe(|| log::record(Level::Error, TARGET, said)));
        self.give_up((!was_to_end).then_some(why));
    }

    /// Nothing that it did outlasts it. Where everything may be done.
    fn undo(&self) {
        if !self.failed.load(Ordering::SeqCst) {
            self.give_up(None);
        }
    }

    fn give_up(&self, why: Option<&str>) {
        let paused = std::mem::take(&mut *lock(&self.paused));
        self.herd.give_up(why, &paused);
    }

    /// Pauses a VM until then. Where everything may be done.
    fn pause(&self, vm: u64, until: Duration, at_most: Duration) {
        if !self.is_ending() && self.herd.pause(vm, at_most) {
            lock(&self.paused).insert(vm, until);
        }
    }

    /// Has it go on; where that fails, the next look does so again. Where everything may be done.
    fn resume(&self, vm: u64) {
        if self.herd.resume(vm) {
            lock(&self.paused).remove(&vm);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_begins_changes_and_ends() {
        let (reclaim, herd) = (Reclaim::default(), Arc::<Herd>::default());
        let samples = Arc::new(Samples::open(Arc::default()));
        let config = ReclaimConfig::default();
        let confined = ReclaimConfig { sandbox: ReclaimSandbox::IfPresent, ..ReclaimConfig::default() };
        for config in [Some(&config), Some(&config), None, Some(&confined), Some(&confined), Some(&config)] {
            reclaim.set(config, &herd, &samples).unwrap();
        }
        drop(reclaim);
        assert_eq!(Arc::strong_count(&herd), 1, "its thread has ended");
    }
}
