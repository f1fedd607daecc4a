//! What happens to the guests, and when: the same for the same seed.

use std::time::Duration;

use vmbed::{Bytes, RateLimit};

/// Numbers that look random (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for i in (1..all.len()).rev() {
            all.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

/// How a VM ends amid its work.
#[derive(Clone, Copy, Debug)]
pub enum How {
    Stop,
    StopWhilePaused,
    Drop,
}

#[derive(Clone, Copy, Debug)]
pub enum Act {
    /// It stands still for so long.
    Pause(Duration),
    /// It is to give back so much memory.
    Balloon(Bytes),
    /// Its disk becomes larger by so much, also while it stands still.
    Grow(Bytes, bool),
    /// Its disk and its card are limited, or not any more.
    Limit(RateLimit),
    /// It ends, and another one begins on its disk and its port.
    Restart(How),
}

/// One of each kind that there is, and more of what is cheap.
const DECK: usize = 13;

/// First a rest, then what happens to which guest. Every `DECK` steps have each kind.
pub struct Schedule {
    random: Random,
    guests: usize,
    deck: Vec<usize>,
    pub decks: usize,
}

impl Schedule {
    pub fn new(seed: u64, guests: usize) -> Self {
        Self { random: Random(seed), guests, deck: Vec::new(), decks: 0 }
    }

    pub fn next(&mut self) -> (Duration, usize, Act) {
        if self.deck.is_empty() {
            self.deck = (0..DECK).collect();
            self.random.shuffle(&mut self.deck);
        }
        let card = self.deck.pop().expect("it was filled");
        self.decks += usize::from(self.deck.is_empty());
        let random = &mut self.random;
        let rest = Duration::from_millis(200 + random.below(2800));
        let guest = random.below(self.guests as u64) as usize;
        let act = match card {
            0..=4 => Act::Pause(Duration::from_millis(20 + random.below(1500))),
            5..=7 => Act::Balloon(Bytes::mib(8 * random.below(6))),
            8..=9 => Act::Grow(Bytes(512 * (1 + random.below(4096))), card == 9),
            10..=11 if random.below(3) == 0 => Act::Limit(RateLimit::NONE),
            10..=11 => Act::Limit(RateLimit::NONE.bytes((1 + random.below(8)) << 18, 0)),
            _ => Act::Restart([How::Stop, How::StopWhilePaused, How::Drop][random.below(3) as usize]),
        };
        (rest, guest, act)
    }
}
