#![forbid(unsafe_code)]
//! Serves the queues of a balloon on its loop.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use event_manager::{EventSet, Events};
use vmm_sys_util::timerfd::TimerFd;

use super::PAGE;
use super::control::Control;
use super::discard::{Discarder, Outcome};
use super::parts::Parts;
use super::statistics::{Given, GuestMemory};
use crate::memory::{HUGE, Memory};
use crate::reactor::{self, Leaving, Watch};
use crate::virtio::queue::{Chain, Next, QueueFault};
use crate::virtio::{Queue, Signals};

/// Page numbers that are read at a time.
const PFNS: usize = 1024;
/// Those of one request. Linux sends 256; what is beyond is ignored.
const MOST_PFNS: usize = 4 * PFNS;
/// Calls to the host after which other work has its turn.
const CALLS_AT_ONCE: u32 = 256;
/// How long pages may be held for their neighbours to come.
const HOLD: Duration = Duration::from_millis(10);
/// The numbers of one account. The specification knows 16.
const MOST_NUMBERS: usize = 64;

/// The queues, each where the driver has it.
#[derive(Default)]
pub(super) struct Queues {
    pub inflate: Option<Queue>,
    pub deflate: Option<Queue>,
    pub statistics: Option<Queue>,
    pub hints: Option<Queue>,
    pub reports: Option<Queue>,
}

impl Queues {
    pub fn all(&mut self) -> [&mut Option<Queue>; 5] {
        let Self { inflate, deflate, statistics, hints, reports } = self;
        [inflate, deflate, statistics, hints, reports]
    }
}

type Serve = fn(&mut Worker) -> Result<(), QueueFault>;

pub(super) struct Worker {
    queues: Queues,
    memory: Memory,
    signals: Signals,
    control: Arc<Control>,
    discarder: Discarder,
    timer: TimerFd,
    /// The driver has agreed that free pages are as it filled them (`VIRTIO_BALLOON_F_PAGE_POISON`).
    poison: bool,
    /// The driver's account of its memory, which we keep until somebody asks for another one.
    account: Option<u16>,
    /// It was given back because somebody asked for another one: so often had they by then.
    requested: Option<u64>,
    /// The request that the driver's hints belong to, as it says.
    hinting: u32,
    chain: Chain,
    pfns: Vec<u32>,
    broken: bool,
}

/// What a driver and its device have agreed on.
pub(super) struct Terms {
    pub tells_first: bool,
    pub poison: bool,
}

/// What stays in the device while its worker is away.
#[derive(Default)]
pub(super) struct Kept {
    pub account: Option<u16>,
    pub requested: Option<u64>,
    pub hinting: u32,
    /// What of the pool's pages is in the balloon.
    pub parts: Parts,
}

impl Worker {
    pub fn new(
        queues: Queues,
        memory: Memory,
        signals: Signals,
        control: Arc<Control>,
        terms: Terms,
        kept: Kept,
    ) -> std::io::Result<Self> {
        let discarder = Discarder::new(memory.clone(), terms.tells_first, kept.parts);
        Ok(Self {
            chain: Chain::with_capacity(super::QUEUE_SIZE),
            queues,
            memory,
            signals,
            control,
            discarder,
            timer: TimerFd::new()?,
            poison: terms.poison,
            account: kept.account,
            requested: kept.requested,
            hinting: kept.hinting,
            pfns: Vec::with_capacity(PFNS),
            broken: false,
        })
    }

    /// Ends its work: nothing is held any more.
    pub fn finish(mut self) -> (Queues, Kept) {
        self.discarder.flush();
        self.count_inflated();
        let Self { queues, account, requested, hinting, discarder, .. } = self;
        (queues, Kept { account, requested, hinting, parts: discarder.into_parts() })
    }

    /// Serves every queue.
    #[cfg(any(test, feature = "internals"))]
    pub fn process_queues(&mut self) {
        // Deflation first: a guest that needs its memory waits for it.
        self.step(Self::deflate);
        self.step(Self::inflate);
        self.step(Self::statistics);
        self.step(Self::hints);
        self.step(Self::reports);
    }

    fn step(&mut self, serve: Serve) {
        if self.broken {
            return;
        }
        if let Err(fault) = serve(self) {
            self.broken = true;
            self.signals.needs_reset(fault);
        }
    }

