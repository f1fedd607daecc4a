#![forbid(unsafe_code)]
//! The VMs of a host, for whoever carries out what is to be done when its memory gets short.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, Weak};
use std::time::{Duration, Instant};

use super::machine::{Machine, VmState};
use crate::budget::reclaim::{Standing, VmSample};
use crate::events::{EventKind, ReclaimStage, StopCause, VmId};
use crate::sys::lock;
use crate::sys::log;
use crate::units::Bytes;
use crate::virtio::balloon::Control;

/// How long a guest that took memory back by itself is left alone.
const PEACE: Duration = Duration::from_secs(30);

/// How often a VM is asked to go on at the end.
const ATTEMPTS: u32 = 3;

/// Every VM that has been built and not dropped.
#[derive(Default)]
pub(crate) struct Herd(Mutex<BTreeMap<u64, Arc<Place>>>);

/// A VM's place in the herd. Who works on the VM holds the lock, and a VM that is being dropped waits for it: so nobody
/// else ever drops the last of one, or of a part of it.
struct Place {
    machine: Mutex<Weak<Machine>>,
    /// Nobody is to work on it any more.
    left: AtomicBool,
    /// Where paging out goes on.
    cursor: AtomicU64,
    balloon: Weak<Control>,
}

impl Place {
    /// Nobody else works on the VM as long as this is held.
    fn hold(&self) -> MutexGuard<'_, Weak<Machine>> {
        let mut held = lock(&self.machine);
        if self.left.load(Ordering::SeqCst) {
            *held = Weak::new();
        }
        held
    }
}

impl Herd {
    pub(super) fn join(&self, machine: &Arc<Machine>) {
        let balloon = machine.board.balloon.as_ref().map_or_else(Weak::new, Arc::downgrade);
        let (id, machine) = (machine.id.0, Mutex::new(Arc::downgrade(machine)));
        let (left, cursor) = (AtomicBool::new(false), AtomicU64::new(0));
        lock(&self.0).insert(id, Arc::new(Place { machine, left, cursor, balloon }));
    }

    /// Takes a VM out; when this returns, nobody works on it.
    pub(super) fn leave(&self, id: u64) {
        // The herd's own lock is not held meanwhile: whoever works on the VM may take long.
        let place = lock(&self.0).remove(&id);
        if let Some(place) = place {
            *lock(&place.machine) = Weak::new();
        }
    }

    /// The same without waiting, for who is waited for.
    pub(super) fn leave_soon(&self, id: u64) {
        if let Some(place) = lock(&self.0).remove(&id) {
            place.left.store(true, Ordering::SeqCst);
        }
    }

    /// What all guests say that they have given up. Waits for nobody who works on a VM.
    pub fn loaned(&self) -> Bytes {
        // Under the lock, which a VM that is dropped takes before it lets go of anything: this is never the last that has it.
        let herd = lock(&self.0);
        let balloons = herd.values().filter_map(|place| place.balloon.upgrade());
        Bytes(balloons.fold(0, |sum, balloon| sum.saturating_add(balloon.actual().get())))
    }

    /// Every VM, as the policy sees it; `paused` are those that it has paused, with their deadlines.
    pub fn sample(&self, paused: &BTreeMap<u64, Duration>) -> Vec<VmSample> {
        let places: Vec<_> = lock(&self.0).iter().map(|(id, place)| (*id, place.clone())).collect();
        let sample = |(id, place): (u64, Arc<Place>)| {
            let held = place.hold();
            held.upgrade().and_then(|machine| machine.reclaim_sample(paused.get(&id).copied()))
        };
        places.into_iter().filter_map(sample).collect()
    }

    /// Does something with one VM; `None` where it is gone.
    fn with<R>(&self, id: u64, f: impl FnOnce(&Machine, &AtomicU64) -> R) -> Option<R> {
        let place = lock(&self.0).get(&id).cloned()?;
        let held = place.hold();
        held.upgrade().map(|machine| f(&machine, &place.cursor))
    }

    /// Asks the guest to give up that much, beside what the embedder asks of it.
    pub fn set_balloon(&self, id: u64, bytes: u64) {
        self.with(id, |machine, _| {
            let Some(control) = &machine.board.balloon else { return };
            control.set_extra(bytes);
            let now = control.statistics();
            let (claimed, measured) = (now.inflated.claimed, now.inflated.measured);
            machine.tell_pressure(ReclaimStage::Balloon, Bytes(bytes), claimed, measured, None);
        });
    }

    /// Asks the guest for a new account of its memory; the next sample has it.
    pub fn ask(&self, id: u64) {
        self.with(id, |machine, _| machine.board.balloon.as_ref().map(|control| control.ask()));
    }

    /// Pages `bytes` of the VM out, as far as it comes until the deadline, going on where the last time ended.
    pub fn page_out(&self, id: u64, bytes: u64, deadline: Instant) {
        self.with(id, |machine, cursor| {
            let done = machine.memory.page_out(cursor.load(Ordering::Relaxed), bytes, deadline);
            cursor.store(done.next, Ordering::Relaxed);
            let (claimed, measured) = (Bytes(done.named), Bytes(done.gone));
            machine.tell_pressure(ReclaimStage::PageOut, Bytes(bytes), claimed, measured, None);
        });
    }

