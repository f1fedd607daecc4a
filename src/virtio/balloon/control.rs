#![forbid(unsafe_code)]
//! What the embedder's threads, the registers and the balloon's worker share.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::PAGE;
use super::statistics::{BalloonStatistics, Counters, GuestMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::events::EventKind;
use crate::sys::{fd, lock};
use crate::units::Bytes;
use crate::virtio::Signals;

/// No hints are wanted, and the driver keeps those that it gave (`VIRTIO_BALLOON_CMD_ID_STOP`).
const HINT_STOP: u32 = 0;
/// The driver may use those pages again (`VIRTIO_BALLOON_CMD_ID_DONE`).
const HINT_DONE: u32 = 1;
/// The least time between two events about a guest that takes memory back by itself.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);

/// A balloon, as its VM's handle sees it.
pub(crate) struct Control {
    id: String,
    signals: Signals,
    memory: u64,
    /// Pages that the guest is asked to give up, and that it says it has.
    target: AtomicU32,
    actual: AtomicU32,
    /// What the driver fills free pages with.
    poison: AtomicU32,
    /// What is said about hints: a number of ours, or one of the two above.
    hint: AtomicU32,
    /// The driver has queues for these.
    can_count: AtomicBool,
    can_hint: AtomicBool,
    pub(super) counters: Counters,
    wishes: Mutex<Wishes>,
    changed: Condvar,
    /// Wakes the worker: somebody wants the guest's numbers.
    pub(super) bell: EventFd,
}

/// What is asked of the guest, and how far it has come.
#[derive(Default)]
struct Wishes {
    /// Counts the times that numbers were asked for, and how many of them are answered.
    asked: u64,
    answered: u64,
    guest: Option<GuestMemory>,
    /// What the balloon held when that came.
    held: u64,
    /// The last number that hints were asked with.
    hint: u32,
    hinting: bool,
    /// Nobody waits for them any longer.
    enough: bool,
    /// There is no guest any more that could answer.
    ended: bool,
    /// What the embedder asks for, and what is asked beside it, in bytes: the target is their sum.
    own: u64,
    extra: u64,
    /// The target has been told of; when the guest was last told on.
    reached: bool,
    told: Option<Instant>,
    /// When it last took memory out by itself.
    took_back: Option<Instant>,
}

impl Control {
    pub fn new(id: &str, memory: u64, signals: Signals) -> Result<Self> {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Self {
            id: id.into(),
            signals,
            memory,
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            poison: AtomicU32::new(0),
            hint: AtomicU32::new(HINT_STOP),
            can_count: AtomicBool::new(false),
            can_hint: AtomicBool::new(false),
            counters: Counters::default(),
            wishes: Mutex::new(Wishes { reached: true, ..Wishes::default() }),
            changed: Condvar::new(),
            bell: bell.map_err(|e| Error::os(format!("creating an eventfd for {id}"), e))?,
        })
    }

    pub fn statistics(&self) -> BalloonStatistics {
        let Counters { inflated, reported, hinted, deflated, ignored } = &self.counters;
        BalloonStatistics {
            target: pages(&self.target),
            actual: self.actual(),
            inflated: inflated.get(),
            deflated: Bytes(deflated.get()),
            reported: reported.get(),
            hinted: hinted.get(),
            ignored: ignored.get(),
        }
    }

    /// What the guest says that it has given up.
    pub fn actual(&self) -> Bytes {
        pages(&self.actual)
    }

    /// What the guest last said of its memory.
    pub fn last_guest_memory(&self) -> Option<GuestMemory> {
        lock(&self.wishes).guest
    }

    /// What the guest could do without by its last account, less what it has given up since; 0 where it says nothing.
    pub fn idle(&self) -> u64 {
        let wishes = lock(&self.wishes);
        let told = wishes.guest.and_then(|guest| guest.available.or(guest.free)).map_or(0, Bytes::get);
        told.saturating_add(wishes.held).saturating_sub(self.actual().get())
    }

    /// Asks the guest to give up that much in all, in whole pages.
    ///
    /// # Errors
    /// `InvalidArgument` for more than its memory.
    pub fn set_target(&self, target: Bytes) -> Result<()> {
        if target.get() > self.memory {
            let why =
                format!("{}: a target of {target}: at most the VM's memory, {}", self.id, Bytes(self.memory));
            return Err(Error::new(ErrorKind::InvalidArgument, why));
        }
        lock(&self.wishes).own = target.get();
        self.retarget();
        Ok(())
    }

    /// Asks the guest for that much beside what the embedder asks for, as far as there is so much.
    pub fn set_extra(&self, extra: u64) {
        lock(&self.wishes).extra = extra;
        self.retarget();
    }

    /// What the guest is asked for beside what the embedder asks, and how much of that it has given up.
    pub fn extra(&self) -> (u64, u64) {
        let wishes = lock(&self.wishes);
        (wishes.extra, self.actual().get().saturating_sub(wishes.own).min(wishes.extra))
    }

    /// Whether the guest has taken memory back by itself in the last so long.
    pub fn took_back_within(&self, time: Duration) -> bool {
        lock(&self.wishes).took_back.is_some_and(|at| at.elapsed() < time)
    }

    fn retarget(&self) {
        let mut wishes = lock(&self.wishes);
        let target = wishes.own.saturating_add(wishes.extra).min(self.memory) / PAGE;
        let target = u32::try_from(target).unwrap_or(u32::MAX);
        let changed = self.target.swap(target, Ordering::SeqCst) != target;
        wishes.reached &= !changed;
        drop(wishes);
        if changed {
            self.signals.config_changed();
        }
    }

    /// Asks the guest for its numbers, without waiting for them.
    pub fn ask(&self) -> u64 {
        let mut wishes = lock(&self.wishes);
        wishes.asked += 1;
        let ticket = wishes.asked;
        drop(wishes);
        // Full only when it rings anyway.
        fd::ring(&self.bell);
        ticket
    }

    /// Asks the guest for its numbers and waits until the deadline for them.
    ///
    /// # Errors
    /// `Unsupported` where its driver has no such queue; `TimedOut`.
    pub fn guest_memory(&self, deadline: Instant) -> Result<GuestMemory> {
        self.only_if(&self.can_count, "gives no account of its memory")?;
        let ticket = self.ask();
        let told = self.wait(deadline, |wishes| wishes.guest.filter(|_| wishes.answered >= ticket));
        told.ok_or_else(|| self.unanswered("given an account of its memory"))
    }

    /// Asks the guest for all of its free pages, and waits until the deadline while they are given back. Answers how
    /// much the host has got.
    ///
    /// # Errors
    /// `Unsupported` where its driver gives no hints; `Busy` while another thread asks; `TimedOut`: what was given back
    /// by then stays so.
    pub fn discard_free_pages(&self, deadline: Instant) -> Result<Bytes> {
        let before = self.counters.hinted.measured.get();
        self.begin_hints()?;
        let ended = self.wait(deadline, |wishes| (!wishes.hinting).then_some(()));
        if ended.is_none() {
            // Only the worker knows when it touches no page any more.
            lock(&self.wishes).enough = true;
            fd::ring(&self.bell);
            return Err(self.unanswered("named all of its free pages"));
        }
        Ok(Bytes(self.counters.hinted.measured.get().saturating_sub(before)))
    }

    /// Asks the guest for all of its free pages.
    pub(crate) fn begin_hints(&self) -> Result<()> {
        self.only_if(&self.can_hint, "gives no hints about free pages")?;
        let mut wishes = lock(&self.wishes);
        if wishes.ended {
            drop(wishes);
            return Err(self.unanswered("named any free pages"));
        }
        if std::mem::replace(&mut wishes.hinting, true) {
            let why = format!("{}: free pages are asked for already", self.id);
            return Err(Error::new(ErrorKind::Busy, why));
        }
        // Any number that is neither of the two, and not the last one.
        wishes.hint = wishes.hint.wrapping_add(1).max(HINT_DONE + 1);
        self.hint.store(wishes.hint, Ordering::SeqCst);
        drop(wishes);
        self.signals.config_changed();
        Ok(())
    }

    fn only_if(&self, can: &AtomicBool, why: &str) -> Result<()> {
        if can.load(Ordering::SeqCst) {
            return Ok(());
        }
        let why = format!("{}: the guest has no driver for it, or one that {why}", self.id);
        Err(Error::new(ErrorKind::Unsupported, why))
    }

    /// The VM has come to its end: whoever waits for its guest's answers waits no longer.
    pub fn end(&self) {
        lock(&self.wishes).ended = true;
        self.changed.notify_all();
    }

    fn unanswered(&self, what: &str) -> Error {
        if lock(&self.wishes).ended {
            let why = format!("{}: the VM has ended, and its guest has not {what}", self.id);
            return Error::new(ErrorKind::InvalidState, why);
        }
        Error::new(ErrorKind::TimedOut, format!("{}: the guest has not {what} in time", self.id))
    }

    /// Waits until `look` has an answer; `None` at the deadline, and where the VM has ended.
    fn wait<R>(&self, deadline: Instant, look: impl Fn(&Wishes) -> Option<R>) -> Option<R> {
        let mut wishes = lock(&self.wishes);
        loop {
            if let Some(answer) = look(&wishes) {
                return Some(answer);
            }
            if wishes.ended {
                return None;
            }
            let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            let waited = self.changed.wait_timeout(wishes, left);
            wishes = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

/// What the registers and the worker say.
impl Control {
    /// `struct virtio_balloon_config` (5.5.4).
    pub(super) fn config(&self) -> [u8; 16] {
        let mut space = [0; 16];
        for (i, field) in [&self.target, &self.actual, &self.hint, &self.poison].into_iter().enumerate() {
            space[4 * i..4 * i + 4].copy_from_slice(&field.load(Ordering::SeqCst).to_le_bytes());
        }
        space
    }

    /// The driver says how many pages it has given up. More than there are would be a lie.
    pub(super) fn set_actual(&self, actual: u32) {
        let most = u32::try_from(self.memory / PAGE).unwrap_or(u32::MAX);
        let actual = actual.min(most);
        let old = self.actual.swap(actual, Ordering::SeqCst);
        let target = self.target.load(Ordering::SeqCst);
        let mut wishes = lock(&self.wishes);
        let now = Instant::now();
        let arrived = actual == target && !std::mem::replace(&mut wishes.reached, actual == target);
        let by_itself = actual < old && old <= target;
        if by_itself {
            wishes.took_back = Some(now);
        }
        let took_back = by_itself && wishes.told.is_none_or(|at| now - at >= EVENT_INTERVAL);
        if took_back {
            wishes.told = Some(now);
        }
        drop(wishes);
        if arrived || took_back {
            let bytes = |pages: u32| Bytes(u64::from(pages) * PAGE);
            self.signals.report(EventKind::Balloon { target: bytes(target), actual: bytes(actual) });
        }
    }

    pub(super) fn set_poison(&self, poison: u32) {
        self.poison.store(poison, Ordering::SeqCst);
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.poison.load(Ordering::SeqCst) != 0
    }

    /// A driver has come, with queues for these.
    pub(super) fn attach(&self, can_count: bool, can_hint: bool) {
        self.can_count.store(can_count, Ordering::SeqCst);
        self.can_hint.store(can_hint, Ordering::SeqCst);
    }

    /// The last time that numbers were asked for, if that is not answered.
    pub(super) fn asked(&self) -> Option<u64> {
        let wishes = lock(&self.wishes);
        (wishes.answered < wishes.asked).then_some(wishes.asked)
    }

    /// Numbers have come, with which everything that was asked up to there is answered.
    pub(super) fn answer(&self, guest: GuestMemory, asked: Option<u64>) {
        let mut wishes = lock(&self.wishes);
        wishes.guest = Some(guest);
        wishes.held = self.actual().get();
        wishes.answered = wishes.answered.max(asked.unwrap_or(0));
        drop(wishes);
        self.changed.notify_all();
    }

    /// Whether hints with this number are of the request that is waited for.
    pub(super) fn is_hinting(&self, id: u32) -> bool {
        id > HINT_DONE && self.hint.load(Ordering::SeqCst) == id
    }

    /// Whether hints are still taken that nobody waits for.
    pub(super) fn has_hints_enough(&self) -> bool {
        lock(&self.wishes).enough
    }

    /// The driver may use the pages again that it gave hints about. Only on the thread that discards them.
    pub(super) fn end_hints(&self) {
        let mut wishes = lock(&self.wishes);
        wishes.enough = false;
        if !std::mem::take(&mut wishes.hinting) {
            return;
        }
        self.hint.store(HINT_DONE, Ordering::SeqCst);
        drop(wishes);
        self.changed.notify_all();
        self.signals.config_changed();
    }

    /// The driver is gone, with its promises. What was asked of it is asked of the next one.
    pub(super) fn reset(&self) {
        let Self { target: _, actual, poison, hint, can_count, can_hint, .. } = self;
        actual.store(0, Ordering::SeqCst);
        poison.store(0, Ordering::SeqCst);
        can_count.store(false, Ordering::SeqCst);
        can_hint.store(false, Ordering::SeqCst);
        let mut wishes = lock(&self.wishes);
        hint.store(HINT_STOP, Ordering::SeqCst);
        (wishes.hinting, wishes.enough, wishes.reached) = (false, false, true);
        drop(wishes);
        self.changed.notify_all();
    }
}

fn pages(count: &AtomicU32) -> Bytes {
    Bytes(u64::from(count.load(Ordering::SeqCst)) * PAGE)
}