    fn inflate(&mut self) -> Result<(), QueueFault> {
        let Self { queues, memory, discarder, chain, pfns, .. } = self;
        let Some(queue) = &mut queues.inflate else { return Ok(()) };
        discarder.take_calls();
        let drained = queue.drain(memory, chain, |queue, chain| {
            if discarder.leaving.is_set() {
                queue.give_back(chain.head);
                return Ok(Next::Enough);
            }
            each_pfns(memory, chain, pfns, |pfns| discarder.pages(pfns));
            queue.complete(memory, chain.head, 0)?;
            Ok(enough(discarder))
        });
        finish(queue, memory, drained)?;
        self.count_inflated();
        if self.discarder.is_holding() {
            // Without a timer, what is held would wait for the next request.
            if self.timer.reset(HOLD, None).is_err() {
                self.flush();
            }
        }
        Ok(())
    }

    fn deflate(&mut self) -> Result<(), QueueFault> {
        let Self { queues, memory, control, discarder, chain, pfns, .. } = self;
        let Some(queue) = &mut queues.deflate else { return Ok(()) };
        let mut fetched = 0;
        let drained = queue.drain(memory, chain, |queue, chain| {
            // What is held may be among what the driver takes back.
            discarder.flush();
            let (mut pages, mut ignored) = (0, 0);
            each_pfns(memory, chain, pfns, |pfns| {
                let ram = |pfn: &&u32| memory.is_ram(u64::from(**pfn) * PAGE, PAGE);
                let good = pfns.iter().filter(ram).count() as u64;
                pages += good;
                ignored += pfns.len() as u64 - good;
                discarder.forget(pfns);
                fetched += restore(memory, pfns, &discarder.leaving);
            });
            if discarder.leaving.is_set() {
                queue.give_back(chain.head);
                return Ok(Next::Enough);
            }
            control.counters.deflated.add(pages * PAGE);
            control.counters.ignored.add(ignored);
            queue.complete(memory, chain.head, 0)?;
            Ok(if fetched >= CALLS_AT_ONCE { Next::Enough } else { Next::More })
        });
        finish(queue, memory, drained)?;
        self.count_inflated();
        Ok(())
    }

    fn statistics(&mut self) -> Result<(), QueueFault> {
        let Self { queues, memory, control, chain, account, requested, .. } = self;
        let Some(queue) = &mut queues.statistics else { return Ok(()) };
        let drained = queue.drain(memory, chain, |queue, chain| {
            // A driver has one of them; a second one asks for the first.
            if let Some(head) = account.replace(chain.head) {
                queue.complete(memory, head, 0)?;
            }
            // One that nobody has requested may be old: it answers nothing.
            control.answer(read_account(memory, chain), requested.take());
            Ok(Next::More)
        });
        // What was given back comes again with new numbers.
        if let (true, Some(asked), Some(head)) = (drained.is_ok(), control.asked(), *account)
            && requested.is_none()
        {
            (*account, *requested) = (None, Some(asked));
            queue.complete(memory, head, 0)?;
        }
        finish(queue, memory, drained)
    }

    fn hints(&mut self) -> Result<(), QueueFault> {
        let Self { queues, memory, control, discarder, chain, hinting, poison, .. } = self;
        let Some(queue) = &mut queues.hints else { return Ok(()) };
        discarder.take_calls();
        let mut ended = control.has_hints_enough();
        let drained = queue.drain(memory, chain, |queue, chain| {
            if discarder.leaving.is_set() {
                queue.give_back(chain.head);
                return Ok(Next::Enough);
            }
            if let Ok(id) = chain.reader(memory).read_array() {
                let id = u32::from_le_bytes(id);
                // The last word on what was asked for, and not on something before.
                ended |= control.is_hinting(*hinting) && id != *hinting;
                *hinting = id;
            }
            if !ended && control.is_hinting(*hinting) && !(*poison && control.is_poisoned()) {
                chain.writable.iter().for_each(|span| discarder.range(span.addr.0, span.len.into()));
            }
            queue.complete(memory, chain.head, 0)?;
            Ok(enough(discarder))
        });
        count(&control.counters.hinted, control, discarder);
        finish(queue, memory, drained)?;
        if ended {
            control.end_hints();
        }
        Ok(())
    }

    fn reports(&mut self) -> Result<(), QueueFault> {
        let Self { queues, memory, control, discarder, chain, poison, .. } = self;
        let Some(queue) = &mut queues.reports else { return Ok(()) };
        discarder.take_calls();
        let drained = queue.drain(memory, chain, |queue, chain| {
            if discarder.leaving.is_set() {
                queue.give_back(chain.head);
                return Ok(Next::Enough);
            }
            // What reads as something else must stay.
            if !(*poison && control.is_poisoned()) {
                chain.writable.iter().for_each(|span| discarder.range(span.addr.0, span.len.into()));
            }
            queue.complete(memory, chain.head, 0)?;
            Ok(enough(discarder))
        });
        count(&control.counters.reported, control, discarder);
        finish(queue, memory, drained)
    }

