#![forbid(unsafe_code)]
//! What of the pool's pages is in the balloon.
//!
//! A driver names pages of 4 KiB in any order, and the pool has nothing smaller than its own: one goes when all of it is in
//! the balloon. A hole in a part of it would free nothing, and clear what a guest may use again by then.

use std::collections::BTreeMap;
use std::ops::Range;

use super::PAGE;

/// The pages of the pool of which something is in the balloon, by their numbers. A bit for each page in them: at most as many as
/// the guest has memory.
#[derive(Debug, Default)]
pub(super) struct Parts(BTreeMap<u64, Part>);

#[derive(Debug)]
struct Part {
    bits: Vec<u64>,
    count: u64,
}

impl Part {
    fn new(pages: u64) -> Self {
        Self { bits: vec![0; pages.div_ceil(64) as usize], count: 0 }
    }

    /// Says of a page whether it is in the balloon; `true` if that is new.
    fn set(&mut self, page: u64, taken: bool) -> bool {
        let (word, bit) = (&mut self.bits[(page / 64) as usize], 1 << (page % 64));
        if (*word & bit != 0) == taken {
            return false;
        }
        *word ^= bit;
        self.count = if taken { self.count + 1 } else { self.count - 1 };
        true
    }
}

impl Parts {
    /// A page of guest memory is in the balloon now. The page of the pool that has become whole by it, of `size` bytes.
    pub fn take(&mut self, page: u64, size: u64) -> Option<Range<u64>> {
        let (number, pages) = (page / size, size / PAGE);
        let part = self.0.entry(number).or_insert_with(|| Part::new(pages));
        let is_whole = part.set(page % size / PAGE, true) && part.count == pages;
        is_whole.then(|| number * size..(number + 1) * size)
    }

    /// It is the guest's again.
    pub fn give(&mut self, page: u64, size: u64) {
        let Some(part) = self.0.get_mut(&(page / size)) else { return };
        part.set(page % size / PAGE, false);
        if part.count == 0 {
            self.0.remove(&(page / size));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::memory::HUGE;
    use crate::virtio::queue_driver::Dice;

    #[test]
    fn a_page_of_the_pool_is_whole_with_its_last_part_whichever_that_is() {
        for size in [HUGE, 1 << 30] {
            let pages = size / PAGE;
            for last in [0, 1, pages / 2, pages - 1] {
                let mut parts = Parts::default();
                let take = |parts: &mut Parts, page| parts.take(3 * size + page * PAGE, size);
                assert!((0..pages).filter(|page| *page != last).all(|page| take(&mut parts, page).is_none()));
                // Another one meanwhile, and one that it has already.
                assert_eq!((parts.take(0, size), take(&mut parts, (last + 1) % pages)), (None, None));
                assert_eq!(take(&mut parts, last), Some(3 * size..4 * size));
                assert_eq!(take(&mut parts, last), None, "it has gone");
                parts.give(3 * size + 7 * PAGE, size);
                assert_eq!(take(&mut parts, 7), Some(3 * size..4 * size), "and goes again");
            }
        }
    }

    #[test]
    fn what_was_taken_and_given_at_random_is_whole_when_it_is() {
        const SIZE: u64 = 16 * PAGE;
        let (mut parts, mut dice, mut taken) = (Parts::default(), Dice(5), BTreeSet::new());
        let mut whole = 0;
        for _ in 0..20_000 {
            let page = dice.below(64) * PAGE;
            let own = page / SIZE * SIZE..(page / SIZE + 1) * SIZE;
            if dice.below(5) == 0 {
                taken.remove(&page);
                parts.give(page, SIZE);
                continue;
            }
            let is_new = taken.insert(page);
            let wanted = is_new && taken.range(own.clone()).count() == 16;
            assert_eq!(parts.take(page, SIZE), wanted.then_some(own));
            whole += u32::from(wanted);
        }
        assert!(whole > 10, "{whole}");
        taken.into_iter().for_each(|page| parts.give(page, SIZE));
        assert!(parts.0.is_empty(), "nothing is kept of what nothing is taken of");
    }
}
