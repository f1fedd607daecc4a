#![forbid(unsafe_code)]
//! The thread: it looks at the host, and carries out what follows from that.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::log::Level;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{Shared, TARGET};
use crate::budget::reclaim::{Look, Sample, Step, Thresholds, plan};
use crate::host::samples::own_pressure_file;
use crate::reactor::{Place, own, panic_text};
use crate::sys::{lock, log, residency};
use crate::vm::Supervisor;

/// How long a turn pages out, before it looks at everything again.
const AT_ONCE: Duration = Duration::from_millis(100);
/// How long the memory of victims is waited for when the thread is to end: they leave in milliseconds.
const LAST_LOOK: Duration = Duration::from_secs(1);

/// What wakes the thread: its bell, and the kernel when tasks wait for memory.
pub(super) struct Watch {
    epoll: Epoll,
    /// The trigger lives as long as its file is open.
    pressure: Option<File>,
}

const BELL: u64 = 0;
const PRESSURE: u64 = 1;

impl Watch {
    pub fn open(bell: &EventFd) -> std::io::Result<Self> {
        let epoll = Epoll::new()?;
        let add = |fd: i32, events, what| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, what));
        add(bell.as_raw_fd(), EventSet::IN, BELL)?;
        let pressure = trigger().filter(|file| add(file.as_raw_fd(), EventSet::PRIORITY, PRESSURE).is_ok());
        Ok(Self { epoll, pressure })
    }

    fn wait(&mut self, time: Duration) {
        let mut events = [EpollEvent::default(); 2];
        let milliseconds = i32::try_from(time.as_millis()).unwrap_or(i32::MAX).max(1);
        // An interruption is a wake-up like any other.
        let count = self.epoll.wait(milliseconds, &mut events).unwrap_or(0);
        let gone = |event: &EpollEvent| {
            event.data() == PRESSURE && event.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP)
        };
        if events.iter().take(count).any(gone) {
            // Its cgroup was removed: it would be ready for ever. The interval goes on.
            if let Some(file) = self.pressure.take() {
                let _ = self.epoll.ctl(ControlOperation::Delete, file.as_raw_fd(), EpollEvent::default());
            }
            log::debug!("the cgroup whose pressure was watched is gone");
        }
    }
}

/// Tells when tasks of the own cgroup, or of the machine, have waited 150 ms of a second for memory
/// (Documentation/accounting/psi.rst). `None` where the kernel has no such thing, or it is not for us.
fn trigger() -> Option<File> {
    let machine = Path::new("/proc/pressure/memory");
    own_pressure_file().into_iter().chain([machine.to_owned()]).find_map(|path| {
        let mut file = OpenOptions::new().read(true).write(true).open(path).ok()?;
        file.write_all(b"some 150000 1000000\0").ok()?;
        Some(file)
    })
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    watch: Watch,
    supervisor: Option<Arc<Supervisor>>,
    /// Where VMs are paused, and go on: that calls code of devices, some of which is the embedder's.
    outside: Place,
    start: Instant,
    /// Whether those before it are over.
    begun: bool,
    /// Victims that have not given their memory back yet.
    stopped: BTreeSet<u64>,
    /// When the host was looked at: the last time, and the time before. What a plan answers to began between the two.
    looks: [Instant; 2],
}

impl Worker {
    /// One that is confined has a supervisor.
    pub fn new(shared: Arc<Shared>, watch: Watch, supervisor: Option<Arc<Supervisor>>) -> Self {
        let start = Instant::now();
        let outside = supervisor.as_ref().map_or(Place::Caller, |supervisor| supervisor.outside());
        let (begun, stopped) = (false, BTreeSet::new());
        Self { shared, watch, supervisor, outside, start, begun, stopped, looks: [start; 2] }
    }

