#![forbid(unsafe_code)]
//! Gives guest memory back in pieces that are worth a system call.
//!
//! A driver names single pages, many at a time, in any order. What lies side by side is one call, up to a huge page
//! at a time: a hole as large as the host's page frees it whole, and each call interrupts every processor that
//! runs the guest. A piece that is not full at the end of a request may be held for the next one to fill. Of the
//! administrator's pool only its own pages go, when all of one is there ([`Parts`]).

use std::ops::Range;

use super::PAGE;
use super::parts::Parts;
use crate::memory::{HUGE, Memory};
use crate::reactor::Leaving;
use crate::sys::log;

/// What was named, and what came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Guest memory, in bytes.
    pub claimed: u64,
    /// What the host has got.
    pub measured: u64,
    /// Pages or ranges that are not guest memory.
    pub ignored: u64,
}

pub(super) struct Discarder {
    memory: Memory,
    /// Set when somebody wants the worker back.
    pub leaving: Leaving,
    /// The driver tells us before it uses pages again (`VIRTIO_BALLOON_F_MUST_TELL_HOST`): only then may anything
    /// be held after its request was completed.
    may_hold: bool,
    held: Option<Range<u64>>,
    /// On the pool: the size of its pages.
    pool_page: Option<u64>,
    parts: Parts,
    outcome: Outcome,
    /// Calls since the last [`take_calls`](Self::take_calls).
    calls: u32,
}

impl Discarder {
    /// `parts` are those of a worker before it.
    pub fn new(memory: Memory, may_hold: bool, parts: Parts) -> Self {
        let (leaving, held, outcome, pool_page) =
            (Leaving::default(), None, Outcome::default(), memory.pool_page());
        Self { memory, leaving, may_hold, held, pool_page, parts, outcome, calls: 0 }
    }

    /// Gives pages back, which are sorted for it. Pages may be held until the next call, or until [`flush`](Self::flush).
    pub fn pages(&mut self, pfns: &mut [u32]) {
        if let Some(size) = self.pool_page {
            return pfns.iter().for_each(|pfn| self.part(u64::from(*pfn) * PAGE, size));
        }
        let of = |page: u64| page / HUGE;
        // What is held comes first, and where the driver was last is held then: it goes on there, at whichever addresses.
        let held = self.held.as_ref().map(|held| of(held.start));
        let last = pfns.last().map(|pfn| of(u64::from(*pfn) * PAGE));
        pfns.sort_unstable();
        for turn in 0..3 {
            let turn_of = |page: u64| match Some(of(page)) {
                at if at == held => 0,
                at if at == last => 2,
                _ => 1,
            };
            self.runs(pfns.iter().map(|pfn| u64::from(*pfn) * PAGE).filter(|page| turn_of(*page) == turn));
        }
    }

    /// A part of a page of the pool.
    fn part(&mut self, page: u64, size: u64) {
        if !self.memory.is_ram(page, PAGE) {
            self.outcome.ignored += 1;
            return;
        }
        self.outcome.claimed += PAGE;
        if let Some(whole) = self.parts.take(page, size) {
            self.punch(whole);
        }
    }

    /// These are in the balloon no more.
    pub fn forget(&mut self, pfns: &[u32]) {
        if let Some(size) = self.pool_page {
            pfns.iter().for_each(|pfn| self.parts.give(u64::from(*pfn) * PAGE, size));
        }
    }

    /// What another one is to know.
    pub fn into_parts(self) -> Parts {
        self.parts
    }

    /// Pages in the order of their addresses.
    fn runs(&mut self, pages: impl Iterator<Item = u64>) {
        let mut run: Option<Range<u64>> = None;
        for page in pages {
            if !self.memory.is_ram(page, PAGE) {
                self.outcome.ignored += 1;
                continue;
            }
            self.outcome.claimed += PAGE;
            match &mut run {
                // The same page twice.
                Some(run) if page < run.end => {}
                Some(run) if page == run.end && !page.is_multiple_of(HUGE) => run.end += PAGE,
                _ => {
                    if let Some(run) = run.replace(page..page + PAGE) {
                        self.piece(run);
                    }
                }
            }
        }
        if let Some(run) = run {
            self.piece(run);
        }
    }

    /// Gives a range back at once; one that is not in whole pages of guest memory is ignored.
    pub fn range(&mut self, start: u64, len: u64) {
        if !start.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || !self.memory.is_ram(start, len) {
            self.outcome.ignored += 1;
            return;
        }
        self.outcome.claimed += len;
        let end = start + len;
        let mut at = start;
        while at < end && !self.leaving.is_set() {
            let next = end.min((at + 1).next_multiple_of(HUGE));
            self.punch(at..next);
            at = next;
        }
    }

    /// A run within one huge page: together with what is held where they touch.
    fn piece(&mut self, mut run: Range<u64>) {
        let same = |held: &Range<u64>| held.start / HUGE == run.start / HUGE;
        match self.held.take() {
            Some(held) if same(&held) && held.end == run.start => run.start = held.start,
            Some(held) if same(&held) && run.end == held.start => run.end = held.end,
            Some(held) => self.punch(held),
            None => {}
        }
        let len = run.end - run.start;
        if self.may_hold && (PAGE + 1..HUGE).contains(&len) {
            self.held = Some(run);
        } else {
            self.punch(run);
        }
    }

    pub fn is_holding(&self) -> bool {
        self.held.is_some()
    }