    /// Pauses the VM for at most that long; whether it stands.
    pub fn pause(&self, id: u64, at_most: Duration) -> bool {
        let paused = self.with(id, |machine, _| {
            let there = Bytes(machine.meter.backing());
            let zero = Bytes(0);
            machine.tell_pressure(ReclaimStage::Pause, there, zero, zero, Some(at_most));
            machine.pause()
        });
        // Outside: a logger may drop the VM.
        match paused {
            Some(Ok(())) => true,
            Some(Err(error)) => {
                log::warn!("{}: for want of memory: {error}", VmId(id));
                false
            }
            None => false,
        }
    }

    /// Lets a VM go on that was paused so; whether it stands no longer for that.
    pub fn resume(&self, id: u64) -> bool {
        let resumed = self.with(id, |machine, _| {
            let stays = || machine.state() == VmState::Paused && machine.end.cause.get().is_none();
            machine.resume().map_err(|error| (error, stays()))
        });
        let Some(Err((error, stays))) = resumed else { return true };
        if stays {
            log::warn!("{}, which was paused for want of memory: {error}", VmId(id));
        } else {
            // The embedder was faster, or it has ended.
            log::debug!("resuming a VM that was paused for want of memory: {error}");
        }
        !stays
    }

    /// Stops a victim. Never blocks; its memory is given back with [`clear`](Self::clear), once it has ended.
    pub fn stop(&self, id: u64) {
        let line = self.with(id, |machine, _| {
            let there = Bytes(machine.meter.backing());
            machine.tell_pressure(ReclaimStage::Stop, there, Bytes(0), Bytes(0), None);
            machine.end.line(machine.id)
        });
        // Outside: it is logged, and a logger may drop the VM.
        if let Some(line) = line {
            line.pull(StopCause::MemoryPressure);
        }
    }

    /// Gives the memory of a VM back that was stopped for want of it. `false` while its vCPUs have not left.
    pub fn clear(&self, id: u64) -> bool {
        let cleared = self.with(id, |machine, _| {
            let ended = machine.state() == VmState::Stopped(StopCause::MemoryPressure);
            let given = if ended { machine.memory.discard_all() } else { Ok(()) };
            (ended || matches!(machine.state(), VmState::Stopped(_)), given)
        });
        // Outside: a logger may drop the VM.
        if let Some((_, Err(error))) = &cleared {
            log::warn!("giving a guest's memory back: {error}");
        }
        cleared.is_none_or(|(cleared, _)| cleared)
    }

    /// Has the paused ones go on, and asks nothing more of anybody; says `why` it was failed, if so. VMs on which somebody works, who may
    /// be who failed, come last.
    pub fn give_up(&self, why: Option<&str>, paused: &BTreeMap<u64, Duration>) {
        let is_held = |place: &Place| matches!(place.machine.try_lock(), Err(TryLockError::WouldBlock));
        let (held, free): (Vec<_>, Vec<_>) =
            lock(&self.0).iter().map(|(id, place)| (*id, is_held(place))).partition(|(_, held)| *held);
        for (id, _) in free.into_iter().chain(held) {
            if let Some(why) = why {
                self.with(id, |machine, _| machine.tell(EventKind::ReclaimFailed { why: why.to_owned() }));
            }
            // What fails may do so once.
            if paused.contains_key(&id) && !(0..ATTEMPTS).any(|_| self.resume(id)) {
                log::error!("{} stays paused: nobody has it go on but its embedder", VmId(id));
            }
            self.with(id, |machine, _| machine.board.balloon.as_ref().map(|control| control.set_extra(0)));
        }
    }
}

impl Machine {
    /// `None` at its end: there is nothing to be had by the policy any more.
    fn reclaim_sample(&self, paused: Option<Duration>) -> Option<VmSample> {
        let (claim, _) = self.reservation.terms();
        let control = self.board.balloon.as_deref();
        let (asked, ballooned) = control.map_or((0, 0), |control| control.extra());
        let standing = match (self.state(), paused) {
            (VmState::Running, _) => Standing::Running,
            (VmState::Paused, Some(until)) => Standing::Paused { until },
            (VmState::Stopped(_), _) => return None,
            _ => Standing::Other,
        };
        Some(VmSample {
            id: self.id.0,
            max: claim.memory.get(),
            guarantee: claim.guaranteed(),
            resident: self.meter.resident(),
            idle: control.map_or(0, |control| control.idle()),
            asked,
            ballooned,
            needs_all: control.is_some_and(|control| control.took_back_within(PEACE)),
            victim: claim.victim,
            standing,
        })
    }

    /// Under the lock: nothing comes after the event of its end.
    fn tell(&self, kind: EventKind) {
        let state = lock(&self.state);
        if !matches!(*state, VmState::Stopped(_)) {
            self.reporter.report(kind);
        }
    }

    fn tell_pressure(
        &self,
        stage: ReclaimStage,
        wanted: Bytes,
        claimed: Bytes,
        measured: Bytes,
        deadline: Option<Duration>,
    ) {
        self.tell(EventKind::MemoryPressure { stage, wanted, claimed, measured, deadline });
    }
}