    pub fn run(mut self) {
        // The embedder's logger may run here, where there is no sandbox.
        let _inside = own::enter_for_all();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.turns())) {
            // A call that was refused may have led to it: that is then the cause.
            let refused = self.supervisor.as_ref().and_then(|supervisor| supervisor.violation());
            let why = refused
                .map_or_else(|| format!("panicked: {}", panic_text(&*panic)), |cause| cause.to_string());
            self.elsewhere(move |shared| shared.fail(&why));
        }
        if self.begun {
            self.elsewhere(Shared::undo);
        }
    }

    /// Does that where everything may be done, and waits for it.
    fn elsewhere(&self, f: impl FnOnce(&Shared) + Send + 'static) {
        let shared = self.shared.clone();
        if let Err(error) = self.outside.run(move || f(&shared)) {
            log::error!("{error}");
        }
    }

    fn turns(&mut self) {
        while !self.shared.is_ending() {
            #[cfg(feature = "internals")]
            std::mem::take(&mut *lock(&self.shared.calls)).into_iter().for_each(|call| call());
            let config = lock(&self.shared.config).clone();
            self.begun = self.begun || self.shared.may_begin();
            // While something is under way, what came of it is looked at sooner.
            let time = match self.begun.then(|| self.turn(&config.thresholds())) {
                Some(false) => config.interval,
                Some(true) => config.interval.min(Duration::from_millis(50)),
                None => Duration::from_millis(10),
            };
            self.watch.wait(time);
            let _ = self.shared.bell.read();
        }
        let patience = Instant::now() + LAST_LOOK;
        while !self.stopped.is_empty() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
            self.stopped.retain(|vm| !self.shared.herd.clear(*vm));
        }
    }

    /// One look at the host, and what follows from it; whether anything did.
    fn turn(&mut self, limits: &Thresholds) -> bool {
        let herd = self.shared.herd.clone();
        self.stopped.retain(|vm| !herd.clear(*vm));
        self.looks = [Instant::now(), self.looks[0]];
        let Some(free) = self.shared.samples.headroom(Duration::ZERO).free else { return false };
        let (now, swap) = (self.start.elapsed(), residency::swap_free());
        let paused = lock(&self.shared.paused).clone();
        let mut sample = Sample { now, free, swap, vms: herd.sample(&paused) };
        sample.vms.retain(|vm| !self.stopped.contains(&vm.id));
        let there: BTreeSet<u64> = sample.vms.iter().map(|vm| vm.id).collect();
        lock(&self.shared.paused).retain(|vm, _| there.contains(vm));
        let steps = plan(limits, &sample);
        let look = Look { limits, sample: &sample, steps: &steps };
        log::record(Level::Trace, TARGET, format_args!("look: {look}"));
        let near = free < limits.balloon.saturating_mul(2);
        // What takes longest comes last, and a part at a time: somebody may need to be stopped meanwhile.
        let is_long = |step: &&Step| matches!(step, Step::PageOut { .. });
        for step in steps.iter().filter(|step| !is_long(step)) {
            self.carry_out(*step, now);
        }
        let deadline = Instant::now() + AT_ONCE;
        for step in steps.iter().filter(is_long) {
            if let Step::PageOut { vm, bytes } = *step
                && Instant::now() < deadline
                && !self.shared.is_ending()
            {
                self.log(Level::Debug, *step);
                herd.page_out(vm, bytes, deadline);
            }
        }
        if near && !self.shared.is_ending() {
            // The next plan wants to know who can do without what.
            there.iter().for_each(|vm| herd.ask(*vm));
        }
        !steps.is_empty() || !self.stopped.is_empty() || free < limits.balloon
    }

    fn carry_out(&mut self, step: Step, now: Duration) {
        if self.shared.is_ending() {
            return;
        }
        self.log(Level::Info, step);
        let herd = &self.shared.herd;
        match step {
            Step::Balloon { vm, target } => herd.set_balloon(vm, target),
            // Done by its caller.
            Step::PageOut { .. } => {}
            Step::Pause { vm, until } => {
                let at_most = until.saturating_sub(now);
                self.elsewhere(move |shared| shared.pause(vm, until, at_most));
            }
            Step::Resume { vm } => self.elsewhere(move |shared| shared.resume(vm)),
            Step::Stop { vm } => {
                lock(&self.shared.paused).remove(&vm);
                self.stopped.insert(vm);
                herd.stop(vm);
            }
        }
    }

    /// Says what is done, and how long ago it can have become necessary.
    fn log(&self, level: Level, step: Step) {
        let late = self.looks[1].elapsed().as_millis();
        log::record(level, TARGET, format_args!("{step:?}, for what began at most {late} ms ago"));
    }
}