    fn flush(&mut self) {
        self.discarder.flush();
        self.count_inflated();
    }

    fn count_inflated(&mut self) {
        count(&self.control.counters.inflated, &self.control, &mut self.discarder);
    }
}

/// Has the pages there again that the driver is about to use; how many were fetched, in 2 MiB.
fn restore(memory: &Memory, pfns: &[u32], leaving: &Leaving) -> u32 {
    let Some(size) = memory.pool_page() else { return 0 };
    let (mut last, mut fetched) = (None, 0);
    for pfn in pfns {
        let page = u64::from(*pfn) * PAGE;
        // Neighbours are in the same one.
        if last.replace(page / size) != Some(page / size) {
            fetched += memory.restore(page, PAGE, || !leaving.is_set()) * (size / HUGE) as u32;
        }
    }
    fetched
}

/// Whether there were so many calls that others should have their turn.
fn enough(discarder: &mut Discarder) -> Next {
    if discarder.calls() >= CALLS_AT_ONCE { Next::Enough } else { Next::More }
}

/// Books what came of requests.
fn count(given: &Given, control: &Control, discarder: &mut Discarder) {
    let Outcome { claimed, measured, ignored } = discarder.take_outcome();
    given.claimed.add(claimed);
    given.measured.add(measured);
    control.counters.ignored.add(ignored);
}

/// Tells the driver what was done, and comes back for what was left.
fn finish(queue: &mut Queue, memory: &Memory, drained: Result<bool, QueueFault>) -> Result<(), QueueFault> {
    queue.notify(memory);
    if drained? {
        queue.rearm();
    }
    Ok(())
}

/// Calls `f` with the page numbers of a request, some at a time.
fn each_pfns(memory: &Memory, chain: &Chain, pfns: &mut Vec<u32>, mut f: impl FnMut(&mut [u32])) {
    let mut reader = chain.reader(memory);
    let mut left = (reader.remaining() / 4).min(MOST_PFNS as u64) as usize;
    let mut bytes = [0; 4 * PFNS];
    while left > 0 {
        let now = left.min(PFNS);
        left -= now;
        let bytes = &mut bytes[..4 * now];
        if reader.read(bytes).is_err() {
            return;
        }
        pfns.clear();
        pfns.extend(bytes.as_chunks().0.iter().map(|pfn| u32::from_le_bytes(*pfn)));
        f(pfns);
    }
}

/// `struct virtio_balloon_stat`, packed: 10 bytes each (5.5.6.3).
fn read_account(memory: &Memory, chain: &Chain) -> GuestMemory {
    let mut account = GuestMemory::new(SystemTime::now());
    let mut reader = chain.reader(memory);
    for _ in 0..MOST_NUMBERS {
        let (Ok(tag), Ok(value)) = (reader.read_array(), reader.read_array()) else { break };
        account.set(u16::from_le_bytes(tag), u64::from_le_bytes(value));
    }
    account
}

impl reactor::Worker for Worker {
    fn init(&mut self, watch: &mut Watch) {
        self.discarder.leaving = watch.leaving();
        let mut add = |fd: &dyn AsRawFd| watch.add(Events::new_raw(fd.as_raw_fd(), EventSet::IN));
        let doorbells = self.queues.all().map(|queue| queue.as_ref().map_or(Ok(()), |q| add(q.doorbell())));
        let own = [add(&self.control.bell), add(&self.timer)];
        if let Some(error) = doorbells.into_iter().chain(own).find_map(Result::err) {
            self.broken = true;
            self.signals.needs_reset(format_args!("the host cannot watch its doorbells: {error}"));
        }
        // What waits already may have been announced before we listened.
        self.queues.all().into_iter().flatten().for_each(|queue| queue.rearm());
    }

    fn process(&mut self, events: Events, _: &mut Watch) {
        let fd = events.fd();
        if fd == self.timer.as_raw_fd() {
            // Setting it clears it, and never waits, as reading could.
            let _ = self.timer.clear();
            return self.flush();
        }
        if fd == self.control.bell.as_raw_fd() {
            let _ = self.control.bell.read();
            self.step(Self::statistics);
            return self.step(Self::hints);
        }
        let all: [Serve; 5] = [Self::inflate, Self::deflate, Self::statistics, Self::hints, Self::reports];
        let mut serve = None;
        for (queue, its) in self.queues.all().into_iter().zip(all) {
            if let Some(queue) = queue.as_ref().filter(|q| q.doorbell().as_raw_fd() == fd) {
                queue.silence();
                serve = Some(its);
            }
        }
        if let Some(serve) = serve {
            self.step(serve);
        }
    }
}