    /// Gives back what is held.
    pub fn flush(&mut self) {
        if let Some(held) = self.held.take() {
            self.punch(held);
        }
    }

    fn punch(&mut self, range: Range<u64>) {
        // Who does not say before it uses it again would find that there is none.
        if self.pool_page.is_some() && !self.may_hold {
            return;
        }
        self.calls += 1;
        match self.memory.discard(range.start, range.end - range.start) {
            Ok(measured) => self.outcome.measured += measured,
            // The guest keeps it: nothing is lost but the memory that might have been had.
            Err(error) => log::warn!("giving {range:#x?} of a guest's memory back: {error}"),
        }
    }

    pub fn take_outcome(&mut self) -> Outcome {
        std::mem::take(&mut self.outcome)
    }

    /// How many calls were made since they were last taken.
    pub fn calls(&self) -> u32 {
        self.calls
    }

    /// The same, and counts from 0 again.
    pub fn take_calls(&mut self) -> u32 {
        std::mem::take(&mut self.calls)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::queue_driver::Dice;

    const SIZE: u64 = 16 << 20;

    fn full(may_hold: bool) -> (Memory, Discarder) {
        let memory = Memory::new(SIZE).unwrap();
        for page in 0..SIZE / PAGE {
            memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
        }
        let discarder = Discarder::new(memory.clone(), may_hold, Parts::default());
        (memory, discarder)
    }

    fn gone(memory: &Memory) -> BTreeSet<u32> {
        let is_gone = |page: &u64| memory.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap() == 0;
        (0..SIZE / PAGE).filter(is_gone).map(|page| page as u32).collect()
    }

    #[test]
    fn neighbours_are_one_call_in_whatever_order_they_come() {
        for ascending in [true, false] {
            let (memory, mut discarder) = full(true);
            let mut requests: Vec<Vec<u32>> = (0..4).map(|n| (n * 256..(n + 1) * 256).collect()).collect();
            if !ascending {
                requests.reverse();
                requests.iter_mut().for_each(|request| request.reverse());
            }
            for request in &mut requests {
                discarder.pages(request);
            }
            assert_eq!((discarder.take_calls(), discarder.is_holding()), (2, false), "{ascending}");
            let want = Outcome { claimed: 4 << 20, measured: 4 << 20, ignored: 0 };
            assert_eq!(discarder.take_outcome(), want);
            assert_eq!(gone(&memory).len(), 1024);
        }
    }

    #[test]
    fn huge_pages_are_whole_in_whatever_order_they_are_taken() {
        let (memory, mut discarder) = full(true);
        // A driver that begins with a few others, and goes from one huge page to the next lower one amid its requests.
        let all: Vec<u32> = (1024..1124).chain(512..1024).chain(0..512).collect();
        all.chunks(256).for_each(|request| discarder.pages(&mut request.to_vec()));
        assert_eq!((discarder.take_calls(), discarder.is_holding()), (3, false));
        assert_eq!(gone(&memory).len(), all.len());
    }

    #[test]
    fn lone_pages_never_wait_and_nothing_waits_unless_the_driver_tells_first() {
        let (memory, mut discarder) = full(true);
        discarder.pages(&mut [5, 900, 7]);
        assert_eq!((gone(&memory), discarder.is_holding()), (BTreeSet::from([5, 7, 900]), false));
        discarder.pages(&mut [600, 601]);
        assert!(discarder.is_holding() && !gone(&memory).contains(&600));
        discarder.flush();
        assert!(gone(&memory).contains(&601));
        let (memory, mut discarder) = full(false);
        discarder.pages(&mut [600, 601]);
        assert_eq!((gone(&memory).len(), discarder.is_holding()), (2, false));
    }

    #[test]
    fn nonsense_is_ignored_and_counted() {
        let (memory, mut discarder) = full(false);
        discarder.pages(&mut [u32::MAX, 0xc_0000, (SIZE / PAGE) as u32, 3, 3, 3]);
        assert_eq!(discarder.take_outcome(), Outcome { claimed: 3 * PAGE, measured: PAGE, ignored: 3 });
        for (start, len) in
            [(1, PAGE), (PAGE, 1), (0, SIZE + PAGE), (u64::MAX - PAGE + 1, PAGE), (SIZE, PAGE)]
        {
            discarder.range(start, len);
        }
        assert_eq!(discarder.take_outcome(), Outcome { ignored: 5, ..Outcome::default() });
        assert_eq!(gone(&memory).len(), 1);
        discarder.range(PAGE, 4 << 20);
        // Looking at what was gone has brought it back.
        assert_eq!(discarder.take_outcome().measured, 4 << 20);
    }

    #[test]
    fn random_pages_are_given_back_exactly() {
        let (memory, mut discarder) = full(true);
        let (mut dice, mut want) = (Dice(11), BTreeSet::new());
        for _ in 0..200 {
            let start = dice.below(SIZE / PAGE) as u32;
            let step = 1 + dice.below(3) as u32;
            let mut pfns: Vec<u32> = (0..dice.below(300) as u32).map(|i| start + i * step).collect();
            if dice.below(2) == 0 {
                pfns.reverse();
            }
            want.extend(pfns.iter().filter(|pfn| u64::from(**pfn) < SIZE / PAGE));
            discarder.pages(&mut pfns);
        }
        discarder.flush();
        assert_eq!(gone(&memory), want);
        assert_eq!(discarder.take_outcome().measured, want.len() as u64 * PAGE);
    }
}
