#![forbid(unsafe_code)]
//! The thread that does something about it when the host's memory gets short. What, the policy says (`budget::reclaim`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::samples::{Samples, own_pressure_file};
use crate::budget::reclaim::{Look, Sample, Step, Thresholds, plan};
use crate::error::{Error, FieldError, Result};
use crate::reactor::own;
use crate::sys::{fd, fork, lock, residency, thread};
use crate::units::Bytes;
use crate::vm::Herd;

/// How long a turn pages out, before it looks at everything again.
const AT_ONCE: Duration = Duration::from_millis(100);
/// How long the memory of victims is waited for when the thread is to end: they leave in milliseconds.
const LAST_LOOK: Duration = Duration::from_secs(1);

/// What a host does when its memory gets short ([`Host::set_reclaim`](crate::Host::set_reclaim)).
///
/// "Free" is what the kernel calls available, or what is left below the own cgroup's limit if that is less. Each stage goes
/// on until a quarter more is free than where it begins. A stage whose threshold is 0 never begins.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ReclaimConfig {
    /// Below it, guests with a balloon are asked for what they do not use; when half as much again is free, they have it
    /// back. Default 1 GiB.
    pub balloon_below: Bytes,
    /// Below it, what VMs have above their guarantees is paged out, where there is swap. Default 512 MiB.
    pub page_out_below: Bytes,
    /// Below it, VMs above their guarantees are paused, one after the other. Default 0: never.
    pub pause_below: Bytes,
    /// Below it, VMs that may be stopped ([`PromiseConfig::victim`](crate::PromiseConfig)) are, one after the other.
    /// Default 0: never.
    pub stop_below: Bytes,
    /// How much of what a guest does not use may be asked for: 0 to below 1. The higher, the more an idle guest gives for a
    /// busy one. Default 0.75.
    pub idle_tax: f64,
    /// How long a VM may be paused. Then it goes on, or is stopped if it may be. Default 10 s.
    pub pause_deadline: Duration,
    /// How often the host's memory is looked at, besides whenever the kernel reports pressure. Default 1 s, at least
    /// 10 ms.
    pub interval: Duration,
}

impl Default for ReclaimConfig {
    fn default() -> Self {
        Self {
            balloon_below: Bytes::mib(1024),
            page_out_below: Bytes::mib(512),
            pause_below: Bytes(0),
            stop_below: Bytes(0),
            idle_tax: 0.75,
            pause_deadline: Duration::from_secs(10),
            interval: Duration::from_secs(1),
        }
    }
}

impl ReclaimConfig {
    fn validate(&self) -> Result<()> {
        let mut fields = Vec::new();
        if !(0.0..1.0).contains(&self.idle_tax) {
            fields.push(FieldError::new("idle_tax", format!("is {}", self.idle_tax), "0 to below 1"));
        }
        if self.interval < Duration::from_millis(10) {
            fields.push(FieldError::new("interval", format!("is {:?}", self.interval), "at least 10 ms"));
        }
        if fields.is_empty() { Ok(()) } else { Err(Error::invalid_fields(fields)) }
    }

    fn thresholds(&self) -> Thresholds {
        Thresholds {
            balloon: self.balloon_below.get(),
            page_out: self.page_out_below.get(),
            pause: self.pause_below.get(),
            stop: self.stop_below.get(),
            tax: self.idle_tax,
            deadline: self.pause_deadline,
        }
    }
}

/// Whatever a host has of it. Dropping it ends the thread.
#[derive(Default)]
pub(super) struct Reclaim(Mutex<Option<Running>>);

struct Running {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    process: u64,
}

struct Shared {
    config: Mutex<ReclaimConfig>,
    ending: AtomicBool,
    bell: EventFd,
    herd: Arc<Herd>,
    samples: Arc<Samples>,
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
        let mut running = lock(&self.0);
        let Some(config) = config else {
            let ended = running.take();
            drop(running);
            drop(ended);
            return Ok(());
        };
        if let Some(running) = &*running {
            *lock(&running.shared.config) = config.clone();
            fd::ring(&running.shared.bell);
            return Ok(());
        }
        let failed = |what: &str, e| Error::os(format!("{what} of vmbed-reclaim"), e);
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| failed("creating the eventfd", e))?;
        let (herd, samples) = (herd.clone(), samples.clone());
        let (config, ending) = (Mutex::new(config.clone()), AtomicBool::new(false));
        let shared = Arc::new(Shared { config, ending, bell, herd, samples });
        let watch = Watch::open(&shared.bell).map_err(|e| failed("creating the epoll set", e))?;
        let own = shared.clone();
        let body = move || Worker::new(own, watch).run();
        let thread =
            thread::spawn("vmbed-reclaim".to_owned(), body).map_err(|e| failed("starting the thread", e))?;
        *running = Some(Running { shared, thread: Some(thread), process: fork::process() });
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.process != fork::process() {
            // A child has no such thread: its handle is nothing that could be given back.
            std::mem::forget(self.thread.take());
            return;
        }
        self.shared.ending.store(true, Ordering::Release);
        fd::ring(&self.shared.bell);
        // A callback that it may be waiting for must not wait for it.
        let own = |thread: &JoinHandle<()>| thread.thread().id() == std::thread::current().id();
        if let Some(thread) = self.thread.take().filter(|thread| !own::is_inside_any() && !own(thread)) {
            let _ = thread.join();
        }
    }
}

/// What wakes the thread: its bell, and the kernel when tasks wait for memory.
struct Watch {
    epoll: Epoll,
    /// The trigger lives as long as its file is open.
    pressure: Option<File>,
}

const BELL: u64 = 0;
const PRESSURE: u64 = 1;

impl Watch {
    fn open(bell: &EventFd) -> std::io::Result<Self> {
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
            ::log::debug!("the cgroup whose pressure was watched is gone");
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

struct Worker {
    shared: Arc<Shared>,
    watch: Watch,
    start: Instant,
    /// Those that were paused here, with their deadlines.
    paused: BTreeMap<u64, Duration>,
    /// Victims that have not given their memory back yet.
    stopped: BTreeSet<u64>,
    /// When the host was looked at: the last time, and the time before. What a plan answers to began between the two.
    looks: [Instant; 2],
}

impl Worker {
    fn new(shared: Arc<Shared>, watch: Watch) -> Self {
        let start = Instant::now();
        let (paused, stopped) = (BTreeMap::new(), BTreeSet::new());
        Self { shared, watch, start, paused, stopped, looks: [start; 2] }
    }

    fn run(mut self) {
        while !self.shared.ending.load(Ordering::Acquire) {
            let config = lock(&self.shared.config).clone();
            let busy = self.turn(&config.thresholds());
            // While something is under way, what came of it is looked at sooner.
            let time = if busy { config.interval.min(Duration::from_millis(50)) } else { config.interval };
            self.watch.wait(time);
            let _ = self.shared.bell.read();
        }
        let patience = Instant::now() + LAST_LOOK;
        while !self.stopped.is_empty() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
            self.stopped.retain(|vm| !self.shared.herd.clear(*vm));
        }
        // Nothing that it did outlasts it.
        self.paused.keys().for_each(|vm| self.shared.herd.resume(*vm));
        self.shared.herd.release();
    }

    /// One look at the host, and what follows from it; whether anything did.
    fn turn(&mut self, limits: &Thresholds) -> bool {
        let herd = self.shared.herd.clone();
        self.stopped.retain(|vm| !herd.clear(*vm));
        self.looks = [Instant::now(), self.looks[0]];
        let Some(free) = self.shared.samples.headroom(Duration::ZERO).free else { return false };
        let (now, swap) = (self.start.elapsed(), residency::swap_free());
        let mut sample = Sample { now, free, swap, vms: herd.sample(&self.paused) };
        sample.vms.retain(|vm| !self.stopped.contains(&vm.id));
        let there: BTreeSet<u64> = sample.vms.iter().map(|vm| vm.id).collect();
        self.paused.retain(|vm, _| there.contains(vm));
        let steps = plan(limits, &sample);
        ::log::trace!("look: {}", Look { limits, sample: &sample, steps: &steps });
        let near = free < limits.balloon.saturating_mul(2);
        // What takes longest comes last, and a part at a time: somebody may need to be stopped meanwhile.
        let is_long = |step: &&Step| matches!(step, Step::PageOut { .. });
        steps.iter().filter(|step| !is_long(step)).for_each(|step| self.carry_out(*step, now));
        let deadline = Instant::now() + AT_ONCE;
        for step in steps.iter().filter(is_long) {
            if let Step::PageOut { vm, bytes } = *step
                && Instant::now() < deadline
            {
                self.log(::log::Level::Debug, *step);
                herd.page_out(vm, bytes, deadline);
            }
        }
        if near {
            // The next plan wants to know who can do without what.
            there.iter().for_each(|vm| herd.ask(*vm));
        }
        !steps.is_empty() || !self.stopped.is_empty() || free < limits.balloon
    }

    fn carry_out(&mut self, step: Step, now: Duration) {
        self.log(::log::Level::Info, step);
        let herd = &self.shared.herd;
        match step {
            Step::Balloon { vm, target } => herd.set_balloon(vm, target),
            // Done by its caller.
            Step::PageOut { .. } => {}
            Step::Pause { vm, until } => {
                if herd.pause(vm, until.saturating_sub(now)) {
                    self.paused.insert(vm, until);
                }
            }
            Step::Resume { vm } => {
                self.paused.remove(&vm);
                herd.resume(vm);
            }
            Step::Stop { vm } => {
                self.paused.remove(&vm);
                self.stopped.insert(vm);
                herd.stop(vm);
            }
        }
    }

    /// Says what is done, and how long ago it can have become necessary.
    fn log(&self, level: ::log::Level, step: Step) {
        let late = self.looks[1].elapsed().as_millis();
        ::log::log!(level, "{step:?}, for what began at most {late} ms ago");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_thresholds_are_named_together() {
        let config = ReclaimConfig { idle_tax: 1.0, interval: Duration::ZERO, ..ReclaimConfig::default() };
        let error = config.validate().unwrap_err();
        let fields: Vec<_> = error.fields().iter().map(|f| f.field.as_str()).collect();
        assert_eq!(fields, ["idle_tax", "interval"]);
        assert!(ReclaimConfig { idle_tax: f64::NAN, ..ReclaimConfig::default() }.validate().is_err());
    }

    #[test]
    fn the_thread_begins_changes_and_ends() {
        let (reclaim, herd) = (Reclaim::default(), Arc::<Herd>::default());
        let samples = Arc::new(Samples::open(Arc::default()));
        let config = ReclaimConfig::default();
        for config in [Some(&config), Some(&config), None, Some(&config)] {
            reclaim.set(config, &herd, &samples).unwrap();
        }
        drop(reclaim);
        assert_eq!(Arc::strong_count(&herd), 1, "its thread has ended");
    }
}
